"""The compression report: rows that add up to the totals, of a plan or of the model itself."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from hyperize.conditions import each_network
from hyperize.drawing import Bar, Source, bar_chart
from hyperize.dynamic import HyperLSTM, HyperRNN
from hyperize.layers import Generated
from hyperize.page import page
from hyperize.parts import Group, find_groups, own_tables
from hyperize.plan import Plan, PlannedSite
from hyperize.sites import DynamicSite, Skip, Untargeted, tensor_bytes
from hyperize.writing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "report"]

WIDTH = 80
"""Columns of the printed table."""
_REPLACED = "replaced by another layer since the rewrite"


@dataclass(frozen=True)
class SiteRow:
    """One generated weight, or one dynamic layer.

    Attributes:
        path: Path of the layer.
        param: Name of the parameter; empty for a dynamic layer, of which all are counted.
        kind: Kind of layer; "lstm, dynamic" or "rnn, dynamic" for those.
        shape: Shape of the weight; empty for a dynamic layer.
        dense_params: Number of weights; of several networks, of all.
        hyper_params: Parameters of its embeddings; the hypernetwork is shared and not in here.
    """

    path: str
    param: str
    kind: str
    shape: tuple[int, ...]
    dense_params: int
    hyper_params: int


@dataclass(frozen=True)
class Report:
    """What a rewrite saves. `print(report)` is a table of 80 columns.

    The report of a model holds on to its generated layers and hypernetwork, which are small, so
    that `to_html` can draw what they generate then. Nothing else does: they are no part of
    comparisons, `to_dict`, pickles and copies, and the report of a plan has none.

    Attributes:
        model: Name of the model's class.
        sites: The generated weights, in order.
        skipped: Targets that stay dense, with reasons.
        untargeted: Layers of known kinds that are not among the targets.
        hypernet_params: Parameters of the shared hypernetwork.
        total_dense_params: Parameters of the whole dense model; of all dense models, where there
            are several networks.
        dense_bytes: Bytes of its parameters and buffers, as in an uncompressed file.
        hyper_bytes: The same of the hyperized model.
        generator_macs: Multiply-adds of generating weights, each once, as each forward pass does.
        factorized_params: Weights that are not generated, as layers compute with their factors
            (`HyperConfig.factorized`).
        factorized_macs: Multiply-adds of that for one position in each of the layers; the weights
            themselves would take `factorized_params`.
        order: How the sites were found.
        notes: Remarks.
        networks: Number of networks that the generator makes.
        further_params: Parameters that one more network would add.
        break_even: The number of networks from which on they are smaller than dense ones.
        shared_params: Parameters that are not generated, and are one for all networks.
        sources: The generated layers, of which `to_html` draws pictures.
    """

    model: str
    sites: tuple[SiteRow, ...]
    skipped: tuple[Skip, ...]
    untargeted: tuple[Untargeted, ...]
    hypernet_params: int
    total_dense_params: int
    dense_bytes: int
    hyper_bytes: int
    generator_macs: int
    factorized_params: int
    factorized_macs: int
    order: str
    notes: tuple[str, ...]
    networks: int = 1
    further_params: int = 0
    break_even: int = 0
    shared_params: int = 0
    sources: tuple[Source, ...] = field(default=(), compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"sources": ()}

    @property
    def dense_params(self) -> int:
        """Number of generated weights."""
        return sum(row.dense_params for row in self.sites)

    @property
    def hyper_params(self) -> int:
        """Parameters that they are generated from: hypernetwork and embeddings."""
        return self.hypernet_params + sum(row.hyper_params for row in self.sites)

    @property
    def compression(self) -> float:
        """`dense_params / hyper_params`, the ratio over the targets."""
        return self.dense_params / self.hyper_params

    @property
    def total_hyper_params(self) -> int:
        """Parameters of the whole hyperized model."""
        others = self.total_dense_params - self.dense_params  # of all networks
        return others - (self.networks - 1) * self.shared_params + self.hyper_params

    @property
    def total_compression(self) -> float:
        """The ratio over the whole model."""
        return self.total_dense_params / self.total_hyper_params

    @property
    def hints(self) -> tuple[str, ...]:
        """What would save more."""
        hints = []
        for kind in self.untargeted:
            share = kind.params / self.total_dense_params
            if share > 0.2:  # below, the ratio over the whole model hardly changes
                hints.append(
                    f"{kind.kind} layers hold {share:.0%} of the dense model's parameters and are "
                    f'not a target; add "{kind.kind}" to targets to generate them too'
                )
        return tuple(hints)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready values."""
        names = ("dense_params", "hyper_params", "compression")
        totals = ("total_hyper_params", "total_compression", "hints")
        fields = asdict(replace(self, sources=()))
        del fields["sources"]
        return fields | {name: getattr(self, name) for name in names + totals}

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The report as Markdown: a table of totals, a table of sites, and the remarks."""
        lines = [f"### {self.model}", "", "| | dense | hyper | ratio |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in self._totals()]
        lines += ["", "| weight | kind | shape | dense | hyper | ratio |"]
        lines += ["|---|---|---|---:|---:|---:|"]
        lines += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in self._rows()]
        lines += ["", *(f"- {remark}" for remark in self._remarks())]
        return "\n".join(lines) + "\n"

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML page that needs no network.

        It has the totals, bars of each weight before and after, a table to sort, and of a model
        also its embeddings in a plane and some of the kernels that it generates now. Embeddings of
        large models are sampled, so that the page stays small. The file is written beside the
        target and moved there.

        Args:
            path: The file to write.

        Raises:
            FileError: It cannot be written.
        """
        with ExitStack() as blocks:  # pictures are of the first network
            layers = (s.layer for s in self.sources if isinstance(s.layer, Generated))
            for layer in {layer.hypernet: layer for layer in layers}.values():
                blocks.enter_context(next(each_network(layer)))
            text = self._page()
        with replacing(Path(path)) as part:
            part.write_text(text, encoding="utf-8")

    def _page(self) -> str:
        return page(
            title=self.model,
            totals=self._figures(),
            bars=self._bars(),
            hypernet_params=self.hypernet_params,
            remarks=self._remarks(),
            skipped=self.skipped,
            sources=self.sources,
        )

    def plot(self) -> Figure:
        """Bars of the totals and of each weight, before and after, as a matplotlib figure.

        Returns:
            A figure that pyplot does not know of, so that nothing is shown; save it by
            `report(hyper).plot().savefig("report.png")`.

        Raises:
            ImportError: matplotlib is not installed; it is in the extra `hyperize[plot]`.
        """
        return bar_chart(self.model, self._figures(), self._bars(), self.hypernet_params)

    def __str__(self) -> str:
        sites = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        sites.add_column("weight", overflow="fold", ratio=1)
        for name in ("kind", "shape"):
            sites.add_column(name, no_wrap=True)
        for name in ("dense", "hyper", "ratio"):
            sites.add_column(name, justify="right", no_wrap=True)
        for row in self._rows():
            sites.add_row(*row)
        totals = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        totals.add_column(self.model, no_wrap=True)
        for name in ("dense", "hyper", "ratio"):
            totals.add_column(name, justify="right", no_wrap=True)
        for row in self._totals():
            totals.add_row(*row)
        file = io.StringIO()
        console = Console(file=file, width=WIDTH, color_system=None, markup=False, highlight=False)
        for part in (sites, "", totals, "", *self._remarks()):
            console.print(part)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def _bars(self) -> list[Bar]:
        return [
            Bar(
                name=".".join(name for name in (row.path, row.param) if name) or self.model,
                kind=row.kind,
                shape="x".join(map(str, row.shape)),
                dense=row.dense_params,
                hyper=row.hyper_params,
            )
            for row in self.sites
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            (
                bar.name,
                bar.kind,
                bar.shape,
                f"{bar.dense:,}",
                f"{bar.hyper:,}",
                f"{bar.dense / bar.hyper:.1f}",
            )
            for bar in self._bars()
        ]
        shared = ("hypernet (shared)", "", "", "", f"{self.hypernet_params:,}", "")
        return [*rows, shared] if self.hypernet_params else rows

    def _figures(self) -> list[tuple[str, int, int]]:
        return [
            ("targets, parameters", self.dense_params, self.hyper_params),
            ("whole model, parameters", self.total_dense_params, self.total_hyper_params),
            ("whole model, bytes on disk", self.dense_bytes, self.hyper_bytes),
        ]

    def _totals(self) -> list[tuple[str, ...]]:
        return [
            (name, f"{dense:,}", f"{hyper:,}", f"{dense / hyper:.2f}")
            for name, dense, hyper in self._figures()
        ]

    def _remarks(self) -> list[str]:
        remarks = [
            f"rewritten: {len(self.sites)}, {self.order}",
            f"generator: {self.generator_macs:,} multiply-adds per forward pass",
        ]
        if self.networks > 1:
            remarks.append(
                f"networks: {self.networks}; one more adds {self.further_params:,} parameters, and "
                f"from {self.break_even} on they are smaller together than dense ones"
            )
        if self.factorized_params:
            remarks.append(
                f"factorized: {self.factorized_params:,} weights are not generated; their layers "
                f"do {self.factorized_macs:,} multiply-adds per position, "
                f"{self.factorized_macs / self.factorized_params:.2f} of the dense ones"
            )
        weights: Counter[str] = Counter()
        names: dict[str, list[str]] = {}
        for skip in self.skipped:
            weights[skip.reason] += skip.params
            names.setdefault(skip.reason, []).append(skip.path)
        for reason, count in weights.items():
            paths = names[reason]
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            remarks.append(f"skipped: {', '.join(paths[:3])}{more} ({count:,} weights): {reason}")
        remarks += [
            f"dense: {kind.layers} {kind.kind} ({kind.params:,} weights): not a target"
            for kind in self.untargeted
        ]
        return remarks + [f"note: {n}" for n in self.notes] + [f"hint: {h}" for h in self.hints]


