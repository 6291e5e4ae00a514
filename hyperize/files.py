"""Checkpoint files of hyperized models: one safetensors file, or a folder as on Hugging Face.

Reading is for files of unknown origin: no pickle, no network, no code of the file's; everything is
compared on the meta device before memory is taken, so that a wrong file leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from hyperize.config import ConfigError, FileError, HyperizeError, ModelError
from hyperize.layers import EMBEDDING
from hyperize.planning import Plan
from hyperize.reporting import report
from hyperize.rewrite import apply_plan, find_hypernet, generated_layers, to_dense
from hyperize.sites import HYPERNET, structural_copy
from hyperize.writing import replacing

__all__ = [
    "FileReport",
    "from_pretrained",
    "load",
    "load_timm",
    "read_header",
    "save",
    "save_pretrained",
    "write_dense",
]

PathLike = str | os.PathLike[str]

FORMAT = 1
"""Version of the checkpoint file: its state-dict keys and its header."""
LONGEST_HEADER = 2**25
"""Bytes; the plan of ten thousand layers has a tenth of it. Parsing takes memory in proportion."""
TIMM_ARGS = (
    *("num_classes", "in_chans", "img_size", "patch_size", "window_size", "global_pool"),
    *("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "output_stride"),
    *("act_layer", "norm_layer", "dynamic_img_size", "strict_img_size", "reg_tokens"),
    *("class_token", "qkv_bias"),
)
"""Arguments of timm.create_model that a file may give: none names code, a file or a place on the
network, and none can ask for work without bounds, as a depth would."""
LARGEST_ARG = 2**16
"""Of the whole numbers among them."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
"""The files of a folder as on Hugging Face."""
_HEADER, _DIGEST = "hyperize", "sha256"


@dataclass(frozen=True)
class FileReport:
    """What `save` has written; `print` shows it.

    Attributes:
        path: The file.
        bytes: Its size.
        dtype: Of the stored parameters, if they were rounded for the file.
        errors: Relative error that rounding causes, by the name of each generated weight and of
            each parameter that is stored as it is: the norm of the difference over the weight's.
        recorded: The architecture that the file names for `load_timm`, if it does.
        reason: Why it names none.
    """

    path: Path
    bytes: int
    dtype: torch.dtype | None = None
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
    dtype: torch.dtype | None = None,
    timm_args: Mapping[str, Any] | None = None,
) -> FileReport:
    """Writes a hyperized model to one safetensors file.

    The file holds the hyper parameters and the untouched rest, and in its header the plan,
    versions and a checksum; for a model of timm also the name and the arguments by which
    `load_timm` makes it again. It is written beside the target and moved there, so that an
    interruption leaves an older file as it was.

    Args:
        hyper: A hyperized model; not changed.
        path: The file to write.
        dtype: `torch.float16` or `torch.bfloat16` to round the parameters for the file; buffers
            are stored as they are. What is loaded has the dtypes of `hyper` again.
        timm_args: Arguments of timm.create_model besides those that timm keeps with the model.

    Returns:
        The size, and what rounding costs.

    Raises:
        ModelError: The model is not hyperized, is on meta, or is wrapped or sharded; or its state
            dict holds something other than tensors.
        ConfigError: `dtype` is another one, or cannot hold the values; `timm_args` do not make
            this model.
        FileError: The file cannot be written.
    """
    find_hypernet(hyper)
    return _write(hyper, Path(path), dtype, *_timm_config(hyper, timm_args))


def _write(
    hyper: nn.Module,
    target: Path,
    dtype: torch.dtype | None,
    timm_config: dict[str, Any] | None,
    reason: str,
) -> FileReport:
    """`save` with what `_timm_config` has found."""
    state = _tensors(hyper)
    stored, dtypes = _rounded(hyper, state, dtype)
    header = {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("hyperize", "torch", "timm")},
        "plan": find_hypernet(hyper)[1].plan.to_dict(),
        "dtypes": dtypes,
        "timm": timm_config,
    }
    header[_DIGEST] = _digest(header, stored)
    with replacing(target) as part:
        # One entry, as safetensors writes several in no fixed order
        save_file(stored, part, {_HEADER: json.dumps(header)})
    return FileReport(
        path=target,
        bytes=target.stat().st_size,
        dtype=dtype,
        errors=_errors(hyper, state, stored) if dtype else {},
        recorded=timm_config["architecture"] if timm_config else None,
        reason=reason,
    )


