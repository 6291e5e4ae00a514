"""Personalised federated learning: one generator makes a network for each client.

    python examples/federated.py --data-dir data
    python examples/federated.py --data-dir data --seeds 0 1 2
    python examples/federated.py --data-dir data --visits 5000 --tune    # the long run

Each of twenty clients has images of two classes of CIFAR-10 and shows them to nobody; all happens
in one process. Four ways, judged by the mean accuracy of the clients on the test images of their
own two classes:

    generated            a generator on the server makes the network of a client from a vector of
                         few numbers. What the client's training changes in the weights is pulled
                         back through the generator, as the gradient of generator and vector
                         (pFedHN-PC: Shamsian et al. 2021, arXiv 2103.04628, algorithm 1). The last
                         layer is the client's own and stays there.
    FedAvg               one network for all: the mean of what a round's clients have made of it
                         (McMahan et al. 2017, arXiv 1602.05629)
    FedAvg, own heads    the same, but the last layer is the client's own and stays there
                         (Arivazhagan et al. 2019, arXiv 1912.00818)
    local                a network for each client, on its own images alone

A visit is some steps of SGD on one client. All ways start from the same network and have as many
visits to each client. The folder `--out` receives

    checkpoint.pt    what a run that was killed goes on from, when started with the same flags
    results.json     the accuracies of all clients
    clients.png      the same as a plot, if matplotlib is installed

The clients' learning rates in `RATES` were chosen as `--tune` does it, which trains on four fifths
of the clients' training images and judges by the rest. Test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paper import SEEDS, positive, read_checkpoint, settings_of, write_checkpoint
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from train_cifar import read
from twins import Images, classified, progress_bar, refuse, to_floats

from hyperize import HyperizeError, condition, hyperize, make_plan, to_dense

CLIENTS = 20
CLASSES = 2
"""Of a client."""
HELD_OUT = 5
"""One of so many training images of a client is held out when learning rates are chosen."""
RATES = {"generated": 0.01, "FedAvg": 0.02, "FedAvg, own heads": 0.01, "local": 0.02}
"""Learning rates of the clients in each way."""
GRID = (0.005, 0.01, 0.02, 0.04)
"""Those that `--tune` tries."""
CHECKPOINT = "checkpoint.pt"
STEPS = 500
"""From one checkpoint to the next, at least."""


@dataclass(frozen=True)
class Client:
    """The images of a client."""

    train: Images
    test: Images


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        way: As in `WAYS`.
        seed: Of the division of the images, the start, the order of visits and the batches.
        rate: Learning rate of the clients.
        tuning: Whether held-out images judge it.
    """

    way: str
    seed: int
    rate: float
    tuning: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a job has ended.

    Attributes:
        job: The training.
        params: Parameters of all that is kept for all clients.
        accuracies: Of the clients.
    """

    job: Job
    params: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Mean accuracy over the clients."""
        return statistics.fmean(self.accuracies)


class Network(nn.Module):
    """Features, and a head of one linear layer."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        scores: Tensor = self.head(self.features(images))
        return scores


def make_network(classes: int) -> Network:
    """Two convolutions and three linear layers, as those of Shamsian et al."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 16, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 5 * 5, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
    )
    return Network(features, nn.Linear(84, classes))


Visit = tuple[int, Network, Network]
"""A client, with its network before and after."""


class Way(nn.Module):
    """What is kept between two rounds, on the server and on the clients.

    Attributes:
        clients_per_round: Clients that train at the same time.
    """

    clients_per_round = 1

    def __init__(self, start: Network, args: argparse.Namespace) -> None:
        super().__init__()

    def network(self, k: int) -> Network:
        """The network of a client, as the client gets it."""
        raise NotImplementedError

    def receive(self, visits: list[Visit]) -> None:
        """Takes in what the visits of a round have brought."""
        raise NotImplementedError


