"""Folders as on the Hugging Face Hub, and files that name a model of timm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from hyperize.conditions import conditions_of
from hyperize.config import ConditionError, FileError, ModelError
from hyperize.files import (
    FileReport,
    PathLike,
    assemble,
    check_fit,
    load,
    read,
    write,
    write_dense,
)
from hyperize.parts import find_groups
from hyperize.reporting import report
from hyperize.sites import M
from hyperize.timm_models import create, describe
from hyperize.writing import CARD, CONFIG, WEIGHTS, replacing

__all__ = ["from_pretrained", "load_timm", "save_pretrained"]


def load_timm(path: PathLike) -> nn.Module:
    """Reads a file that `save` wrote of a timm model, with nothing but the file.

    The model is made by timm's own code from the recorded name and arguments. Nothing is
    downloaded and no code from the file is run.

    Args:
        path: The file.

    Returns:
        A hyperized model in evaluation mode, on the CPU.

    Raises:
        FileError: As in `load`; or the file names no model of this version of timm.
    """
    header, state = read(path)
    return _assemble_timm(header["timm"], header, state, path)


def save_pretrained(
    hyper: nn.Module,
    folder: PathLike,
    *,
    dense: bool = False,
    dtype: torch.dtype | str | None = None,
    timm_args: Mapping[str, Any] | None = None,
) -> FileReport:
    """Writes a folder in the layout of the Hugging Face Hub.

    It holds `config.json` in timm's keys, `model.safetensors` and a model card, `README.md`; each
    is replaced as a whole. To publish it, `huggingface_hub.upload_folder`.

    Args:
        hyper: A hyperized model, of timm if `dense`; not changed.
        folder: The folder, made if missing.
        dense: Write the dense weights, so that plain timm reads the folder:
            `timm.create_model("local-dir:FOLDER", pretrained=True)`.
        dtype: As in `save`; with `dense`, of the dense weights, which timm casts when it reads.
        timm_args: As in `save`.

    Returns:
        What was written to `model.safetensors`.

    Raises:
        ModelError, ConfigError, FileError: As in `save`; `dense` and the model is not one that timm
            can make again.
        ConditionError: `dense`, and the model has conditions.
    """
    plans = [group.plan for group in find_groups(hyper)]
    if dense and conditions_of(hyper):
        raise ConditionError(
            "the model has conditions, and dense weights are of one network: pass "
            "at_condition(hyper, k)."
        )
    timm_config, reason = describe(hyper, plans, timm_args)
    if dense and timm_config is None:
        raise ModelError(f"a dense folder is for timm.create_model, which cannot read it: {reason}")
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = error.strerror or error
        raise FileError(f"the folder {place} cannot be made: {said}") from error
    if dense:
        written = write_dense(hyper, place / WEIGHTS, dtype=dtype)
    else:
        written = write(hyper, plans, place / WEIGHTS, dtype, timm_config, reason)
    config = timm_config or {"architecture": type(hyper).__name__}
    if not dense:
        config = config | {"library_name": "hyperize"}
    for name, text in (
        (CONFIG, json.dumps(config, indent=2)),
        (CARD, _card(hyper, config["architecture"], dense=dense, timm=bool(timm_config))),
    ):
        with replacing(place / name) as part:
            part.write_text(text, encoding="utf-8")
    return written


@overload
def from_pretrained(folder: PathLike, model: None = None) -> nn.Module: ...


@overload
def from_pretrained(folder: PathLike, model: M) -> M: ...


def from_pretrained(folder: PathLike, model: nn.Module | None = None) -> nn.Module:
    """Reads a folder that `save_pretrained` wrote of a hyperized model.

    Args:
        folder: A folder on this machine; one of the Hub is fetched by
            `huggingface_hub.snapshot_download` first.
        model: The dense architecture, as in `load`; `None` for the timm model that `config.json`
            names.

    Returns:
        A hyperized model; in evaluation mode if timm made it.

    Raises:
        FileError: The folder or one of its files is missing, or as in `load` and `load_timm`.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileError(
            f"{place} is not a folder on this machine; fetch one from the Hub with "
            "huggingface_hub.snapshot_download first."
        )
    if model is not None:
        return load(model, place / WEIGHTS)
    header, state = read(place / WEIGHTS)
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{place / CONFIG} cannot be read: {error}") from error
    return _assemble_timm(config if header["timm"] else None, header, state, place / CONFIG)


def _assemble_timm(
    config: Any, header: dict[str, Any], state: dict[str, Tensor], path: PathLike
) -> nn.Module:
    """`_assemble` with the model of timm that a config describes."""
    if config is None:
        raise FileError(
            f"{path} names no timm model that could be made from a name and plain arguments; make "
            "the model yourself and use hyperize.load(model, path)."
        )
    try:
        with torch.device("meta"):
            model = create(config)
        if any(module._non_persistent_buffers_set for module in model.modules()):
            check_fit(model, header, state, path)  # before memory is taken for a wrong one
            model = create(config)  # buffers that no file holds are computed
    except FileError:
        raise
    except Exception as error:  # of timm's code, which runs on arguments from outside
        raise FileError(f"{path} names a model that timm cannot make: {error}") from error
    return assemble(model.eval(), header, state, path)


def _card(hyper: nn.Module, architecture: str, *, dense: bool, timm: bool) -> str:
    """The model card."""
    figures = report(hyper)
    name = f"{architecture}, {'dense' if dense else 'hyperized'}"
    about = (
        f"Of its {figures.total_dense_params:,} parameters, {figures.dense_params:,} "
        f"{'were' if dense else 'are'} generated by one shared hypernetwork (arXiv 1609.09106) "
        f"with [hyperize](https://pypi.org/project/hyperize) from {figures.hyper_params:,}."
    )
    if dense:
        code = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'
    elif timm:
        code = 'from hyperize import from_pretrained\n\nmodel = from_pretrained("FOLDER")'
    else:
        code = (
            "from hyperize import from_pretrained\n\n"
            f'model = from_pretrained("FOLDER", model)  # a {architecture} of your own code'
        )
    tags = ["hyperize", "hypernetwork", *(["timm"] if timm else [])]
    return "\n".join(
        (
            "---",
            "tags:",
            *(f"- {tag}" for tag in tags),
            f"library_name: {'timm' if dense else 'hyperize'}",
            "---",
            f"# {name}",
            "",
            about,
            "",
            "```python",
            code,
            "```",
            "",
            "```",
            str(figures),
            "```",
            "",
        )
    )