def load(model: nn.Module, path: PathLike) -> nn.Module:
    """Reads a file that `save` wrote.

    Args:
        model: The dense architecture, as it was before `hyperize`; not changed. It may be on meta,
            then the result is on the CPU.
        path: The file.

    Returns:
        A hyperized model with the file's tensors, in the dtypes that they had when saved.

    Raises:
        FileError: The file is not one that `save` wrote, is damaged or of a newer version, or
            belongs to another architecture.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    header, state = _read(path)
    return _assemble(model, header, state, path)


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
    header, state = _read(path)
    return _assemble_timm(header["timm"], header, state, path)


def save_pretrained(
    hyper: nn.Module,
    folder: PathLike,
    *,
    dense: bool = False,
    dtype: torch.dtype | None = None,
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
    """
    find_hypernet(hyper)
    timm_config, reason = _timm_config(hyper, timm_args)
    if dense and timm_config is None:
        raise ModelError(f"a dense folder is for timm.create_model, which cannot read it: {reason}")
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"the folder {place} cannot be made: {error}") from error
    if dense:
        written = write_dense(hyper, place / WEIGHTS, dtype=dtype)
    else:
        written = _write(hyper, place / WEIGHTS, dtype, timm_config, reason)
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
    header, state = _read(place / WEIGHTS)
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{place / CONFIG} cannot be read: {error}") from error
    return _assemble_timm(config if header["timm"] else None, header, state, place / CONFIG)


def write_dense(
    hyper: nn.Module, path: PathLike, *, dtype: torch.dtype | None = None
) -> FileReport:
    """Writes the dense weights to a safetensors file: a state dict of the original model.

    Args:
        hyper: A hyperized model; not changed.
        path: The file, replaced as a whole.
        dtype: As in `save`.

    Raises:
        ModelError, ConfigError, FileError: As in `save`; or the model has dynamic layers.
    """
    dense = to_dense(hyper)
    state = _tensors(dense)
    stored, _ = _rounded(dense, state, dtype)
    target = Path(path)
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
    """The header of a file that `save` wrote; `plan` in it is a `Plan`.

    Raises:
        FileError: As in `load`.
    """
    return _read(path)[0]


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


def _parse(metadata: Mapping[str, str], path: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header with its plan read, and as it is written."""
    try:
        raw = json.loads(metadata[_HEADER])
        written = raw["format"]
        if not isinstance(written, int):
            raise TypeError(f"format {written!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is a safetensors file, but not one that hyperize.save wrote; for a plain "
            "state dict of a hyperized model, hyperize the model first and use load_state_dict."
        ) from error
    if written > FORMAT:
        raise FileError(
            f"{path} has format {written}, this version of hyperize reads up to {FORMAT}; upgrade "
            "hyperize."
        )
    try:
        header = {"timm": None, "dtypes": {}, "versions": {}} | raw
        header["plan"] = Plan.from_dict(header["plan"])
        header["dtypes"] = {name: _dtype(of) for name, of in header["dtypes"].items()}
    except Exception as error:  # whatever else the text may hold
        raise FileError(f"{path} holds no plan that can be read: {error}") from error
    return header, raw


def _read(path: PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, whose checksum is right."""
    with _opened(path) as file:
        header, raw = _parse(file.metadata() or {}, path)
        # Clones, as a mapped file's tensors are not aligned like allocated ones, for which matrix
        # products may round otherwise
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if _digest(raw, state) != raw.get(_DIGEST):
        raise FileError(f"{path} is damaged: its checksum is not that of its contents.")
    wanted = header["dtypes"]
    return header, {
        name: tensor.to(wanted[name]) if name in wanted else tensor
        for name, tensor in state.items()
    }


def _assemble(
    model: nn.Module, header: dict[str, Any], state: dict[str, Tensor], path: PathLike
) -> nn.Module:
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
    hyper = _on_meta(model, header["plan"], path)
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


def _on_meta(model: nn.Module, plan: Plan, path: PathLike) -> nn.Module:
    """The hyperized model on meta, but for buffers outside the state dict, and its plan checked.

    Raises:
        FileError: The plan is not one of this model.
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
        hyper = apply_plan(structural_copy(model, hollow), plan)
        with torch.no_grad():
            for layer in generated_layers(hyper).values():
                for name in layer.generated:
                    site = plan.sites[layer._site_index[name]].site
                    if tuple(layer.generate(name).shape) != site.shape:
                        raise ConfigError(f"its tiles do not make the weight {site.name}.")
    except Exception as error:  # the plan may hold anything, and the model be any other
        raise _misfit_error(path, model, str(error)) from error
    return hyper


def _misfit_error(path: PathLike, model: nn.Module, problem: str) -> FileError:
    return FileError(f"{path} does not fit this {type(model).__name__}: {problem.rstrip('.')}.")


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    """A new tensor as a parameter or a buffer, as another one is."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


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
            model = _create(config)
        if any(module._non_persistent_buffers_set for module in model.modules()):
            _on_meta(model, header["plan"], path)  # before memory is taken for a wrong one
            model = _create(config)  # buffers that no file holds are computed
    except FileError:
        raise
    except Exception as error:  # of timm's code, which runs on arguments from outside
        raise FileError(f"{path} names a model that timm cannot make: {error}") from error
    return _assemble(model.eval(), header, state, path)


def _create(config: Mapping[str, Any]) -> nn.Module:
    """The timm model of a config in the keys of `config.json`, at random or on meta.

    Raises:
        FileError: It asks for something else than a model of timm's registry and plain arguments.
    """
    name = config["architecture"]
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise FileError(f"{name!r} is not the name of a model that this version of timm has.")
    args = {"num_classes": config["num_classes"]} | config.get("model_args", {})
    if problem := _forbidden(args):
        raise FileError(f"{problem}; make the model yourself and use hyperize.load(model, path).")
    source = timm.models.PretrainedCfg(**config["pretrained_cfg"]).to_dict(remove_source=True)
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, pretrained=False, pretrained_cfg=source, **args)