class Local(Way):
    """A network for each client, which no other one sees."""

    def __init__(self, start: Network, args: argparse.Namespace) -> None:
        super().__init__(start, args)
        self.networks = copies(start)

    def network(self, k: int) -> Network:  # noqa: D102
        own = copy.deepcopy(self.networks[k])
        assert isinstance(own, Network)
        return own

    def receive(self, visits: list[Visit]) -> None:  # noqa: D102
        for k, _, after in visits:
            self.networks[k].load_state_dict(after.state_dict())


class FedAvg(Way):
    """One network for all."""

    clients_per_round = CLIENTS

    def __init__(self, start: Network, args: argparse.Namespace) -> None:
        super().__init__(start, args)
        self.shared = copy.deepcopy(start)

    def network(self, k: int) -> Network:  # noqa: D102
        return copy.deepcopy(self.shared)

    def receive(self, visits: list[Visit]) -> None:  # noqa: D102
        average(dict(self.shared.named_parameters()), [after for _, _, after in visits])


class OwnHeads(Way):
    """The same features for all, and heads that stay on their clients."""

    def __init__(self, start: Network, args: argparse.Namespace) -> None:
        super().__init__(start, args)
        self.features = copy.deepcopy(start.features)
        self.heads = copies(start.head)

    def network(self, k: int) -> Network:  # noqa: D102
        return Network(copy.deepcopy(self.features), copy.deepcopy(self.heads[k]))

    def receive(self, visits: list[Visit]) -> None:  # noqa: D102
        average(dict(self.features.named_parameters()), [after.features for _, _, after in visits])
        for k, _, after in visits:
            self.heads[k].load_state_dict(after.head.state_dict())


class Generated(Way):
    """A generator and a vector for each client on the server, and heads on the clients."""

    def __init__(self, start: Network, args: argparse.Namespace) -> None:
        super().__init__(start, args)
        plan = make_plan(
            start.features,
            condition_dim=args.vector,
            compression=args.compression,
            targets=("conv2d", "linear"),
            embeddings="channel",
            share=True,  # all clients start equal, as in the other ways
            seed=0,
        )
        self.hyper = hyperize(start.features, plan)
        self.vectors = nn.Parameter(torch.randn(CLIENTS, args.vector))
        self.heads = copies(start.head)
        self.weights = [planned.site.name for planned in plan.sites]
        params = dict(self.hyper.named_parameters())
        biases = [name for name, _ in start.features.named_parameters() if name not in self.weights]
        self.biases = {name: params.pop(name) for name in biases}
        self.optimizer = torch.optim.Adam([self.vectors, *params.values()], args.lr)

    def get_extra_state(self) -> dict[str, Any]:  # noqa: D102
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:  # noqa: D102
        self.optimizer.load_state_dict(state)

    def network(self, k: int) -> Network:  # noqa: D102
        features = to_dense(self.hyper, condition=self.vectors[k].detach())
        return Network(features, copy.deepcopy(self.heads[k]))

    def receive(self, visits: list[Visit]) -> None:
        """Pulls what has changed in the weights back through the generator."""
        self.optimizer.zero_grad()
        for k, before, after in visits:
            old, new = (dict(network.features.named_parameters()) for network in (before, after))
            with condition(self.hyper, self.vectors[k]):
                weights = [self._weight(name) for name in self.weights]
            # The vector-Jacobian product: what has changed stands for the gradient of the weights
            torch.autograd.backward(weights, [(old[n] - new[n]).detach() for n in self.weights])
            self.heads[k].load_state_dict(after.head.state_dict())
        self.optimizer.step()
        average(self.biases, [after.features for _, _, after in visits])

    def _weight(self, name: str) -> Tensor:
        """A weight of the network that the condition names."""
        path, _, param = name.rpartition(".")
        weight: Tensor = getattr(self.hyper.get_submodule(path), param)
        return weight


