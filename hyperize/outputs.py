"""What a command reads and writes, looked at before it works and before torch is imported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from hyperize.config import FileError
from hyperize.writing import CARD, CONFIG, WEIGHTS, check_ending

__all__: list[str] = []

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of the images in a folder; other files in it are left alone."""
_ENDINGS = {
    "fit": (".safetensors",),
    "convert": (".safetensors",),
    "export": (".onnx", ".pt2"),
}
"""What the outputs of commands can end in."""


def check_inputs(args: argparse.Namespace) -> None:
    """Looks for what a command will read.

    Args:
        args: Of any command.

    Raises:
        FileError: It is not there, or of another kind.
    """
    for flag, source in _inputs(args):
        if flag == "--data-dir":
            if not os.path.isdir(source):
                raise FileError(
                    f"{flag} {source} {_fault(source, 'folder')}, and must be one of images."
                )
            if not any(True for _ in images(source)):
                raise FileError(
                    f"{flag} {source} holds no images, that is, files that end in "
                    f"{', '.join(IMAGES)}."
                )
        elif flag != "--model-kwargs" and not os.path.isfile(source):
            raise FileError(f"{flag} {source} {_fault(source, 'file')}; name the file to read.")


def _fault(path: str, kind: str) -> str:
    return f"is not a {kind}" if os.path.lexists(path) else "does not exist"


def check_outputs(args: argparse.Namespace) -> None:
    """Looks at what a command will write, before it works; nothing is written or made here.

    Args:
        args: Of any command; one that writes no file has nothing to be checked.

    Raises:
        FileError: An output has the ending of something else; is an input or another output; is
            there already, without --force; is a folder or a device; or its folder is missing or
            cannot be written to.
    """
    outputs = list(_outputs(args))
    for at, (title, target, folder, endings) in enumerate(outputs):
        for flag, source in _inputs(args) if os.path.exists(target) else ():
            if any(_same(target, file) for file in _files_read(source)):
                raise FileError(
                    f"{title} is a file that {flag} {source} reads, and no input is overwritten, "
                    "not even with --force; name another file."
                )
        for other, path, *_ in outputs[:at]:
            if _same(target, path):
                raise FileError(
                    f"{title} is the same file as {other}, and each output needs a file of its "
                    "own; name another file."
                )
        if os.path.exists(target) and not os.path.isfile(target):
            kind = "a folder" if os.path.isdir(target) else "a device or a pipe"
            raise FileError(f"{title} is {kind}, and the output is a file; name a file.")
        if endings:
            check_ending(title, *endings, needed=args.command == "export")
        if os.path.lexists(target) and not args.force:
            raise FileError(
                f"{title} exists already, and no file is overwritten unasked; name another file, "
                "or add --force to overwrite it."
            )
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            fault = "cannot be written to" if os.path.isdir(folder) else "is not a folder"
            raise FileError(
                f"{title} cannot be written: {folder} {fault}, and an output goes to a folder that "
                "exists and can be written to; make it so, or name another."
            )


def _outputs(args: argparse.Namespace) -> Iterator[tuple[str, Path, Path, tuple[str, ...]]]:
    """The files that a command will write.

    Yields:
        What errors call it, its path, the folder for it, and what its name can end in.
    """
    for flag in ("out", "html"):
        if (value := getattr(args, flag, None)) is None:
            continue
        path, title = Path(value), f"--{flag} {value}"
        if flag == "out" and is_folder(args):
            folder = path  # which is made, with those above it
            while not os.path.lexists(folder) and folder != folder.parent:
                folder = folder.parent
            for name in (WEIGHTS, CONFIG, CARD):
                yield f"{name} in {title}", path / name, folder, ()
        else:
            endings = _ENDINGS[args.command] if flag == "out" else (".html", ".htm")
            yield title, path, path.parent, endings


def is_folder(args: argparse.Namespace) -> bool:
    """Whether --out of `convert` names a folder: one that is there, or a name without an ending."""
    path = Path(args.out)
    if args.command != "convert" or path.suffix == ".safetensors":
        return False
    return not path.suffix or args.out.endswith(("/", os.sep)) or path.is_dir()


def _inputs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The files and folders that a command reads, each after its flag."""
    for flag, name in (
        ("--checkpoint", "checkpoint"),
        ("--data-dir", "data_dir"),
        ("FILE", "file"),
    ):
        if (value := getattr(args, name, None)) is not None:
            yield from ((flag, one) for one in ([value] if isinstance(value, str) else value))
    values = list((getattr(args, "model_kwargs", None) or {}).values())
    for value in values:  # grows: `checkpoint_path` is text, `pretrained_cfg_overlay` has some
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, str):
            yield "--model-kwargs", value


def _files_read(source: str) -> Iterator[Path]:
    """An input itself, or if it is a folder, the images in it."""
    yield Path(source)
    yield from images(source)


def images(folder: str) -> Iterator[Path]:
    """The images in a folder and those below it, in the order of their names."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (
            Path(place, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in IMAGES
        )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, through links or not, there already or not."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)
