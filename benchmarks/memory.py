"""Peak memory of one training step, each model in a process of its own.

    python -m benchmarks.memory hyper convnext_large 224 1     # one measurement, as JSON

The peak is that of the whole life of the model: making it, and one step of Adam. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.timing import Row
from hyperize import hyperize

ROOT = Path(__file__).parents[1]
TARGETS = ("conv2d", "linear")
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "hyper": {},
    "recompute": {"recompute": True},
    "factorized": {"factorized": True},
}
"""The dense model, and the hyperized one with these options."""


def rows(quick: bool) -> Iterator[Row]:
    cases = (("resnet10t", 64, 1),) if quick else (("convnext_large", 224, 1), ("resnet50", 224, 8))
    for model, pixels, batch in cases:
        yield from _of_model(model, pixels, batch, repeats=1 if quick else 3)


def _of_model(model: str, pixels: int, batch: int, repeats: int) -> Iterator[Row]:
    if not Path("/proc/self/clear_refs").exists():
        yield Row(f"peak memory, {model}", unit="bytes", note="not measured: it needs Linux")
        return
    measured: dict[str, list[dict[str, int]]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            measured[kind].append(_in_a_process(kind, model, pixels, batch))
    dense = measured["dense"]
    large = dense[0]["targets"] >= 100e6
    work = f"{model}, {pixels} px, batch {batch}"
    for kind in list(KINDS)[1:]:
        title = work if kind == "hyper" else f"{work}, {kind}"
        hyper = measured[kind]

        peaks, owns = (
            [tuple(process[name] for process in side) for side in (hyper, dense)]
            for name in ("peak", "own")
        )
        target = 0.5 if large and kind == "recompute" else None
        yield Row(
            f"peak memory of an Adam step, {title} / dense", peaks[0], peaks[1], "bytes", target
        )
        yield Row(f"less the interpreter's own, {title} / dense", owns[0], owns[1], "bytes")
    hyper = measured["hyper"]
    yield Row(
        f"parameters, gradients and Adam's state, {model} / dense",
        (hyper[0]["state"],),
        (dense[0]["state"],),
        "bytes",
        0.15 if large else None,
        f"targets conv2d and linear, {dense[0]['targets']:,} weights",
    )


def _in_a_process(*arguments: object) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measure(kind: str, model: str, pixels: int, batch: int) -> dict[str, int]:
    """Makes a model, trains it by one step, and says what it took, in bytes.

    Returns:
        `peak`, of this process; `own`, the peak less what the process held before; `state`, of
        parameters, gradients and optimizer; `targets`, weights of the layers that are rewritten.
    """
    torch.manual_seed(0)
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = status("VmRSS")
    network = timm.create_model(model).train()
    layers = (nn.Conv2d, nn.Linear)
    targets = sum(m.weight.numel() for m in network.modules() if isinstance(m, layers))
    if kind != "dense":
        # In place, so that each dense weight goes when its embedding is there
        network = hyperize(network, inplace=True, targets=TARGETS, seed=0, **KINDS[kind])
        trim()
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    peak = status("VmHWM")
    held = [t for p in network.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    state = sum(t.nbytes for t in held if t is not None)
    return {"peak": peak, "own": peak - before, "state": state, "targets": targets}


def trim() -> None:
    """Gives the system back what is free, which would count as held otherwise."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) * 1024


def main(argv: Sequence[str]) -> None:
    kind, model, pixels, batch = argv
    print(json.dumps(measure(kind, model, int(pixels), int(batch))))


if __name__ == "__main__":
    main(sys.argv[1:])
