"""The report as one HTML page: it carries everything it shows, and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from hyperize.drawing import (
    Bar,
    Kernels,
    Map,
    Projection,
    Snapshot,
    map_picture,
    peak_of,
    picture,
    project,
)
from hyperize.sites import Skip

__all__ = ["Moment", "page"]

RAMP = ((43, 125, 233), (181, 71, 157), (242, 138, 28))
"""Colours of the first, a middle and the last layer; readable on light and on dark."""
RADIUS = 150
"""Half the side of the plane that embeddings are drawn in."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --panel: #f4f5f7; --text: #1c2128;
  --soft: #59636e; --line: #d5d9df; --dense: #9aa3af; --hyper: #d9520b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --panel: #1d2229; --text: #e8eaed; --soft: #a3acb8;
    --line: #353c46; --dense: #7d8794; --hyper: #fb8a3c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .4rem; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem; }
p, ul { margin: .4rem 0; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.about { display: grid; grid-template-columns: auto 1fr; gap: .1rem .9rem; margin: 0;
  font-size: .875rem; }
.about dt { color: var(--soft); }
.about dd { margin: 0; }
.cards { display: grid; gap: .8rem; margin: 1.2rem 0 1rem; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.cards > div { padding: .8rem 1rem; background: var(--panel); border-radius: .5rem; }
.cards dt { color: var(--soft); font-size: .875rem; }
.cards dd { margin: 0; }
.ratio { font-size: 1.7rem; font-weight: 600; }
.figures { font-variant-numeric: tabular-nums; font-size: .875rem; white-space: nowrap; }
svg { display: block; }
i.dense { background: var(--dense); }
i.hyper { background: var(--hyper); }
i.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
.bar i { display: block; height: 7px; margin: 1px 0; width: var(--r); min-width: 1px; }
body:has(#linear:checked) .bar i { width: var(--l); }
.tools { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: center; margin: .6rem 0;
  font-size: .875rem; }
.tools fieldset { display: flex; gap: .9rem; margin: 0; padding: 0; border: 0; }
.tools legend { float: left; margin-right: .9rem; padding: 0; color: var(--soft); }
.tools input[type=search] { width: min(100%, 18rem); padding: .3rem .6rem; font: inherit;
  color: inherit; background: var(--back); border: 1px solid var(--line); border-radius: .4rem; }
.scroll { overflow: auto; max-height: 40rem; border: 1px solid var(--line);
  border-radius: .5rem; }
:is(.scroll, button, input):focus-visible { outline: 2px solid var(--hyper);
  outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap; font-weight: 400; }
td.reason { white-space: normal; min-width: 16rem; }
tbody tr, tfoot tr { border-top: 1px solid var(--line); }
thead th { position: sticky; top: 0; z-index: 1; background: var(--panel); font-weight: 600; }
tfoot th, tfoot td { font-weight: 600; }
#weights .bar { width: 30%; min-width: 6rem; }
#weights th[scope=row] { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { padding: 0; border: 0; background: none; color: inherit; font: inherit;
  cursor: pointer; }
th button::after { content: "\\2195" / ""; display: inline-block; width: 1.1em; text-align: center;
  color: var(--soft); font-weight: 400; }
th[aria-sort="ascending"] button::after { content: "\\2191" / ""; color: inherit; }
th[aria-sort="descending"] button::after { content: "\\2193" / ""; color: inherit; }
@media (max-width: 48rem) {
  #weights, #weights :is(thead, tbody, tfoot) { display: block; }
  #weights thead { position: sticky; top: 0; z-index: 1; background: var(--panel); }
  #weights tr { display: flex; flex-wrap: wrap; gap: 0 .75rem; padding: .4rem .7rem; }
  #weights :is(th, td) { padding: 0; text-align: left; position: static; }
  #weights th[scope=row], #weights :is(tbody, tfoot) :is(.bar, td:nth-child(4)) {
    flex: 1 0 100%; }
  #weights thead .bar, #weights :is(tbody, tfoot) td:first-child, #weights td:empty,
  #weights tbody td:nth-child(3) { display: none; }
  #weights tbody td:nth-child(4) { color: var(--soft); }
  #weights td:nth-child(6)::before { content: "dense "; color: var(--soft); }
  #weights td:nth-child(7)::before { content: "hyper "; color: var(--soft); }
  #weights td:nth-child(8)::before { content: "ratio "; color: var(--soft); }
  #weights td:nth-child(9)::before { content: "error "; color: var(--soft); }
}
#weights tr[hidden] { display: none; }
figure { margin: 0; }
figcaption { margin-top: .4rem; }
output.name { display: block; min-height: 1.5em; color: var(--soft); font-size: .875rem; }
output.said { color: inherit; font-weight: 600; }
.planes, .kernels, .maps { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.planes figure { flex: 1 1 17rem; max-width: 32rem; }
.plane { width: 100%; background: var(--panel); border-radius: .5rem; }
.plane path { fill: none; stroke-width: 4; stroke-linecap: round; stroke-opacity: .75; }
.plane:has(path:hover) path:not(:hover) { stroke-opacity: .12; }
.plane path:hover { stroke-width: 7; }
.plane line { stroke: var(--line); }
.ramp { display: inline-block; width: 6rem; height: .6em; border-radius: .3em; }
.errors { width: 100%; height: 9rem; background: var(--panel); border-radius: .5rem; }
.errors rect { fill: var(--hyper); }
.errors rect:hover { fill: var(--text); }
.kernels > figure { flex: 0 1 240px; }
.kernels > figure.several { flex: 1 1 100%; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-end; }
.row > div { flex: 1 1 6rem; max-width: 240px; font-size: .8rem; color: var(--soft); }
.kernels img { display: block; width: 100%; height: auto; image-rendering: pixelated;
  border: 1px solid var(--line); background: var(--back); }
.maps { gap: .5rem; align-items: flex-end; }
.maps img { display: block; image-rendering: pixelated; }
.maps img:hover { outline: 2px solid var(--text); }
details { margin: .8rem 0; }
summary { cursor: pointer; }
@media print { .scroll { max-height: none; overflow: visible; } .tools { display: none; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (head.classList.contains("bar")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const numeric = head.classList.contains("number");
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      // Of sizes, the largest are looked for first
      const first = numeric && column > 0 ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = was === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      const compare = numeric
        ? (a, b) => value(a) - value(b)
        : (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
    });
  });
}
const filter = document.getElementById("filter");
filter.hidden = false;
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\\s+/);
  const rows = [...document.getElementById("weights").tBodies[0].rows];
  const shown = rows.filter((row) => {
    const text = [1, 2, 3].map((at) => row.cells[at].textContent).join(" ").toLowerCase();
    return !(row.hidden = !words.every((word) => text.includes(word)));
  });
  const sum = (at) => shown.reduce((sum, row) => sum + Number(row.cells[at].dataset.value), 0)
    .toLocaleString("en");
  document.getElementById("shown").textContent = filter.value.trim()
    ? `${shown.length} of ${rows.length} weights, ${sum(5)} \\u2192 ${sum(6)} parameters` : "";
});
for (const output of document.querySelectorAll("output.name")) {
  output.textContent = "Point at a picture to see the name here.";
}
const say = (thing, text) => {
  const output = thing.closest("section").querySelector("output.name");
  output.textContent = text;
  output.classList.add("said");
};
for (const drawing of document.querySelectorAll("svg.plane, svg.errors, .maps")) {
  drawing.addEventListener("pointerover", (event) => {
    const text = event.target.querySelector?.("title")?.textContent ?? event.target.alt;
    if (event.target !== drawing && text) say(drawing, text);
  });
}
for (const image of document.querySelectorAll(".kernels img")) {
  const { name, rows, columns, inputs } = image.dataset;
  image.addEventListener("pointermove", (event) => {
    const at = (offset, size, count) => Math.max(0, Math.min(count - 1,
      Math.floor(offset / size * count)));
    const row = at(event.offsetY, image.clientHeight, rows);
    const column = at(event.offsetX, image.clientWidth, columns);
    const kernel = row * columns + column;
    say(image, inputs > 0
      ? `${name}[${Math.floor(kernel / inputs)}, ${kernel % inputs}]`
      : `${name}[${row}, ${column}]`);
  });
}
"""


@dataclass(frozen=True)
class Moment:
    """One of several reports on a page.

    Attributes:
        name: What the page calls it.
        date: When it was made.
        error: Relative error of all weights to a teacher's; None without a teacher.
        snapshot: What there was to see.
    """

    name: str
    date: str
    error: float | None
    snapshot: Snapshot


def page(
    title: str,
    about: Iterable[tuple[str, str]],
    totals: Sequence[tuple[str, int, int]],
    bars: Sequence[Bar],
    hypernet_params: int,
    remarks: Sequence[str],
    skipped: Sequence[Skip],
    moments: Sequence[Moment],
) -> str:
    """The page as text.

    Args:
        title: What it is of.
        about: Names and values that say more of that.
        totals: Name, dense and hyper figure of each total; the first is that of `bars`.
        bars: The rewritten layers.
        hypernet_params: Parameters of the shared hypernetwork.
        remarks: Lines below the totals.
        skipped: What stays dense, with reasons.
        moments: What there was to see, in the order of time; the figures are those of the last.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # The page's own promise, which the browser keeps: no request, and no script but this one
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    name = escape(title)
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>\n" for key, text in about)
    sections = [
        _summary(totals, remarks),
        _table(totals[0], bars, hypernet_params),
        _skipped(skipped),
        _errors(bars),
        *_pictures(moments),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{name}: compression report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{name}</h1>\n<dl class="about" id="about">\n{facts}</dl>\n'
        f"{''.join(sections)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _summary(totals: Iterable[tuple[str, int, int]], remarks: Iterable[str]) -> str:
    cards = "".join(
        f"<div><dt>{escape(name)}</dt>"
        f'<dd class="ratio">{dense / hyper:.2f}&times;</dd>'
        f'<dd class="bar">{_bars(dense, hyper, max(dense, hyper), root=False)}</dd>'
        f'<dd class="figures"><data class="dense" value="{dense}">{dense:,}</data> → '
        f'<data class="hyper" value="{hyper}">{hyper:,}</data></dd></div>\n'
        for name, dense, hyper in totals
    )
    lines = "".join(f"<li>{escape(remark)}</li>\n" for remark in remarks)
    return f'<dl class="cards" id="totals">\n{cards}</dl>\n<ul class="soft">\n{lines}</ul>\n'


def _bars(dense: int, hyper: int, full: int, root: bool = True) -> str:
    """Two bars as shares of the full width, on a square-root scale and on a linear one."""
    return "".join(
        f'<i class="{side}" style="--r:{100 * (math.sqrt(share) if root else share):.2f}%;'
        f'--l:{100 * share:.2f}%"></i>'
        for side, size in (("dense", dense), ("hyper", hyper))
        if (share := size / full)
    )


def _breakable(path: str) -> str:
    """A path that breaks at its dots rather than anywhere."""
    return escape(path).replace(".", ".<wbr>")


def _table(total: tuple[str, int, int], bars: Sequence[Bar], hypernet_params: int) -> str:
    full = max(hypernet_params, *(max(bar.dense, bar.hyper) for bar in bars))
    known = any(bar.error is not None for bar in bars)
    body = "".join(
        f'<tr><td class="number">{at}</td><th scope="row">{_breakable(bar.name)}</th>'
        f"<td>{escape(bar.kind)}</td><td>{bar.shape}</td>"
        f'<td class="bar">{_bars(bar.dense, bar.hyper, full)}</td>'
        f"{_numbers(bar.dense, bar.hyper)}{_error(bar.error) if known else ''}</tr>\n"
        for at, bar in enumerate(bars, 1)
    )
    spare = "<td></td>" if known else ""
    foot = (
        '<tr><td></td><th scope="row">hypernet (shared)</th><td></td><td></td>'
        f'<td class="bar">{_bars(0, hypernet_params, full)}</td>'
        f"<td></td>{_number(hypernet_params)}<td></td>{spare}</tr>\n"
        if hypernet_params
        else ""
    )
    name, dense, hyper = total
    foot += (
        f'<tr><td></td><th scope="row">{escape(name)}</th><td></td><td></td><td></td>'
        f"{_numbers(dense, hyper)}{spare}</tr>\n"
    )
    error = '<th scope="col" class="number">error</th>' if known else ""
    return (
        "<h2>All weights</h2>\n"
        '<p class="soft">Their parameters <i class="key dense"></i> before and '
        '<i class="key hyper"></i> after, without those of the hypernetwork that they share'
        + (
            "; the error is the norm of the difference to the teacher's weight over the norm of "
            "that weight"
            if known
            else ""
        )
        + '</p>\n<div class="tools">\n'
        '<input type="search" id="filter" hidden placeholder="Filter: layer3 3x3" '
        'aria-label="Filter of the weights">\n'
        '<fieldset><legend>Bars</legend><label><input type="radio" name="scale" '
        'id="root" checked> square-root scale</label><label><input type="radio" name="scale" '
        'id="linear"> linear scale</label></fieldset>\n<output id="shown"></output>\n</div>\n'
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of each weight">\n'
        '<table class="sortable" id="weights">\n'
        '<thead><tr><th scope="col" class="number" aria-sort="ascending">#</th>'
        '<th scope="col">weight</th><th scope="col">kind</th><th scope="col">shape</th>'
        '<th scope="col" class="bar"></th>'
        '<th scope="col" class="number">dense</th><th scope="col" class="number">hyper</th>'
        f'<th scope="col" class="number">ratio</th>{error}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n<tfoot>\n{foot}</tfoot>\n</table>\n</div>\n"
    )


def _numbers(dense: int, hyper: int) -> str:
    ratio = dense / hyper
    return (
        _number(dense)
        + _number(hyper)
        + f'<td class="number" data-value="{ratio!r}">{ratio:.1f}</td>'
    )


def _number(value: int) -> str:
    return f'<td class="number" data-value="{value}">{value:,}</td>'


def _error(error: float | None) -> str:
    if error is None:
        return '<td class="number" data-value="-1"></td>'
    return f'<td class="number" data-value="{error!r}">{error:.3f}</td>'


def _skipped(skipped: Sequence[Skip]) -> str:
    if not skipped:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(skip.path)}</th>{_number(skip.params)}'
        f'<td class="reason">{escape(skip.reason)}</td></tr>\n'
        for skip in skipped
    )
    return (
        f"<details>\n<summary>Targets that stay dense: {len(skipped)}</summary>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of what stays dense">\n'
        '<table id="skipped">\n<thead><tr><th scope="col">weight</th>'
        '<th scope="col" class="number">parameters</th><th scope="col">reason</th></tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>\n</div>\n</details>\n"
    )