def report(hyper_or_plan: nn.Module | Plan) -> Report:
    """Reports what a rewrite saves.

    Args:
        hyper_or_plan: A hyperized model, a part of one, or a model with several such parts, whose
            own tensors are counted; or a plan.

    Raises:
        ModelError: The model is not hyperized, or is wrapped or sharded.
    """
    if isinstance(hyper_or_plan, Plan):
        return _of_plan(hyper_or_plan)
    return _of_model(hyper_or_plan, find_groups(hyper_or_plan))


def _of_plan(plan: Plan) -> Report:
    itemsizes = [planned.site.itemsize for planned in plan.sites]
    # The hypernetwork has the widest of the sites' dtypes, and two constants per site.
    constants = 2 * len(plan.sites) * plan.networks
    shared = (plan.hypernet_params + constants) * max(itemsizes, default=0)
    change = sum(
        (planned.hyper_params - planned.site.dense_params) * size
        for planned, size in zip(plan.sites, itemsizes, strict=True)
    ) + sum(site.growth * site.itemsize for site in plan.dynamic)
    change += (plan.networks - 1) * sum(site.bytes for site in plan.private)
    dynamic = (_dynamic_row(site, site.hyper_params) for site in plan.dynamic)
    generator_macs, factorized_params, factorized_macs = _multiply_adds(
        plan, plan.sites, plan.config.factorized
    )
    return Report(
        model=plan.model,
        sites=(*(_row(p, p.hyper_params, plan.networks) for p in plan.sites), *dynamic),
        skipped=plan.skips,
        untargeted=plan.untargeted,
        hypernet_params=plan.hypernet_params,
        total_dense_params=plan.networks * plan.total_params,
        dense_bytes=plan.networks * plan.total_bytes,
        hyper_bytes=plan.total_bytes + change + shared,
        generator_macs=generator_macs,
        factorized_params=factorized_params,
        factorized_macs=factorized_macs,
        order=plan.order,
        notes=plan.notes,
        networks=plan.networks,
        further_params=plan.further_params,
        break_even=plan.break_even,
        shared_params=plan.total_params - plan.dense_params - plan.private_params,
    )


