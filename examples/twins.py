"""A dense model and its hyperized twin, trained side by side: what the training examples share.

`train` is the loop of all examples but `char_lm.py`, whose models have states, and
`train_distributed.py`, whose loop is accelerate's.

Both twins start from the same initialisation, see the same batches and follow the same recipe, so
that what differs in the final table is the rewrite. Imported by the training examples, and in parts
by `paper.py`; not a program of its own.

The recipe is AdamW with one cycle of the learning rate, for both. The paper (arXiv 1609.09106) too
trains its hypernetworks with Adam; in 150 steps on MNIST, SGD with Nesterov momentum brought the
hyper twin less far at each rate tried (0.05 to 1) than AdamW at 0.01 to 0.1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from hyperize import hyperize, param_groups, report, save

Loss = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets to what is minimised."""
Accuracy = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Images:
    """Labelled images as one array: sets as small as these need no data loader.

    Attributes:
        pixels: uint8, (N, C, H, W).
        labels: int64, (N,).
    """

    pixels: Tensor
    labels: Tensor

    def to(self, device: str) -> Images:
        """The same images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Twin:
    """One of the models, with what trains it.

    Attributes:
        name: Row of the final table.
        model: The model.
        optimizer: Over all parameters of the model.
        schedule: Of the learning rate, advanced after every step, so that it counts them.
        steps: Training steps in all.
        seconds: Wall time of each training step so far.
        captured: Training steps as CUDA graphs, by the shapes of their batches.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    steps: int
    seconds: list[float] = field(default_factory=list)
    captured: dict[tuple[torch.Size, ...], CapturedStep] = field(default_factory=dict)


class CapturedStep:
    """A training step as one CUDA graph, which is launched at once.

    The hundreds of kernels of a small network's step take longer to launch than to run. What is
    captured leaves the run as it was: it has taken no step.

    Args:
        run: With an optimizer that is capturable, and a model without control flow that depends on
            values.
        batch: Tensors on the GPU; those of later steps have the same shapes.
        loss: As in `train`.
    """

    def __init__(self, run: Twin, batch: Sequence[Tensor], loss: Callable[..., Tensor]) -> None:
        self.batch = [part.clone() for part in batch]
        optimizer, device = run.optimizer, self.batch[0].device
        for group in optimizer.param_groups:  # a tensor, so that replays read what is set later
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)

        def work() -> Tensor:
            optimizer.zero_grad()
            value = loss(run, *self.batch)
            value.backward()
            optimizer.step()
            return value.detach()

        # Clones with a graph would tie the parameters' gradients to the stream of now
        before = {id(t): t.detach().clone() for t in _tensors(run)}
        # A stream of its own, so that the kernels of several runs fill the device together
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # what is set up once must not be in the graph
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(self.stream)
        with torch.no_grad():
            for tensor in _tensors(run):  # an optimizer's own begin with zeros
                old = before.get(id(tensor))
                tensor.zero_() if old is None else tensor.copy_(old)
        optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.value = work()

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """Begins a step on the graph's stream; returns the loss to be, until the next one.

        The batch has to be kept until the loss is there.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for own, given in zip(self.batch, batch, strict=True):
                own.copy_(given)
            self.graph.replay()
        return self.value

    def wait(self) -> None:
        """Lets what comes next on the current stream wait for the step."""
        torch.cuda.current_stream().wait_stream(self.stream)


def _tensors(run: Twin) -> list[Tensor]:
    """All that a step changes: parameters, buffers and the optimizer's state."""
    states = (tensor for state in run.optimizer.state.values() for tensor in state.values())
    own = (t for t in states if isinstance(t, Tensor))
    return [*run.model.parameters(), *run.model.buffers(), *own]


AnyTwin = TypeVar("AnyTwin", bound=Twin)


@dataclass(frozen=True)
class Result:
    """A row of the final table."""

    name: str
    accuracy: float
    params: int
    step_ms: float


