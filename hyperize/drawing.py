"""Pictures of a rewrite: a chart of bars, kernels as PNG, embeddings as points and as colours.

Everything is bounded: however many layers and tiles a model has, only so many are drawn.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from hyperize.conditions import condition
from hyperize.layers import Generated
from hyperize.tiling import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Bar", "Projection", "Snapshot", "Source", "bar_chart", "project", "snapshot", "spread"]

DOTS = 1200
"""Embeddings in a projection, at most; its cost grows with the cube."""
FAR = 4.0
"""Root mean squares of a projection's coordinates beyond which points are drawn at its edge."""
WEIGHTS = 3
"""Weights whose kernels are shown."""
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
MAPS = 48
"""Weights that are drawn as maps, at most."""
PLACES = 32
"""Rows and columns of a map, at most."""
SHADES = 6
"""Levels of each of a map's three colours."""
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
        error: Its relative error to a teacher's weight; None without a teacher.
    """

    name: str
    kind: str
    shape: str
    dense: int
    hyper: int
    error: float | None = None


@dataclass(frozen=True)
class Source:
    """Where a generated weight comes from.

    Attributes:
        name: Name of the weight.
        layer: The layer, which knows its hypernetwork.
        param: Name of the parameter in the layer.
        grid: How the weight is cut.
    """

    name: str
    layer: Generated
    param: str
    grid: Grid

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.grid.shape

    @property
    def embedding(self) -> Tensor:
        """Its embeddings, (tiles, Nz)."""
        return self.layer.chosen(self.param).detach()

    def weight(self) -> Tensor:
        """The weight that is generated now."""
        with torch.no_grad():
            return self.layer.generate(self.param).detach()


@dataclass(frozen=True)
class Kernels:
    """Some of a weight's kernels, or the corner of a matrix.

    Attributes:
        name: Name of the weight.
        caption: What is seen of it.
        values: As they are generated, (rows, columns, height, width).
        wanted: The same of a teacher; None without one.
        inputs: Kernels of each channel of axis 0, beside each other; 0 of a matrix.
    """

    name: str
    caption: str
    values: np.ndarray
    wanted: np.ndarray | None
    inputs: int


@dataclass(frozen=True)
class Map:
    """A weight of which each kernel has the colour of its embedding.

    Attributes:
        name: Name of the weight.
        caption: What is seen of it.
        colours: Levels of red, green and blue of each kernel, (rows, columns, 3).
    """

    name: str
    caption: str
    colours: np.ndarray


@dataclass(frozen=True)
class Snapshot:
    """What there is to see of a model at one moment, in little.

    Attributes:
        reason: Why there is nothing to see; empty if there is.
        samples: Name of each weight and an even sample of its embeddings, (sample, Nz).
        total: Number of embeddings that there are.
        unit: What has an embedding, as `Family.unit`.
        kernels: Of a few weights.
        maps: Of some weights.
        networks: What `similarities` returns.
    """

    reason: str = ""
    samples: tuple[tuple[str, np.ndarray], ...] = ()
    total: int = 0
    unit: str = ""
    kernels: tuple[Kernels, ...] = ()
    maps: tuple[Map, ...] = ()
    networks: tuple[list[int], np.ndarray] | None = None


@dataclass(frozen=True)
class Projection:
    """Embeddings in the plane of two principal components.

    Attributes:
        layers: Name of each weight and the points of its embeddings, (points, 2), in [-1, 1].
        explained: Share of all drawn embeddings' variance along each of the two axes.
        drawn: Number of points.
        total: Number of embeddings that there are.
        unit: What has an embedding, as `Family.unit`.
    """

    layers: tuple[tuple[str, np.ndarray], ...]
    explained: tuple[float, float]
    drawn: int
    total: int
    unit: str


def snapshot(sources: Sequence[Source], wanted: Mapping[str, Tensor]) -> Snapshot:
    """What there is to see of generated weights now.

    Args:
        sources: The weights; with conditions, of the network that is chosen.
        wanted: Weights of a teacher by their names; they may be empty.
    """
    embeddings = [source.embedding for source in sources]
    if not embeddings:
        return Snapshot("nothing in this model is generated from embeddings alone")
    if any(embedding.is_meta for embedding in embeddings):
        return Snapshot("the model is on the meta device, and has shapes but no values")
    if not any(_trained(source) for source in sources):
        return Snapshot(
            "the model is untrained, and all that it generates is noise, drawn by its seed. Train "
            "it, or fit it to trained weights, and make another report then"
        )
    drawn = spread(range(len(sources)), DOTS)
    quota = _quota([len(embeddings[at]) for at in drawn], DOTS)
    return Snapshot(
        samples=tuple((sources[at].name, _numbers(_some(embeddings[at], quota))) for at in drawn),
        total=sum(map(len, embeddings)),
        unit=sources[0].layer.hypernet.family.unit,
        kernels=tuple(_kernels(source, wanted.get(source.name)) for source in _chosen(sources)),
        maps=_maps(spread(sources, MAPS)),
        networks=similarities(sources),
    )


def _trained(source: Source) -> bool:
    """Whether the generator has been trained or fitted: its biases are zero before that."""
    named = source.layer.hypernet.named_parameters()
    return any(bool(p.any()) for name, p in named if name.endswith("bias"))


def _some(rows: Tensor, count: int) -> Tensor:
    """So many rows, evenly spread."""
    return rows[torch.tensor(spread(range(len(rows)), count), device=rows.device)]


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _chosen(sources: Sequence[Source]) -> list[Source]:
    """Weights from the first to the last: kernels to look at, and matrices where they are few."""
    kernels = [source for source in sources if math.prod(source.shape[2:]) > 1]
    matrices = [source for source in sources if math.prod(source.shape[2:]) == 1]
    chosen = spread(kernels, WEIGHTS)
    return chosen + spread(matrices, WEIGHTS - len(chosen))


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


def project(snapshots: Sequence[Snapshot]) -> list[Projection]:
    """Embeddings of one or several moments in one plane, that of their principal components.

    Args:
        snapshots: Of one model, with something to see.

    Returns:
        The points of each moment; nothing where fewer than two embeddings are finite.
    """
    groups: list[list[np.ndarray]] = []
    for seen in snapshots:
        samples = [sample for _, sample in seen.samples]
        quota = _quota([len(sample) for sample in samples], DOTS // len(snapshots))
        some = [sample[spread(range(len(sample)), quota)] for sample in samples]
        groups.append([sample[np.isfinite(sample).all(1)] for sample in some])
    points = np.concatenate([part for parts in groups for part in parts]).astype(np.float64)
    if len(points) < 2:
        return []
    points -= points.mean(0)
    plane, explained = _components(points, 2)
    # A few far ones would leave the others no room
    far = min(np.abs(plane).max(), FAR * math.sqrt(np.square(plane).mean())) or 1.0
    plane = (plane / far).clip(-1, 1)
    ends = np.cumsum([len(part) for parts in groups for part in parts])
    parts = iter(np.split(plane, ends[:-1]))
    return [
        Projection(
            layers=tuple((name, next(parts)) for name, _ in seen.samples),
            explained=(explained[0], explained[1]),
            drawn=sum(map(len, group)),
            total=seen.total,
            unit=seen.unit,
        )
        for seen, group in zip(snapshots, groups, strict=True)
    ]


def _components(points: np.ndarray, count: int) -> tuple[np.ndarray, list[float]]:
    """The principal components of centred points, (points, count), and their shares of variance."""
    # By the products of points with points: these are few, however long the embeddings are
    values, vectors = np.linalg.eigh(points @ points.T)
    values, vectors = values[-count:][::-1].clip(min=0), vectors[:, -count:][:, ::-1]
    missing = count - len(values)  # there are fewer points than components
    values = np.pad(values, (0, missing))
    vectors = np.pad(vectors, ((0, 0), (0, missing)))
    # An eigenvector's sign is arbitrary; this one is the same on every machine
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    variance = float(np.square(points).sum()) or 1.0
    return vectors * np.sign(largest) * np.sqrt(values), [float(v) / variance for v in values]


def _quota(counts: Sequence[int], room: int) -> int:
    """How many each may have at most, so that all together have at most `room`."""
    for at, count in enumerate(sorted(counts)):
        share = room // (len(counts) - at)
        if count > share:
            return share
        room -= count  # what smaller ones leave goes to larger ones
    return max(counts, default=0)


def _maps(sources: Sequence[Source]) -> tuple[Map, ...]:
    """Maps with common colours: red, green and blue are the three principal components."""
    found = []
    for source in sources:
        ends = (*source.shape[:2], 1)[:2]
        rows, columns = (spread(range(end), PLACES) for end in ends)
        z = source.embedding
        first, second = torch.meshgrid(
            torch.tensor(rows, device=z.device),
            torch.tensor(columns, device=z.device),
            indexing="ij",
        )
        family = source.layer.hypernet.family
        places = family.embeddings_at(z, source.grid, first.flatten(), second.flatten())
        numbers = _numbers(places)
        numbers[~np.isfinite(numbers)] = 0
        found.append((ends, (len(rows), len(columns)), numbers))
    quota = _quota([len(places) for *_, places in found], DOTS)
    sample = np.concatenate([places[spread(range(len(places)), quota)] for *_, places in found])
    mean = sample.mean(0)
    centred = (sample - mean).astype(np.float64)
    components, _ = _components(centred, 3)
    squares = np.square(components).sum(0)
    squares[squares == 0] = 1.0
    axes = centred.T @ components / squares  # of unit length, (Nz, 3)
    # In deviations, told from the median, as a few embeddings are far larger than the others
    deviations = np.median(np.abs(components), 0) / 0.6745
    axes /= np.where(deviations > 0, deviations, np.sqrt(squares / len(centred)))
    maps = []
    for source, (ends, size, places) in zip(sources, found, strict=True):
        # Two deviations below and above the mean are the darkest and the brightest
        levels = np.rint(((places - mean) @ axes + 2) / 4 * (SHADES - 1)).clip(0, SHADES - 1)
        every = "each kernel" if size == ends else f"{size[0]} x {size[1]} of its kernels"
        caption = f"{ends[0]} x {ends[1]}, {every}"
        maps.append(Map(source.name, caption, levels.reshape(*size, 3)))
    return tuple(maps)


def _kernels(source: Source, wanted: Tensor | None) -> Kernels:
    """Some of a weight's kernels side by side, or the corner of a matrix."""
    weight = source.weight()
    shape = "x".join(map(str, weight.shape))
    cells, inputs = _cells(weight)
    if inputs:
        count = f"{len(cells) * cells.shape[1]:,} of {math.prod(weight.shape[:2]):,} kernels"
    else:
        count = f"the first {cells.shape[2]} rows and {cells.shape[3]} columns"
    return Kernels(
        name=source.name,
        caption=f"{shape}: {count}",
        values=_numbers(cells),
        wanted=None if wanted is None else _numbers(_cells(wanted)[0]),
        inputs=inputs,
    )


