"""The report as one HTML page: it carries everything it shows, and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from hyperize.drawing import (
    Bar,
    Picture,
    Projection,
    Source,
    picture,
    project,
    similarities,
    spread,
)
from hyperize.sites import Skip

__all__ = ["page"]

PICTURES = 3
"""Weights whose kernels are shown."""
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
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem; }
p, ul { margin: .4rem 0; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.cards { display: grid; gap: .8rem; margin: 1rem 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.cards > div { padding: .8rem 1rem; background: var(--panel); border-radius: .5rem; }
.cards dt { color: var(--soft); font-size: .875rem; }
.cards dd { margin: 0; }
.ratio { font-size: 1.7rem; font-weight: 600; }
.figures { font-variant-numeric: tabular-nums; font-size: .875rem; white-space: nowrap; }
svg { display: block; }
.bar { width: 100%; height: 17px; }
.bar .dense, i.dense { fill: var(--dense); background: var(--dense); }
.bar .hyper, i.hyper { fill: var(--hyper); background: var(--hyper); }
i.dense, i.hyper { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
.scroll { overflow: auto; max-height: 38rem; border: 1px solid var(--line);
  border-radius: .5rem; }
.scroll:focus-visible, button:focus-visible { outline: 2px solid var(--hyper);
  outline-offset: 2px; }
.bars { margin: 0; padding: .6rem .8rem; list-style: none; font-size: .875rem; }
.bars li { display: grid; gap: 0 .8rem; align-items: center; padding: .2rem 0;
  grid-template-columns: 1fr auto; }
.bars svg { grid-column: 1 / -1; }
.bars .figures { text-align: right; }
@media (min-width: 48rem) {
  .bars li { grid-template-columns: 15rem 1fr 13.5rem; }
  .bars svg { grid-column: 2; grid-row: 1; }
  .bars .figures { grid-column: 3; }
}
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .35rem .8rem; text-align: left; white-space: nowrap; font-weight: 400; }
td.reason { white-space: normal; min-width: 16rem; }
tbody tr, tfoot tr { border-top: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--panel); font-weight: 600; }
tfoot th, tfoot td { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { padding: 0; border: 0; background: none; color: inherit; font: inherit;
  cursor: pointer; }
th button::after { content: "\\2195" / ""; display: inline-block; width: 1.1em; text-align: center;
  color: var(--soft); font-weight: 400; }
th[aria-sort="ascending"] button::after { content: "\\2191" / ""; color: inherit; }
th[aria-sort="descending"] button::after { content: "\\2193" / ""; color: inherit; }
figure { margin: 0; }
figcaption { margin-top: .4rem; }
.plane { width: 100%; max-width: 32rem; background: var(--panel); border-radius: .5rem; }
.plane path { fill: none; stroke-width: 4; stroke-linecap: round; stroke-opacity: .75; }
.plane line { stroke: var(--line); }
.ramp { display: inline-block; width: 6rem; height: .6em; border-radius: .3em; }
.kernels { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.kernels figure { flex: 0 1 16rem; }
.kernels img { display: block; max-width: 100%; height: auto; image-rendering: pixelated;
  border: 1px solid var(--line); background: var(--back); }
details { margin: .8rem 0; }
summary { cursor: pointer; }
@media print { .scroll { max-height: none; overflow: visible; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
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
"""


