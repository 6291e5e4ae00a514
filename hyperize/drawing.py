"""Pictures of a rewrite: a chart of bars, kernels as PNG, embeddings as points in a plane.

Everything is bounded: however many layers and tiles a model has, only so many are drawn.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from hyperize.conditions import condition
from hyperize.layers import Generated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Bar", "Picture", "Projection", "Source", "bar_chart", "picture", "project", "spread"]

DOTS = 1200
"""Embeddings in a projection, at most; its cost grows with the cube."""
KERNELS = 8
"""Kernels along each side of a picture, at most."""
MATRIX = 96
"""Rows and columns of a matrix's picture, at most."""
PIXELS = 240
"""A picture's width, about, and half its height at most."""
SATURATION = 2.0
"""Root mean squares at which colours saturate: the few larger weights would leave the rest pale."""
BELOW, ABOVE, RULE = (37, 99, 235), (234, 88, 12), (128, 128, 128)
"""Colours of weights below and above zero, and of the rules between kernels."""
ROWS = 120
"""Layers that a chart has names for, at most; of more, every n-th is named."""
NAME = 40
"""Letters of a name in a chart, about."""

NETWORKS = 24
"""Networks that are compared with each other, at most."""
COMPARED = 2**20
"""Weights of each that are looked at for it, about."""

T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """One line of the charts: a generated weight or a dynamic layer, before and after.

    Attributes:
        name: Name of the weight.
        kind: Kind of its layer.
        shape: Its shape, as in "64x3x7x7".
        dense: Parameters before.
        hyper: Parameters of its own after; the hypernetwork is shared and not in here.
    """

    name: str
    kind: str
    shape: str
    dense: int
    hyper: int


@dataclass(frozen=True)
class Source:
    """Where a generated weight comes from.

    Attributes:
        name: Name of the weight.
        layer: The layer, which knows its hypernetwork.
        param: Name of the parameter in the layer.
        shape: Shape of the weight.
    """

    name: str
    layer: Generated
    param: str
    shape: tuple[int, ...]

    @property
    def embedding(self) -> Tensor | None:
        """Its embeddings, (tiles, Nz); `None` if the layer has become dense since."""
        if not isinstance(self.layer, Generated):
            return None
        return self.layer.chosen(self.param).detach()

    @property
    def tiles(self) -> int:
        """Number of its embeddings."""
        return 0 if self.embedding is None else len(self.embedding)

    def weight(self) -> Tensor:
        """The weight that is generated now."""
        with torch.no_grad():
            return self.layer.generate(self.param).detach()


@dataclass(frozen=True)
class Projection:
    """Embeddings in the plane of their two principal components.

    Attributes:
        layers: Name of each weight and the points of its embeddings, (points, 2), in [-1, 1].
        explained: Share of the drawn embeddings' variance along each of the two axes.
        drawn: Number of points.
        total: Number of embeddings that there are.
        unit: What has an embedding, "tile" or "channel".
    """

    layers: tuple[tuple[str, np.ndarray], ...]
    explained: tuple[float, float]
    drawn: int
    total: int
    unit: str


@dataclass(frozen=True)
class Picture:
    """A weight as an image.

    Attributes:
        name: Name of the weight.
        caption: What is seen of it.
        png: The file.
        size: Width and height in pixels.
    """

    name: str
    caption: str
    png: bytes
    size: tuple[int, int]


def similarities(sources: Sequence[Source]) -> tuple[list[int], np.ndarray] | None:
    """How alike the networks of a model with conditions are.

    Args:
        sources: Generated weights that are there.

    Returns:
        Numbers of networks, and the cosines of the angles between their weights, each divided by
        its deviation, the smallest weights up to `COMPARED` numbers in all; None where there are no
        two networks.
    """
    held = [source for source in sources if _networks(source) > 1]
    if not held or len({_networks(source) for source in held}) > 1:
        return None
    numbers = spread(range(_networks(held[0])), NETWORKS)
    held.sort(key=lambda source: math.prod(source.shape))
    sums = np.cumsum([math.prod(source.shape) for source in held])
    held = held[: max(1, int(np.searchsorted(sums, COMPARED, side="right")))]
    rows = []
    for k in numbers:
        parts = []
        for source in held:
            with condition(source.layer, k):
                weight = source.weight().float().flatten()
            parts.append(weight / weight.std(correction=0).clamp_min(1e-12))
        rows.append(torch.nn.functional.normalize(torch.cat(parts), dim=0))
    networks = torch.stack(rows)
    return numbers, (networks @ networks.t()).cpu().numpy()