def _errors(bars: Iterable[Bar]) -> str:
    known = [(bar.name, bar.error) for bar in bars if bar.error is not None]
    if not known:
        return ""
    top = max(1.0, *(error for _, error in known))
    rects = "".join(
        f'<rect x="{at}" y="{100 - 100 * error / top:.2f}" width=".9" '
        f'height="{100 * error / top:.2f}"><title>{escape(name)}: {error:.3f}</title></rect>\n'
        for at, (name, error) in enumerate(known)
    )
    return (
        '<section id="errors">\n<h2>Error of each weight</h2>\n'
        f'<p class="soft">From the first layer to the last; the full height is {top:.2g}. At 0 the '
        "teacher's weight is generated exactly, at 1 the error is as large as the weight.</p>\n"
        f'<svg class="errors" viewBox="0 0 {len(known)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="Error of each weight">\n{rects}</svg>\n'
        '<output class="name"></output>\n</section>\n'
    )


def _pictures(moments: Sequence[Moment]) -> list[str]:
    told = [
        f'<p class="soft no-pictures">No pictures{_of(moment, moments)}: '
        f"{escape(moment.snapshot.reason)}.</p>\n"
        for moment in moments
        if moment.snapshot.reason
    ]
    seen = [moment for moment in moments if not moment.snapshot.reason]
    if not seen:
        return told
    last = seen[-1].snapshot
    planes = project([moment.snapshot for moment in seen])
    return [
        *told,
        *([_networks(*last.networks)] if last.networks else []),
        *([_times(moments)] if len(moments) > 1 else []),
        _kernels(seen),
        _maps(last.maps, last.unit, len(last.samples)),
        _embeddings(seen, planes),
    ]


