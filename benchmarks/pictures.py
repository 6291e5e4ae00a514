"""Draws pictures of the documentation from its tables, so that both say the same.

    python -m benchmarks.pictures

Each picture holds what it was drawn from in its metadata, and a test compares that with the tables.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compress, frontier

DOCS = Path(__file__).parents[1] / "docs"
NETWORK = "ResNet-20, CIFAR-10 (JPEG re-encoded)"
TAUGHT = 0.8103
"""Test accuracy of the public ResNet-20 of both tables."""
Rows = list[dict[str, Any]]
Notes = Mapping[str, str]


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of a page, less its two head lines."""
    text = (DOCS / page).read_text().partition(f"\n## {heading}\n")[2]
    found = re.search(r"^(\|.*\n)+", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"docs/{page} has no table under the heading {heading!r}")
    lines = found[0].replace("**", "").splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def number(cell: str) -> float:
    """The first number of a cell; one in per cent as a share."""
    found = re.match(r"-?[\d,]+(?:\.\d+)?", cell)
    if found is None:
        raise ValueError(f"no number in {cell!r}")
    value = float(found[0].replace(",", ""))
    return round(value / 100, 6) if cell[found.end() :].startswith(" %") else value


# ---------------------------------------------------------------------------------------- accuracy
def read_files() -> Rows:
    """Accuracies over the lengths of files, in the order of the table."""
    bits = {"float32": 32, "int8": 8, "int4": 4}
    rows = []
    for name, size, _, accuracy in table("small-files.md", "What it is worth"):
        network, _, dtype = name.rpartition(", ")
        network = network.replace("thinner network", "thinner").partition(",")[0]
        row = {"name": network, "bits": bits[dtype], "bytes": number(size)}
        rows.append(row | {"trained": number(accuracy)})
    return rows


def draw_files(rows: Rows, path: Path, notes: Notes) -> None:
    frontier.draw(rows, NETWORK, TAUGHT, path, notes)


def read_methods() -> Rows:
    """Accuracies of ours and of other methods at the same numbers of parameters."""
    rows: Rows = []
    for name, *cells in table("compression.md", "Ours beside the alternatives"):
        for ratio, (parameters, before, after) in ((4, cells[:3]), (10, cells[3:])):
            method = name.partition(":")[0]
            figures = {"before": number(before), "after": number(after)}
            rows.append(
                {"method": method, "ratio": ratio, "parameters": number(parameters)} | figures
            )
    return rows


def draw_methods(rows: Rows, path: Path, notes: Notes) -> None:
    compress.draw(
        [compress.Row(**row, spread=None, seeds=1) for row in rows], NETWORK, TAUGHT, path, notes
    )


# ------------------------------------------------------------------------------------------- speed
def read_speed() -> Rows:
    """The ratios with their quartiles."""
    rows = []
    for name, _, _, ratio, target, _ in table("speed.md", "Ten figures"):
        middle, low, high = re.findall(r"[\d.]+", ratio) * (1 if "(" in ratio else 3)
        row = {"name": name, "ratio": float(middle), "quartiles": [float(low), float(high)]}
        rows.append(row | {"target": number(target) if target else None})
    return rows


def draw_speed(rows: Rows, path: Path, notes: Notes) -> None:
    """Draws a dot for each ratio, with its quartiles and its target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.38 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        low, high = row["quartiles"]
        spread = [[row["ratio"] - low], [high - row["ratio"]]]
        color = "C2" if row["ratio"] < 0.995 else "C1"
        label = {"C2": "the first takes less", "C1": "the first takes more"}[color]
        axes.errorbar(row["ratio"], at, xerr=spread, fmt="o", capsize=3, color=color, label=label)
        axes.annotate(
            f"{row['ratio']:.3f}", (row["ratio"], at), (0, 8), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
        if row["target"] is not None:
            axes.plot(row["target"], at, "|", ms=12, mew=2, color="black", label="target, at most")
    axes.axvline(1, color="grey", lw=0.8)
    axes.set_xscale("log")
    axes.set_xticks(ticks := (0.3, 0.5, 0.7, 1, 1.5, 2, 3), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel("first / second: median and quartiles")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower right", ncols=3, frameon=False)
    figure.savefig(path, dpi=120, metadata=notes)


# -------------------------------------------------------------------------------------------- main
PICTURES: Mapping[str, tuple[Callable[[], Rows], Callable[[Rows, Path, Notes], None]]] = {
    "files_resnet20.png": (read_files, draw_files),
    "compression_resnet20.png": (read_methods, draw_methods),
    "speed.png": (read_speed, draw_speed),
}
"""By file name: what is drawn, and how."""


def notes_of(rows: Rows) -> Notes:
    """The metadata of a picture: what it was drawn from."""
    return {"Description": json.dumps(rows)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=DOCS / "images", help="(default: docs/images)")
    args = parser.parse_args(argv)
    for name, (read, draw) in PICTURES.items():
        rows = read()
        draw(rows, args.out / name, notes_of(rows))


if __name__ == "__main__":
    main()