def _forbidden(args: Mapping[str, Any]) -> str | None:
    """What a file may not ask of timm, if anything."""
    for name, value in args.items():
        if name not in TIMM_ARGS:
            return f"the argument {name} is not one that a file may give to timm"
        values = value if isinstance(value, (list, tuple)) else (value,)
        if len(values) > 4 or not all(
            v is None or (isinstance(v, (bool, float)) or _word(v) or _bounded(v)) for v in values
        ):
            return f"{name}={value!r} is not a plain value that a file may give to timm"
    return None


def _word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w*", value) is not None


def _bounded(value: Any) -> bool:
    return isinstance(value, int) and abs(value) <= LARGEST_ARG


def _timm_config(
    hyper: nn.Module, timm_args: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, str]:
    """What `load_timm` needs of a timm model, in the keys of config.json; or why there is none.

    Raises:
        ConfigError: `timm_args` are given, and do not make this model.
    """
    config, reason = None, f"{type(hyper).__name__} is not a model of timm."
    if isinstance(getattr(hyper, "pretrained_cfg", None), dict):
        try:
            # timm keeps the drop rates with the model, but leaves them out of a description
            kept = getattr(hyper, "_model_args", {})
            rates = {name: kept[name] for name in kept if name.endswith("_rate")}
            config = _describe(hyper, rates | dict(timm_args or {}))
            reason = _misfit(hyper, config)
        except Exception as error:  # of timm's code, on a model that may have been changed
            reason = f"timm cannot describe it ({error})."
    if reason and timm_args is not None:
        raise ConfigError(
            f"timm_args={dict(timm_args)!r} do not make this model: {reason} Leave them out to "
            "write a file for load(model, path)."
        )
    return (None if reason else config), reason


def _describe(hyper: nn.Module, timm_args: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(hyper, str(path), model_args=timm_args)
        return json.loads(path.read_text())


def _misfit(hyper: nn.Module, config: Mapping[str, Any]) -> str:
    """How the model of a config differs from the dense one of a hyperized model; "" if it doesn't.

    Names and shapes of all tensors are compared, and what the modules print of themselves, in
    which activations, strides and the like appear.
    """
    plan = find_hypernet(hyper)[1].plan
    try:
        with torch.device("meta"):
            made = _create(config).train(hyper.training)
        again = apply_plan(made, plan)
    except HyperizeError as error:
        return str(error)
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (hyper, again))
    if ours != theirs:
        return f"timm.create_model({config['architecture']!r}) makes other tensors than it has."
    if repr(hyper) != repr(again):
        return f"timm.create_model({config['architecture']!r}) makes other layers than it has."
    return ""


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
    model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as stored, and the dtypes that rounded ones had.

    Raises:
        ConfigError: `dtype` is none of the half precisions, or cannot hold a value.
    """
    if dtype is None:
        return state, {}
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype must be torch.float16, torch.bfloat16 or None, got {dtype!r}.")
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


def _errors(
    model: nn.Module, state: dict[str, Tensor], stored: dict[str, Tensor]
) -> dict[str, float]:
    """What rounding does to each weight, relative to its norm."""
    names = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}

    def taken(tensor: Tensor) -> Tensor:
        if id(tensor) not in names:
            return tensor
        return _like(tensor, stored[names[id(tensor)]].to(tensor))

    errors, generators = {}, set()
    layers = generated_layers(structural_copy(model, taken))
    with torch.no_grad():
        for path, layer in generated_layers(model).items():
            for name in layer.generated:
                title = f"{path}.{name}" if path else name
                errors[title] = _error(layer.generate(name), layers[path].generate(name))
                generators.add(title + EMBEDDING)
    if layers:
        host, hypernet = find_hypernet(model)
        prefix = f"{host}.{HYPERNET}" if host else HYPERNET
        generators |= {f"{prefix}.{name}" for name in hypernet.state_dict()}
    for name, tensor in state.items():
        if stored[name].dtype != tensor.dtype and name not in generators:
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} is not a dtype that a parameter can have")
    return dtype


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
