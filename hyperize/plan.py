"""Plans: what `hyperize` will build, in integers. No tensors, so they work on the meta device.

The parameters are, exactly, of embeddings of length Nz and a hidden layer of size d (or none, then
the heads have Nz inputs), with lead, trail and k as in `hyperize.tiling`:

    tiles * Nz  +  lead * d * (Nz + 1)  +  sum over heads of trail * k * ((d or Nz) + 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hyperize.config import ConfigError, HyperConfig, Tile
from hyperize.families import FAMILIES
from hyperize.family import Family
from hyperize.sites import DynamicSite, PrivateSite, Site, Skip, Untargeted
from hyperize.tables import Printed, notebook
from hyperize.tiling import Grid, Head

__all__ = ["Plan"]

BALANCE = 256
"""Multiply-adds that are taken to last as long as writing a number to memory and reading it.

Of 128 to 1,024 it made ResNets fastest on a CPU. A GPU's peak figures are about 500.
"""


@dataclass(frozen=True)
class PlannedSite:
    """A site with its place in the hypernetwork.

    Attributes:
        site: What is generated.
        grid: How it is tiled.
        hyper_params: Parameters of its embeddings, `grid.tiles` times the embedding dimension, in
            each of `HyperConfig.rows` sets.
    """

    site: Site
    grid: Grid
    hyper_params: int


@dataclass(frozen=True, repr=False)
class Plan(Printed):
    """What `hyperize` will build, in integers. `print(plan)` explains it.

    Attributes:
        config: The request.
        family_name: Which of `hyperize.families` makes the weights; empty if nothing is generated.
        sites: What is generated, in order.
        dynamic: Recurrent layers in whose place a dynamic hypernetwork comes.
        skips: Targets that stay dense, with reasons.
        untargeted: Layers of known kinds that are not targets.
        order: How the sites were found.
        lead: Tile channels along the trunk axis.
        heads: The output layers, one per kernel size.
        embedding_dim: Nz.
        hidden_dim: d; 0 for no hidden layer and no trunk.
        total_params: Parameters of the whole dense model.
        total_bytes: Bytes of its parameters and buffers.
        private: With several networks, layers that have parameters and buffers for each.
        model: Name of the model: that of timm's architecture, or of its class.
        root: Path of the module that was hyperized, where it is a part of the model.
        notes: Remarks for the user, e.g. a default request that explicit sizes do not meet.
    """

    config: HyperConfig
    family_name: str
    sites: tuple[PlannedSite, ...]
    dynamic: tuple[DynamicSite, ...]
    skips: tuple[Skip, ...]
    untargeted: tuple[Untargeted, ...]
    order: str
    lead: int
    heads: tuple[Head, ...]
    embedding_dim: int
    hidden_dim: int
    total_params: int
    total_bytes: int
    private: tuple[PrivateSite, ...] = ()
    model: str = ""
    root: str = ""
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
    def family(self) -> Family:
        """The family that makes the weights; of a plan without weights, any."""
        return FAMILIES[self.family_name or next(iter(FAMILIES))]

    @property
    def shared(self) -> dict[str, tuple[int, int]]:
        """The hypernetwork's layers besides the heads: name -> inputs and outputs."""
        return self.family.shared(self.lead, self.hidden_dim, self.embedding_dim)

    @property
    def fan_in(self) -> int:
        """Inputs of a head: d, or Nz where there is no hidden layer."""
        return int(self.family.fan_in(self.hidden_dim, self.embedding_dim))

    @property
    def hypernet_params(self) -> int:
        """Parameters of the shared hypernetwork."""
        sizes = [*self.shared.values(), *((self.fan_in, head.width) for head in self.heads)]
        return sum((n_in + 1) * n_out for n_in, n_out in sizes)

    @property
    def hyper_params(self) -> int:
        """Parameters of the hypernetwork, all embeddings and the dynamic layers."""
        dynamic = sum(site.hyper_params for site in self.dynamic)
        return self.hypernet_params + self.embedding_params + dynamic

    @property
    def networks(self) -> int:
        """Number of networks that the generator makes."""
        return self.config.networks

    @property
    def compression(self) -> float:
        """`dense_params / hyper_params`, with the former of all networks."""
        return self.networks * self.dense_params / self.hyper_params

    @property
    def private_params(self) -> int:
        """Parameters, not generated, that each of several networks has for itself."""
        return sum(site.params for site in self.private)

    @property
    def further_params(self) -> int:
        """Parameters that one more network adds."""
        return self.embedding_params // self.networks + self.private_params

    @property
    def break_even(self) -> int:
        """The number of networks from which on they are smaller together than as dense ones."""
        shared = self.total_hyper_params - self.networks * self.further_params
        saved = self.total_params - self.further_params
        return shared // saved + 1 if saved > 0 else 0

    @property
    def total_hyper_params(self) -> int:
        """Parameters of the whole model after the rewrite."""
        copies = (self.networks - 1) * self.private_params
        return self.total_params - self.dense_params + copies + self.hyper_params

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
        return self.family.macs(planned.grid, self.hidden_dim, self.embedding_dim)

    def factorized_macs(self, planned: PlannedSite) -> int | None:
        """Multiply-adds per position of the output, of computing with a weight's factors.

        The weight itself takes as many as it has elements. None where the layer computes with the
        weight also if `HyperConfig.factorized`: where the factors would take as long, with
        `BALANCE` for each number between two products; where the family has no factors for it, as
        where rows of the weight end within tiles; and in other layers than `Site.plain` ones.
        """
        counts = None
        if planned.site.plain:
            counts = self.family.factorized_macs(planned.grid, self.fan_in + 1)
        if counts is None:
            return None
        macs, between = counts
        return macs if macs + BALANCE * between < planned.site.dense_params else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # immutable; every copy of a model would copy it otherwise

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values; the inverse of `from_dict`."""
        fields = asdict(replace(self, config=HyperConfig(), sites=()))
        sites = [asdict(planned.site) for planned in self.sites]
        return fields | {"config": self.config.to_dict(), "sites": sites}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """A plan from the output of `to_dict`, also after a round trip through JSON.

        Raises:
            ConfigError: The data does not describe a plan.
        """
        try:
            heads = {head["kernel"]: Head(**head) for head in data["heads"]}
            plan = cls(
                **dict(data)
                | {
                    "config": HyperConfig.from_dict(data["config"]),
                    "sites": (),
                    "dynamic": tuple(DynamicSite(**_tuples(site)) for site in data["dynamic"]),
                    "skips": tuple(Skip(**skip) for skip in data["skips"]),
                    "untargeted": tuple(Untargeted(**kind) for kind in data["untargeted"]),
                    "private": tuple(
                        PrivateSite(**_tuples(site)) for site in data.get("private", ())
                    ),
                    "heads": tuple(heads.values()),
                    "notes": tuple(data["notes"]),
                }
            )
            sites = (Site(**_tuples(site)) for site in data["sites"])
            return replace(plan, sites=tuple(plan.place(site, heads) for site in sites))
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"not the description of a plan: {error!r}.") from error

    def place(self, site: Site, heads: Mapping[str, Head]) -> PlannedSite:
        """A site with its place among this plan's heads, by kernel size."""
        head = heads[site.kernel]
        grid = self.family.grid(site.shape, self.lead, head, self.config.trunk_axis)
        return PlannedSite(site, grid, self.config.rows * grid.tiles * self.embedding_dim)

    def settings(self) -> Iterator[tuple[str, str]]:
        """Names and sizes of what will be built."""
        kernels = Counter(planned.grid.kernel for planned in self.sites)
        nz, d = self.embedding_dim, self.fan_in
        yield "weights", f"{len(self.sites)} in {self.tiles:,} tiles, {self.order}"
        if self.sites:
            for name, (n_in, n_out) in self.shared.items():
                size = f"{n_in} -> {self.lead} x {n_out // self.lead}"
                yield name, f"{size}, {(n_in + 1) * n_out:,} parameters"
            for h in self.heads:
                size = f"{d} -> {h.trail} x {h.kernel}"
                made = f"{kernels[h.kernel]} weights"
                yield "head", f"{size}, {h.width * (d + 1):,} parameters, {made}"
            sets = f"{self.config.rows} x " if self.config.rows > 1 else ""
            size = f"{sets}{self.tiles:,} embeddings of {nz}"
            yield self.family.embeddings, f"{size}, {self.embedding_params:,} parameters"
        if self.config.conditions:
            yield (
                "further",
                f"{self.further_params:,} parameters for one more network, "
                f"{self.private_params:,} of them not generated; {self.networks} dense networks "
                f"have {self.networks * self.total_params:,}, and {self.break_even} or more are "
                "smaller so",
            )
        if self.config.factorized and self.sites:
            macs = {p.site: n for p in self.sites if (n := self.factorized_macs(p)) is not None}
            weights = sum(site.dense_params for site in macs)
            yield (
                "factors",
                f"{len(macs)} weights are not generated: {sum(macs.values()):,} multiply-adds per "
                f"position instead of {weights:,}",
            )
        for site in self.dynamic:
            sizes = f"{site.dense_params:,} -> {site.hyper_params:,} parameters"
            yield "dynamic", f"{site.path or 'the model'}: {site.kind}, {sizes}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        """All that is printed, as names and texts."""
        yield from self.settings()
        yield (
            "total",
            f"{self.networks * self.dense_params:,} -> {self.hyper_params:,}, compression "
            f"{self.compression:.2f}; whole model {self.networks * self.total_params:,} -> "
            f"{self.total_hyper_params:,}",
        )
        reasons: Counter[str] = Counter()
        for skip in self.skips:
            reasons[skip.reason] += skip.params
        yield from (("skipped", f"{params:,} weights: {why}") for why, params in reasons.items())
        for u in self.untargeted:
            yield "dense", f"{u.kind}: {u.layers} layers, {u.params:,} weights, not a target"
        yield from (("note", note) for note in self.notes)

    def _parts(self, width: int) -> Iterator[RenderableType]:
        facts = Table.grid(padding=(0, 1))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column()
        for name, text in self._facts():
            facts.add_row(Text(name), Text(text))
        yield facts

    def _repr_html_(self) -> str:
        pairs = [
            ("targets, parameters", self.networks * self.dense_params, self.hyper_params),
            (
                "whole model, parameters",
                self.networks * self.total_params,
                self.total_hyper_params,
            ),
        ]
        rows = (
            (
                name,
                [n / max(dense, hyper) for n in (dense, hyper)],
                f"{dense:,} → {hyper:,}, {dense / hyper:.2f}x",
            )
            for name, dense, hyper in pairs
        )
        return notebook(f"plan of {self.model}", rows, map(": ".join, self._facts()))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of JSON as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
