"""ONNX files of hyperized models, compared with the model before they are put in place."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hyperize.conditions import conditions_of
from hyperize.config import ConditionError, ConfigError, ModelError
from hyperize.dynamic import HyperLSTM, HyperLSTMCell
from hyperize.networks import at_condition
from hyperize.parts import find_groups
from hyperize.rewrite import to_dense
from hyperize.writing import check_target, replacing

__all__ = ["OnnxReport", "export_onnx"]

LARGEST_ONNX = 2**31 - 2**24
"""Bytes of parameters in one ONNX file: protobuf ends at 2 GiB, and the graph needs some of it."""
LARGEST_FOLDED = 64
"""Bytes of a constant that is computed before a file with the generator is written: shapes and
indices, but no weights, which would make the file as large as the dense one."""


@dataclass(frozen=True)
class OnnxReport:
    """What `export_onnx` has written; `print` shows it.

    Attributes:
        path: The file.
        bytes: Its size.
        opset: Version of ONNX's operators that it uses.
        max_error: Largest difference between the outputs of onnxruntime and torch, over all outputs
            and all sizes that were tried, each divided by the largest magnitude in that output.
    """

    path: Path
    bytes: int
    opset: int
    max_error: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes:,} bytes, opset {self.opset}; onnxruntime differs from "
            f"torch by {self.max_error:.1e} of the outputs' scale at most"
        )


def export_onnx(
    hyper: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor],
    *,
    dense: bool = True,
    condition: Any = None,
    dynamic: Sequence[Mapping[int, str]] | None = None,
    tolerance: float = 1e-5,
    opset: int = 18,
) -> OnnxReport:
    """Writes an ONNX file of a hyperized model, after comparing it with the model.

    The file is run in onnxruntime on the example inputs, and on inputs that repeat them to twice
    their size along the dynamic axes of each name. Only if all outputs agree is it moved to `path`,
    so that a failure leaves an older file as it was. The model is exported as it is in evaluation
    mode, on the CPU. An LSTM, GRU or RNN becomes one ONNX operator per layer.

    Inputs have the names of the arguments of the model's forward; the output is called "output", or
    "output_0", "output_1" and so on, in the order of the forward's nested result.

    Args:
        hyper: A hyperized model; not changed.
        path: The file to write, in a folder that exists; if its name has an ending, .onnx.
        example_inputs: A tensor, or a tensor for each argument of the model's forward.
        dense: Export what `to_dense` makes, which has nothing of hyperize in it. Otherwise the file
            holds the generator and the embeddings, is smaller by the compression, and computes the
            weights; onnxruntime does so once, when it loads the file.
        condition: Of a model with conditions, which network, as `hyperize.at_condition` takes it.
        dynamic: A mapping from axes to names for each input, as `[{0: "batch"}]` for images or
            `[{0: "time", 1: "batch"}]` for sequences; axes of the same name have the same size.
            All other axes have the sizes of `example_inputs`, by default all.
        tolerance: Largest `OnnxReport.max_error` that is accepted. The default is for float32.
        opset: Version of ONNX's operators.

    Returns:
        The file's size and how far onnxruntime is from torch.

    Raises:
        ModelError: The model is not hyperized, is on meta or wrapped; cannot run on the inputs; has
            dynamic layers, or parts that ONNX lacks or that need the given sizes; has 2 GiB of
            parameters or more, which one file cannot hold; or the outputs do not agree.
        ConditionError: It has conditions, and none or another one is given.
        ConfigError: `example_inputs`, `dynamic`, `tolerance` or `opset` is not as described.
        FileError: The file ends in another way, or cannot be written.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    runtime, script = _onnx_packages()
    inputs = _example_tensors(example_inputs)
    axes = _dynamic_axes(dynamic, inputs)
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance is relative and must be between 0 and 1, got {tolerance!r}.")
    if not isinstance(opset, int) or isinstance(opset, bool):
        raise ConfigError(f"opset must be an integer as 18, got {opset!r}.")
    target = Path(path)
    check_target(target, ".onnx")
    if condition is not None:
        hyper = at_condition(hyper, condition)
    elif isinstance(hyper, nn.Module) and conditions_of(hyper):
        raise ConditionError(
            "the model has conditions, and a file is of one network; pass condition=k."
        )
    model = _exportable(hyper, dense)
    names = list(dict.fromkeys(name for mapping in axes for name in mapping.values()))
    trials = [inputs, *(_grown(inputs, axes, {name}) for name in names)]
    expected = [_outputs(model, trial) for trial in trials]
    data = _onnx_bytes(
        model,
        # An axis of size 1 would be taken for one that never grows
        _grown(inputs, axes, set(names)),
        axes,
        outputs=len(expected[0]),
        fold=dense,
        opset=opset,
        script=script,
    )
    error = _largest_error(runtime, data, trials, expected)
    if not error <= tolerance:  # also if it is not a number
        raise ModelError(
            f"the ONNX model of {type(hyper).__name__} differs from torch by {error:.1e} of the "
            f"outputs' scale, more than tolerance={tolerance:.1e}, so it is not written. Raise "
            "tolerance if that is rounding; a model whose Python code looks at values or sizes "
            "cannot be exported."
        )
    with replacing(target) as part:
        part.write_bytes(data)
    return OnnxReport(target, len(data), opset, error)