def _of_model(model: nn.Module, groups: list[Group]) -> Report:
    """The report of a model as it is now: layers may have been replaced since it was planned."""
    modules = dict(model.named_modules())
    rows: list[SiteRow] = []
    sources: list[Source] = []
    replaced: list[Skip] = []
    saved = hypernet_params = shared_bytes = 0
    macs = [0, 0, 0]
    for hypernet, layers, plan in ((g.hypernet, g.layers, g.plan) for g in groups):
        for planned in plan.sites:
            site = planned.site
            layer = layers[site.path]
            embedding = layer.embedding(site.param)
            rows.append(_row(planned, embedding.numel(), plan.networks))
            sources.append(Source(site.name, layer, site.param, site.shape))
            saved += (site.dense_params - embedding.numel()) * embedding.element_size()
            constants = layer.all_constants(site.param)  # scales and offsets
            shared_bytes += constants.numel() * next(hypernet.parameters()).element_size()
        for dynamic in plan.dynamic:
            module = modules.get(dynamic.path)
            if not isinstance(module, (HyperLSTM, HyperRNN)):
                replaced.append(Skip(dynamic.path, _REPLACED, dynamic.dense_params))
                continue
            params = list(module.parameters())
            count = sum(p.numel() for p in params)
            rows.append(_dynamic_row(dynamic, count))
            saved += (dynamic.dense_params - count) * params[0].element_size()
        found = _multiply_adds(plan, plan.sites, hypernet.factorized)
        macs = [a + b for a, b in zip(macs, found, strict=True)]
        hypernet_params += sum(p.numel() for p in hypernet.parameters())
        shared_bytes += tensor_bytes(hypernet)
    hyper_params = hypernet_params + sum(row.hyper_params for row in rows)
    others = sum(p.numel() for p in model.parameters()) - hyper_params
    hyper_bytes = tensor_bytes(model)
    plans = [group.plan for group in groups]
    networks = max(plan.networks for plan in plans)
    private = [table for *_, table in own_tables(model)] if networks > 1 else []
    alone = sum(p.numel() for p in private if isinstance(p, nn.Parameter)) // networks
    others -= (networks - 1) * alone  # of one network
    repeated = sum(t.numel() * t.element_size() for t in private) // networks
    dense_bytes = hyper_bytes + saved - shared_bytes - (networks - 1) * repeated
    of_sites = sum(row.dense_params for row in rows)
    return Report(
        model=plans[0].model if plans[0].root == "" and plans[0].model else type(model).__name__,
        sites=tuple(rows),
        skipped=(*_skipped(groups), *replaced),
        untargeted=_untargeted(plans),
        hypernet_params=hypernet_params,
        total_dense_params=networks * others + of_sites,
        dense_bytes=networks * dense_bytes,
        hyper_bytes=hyper_bytes,
        generator_macs=macs[0],
        factorized_params=macs[1],
        factorized_macs=macs[2],
        order="; ".join(dict.fromkeys(plan.order for plan in plans)),
        notes=tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
        networks=networks,
        further_params=sum(plan.further_params for plan in plans),
        break_even=max(plan.break_even for plan in plans),
        shared_params=others - alone,
        sources=tuple(sources),
    )


