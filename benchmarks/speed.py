"""Speed of hyperize as ratios of two things timed alternately in one process.

    python benchmarks/speed.py            # everything, about ten minutes on two cores
    python benchmarks/speed.py --quick    # small sizes, to see that it runs

Each row gives the median of both sides, the median of the pairwise ratios and the ratios' first and
third quartile. Nothing here is asserted: machines differ.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from hyperize import HyperLSTM, hyperize, make_plan
from hyperize.hypernet import HyperNet
from hyperize.rewrite import find_hypernet, generated_layers


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of the subject and of its yardstick, measured in turn."""

    name: str
    subject: tuple[float, ...]
    yardstick: tuple[float, ...]

    def __str__(self) -> str:
        ratios = [a / b for a, b in zip(self.subject, self.yardstick, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ours, theirs = statistics.median(self.subject), statistics.median(self.yardstick)
        return (
            f"| {self.name} | {ours * 1e3:,.1f} ms | {theirs * 1e3:,.1f} ms "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) |"
        )


def alternate(
    name: str, subject: Callable[[], object], yardstick: Callable[[], object], repeats: int
) -> Row:
    """Times two functions in turn, after one warm-up of each."""
    subject(), yardstick()
    times: tuple[list[float], list[float]] = ([], [])
    console = Console(stderr=True)
    for _ in track(range(repeats), name, console=console, disable=not console.is_terminal):
        for function, seconds in zip((subject, yardstick), times, strict=True):
            gc.collect()
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return Row(name, tuple(times[0]), tuple(times[1]))


def generation(model: str, repeats: int) -> Row:
    """All weights of a model, against the bare matrix products of each site."""
    hyper = hyperize(timm.create_model(model), seed=0)
    hypernet = find_hypernet(hyper)[1]
    layers = [(m, name) for m in generated_layers(hyper).values() for name in m.generated]
    products = [p for layer, name in layers for p in _products(hypernet, layer._site_index[name])]

    @torch.no_grad()
    def generate() -> None:
        for layer, name in layers:
            layer.generate(name)

    @torch.no_grad()
    def multiply() -> None:
        for left, right in products:
            torch.mm(left, right)

    return alternate(f"generate {model} / its bare matrix products", generate, multiply, repeats)


def _products(hypernet: HyperNet, site: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of the sizes that a site's products have."""
    grid = hypernet.plan.sites[site].grid
    head = hypernet.heads[grid.kernel]
    assert isinstance(head, nn.Linear)
    used = grid.width * torch.Size(grid.shape[2:]).numel()
    last = head.weight.detach()[:used].t()
    products = [(torch.randn(grid.rows * grid.parts, hypernet.fan_in), last)]
    if hypernet.trunk is not None:
        trunk = hypernet.trunk.weight.detach().t()
        products.append((torch.randn(grid.tiles, hypernet.embedding_dim), trunk))
    return products


def training_step(model: str, batch: int, pixels: int, repeats: int) -> Row:
    """Forward, backward and an SGD step of the hyperized model, against the dense one."""
    dense = timm.create_model(model).train()
    hyper = hyperize(dense, seed=0)
    images = torch.randn(batch, 3, pixels, pixels)
    labels = torch.randint(1000, (batch,))

    def step(network: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

        return run

    name = f"training step of {model}, {pixels} px, batch {batch} / the dense step"
    return alternate(name, step(hyper), step(dense), repeats)


def rewriting(model: str, repeats: int) -> Row:
    """`hyperize(model)`, against creating the model."""
    dense = timm.create_model(model)
    return alternate(
        f"hyperize({model}) / timm.create_model",
        lambda: hyperize(dense, seed=0),
        lambda: timm.create_model(model),
        repeats,
    )


def planning(model: str, targets: tuple[str, ...], repeats: int) -> Row:
    """`make_plan` on meta, against creating the model on meta."""

    def create() -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(model)

    meta = create()
    size = sum(p.numel() for p in meta.parameters())
    name = f"plan {model} ({size:,} parameters), {' and '.join(targets)} / create, on meta"
    return alternate(name, lambda: make_plan(meta, targets=targets), create, repeats)


def recurrent(threads: int, compiled: bool, repeats: int, steps: int = 100) -> Row:
    """Forward and backward of a HyperLSTM, against nn.LSTM of the same hidden size."""
    hyper, dense = HyperLSTM(128, 512, hyper_size=128, embedding_dim=16), nn.LSTM(128, 512)
    hyper_run = torch.compile(hyper) if compiled else hyper
    x = torch.randn(steps, 32, 128, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    how = "compiled" if compiled else "eager"
    try:
        return alternate(
            f"HyperLSTM(128, 512), T {steps}, batch 32, {how}, {threads} threads / nn.LSTM",
            lambda: hyper_run(x)[0].sum().backward(),
            lambda: dense(x)[0].sum().backward(),
            repeats,
        )
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="training steps timed")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, timm {timm.__version__}, python {platform.python_version()}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, seed 0\n")
    print("| | ours | yardstick | ratio (quartiles) |\n|---|---:|---:|---:|")
    if args.quick:
        rows = (
            lambda: generation("resnet10t", 4),
            lambda: rewriting("resnet10t", 4),
            lambda: planning("resnet50", ("conv2d",), 4),
            lambda: training_step("resnet10t", 4, 64, 4),
            lambda: recurrent(1, False, 4, steps=10),
        )
    else:
        rows = (
            lambda: generation("resnet50", 40),
            lambda: rewriting("resnet50", 15),
            lambda: planning("vit_7b_patch16_dinov3", ("conv2d", "linear"), 10),
            lambda: planning("efficientnet_l2", ("conv2d",), 10),
            lambda: training_step("resnet50", 32, 224, args.steps),
            lambda: recurrent(1, False, 15),
            lambda: recurrent(2, False, 15),
            lambda: recurrent(1, True, 15),
            lambda: recurrent(2, True, 15),
        )
    for row in rows:
        print(row(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
