"""Checkpoint files of hyperized models: one safetensors file each.

Reading is for files of unknown origin: no pickle, no network, no code of the file's; everything is
compared on the meta device before memory is taken, so that a wrong file leaves nothing behind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperize.conditions import each_network
from hyperize.config import ConfigError, FileError, ModelError
from hyperize.layers import CONSTANTS, HYPERNET
from hyperize.networks import at_condition
from hyperize.parts import find_groups, generated_layers, tables
from hyperize.plan import Plan
from hyperize.rewrite import apply_plans, to_dense
from hyperize.rounding import decode, encode, is_matrix, merged, pack, rows_of, unpack
from hyperize.sites import M, structural_copy
from hyperize.timm_models import describe
from hyperize.writing import check_target, made_with, replacing

__all__ = ["FileReport", "load", "read_header", "save", "write_dense"]

PathLike = str | os.PathLike[str]

FORMAT, IN_BITS = 2, 3
"""Versions of the checkpoint file, its state-dict keys and its header: of floats, and in bits."""
STEP = ":step"
"""Suffix of the tensor with the steps of a parameter's rows, in files in bits."""
LONGEST_HEADER = 2**25
"""Bytes; the plan of ten thousand layers has a tenth of it. Parsing takes memory in proportion."""
_HEADER, _DIGEST = "hyperize", "sha256"


@dataclass(frozen=True)
class FileReport:
    """What `save` has written; `print` shows it.

    Attributes:
        path: The file.
        bytes: Its size.
        dtype: Of the stored parameters, if they were rounded for the file; "int8" or "int4" of
            files in bits.
        errors: Relative error that rounding causes, by the name of each generated weight and of
            each parameter that is stored as it is: the norm of the difference over the weight's; of
            several networks the largest.
        recorded: The architecture that the file names for `load_timm`, if it does.
        reason: Why it names none.
    """

    path: Path
    bytes: int
    dtype: torch.dtype | str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    recorded: str | None = None
    reason: str = ""

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.bytes:,} bytes"]
        if self.dtype is not None:
            worst = max(self.errors, key=lambda name: self.errors[name])
            kept = sum(self.errors.values()) / len(self.errors)
            parts.append(
                f"{_name(self.dtype)}: weights are off by {kept:.1e} of their norm in the mean, at "
                f"most by {self.errors[worst]:.1e} ({worst})"
            )
        if self.recorded:
            parts.append(f"load_timm makes it a {self.recorded}")
        else:
            parts.append(f"to be read with load(model, path): {self.reason}")
        return "\n".join(parts)


def save(
    hyper: nn.Module,
    path: PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    timm_args: Mapping[str, Any] | None = None,
) -> FileReport:
    """Writes a hyperized model to one safetensors file.

    The file holds the hyper parameters and the untouched rest, and in its header the plan,
    versions and a checksum; for a model of timm also the name and the arguments by which
    `load_timm` makes it again. It is written beside the target and moved there, so that an
    interruption leaves an older file as it was.

    Args:
        hyper: A hyperized model; not changed.
        path: The file to write, in a folder that exists; if its name has an ending, .safetensors.
        dtype: `torch.float16` or `torch.bfloat16` to round the parameters for the file; or "int8"
            or "int4", which rounds matrices to multiples of a step for each row, and vectors to
            float16 (see `quantized`). Buffers are stored as they are. What is loaded has the
            dtypes of `hyper` again.
        timm_args: Arguments of timm.create_model besides those that timm keeps with the model.

    Returns:
        The size, and what rounding costs.

    Raises:
        ModelError: The model is not hyperized, is on meta, or is wrapped or sharded; or its state
            dict holds something other than tensors.
        ConfigError: `dtype` is another one, or cannot hold the values; a parameter has a name that
            the file needs; `timm_args` do not make this model.
        FileError: The file ends in another way, or cannot be written.
    """
    plans = [group.plan for group in find_groups(hyper)]
    return write(hyper, plans, Path(path), dtype, *describe(hyper, plans, timm_args))