def _onnx_packages() -> tuple[Any, Any]:
    """The packages onnxruntime and onnxscript, which nothing else needs."""
    try:
        for name in ("onnx", "onnxscript.optimizer"):
            import_module(name)
        return import_module("onnxruntime"), import_module("onnxscript")
    except ImportError as error:
        raise ImportError(
            "export_onnx needs onnx, onnxscript and onnxruntime; install them with "
            f"pip install 'hyperize[export]' ({error})."
        ) from error


def _example_tensors(example_inputs: Any) -> tuple[Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if (
        not isinstance(inputs, (list, tuple))
        or not inputs
        or not all(isinstance(x, Tensor) and x.numel() for x in inputs)
    ):
        got = [type(x).__name__ for x in inputs] if isinstance(inputs, (list, tuple)) else inputs
        raise ConfigError(
            "example_inputs must be a tensor, or a tuple with a tensor for each argument of the "
            f"model's forward, none of them empty, got {got!r}. Wrap a model that takes anything "
            "else in one that takes tensors, before hyperize()."
        )
    return tuple(x.detach().cpu() for x in inputs)


def _dynamic_axes(dynamic: Any, inputs: tuple[Tensor, ...]) -> list[dict[int, str]]:
    """`dynamic` in canonical form: a dict for each input."""
    if dynamic is None:
        return [{} for _ in inputs]
    rule = (
        "dynamic must have a mapping from axes to names for each input, as "
        f'[{{0: "batch"}}], got {dynamic!r} for inputs of shapes '
        f"{', '.join(str(tuple(x.shape)) for x in inputs)}"
    )
    if not isinstance(dynamic, (list, tuple)) or len(dynamic) != len(inputs):
        raise ConfigError(f"{rule}: give {len(inputs)} of them, {{}} for an input without.")
    sizes: dict[str, int] = {}
    for mapping, x in zip(dynamic, inputs, strict=True):
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{rule}: {mapping!r} is not a mapping.")
        for axis, name in mapping.items():
            if not isinstance(axis, int) or not 0 <= axis < x.ndim:
                raise ConfigError(f"{rule}: axis {axis!r} is not one of 0 to {x.ndim - 1}.")
            if not isinstance(name, str) or not name.isidentifier():
                raise ConfigError(f"{rule}: {name!r} is not a name such as a Python variable has.")
            if sizes.setdefault(name, x.shape[axis]) != x.shape[axis]:
                raise ConfigError(f"{rule}: the axes called {name!r} differ in size.")
    return [dict(mapping) for mapping in dynamic]


def _exportable(hyper: nn.Module, dense: bool) -> nn.Module:
    """A copy on the CPU, in evaluation mode, that is to be exported."""
    find_groups(hyper)
    if any(p.is_meta for p in hyper.parameters()):
        raise ModelError(
            f"{type(hyper).__name__} is on the meta device, so it has no values; load it first."
        )
    for name, module in hyper.named_modules():
        at = name or "the model itself"
        if isinstance(module, (HyperLSTM, HyperLSTMCell)):
            raise ModelError(
                f"{at} is a dynamic hypernetwork ({type(module).__name__}), whose weights change "
                "with each step by an operator that ONNX lacks, so it has no ONNX form. Run the "
                'hyperized model as it is, or hyperize with lstm="static".'
            )
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise ModelError(
                f"{at} is an LSTM with projections (proj_size={module.proj_size}), which ONNX "
                "lacks; export a model without."
            )
    try:
        model = copy.deepcopy(hyper)
    except Exception as error:  # any model code can run here, and raise anything
        raise ModelError(
            f"{type(hyper).__name__} cannot be copied ({type(error).__name__}: {error}), so it "
            "cannot be exported."
        ) from error
    if dense:
        to_dense(model, inplace=True)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > LARGEST_ONNX:
        advice = "Use dense=False, or a model of half precision." if dense else ""
        raise ModelError(
            f"{type(hyper).__name__} has {size:,} bytes of parameters, and an ONNX file ends at "
            f"2 GiB. {advice}".rstrip()
        )
    return model.cpu().eval()


def _grown(
    inputs: tuple[Tensor, ...], axes: list[dict[int, str]], names: set[str]
) -> tuple[Tensor, ...]:
    """The inputs at twice their size along the named axes; repeated, so that values stay valid."""
    grown = []
    for x, mapping in zip(inputs, axes, strict=True):
        for axis, name in mapping.items():
            if name in names:
                x = torch.cat([x, x], axis)
        grown.append(x)
    return tuple(grown)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors of what the model computes, in order."""
    try:
        with torch.no_grad():
            return _tensors(model(*inputs))
    except Exception as error:  # any model code can run here, and raise anything
        raise ModelError(
            f"{type(model).__name__} does not run on inputs of shapes "
            f"{', '.join(str(tuple(x.shape)) for x in inputs)}, which are example_inputs, at twice "
            f"their size along dynamic axes ({type(error).__name__}: {error})."
        ) from error


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    return [t for part in output for t in _tensors(part)] if output is not None else []


def _onnx_bytes(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    axes: list[dict[int, str]],
    *,
    outputs: int,
    fold: bool,
    opset: int,
    script: Any,
) -> bytes:
    """The contents of an ONNX file; with `fold`, what depends on parameters only is computed."""
    names = ["output"] if outputs == 1 else [f"output_{at}" for at in range(outputs)]
    dims = {name: torch.export.Dim(name) for mapping in axes for name in mapping.values()}
    shapes = tuple({axis: dims[name] for axis, name in mapping.items()} for mapping in axes)
    try:
        with _RecurrentLayers(), torch.no_grad(), warnings.catch_warnings():
            # Of nn.LSTM, which keeps its weights in a list too and renews it when called
            warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")
            # Of axes that share a name, as they should
            warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                optimize=fold,
                output_names=names,
                dynamic_shapes=shapes,
                custom_translation_table={
                    torch.ops.hyperize.onnx_recurrent.default: _recurrent_operator(script.opset18)
                },
            )
    except Exception as error:  # any model code can run here, and raise anything
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n\n")[0]  # then advice on torch's own source
        raise ModelError(
            f"torch.onnx cannot export {type(model).__name__} with dynamic={axes} "
            f"({type(cause).__name__}: {reason})."
        ) from error
    assert program is not None
    if not fold:
        script.optimizer.optimize(
            program.model, input_size_limit=LARGEST_FOLDED, output_size_limit=LARGEST_FOLDED
        )
    proto = program.model_proto
    if (made := proto.opset_import[0].version) != opset:
        raise ConfigError(f"torch.onnx cannot make opset {opset}; it made {made}, ask for that.")
    # Stack traces with the paths of this machine, and larger than a small generator
    for part in (proto.graph.node, proto.graph.initializer, proto.graph.value_info):
        for item in part:
            item.ClearField("metadata_props")
    return bytes(proto.SerializeToString())


_CELLS = {
    "lstm": ("LSTM", (0, 3, 1, 2)),
    "gru": ("GRU", (1, 0, 2)),
    "rnn_tanh": ("RNN", (0,)),
    "rnn_relu": ("RNN", (0,)),
}
"""By torch's name of a recurrence, ONNX's operator, and torch's gates in the order of ONNX."""

# One layer, of one or both directions, with the arguments of ONNX's operators: x (T, N, C), w and r
# (directions, gates * H, C or H), b (directions, 2 * gates * H), h and c (directions, N, H) ->
# (T, directions, N, H), h, c. It is written to graphs and never run; a fake is all it has.
torch.library.define(
    "hyperize::onnx_recurrent",
    "(Tensor x, Tensor w, Tensor r, Tensor b, Tensor h, Tensor c, str cell)"
    " -> (Tensor, Tensor, Tensor)",
)


def _fake_recurrent(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, c: Tensor, cell: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape[0], r.shape[0], x.shape[1], r.shape[2])
    return y, torch.empty_like(h), torch.empty_like(c)


torch.library.register_fake("hyperize::onnx_recurrent", _fake_recurrent)


class _RecurrentLayers(TorchFunctionMode):
    """Replaces torch's recurrences by ONNX's, whatever module calls them.

    torch.export runs them step by step, which fixes the number of steps.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        cell = getattr(func, "__name__", "")
        if cell in _CELLS and isinstance(args[3], bool):  # not those of packed sequences
            states = args[1] if cell == "lstm" else (args[1], args[1])
            return _recurrence(cell, args[0], states, *args[2:])
        return func(*args, **(kwargs or {}))


def _recurrence(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """torch.lstm, torch.gru or torch.rnn, in evaluation mode, by hyperize::onnx_recurrent."""
    gates = _CELLS[cell][1]
    directions = 2 if bidirectional else 1
    count = 4 if has_biases else 2  # weights of one direction

    def reordered(weight: Tensor) -> Tensor:
        size = weight.shape[0] // len(gates)
        return torch.cat([weight[gate * size : (gate + 1) * size] for gate in gates])

    if batch_first:
        x = x.transpose(0, 1)  # (N, T, C) -> (T, N, C)
    last = []
    for layer in range(num_layers):
        part = slice(layer * directions, (layer + 1) * directions)
        each = [
            [reordered(weight) for weight in params[at * count : (at + 1) * count]]
            for at in range(part.start, part.stop)
        ]
        w, r = (torch.stack([weights[at] for weights in each]) for at in (0, 1))
        if has_biases:
            b = torch.stack([torch.cat(weights[2:]) for weights in each])
        else:
            b = w.new_zeros(directions, 2 * w.shape[1])
        h, c = (state[part] for state in states)
        y, h, c = torch.ops.hyperize.onnx_recurrent(x, w, r, b, h, c, cell)
        x = y.transpose(1, 2).flatten(2)  # (T, directions, N, H) -> (T, N, directions * H)
        last.append((h, c))
    if batch_first:
        x = x.transpose(0, 1)  # (T, N, C) -> (N, T, C)
    h, c = (torch.cat(state) for state in zip(*last, strict=True))
    return (x, h, c) if cell == "lstm" else (x, h)


def _recurrent_operator(operators: Any) -> Callable[..., Any]:
    """What torch.onnx writes for hyperize::onnx_recurrent."""

    def recurrent(x, w, r, b, h, c, cell: str):  # type: ignore[no-untyped-def]
        name = _CELLS[cell][0]
        options = {
            "hidden_size": r.shape[2],
            "direction": "bidirectional" if r.shape[0] == 2 else "forward",
        }
        if name == "LSTM":
            return operators.LSTM(x, w, r, b, None, h, c, **options)
        if name == "GRU":
            options["linear_before_reset"] = 1
        else:
            options["activations"] = [cell.removeprefix("rnn_").capitalize()] * r.shape[0]
        y, h = getattr(operators, name)(x, w, r, b, None, h, **options)
        return y, h, h

    return recurrent


def _largest_error(
    runtime: Any,
    data: bytes,
    trials: list[tuple[Tensor, ...]],
    expected: list[list[Tensor]],
) -> float:
    """`OnnxReport.max_error`; infinite if a shape differs."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]
        found = [
            session.run(None, {name: x.numpy() for name, x in zip(names, trial, strict=True)})
            for trial in trials
        ]
    except Exception as error:  # onnxruntime has many types of error, and no base of them
        raise ModelError(f"onnxruntime cannot run the ONNX model, not written: {error}") from error
    return max(
        (
            _error(torch.from_numpy(a), b)
            for got, wanted in zip(found, expected, strict=True)
            for a, b in zip(got, wanted, strict=True)
        ),
        default=0.0,
    )


def _error(a: Tensor, b: Tensor) -> float:
    """Largest difference of a from b, over b's largest magnitude."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    differ = (a != b).flatten()  # what is equal and infinite has no difference
    if not differ.any():
        return 0.0
    difference = (a - b).flatten()[differ].abs().max()
    return float(difference / b[b.isfinite()].abs().max())