def _cells(weight: Tensor) -> tuple[Tensor, int]:
    """Kernels of the first channels along both axes, (rows, columns, height, width).

    Returns:
        The kernels, and how many of them belong to each channel of axis 0; of a matrix, its corner
        as one kernel, and 0.
    """
    if math.prod(weight.shape[2:]) == 1:
        # (axis 0, axis 1, *kernel of one element) or (axis 0,) -> (1, 1, rows, columns)
        return weight.reshape(len(weight), -1)[None, None, :MATRIX, :MATRIX], 0
    outputs, inputs = weight.shape[:2]
    per = min(inputs, KERNELS)
    columns = min(KERNELS // per, outputs) * per
    rows = min(outputs * per // columns, KERNELS)
    chosen = weight[: rows * columns // per, :per]
    # (outputs, per, *kernel) -> (rows, columns, height, width); 3-D ones slice below slice
    return chosen.reshape(rows, columns, -1, weight.shape[-1]), per


def peak_of(values: np.ndarray) -> float:
    """Where the colours of a picture saturate."""
    finite = np.where(np.isfinite(values), values, 0)
    return SATURATION * math.sqrt(float(np.square(finite, dtype=np.float64).mean()))


def picture(values: np.ndarray, peak: float) -> tuple[bytes, tuple[int, int]]:
    """Kernels as an image.

    Args:
        values: (rows, columns, height, width); what is not finite is drawn as zero.
        peak: Where colours saturate.

    Returns:
        A PNG file, and its width and height.
    """
    values = np.where(np.isfinite(values), values, 0)
    # 0 to 254 for -peak to peak
    levels = 127 + np.rint(127 * np.clip(values / (peak or 1.0), -1, 1)).astype(np.uint8)
    indices = _tile(levels)
    level = np.arange(-127, 128)
    colours = np.where(level[:, None] < 0, BELOW, ABOVE)
    palette = np.concatenate([colours, [RULE]]).astype(np.uint8)  # (256, 3)
    # What is zero is transparent, on any background
    alpha = np.append(np.abs(level) * 2, 110).astype(np.uint8)  # (256,)
    return _png(indices, palette, alpha), (indices.shape[1], indices.shape[0])


def map_picture(colours: np.ndarray) -> bytes:
    """A map as a PNG file, one pixel for each place."""
    weights = np.array([SHADES**2, SHADES, 1])
    indices = (colours @ weights).astype(np.uint8)  # (rows, columns)
    levels = np.indices((SHADES,) * 3).reshape(3, -1).T  # (SHADES ** 3, 3)
    palette = (30 + levels * (210 / (SHADES - 1))).astype(np.uint8)
    return _png(indices, palette, np.full(len(palette), 255, np.uint8))


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


def _png(indices: np.ndarray, palette: np.ndarray, alpha: np.ndarray) -> bytes:
    """An image of palette indices as a file."""

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
