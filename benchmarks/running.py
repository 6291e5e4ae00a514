"""Training steps and inference of the hyperized model, against the dense one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.optim import Muon
from torch import Tensor, nn

from benchmarks.timing import FULL, QUICK, Row, alternate
from hyperize import HyperLSTM, HyperMuon, hyperize, to_dense

CLASSES = 1000
FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "factorized": {"factorized": True},
    "factorized channels": {"factorized": True, "embeddings": "channel"},
}
"""Options of `hyperize` by what a row calls them."""
TILES, BOTH, ALL = ("",), ("", "factorized"), tuple(FORMS)
NO_COMPILER = "not measured: torch.compile needs a C++ compiler"


class BiLSTM(nn.Module):
    """A bidirectional LSTM that classifies sequences."""

    def __init__(self, features: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of sequences (batch, T, features)."""
        return self.head(self.lstm(x)[0].mean(1))


@dataclass(frozen=True)
class Case:
    """One model with its input.

    Attributes:
        model: A name of timm's, or "BiLSTM".
        size: Side of the square images, or length of the sequences.
        batch: Images or sequences.
        target: What the ratio should be, at most; None for no target.
        forms: What is compared with the dense model, each in a row of its own.
        compiled: Whether both models are compiled.
        linear: Whether linear layers are targets, too.
        mode: Of `torch.compile`.
    """

    model: str
    size: int
    batch: int
    target: float | None = None
    forms: tuple[str, ...] = BOTH
    compiled: bool = False
    linear: bool = False
    mode: str = "default"

    def __str__(self) -> str:
        size = f"T {self.size}" if self.model == "BiLSTM" else f"{self.size} px"
        how = ", compiled" if self.compiled else ""
        how += "" if self.mode == "default" else f' with mode="{self.mode}"'
        return f"{self.model}, {size}, batch {self.batch}{how}"

    def hyperize(self, dense: nn.Module, form: str) -> nn.Module:
        """The hyperized model in one of the forms."""
        options: dict[str, Any] = {"targets": ("conv2d", "linear")} if self.linear else {}
        return hyperize(dense, seed=0, **options, **FORMS[form])

    def make(self) -> tuple[nn.Module, Tensor]:
        """The dense model and a batch of noise."""
        if self.model == "BiLSTM":
            return BiLSTM(), torch.randn(self.batch, self.size, 128)
        image = torch.randn(self.batch, 3, self.size, self.size)
        return timm.create_model(self.model, num_classes=CLASSES), image


TRAINING = (
    Case("resnet50", 224, 32, 1.05, ALL),
    Case("resnet50", 224, 8, 1.15, ALL),
    Case("resnet18", 32, 128, 1.10, ALL),
    Case("resnet18", 224, 1),
    Case("mobilenetv3_large_100", 224, 16),
    Case("convnext_tiny", 224, 8, linear=True, forms=ALL),
    Case("efficientnet_b0", 224, 8),
    Case("vit_small_patch16_224", 224, 8, linear=True, forms=ALL),
    Case("BiLSTM", 100, 1, forms=TILES),
    Case("BiLSTM", 100, 64, forms=TILES),
    Case("resnet18", 32, 128, compiled=True),
)
INFERENCE = (
    Case("resnet50", 224, 1, 1.5, ALL),
    Case("resnet50", 224, 16, forms=ALL),
    Case("resnet18", 224, 1),
    Case("resnet18", 32, 64),
    Case("mobilenetv3_large_100", 224, 1),
    Case("convnext_tiny", 224, 1, linear=True, forms=ALL),
    Case("efficientnet_b0", 224, 1),
    Case("vit_small_patch16_224", 224, 1, linear=True, forms=ALL),
    Case("BiLSTM", 100, 1, forms=TILES),
    Case("BiLSTM", 100, 64, forms=TILES),
    Case("resnet18", 224, 1, compiled=True),
)
OPTIMIZED = (
    Case("resnet18", 32, 128),
    Case("resnet50", 224, 32),
    Case("vit_small_patch16_224", 224, 8, linear=True),
)
SMALL = (
    Case("resnet10t", 32, 2),
    Case("BiLSTM", 10, 2, forms=TILES),
    Case("resnet10t", 32, 2, compiled=True),
)
"""With `--quick`."""


