"""`hyperize()` against making the model, and planning: over the zoo, and as models grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from benchmarks.timing import FULL, QUICK, Effort, Row, alternate, per_item, seconds
from hyperize import ConfigError, hyperize, make_plan, to_dense

SAMPLE = 150
"""Models of the zoo that are planned; making all of them takes several minutes, on meta too."""
SECONDS_PER_MODEL = 0.1
"""Ten models a second."""


def rewriting(quick: bool) -> Iterator[Row]:
    effort = QUICK if quick else FULL
    models = ("resnet10t",) if quick else ("resnet50", "resnet18", "convnext_tiny")
    for name in models:
        target = 0.5 if name == "resnet50" else None
        yield _rewriting(name, effort, target)
    hyper = hyperize(timm.create_model(models[0]), seed=0)
    yield alternate(
        f"to_dense({models[0]}) / timm.create_model",
        lambda: to_dense(hyper),
        lambda: timm.create_model(models[0]),
        effort,
    )


def _rewriting(name: str, effort: Effort, target: float | None) -> Row:
    dense = timm.create_model(name)
    return alternate(
        f"hyperize({name}) / timm.create_model",
        lambda: hyperize(dense, seed=0),
        lambda: timm.create_model(name),
        effort,
        target=target,
    )


def planning(quick: bool) -> Iterator[Row]:
    effort = QUICK if quick else FULL
    names = timm.list_models()
    yield from _zoo(names[::25] if quick else _spread(names, SAMPLE))
    if not quick:
        yield _plan("vit_7b_patch16_dinov3", ("conv2d", "linear"), effort)
        yield _plan("efficientnet_l2", ("conv2d",), effort)
    yield from _sites((50, 200) if quick else (50, 200, 800), effort)


def _spread(names: Sequence[str], count: int) -> list[str]:
    """As many of the names as wanted, at even distances."""
    return [names[at * len(names) // count] for at in range(min(count, len(names)))]


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def _zoo(names: Sequence[str]) -> Iterator[Row]:
    """Each model is made on meta and planned, once; a pair is a model."""
    pairs = []
    console = Console(stderr=True)
    make_plan(_on_meta("resnet18"))  # the first plan of a process also loads torch.fx
    for name in track(names, "the zoo", console=console, disable=not console.is_terminal):
        pairs.append(_making_and_planning(name))
    making, planned = zip(*filter(None, pairs), strict=True)
    without = pairs.count(None)
    note = f"{len(planned)} models, {len(planned) / sum(planned):.1f} a second"
    note += f"; {without} more have no target" if without else ""
    yield Row("planning a model of the zoo / making it, on meta", planned, making)
    yield Row(
        "planning a model of the zoo, on average / 0.1 s",
        (sum(planned) / len(planned),),
        (SECONDS_PER_MODEL,),
        target=1.0,
        note=note,
    )


def _making_and_planning(name: str) -> tuple[float, float] | None:
    """Seconds of each; None if there is nothing to plan, as no layer is a convolution or LSTM."""
    made: list[nn.Module] = []
    making = seconds(lambda: made.append(_on_meta(name)))
    try:
        return making, seconds(lambda: make_plan(made[0]))
    except ConfigError:
        return None


def _plan(name: str, targets: tuple[str, ...], effort: Effort) -> Row:
    meta = _on_meta(name)
    size = sum(p.numel() for p in meta.parameters())
    return alternate(
        f"planning {name}, {' and '.join(targets)} / making it, on meta",
        lambda: make_plan(meta, targets=targets),
        lambda: _on_meta(name),
        effort,
        note=f"{size:,} parameters",
    )


def _sites(sizes: tuple[int, ...], effort: Effort) -> Iterator[Row]:
    """Time per site in models of more sites, against that of the smallest."""

    def chain(sites: int) -> nn.Module:
        with torch.device("meta"):
            # Of several widths, as the shapes that a plan has to consider are not all the same
            widths = [32 * (1 + at % 8) for at in range(sites + 1)]
            return nn.Sequential(*(nn.Conv2d(*pair, 3) for pair in pairwise(widths)))

    base = chain(sizes[0])
    for size in sizes[1:]:
        model = chain(size)
        row = alternate(
            f"planning, per site, {size} sites / {sizes[0]} sites",
            partial(make_plan, model),
            partial(make_plan, base),
            effort,
            series="planning, sites",
            growth=size / sizes[0],
        )
        yield per_item(row, size, sizes[0])