def _of(moment: Moment, moments: Sequence[Moment]) -> str:
    return f" of {escape(moment.name)}" if len(moments) > 1 else ""


def _times(moments: Sequence[Moment]) -> str:
    seen = [moment for moment in moments if not moment.snapshot.reason]
    start = dict(seen[0].snapshot.samples)
    lines = []
    for moment in moments:
        change = difference = 0.0
        for name, sample in moment.snapshot.samples:
            change += float(np.square(sample - start[name]).sum())
            difference += float(np.square(start[name]).sum())
        moved = f"{math.sqrt(change / (difference or 1.0)):.3f}" if moment in seen else ""
        error = "" if moment.error is None else f"{moment.error:.3f}"
        lines.append(
            f'<tr><th scope="row">{escape(moment.name)}</th><td>{escape(moment.date)}</td>'
            f'<td class="number">{moved}</td><td class="number">{error}</td></tr>\n'
        )
    return (
        "<h2>Over time</h2>\n"
        '<p class="soft">How far the embeddings have moved, as a share of their norm in the first '
        "report with pictures, and the relative error of all weights to the teacher's, where there "
        "is one. The figures above are those of the last report.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of the reports">\n'
        '<table id="times">\n<thead><tr><th scope="col">report</th><th scope="col">made</th>'
        '<th scope="col" class="number">moved</th><th scope="col" class="number">error</th></tr>'
        f"</thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>\n"
    )


