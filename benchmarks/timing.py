"""Two things timed in turn, and the row that comes of it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import track


@dataclass(frozen=True)
class Row:
    """One comparison: the subject's amounts and the yardstick's, measured in pairs.

    Attributes:
        name: "subject / yardstick", unique in the table.
        subject: One amount per pair.
        yardstick: The same, of what the subject is compared with.
        unit: Of the amounts: "s", "bytes" or "" for a count.
        target: What the ratio should be, at most; None for no target.
        note: What else is to be said; of a row without amounts, why it has none.
        series: Name of the curve that the row is a point of, "" for none.
        growth: How many times the size at the curve's beginning, which is the yardstick.
    """

    name: str
    subject: tuple[float, ...] = ()
    yardstick: tuple[float, ...] = ()
    unit: str = "s"
    target: float | None = None
    note: str = ""
    series: str = ""
    growth: float = 1.0

    @property
    def ratios(self) -> list[float]:
        """Of the pairs."""
        return [a / b for a, b in zip(self.subject, self.yardstick, strict=True)]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the ratios; of one pair, thrice its own."""
        ratios = self.ratios
        if len(ratios) == 1:
            return (ratios[0],) * 3
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high

    @property
    def verdict(self) -> str:
        """Whether the target is met: "yes", "no", or "within the spread"; "" without one."""
        if self.target is None or not self.subject:
            return ""
        low, middle, _ = (round(q, 2) for q in self.quartiles)  # as exactly as targets are given
        if middle <= self.target:
            return "yes"
        return "within the spread" if low <= self.target else "no"


@dataclass(frozen=True)
class Effort:
    """How often things are timed: until `seconds` have passed, within the bounds.

    Attributes:
        least: Pairs at least.
        most: Pairs at most.
        seconds: Of a row's pairs together, roughly.
    """

    least: int
    most: int
    seconds: float


QUICK = Effort(2, 2, 0)
FULL = Effort(7, 40, 6)


def alternate(
    name: str,
    subject: Callable[[], object],
    yardstick: Callable[[], object],
    effort: Effort,
    **fields: Any,
) -> Row:
    """Times two functions in turn, after one warm-up of each.

    Args:
        name: Of the row.
        subject: Does the work once.
        yardstick: Does what it is compared with.
        effort: How often.
        **fields: The row's other fields.

    Returns:
        The row, in seconds.
    """
    subject(), yardstick()
    subjects, yardsticks = in_turn(name, (subject, yardstick), effort, seconds)
    return Row(name, subjects, yardsticks, **fields)


def in_turn(
    name: str,
    functions: Sequence[Callable[[], object]],
    effort: Effort,
    clock: Callable[[Callable[[], object]], float],
) -> list[tuple[float, ...]]:
    """Times functions in turn, without a warm-up.

    Args:
        name: Of what is timed, shown meanwhile.
        functions: Each does its work once.
        effort: How often.
        clock: Calls a function, and gives the seconds that it took.

    Returns:
        The times of each function; those at the same place were measured one after the other.
    """
    rounds = []
    console, end = Console(stderr=True), time.perf_counter() + effort.seconds
    for at in track(range(effort.most), name, console=console, disable=not console.is_terminal):
        if at >= effort.least and time.perf_counter() > end:
            break
        # Each is the first of every other round, as what comes first may be at an edge
        order = range(len(functions))[:: -1 if at % 2 else 1]
        times = {number: clock(functions[number]) for number in order}
        rounds.append([times[number] for number in range(len(functions))])
    return list(zip(*rounds, strict=True))


def seconds(function: Callable[[], object]) -> float:
    """The time of one call; garbage is collected before it and not in it."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    finally:
        gc.enable()


def per_item(row: Row, subject: int, yardstick: int) -> Row:
    """The row with its times divided by how much was done in them."""
    return replace(
        row,
        subject=tuple(s / subject for s in row.subject),
        yardstick=tuple(s / yardstick for s in row.yardstick),
    )