def training(quick: bool) -> Iterator[Row]:
    for case in SMALL if quick else TRAINING:
        dense, inputs = case.make()
        labels = torch.randint(CLASSES, (case.batch,))
        yield from _rows(
            "training step",
            case,
            dense.train(),
            partial(training_step, inputs=inputs, labels=labels),
            quick,
        )


def inference(quick: bool) -> Iterator[Row]:
    cases = SMALL if quick else INFERENCE
    for case in cases:
        dense, inputs = case.make()
        yield from _rows("inference", case, dense.eval(), partial(forward, inputs=inputs), quick)
    dense, inputs = cases[0].make()
    exported = to_dense(hyperize(dense, seed=0))
    ours, theirs = (forward(m.eval(), inputs) for m in (exported, dense))
    name = f"inference after to_dense, {cases[0]} / dense"
    yield alternate(name, ours, theirs, QUICK if quick else FULL, target=1.0)


def _rows(
    work: str,
    case: Case,
    dense: nn.Module,
    runner: Callable[[nn.Module], Callable[[], None]],
    quick: bool,
) -> Iterator[Row]:
    """One row for each form of a case."""
    for form in case.forms:
        name = f"{work}, {case}{', ' * bool(form)}{form} / dense"
        if case.compiled and not _can_compile(quick):
            yield Row(name, note=NO_COMPILER)
            continue
        networks = (case.hyperize(dense, form), dense)
        ours, theirs = (runner(_compile(n, quick) if case.compiled else n) for n in networks)
        yield alternate(name, ours, theirs, QUICK if quick else FULL, target=case.target)


def optimizer(quick: bool) -> Iterator[Row]:
    """A step of HyperMuon, against others on the same parameters and Muon on the dense ones."""
    for case in SMALL[:1] if quick else OPTIMIZED:
        dense = case.make()[0]
        hyper = case.hyperize(dense, "")
        for network in (dense, hyper):
            for param in network.parameters():
                param.grad = torch.randn_like(param)
        ours = HyperMuon(hyper, 1e-4)
        others = {
            "dense with Muon": Muon(dense.parameters(), 1e-4, nesterov=True),
            "Muon": Muon(hyper.parameters(), 1e-4, nesterov=True),
            "AdamW": torch.optim.AdamW(hyper.parameters(), 1e-4),
        }
        for what, other in others.items():
            name = f"optimizer step, HyperMuon, {case.model} / {what}"
            yield alternate(name, ours.step, other.step, QUICK if quick else FULL)


def hyperlstm(quick: bool) -> Iterator[Row]:
    """Forward and backward of a HyperLSTM, against nn.LSTM of the same hidden size."""
    effort = QUICK if quick else FULL
    steps, batch = (10, 4) if quick else (100, 32)
    before = torch.get_num_threads()
    for threads in (1,) if quick else (1, 2):
        for compiled in (False, True):
            hyper, dense = HyperLSTM(128, 512, hyper_size=128, embedding_dim=16), nn.LSTM(128, 512)
            run = _compile(hyper, quick) if compiled else hyper
            x = torch.randn(steps, batch, 128, requires_grad=True)
            how = "compiled" if compiled else "eager"
            count = "1 thread" if threads == 1 else f"{threads} threads"
            name = f"HyperLSTM(128, 512), T {steps}, batch {batch}, {how}, {count} / nn.LSTM"
            if compiled and not _can_compile(quick):
                yield Row(name, note=NO_COMPILER)
                continue
            torch.set_num_threads(threads)
            try:
                yield alternate(name, _there_and_back(run, x), _there_and_back(dense, x), effort)
            finally:
                torch.set_num_threads(before)


def _there_and_back(lstm: nn.Module, x: Tensor) -> Callable[[], None]:
    return lambda: lstm(x)[0].sum().backward()


def training_step(network: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, backward and an SGD step."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()

    return run


def forward(network: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """The forward pass without gradients."""

    @torch.no_grad()
    def run() -> None:
        network(inputs)

    return run


def _can_compile(quick: bool) -> bool:
    return quick or shutil.which(os.environ.get("CXX", "g++")) is not None


def _compile(network: nn.Module, quick: bool) -> nn.Module:
    """Compiled; with `--quick` only traced, as compiling takes a minute."""
    return cast(nn.Module, torch.compile(network, backend="eager" if quick else "inductor"))