def _skipped(groups: list[Group]) -> Iterator[Skip]:
    """What stays dense by each plan, and is not generated by another."""
    generated = {site.site.name for group in groups for site in group.plan.sites}
    generated |= {path for group in groups for path in group.layers}
    for skip in (skip for group in groups for skip in group.plan.skips):
        if skip.path not in generated:
            yield skip


def _untargeted(plans: list[Plan]) -> tuple[Untargeted, ...]:
    """By kind, over several plans."""
    kinds: dict[str, Untargeted] = {}
    for kind in (kind for plan in plans for kind in plan.untargeted):
        before = kinds.get(kind.kind, Untargeted(kind.kind, 0, 0))
        kinds[kind.kind] = Untargeted(
            kind.kind, before.layers + kind.layers, before.params + kind.params
        )
    return tuple(kinds.values())


def _multiply_adds(
    plan: Plan, sites: Iterable[PlannedSite], factorized: bool
) -> tuple[int, int, int]:
    """The report's `generator_macs`, `factorized_params` and `factorized_macs`."""
    generator = params = factors = 0
    for planned in sites:
        macs = plan.factorized_macs(planned) if factorized else None
        if macs is None:
            generator += plan.macs_of(planned)
        else:
            params += planned.site.dense_params
            factors += macs
    return generator, params, factors


def _dynamic_row(site: DynamicSite, hyper_params: int) -> SiteRow:
    return SiteRow(site.path, "", f"{site.kind}, dynamic", (), site.dense_params, hyper_params)


def _row(planned: PlannedSite, hyper_params: int, networks: int) -> SiteRow:
    site = planned.site
    return SiteRow(
        path=site.path,
        param=site.param,
        kind=site.kind,
        shape=site.shape,
        dense_params=networks * site.dense_params,
        hyper_params=hyper_params,
    )