def page(
    title: str,
    totals: Sequence[tuple[str, int, int]],
    bars: Sequence[Bar],
    hypernet_params: int,
    remarks: Sequence[str],
    skipped: Sequence[Skip],
    sources: Sequence[Source],
) -> str:
    """The page as text.

    Args:
        title: Name of the model.
        totals: Name, dense and hyper figure of each total; the first is that of `bars`.
        bars: The rewritten layers.
        hypernet_params: Parameters of the shared hypernetwork.
        remarks: Lines below the totals.
        skipped: What stays dense, with reasons.
        sources: The generated weights themselves; none of a plan.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # The page's own promise, which the browser keeps: no request, and no script but this one
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    name = escape(title)
    sections = [
        _summary(totals, remarks),
        _bars(bars, hypernet_params),
        _table(totals[0], bars, hypernet_params),
        _skipped(skipped),
        *_pictures(bars, sources),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{name}: compression report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{name}</h1>\n<p class="soft">Parameters and bytes, before and after hyperize</p>\n'
        f"{''.join(sections)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _summary(totals: Iterable[tuple[str, int, int]], remarks: Iterable[str]) -> str:
    cards = "".join(
        f"<div><dt>{escape(name)}</dt>"
        f'<dd class="ratio">{dense / hyper:.2f}&times;</dd>'
        f'<dd>{_bar(dense, hyper, max(dense, hyper))}<span class="figures">'
        f'<data class="dense" value="{dense}">{dense:,}</data> → '
        f'<data class="hyper" value="{hyper}">{hyper:,}</data></span></dd></div>\n'
        for name, dense, hyper in totals
    )
    lines = "".join(f"<li>{escape(remark)}</li>\n" for remark in remarks)
    return f'<dl class="cards" id="totals">\n{cards}</dl>\n<ul class="soft">\n{lines}</ul>\n'


def _bar(dense: float, hyper: float, full: float) -> str:
    """Two bars as shares of the full width; it stretches with the page, and scales no text."""
    rects = "".join(
        f'<rect class="{side}" y="{y}" height="7" width="{max(100 * size / full, 0.3):.2f}%"/>'
        for side, y, size in (("dense", 1, dense), ("hyper", 9, hyper))
        if size
    )
    return f'<svg class="bar" aria-hidden="true">{rects}</svg>'


def _bars(bars: Sequence[Bar], hypernet_params: int) -> str:
    lines = [(bar.name, bar.dense, bar.hyper) for bar in bars]
    if hypernet_params:
        lines.append(("hypernet (shared)", 0, hypernet_params))
    full = math.sqrt(max(max(dense, hyper) for _, dense, hyper in lines))
    items = "".join(
        f'<li><span>{_breakable(name)}</span><span class="figures">{dense:,} → {hyper:,}</span>'
        f"{_bar(math.sqrt(dense), math.sqrt(hyper), full)}</li>\n"
        for name, dense, hyper in lines
    )
    return (
        "<h2>Parameters of each weight</h2>\n"
        '<p class="soft"><i class="dense"></i> before, <i class="hyper"></i> after; lengths on a '
        "square-root scale, as sizes differ by orders of magnitude</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Bars of each weight">\n'
        f'<ul class="bars">\n{items}</ul>\n</div>\n'
    )


def _breakable(path: str) -> str:
    """A path that breaks at its dots rather than anywhere."""
    return escape(path).replace(".", ".<wbr>")


def _table(total: tuple[str, int, int], bars: Iterable[Bar], hypernet_params: int) -> str:
    body = "".join(
        f'<tr><td class="number">{at}</td><th scope="row">{escape(bar.name)}</th>'
        f"<td>{escape(bar.kind)}</td><td>{bar.shape}</td>"
        f"{_numbers(bar.dense, bar.hyper)}</tr>\n"
        for at, bar in enumerate(bars, 1)
    )
    foot = (
        '<tr><td></td><th scope="row">hypernet (shared)</th><td></td><td></td>'
        f"<td></td>{_number(hypernet_params)}<td></td></tr>\n"
        if hypernet_params
        else ""
    )
    name, dense, hyper = total
    foot += (
        f'<tr><td></td><th scope="row">{escape(name)}</th><td></td><td></td>'
        f"{_numbers(dense, hyper)}</tr>\n"
    )
    return (
        "<h2>All weights</h2>\n"
        '<p class="soft">Their parameters, and those of the hypernetwork that they share</p>\n'
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of each weight">\n'
        '<table class="sortable" id="weights">\n'
        '<thead><tr><th scope="col" class="number" aria-sort="ascending">#</th>'
        '<th scope="col">weight</th><th scope="col">kind</th><th scope="col">shape</th>'
        '<th scope="col" class="number">dense</th><th scope="col" class="number">hyper</th>'
        '<th scope="col" class="number">ratio</th></tr></thead>\n'
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


def _pictures(bars: Iterable[Bar], sources: Sequence[Source]) -> list[str]:
    reason = _without_values(bars, sources)
    if reason:
        return [f'<p class="soft" id="no-pictures">No embeddings and kernels here: {reason}.</p>\n']
    found = similarities(sources)
    return [
        *([_networks(*found)] if found else []),
        _embeddings(project(sources)),
        _kernels(map(picture, _chosen(sources))),
    ]


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


def _without_values(bars: Iterable[Bar], sources: Sequence[Source]) -> str:
    """Why there is nothing to draw; empty if there is."""
    if not any(bar.shape for bar in bars):
        return "nothing in this model is generated from embeddings alone"
    if not sources:
        return "this is the report of a plan, or a copy of a report, which has sizes but no weights"
    embeddings = [source.embedding for source in sources]
    if any(embedding is None for embedding in embeddings):
        return "the model has been converted to a dense one since this report"
    if any(embedding.is_meta for embedding in embeddings if embedding is not None):
        return "the model is on the meta device, and has shapes but no values"
    return ""


def _chosen(sources: Sequence[Source]) -> list[Source]:
    """Weights from the first to the last: kernels to look at, and matrices where they are few."""
    kernels = [source for source in sources if math.prod(source.shape[2:]) > 1]
    matrices = [source for source in sources if math.prod(source.shape[2:]) == 1]
    chosen = spread(kernels, PICTURES)
    return chosen + spread(matrices, PICTURES - len(chosen))


def _embeddings(projection: Projection | None) -> str:
    head = '<h2>Embeddings</h2>\n<figure id="embeddings">\n'
    if projection is None:
        return f"{head}<figcaption>Fewer than two of them are finite.</figcaption>\n</figure>\n"
    last = max(len(projection.layers) - 1, 1)
    paths = "".join(
        f'<path stroke="{_colour(at / last)}" d="{_dots(points)}">'
        f"<title>{escape(name)}</title></path>\n"
        for at, (name, points) in enumerate(projection.layers)
    )
    first, second = projection.explained
    side = RADIUS + 10
    stops = ", ".join(_colour(at / 4) for at in range(5))
    sample = (
        f"an even sample of {projection.drawn:,} of {projection.total:,}"
        if projection.drawn < projection.total
        else f"all {projection.total:,}"
    )
    return (
        f'{head}<svg class="plane" viewBox="{-side} {-side} {2 * side} {2 * side}" role="img" '
        f'aria-label="Embeddings in the plane of their two principal components">\n'
        f'<line x1="{-side}" x2="{side}"/><line y1="{-side}" y2="{side}"/>\n{paths}</svg>\n'
        f"<figcaption>Each dot is the embedding of a {projection.unit} of a weight, {sample}, in "
        f"the plane in which they differ most (their two principal components, with {first:.0%} "
        f"of the variance across and {second:.0%} up). Freshly drawn ones are a round cloud. "
        f'Colours go by depth, first <span class="ramp" style="background: linear-gradient(90deg, '
        f'{stops})"></span> last.</figcaption>\n</figure>\n'
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


def _kernels(pictures: Iterable[Picture]) -> str:
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(image.png).decode()}" '
        f'width="{image.size[0]}" height="{image.size[1]}" '
        f'alt="Generated values of {escape(image.name)}">'
        f"<figcaption><strong>{_breakable(image.name)}</strong><br>{escape(image.caption)}"
        "</figcaption></figure>\n"
        for image in pictures
    )
    return (
        "<h2>Generated kernels</h2>\n"
        '<p class="soft">As the hypernetwork makes them now: blue below zero, orange above, zero '
        "is the background. A weight's first axis goes down, its second across, and beside it more "
        "of the first where the second is short.</p>\n"
        f'<div class="kernels" id="kernels">\n{figures}</div>\n'
    )