def make_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags that all training examples have; each has its own defaults."""
    parser = argparse.ArgumentParser(description=description)
    flag = parser.add_argument
    flag(
        "--compression",
        type=float,
        metavar="X",
        help="weights per generating parameter (default: %(default)s)",
    )
    flag(
        "--factorized",
        action="store_true",
        help="let the hyper twin compute with the factors of its weights where that is faster",
    )
    flag("--batch-size", type=int, metavar="N", help="images per step (default: %(default)s)")
    flag("--lr", type=float, help="peak of the learning rate (default: %(default)s)")
    flag("--hyper-lr", type=float, metavar="LR", help="peak for the hyper twin, if not --lr")
    flag(
        "--weight-decay",
        type=float,
        default=0.01,
        help="of the weights that are not generated (default: %(default)s)",
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
    flag(
        "--out",
        type=Path,
        metavar="F",
        help="write a checkpoint of the hyper twin, for hyperize.load",
    )
    parser.set_defaults(**defaults)
    return parser


def refuse(parser: argparse.ArgumentParser, reason: object) -> NoReturn:
    """Ends a program whose flags are right but cannot be carried out, as `hyperize` itself does.

    With one line on stderr and exit code 1; `parser.error` is for a wrong command line.
    """
    parser.exit(1, f"{parser.prog}: {' '.join(str(reason).split())}\n")


def compare(
    dense: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    accuracy: Accuracy,
    args: argparse.Namespace,
    loss: Loss = F.cross_entropy,
    targets: str | Sequence[str] = ("conv2d", "lstm"),
) -> tuple[nn.Module, list[Result]]:
    """Hyperizes a model, trains both twins, and prints the report and the final table.

    Args:
        dense: The model, freshly initialised; it becomes the dense twin.
        batches: At least `steps` pairs of inputs and targets, on the device of `args`.
        steps: Training steps.
        accuracy: From a model in evaluation mode to the figure in the table.
        args: The flags of `make_parser`.
        loss: From the model's outputs and the targets.
        targets: Kinds of layers whose weights are generated.

    Returns:
        The trained hyper twin, and the rows of the table.
    """
    if args.out:  # found wanting now rather than after the training
        args.out.parent.mkdir(parents=True, exist_ok=True)
    dense = dense.to(args.device).train()
    hyper = hyperize(
        dense,
        compression=args.compression,
        targets=targets,
        factorized=args.factorized,
        seed=args.seed,
    )
    print(report(hyper), end="\n\n")
    twins = (
        make_twin("dense", dense, args.lr, args.weight_decay, steps),
        make_twin("hyper", hyper, args.hyper_lr or args.lr, args.weight_decay, steps),
    )
    train(twins, islice(batches, steps), lambda run, x, y: loss(run.model(x), y))
    results = [evaluate(twin, accuracy) for twin in twins]
    print_table(results)
    if args.out:
        save(hyper, args.out)
        print(f"hyper checkpoint: {args.out}")
    return hyper, results


def make_twin(name: str, model: nn.Module, lr: float, weight_decay: float, steps: int) -> Twin:
    """Gives a model its optimizer and its schedule.

    What generates weights is not decayed. (The paper, arXiv 1609.09106 sec. 3.1, penalises the
    generated weights instead; runs as short as these do without.)
    """
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    return Twin(name, model, optimizer, schedule, steps)


def train(
    runs: Sequence[AnyTwin],
    batches: Iterable[Sequence[Any]],
    loss: Callable[..., Tensor],
    title: str | None = "training",
    *,
    capture: bool = False,
) -> None:
    """Trains models in turns on the same batches; on a terminal, under a progress bar.

    Args:
        runs: The models. One that has taken all of its steps is left out.
        batches: As many as steps are to be taken, at most.
        loss: From a run and the members of a batch to what is minimised.
        title: What the bar is called; None for no bar.
        capture: Capture each run's step in a CUDA graph, as `CapturedStep` wants it. The runs then
            take their steps at the same time.
    """
    with progress_bar(title is not None) as progress:
        total, done = max((run.steps, run.schedule.last_epoch) for run in runs)
        task = progress.add_task(title or "", total=total, completed=done)
        batches = iter(batches)
        batch = next(batches, None)
        while batch is not None:
            active = [run for run in runs if run.schedule.last_epoch < run.steps]
            if not active:
                break
            step = _captured_steps if capture else _steps
            values, batch = step(active, batch, batches, loss)
            losses = [f"{run.name} {v:.3f}" for run, v in zip(active, values, strict=True)]
            progress.update(task, advance=1, description=f"{title}: loss: {', '.join(losses)}")


def progress_bar(shown: bool = True) -> Progress:
    """A bar with a description, steps and the time left; silent unless stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )


