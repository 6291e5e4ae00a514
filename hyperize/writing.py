"""Writing a file so that there is never a part of it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from hyperize.config import FileError

__all__ = ["replacing"]


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
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{target} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # it was moved, or never made; what failed is raised already
            part.unlink()
