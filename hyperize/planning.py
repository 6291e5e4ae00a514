"""Planning: from a model and a request to integers. No tensors, so it works on the meta device.

The weights of all sites are cut into tiles. A tile spans `lead` channels along the trunk axis (axis
0 of the weight unless configured otherwise) and `trail` channels along the other, times the kernel.
The hypernetwork of the paper (arXiv 1609.09106, eq. 4) makes a tile from its embedding z:

    a_i = W_i z + B_i        i = 1..lead       W_i: (d, Nz)            the trunk, one for all sites
    K_i = W_out a_i + B_out                    W_out: (trail * k, d)   a head, one per kernel size

so that the parameters are, exactly,

    tiles * Nz  +  lead * d * (Nz + 1)  +  sum over heads of trail * k * (d + 1).

Without a hidden layer (d = 0) there is no trunk, lead is 1, and a tile is K = W_out z + B_out:

    tiles * Nz  +  sum over heads of trail * k * (Nz + 1).

This is what the planner prefers: at the same size its tiles fit trained weights at least as well,
networks learn faster from scratch, and one product writes a weight in its memory order.

With embeddings of channels a tile is one kernel, K_ij = W_out (u_i * v_j) + B_out, of the
embeddings u_i and v_j of its two channels, and a weight has as many embeddings as channels along
both axes; the count is as above.

A layer with fewer than `trail` channels has several of its rows folded into one, so that depthwise
and narrow layers fill their tiles; one with more is cut into parts of equal width. Only the tile's
used part is computed. Tiles of lead 1 go over the weight in its memory order, across rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from hyperize.config import BudgetError, ConfigError, HyperConfig, Tile
from hyperize.sites import DynamicSite, Found, Site, Skip, Untargeted, find_sites

__all__ = ["Plan", "make_plan"]

LEAD = 16
"""Tile channels along the trunk axis, the paper's, unless the request needs another number."""
MAX_HIDDEN = 64
"""The paper's hidden size; generation costs about this many multiply-adds per weight and more."""
TILE_WEIGHTS = (256, 1152)
"""Bounds of the weights in a tile: below, the embeddings dominate; above, the arithmetic does.

Each weight costs as many multiply-adds as an embedding is long, which at 10x is a tenth of this.
Tiles of half the size that fits best miss about a tenth more of the squared norm.
"""
SLENDER = 0.85
"""Weights in a tile over those of a square matrix of tiles, where there is no hidden layer.

It makes tiles of 64 kernels in ResNet-20 and ResNet-56 on CIFAR-10. Of 8 to 128 kernels, about 64
trained fastest from scratch, and fitted trained weights best, or nearly, by `fit_` with data.
"""
BALANCE = 256
"""Multiply-adds that are taken to last as long as writing a number to memory and reading it.

Of 128 to 1,024 it made ResNets fastest on a CPU. A GPU's peak figures are about 500.
"""
FEW = 8
"""An embedding shorter than this is a sign that other tiles would serve the request better."""


@dataclass(frozen=True)
class Head:
    """The hypernetwork's output layer for one kernel size.

    Attributes:
        kernel: Kernel size as in "3x3"; "1" for all kernels of one element, dense layers included.
        trail: Channels of a tile along the other axis than the trunk's.
        kernel_elements: Elements k of the kernel.
    """

    kernel: str
    trail: int
    kernel_elements: int

    @property
    def width(self) -> int:
        """Weights that the head writes per row of a tile."""
        return self.trail * self.kernel_elements


