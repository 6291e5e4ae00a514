"""Continual learning: five tasks, one after the other, of split MNIST or split CIFAR-10.

    python examples/continual.py --data-dir data                        # split MNIST
    python examples/continual.py --data-dir data --dataset cifar10      # split CIFAR-10
    python examples/continual.py --data-dir data --epochs 40            # the long run

Each task is to tell two classes apart, and is known at test time (task-incremental; the first
scenario of van de Ven and Tolias 2019, arXiv 1904.07734). When a task is trained, the images of the
earlier ones are gone. Four ways:

    generated     one generator, embeddings for each task, and a penalty on what changes in the
                  weights of earlier tasks (von Oswald et al. 2019, arXiv 1906.00695, eq. 2)
    fine-tuned    one network, with an output layer for each task, trained on and on
    separate      a network for each task
    separate, small    the same, narrower: together as large as the generator with all embeddings

All have the same steps, batches and optimizer: Adam with one cycle of the rate, made anew for each
task.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import train_cifar
import train_mnist
from paper import positive, steps_per_epoch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from twins import Images, Twin, classified, refuse, shuffled, train

from hyperize import condition, hyperize, make_plan, param_groups, report

TASKS = 5
EPOCHS = {"mnist": 12, "cifar10": 4}
BETAS = {"mnist": 0.01, "cifar10": 1.0}
"""Of the penalty. With 0.01 split CIFAR-10 forgets 8 points."""


@dataclass(frozen=True)
class Task:
    """Two classes of a data set, with labels 0 and 1."""

    train: Images
    test: Images


@dataclass(frozen=True)
class Outcome:
    """How a way has fared.

    Attributes:
        name: Of the way.
        params: Parameters of all that it needs for all tasks.
        accuracies: After each task, of all tasks so far.
    """

    name: str
    params: int
    accuracies: list[list[float]]

    @property
    def final(self) -> float:
        """Mean accuracy over the tasks, after the last."""
        return sum(self.accuracies[-1]) / len(self.accuracies[-1])

    @property
    def forgotten(self) -> float:
        """What the tasks before the last have lost since they were trained, in the mean."""
        first = [row[-1] for row in self.accuracies[:-1]]
        return sum(a - b for a, b in zip(first, self.accuracies[-1], strict=False)) / len(first)


class Perceptron(nn.Module):
    """Two hidden layers, as in van de Ven and Tolias (400 units)."""

    def __init__(self, width: int = 400) -> None:
        super().__init__()
        self.first = nn.Linear(784, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.first(images.flatten(1)))  # (N, 1, 28, 28) -> (N, 784)
        return self.head(F.relu(self.second(x)))


class ConvNet(nn.Module):
    """Six convolutions with batch norm, for images of 32 pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        channels = [(3, a), (a, a), (a, b), (b, b), (b, c), (c, c)]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, 1 + at % 2, 1, bias=False), nn.BatchNorm2d(n_out)
            )
            for at, (n_in, n_out) in enumerate(channels)
        )
        self.head = nn.Linear(c, 2)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        for block in self.blocks:
            images = F.relu(block(images))
        return self.head(images.mean((2, 3)))  # (N, C, 4, 4) -> (N, C)


def split(train_set: Images, test_set: Images) -> list[Task]:
    """The classes two by two, in their order."""

    def pair(images: Images, task: int) -> Images:
        held = images.labels // 2 == task
        return Images(images.pixels[held], images.labels[held] % 2)

    return [Task(pair(train_set, task), pair(test_set, task)) for task in range(TASKS)]