def write(
    hyper: nn.Module,
    plans: list[Plan],
    target: Path,
    dtype: torch.dtype | str | None,
    timm_config: dict[str, Any] | None,
    reason: str,
) -> FileReport:
    """`save` with the plans, and with what `hyperize.timm_models.describe` has found."""
    check_target(target, ".safetensors")
    state = _tensors(hyper)
    bits: dict[str, list[Any]] = {}
    if dtype in ("int8", "int4"):
        stored, values, dtypes, bits = in_bits(hyper, state, 8 if dtype == "int8" else 4)
    else:
        stored, dtypes = _rounded(hyper, state, dtype)
        values = stored
    header = {
        "format": IN_BITS if bits else FORMAT,
        "versions": made_with(),
        "plans": [plan.to_dict() for plan in plans],
        "dtypes": dtypes,
        "timm": timm_config,
    } | ({"bits": bits} if bits else {})
    header[_DIGEST] = _digest(header, stored)
    with replacing(target) as part:
        # One entry, as safetensors writes several in no fixed order
        save_file(stored, part, {_HEADER: written_header(header)})
    return FileReport(
        path=target,
        bytes=target.stat().st_size,
        dtype=dtype,
        errors=_errors(hyper, state, values) if dtype else {},
        recorded=timm_config["architecture"] if timm_config else None,
        reason=reason,
    )


