"""What a trained network takes in a file of so many bits, and what it is worth then.

Imported by `benchmarks/compress.py`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from hyperize import files, quantized, save
from hyperize.parts import generated_layers
from hyperize.rounding import nearest

BITS = (32, 16, 8, 4)
"""Of the numbers in a file."""
TRAINED = (32, 8, 4)
"""Bits with which a network is trained on; float16 needs no training."""
FALL = 0.1
"""Share of the learning rate with which it is."""


def size_of(model: nn.Module, bits: int) -> int:
    """Bytes of the file of a hyperized or any other model, as a safetensors file in such bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if generated_layers(model):
            dtypes = {32: None, 16: torch.float16, 8: "int8", 4: "int4"}
            save(model, path, dtype=dtypes[bits])
        else:
            save_file(stored(model, bits), path)
        return path.stat().st_size


def stored(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """A state dict by the rules of hyperize's own files: what is no parameter stays as it is."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if bits < 16:
        return files.in_bits(model, state, bits)[0]
    for name, param in model.named_parameters() if bits == 16 else ():
        state[name] = param.detach().half()
    return state


def in_bits(model: nn.Module, bits: int) -> Callable[[Tensor], Tensor]:
    """The function that a model is with such numbers; gradients pass through the rounding."""

    def ours(x: Tensor) -> Tensor:
        with quantized(model, bits):
            return model(x)

    def others(x: Tensor) -> Tensor:
        params = {name: Through.apply(p, bits) for name, p in model.named_parameters()}
        return functional_call(model, params, (x,))

    if bits == 32:
        return model
    if bits == 16:
        half = copy.deepcopy(model)
        for param in half.parameters():
            param.data = param.half().to(param.dtype)
        return half
    return ours if generated_layers(model) else others


class Through(torch.autograd.Function):
    """Rounding whose gradient is one (straight-through estimator, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, bits: int) -> Tensor:  # noqa: D102
        return nearest(param, bits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return gradient, None


def measure(
    model: nn.Module,
    accuracy: Callable[[Callable[[Tensor], Tensor]], float],
    train: Callable[[nn.Module, int], None],
) -> list[dict[str, Any]]:
    """Files of a trained model in all bits.

    Args:
        model: In evaluation mode; not changed.
        accuracy: Of a function on the test set.
        train: Trains a model a little on, with numbers of such bits, and leaves it in evaluation
            mode.

    Returns:
        For each of `BITS`: `bytes`, accuracy `as_is`, and after that training, `trained`; that of
        16 bits is with 32.
    """
    rows = []
    for bits in BITS:
        if bits in TRAINED:
            further = copy.deepcopy(model)
            train(further, bits)
        rows.append(
            {
                "bits": bits,
                "bytes": size_of(further, bits),
                "as_is": accuracy(in_bits(model, bits)),
                "trained": accuracy(in_bits(further, bits)),
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the files by their length."""
    print("\n| file | bytes | of the float32 file | rounded as it is | trained on, rounded |")
    print("|---|---:|---:|---:|---:|")
    whole = max(row["bytes"] for row in rows)
    for row in sorted(rows, key=lambda row: row["bytes"]):
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.2f}"
        print(
            f"| {row['name']}, {row['bits']} bits | {row['bytes']:,} "
            f"| 1/{whole / row['bytes']:.1f} | {row['as_is']:.2%} | {row['trained']:.2%}{spread} |"
        )


def draw(
    rows: Sequence[dict[str, Any]],
    title: str,
    taught: float,
    path: Path,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Draws accuracy over the length of the file, a line for each network.

    Args:
        rows: Of the table.
        title: Of the network and the data.
        taught: The teacher's accuracy.
        path: The PNG file to write.
        notes: Text for the file's metadata.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["name"] for row in rows))
    kinds = list(dict.fromkeys(name.partition(" ")[0] for name in names))
    others = (kind for kind in kinds if kind not in ("hyperize", "dense"))
    colors = {kind: f"C{at % 10}" for at, kind in enumerate(others, 1)}
    colors |= {"hyperize": "C0", "dense": "black"}
    markers = {32: "o", 16: "s", 8: "D", 4: "v"}
    for name in names:
        kind, _, ratio = name.partition(" ")
        line = sorted((r for r in rows if r["name"] == name), key=lambda row: row["bytes"])
        x, y = [row["bytes"] / 1e3 for row in line], [100 * row["trained"] for row in line]
        ours = kind == "hyperize"
        color = colors[kind]
        axes.plot(x, y, color=color, lw=2 if ours else 0.9, alpha=0.8, zorder=3 if ours else 2)
        for row, at, height in zip(line, x, y, strict=True):
            marker = markers[row["bits"]]
            axes.plot(at, height, marker, color=color, ms=8 if ours else 5, zorder=4)
        top = max(zip(y, x, strict=True))
        axes.annotate(
            ratio,
            top[::-1],
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=color,
        )
    axes.set(xscale="log", xlabel="length of the file (kB)", ylabel="test accuracy (%)")
    axes.set_title(title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    reached = [100 * row["trained"] for row in rows]
    # What has lost half of the best accuracy is of no use to anybody, and would flatten the rest
    axes.set_ylim(max(min(reached), max(reached) / 2) - 3, max(reached) + 3)
    handles = [Line2D([], [], color=colors[kind], label=kind) for kind in kinds]
    used = {row["bits"] for row in rows}
    handles += [
        Line2D([], [], color="k", ls="", marker=mark, ms=5, label=f"{bits} bits")
        for bits, mark in markers.items()
        if bits in used
    ]
    handles.append(
        axes.axhline(100 * taught, color="C7", lw=1, ls="--", label="before any training, 32 bits")
    )
    axes.legend(handles=handles, frameon=False, fontsize=9, ncols=2, loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata=notes)