Batch = Sequence[Any]


def _steps(
    runs: Sequence[AnyTwin], batch: Batch, batches: Iterator[Batch], loss: Callable[..., Tensor]
) -> tuple[list[float], Batch | None]:
    """A step of each run, one after the other; their losses, and the next batch."""
    reached = []
    for run in runs:
        start = time.perf_counter()
        run.optimizer.zero_grad()
        value = loss(run, *batch)
        value.backward()
        run.optimizer.step()
        run.schedule.step()
        reached.append(value.item())  # a GPU has been waited for, so that the time is the step's
        run.seconds.append(time.perf_counter() - start)
    return reached, next(batches, None)


def _captured_steps(
    runs: Sequence[AnyTwin], batch: Batch, batches: Iterator[Batch], loss: Callable[..., Tensor]
) -> tuple[list[float], Batch | None]:
    """A step of each run, all at the same time, while the next batch is made.

    Each run's time is that of all of them.
    """
    shapes = tuple(part.shape for part in batch)
    for run in runs:
        if shapes not in run.captured:
            run.captured[shapes] = CapturedStep(run, batch, loss)
    steps = [run.captured[shapes] for run in runs]
    start = time.perf_counter()
    values = [step(batch) for step in steps]
    following = next(batches, None)
    for step, run in zip(steps, runs, strict=True):
        step.wait()
        run.schedule.step()
    reached: list[float] = torch.stack(values).tolist()
    for run in runs:
        run.seconds.append(time.perf_counter() - start)
    return reached, following


@torch.no_grad()
def evaluate(twin: Twin, accuracy: Accuracy) -> Result:
    """The twin's row of the table."""
    figure = accuracy(twin.model.eval())
    params = sum(param.numel() for param in twin.model.parameters())
    # The first step pays for what is set up once
    step_ms = 1e3 * statistics.median(twin.seconds[1:] or twin.seconds)
    return Result(twin.name, figure, params, step_ms)


def print_table(results: Sequence[Result]) -> None:
    """Prints one row per twin."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in ("test accuracy", "parameters", "step time (median)"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(row.name, f"{row.accuracy:.2%}", f"{row.params:,}", f"{row.step_ms:.1f} ms")
    Console(width=80, highlight=False).print(table)


def steps_of(args: argparse.Namespace, images: Images) -> int:
    """The steps that `--steps` asks for, or else the epochs of `--epochs`."""
    return args.steps or args.epochs * math.ceil(len(images.labels) / args.batch_size)


def shuffled(
    images: Images, batch_size: int, seed: int, *, pad: int = 0, flip: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields shuffled batches, epoch after epoch without end.

    Args:
        images: The training set.
        batch_size: Images per batch; an epoch's last may have fewer.
        seed: Of the order and the augmentation.
        pad: Pixels of padding out of which each image is cropped at random.
        flip: Mirror half of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    device = images.pixels.device
    height, width = images.pixels.shape[2:]
    padded = F.pad(images.pixels, (pad,) * 4)
    while True:
        for at in torch.randperm(len(images.labels), generator=generator).split(batch_size):
            top, left = torch.randint(2 * pad + 1, (2, len(at), 1), generator=generator)
            rows, columns = top + torch.arange(height), left + torch.arange(width)
            if flip:
                mirrored = torch.rand(len(at), 1, generator=generator) < 0.5
                columns = torch.where(mirrored, columns.flip(1), columns)
            at, rows, columns = at.to(device), rows.to(device), columns.to(device)
            # Index tensors on both sides of a slice put its axis last: (N, H, W, C)
            crops = padded[at[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            yield to_floats(crops.permute(0, 3, 1, 2)), images.labels[at]


def to_floats(pixels: Tensor) -> Tensor:
    """Bytes to floats from -1 to 1."""
    return pixels.float().contiguous() / 127.5 - 1


def classified(model: nn.Module, images: Images, batch_size: int = 500) -> float:
    """The share of images that a model classifies correctly."""
    return (predicted(model, images, batch_size) == images.labels).float().mean().item()


def predicted(model: Callable[[Tensor], Tensor], images: Images, batch_size: int = 500) -> Tensor:
    """The classes that a model gives to images, (N,)."""
    batches = images.pixels.split(batch_size)
    return torch.cat([model(to_floats(pixels)).argmax(1) for pixels in batches])
