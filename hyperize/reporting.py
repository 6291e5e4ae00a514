"""The compression report: rows that add up to the totals, of a plan or of the model itself."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn

from hyperize.conditions import each_network
from hyperize.config import ConfigError, FileError, HyperConfig, ModelError
from hyperize.counting import forward_macs
from hyperize.drawing import Bar, Snapshot, Source, bar_chart, snapshot, spread
from hyperize.dynamic import HyperLSTM, HyperRNN
from hyperize.page import Moment, page
from hyperize.parts import Group, find_groups, own_tables
from hyperize.plan import Plan, PlannedSite
from hyperize.private import Private
from hyperize.sites import (
    DynamicSite,
    Skip,
    Untargeted,
    kind_of,
    name_of,
    tensor_bytes,
    weights_of,
)
from hyperize.tables import ROWS, Column, Printed, collapse, notebook, table
from hyperize.teacher import Teacher, relative, state_of, teachers_of, weight_of
from hyperize.writing import check_target, made_with, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "report", "to_html"]

_MOMENTS = 6
"""Reports of which a page has pictures, at most."""
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
        error: Norm of its difference to a teacher's weight, over the norm of that weight; `None`
            without a teacher. Of several networks it is that of all.
    """

    path: str
    param: str
    kind: str
    shape: tuple[int, ...]
    dense_params: int
    hyper_params: int
    error: float | None = None

    @property
    def name(self) -> str:
        """Name of the weight or the layer; empty if the model is the layer."""
        return ".".join(part for part in (self.path, self.param) if part)