def load(model: M, path: PathLike, *, condition: Any = None) -> M:
    """Reads a file that `save` wrote.

    Args:
        model: The dense architecture, as it was before `hyperize`; not changed. It may be on meta,
            then the result is on the CPU.
        path: The file.
        condition: Of a file with several networks, the one to load, as `hyperize.at_condition`
            takes it; None for all.

    Returns:
        A hyperized model with the file's tensors, in the dtypes that they had when saved.

    Raises:
        ConditionError: The file's model has no such condition.
        FileError: The file is not one that `save` wrote, is damaged or of a newer version, or
            belongs to another architecture.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    header, state = read(path)
    hyper = assemble(model, header, state, path)
    return hyper if condition is None else at_condition(hyper, condition)


def write_dense(
    hyper: nn.Module,
    path: PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    condition: Any = None,
) -> FileReport:
    """Writes the dense weights to a safetensors file: a state dict of the original model.

    Args:
        hyper: A hyperized model; not changed.
        path: The file, replaced as a whole; if its name has an ending, .safetensors.
        dtype: As in `save`, but for bits, which other libraries cannot read.
        condition: As in `to_dense`.

    Raises:
        ModelError, ConfigError, FileError: As in `save`; or the model has dynamic layers.
    """
    target = Path(path)
    check_target(target, ".safetensors")
    dense = to_dense(hyper, condition=condition)
    state = _tensors(dense)
    stored, _ = _rounded(dense, state, dtype)
    with replacing(target) as part:
        save_file(stored, part, {"format": "pt"})
    return FileReport(
        path=target,
        bytes=target.stat().st_size,
        dtype=dtype,
        errors=_errors(dense, state, stored) if dtype else {},
        reason="it holds dense weights, for load_state_dict of the original model.",
    )


def read_header(path: PathLike) -> dict[str, Any]:
    """The header of a file that `save` wrote; `plans` in it are the `Plan`s of its hypernetworks.

    Raises:
        FileError: As in `load`.
    """
    return read(path)[0]


@contextmanager
def _opened(path: PathLike) -> Iterator[Any]:
    try:
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > LONGEST_HEADER:
            raise FileError(
                f"{path} cannot be read: its header would have {length:,} bytes, of at most "
                f"{LONGEST_HEADER:,}, so it is not a file that hyperize.save wrote."
            )
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def written_header(header: Mapping[str, Any]) -> str:
    """The header as text: JSON, and packed where every byte counts, in files in bits."""
    text = json.dumps(header)
    if header["format"] != IN_BITS:
        return text
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def parsed_header(text: str) -> Any:
    """The inverse of `written_header`; takes JSON in any case.

    Raises:
        ValueError: The text is neither, or more than `LONGEST_HEADER` bytes are packed in it.
        zlib.error: As before.
    """
    if text.lstrip().startswith("{"):
        return json.loads(text)
    unpacking = zlib.decompressobj()
    unpacked = unpacking.decompress(base64.b64decode(text, validate=True), LONGEST_HEADER)
    if not unpacking.eof:
        raise ValueError("the header is cut off, or too long")
    return json.loads(unpacked)


def _parse(metadata: Mapping[str, str], path: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header with its plans read, and as it is written."""
    try:
        raw = parsed_header(metadata[_HEADER])
        written = raw["format"]
        if not isinstance(written, int):
            raise TypeError(f"format {written!r}")
    except (KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise FileError(
            f"{path} is a safetensors file, but not one that hyperize.save wrote; for a plain "
            "state dict of a hyperized model, hyperize the model first and use load_state_dict."
        ) from error
    if written > IN_BITS:
        raise FileError(
            f"{path} has format {written}, this version of hyperize reads formats {FORMAT} and "
            f"{IN_BITS}; upgrade hyperize."
        )
    if written < FORMAT:
        raise FileError(
            f"{path} has format {written}, of an older hyperize; this one reads formats {FORMAT} "
            f"and {IN_BITS}. Make it dense with the version that wrote it (hyperize convert)."
        )
    try:
        header = {"timm": None, "dtypes": {}, "versions": {}, "bits": {}} | raw
        header["plans"] = [Plan.from_dict(plan) for plan in header["plans"]]
        header["dtypes"] = {name: _dtype(of) for name, of in header["dtypes"].items()}
    except Exception as error:  # whatever else the text may hold
        raise FileError(f"{path} holds no plans that can be read: {error}") from error
    return header, raw


def read(path: PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, whose checksum is right."""
    with _opened(path) as file:
        header, raw = _parse(file.metadata() or {}, path)
        # Clones, as a mapped file's tensors are not aligned like allocated ones, for which matrix
        # products may round otherwise
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if _digest(raw, state) != raw.get(_DIGEST):
        raise FileError(f"{path} is damaged: its checksum is not that of its contents.")
    try:
        state = _from_bits(state, header["bits"])
    except Exception as error:  # the header may say anything of the tensors
        raise FileError(f"{path} has tensors in bits that cannot be read: {error}") from error
    wanted = header["dtypes"]
    return header, {
        name: tensor.to(wanted[name]) if name in wanted else tensor
        for name, tensor in state.items()
    }


def assemble(model: M, header: dict[str, Any], state: dict[str, Tensor], path: PathLike) -> M:
    """The hyperized model of a dense one and a file's contents; `model` is not changed."""
    kept = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers[name] is not None and module._buffers[name].is_meta
    ]
    if kept:
        raise FileError(
            f"no file holds {kept[0]}, a buffer outside the state dict, and the "
            f"{type(model).__name__} given is on meta; make it on the CPU."
        )
    hyper = check_fit(model, header, state, path)
    wanted = hyper.state_dict(keep_vars=True)
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    dtypes = {id(tensor): state[name].dtype for name, tensor in wanted.items()}

    def allocated(tensor: Tensor) -> Tensor:
        if id(tensor) not in dtypes:
            return tensor.detach().clone()  # a buffer outside the state dict
        empty = torch.empty(tensor.shape, dtype=dtypes[id(tensor)], device=device)
        return _like(tensor, empty)

    # Tied tensors stay tied, as each is allocated once
    hyper = structural_copy(hyper, allocated)
    hyper.load_state_dict(state)
    return hyper


def check_fit(model: M, header: dict[str, Any], state: dict[str, Tensor], path: PathLike) -> M:
    """The hyperized model on meta, but for buffers outside the state dict.

    Raises:
        FileError: The plans are not of this model, or the tensors not those of the plans.
    """
    kept = {
        id(module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    }

    def hollow(tensor: Tensor) -> Tensor:
        if id(tensor) in kept:
            return tensor.detach().clone()
        return _like(tensor, torch.empty_like(tensor, device="meta"))

    try:
        hyper = apply_plans(structural_copy(model, hollow), header["plans"])
        with torch.no_grad(), next(each_network(hyper)):
            for title, layer in generated_layers(hyper).items():
                for name, grid in layer.grids.items():
                    if tuple(layer.generate(name).shape) != grid.shape:
                        raise ConfigError(f"its tiles do not make the weight {title}.{name}.")
    except Exception as error:  # the plan may hold anything, and the model be any other
        raise _misfit_error(path, model, str(error)) from error
    wanted = hyper.state_dict(keep_vars=True)
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            problem = f"it lacks {name}"
        elif name not in wanted:
            problem = f"{name} is foreign"
        elif wanted[name].shape != state[name].shape:
            shapes = tuple(state[name].shape), tuple(wanted[name].shape)
            problem = f"{name} has the shape {shapes[0]}, needed is {shapes[1]}"
        else:
            continue
        raise _misfit_error(path, model, problem)
    return hyper


def _misfit_error(path: PathLike, model: nn.Module, problem: str) -> FileError:
    return FileError(f"{path} does not fit this {type(model).__name__}: {problem.rstrip('.')}.")


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    """A new tensor as a parameter or a buffer, as another one is."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, on the CPU; no two of its tensors share memory."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ModelError(
                f"{name} in the state dict is no tensor, and so has no place in a file."
            )
        if tensor.is_meta:
            raise ModelError(f"{name} is on meta, so there is nothing to write.")
        state[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return state


def _rounded(
    model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype | str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as stored, and the dtypes that rounded ones had.

    Raises:
        ConfigError: `dtype` is none of the half precisions, or cannot hold a value.
    """
    if dtype is None:
        return state, {}
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            'dtype must be torch.float16, torch.bfloat16, "int8", "int4" or None (dense weights: '
            f"no bits), got {dtype!r}."
        )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored, dtypes = dict(state), {}
    for name in names & state.keys():
        tensor = state[name]
        if tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize:
            stored[name] = tensor.to(dtype)
            dtypes[name] = _name(tensor.dtype)
            if bool((stored[name].isinf() & ~tensor.isinf()).any()):
                raise ConfigError(
                    f"dtype={dtype} cannot hold {name}, whose values go up to "
                    f"{float(tensor.abs().max()):.3g}; take torch.bfloat16 or None."
                )
    return stored, dtypes


def in_bits(
    model: nn.Module, state: dict[str, Tensor], bits: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str], dict[str, list[Any]]]:
    """The tensors as stored, the values that they stand for, their dtypes, bits and shapes.

    Raises:
        ConfigError: A value is not finite, before or after rounding, or a name is taken.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    several = tables(model)
    kept = model.state_dict(keep_vars=True)
    stored, values = dict(state), dict(state)
    dtypes: dict[str, str] = {}
    layout: dict[str, list[Any]] = {}
    for name in sorted(names & state.keys()):
        tensor = state[name]
        if not tensor.is_floating_point():
            continue
        shape = tensor.shape
        if id(kept[name]) in several:
            tensor = merged(tensor)
        if is_matrix(tensor):
            if name + STEP in state:
                raise ConfigError(f"{name + STEP} is a name that a file in bits needs; rename it.")
            numbers, step = encode(tensor, bits)
            stored[name] = numbers if bits == 8 else pack(numbers)
            stored[name + STEP] = step
            full = [list(shape)] if shape != tensor.shape else []
            layout[name] = [bits, list(tensor.shape), *full]
            values[name] = decode(numbers, step, tensor.dtype).view(shape)
        elif tensor.dtype.itemsize > 2 and bool((half := state[name].half()).isfinite().all()):
            stored[name], values[name] = half, half.to(tensor.dtype)
        if not bool(values[name].isfinite().all()):
            raise ConfigError(
                f"{name} holds values that are not finite, or too large to be rounded: dtype="
                f'"int{bits}" cannot hold them.'
            )
        dtypes[name] = _name(tensor.dtype)
    return stored, values, dtypes, layout


def _from_bits(state: dict[str, Tensor], layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors with those in bits as float32.

    Raises:
        ValueError: They are not what the header says.
    """
    state = dict(state)
    for name, (bits, sizes, *full) in layout.items():
        shape = tuple(int(size) for size in sizes)
        stored, step = state[name], state.pop(name + STEP)
        count = torch.Size(shape).numel()
        wanted = (torch.int8, shape) if bits == 8 else (torch.uint8, (-(-count // 2),))
        if bits not in (4, 8) or len(shape) < 2 or count == 0:
            raise ValueError(f"{name} cannot have {bits!r} bits and the shape {shape}")
        if (stored.dtype, tuple(stored.shape)) != wanted:
            raise ValueError(f"{name} is {stored.dtype} {tuple(stored.shape)}, needed is {wanted}")
        numbers = stored if bits == 8 else unpack(stored, shape)
        if step.dtype not in (torch.float16, torch.float32) or not bool(step.isfinite().all()):
            raise ValueError(f"{name + STEP} is {step.dtype}, or not finite")
        if tuple(step.shape) != (len(rows_of(numbers)),):
            raise ValueError(f"{name + STEP} does not have the rows of {name}")
        value = decode(numbers, step, torch.float32)
        state[name] = value.view(tuple(map(int, *full))) if full else value
    return state


def _errors(
    model: nn.Module, state: dict[str, Tensor], stored: dict[str, Tensor]
) -> dict[str, float]:
    """What rounding does to each weight, relative to its norm."""
    names = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}

    def taken(tensor: Tensor) -> Tensor:
        if id(tensor) not in names:
            return tensor
        return _like(tensor, stored[names[id(tensor)]].to(tensor))

    errors: dict[str, float] = {}
    generators = set()
    rounded = structural_copy(model, taken)
    layers = generated_layers(rounded)
    for one, other in zip(each_network(model), each_network(rounded), strict=True):
        with torch.no_grad(), one, other:
            for path, layer in generated_layers(model).items():
                for name in layer.generated:
                    title = f"{path}.{name}" if path else name
                    error = _error(layer.generate(name), layers[path].generate(name))
                    errors[title] = max(error, errors.get(title, 0.0))
                    generators |= {title, title + CONSTANTS}
    for path, layer in generated_layers(model).items():
        prefix = f"{path}.{HYPERNET}" if path else HYPERNET
        generators |= {f"{prefix}.{name}" for name in layer.hypernet.state_dict()}
    for name, tensor in state.items():
        changed = stored[name].dtype != tensor.dtype or not torch.equal(stored[name], tensor)
        if changed and name not in generators:
            errors[name] = _error(tensor, stored[name])
    return errors


def _error(exact: Tensor, rounded: Tensor) -> float:
    exact, rounded = exact.double(), rounded.double()
    norm = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(exact - rounded)) / norm if norm else 0.0


def _digest(header: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the rest of the header and all tensors with their names, dtypes and shapes."""
    rest = {key: value for key, value in header.items() if key != _DIGEST}
    digest = hashlib.sha256(json.dumps(rest).encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"\0{name}\0{_name(tensor.dtype)}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # (numbers * itemsize,)
    return digest.hexdigest()


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} is not a dtype that a parameter can have")
    return dtype
