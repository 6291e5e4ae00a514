"""Speed and memory of hyperize, as ratios of two things measured in turn.

    python -m benchmarks                              # everything, 15 minutes on two cores
    python -m benchmarks --quick                      # small sizes, to see that it runs
    python -m benchmarks generation training          # some of the subjects
    python -m benchmarks --device cuda                # on a GPU, in less than 5 minutes

Writes `benchmarks.json`, with all samples and versions, `benchmarks.md`, a table, and
`benchmarks.png`. A subject that is in the JSON already, with the same settings, is not measured
again. Nothing here is asserted: machines differ. The extra `bench` has the other libraries.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import hyperize
from benchmarks import device, fit, generation, gpu, making, memory, output, peers, running
from benchmarks.timing import Row

Subjects = Mapping[str, Callable[[bool], Iterator[Row]]]
SUBJECTS: Subjects = {
    "generation": generation.rows,
    "rewriting": making.rewriting,
    "planning": making.planning,
    "training": running.training,
    "inference": running.inference,
    "hyperlstm": running.hyperlstm,
    "optimizer": running.optimizer,
    "memory": memory.rows,
    "fit": fit.rows,
    "peers": peers.rows,
}
"""What can be measured, in the order of the table; each gives its rows, small with `--quick`.

Those of a GPU are in `benchmarks.gpu`.
"""
PACKAGES = (
    "torch",
    "timm",
    "hyperize",
    *dict.fromkeys(package for package, _ in peers.PEERS.values()),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="subject",
        help=f"of {', '.join(SUBJECTS)}; with --device cuda of {', '.join(gpu.SUBJECTS)}; all",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument(
        "--out", type=Path, help="runs/benchmarks, with --device cuda runs/benchmarks-cuda"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs, %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=gpu.SECONDS,
        help="on a GPU: begin nothing that would end later than this, %(default)s",
    )
    args = parser.parse_args(argv)
    card = device.find() if args.device == "cuda" else None
    if args.device == "cuda" and card is None:
        raise SystemExit("python -m benchmarks: error: --device cuda: torch sees no CUDA device")
    subjects = SUBJECTS if card is None else gpu.subjects(card, args.seconds)
    if unknown := [name for name in args.subjects if name not in subjects]:
        parser.error(f"no subject {unknown[0]!r}; there are {', '.join(subjects)}")
    folder = args.out or Path("runs/benchmarks" if card is None else "runs/benchmarks-cuda")
    with nullcontext() if card is None else card.settings():
        run(subjects, args, folder, card)


def run(
    subjects: Subjects, args: argparse.Namespace, folder: Path, card: device.Cuda | None
) -> None:
    """Measures what is wanted and not there yet."""
    settings = settings_of(args)
    if card is not None:
        settings["device"] = device.facts(card, gpu.PRECISION)
    done = output.read(folder, settings)
    for name in subjects:
        if args.subjects and name not in args.subjects:
            continue
        if name in done and not gpu.is_short(done[name]["rows"]):
            print(f"{name}: kept, of {done[name]['date']}")
            continue
        done[name] = measure(name, subjects[name], args)
        output.write(folder, settings, {name: done[name] for name in subjects if name in done})
    print(f"\n{(folder / output.TABLE).read_text()}")
    print(f"written: {', '.join(str(p) for p in sorted(folder.glob('benchmarks.*')))}")


def measure(
    name: str, subject: Callable[[bool], Iterator[Row]], args: argparse.Namespace
) -> dict[str, Any]:
    """Measures one subject; what it gives is what the JSON keeps of it."""
    torch.manual_seed(args.seed)
    torch.compiler.reset()
    start = time.perf_counter()
    rows = []
    for row in subject(args.quick):
        ratio = f"{row.quartiles[1]:.3f}" if row.subject else row.note
        print(f"{row.name}: {ratio}", flush=True)
        rows.append(row)
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": output.result(rows),
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What results depend on; with others, all is measured again."""
    return {
        "quick": args.quick,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "code": code(),
        "cpu": cpu(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code() -> str:
    """A hash of the library and the benchmarks, as versions do not change with every change."""
    digest = hashlib.sha256()
    for folder in (Path(hyperize.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