def copies(module: nn.Module) -> nn.ModuleList:
    """One for each client."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(CLIENTS))


@torch.no_grad()
def average(params: dict[str, nn.Parameter], networks: Sequence[nn.Module]) -> None:
    """Sets parameters to the means of those of the same names in networks."""
    own = [dict(network.named_parameters()) for network in networks]
    for name, param in params.items():
        param.copy_(torch.stack([by_name[name] for by_name in own]).mean(0))


WAYS: dict[str, type[Way]] = {
    "generated": Generated,
    "FedAvg": FedAvg,
    "FedAvg, own heads": OwnHeads,
    "local": Local,
}


def divided(train: Images, test: Images, seed: int) -> list[Client]:
    """Gives each client two classes, and each class to as many clients as any other.

    The training images of a class are divided among its clients; each has all of its test images.

    Raises:
        ValueError: The classes do not come out even, or have too few images.
    """
    classes = int(train.labels.max()) + 1
    if classes % CLASSES or CLIENTS * CLASSES % classes:
        raise ValueError(
            f"{CLIENTS} clients with {CLASSES} classes each want a number of classes that is even "
            f"and divides {CLIENTS * CLASSES}, such as 10; got {classes}"
        )
    generator = torch.Generator().manual_seed(seed)
    share = CLIENTS * CLASSES // classes
    # A permutation of the classes serves some clients whole, so that no client has one class twice
    hands = torch.cat([torch.randperm(classes, generator=generator) for _ in range(share)])
    parts = []
    for label in range(classes):
        at = (train.labels == label).nonzero().flatten().cpu()
        if len(at) < share * HELD_OUT:
            raise ValueError(
                f"each class wants at least {share * HELD_OUT} training images; class {label} has "
                f"{len(at)}"
            )
        parts.append(iter(at[torch.randperm(len(at), generator=generator)].tensor_split(share)))
    clients = []
    for hand in hands.view(CLIENTS, CLASSES).tolist():
        own = torch.cat([next(parts[label]) for label in hand]).to(train.labels.device)
        seen = torch.isin(test.labels, torch.tensor(hand, device=test.labels.device))
        clients.append(
            Client(
                Images(train.pixels[own], train.labels[own]),
                Images(test.pixels[seen], test.labels[seen]),
            )
        )
    return clients


def held_out(client: Client) -> Client:
    """A client that is judged by a part of its training images."""
    at = torch.arange(len(client.train.labels), device=client.train.labels.device)
    halves = [at[at % HELD_OUT != 0], at[at % HELD_OUT == 0]]
    return Client(*(Images(client.train.pixels[i], client.train.labels[i]) for i in halves))


def rounds_of(job: Job, per_round: int, args: argparse.Namespace) -> list[list[int]]:
    """The clients of each round: all of them in a new order, again and again."""
    generator = torch.Generator().manual_seed(job.seed)
    orders = [torch.randperm(CLIENTS, generator=generator) for _ in range(args.visits // CLIENTS)]
    return [ks.tolist() for ks in torch.cat(orders).split(per_round)]


def visit(
    network: Network, images: Images, steps: int, batch_size: int, rate: float, seed: int
) -> None:
    """What happens on a client: some steps of SGD, as Shamsian et al. take them."""
    network.to(memory_format=torch.channels_last).train()  # faster on a CPU
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-5)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(images.labels), (batch_size,), generator=generator)
        at = at.to(images.labels.device)
        optimizer.zero_grad()
        F.cross_entropy(network(to_floats(images.pixels[at])), images.labels[at]).backward()
        optimizer.step()


def trained(
    job: Job,
    clients: list[Client],
    args: argparse.Namespace,
    progress: Progress,
    running: dict[str, Any] | None,
    keep: Callable[[dict[str, Any]], None],
) -> Outcome:
    """Trains one way, or goes on with it.

    Args:
        job: The training.
        clients: What they have.
        args: The flags.
        progress: Gets a bar for the time.
        running: What `keep` was given last; None at the start.
        keep: Takes all that is needed to go on.
    """
    torch.manual_seed(job.seed)
    start = make_network(1 + max(int(client.train.labels.max()) for client in clients))
    way = WAYS[job.way](start, args).to(args.device)
    rounds = rounds_of(job, way.clients_per_round, args)
    steps = args.steps
    if isinstance(way, Local):  # who waits for nobody takes all steps at once
        rounds, steps = [[k] for k in range(CLIENTS)], steps * (args.visits // CLIENTS)
    done = since = 0
    if running is not None:
        way.load_state_dict(running["way"])
        done = running["rounds"]
    title = f"{job.way}, rate {job.rate}" if job.tuning else f"{job.way}, seed {job.seed}"
    task = progress.add_task(title, total=len(rounds), completed=done)
    for number in range(done, len(rounds)):
        visits = []
        for k in rounds[number]:
            before = way.network(k)
            after = copy.deepcopy(before)
            seed = job.seed * SEEDS + number * CLIENTS + k  # the same whenever the round is run
            visit(after, clients[k].train, steps, args.batch_size, job.rate, seed)
            visits.append((k, before, after))
        way.receive(visits)
        progress.update(task, advance=1)
        since += len(visits) * steps
        if since >= STEPS:
            since = 0
            keep({"job": asdict(job), "rounds": number + 1, "way": way.state_dict()})
    with torch.no_grad():
        accuracies = [
            classified(way.network(k).eval(), client.test) for k, client in enumerate(clients)
        ]
    progress.remove_task(task)
    return Outcome(job, sum(param.numel() for param in way.parameters()), accuracies)


def outcomes_of(
    jobs: Sequence[Job],
    sets: tuple[Images, Images],
    args: argparse.Namespace,
    state: dict[str, Any],
) -> list[Outcome]:
    """Trains what is not trained yet.

    Args:
        jobs: The trainings.
        sets: Images for training and for testing, of all clients together.
        args: The flags.
        state: What the checkpoint holds, or will; brought up to date.
    """

    def keep(running: dict[str, Any] | None) -> None:
        state["running"] = running
        write_checkpoint(args.out / CHECKPOINT, state)

    with progress_bar() as progress:
        for job in jobs:
            if any(known["job"] == asdict(job) for known in state["outcomes"]):
                continue
            clients = divided(*sets, job.seed)
            if job.tuning:
                clients = [held_out(client) for client in clients]
            running = state["running"]
            running = running if running and running["job"] == asdict(job) else None
            outcome = trained(job, clients, args, progress, running, keep)
            state["outcomes"].append(asdict(outcome))
            keep(None)
    by_job = {Job(**known["job"]): known for known in state["outcomes"]}
    return [Outcome(job, by_job[job]["params"], by_job[job]["accuracies"]) for job in jobs]


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Prints one row per way: means over its seeds, and their deviation."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in ("mean client accuracy", "worst client", "parameters"):
        table.add_column(name, justify="right")
    for way, rows in grouped(outcomes).items():
        figures = [[row.mean for row in rows], [min(row.accuracies) for row in rows]]
        table.add_row(way, *(spread(values) for values in figures), f"{rows[0].params:,}")
    Console(width=80, highlight=False).print(table)


def print_tuning(outcomes: Sequence[Outcome]) -> None:
    """Prints the accuracy on held-out images for each way and learning rate."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("held-out images, rate of clients")
    for rate in GRID:
        table.add_column(f"{rate}", justify="right")
    for way, rows in grouped(outcomes).items():
        table.add_row(way, *(f"{row.mean:.2%}" for row in rows))
    Console(width=80, highlight=False).print(table)


