"""What a run leaves behind: JSON with everything, a Markdown table, a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.timing import Row
from hyperize.writing import replacing

JSON, TABLE, PICTURE = "benchmarks.json", "benchmarks.md", "benchmarks.png"
"""Names of the files."""
DIGITS = 3
"""Of ratios."""


def read(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Results by subject of an earlier run with the same settings; empty if there was none."""
    try:
        data = json.loads((folder / JSON).read_text())
    except FileNotFoundError:
        return {}
    if data["settings"] == settings:
        return data["subjects"]
    print(f"{folder / JSON} has other settings, versions or code: all is measured again")
    return {}


def write(folder: Path, settings: Mapping[str, Any], subjects: Mapping[str, Any]) -> None:
    """Writes the JSON, the table and, if matplotlib is there, the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"settings": settings, "subjects": subjects}
    with replacing(folder / JSON) as part:
        part.write_text(json.dumps(data, indent=1))
    with replacing(folder / TABLE) as part:
        part.write_text(markdown(settings, subjects))
    tables = rows_by_subject(subjects)
    if any(row.subject for rows in tables.values() for row in rows):
        draw(folder / PICTURE, tables)


def result(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """JSON of a subject's rows: with all samples, and what follows from them."""
    return [
        asdict(row)
        | ({"ratio": row.quartiles[1], "quartiles": row.quartiles} if row.subject else {})
        for row in rows
    ]


def rows_by_subject(subjects: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The inverse of `result`."""
    return {name: [_row(entry) for entry in entry["rows"]] for name, entry in subjects.items()}


def _row(entry: Mapping[str, Any]) -> Row:
    fields = {k: v for k, v in entry.items() if k not in ("ratio", "quartiles")}
    sides = {side: tuple(fields[side]) for side in ("subject", "yardstick")}
    return Row(**fields | sides)


def markdown(settings: Mapping[str, Any], subjects: Mapping[str, Any]) -> str:
    """The table, with what it was measured on above."""
    versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in settings["versions"].items())
    days = sorted({entry["date"][:10] for entry in subjects.values()})
    card = "".join(f"{k} {v}, " if k else f"{v}, " for k, v in settings.get("device", {}).items())
    lines = [
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, {card}{settings['cpu']}, "
        f"{settings['threads']} threads of {settings['cores']} cores, seed {settings['seed']}; "
        f"{versions}.",
        "",
        "| | first | second | ratio (quartiles) | target, at most | |",
        "|---|---:|---:|---|---|---|",
    ]
    for rows in rows_by_subject(subjects).values():
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    note = row.note.replace("|", "/").replace("\n", " ")
    if not row.subject:
        return f"| {row.name} | | | | | {note} |"
    low, middle, high = (f"{q:.{DIGITS}f}" for q in row.quartiles)
    spread = f"{middle} ({low} to {high})" if len(row.subject) > 1 else middle
    target = "" if row.target is None else f"{row.target:.2f}: {row.verdict}"
    sides = (amount(statistics.median(side), row.unit) for side in (row.subject, row.yardstick))
    return f"| {row.name} | {' | '.join(sides)} | {spread} | {target} | {note} |"


def amount(value: float, unit: str) -> str:
    """A number with its unit, to three digits or so."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    for name, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {name}" if value < 1000 else f"{value:,.0f} s"
    return f"{value * 1e9:.3g} ns"


def draw(path: Path, tables: Mapping[str, Sequence[Row]]) -> None:
    """A picture: every ratio with its quartiles and target, and the curves of growth below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    groups = {
        name: [r for r in rows if r.subject and not r.series] for name, rows in tables.items()
    }
    curves = dict(_curves(tables))
    count = sum(map(len, groups.values()))
    heights = [max(count, 1) * 0.24 + 0.8, 3.2 if curves else 0.01]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    _draw_ratios(above, groups)
    if curves:
        _draw_curves(below, curves)
    else:
        below.remove()
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)


def _curves(tables: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, list[Row]]]:
    rows = [row for group in tables.values() for row in group if row.series]
    for series in dict.fromkeys(row.series for row in rows):
        yield series, [row for row in rows if row.series == series]


def _draw_ratios(axes: Any, groups: Mapping[str, Sequence[Row]]) -> None:
    at, labels = 0, []
    for number, (name, rows) in enumerate(groups.items()):
        for row in rows:
            low, middle, high = row.quartiles
            spread = [[middle - low], [high - middle]]
            axes.errorbar(
                middle, at, xerr=spread, fmt="o", ms=4, capsize=2, color=f"C{number}", label=name
            )
            if row.target is not None:
                axes.plot(row.target, at, "|", ms=12, mew=2, color="black", label="target, at most")
            labels.append(row.name)
            at += 1
    axes.axvline(1, color="grey", lw=0.8)
    axes.set_xscale("log")
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if _within(t, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(at), labels, fontsize=8)
    axes.set_ylim(at - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("first / second: median and quartiles", fontsize=9)
    handles, texts = axes.get_legend_handles_labels()
    once = dict(zip(texts, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize=8)


def _within(tick: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= tick <= limits[1]


def _draw_curves(axes: Any, curves: Mapping[str, Sequence[Row]]) -> None:
    for series, rows in curves.items():
        # The smallest size is its own yardstick
        lows, middles, highs = zip((1, 1, 1), *(row.quartiles for row in rows), strict=True)
        spread = [[m - low for low, m in zip(lows, middles, strict=True)]]
        spread += [[high - m for m, high in zip(middles, highs, strict=True)]]
        growth = [1, *(row.growth for row in rows)]
        axes.errorbar(growth, middles, yerr=spread, fmt="o-", ms=4, capsize=2, label=series)
    axes.axhline(1, color="grey", lw=0.8, label="linear growth")
    axes.set_xscale("log", base=2)
    ticks = [2**n for n in range(5)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0)
    axes.set_xlabel("size / the smallest size", fontsize=9)
    axes.set_ylabel("time per item / that of the smallest size", fontsize=9)
    axes.legend(fontsize=8)
