"""Progress bars of what takes long: on a terminal and in notebooks, and nowhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

__all__: list[str] = []


def progress_bar(shown: bool) -> Progress:
    """A progress bar on stderr; in a notebook, below the cell.

    Args:
        shown: Whether it is wanted at all. In a log file a bar would be noise, and is never shown.
    """
    console = Console(stderr=True)
    return Progress(
        console=console, disable=not (shown and (console.is_terminal or console.is_jupyter))
    )