def grouped(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each way."""
    return {way: [o for o in outcomes if o.job.way == way] for way in WAYS}


def spread(values: Sequence[float]) -> str:
    """The mean, with the standard deviation if there is one."""
    text = f"{statistics.fmean(values):.2%}"
    return f"{text} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else text


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Draws the accuracy of the clients, worst to best, in the mean over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for way, rows in grouped(outcomes).items():
        ranked = zip(*(sorted(row.accuracies) for row in rows), strict=True)
        means = [100 * statistics.fmean(values) for values in ranked]
        label = f"{way}: {statistics.fmean(means):.1f}, {rows[0].params:,}"
        axes.plot(range(1, CLIENTS + 1), means, marker=".", label=label)
    axes.set(xlabel="clients, worst to best", ylabel="accuracy on their classes (%)", title=title)
    axes.set_ylim(bottom=100 / CLASSES)  # one network for all is mostly below a guess
    axes.set_xticks(range(1, CLIENTS + 1))
    axes.legend(frameon=False, fontsize=8, title="mean, parameters of all networks")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Trains all ways.

    Returns:
        How they end, on test images.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data-dir", type=Path, required=True, help="as of train_cifar.py")
    flag(
        "--out",
        type=Path,
        default=Path("runs/federated"),
        metavar="DIR",
        help="folder of the results; a run found there is resumed (default: %(default)s)",
    )
    flag(
        "--visits",
        type=positive,
        default=600,
        metavar="N",
        help=f"to clients in all, a multiple of {CLIENTS} (default: %(default)s)",
    )
    flag("--steps", type=positive, default=20, metavar="N", help="of a visit (%(default)s)")
    flag("--batch-size", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    flag("--lr", type=float, default=3e-3, help="of the generator (default: %(default)s)")
    flag("--vector", type=positive, default=6, metavar="N", help="numbers of one (%(default)s)")
    flag("--compression", type=float, default=1.5, metavar="X", help="(default: %(default)s)")
    flag("--tune", action="store_true", help="choose the clients' learning rates first")
    flag("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    cuda = torch.cuda.is_available()
    flag("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.visits % CLIENTS:
        parser.error(f"--visits must be a multiple of {CLIENTS}, the clients; got {args.visits}")
    settings = {n: v for n, v in settings_of(args).items() if n not in ("seeds", "tune")}
    state: dict[str, Any] = {"settings": settings, "outcomes": [], "running": None}
    try:
        train, test = (half.to(args.device) for half in read(args.data_dir))
        divided(train, test, 0)  # found wanting now rather than in the middle
    except (FileNotFoundError, ValueError) as error:
        refuse(parser, f"--data-dir {error}")
    try:
        Generated(make_network(1 + int(train.labels.max())), args)
        args.out.mkdir(parents=True, exist_ok=True)
        if (checkpoint := args.out / CHECKPOINT).exists():
            state = read_checkpoint(checkpoint, settings)
            print(f"resumed with {len(state['outcomes'])} trainings done: {checkpoint}")
    except (HyperizeError, OSError, ValueError) as error:
        refuse(parser, error)
    try:
        rates = RATES
        if args.tune:
            jobs = [Job(way, args.seeds[0], rate, True) for way in WAYS for rate in GRID]
            tuned = outcomes_of(jobs, (train, test), args, state)
            print_tuning(tuned)
            best = {
                way: max(rows, key=lambda row: row.mean) for way, rows in grouped(tuned).items()
            }
            rates = {way: row.job.rate for way, row in best.items()}
        jobs = [Job(way, seed, rates[way]) for seed in args.seeds for way in WAYS]
        outcomes = outcomes_of(jobs, (train, test), args, state)
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted; the same command goes on from {args.out}\n")
    print_table(outcomes)
    text = json.dumps([asdict(row) for row in outcomes], indent=1)
    (args.out / "results.json").write_text(text, encoding="utf-8")
    seeds = f"seed {args.seeds[0]}" if len(args.seeds) == 1 else f"{len(args.seeds)} seeds"
    try:
        draw(
            outcomes,
            f"{CLIENTS} clients, {CLASSES} classes each, {seeds}",
            args.out / "clients.png",
        )
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"results, plot and checkpoint: {args.out}")
    return outcomes


if __name__ == "__main__":
    main()
