"""Checkpoint files of hyperized models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file
from torch import nn

from hyperize.config import ConfigError, FileError, ModelError
from hyperize.planning import Plan
from hyperize.rewrite import apply_plan, find_hypernet

__all__ = ["load", "read_plan", "save"]

FORMAT = 1
"""Version of the checkpoint file: its state-dict keys and the plan in its header."""
_HEADER = "hyperize"


def save(hyper: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a hyperized model to one safetensors file, with its plan in the header.

    The file holds the hyper parameters and the untouched rest. It is written beside the target and
    moved there, so that an interruption leaves an older file as it was.

    Args:
        hyper: A hyperized model; not changed.
        path: The file to write.

    Raises:
        ModelError: The model is not hyperized, or is wrapped or sharded.
    """
    plan = find_hypernet(hyper)[1].plan
    header = json.dumps({"format": FORMAT, "plan": plan.to_dict()})
    tensors = {name: t.detach().contiguous().clone() for name, t in hyper.state_dict().items()}
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata={_HEADER: header})
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads a file that `save` wrote.

    Args:
        model: The dense architecture, as it was before `hyperize`; not changed. It may be on meta,
            then the result is on the CPU.
        path: The file.

    Returns:
        A hyperized model with the file's tensors.

    Raises:
        FileError: The file is not one that `save` wrote, is damaged or of a newer version, or
            belongs to another architecture.
    """
    plan = read_plan(path)
    try:
        hyper = apply_plan(model, plan)
        # Clones, as a mapped file's tensors are not aligned like allocated ones, for which matrix
        # products may round otherwise.
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        on_meta = any(p.is_meta for p in model.parameters())
        hyper.load_state_dict(state, assign=on_meta)
    except (ModelError, RuntimeError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} does not fit this {type(model).__name__}: {error}") from error
    return hyper


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in the header of a file that `save` wrote.

    Raises:
        FileError: As in `load`.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata[_HEADER])
        version = header["format"]
        if version > FORMAT:
            raise FileError(
                f"{path} has format {version}, this version of hyperize reads up to {FORMAT}; "
                "upgrade hyperize."
            )
        return Plan.from_dict(header["plan"])
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, json.JSONDecodeError, ConfigError) as error:
        raise FileError(
            f"{path} is a safetensors file, but not one that hyperize.save wrote; for a plain "
            "state dict of a hyperized model, hyperize the model first and use load_state_dict."
        ) from error