@dataclass(frozen=True, repr=False)
class Report(Printed):
    """What a rewrite saves. `print(report)` is a table, as wide as the terminal.

    In colour it is `rich.print(report)`; `str` is plain text, which can go into a file. Where there
    are more than 40 rows, repeated blocks are one row with their sums, unless `full`.

    The report of a model has in it what `to_html` draws, as it was when the report was made: a few
    kernels and a sample of the embeddings. They are no part of comparisons and `to_dict`.

    Attributes:
        model: Name of the model: that of timm's architecture, or of its class.
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
        request: The `HyperConfig` that was asked for, in words.
        settings: Names and sizes of what was built for it.
        error: Relative error of all weights to a teacher's, each divided by its standard deviation;
            `None` without a teacher.
        forward_macs: Multiply-adds of the dense model's forward pass for one input, where timm says
            of which size its inputs are; 0 where that is not known, and of plans.
        input_size: Size of that input, (channels, height, width).
        full: Whether the printed table has a row for each weight.
        date: When the report was made.
        snapshot: What `to_html` draws.
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
    request: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    error: float | None = None
    forward_macs: int = field(default=0, compare=False)
    input_size: tuple[int, ...] = field(default=(), compare=False)
    full: bool = field(default=False, compare=False)
    date: str = field(default="", compare=False)
    snapshot: Snapshot = field(default_factory=Snapshot, compare=False)

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
        facts = asdict(replace(self, snapshot=Snapshot()))
        for name in ("snapshot", "full", "date"):
            del facts[name]
        return facts | {name: getattr(self, name) for name in names + totals}

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The report as Markdown: a table of totals, a table of sites, and the remarks."""
        lines = [f"### {self.model}", "", "| | dense | hyper | ratio |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in self._totals()]
        known = self.error is not None
        lines += ["", "| weight | kind | shape | dense | hyper | ratio |" + " error |" * known]
        lines += ["|---|---|---|---:|---:|---:|" + "---:|" * known]
        lines += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in self._rows()]
        lines += ["", *(f"- {remark}" for remark in self._remarks())]
        return "\n".join(lines) + "\n"

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Writes the report as one HTML page that needs no network.

        It has the totals and a table of all weights to sort and to filter. Of a trained model it
        has pictures, too: some of the kernels that it generates, a map of its weights by their
        embeddings, and the embeddings in a plane; with a teacher also its kernels, and the error of
        each weight. Everything is as it was when the report was made. Large models are sampled, so
        that the page stays small. The file is written beside the target and moved there.

        Args:
            path: The file to write.
            title: Of the page; the name of the model if `None`.

        Returns:
            The file's path.

        Raises:
            FileError: It cannot be written, or its name ends as something else.
        """
        return to_html([self], path, title=title)

    @overload
    def plot(self) -> Figure: ...

    @overload
    def plot(self, path: str | os.PathLike[str]) -> Path: ...

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure | Path:
        """Draws bars of the totals and of each weight, before and after, by matplotlib.

        Args:
            path: The file to write, of a suffix that matplotlib knows, as .png, .svg or .pdf.

        Returns:
            The file's path; without one, a figure that pyplot does not know of, so that nothing is
            shown.

        Raises:
            FileError: The file cannot be written, or its suffix is unknown.
            ImportError: matplotlib is not installed; it is in the extra `hyperize[plot]`.
        """
        figure = bar_chart(self.model, self._figures(), self._bars(), self.hypernet_params)
        if path is None:
            return figure
        target = Path(path)
        suffix, known = target.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
        if suffix not in known:
            raise FileError(
                f"{target} has to end in a suffix that matplotlib writes, got {target.suffix!r}; "
                f"take one of {', '.join(f'.{name}' for name in sorted(known))}."
            )
        with replacing(target) as part:
            figure.savefig(part, format=suffix)
        return target

    def _parts(self, width: int) -> Iterator[RenderableType]:
        ends = [
            Column("dense", number=True),
            Column("hyper", number=True, style="yellow"),
            Column("ratio", number=True, style="bold"),
        ]
        middle = [Column(name, style="dim", spare=True) for name in ("kind", "shape")]
        errors = [Column("error", number=True)] if self.error is not None else []
        rows = self._printed_rows()
        yield table([Column("weight"), *middle, *ends, *errors], rows, width)
        if len(rows) < len(self._rows()):
            yield Text(
                f"{len(self.sites)} weights: repeated blocks are one row, with their sums; "
                "report(..., full=True) shows each.",
                style="dim",
            )
        yield ""
        yield table([Column(self.model), *ends], self._totals(), width)
        yield ""
        yield from map(Text, self._remarks())

    def _repr_html_(self) -> str:
        rows = (
            (
                name,
                [n / max(dense, hyper) for n in (dense, hyper)],
                f"{dense:,} → {hyper:,}, {dense / hyper:.2f}x",
            )
            for name, dense, hyper in self._figures()
        )
        title = f"{self.model}: {self.request}" if self.request else self.model
        return notebook(title, rows, [f"{len(self.sites)} weights are generated"])

    def _bars(self) -> list[Bar]:
        return [
            Bar(
                name=row.name or self.model,
                kind=row.kind,
                shape="x".join(map(str, row.shape)),
                dense=row.dense_params,
                hyper=row.hyper_params,
                error=row.error,
            )
            for row in self.sites
        ]

    def _printed_rows(self) -> list[tuple[str, ...]]:
        """The rows, with repeated blocks as one where they are many and not asked for."""
        rows = self._rows()
        if self.full or len(rows) <= ROWS:
            return rows
        bars, shared = self._bars(), rows[len(self.sites) :]
        kinds = ((bar.name, (bar.kind, bar.shape, bar.dense, bar.hyper)) for bar in bars)
        return [self._row(name, [bars[at] for at in ats]) for name, ats in collapse(kinds)] + shared

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [self._row(bar.name, [bar]) for bar in self._bars()]
        shared = ["hypernet (shared)", "", "", "", f"{self.hypernet_params:,}", ""]
        shared += [""] if self.error is not None else []
        return [*rows, tuple(shared)] if self.hypernet_params else rows

    def _row(self, name: str, bars: Sequence[Bar]) -> tuple[str, ...]:
        """The row of one weight, or of several that differ in their values only."""
        dense, hyper = sum(bar.dense for bar in bars), sum(bar.hyper for bar in bars)
        shape = f"{len(bars)} x " * (len(bars) > 1) + bars[0].shape
        row = (name, bars[0].kind, shape, f"{dense:,}", f"{hyper:,}", f"{dense / hyper:.1f}")
        if self.error is None:
            return row
        known = [bar.error for bar in bars if bar.error is not None]
        mean = math.sqrt(sum(e * e for e in known) / len(known)) if known else None
        return (*row, "" if mean is None else f"{mean:.3f}")

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

    def _yardstick(self) -> str:
        """What to measure the generator's multiply-adds by."""
        if not self.forward_macs:
            generated = sum(row.dense_params for row in self.sites if row.shape) // self.networks
            each = self.generator_macs / max(generated - self.factorized_params, 1)
            return f" per forward pass, {each:,.0f} for each weight"
        _, *size = self.input_size
        pixels = f"{size[0]}" if len(set(size)) == 1 else "x".join(map(str, size))
        share = self.generator_macs / self.forward_macs
        return f", {share:.2g} of a forward pass at {pixels} px, batch 1"

    def _remarks(self) -> list[str]:
        remarks = [
            f"rewritten: {len(self.sites)}, {self.order}",
            f"generator: {self.generator_macs:,} multiply-adds{self._yardstick()}",
        ]
        if self.error is not None:
            remarks.append(f"error: {self.error:.3f}, relative to the teacher's weights")
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


