"""Reports as tables: as wide as the terminal, plain or in colour, and small HTML for notebooks."""

from __future__ import annotations

import io
import shutil
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

__all__: list[str] = []

WIDTH = 80
"""Columns of what is printed where there is no terminal."""
ROWS = 40
"""Rows of a table that is printed as it is; a longer one is shortened."""
_GAP = 3
"""Columns between two columns of a table."""
_NAME = 24
"""Columns that a name should have, before other columns are left out for it."""


class Printed(ABC):
    """What is printed as tables.

    `str` and `repr` are plain text, which can go into a file; `rich.print` adds colours on a
    terminal; notebooks show a small picture of the totals.
    """

    @abstractmethod
    def _parts(self, width: int) -> Iterator[RenderableType]:
        """The tables and lines, at most so many columns wide."""

    @abstractmethod
    def _repr_html_(self) -> str:
        """What a notebook shows."""

    def __str__(self) -> str:
        width = shutil.get_terminal_size((WIDTH, 24)).columns
        file = io.StringIO()
        # Of a notebook rich would take over the output, and leave this file empty
        console = Console(file=file, width=width, color_system=None, force_jupyter=False)
        for part in self._parts(width):
            console.print(part)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield from self._parts(options.max_width)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its heading.
        number: Whether it holds numbers, which stand to the right.
        style: A style of rich, for terminals with colours.
        spare: Whether it is left out where names would have too little room.
    """

    name: str
    number: bool = False
    style: str = ""
    spare: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table whose rows are one line each: names, in the first column, are shortened.

    Args:
        columns: The columns.
        rows: The texts of each row.
        width: Columns that there are, at most.
    """
    widths = [max(map(len, texts)) for texts in zip([c.name for c in columns], *rows, strict=True)]
    shown = list(range(len(columns)))

    def room() -> int:
        return width - sum(widths[at] + _GAP for at in shown[1:])

    def differs(at: int) -> bool:
        return len({row[at] for row in rows if row[at]}) > 1

    # What is the same in all rows is left out first, then from the right
    spare = [at for at in reversed(shown) if columns[at].spare]
    for at in sorted(spare, key=differs):
        if room() < min(widths[0], _NAME):
            shown.remove(at)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for at in shown:
        result.add_column(
            Text(columns[at].name),
            justify="right" if columns[at].number else "left",
            style=columns[at].style,
            no_wrap=True,
        )
    for row in rows:
        name = shorten(row[0], max(room(), 3))
        result.add_row(*(Text(name if at == 0 else row[at]) for at in shown))
    return result


def shorten(name: str, length: int) -> str:
    """A name of at most so many letters: what is too much is left out in the middle."""
    if len(name) <= length:
        return name
    end = length // 2
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


def collapse(rows: Iterable[tuple[str, Hashable]]) -> list[tuple[str, list[int]]]:
    """Rows of repeated blocks as one: those whose names differ in one number between dots.

    Args:
        rows: Name of each row, and what has to be equal besides.

    Returns:
        Names, with ranges such as 1-35 in the place of numbers, and the numbers of their rows.
    """
    found = [(tuple(name.split(".")), equal, [at]) for at, (name, equal) in enumerate(rows)]
    for place in range(max((len(parts) for parts, *_ in found), default=0)):
        groups: dict[Hashable, list[tuple[tuple[str, ...], Hashable, list[int]]]] = {}
        for row in found:
            parts, equal, _ = row
            number = place < len(parts) and parts[place].isdecimal()
            rest = (parts[:place], parts[place + 1 :]) if number else parts
            groups.setdefault((number, rest, equal), []).append(row)
        found = []
        for members in groups.values():
            parts, equal, _ = members[0]
            if len(members) > 1:
                numbers = _ranges([int(of[place]) for of, *_ in members])
                parts = (*parts[:place], numbers, *parts[place + 1 :])
            found.append((parts, equal, [at for *_, ats in members for at in ats]))
    return [(".".join(parts), ats) for parts, _, ats in found]


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as in "0,2-5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def notebook(
    title: str, rows: Iterable[tuple[str, Sequence[float], str]], remarks: Iterable[str]
) -> str:
    """A few bars as HTML that notebooks show, on a light and on a dark background.

    Args:
        title: Stands above.
        rows: Name of each, its bars as shares of the full width, the first one grey and the second
            one orange, and what is written beside them.
        remarks: Lines below.
    """
    lines = []
    for name, shares, text in rows:
        bars = "".join(
            f'<div style="height:6px;margin:2px 0;width:{100 * min(share, 1):.1f}%;'
            f'background:{colour}"></div>'
            for share, colour in zip(shares, ("#8a94a3", "#ea580c"), strict=False)
        )
        lines.append(
            f'<tr style="background:none"><td style="text-align:left">{escape(name)}</td>'
            f'<td style="width:14em">{bars}</td>'
            f'<td style="text-align:right;white-space:nowrap">{escape(text)}</td></tr>'
        )
    ends = "".join(f"<div>{escape(remark)}</div>" for remark in remarks)
    return f"<div><b>{escape(title)}</b><table>{''.join(lines)}</table>{ends}</div>"
