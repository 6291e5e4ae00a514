"""Planning: from a model and a request to a plan.

The planner goes through the families that the request leaves, each with its tiles from the
preferred ones on, and takes for each the longest embedding that meets the request.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from typing_extensions import Unpack

from hyperize.config import BudgetError, ConfigError, HyperConfig, Overrides
from hyperize.families import FAMILIES
from hyperize.family import Family, Geometry
from hyperize.plan import Plan, PlannedSite
from hyperize.sites import Found, Site, Skip, find_sites, name_of
from hyperize.tiling import kernel_name

__all__ = ["make_plan"]

FEW = 8
"""An embedding shorter than this is a sign that other tiles would serve the request better."""


def make_plan(
    model: nn.Module, config: HyperConfig | None = None, **overrides: Unpack[Overrides]
) -> Plan:
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
    config = requested(config, overrides)
    return plan_sites(find_sites(model, config), config, name_of(model))


def plan_sites(found: Found, config: HyperConfig, model: str) -> Plan:
    """Plans for the sites of a model, which do not depend on the tiles that are asked for.

    Args:
        found: What `find_sites` has found for the request, or for one that differs in its tiles.
        config: The request.
        model: Name of the model's class.

    Returns:
        As `make_plan`; raises its errors of the plan.
    """
    found = _tiled(found, config)
    if not found.sites and not found.dynamic:
        raise ConfigError(_nothing_found(found, config))
    if not found.sites:
        return replace(_dynamic_plan(found, config), model=model)
    shapes = Counter(site.shape for site in found.sites)
    plan = _plan(found, config, _search(shapes, found, config))
    notes = plan.notes
    if config.factorized and all(plan.factorized_macs(p) is None for p in plan.sites):
        notes = (
            *notes,
            "factorized changes nothing: no layer is faster with the factors of its weight, as all "
            "are small, grouped or of other kinds, or tiles end within rows",
        )
    return replace(plan, model=model, notes=notes)


@dataclass(frozen=True)
class _Choice:
    """One geometry with sizes, and what it keeps of the sites."""

    family: Family
    geometry: Geometry
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
        self.networks = config.networks
        self.max_params = config.max_params
        self.compression = config.compression
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
            return np.asarray(self._rest(dense) + hyper <= self.max_params)
        return np.asarray(dense >= (self.compression or 0) * hyper) & (dense > 0)

    def is_used(self, choice: _Choice) -> bool:
        """Whether a choice takes the share of what is allowed that its family has to."""
        share = choice.family.share
        if not share:
            return True
        allowed = choice.dense / self.least_ratio
        if self.max_params is not None:
            allowed = self.max_params - self._rest(choice.dense)
        return choice.met and choice.hyper >= share * allowed

    def _rest(self, dense: Any) -> Any:
        """Parameters that are not generated, if that many are."""
        return self.total_params - dense // self.networks

    def distance(self, choice: _Choice) -> float:
        """Grows as a choice gets further from the request."""
        if self.max_params is None:
            return -choice.ratio
        return choice.hyper - choice.dense / self.networks


def _search(shapes: Mapping[tuple[int, ...], int], found: Found, config: HyperConfig) -> _Choice:
    """The first geometry, from the preferred one on, that meets the request with room to spare."""
    budget = _Budget(config, found.total_params + _growth(found, config))
    everything = config.networks * found.total_params
    if config.max_params is not None and config.max_params >= everything:
        raise BudgetError(
            f"max_params={config.max_params:,} is no less than the {everything:,} parameters that "
            f"{'the dense model has' if config.networks == 1 else 'the dense models have'}, so "
            "nothing would have to be saved."
        )
    met: list[_Choice] = []
    missed: list[_Choice] = []
    for family in FAMILIES.values():
        if not family.serves(config):
            continue
        for geometry in dict.fromkeys(family.geometries(shapes, config)):
            choice = _size(family, geometry, shapes, config, budget)
            if choice is None or not (config.embeddings or budget.is_used(choice)):
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


def _size(
    family: Family,
    geometry: Geometry,
    shapes: Mapping[tuple[int, ...], int],
    config: HyperConfig,
    budget: _Budget,
) -> _Choice | None:
    """Hidden and embedding sizes for one geometry; None if no site would be left in any."""
    table = _Table(family, geometry, shapes, config)
    lead = geometry[0]
    best: _Choice | None = None
    for d in family.hidden_dims(table.tiles, geometry, config):
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
        family: Family,
        geometry: Geometry,
        shapes: Mapping[tuple[int, ...], int],
        config: HyperConfig,
    ) -> None:
        self.family, self.geometry = family, geometry
        self.lead, self.heads = geometry
        by_kernel = {head.kernel: head for head in self.heads}
        axis = config.trunk_axis
        grids = [family.grid(s, self.lead, by_kernel[kernel_name(s)], axis) for s in shapes]
        index = {head.kernel: at for at, head in enumerate(self.heads)}
        self.shapes = shapes
        self.counts = np.array(list(shapes.values()), dtype=np.int64)
        dense = [config.networks * math.prod(shape) for shape in shapes]  # of all networks
        self.weights = np.array(dense, dtype=np.int64)
        self.grid_tiles = np.array([config.rows * grid.tiles for grid in grids], dtype=np.int64)
        # (heads, shapes): which head writes which shape
        self.member = np.array([[index[g.kernel] == at for g in grids] for at in index.values()])
        self.tiles = sum(g.tiles * n for g, n in zip(grids, shapes.values(), strict=True))

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
        return np.asarray(widths[:, None] * (self.family.fan_in(hidden, nz) + 1))

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
            outputs = [out for _, out in self.family.shared(self.lead, hidden, 1).values()]
            slope = sum(outputs) or min(head.width for head in self.heads)
            limit = budget.most_hyper(int(self.weights @ self.counts)) // slope
            least, most = self.family.lengths(self.geometry, self.shapes)
            longest = max(least, min(int(fill / budget.least_ratio) + 1, limit, most or limit))
            nz = np.arange(least, longest + 1, dtype=np.int64)
        shapes, heads = self.kept(hidden, nz)
        dense = (self.weights * self.counts) @ shapes
        tiles = (self.grid_tiles * self.counts) @ shapes
        layers = self.family.shared(self.lead, hidden, nz).values()
        shared = sum((n_in + 1) * n_out for n_in, n_out in layers)
        hyper = tiles * nz + shared + (self.outputs(hidden, nz) * heads).sum(0)
        valid = dense > 0
        met = valid & budget.met(dense, hyper)
        if not valid.any():
            return None
        if met.any():
            at = int(np.flatnonzero(met)[-1])
        elif budget.max_params is not None:
            added = hyper - dense // budget.networks
            at = int(np.argmin(np.where(valid, added, np.iinfo(np.int64).max)))
        else:
            at = int(np.argmax(dense / np.maximum(hyper, 1)))
        return _Choice(
            family=self.family,
            geometry=self.geometry,
            hidden_dim=hidden,
            embedding_dim=int(nz[at]),
            dense=int(dense[at]),
            hyper=int(hyper[at]),
            met=bool(met[at]),
        )


def _plan(found: Found, config: HyperConfig, choice: _Choice) -> Plan:
    shapes = Counter(site.shape for site in found.sites)
    lead, all_heads = choice.geometry
    table = _Table(choice.family, choice.geometry, shapes, config)
    nz = np.array([choice.embedding_dim], dtype=np.int64)
    kept, heads_kept = table.kept(choice.hidden_dim, nz)
    stays = dict(zip(shapes, kept[:, 0].tolist(), strict=True))
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
    plan = replace(
        _empty_plan(found, config, notes),
        family_name=choice.family.name,
        lead=lead,
        heads=tuple(h for h, keep in zip(all_heads, heads_kept[:, 0], strict=True) if keep),
        embedding_dim=choice.embedding_dim,
        hidden_dim=choice.hidden_dim,
    )
    by_kernel = {head.kernel: head for head in all_heads}
    sites: list[PlannedSite] = []
    skips: list[Skip] = []
    for site in found.sites:
        planned = plan.place(site, by_kernel)
        if stays[site.shape]:
            sites.append(planned)
            continue
        reason = "would grow: its embeddings are no smaller"
        if planned.hyper_params < config.networks * site.dense_params:
            reason = f"would grow: too few {site.kernel} weights for an output layer of their own"
        skips.append(Skip(site.name, reason, site.dense_params))
    paths = {planned.site.path for planned in sites}
    private = tuple(s for s in found.private if s.path in paths or not s.generated)
    return replace(plan, sites=tuple(sites), skips=(*found.skips, *skips), private=private)


def _dynamic_plan(found: Found, config: HyperConfig) -> Plan:
    """The plan of a model in which nothing is generated, and layers are made dynamic."""
    total = found.total_params + _growth(found, config)
    if config.max_params is not None and total > config.max_params:
        raise BudgetError(
            f"max_params={config.max_params:,} cannot be met: dynamic layers have more parameters "
            f"than the dense ones, {total:,} in the whole model instead of {found.total_params:,}."
        )
    notes = _dynamic_notes(found)
    if config.compression is not None:
        notes.append(
            f"compression {config.compression:g} is asked of generated weights, of which there are "
            "none; it is not asked of dynamic layers"
        )
    return _empty_plan(found, config, notes)


def _empty_plan(found: Found, config: HyperConfig, notes: list[str]) -> Plan:
    """What was found, with no generated weight yet."""
    return Plan(
        config=config,
        family_name="",
        sites=(),
        dynamic=found.dynamic,
        skips=found.skips,
        untargeted=found.untargeted,
        order=found.order,
        lead=0,
        heads=(),
        embedding_dim=0,
        hidden_dim=0,
        total_params=found.total_params,
        total_bytes=found.total_bytes,
        notes=tuple(notes),
    )


def _growth(found: Found, config: HyperConfig) -> int:
    """Parameters that are added, whatever is generated."""
    copies = (config.networks - 1) * sum(site.params for site in found.private)
    return copies + sum(site.growth for site in found.dynamic)


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
        sites.setdefault(site.kernel, []).append(site)
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
    kept = tuple(site for site in found.sites if site.kernel in named)
    return replace(found, sites=kept, skips=(*found.skips, *skips))


def requested(config: HyperConfig | None, overrides: Overrides) -> HyperConfig:
    """The request that a config and fields in its place make."""
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
        f"{best.geometry[0]} channels"
    )
    if config.max_params is not None:
        if found.untargeted:
            kinds = ", ".join(repr(u.kind) for u in found.untargeted)
            advice += f", or add targets ({kinds})"
        least = found.total_params + _growth(found, config) + best.hyper
        least -= best.dense // config.networks
        return (
            f"max_params={config.max_params:,} cannot be met: this model can have {least:,} (at "
            f"{at}) to {config.networks * found.total_params - 1:,} parameters with the targets "
            f"{', '.join(config.targets)}; {advice}."
        )
    return (
        f"compression={config.compression:g} cannot be met: with {', '.join(free)} free, the "
        "reachable range for these "
        f"{config.networks * sum(s.dense_params for s in found.sites):,} "
        "weights is 1 to "
        f"{best.ratio:,.2f} (at {at}); {advice}."
    )