def _networks(numbers: Sequence[int], cosines: np.ndarray) -> str:
    head = "".join(f'<th scope="col" class="number">{k}</th>' for k in numbers)
    body = "".join(
        f'<tr><th scope="row" class="number">{k}</th>'
        + "".join(
            f'<td class="number" style="background: rgb(37 99 235 / {max(value, 0) / 2:.2f})">'
            f"{value:.2f}</td>"
            for value in row
        )
        + "</tr>\n"
        for k, row in zip(numbers, cosines.tolist(), strict=True)
    )
    return (
        "<h2>Networks</h2>\n"
        '<p class="soft">How alike they are: the cosine of the angle between the weights of two '
        "networks, 1 for equal ones, and near 0 for freshly drawn ones. What follows is of network "
        "0.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of networks">\n'
        f'<table id="networks">\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def _kernels(seen: Sequence[Moment]) -> str:
    figures = "".join(
        _figure([moment.snapshot.kernels[at] for moment in seen], [moment.name for moment in seen])
        for at in range(len(seen[-1].snapshot.kernels))
    )
    compared = any(kernels.wanted is not None for kernels in seen[-1].snapshot.kernels)
    more = " Beside them are the teacher's, and the difference of both, in the same colours."
    return (
        '<section id="kernels">\n<h2>Generated kernels</h2>\n'
        '<p class="soft">As the hypernetwork made them: blue below zero, orange above, zero '
        "is the background. A weight's first axis goes down, its second across, and beside it more "
        f"of the first where the second is short.{more * compared}</p>\n"
        f'<output class="name"></output>\n<div class="kernels">\n{figures}</div>\n</section>\n'
    )


def _figure(kernels: Sequence[Kernels], names: Sequence[str]) -> str:
    """One weight at several moments, beside a teacher's."""
    last = kernels[-1]
    images = [
        (name if len(names) > 1 else "generated", of.values)
        for of, name in zip(kernels, names, strict=True)
    ]
    if last.wanted is not None:
        images = [
            ("teacher", last.wanted),
            *images,
            ("difference", last.values - last.wanted),
        ]
    peak = peak_of(images[0][1])
    lost = int(np.count_nonzero(~np.isfinite(last.values)))
    caption = f"{last.caption}; colours saturate at ±{peak:.2g}"
    if lost:
        caption += f"; {lost:,} values are not finite, and drawn as zero"
    shown = "".join(_image(last, label, values, peak) for label, values in images)
    several = ' class="several"' * (len(images) > 1)
    return (
        f'<figure{several}><div class="row">{shown}</div>'
        f"<figcaption><strong>{_breakable(last.name)}</strong><br>{escape(caption)}</figcaption></figure>\n"
    )


def _image(kernels: Kernels, label: str, values: np.ndarray, peak: float) -> str:
    png, (width, height) = picture(values, peak)
    cells = values.shape[:2] if kernels.inputs else values.shape[2:]
    name = escape(kernels.name)
    return (
        f'<div>{escape(label)}<img src="{_data(png)}" width="{width}" height="{height}" '
        f'data-name="{name}" data-rows="{cells[0]}" data-columns="{cells[1]}" '
        f'data-inputs="{kernels.inputs}" alt="{escape(label)}, values of {name}"></div>'
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _maps(maps: Sequence[Map], unit: str, weights: int) -> str:
    images = "".join(
        f'<img src="{_data(map_picture(of.colours))}" width="{3 * of.colours.shape[1]}" '
        f'height="{3 * of.colours.shape[0]}" alt="{escape(of.name)}, {escape(of.caption)}">\n'
        for of in maps
    )
    which = "All weights" if len(maps) == weights else f"An even choice of {len(maps)} weights"
    made = (
        "the product of the embeddings of its two channels"
        if unit == "channel"
        else f"the embedding of its {unit}"
    )
    return (
        '<section id="maps">\n<h2>Map of the weights</h2>\n'
        f'<p class="soft">{which}, from the first to the last: the first axis goes down, the '
        f"second across, and each kernel has the colour of {made}. Red, green and blue are the "
        "three directions in which embeddings differ most: equal embeddings have equal colours, "
        "within a weight and from weight to weight.</p>\n"
        f'<output class="name"></output>\n<div class="maps">\n{images}</div>\n</section>\n'
    )


def _embeddings(seen: Sequence[Moment], planes: Sequence[Projection]) -> str:
    head = '<section id="embeddings">\n<h2>Embeddings</h2>\n'
    if not planes:
        return f'{head}<p class="soft">Fewer than two of them are finite.</p>\n</section>\n'
    figures = "".join(
        f"<figure>{_plane(plane)}"
        + (f"<figcaption>{escape(moment.name)}</figcaption>" if len(seen) > 1 else "")
        + "</figure>\n"
        for moment, plane in zip(seen, planes, strict=True)
    )
    plane = planes[-1]
    first, second = plane.explained
    stops = ", ".join(_colour(at / 4) for at in range(5))
    sample = (
        f"an even sample of {plane.drawn:,} of {plane.total:,}"
        if plane.drawn < plane.total
        else f"all {plane.total:,}"
    )
    return (
        f'{head}<p class="soft">Each dot is the embedding of a {plane.unit} of a weight, {sample}, '
        "in the plane in which they differ most (their two principal components, with "
        f"{first:.0%} of the variance across and {second:.0%} up; far ones are at the edge). "
        'Colours go by depth, first <span class="ramp" style="background: '
        f'linear-gradient(90deg, {stops})"></span> last.'
        '</p>\n<output class="name"></output>\n'
        f'<div class="planes">\n{figures}</div>\n</section>\n'
    )


def _plane(plane: Projection) -> str:
    last = max(len(plane.layers) - 1, 1)
    paths = "".join(
        f'<path stroke="{_colour(at / last)}" d="{_dots(points)}">'
        f"<title>{escape(name)}</title></path>\n"
        for at, (name, points) in enumerate(plane.layers)
    )
    side = RADIUS + 10
    return (
        f'<svg class="plane" viewBox="{-side} {-side} {2 * side} {2 * side}" role="img" '
        f'aria-label="Embeddings in the plane of their two principal components">\n'
        f'<line x1="{-side}" x2="{side}"/><line y1="{-side}" y2="{side}"/>\n{paths}</svg>'
    )


def _dots(points: Iterable[tuple[float, float]]) -> str:
    """Lines of no length, which their round ends make dots."""
    return "".join(f"M{RADIUS * x:.1f} {-RADIUS * y:.1f}h0" for x, y in points)


def _colour(depth: float) -> str:
    """A colour of the ramp, 0 for the first layer and 1 for the last."""
    at = min(int(depth * 2), 1)
    part = depth * 2 - at
    mixed = (round(a + (b - a) * part) for a, b in zip(RAMP[at], RAMP[at + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
