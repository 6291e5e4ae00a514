"""Training that survives a kill: what the experiments of the paper share.

Imported by `mnist_paper.py` and `cifar_wrn_paper.py`, and in parts by other examples and by
`benchmarks/accuracy.py`; not a program of its own. The dense network and its hypernetwork version
are trained in turns on the same batches, each with its own optimizer, schedule and number of steps.
After each epoch everything is written to `checkpoint.pt` in the output folder. Started again with
the same flags, a run goes on from there, and ends, on the same machine, with the same weights as if
it had never stopped: the batches of an epoch depend on the seed and the epoch's number alone.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import Images, Result, Twin, classified, evaluate, print_table, shuffled, train

from hyperize import generated_l2, save

TIMED = 1000
"""Step times that a checkpoint keeps of each run, the latest."""
SEEDS = 1_000_003
"""Distance of the seeds of two runs' first epochs; more than either has epochs."""


@dataclass(frozen=True)
class Run(Twin):
    """A twin with its own L2 penalty.

    Attributes:
        l2: Factor of the L2 penalty on the generated weights, as a weight decay: half of it times
            the sum of squares is added to the loss.
        curve: Whatever figures the caller takes along the way; checkpoints keep them.
    """

    l2: float = 0.0
    curve: list[float] = field(default_factory=list)


def make_run(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    steps: int,
    l2: float = 0.0,
) -> Run:
    """A run at its start.

    Args:
        name: Row of the final table.
        model: The model; set to training mode.
        optimizer: Over its parameters, with a learning rate of 1.
        rate: From the number of steps done to the learning rate.
        steps: Training steps in all.
        l2: As in `Run`.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return Run(name, model.train(), optimizer, schedule, steps, l2=l2)


def make_parser(description: str, *, data: bool = True, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags that all experiments have; without data, none of a data folder."""
    parser = argparse.ArgumentParser(description=description)
    flag = parser.add_argument
    if data:
        flag("--data-dir", type=Path, required=True, help="folder of the images")
    flag(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results; a run found there is resumed (default: %(default)s)",
    )
    flag(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images per step (default: %(default)s)",
    )
    flag(
        "--seed",
        type=int,
        default=0,
        help="of the initialisation and the batches (default: %(default)s)",
    )
    flag(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device (default: %(default)s)",
    )
    parser.set_defaults(**defaults)
    return parser


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def experiment(
    runs: Sequence[Run],
    images: tuple[Images, Images],
    args: argparse.Namespace,
    *,
    pad: int,
    flip: bool = False,
    amp: bool = False,
    capture: bool = False,
) -> list[Result]:
    """Trains the runs, or goes on with it, prints the table and saves the hyper model.

    Args:
        runs: The dense and the hyper run, both at their start.
        images: The training and the test set, on the device of `args`.
        args: The flags of `make_parser` and the caller's own, which a checkpoint has to share.
        pad: Pixels of padding out of which each image is cropped at random.
        flip: Mirror half of the images.
        amp: Compute in bfloat16.
        capture: Capture each run's step in a CUDA graph, as `twins.CapturedStep` wants it.

    Returns:
        The rows of the table.

    Raises:
        SystemExit: The folder's checkpoint was made with other flags.
    """
    checkpoint = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    start = 0
    if checkpoint.exists():
        try:
            start = resume(checkpoint, runs, settings_of(args))
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        print(f"resumed after epoch {start}: {checkpoint}")
    steps = max(run.steps for run in runs)
    per_epoch = steps_per_epoch(images[0], args.batch_size)
    loss = in_bfloat16(penalised) if amp else penalised
    for epoch in range(start, math.ceil(steps / per_epoch)):
        batches = one_epoch(images[0], args.batch_size, args.seed, epoch, pad=pad, flip=flip)
        train(runs, batches, loss, f"epoch {epoch + 1}", capture=capture)
        suspend(checkpoint, runs, settings_of(args), epoch + 1)
    results = [evaluate(run, lambda model: classified(model, images[1])) for run in runs]
    print_table(results)
    save(runs[-1].model, args.out / "hyper.safetensors")
    return results


def one_epoch(
    images: Images, batch_size: int, seed: int, epoch: int, *, pad: int, flip: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch, the same whenever it is run."""
    batches = shuffled(images, batch_size, seed * SEEDS + epoch, pad=pad, flip=flip)
    return islice(batches, steps_per_epoch(images, batch_size))


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """Batches that hold every image once; the last may have fewer than the others."""
    return math.ceil(len(images.labels) / batch_size)


def penalised(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy, and the L2 penalty of the run."""
    with generated_l2(run.model) if run.l2 else nullcontext() as l2:
        loss = F.cross_entropy(run.model(inputs), targets)
    return loss + 0.5 * run.l2 * l2() if l2 else loss


def in_bfloat16(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss that is computed under autocast, as a CUDA graph can capture it."""

    def cast(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
        # Casts that outlive the region would be those of the first step
        with torch.autocast(inputs.device.type, torch.bfloat16, cache_enabled=False):
            return loss(run, inputs, targets)

    return cast


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that make a run what it is: all but places and the device."""
    places = ("data_dir", "out", "device")
    return {name: value for name, value in vars(args).items() if name not in places}


def suspend(path: Path, runs: Sequence[Run], settings: dict[str, Any], epochs: int) -> None:
    """Writes all that `resume` needs; a kill at any moment leaves the old file or the new one."""
    state = {
        "settings": settings,
        "epochs": epochs,
        "runs": [
            {
                "model": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "schedule": run.schedule.state_dict(),
                "seconds": run.seconds[-TIMED:],
                "curve": run.curve,
            }
            for run in runs
        ],
    }
    write_checkpoint(path, state)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint beside its place and moves it there."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the name points to it
    part.replace(path)


def read_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `write_checkpoint` wrote, if its entry `settings` is the one given.

    Raises:
        ValueError: The checkpoint was made with other settings.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        names = sorted(state["settings"].keys() | settings.keys())
        ours, theirs = (
            {n: of[n] for n in names if state["settings"].get(n) != settings.get(n) and n in of}
            for of in (settings, state["settings"])
        )
        raise ValueError(
            f"{path} was made with {theirs}, not {ours}; choose another --out, or delete it"
        )
    return state


def resume(path: Path, runs: Sequence[Run], settings: dict[str, Any]) -> int:
    """Brings the runs to where a checkpoint left them.

    Returns:
        The epochs that are done.

    Raises:
        ValueError: The checkpoint was made with other settings.
    """
    state = read_checkpoint(path, settings)
    for run, saved in zip(runs, state["runs"], strict=True):
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.schedule.load_state_dict(saved["schedule"])
        run.seconds[:] = saved["seconds"]
        run.curve[:] = saved.get("curve", ())  # older checkpoints have none
    return state["epochs"]