def _networks(source: Source) -> int:
    conditions = source.layer.hypernet.conditions
    return 0 if conditions is None else conditions.networks


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` items at even distances, the first and the last among them, or all if fewer."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(at * (len(items) - 1) / (count - 1))] for at in range(count)]


def project(sources: Sequence[Source]) -> Projection | None:
    """The principal components of all layers' embeddings, of an even sample where they are many.

    Args:
        sources: Weights that have embeddings with values.

    Returns:
        The points; `None` where fewer than two embeddings are finite.
    """
    drawn = spread(sources, DOTS)
    quota = _quota([source.tiles for source in drawn], DOTS)
    samples = []
    for source in drawn:
        embedding = source.embedding
        assert embedding is not None
        index = torch.tensor(spread(range(source.tiles), quota), device=embedding.device)
        sample = embedding[index].cpu().double()
        samples.append(sample[sample.isfinite().all(1)])
    points = torch.cat(samples)  # (points, Nz)
    if len(points) < 2:
        return None
    points = points - points.mean(0)
    # By the products of points with points: these are few, however long the embeddings are
    values, vectors = torch.linalg.eigh(points @ points.t())
    values, vectors = values[-2:].flip(0).clamp(min=0), vectors[:, -2:].flip(1)
    variance = float(points.square().sum()) or 1.0
    # An eigenvector's sign is arbitrary; this one is the same on every machine
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    plane = (vectors * values.sqrt()).numpy()  # (points, 2)
    plane /= np.abs(plane).max() or 1.0
    ends = np.cumsum([len(sample) for sample in samples])
    first, second = (float(value) / variance for value in values)
    return Projection(
        layers=tuple(
            (source.name, part)
            for source, part in zip(drawn, np.split(plane, ends[:-1]), strict=True)
        ),
        explained=(first, second),
        drawn=len(points),
        total=sum(source.tiles for source in sources),
        unit=sources[0].layer.hypernet.family.embeddings,
    )


def _quota(counts: Sequence[int], room: int) -> int:
    """How many each may have at most, so that all together have at most `room`."""
    for at, count in enumerate(sorted(counts)):
        share = room // (len(counts) - at)
        if count > share:
            return share
        room -= count  # what smaller ones leave goes to larger ones
    return max(counts)


def picture(source: Source) -> Picture:
    """Some of a weight's kernels side by side, or the corner of a matrix.

    Args:
        source: A weight whose embeddings have values.
    """
    weight = source.weight()
    shape = "x".join(map(str, weight.shape))
    if math.prod(weight.shape[2:]) > 1:
        cells = _kernels(weight)
        count = f"{cells.shape[0] * cells.shape[1]:,} of {math.prod(weight.shape[:2]):,} kernels"
    else:
        # (axis 0, axis 1, *kernel of one element) or (axis 0,) -> (rows, columns)
        matrix = weight.view(len(weight), -1)[:MATRIX, :MATRIX].float().cpu()
        cells = matrix[None, None]  # (rows, columns) -> (1, 1, rows, columns)
        count = f"the first {matrix.shape[0]} rows and {matrix.shape[1]} columns"
    values = cells.numpy()
    finite = np.isfinite(values)
    values = np.where(finite, values, 0)
    peak = SATURATION * math.sqrt(float(np.square(values, dtype=np.float64).mean()))
    caption = f"{shape}: {count}; colours saturate at ±{peak:.2g}"
    if not finite.all():
        caption += f"; {np.count_nonzero(~finite):,} values are not finite, and drawn as zero"
    # 0 to 254 for -peak to peak
    levels = 127 + np.rint(127 * np.clip(values / (peak or 1.0), -1, 1)).astype(np.uint8)
    indices = _tile(levels)
    return Picture(source.name, caption, _png(indices), (indices.shape[1], indices.shape[0]))


def _kernels(weight: Tensor) -> Tensor:
    """Kernels of the first channels along both axes, (rows, columns, height, width)."""
    outputs, inputs = weight.shape[:2]
    per = min(inputs, KERNELS)
    columns = min(KERNELS // per, outputs) * per
    rows = min(outputs * per // columns, KERNELS)
    chosen = weight[: rows * columns // per, :per].float().cpu()
    # (outputs, per, *kernel) -> (rows, columns, height, width); 3-D ones slice below slice
    return chosen.reshape(rows, columns, -1, weight.shape[-1])


def _tile(levels: np.ndarray) -> np.ndarray:
    """Cells beside and below each other, enlarged, with rules between them."""
    rows, columns, height, width = levels.shape
    zoom = max(1, min(PIXELS // (columns * width), 2 * PIXELS // (rows * height)))
    rule = 1 + zoom // 4
    big = levels.repeat(zoom, axis=2).repeat(zoom, axis=3)
    if rows * columns > 1:
        big = np.pad(big, ((0, 0), (0, 0), (0, rule), (0, rule)), constant_values=255)
    # (rows, columns, height, width) -> (rows, height, columns, width) -> one image
    rows, columns, height, width = big.shape
    image = big.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    return image[:-rule, :-rule] if rows * columns > 1 else image


def _png(indices: np.ndarray) -> bytes:
    """An image of palette indices as a file; what is zero is transparent, on any background."""
    level = np.arange(-127, 128)
    colours = np.where(level[:, None] < 0, BELOW, ABOVE)
    palette = np.concatenate([colours, [RULE]]).astype(np.uint8)  # (256, 3)
    alpha = np.append(np.abs(level) * 2, 110).astype(np.uint8)  # (256,)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width = indices.shape
    lines = np.pad(indices, ((0, 0), (1, 0)))  # each line begins with its filter, none
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", palette.tobytes()),
            chunk(b"tRNS", alpha.tobytes()),
            chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )


def bar_chart(
    title: str, totals: Sequence[tuple[str, int, int]], bars: Sequence[Bar], hypernet_params: int
) -> Figure:
    """Bars before and after: the totals, and each layer on a square-root scale.

    Args:
        title: Of the whole figure.
        totals: Name, dense and hyper figure of each total.
        bars: The layers, the first on top.
        hypernet_params: Parameters of the shared hypernetwork, the last bar.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # needed for nothing else
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError as error:
        raise ImportError(
            "Report.plot needs matplotlib: pip install 'hyperize[plot]'; Report.to_html does not."
        ) from error
    lines = [(bar.name, bar.dense, bar.hyper) for bar in bars]
    if hypernet_params:
        lines.append(("hypernet (shared)", 0, hypernet_params))
    heights = [0.45 * len(totals) + 0.3, 0.2 * min(len(lines), ROWS) + 0.5]
    # A Figure of its own, not pyplot's: nothing is shown, and nothing stays behind
    figure = Figure(figsize=(9, sum(heights) + 1), layout="constrained")
    figure.suptitle(_short(title), parse_math=False)
    above, below = figure.subplots(2, 1, height_ratios=heights)
    shares = [
        (name, 100 * dense / max(dense, hyper), 100 * hyper / max(dense, hyper))
        for name, dense, hyper in totals
    ]
    below.set_xscale("function", functions=(_root, np.square))
    for axes, group, unit in ((above, shares, "%"), (below, lines, "")):
        at = np.arange(len(group))
        axes.barh(at - 0.2, [dense for _, dense, _ in group], 0.4, label="dense", color="#9aa3af")
        axes.barh(at + 0.2, [hyper for _, _, hyper in group], 0.4, label="hyper", color="#ea580c")
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(unit, sep=""))
        axes.spines[["top", "right"]].set_visible(False)
    for row, (_, dense, hyper) in enumerate(totals):
        text = f" {dense:,} → {hyper:,}, {dense / hyper:.2f}x"
        above.text(shares[row][2], row + 0.2, text, va="center", fontsize=8)
    above.set_yticks(range(len(totals)), [name for name, _, _ in totals])
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    step = -(-len(lines) // ROWS)
    names = [_short(name) for name, _, _ in lines[::step]]
    below.set_yticks(range(0, len(lines), step), names, fontsize=7, parse_math=False)
    every = f"; one name in {step} is shown" if step > 1 else ""
    below.set_xlabel(f"parameters of each weight, square-root scale{every}")
    return figure


def _root(x: np.ndarray) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.maximum(x, 0))
    return root


def _short(name: str) -> str:
    """A name's end, which tells layers apart, where all of it would leave the bars no room."""
    return name if len(name) <= NAME else "…" + name[-NAME:]