def trained(
    model: nn.Module,
    title: str,
    task: Task,
    args: argparse.Namespace,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Trains a model on one task."""
    steps = args.steps or args.epochs * steps_per_epoch(task.train, args.batch_size)
    optimizer = torch.optim.Adam(param_groups(model, 0.0), args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    run = Twin(title, model.train(), optimizer, schedule, steps)
    pad, flip = (4, True) if args.dataset == "cifar10" else (0, False)
    batches = shuffled(task.train, args.batch_size, args.seed, pad=pad, flip=flip)
    train([run], islice(batches, steps), lambda _, x, y: loss(x, y), title)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    return classified(model, task.test)


def generated(
    make: Callable[[], nn.Module], tasks: list[Task], args: argparse.Namespace
) -> Outcome:
    """One generator, with the output regulariser."""
    model = make()
    plan = make_plan(
        model,
        conditions=TASKS,
        compression=args.compression,
        targets=("linear", "conv2d"),
        private="head",
        seed=args.seed,
    )
    hyper = hyperize(model, plan).to(args.device)
    print(report(hyper), end="\n\n")
    sites = [planned.site for planned in plan.sites]

    def weights(k: int) -> list[Tensor]:
        with condition(hyper, k):
            return [getattr(hyper.get_submodule(site.path), site.param) for site in sites]

    def loss(t: int, kept: list[list[Tensor]], images: Tensor, labels: Tensor) -> Tensor:
        """The task's own, and what has changed in the weights of earlier tasks since it began."""
        with condition(hyper, t):
            value = F.cross_entropy(hyper(images), labels)
        for k, before in enumerate(kept):
            pairs = zip(weights(k), before, strict=True)
            change = torch.stack([(now - old).square().sum() for now, old in pairs]).sum()
            value = value + args.beta / t * change
        return value

    accuracies: list[list[float]] = []
    for t, task in enumerate(tasks):
        with torch.no_grad():
            kept = [[torch.clone(weight) for weight in weights(k)] for k in range(t)]
        trained(hyper, f"generated, task {t + 1}", task, args, partial(loss, t, kept))
        accuracies.append([])
        for k, earlier in enumerate(tasks[: t + 1]):
            with condition(hyper, k):
                accuracies[-1].append(accuracy(hyper, earlier))
    return Outcome("generated", count(hyper), accuracies)


def fine_tuned(
    make: Callable[[], nn.Module], tasks: list[Task], args: argparse.Namespace
) -> Outcome:
    """One network, and heads that are put in place for each task."""
    model = make().to(args.device)
    heads = [copy.deepcopy(model.get_submodule("head")) for _ in tasks]
    accuracies: list[list[float]] = []
    for t, task in enumerate(tasks):
        model.head = heads[t]
        loss = lambda x, y: F.cross_entropy(model(x), y)  # noqa: E731
        trained(model, f"fine-tuned, task {t + 1}", task, args, loss)
        accuracies.append([])
        for k, earlier in enumerate(tasks[: t + 1]):
            model.head = heads[k]
            accuracies[-1].append(accuracy(model, earlier))
    return Outcome("fine-tuned", count(model) + (TASKS - 1) * count(heads[0]), accuracies)


def separate(
    name: str, make: Callable[[], nn.Module], tasks: list[Task], args: argparse.Namespace
) -> Outcome:
    """A network for each task."""
    accuracies: list[list[float]] = []
    params = 0
    for t, task in enumerate(tasks):
        model = make().to(args.device)
        params += count(model)
        loss = lambda x, y, model=model: F.cross_entropy(model(x), y)  # noqa: E731
        trained(model, f"{name}, task {t + 1}", task, args, loss)
        before = accuracies[-1] if accuracies else []
        accuracies.append([*before, accuracy(model, task)])
    return Outcome(name, params, accuracies)


def count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def widest(make: Callable[[int], nn.Module], most: int) -> int:
    """The width with which a network has at most so many parameters."""
    width = 1
    while count(make(width + 1)) <= most:
        width += 1
    return width


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Prints one row per way."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in ("accuracy after all tasks", "forgotten", "parameters"):
        table.add_column(name, justify="right")
    for row in outcomes:
        lost = f"{100 * row.forgotten:.2f} points"
        table.add_row(row.name, f"{row.final:.2%}", lost, f"{row.params:,}")
    Console(width=80, highlight=False).print(table)


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Draws the mean accuracy over the tasks so far, after each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for row in outcomes:
        means = [100 * sum(accuracies) / len(accuracies) for accuracies in row.accuracies]
        axes.plot(range(1, TASKS + 1), means, marker="o", label=f"{row.name}, {row.params:,}")
    axes.set(xlabel="tasks trained", ylabel="mean accuracy over them (%)", title=title)
    axes.set_xticks(range(1, TASKS + 1))
    axes.legend(frameon=False, fontsize=8, title="parameters of all networks")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def ways(args: argparse.Namespace, tasks: list[Task]) -> Iterator[Outcome]:
    """All of them, each from the same start."""
    sized: Callable[[int], nn.Module] = Perceptron if args.dataset == "mnist" else ConvNet

    def make(width: int = args.width) -> nn.Module:
        torch.manual_seed(args.seed)
        return sized(width)

    first = generated(make, tasks, args)
    yield first
    yield fine_tuned(make, tasks, args)
    yield separate("separate", make, tasks, args)
    width = widest(make, first.params // TASKS)
    yield separate("separate, small", lambda: make(width), tasks, args)


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Trains all ways.

    Returns:
        The rows of the table.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data-dir", type=Path, required=True, help="as of train_mnist.py or train_cifar.py")
    flag("--dataset", choices=("mnist", "cifar10"), default="mnist", help="(default: %(default)s)")
    flag("--epochs", type=positive, metavar="N", help=f"of a task (default: {EPOCHS})")
    flag("--steps", type=positive, metavar="N", help="of a task, instead of epochs")
    flag("--batch-size", type=positive, default=128, metavar="N", help="(default: %(default)s)")
    flag("--lr", type=float, default=3e-3, help="peak of the rate (default: %(default)s)")
    flag("--beta", type=float, metavar="B", help=f"of the penalty (default: {BETAS})")
    flag("--compression", type=float, default=6.0, metavar="X", help="(default: %(default)s)")
    flag("--width", type=positive, metavar="N", help="units of a layer, or channels at first")
    flag("--seed", type=int, default=0, help="of starts and batches (default: %(default)s)")
    cuda = torch.cuda.is_available()
    flag("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s)")
    flag("--plot", type=Path, metavar="F", help="draw the accuracies (extra plot)")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or EPOCHS[args.dataset]
    args.beta = BETAS[args.dataset] if args.beta is None else args.beta
    args.width = args.width or (400 if args.dataset == "mnist" else 32)
    try:
        if args.dataset == "mnist":
            halves = [train_mnist.read(args.data_dir, train) for train in (True, False)]
        else:
            halves = list(train_cifar.read(args.data_dir))
    except FileNotFoundError as error:
        refuse(parser, f"--data-dir {error}")
    tasks = split(*(half.to(args.device) for half in halves))
    outcomes = list(ways(args, tasks))
    print_table(outcomes)
    if args.plot:
        draw(outcomes, f"split {args.dataset}, seed {args.seed}", args.plot)
    return outcomes


if __name__ == "__main__":
    main()