@dataclass(frozen=True)
class Grid:
    """How one weight is cut into tiles.

    Attributes:
        shape: The weight's shape with the trunk axis first.
        kernel: Which head writes it.
        rows: Rows (channels along the trunk axis, after folding).
        parts: Tiles along the other axis.
        width: Channels of each part.
        tiles: Number of embeddings: tiles, or channels along both axes.
    """

    shape: tuple[int, ...]
    kernel: str
    rows: int
    parts: int
    width: int
    tiles: int

    @property
    def blocks(self) -> tuple[int, int] | None:
        """Tiles along a row, and rows in a tile, one of which is 1; None if rows end in tiles."""
        columns = self.shape[1]
        if self.parts > 1:
            return self.parts, 1
        if self.width % columns == 0:
            return 1, self.width // columns
        return (columns // self.width, 1) if columns % self.width == 0 else None


@dataclass(frozen=True)
class PlannedSite:
    """A site with its place in the hypernetwork.

    Attributes:
        site: What is generated.
        grid: How it is tiled.
        hyper_params: Parameters of its embeddings, `grid.tiles` times the embedding dimension.
    """

    site: Site
    grid: Grid
    hyper_params: int


@dataclass(frozen=True)
class Plan:
    """What `hyperize` will build, in integers. `print(plan)` explains it.

    Attributes:
        config: The request.
        sites: What is generated, in order.
        dynamic: Recurrent layers in whose place a dynamic hypernetwork comes.
        skips: Targets that stay dense, with reasons.
        untargeted: Layers of known kinds that are not targets.
        order: How the sites were found.
        host: Path of the module in which the hypernetwork is registered, "" for the root.
        lead: Tile channels along the trunk axis.
        heads: The output layers, one per kernel size.
        embedding_dim: Nz.
        hidden_dim: d; 0 for no hidden layer and no trunk.
        total_params: Parameters of the whole dense model.
        total_bytes: Bytes of its parameters and buffers.
        model: Name of the model's class.
        notes: Remarks for the user, e.g. a default request that explicit sizes do not meet.
    """

    config: HyperConfig
    sites: tuple[PlannedSite, ...]
    dynamic: tuple[DynamicSite, ...]
    skips: tuple[Skip, ...]
    untargeted: tuple[Untargeted, ...]
    order: str
    host: str
    lead: int
    heads: tuple[Head, ...]
    embedding_dim: int
    hidden_dim: int
    total_params: int
    total_bytes: int
    model: str = ""
    notes: tuple[str, ...] = ()

    @property
    def dense_params(self) -> int:
        """Parameters of the dense model that are rewritten: generated weights, dynamic layers."""
        generated = sum(planned.site.dense_params for planned in self.sites)
        return generated + sum(site.dense_params for site in self.dynamic)

    @property
    def tiles(self) -> int:
        """Number of tiles, each with its own embedding."""
        return sum(planned.grid.tiles for planned in self.sites)

    @property
    def embedding_params(self) -> int:
        """Parameters of all embeddings."""
        return sum(planned.hyper_params for planned in self.sites)

    @property
    def hypernet_params(self) -> int:
        """Parameters of the shared hypernetwork."""
        trunk = self.lead * self.hidden_dim * (self.embedding_dim + 1)
        return trunk + sum(head.width * (self.fan_in + 1) for head in self.heads)

    @property
    def fan_in(self) -> int:
        """Inputs of a head: d, or Nz where there is no hidden layer."""
        return self.hidden_dim or self.embedding_dim

    @property
    def hyper_params(self) -> int:
        """Parameters of the hypernetwork, all embeddings and the dynamic layers."""
        dynamic = sum(site.hyper_params for site in self.dynamic)
        return self.hypernet_params + self.embedding_params + dynamic

    @property
    def compression(self) -> float:
        """`dense_params / hyper_params`."""
        return self.dense_params / self.hyper_params

    @property
    def total_hyper_params(self) -> int:
        """Parameters of the whole model after the rewrite."""
        return self.total_params - self.dense_params + self.hyper_params

    @property
    def tile(self) -> dict[str, Tile]:
        """The tiles as `HyperConfig.tile` takes them."""
        pairs = {head.kernel: (self.lead, head.trail) for head in self.heads}
        if self.config.trunk_axis == 1:
            pairs = {kernel: pair[::-1] for kernel, pair in pairs.items()}
        return pairs

    @property
    def generator_macs(self) -> int:
        """Multiply-adds of generating every weight once."""
        return sum(self.macs_of(planned) for planned in self.sites)

    def macs_of(self, planned: PlannedSite) -> int:
        """Multiply-adds of generating one weight."""
        grid = planned.grid
        trunk = grid.tiles * self.embedding_dim * self.lead * self.hidden_dim
        row = self.fan_in * grid.width * math.prod(grid.shape[2:])
        return trunk + grid.rows * grid.parts * row

    def factorized_macs(self, planned: PlannedSite) -> int | None:
        """Multiply-adds per position of the output, of computing with a weight's factors.

        The weight itself takes as many as it has elements. None where the layer computes with the
        weight also if `HyperConfig.factorized`: where the factors would take as long, with
        `BALANCE` for each number between two products; where rows of the weight end within tiles;
        and in other layers than `Site.plain` ones.
        """
        site, grid = planned.site, planned.grid
        if not site.plain:
            return None
        rows, columns, *kernel = grid.shape
        k = math.prod(kernel)
        size = self.fan_in + 1  # with the bias
        if self.config.channelwise:
            macs = (rows + columns + (k if k > 1 else 0)) * size
            between = size if k == 1 else 2 * size
        elif grid.blocks is None:
            return None
        else:
            parts, folds = grid.blocks
            macs = (parts * grid.width * k + grid.rows * grid.parts * folds) * size
            between = parts * folds * size + (rows if folds > 1 else 0)
        return macs if macs + BALANCE * between < site.dense_params else None

    def layers(self) -> dict[str, dict[str, int]]:
        """Layer path -> generated parameter -> the site's number."""
        layers: dict[str, dict[str, int]] = {}
        for at, planned in enumerate(self.sites):
            layers.setdefault(planned.site.path, {})[planned.site.param] = at
        return layers

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # immutable; every copy of a model would copy it otherwise

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values; the inverse of `from_dict`."""
        return asdict(replace(self, config=HyperConfig())) | {"config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """A plan from the output of `to_dict`, also after a round trip through JSON.

        Raises:
            ConfigError: The data does not describe a plan.
        """
        try:
            sites = []
            for entry in data["sites"]:
                site = {k: _tuple(v) for k, v in entry["site"].items()}
                grid = {k: _tuple(v) for k, v in entry["grid"].items()}
                sites.append(PlannedSite(Site(**site), Grid(**grid), entry["hyper_params"]))
            return cls(
                **dict(data)
                | {
                    "config": HyperConfig.from_dict(data["config"]),
                    "sites": tuple(sites),
                    "dynamic": tuple(
                        DynamicSite(**{k: _tuple(v) for k, v in site.items()})
                        for site in data["dynamic"]
                    ),
                    "skips": tuple(Skip(**skip) for skip in data["skips"]),
                    "untargeted": tuple(Untargeted(**kind) for kind in data["untargeted"]),
                    "heads": tuple(Head(**head) for head in data["heads"]),
                    "notes": tuple(data["notes"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not the description of a plan: {error!r}.") from error

    def __str__(self) -> str:
        kernels = Counter(planned.grid.kernel for planned in self.sites)
        nz, d = self.embedding_dim, self.fan_in
        lines = [f"{len(self.sites)} weights in {self.tiles:,} tiles, {self.order}"]
        trunk = f"trunk   {nz} -> {self.lead} x {d}   {self.lead * d * (nz + 1):,} parameters"
        generator = [
            *([trunk] if self.hidden_dim else []),
            *(
                f"head    {d} -> {h.trail} x {h.kernel}   {h.width * (d + 1):,} parameters, "
                f"{kernels[h.kernel]} weights"
                for h in self.heads
            ),
            f"{self.config.embeddings:<8}{self.tiles:,} embeddings of {nz}   "
            f"{self.embedding_params:,} parameters",
        ]
        lines += generator if self.sites else []
        if self.config.factorized and self.sites:
            macs = {p.site: n for p in self.sites if (n := self.factorized_macs(p)) is not None}
            weights = sum(site.dense_params for site in macs)
            lines.append(
                f"factors {len(macs)} weights are not generated: {sum(macs.values()):,} "
                f"multiply-adds per position instead of {weights:,}"
            )
        lines += [
            f"dynamic {site.path or 'the model'}: {site.kind}, {site.dense_params:,} -> "
            f"{site.hyper_params:,} parameters"
            for site in self.dynamic
        ]
        lines += [
            f"total   {self.dense_params:,} -> {self.hyper_params:,}, "
            f"compression {self.compression:.2f}; whole model {self.total_params:,} -> "
            f"{self.total_hyper_params:,}",
        ]
        reasons: Counter[str] = Counter()
        for skip in self.skips:
            reasons[skip.reason] += skip.params
        lines += [f"skipped {params:,} weights: {why}" for why, params in reasons.items()]
        lines += [
            f"dense   {u.kind}: {u.layers} layers, {u.params:,} weights, not a target"
            for u in self.untargeted
        ]
        return "\n".join([*lines, *(f"note    {note}" for note in self.notes)])


def make_plan(model: nn.Module, config: HyperConfig | None = None, **overrides: Any) -> Plan:
    """Plans the rewrite of a model, and raises every error that `hyperize` could.

    Args:
        model: A plain model on any device, meta too. Not changed; no weight is read.
        config: The request; the default one if `None`.
        **overrides: Fields of `HyperConfig` that replace the config's.

    Returns:
        The plan: largest embedding that meets the request, exact counts.

    Raises:
        ModelError: The model, or a selected layer, is of a kind that cannot be rewritten.
        ConfigError: An option is invalid, or a target or pattern matches nothing.
        BudgetError: The request cannot be met; the message gives the reachable range.
    """
    config = _config(config, overrides)
    found = _tiled(find_sites(model, config), config)
    if not found.sites and not found.dynamic:
        raise ConfigError(_nothing_found(found, config))
    if not found.sites:
        return replace(_dynamic_plan(found, config), model=type(model).__name__)
    shapes = Counter(site.shape for site in found.sites)
    plan = _plan(found, config, _search(shapes, found, config))
    notes = plan.notes
    if config.factorized and all(plan.factorized_macs(p) is None for p in plan.sites):
        notes = (
            *notes,
            "factorized changes nothing: no layer is faster with the factors of its weight, as all "
            "are small, grouped or of other kinds, or tiles end within rows",
        )
    return replace(plan, model=type(model).__name__, notes=notes)


def kernel_name(shape: Sequence[int]) -> str:
    """Name of a weight's kernel size: "3x3", or "1" for one element and for no kernel at all."""
    kernel = shape[2:]
    return "1" if math.prod(kernel) == 1 else "x".join(map(str, kernel))


def _channels(shape: Sequence[int]) -> tuple[int, int]:
    """Sizes of the axes 0 and 1; a vector is a matrix of one column."""
    return shape[0], (shape[1] if len(shape) > 1 else 1)


def make_grid(
    shape: Sequence[int], lead: int, head: Head, trunk_axis: int, channelwise: bool = False
) -> Grid:
    """Cuts a weight of the given shape into tiles of `lead` x `head.trail` channels."""
    channels = _channels(shape)
    rows, columns = channels[trunk_axis], channels[1 - trunk_axis]
    if channelwise:
        turned = (rows, columns, *shape[2:])
        return Grid(turned, head.kernel, rows, 1, columns, rows + columns)
    if lead == 1:  # a row's end need not be a tile's, so that all tiles but the last are full
        width = min(rows * columns, head.trail)
        rows, parts = -(-rows * columns // width), 1
    elif columns <= head.trail:
        fold = min(rows, head.trail // columns)
        rows, parts, width = -(-rows // fold), 1, fold * columns
    else:
        parts = -(-columns // head.trail)
        width = -(-columns // parts)
    turned = (channels[trunk_axis], channels[1 - trunk_axis], *shape[2:])
    return Grid(turned, head.kernel, rows, parts, width, -(-rows // lead) * parts)


@dataclass(frozen=True)
class _Choice:
    """One geometry with sizes, and what it keeps of the sites."""

    lead: int
    heads: tuple[Head, ...]
    hidden_dim: int
    embedding_dim: int
    dense: int
    hyper: int
    met: bool

    @property
    def ratio(self) -> float:
        return self.dense / self.hyper


class _Budget:
    """The request, applied to arrays of counts."""

    def __init__(self, config: HyperConfig, total_params: int) -> None:
        self.max_params = config.max_params
        self.compression = None if config.max_params else config.compression
        self.total_params = total_params

    @property
    def least_ratio(self) -> float:
        """A ratio over the targets that every met request has."""
        return self.compression or 1.0

    def most_hyper(self, dense: int) -> int:
        """A number of hyper parameters that no met request exceeds."""
        return self.max_params or int(dense / self.least_ratio)

    def met(self, dense: np.ndarray, hyper: np.ndarray) -> np.ndarray:
        if self.max_params is not None:
            return self.total_params - dense + hyper <= self.max_params
        if self.compression is not None:
            return dense >= self.compression * hyper
        return dense > 0

    def distance(self, choice: _Choice) -> float:
        """Grows as a choice gets further from the request."""
        return choice.hyper - choice.dense if self.max_params is not None else -choice.ratio


def _search(shapes: Mapping[tuple[int, ...], int], found: Found, config: HyperConfig) -> _Choice:
    """The first geometry, from the preferred one on, that meets the request with room to spare."""
    budget = _Budget(config, found.total_params + _growth(found))
    if config.max_params is not None and config.max_params >= found.total_params:
        raise BudgetError(
            f"max_params={config.max_params:,} is no less than the {found.total_params:,} "
            "parameters that the dense model has, so nothing would have to be saved."
        )
    met: list[_Choice] = []
    missed: list[_Choice] = []
    for lead, heads in _geometries(shapes, config):
        choice = _size(lead, heads, shapes, config, budget)
        if choice is None:
            continue
        (met if choice.met else missed).append(choice)
        if choice.met and (config.embedding_dim or choice.embedding_dim >= FEW):
            return choice
    if met:
        return max(met, key=lambda choice: choice.embedding_dim)
    if not missed:
        raise BudgetError(
            "every layer would grow: their weights are fewer than the embeddings and output layer "
            f"that would replace them ({sum(s.dense_params for s in found.sites):,} weights in "
            f"{len(found.sites)} layers). Choose a smaller embedding_dim, hidden_dim or tile, or "
            "leave the model dense."
        )
    best = min(missed, key=budget.distance)
    if config.embedding_dim is not None and config.max_params is None:
        return best  # explicit sizes win over the default request; the plan carries a note
    raise BudgetError(_unreachable(best, found, config))


def _geometries(
    shapes: Mapping[tuple[int, ...], int], config: HyperConfig
) -> Iterator[tuple[int, tuple[Head, ...]]]:
    """Tile geometries from the preferred one outwards.

    For a linear generator the matrix of tiles should be near square, number of tiles ~ weights per
    tile: then embeddings and generator, of (tiles + weights per tile) * Nz parameters in all, hold
    the longest embedding for their size.

    Tiles of one channel along the trunk axis are for generators without a hidden layer, and come
    first.
    """
    kernels = {kernel_name(shape): math.prod(shape[2:]) for shape in shapes}
    if config.tile is not None:
        axis = config.trunk_axis
        lead, given = 0, []
        for kernel, elements in kernels.items():
            tile = config.tile_of(kernel)
            assert tile is not None  # _tiled has set the other sites aside
            lead = tile[axis]  # the same for all, which HyperConfig sees to
            given.append(Head(kernel, tile[1 - axis], elements))
        yield lead, tuple(given)
        return
    if config.channelwise:
        yield 1, tuple(Head(kernel, 1, elements) for kernel, elements in kernels.items())
        return
    # kernel size -> channels of a row -> weights
    columns: dict[str, Counter[int]] = {kernel: Counter() for kernel in kernels}
    for shape, count in shapes.items():
        row = _channels(shape)[1 - config.trunk_axis]
        columns[kernel_name(shape)][row] += math.prod(shape) * count
    weights = Counter({kernel: rows.total() for kernel, rows in columns.items()})
    smallest, largest = TILE_WEIGHTS
    square = min(max(math.isqrt(weights.total()), smallest), largest)
    # (channels along the trunk axis, weights of a tile of each kernel size)
    candidates: list[tuple[int, dict[str, float]]] = []
    if not config.hidden_dim:
        # Each kernel size has its own matrix of tiles
        sizes = {k: SLENDER * min(square, math.sqrt(count)) for k, count in weights.items()}
        for exponent in sorted(range(-6, 9), key=abs):
            candidates.append((1, {k: size * 2.0**exponent for k, size in sizes.items()}))
    if config.hidden_dim != 0:
        two_layers = [
            (abs(math.log2(lead / LEAD)) + abs(exponent), lead, square * 2.0**exponent)
            for lead in (1, 2, 4, 8, 16, 32, 64)
            for exponent in range(-6, 9)
            if lead > 1 or config.hidden_dim
        ]
        for _, lead, size in sorted(two_layers):
            candidates.append((lead, dict.fromkeys(weights, size)))
    seen = set()
    for lead, tile_weights in candidates:
        trails = {k: tile_weights[k] / (lead * n) for k, n in kernels.items()}
        heads = tuple(
            Head(
                k,
                _lined_up(trail, columns[k])
                if config.factorized and lead == 1
                else _power_of_two(trail),
                kernels[k],
            )
            for k, trail in trails.items()
        )
        if (lead, heads) not in seen:
            seen.add((lead, heads))
            yield lead, heads


def _size(
    lead: int,
    heads: tuple[Head, ...],
    shapes: Mapping[tuple[int, ...], int],
    config: HyperConfig,
    budget: _Budget,
) -> _Choice | None:
    """Hidden and embedding sizes for one geometry; None if no site would be left in any."""
    table = _Table(lead, heads, shapes, config)
    widest = max(head.width for head in heads)
    if config.hidden_dim is not None:
        hidden = [config.hidden_dim]
    elif lead == 1:
        hidden = [0]
    else:
        # The trunk balances the embeddings where lead * d ~ tiles; a larger d than the widest
        # head's output would be redundant, one above MAX_HIDDEN slow.
        top = _power_of_two(table.tiles / lead)
        powers = [2**e for e in range(widest.bit_length() + 1)]
        hidden = sorted(
            powers, key=lambda d: (d > MAX_HIDDEN, abs(math.log2(d / min(top, MAX_HIDDEN))))
        )
    best: _Choice | None = None
    for d in hidden:
        choice = table.largest(d, config.embedding_dim, budget)
        if choice is None:
            continue
        # An embedding longer than the lead * d numbers made of it is redundant: take a larger d.
        if choice.met and (
            config.embedding_dim or config.hidden_dim or d == 0 or choice.embedding_dim <= lead * d
        ):
            return choice
        if best is None or (choice.met, -budget.distance(choice)) > (
            best.met,
            -budget.distance(best),
        ):
            best = choice
    return best


class _Table:
    """Counts of one geometry as functions of the embedding size, over distinct shapes at once."""

    def __init__(
        self,
        lead: int,
        heads: tuple[Head, ...],
        shapes: Mapping[tuple[int, ...], int],
        config: HyperConfig,
    ) -> None:
        self.lead, self.heads = lead, heads
        by_kernel = {head.kernel: head for head in heads}
        grids = [
            make_grid(
                shape,
                lead,
                by_kernel[kernel_name(shape)],
                config.trunk_axis,
                config.channelwise,
            )
            for shape in shapes
        ]
        index = {head.kernel: at for at, head in enumerate(heads)}
        self.counts = np.array(list(shapes.values()), dtype=np.int64)
        self.weights = np.array([math.prod(shape) for shape in shapes], dtype=np.int64)
        self.grid_tiles = np.array([grid.tiles for grid in grids], dtype=np.int64)
        # (heads, shapes): which head writes which shape
        self.member = np.array([[index[g.kernel] == at for g in grids] for at in range(len(heads))])
        self.tiles = int(self.grid_tiles @ self.counts)

    def kept(self, hidden: int, nz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which shapes and which heads stay in, (shapes, len(nz)) and (heads, len(nz)).

        A weight whose embeddings would be no smaller than itself stays dense; so does a whole
        kernel size, if its head and embeddings would be no smaller than its weights.
        """
        fits = self.weights[:, None] > self.grid_tiles[:, None] * nz  # (shapes, nz)
        saved = (self.weights[:, None] - self.grid_tiles[:, None] * nz) * self.counts[:, None]
        heads = self.member @ np.where(fits, saved, 0) > self.outputs(hidden, nz)  # (heads, nz)
        return fits & (self.member.T @ heads), heads

    def outputs(self, hidden: int, nz: np.ndarray) -> np.ndarray:
        """Parameters of the heads, (heads, len(nz))."""
        widths = np.array([head.width for head in self.heads])
        return widths[:, None] * ((hidden or nz) + 1)

    def largest(self, hidden: int, fixed: int | None, budget: _Budget) -> _Choice | None:
        """The choice of the largest (or the fixed) embedding size that meets the request.

        Where none meets it, the one nearest to the request; None where no shape is ever kept.
        """
        if fixed is not None:
            nz = np.array([fixed], dtype=np.int64)
        else:
            # No longer embedding can be met: all sites would stay dense, or the trunk alone, or the
            # smallest head, would use up the budget.
            fill = float((self.weights / self.grid_tiles).max())
            slope = self.lead * hidden or min(head.width for head in self.heads)
            limit = budget.most_hyper(int(self.weights @ self.counts)) // slope
            longest = max(1, min(int(fill / budget.least_ratio) + 1, limit))
            nz = np.arange(1, longest + 1, dtype=np.int64)
        shapes, heads = self.kept(hidden, nz)
        dense = (self.weights * self.counts) @ shapes
        tiles = (self.grid_tiles * self.counts) @ shapes
        outputs = (self.outputs(hidden, nz) * heads).sum(0)
        hyper = tiles * nz + self.lead * hidden * (nz + 1) + outputs
        valid = dense > 0
        met = valid & budget.met(dense, hyper)
        if fixed is None:
            met &= hyper < dense
        if not valid.any():
            return None
        if met.any():
            at = int(np.flatnonzero(met)[-1])
        elif budget.max_params is not None:
            at = int(np.argmin(np.where(valid, hyper - dense, np.iinfo(np.int64).max)))
        else:
            at = int(np.argmax(dense / np.maximum(hyper, 1)))
        return _Choice(
            lead=self.lead,
            heads=self.heads,
            hidden_dim=hidden,
            embedding_dim=int(nz[at]),
            dense=int(dense[at]),
            hyper=int(hyper[at]),
            met=bool(met[at]),
        )


def _plan(found: Found, config: HyperConfig, choice: _Choice) -> Plan:
    shapes = dict.fromkeys((site.shape for site in found.sites), 1)
    counts = Counter(site.shape for site in found.sites)
    table = _Table(choice.lead, choice.heads, {s: counts[s] for s in shapes}, config)
    nz = np.array([choice.embedding_dim], dtype=np.int64)
    kept, heads_kept = table.kept(choice.hidden_dim, nz)
    stays = dict(zip(shapes, kept[:, 0].tolist(), strict=True))
    heads = {h.kernel: h for h, keep in zip(choice.heads, heads_kept[:, 0], strict=True) if keep}
    all_heads = {head.kernel: head for head in choice.heads}
    sites: list[PlannedSite] = []
    skips: list[Skip] = list(found.skips)
    for site in found.sites:
        kernel = kernel_name(site.shape)
        head = all_heads[kernel]
        grid = make_grid(site.shape, choice.lead, head, config.trunk_axis, config.channelwise)
        cost = grid.tiles * choice.embedding_dim
        if stays[site.shape]:
            sites.append(PlannedSite(site, grid, cost))
        elif cost >= site.dense_params:
            skips.append(
                Skip(site.name, "would grow: its embeddings are no smaller", site.dense_params)
            )
        else:
            reason = f"would grow: too few {kernel} weights for an output layer of their own"
            skips.append(Skip(site.name, reason, site.dense_params))
    host = sites[0].site.path if found.host else ""
    notes = _dynamic_notes(found)
    if not choice.met:
        notes.append(
            f"compression {config.compression:g} was not asked of these explicit sizes and is not "
            f"reached: {choice.ratio:.2f}"
        )
    if choice.hyper >= choice.dense:
        notes.append(
            f"these explicit sizes save nothing: {choice.dense:,} weights would be generated from "
            f"{choice.hyper:,} parameters"
        )
    return Plan(
        config=config,
        sites=tuple(sites),
        dynamic=found.dynamic,
        skips=tuple(skips),
        untargeted=found.untargeted,
        order=found.order,
        host=host,
        lead=choice.lead,
        heads=tuple(heads.values()),
        embedding_dim=choice.embedding_dim,
        hidden_dim=choice.hidden_dim,
        total_params=found.total_params,
        total_bytes=found.total_bytes,
        notes=tuple(notes),
    )


def _dynamic_plan(found: Found, config: HyperConfig) -> Plan:
    """The plan of a model in which nothing is generated, and layers are made dynamic."""
    total = found.total_params + _growth(found)
    if config.max_params is not None and total > config.max_params:
        raise BudgetError(
            f"max_params={config.max_params:,} cannot be met: dynamic layers have more parameters "
            f"than the dense ones, {total:,} in the whole model instead of {found.total_params:,}."
        )
    return Plan(
        config=config,
        sites=(),
        dynamic=found.dynamic,
        skips=found.skips,
        untargeted=found.untargeted,
        order=found.order,
        host=found.host,
        lead=0,
        heads=(),
        embedding_dim=0,
        hidden_dim=0,
        total_params=found.total_params,
        total_bytes=found.total_bytes,
        notes=tuple(_dynamic_notes(found)),
    )


def _growth(found: Found) -> int:
    return sum(site.growth for site in found.dynamic)


def _dynamic_notes(found: Found) -> list[str]:
    if not found.dynamic:
        return []
    before, after = (
        sum(getattr(site, side) for site in found.dynamic)
        for side in ("dense_params", "hyper_params")
    )
    change = "grow" if after > before else "go"
    return [
        f"the dynamic layers ({len(found.dynamic)}) {change} from {before:,} to {after:,} "
        "parameters; their weights depend on the input, so they have no dense equivalent"
    ]


def _tiled(found: Found, config: HyperConfig) -> Found:
    """Sets aside the sites for whose kernel size `config.tile` names no tile.

    Raises:
        ConfigError: It names a kernel size that no site has.
    """
    named = config.tiles_by_kernel
    if not named:
        return found
    sites: dict[str, list[Site]] = {}
    for site in found.sites:
        sites.setdefault(kernel_name(site.shape), []).append(site)
    for kernel in named:
        if found.sites and kernel not in sites:
            raise ConfigError(
                f"tile names the kernel size {kernel!r}, which no target has; their kernel sizes "
                f"are {', '.join(sites)}."
            )
    reason = "tile names no tile for its kernel size, {}"
    skips = [
        Skip(site.name, reason.format(kernel), site.dense_params)
        for kernel, group in sites.items()
        if kernel not in named
        for site in group
    ]
    kept = tuple(site for site in found.sites if kernel_name(site.shape) in named)
    return replace(found, sites=kept, skips=(*found.skips, *skips))


def _config(config: HyperConfig | None, overrides: Mapping[str, Any]) -> HyperConfig:
    if config is not None and not isinstance(config, HyperConfig):
        raise ConfigError(f"config must be a HyperConfig or None, got {type(config).__name__}.")
    return (config or HyperConfig()).replace(**overrides)


def _nothing_found(found: Found, config: HyperConfig) -> str:
    kinds = " or ".join(config.targets)
    if found.skips:
        reasons = Counter(skip.reason for skip in found.skips)
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        return f"no {kinds} weight can be generated: all {len(found.skips)} are skipped ({why})."
    if found.untargeted:
        others = ", ".join(f"{u.layers} {u.kind}" for u in found.untargeted)
        names = ", ".join(repr(u.kind) for u in found.untargeted)
        return (
            f"no targets: the model has no {kinds} layer. It has {others}; to rewrite those, pass "
            f"targets=({names},)."
        )
    return f"no targets: the model has no {kinds} layer, nor one of another registered kind."


def _unreachable(best: _Choice, found: Found, config: HyperConfig) -> str:
    free = [n for n in ("tile", "hidden_dim", "embedding_dim") if getattr(config, n) is None]
    fixed = [n for n in ("tile", "hidden_dim", "embedding_dim") if getattr(config, n) is not None]
    advice = f"leave {' and '.join(fixed)} to the planner" if fixed else "ask for less"
    at = (
        f"embedding_dim={best.embedding_dim}, hidden_dim={best.hidden_dim} and tiles of "
        f"{best.lead} channels"
    )
    if config.max_params is not None:
        if found.untargeted:
            kinds = ", ".join(repr(u.kind) for u in found.untargeted)
            advice += f", or add targets ({kinds})"
        least = found.total_params + _growth(found) - best.dense + best.hyper
        return (
            f"max_params={config.max_params:,} cannot be met: this model can have {least:,} (at "
            f"{at}) to {found.total_params - 1:,} parameters with the targets "
            f"{', '.join(config.targets)}; {advice}."
        )
    return (
        f"compression={config.compression:g} cannot be met: with {', '.join(free)} free, the "
        f"reachable range for these {sum(s.dense_params for s in found.sites):,} weights is 1 to "
        f"{best.ratio:,.2f} (at {at}); {advice}."
    )


def _lined_up(trail: float, columns: Mapping[int, int]) -> int:
    """The trail near a value whose tiles end with the rows of most weights.

    Args:
        trail: The value; not more than half of an octave away from it.
        columns: Channels of a row -> number of weights that have such rows.
    """
    low = max(1, math.ceil(trail / math.sqrt(2)))
    trails = np.arange(low, max(low, int(trail * math.sqrt(2))) + 1)
    channels, weights = (np.array(side) for side in zip(*columns.items(), strict=True))
    many, few = trails[:, None], channels[None]
    ends = ((few % many == 0) | (many % few == 0)) @ weights
    return int(min(trails[ends == ends.max()], key=lambda near: abs(math.log(near / trail))))


def _power_of_two(value: float) -> int:
    """The power of two nearest to a value, on the logarithmic scale; at least 1."""
    return 1 if value <= 1 else 2 ** round(math.log2(value))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