def to_html(
    reports: Report | Sequence[Report], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Writes one report, or several of one model over time, as one HTML page.

        reports = [report(hyper)]
        for epoch in range(epochs):
            train(hyper)
            reports.append(report(hyper))
        to_html(reports, "page.html")

    The figures are those of the last report. Of several, the page shows kernels and embeddings
    beside each other, of an even choice of six where there are more, and how far the embeddings
    have moved.

    Args:
        reports: The reports, in the order of time.
        path: The file to write.
        title: Of the page; the name of the model if `None`.

    Returns:
        The file's path.

    Raises:
        ConfigError: There is no report, or they are of models with different weights.
        FileError: The page cannot be written, or its name ends as something else.
    """
    check_target(path, ".html", ".htm")
    several = [reports] if isinstance(reports, Report) else [*reports]
    if not several:
        raise ConfigError("to_html needs at least one report, got none; make one by report().")
    last = several[-1]
    for other in several:
        if [_size(row) for row in other.sites] != [_size(row) for row in last.sites]:
            raise ConfigError(
                f"reports on one page must be of one model, got one of {other.model} and one of "
                f"{last.model} with other weights; write a page for each."
            )
    numbers = spread(range(len(several)), _MOMENTS)
    moments = [
        Moment(f"report {at}", several[at].date, several[at].error, several[at].snapshot)
        for at in numbers
    ]
    text = page(
        title=last.model if title is None else title,
        about=_about(last),
        totals=last._figures(),
        bars=last._bars(),
        hypernet_params=last.hypernet_params,
        remarks=last._remarks(),
        skipped=last.skipped,
        moments=moments,
    )
    target = Path(path)
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8")
    return target


def _size(row: SiteRow) -> tuple[str, tuple[int, ...]]:
    return row.name, row.shape


def _about(of: Report) -> Iterator[tuple[str, str]]:
    """What a page says of a report besides its figures."""
    yield "model", of.model
    yield "request", of.request
    yield "built", "; ".join(f"{name} {text}" for name, text in of.settings)
    yield "report made", of.date
    named = map(" ".join, made_with().items())
    yield "versions", ", ".join((*named, f"Python {platform.python_version()}"))


def report(
    hyper_or_plan: nn.Module | Plan,
    *,
    full: bool = False,
    teacher: Teacher | Sequence[Teacher] | None = None,
) -> Report:
    """Reports what a rewrite saves.

    Args:
        hyper_or_plan: A hyperized model, a part of one, or a model with several such parts, whose
            own tensors are counted; or a plan.
        full: Print a row for each weight, also where there are more than 40.
        teacher: A dense model of the architecture that was hyperized, or its state dict, as `fit_`
            takes it: the report has the error of each weight then, and its page the teacher's
            kernels. Only with a model.

    Raises:
        ModelError: The model is not hyperized, or is wrapped or sharded; the teacher is of another
            architecture, or was given with a plan.
    """
    if isinstance(hyper_or_plan, Plan):
        if teacher is not None:
            raise ModelError("a plan has no weights to compare with a teacher's; pass the model.")
        found = _of_plan(hyper_or_plan)
    else:
        found = _of_model(hyper_or_plan, find_groups(hyper_or_plan), teacher)
    return replace(found, full=full, date=datetime.now().astimezone().isoformat(" ", "minutes"))


def _request(config: HyperConfig) -> str:
    """A request in words: its size, its targets, and what differs from the defaults."""
    ratio = "" if config.compression is None else f"compression {config.compression:g}"
    most = "" if config.max_params is None else f"at most {config.max_params:,} parameters"
    texts = [most or ratio, f"targets {', '.join(config.targets)}"]
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name not in ("compression", "max_params", "targets") and value != option.default:
            texts.append(f"{option.name} {value}")
    return "; ".join(text for text in texts if text)


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
        request=_request(plan.config),
        settings=tuple(plan.settings()),
        snapshot=Snapshot("this is the report of a plan, which has sizes but no weights"),
    )


def _of_model(
    model: nn.Module, groups: list[Group], teacher: Teacher | Sequence[Teacher] | None
) -> Report:
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
            sources.append(Source(site.name, layer, site.param, planned.grid))
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
    error: float | None = None
    wanted: dict[str, Tensor] = {}
    if teacher is not None and sources:
        states = [state_of(one) for one in teachers_of(groups, teacher)]
        of = [planned.site for group in groups for planned in group.plan.sites]
        weights = [{site.name: weight_of(site, state) for site in of} for state in states]
        errors, error = _compared(model, sources, weights)
        wanted = weights[0]
        rows = [replace(row, error=errors.get(row.name)) for row in rows]
    with next(each_network(model)):  # pictures are of the first network
        seen = snapshot(sources, wanted)
    dense_macs, size = forward_macs(model)
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
        model=name_of(model),
        sites=tuple(rows),
        skipped=tuple(_skipped(model, groups, replaced)),
        untargeted=_untargeted(model, groups),
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
        request="; ".join(dict.fromkeys(_request(plan.config) for plan in plans)),
        settings=tuple(fact for plan in plans for fact in plan.settings()),
        error=error,
        forward_macs=dense_macs,
        input_size=size,
        snapshot=seen,
    )


def _compared(
    model: nn.Module, sources: Sequence[Source], states: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, float], float]:
    """Relative errors to teachers: of each weight, and of all as `FitReport.error` has it."""
    squares = {source.name: np.zeros(2) for source in sources}  # of what is missed, and of all
    total = np.zeros(2)
    for block, state in zip(each_network(model), states, strict=True):
        with block:
            for source in sources:
                made = source.weight().double()
                wanted = state[source.name].to(made)
                found = np.array([float((t * t).sum()) for t in (made - wanted, wanted)])
                squares[source.name] += found
                total += found / (float(wanted.var(correction=0)) or 1.0)
    return {name: relative(*of) for name, of in squares.items()}, relative(*total)


def _skipped(model: nn.Module, groups: list[Group], replaced: Sequence[Skip]) -> Iterator[Skip]:
    """What stays dense by each plan and is not generated by another, with the weights of now."""
    generated = {site.site.name for group in groups for site in group.plan.sites}
    generated |= {path for group in groups for path in group.layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    for skip in (*(skip for group in groups for skip in group.plan.skips), *replaced):
        if skip.path in generated:
            continue
        path, _, param = skip.path.rpartition(".")
        if (layer := modules.get(skip.path)) is not None:
            yield replace(skip, params=_weights(layer))
        elif (layer := modules.get(path)) is not None and param in layer._parameters:
            yield replace(skip, params=_numel(layer, layer._parameters[param]))


def _weights(layer: nn.Module) -> int:
    """Weights of a dense layer that could be generated, of one network."""
    networks = layer.conditions.networks if isinstance(layer, Private) else 1
    return weights_of(layer) // networks


def _numel(layer: nn.Module, tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    return tensor[0].numel() if isinstance(layer, Private) else tensor.numel()


def _untargeted(model: nn.Module, groups: list[Group]) -> tuple[Untargeted, ...]:
    """Layers of known kinds that are there now and are no targets, in the hyperized parts."""
    targets = {kind for group in groups for kind in group.plan.config.targets}
    roots = [group.plan.root for group in groups]
    found: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        kind = kind_of(module)
        inside = any(not root or path == root or path.startswith(f"{root}.") for root in roots)
        if kind is not None and kind not in targets and inside:
            found.setdefault(kind, []).append(_weights(module))
    return tuple(Untargeted(kind, len(counts), sum(counts)) for kind, counts in found.items())


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
