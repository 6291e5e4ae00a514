"""Writing a file so that there is never a part of it, under a name that says what is in it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import SafetensorError

from hyperize.config import FileError

__all__ = ["check_ending", "check_target", "made_with", "replacing"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
"""The files of a folder as on Hugging Face."""


def made_with() -> dict[str, str]:
    """The installed versions of what files and pages are made with."""
    versions = {}
    for package in ("hyperize", "torch", "timm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            versions[package] = "not installed"
    return versions


def check_ending(path: str | os.PathLike[str], *endings: str, needed: bool = False) -> None:
    """Refuses a name that says that something else is in the file.

    Args:
        path: The file to write.
        *endings: Those that are right, as ".safetensors".
        needed: Whether a name without an ending is refused, too.

    Raises:
        FileError: It ends in another way.
    """
    ending = Path(path).suffix.lower()
    if ending not in endings and (ending or needed):
        raise FileError(f"{path} must end in {' or '.join(endings)}, which is what it will hold.")


def check_target(path: str | os.PathLike[str], *endings: str) -> None:
    """Looks at a file to write before there is work for it.

    Args:
        path: The file.
        *endings: As in `check_ending`.

    Raises:
        FileError: It ends in a wrong way, or its folder is missing.
    """
    check_ending(path, *endings)
    if not (folder := Path(path).parent).is_dir():
        raise FileError(f"{path} cannot be written: {folder} is not a folder.")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file beside the target, which takes its place at the end, unless something is raised.

    Args:
        target: The file to write; an older one stays whole until then.

    Yields:
        The path to write to.

    Raises:
        FileError: It cannot be written or moved.
    """
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # of any new file; safetensors lets nobody else read its own
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or str(error).replace(str(part), str(target))
        raise FileError(f"{target} cannot be written: {said}") from error
    finally:
        with suppress(OSError):  # it was moved, or never made; what failed is raised already
            part.unlink()
