"""Accuracy for a number of parameters, at the end of training: every method at its best rate.

    python benchmarks/accuracy.py --data-dir data --subjects resnet20 wrn16-1 --epochs 26 --amp
    python benchmarks/accuracy.py --data-dir data --subjects wrn40-1 --ratios paper 10 --jobs 5
        --device cuda --amp --epochs 26 --seeds 0 1 2
    python benchmarks/accuracy.py --data-dir data --subjects resnet20 --ratios 5 --epochs 10 --amp
        --choose --methods tile tile:tile=1x256 tile:optimizer=adam,lr=0.01

Networks are trained from scratch, on labels alone, with one cycle of the learning rate. For each
method the middle of its rates and its neighbours (`--rates`) are tried with a tenth of the training
set held out, on which they are compared. The best rate is then trained with, on the whole set, once
for each seed, and the test set is looked at after the last step. With `--choose` it stays at the
former: that is how methods of ours are chosen between.

A ratio is that of the dense network's parameters to those that the others may have, in all;
`paper` is the size of the paper's generator for it (arXiv 1609.09106, sec. 4.2: tiles of 16 by 16,
Nz = d = 64). Methods are those of `benchmarks/recipes.py`, and may have options, as in the third
line above.

As many runs as `--jobs` says go side by side: in a process each, or on a GPU all in one process,
where each training step is a CUDA graph on a stream of its own. Results are kept in the output
folder, one JSON file each, and what is there is not run again; a run that was interrupted goes on
from its last epoch. At the end a table is printed, and drawn if matplotlib is there. Needs tensorly
(extra `bench`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing.managers import SyncManager
from pathlib import Path
from threading import Thread
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_wrn_paper import one_cycle
from paper import (
    Run,
    in_bfloat16,
    make_run,
    one_epoch,
    penalised,
    positive,
    resume,
    suspend,
)
from train_cifar import read
from twins import Images, classified, progress_bar, train

from benchmarks.frontier import size_of
from benchmarks.lowrank import size
from benchmarks.recipes import FREE, METHODS, SUBJECTS, optimizer_of, parse
from hyperize.parts import generated_layers
from hyperize.writing import replacing

HELD_OUT = 10
"""One of so many training images is held out to choose between learning rates."""
POLL = 0.5
"""Seconds between looks at the epochs that are done."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        subject: Name of the network.
        ratio: As `--ratios` has it; empty for methods of one size.
        method: As `--methods` has it.
        rate: Factor on the method's learning rate.
        seed: Of the initialisation and the batches.
        choose: Hold out images of the training set and compare on these.
        epochs: Passes over the training set.
        batch_size: Images per step.
        amp: Compute in bfloat16.
    """

    subject: str
    ratio: str
    method: str
    rate: float
    seed: int
    choose: bool
    epochs: int
    batch_size: int
    amp: bool

    @property
    def name(self) -> str:
        """Of its files."""
        plain = "".join(c if c.isalnum() or c in "-." else "_" for c in self.method)
        return f"{self.subject}-{self.ratio}x-{plain[:40]}-{self.seed}-{digest(asdict(self))}"

    @property
    def batches(self) -> tuple[Any, ...]:
        """What the batches depend on, and how often there are some."""
        return self.seed, self.choose, self.epochs, self.batch_size, self.amp

    def __str__(self) -> str:
        size, held = (f" {self.ratio}x" if self.ratio else ""), (" held out" if self.choose else "")
        return f"{self.subject}{size} {self.method} rate {self.rate:g} seed {self.seed}{held}"


def digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Row:
    """A row of the table: a method of one size, at its best rate.

    Attributes:
        job: With the first seed.
        accuracies: Over the seeds.
        parameters: Of the network.
        bytes: Of its file in float32.
        step_ms: Median of a step's time.
    """

    job: Job
    accuracies: list[float]
    parameters: int
    bytes: int
    step_ms: float


def most_parameters(subject: str, ratio: str, classes: int) -> int:
    """The parameters that a network may have."""
    if ratio == "paper":
        return size(METHODS["paper"].build(SUBJECTS[subject], classes, 0, 0, {}))
    if not ratio:
        return 0
    return int(size(METHODS["dense"].build(SUBJECTS[subject], classes, 0, 0, {})) / float(ratio))


def halves(train: Images, test: Images, choose: bool) -> tuple[Images, Images]:
    """What to train on and what to compare on."""
    if not choose:
        return train, test
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(order), dtype=torch.bool)
    held[order[: len(order) // HELD_OUT]] = True
    held = held.to(train.labels.device)
    kept = Images(train.pixels[~held], train.labels[~held])
    return kept, Images(train.pixels[held], train.labels[held])


def work(jobs: Sequence[Job], args: argparse.Namespace, epochs: Any) -> list[dict[str, Any]]:
    """Trains, or goes on, and leaves the results in the output folder.

    Args:
        jobs: What to train; `Job.batches` is the same for all.
        args: The flags.
        epochs: A queue that gets a word for each job after each epoch.
    """
    first, settings = jobs[0], [asdict(job) for job in jobs]
    train_set, test_set = (images.to(args.device) for images in read(args.data_dir))
    trained, compared = halves(train_set, test_set, first.choose)
    per_epoch = max(1, len(trained.labels) // first.batch_size)  # the rest would be another graph
    runs = [run_of(job, per_epoch, int(trained.labels.max()) + 1, args.device) for job in jobs]
    checkpoint = args.out / f"{first.name if len(jobs) == 1 else digest(settings)}.pt"
    start = resume(checkpoint, runs, {"jobs": settings}) if checkpoint.exists() else 0
    loss, gpu = (in_bfloat16(penalised) if first.amp else penalised), args.device.startswith("cuda")
    for epoch in range(start, first.epochs):
        batches = one_epoch(trained, first.batch_size, first.seed, epoch, pad=4, flip=True)
        batches = ((to_format(images), labels) for images, labels in batches)
        train(runs, islice(batches, args.steps or per_epoch), loss, None, capture=gpu)
        suspend(checkpoint, runs, {"jobs": settings}, epoch + 1)
        epochs.put(len(jobs))
    results = []
    for job, run in zip(jobs, runs, strict=True):
        with torch.no_grad():
            accuracy = classified(run.model.eval(), compared)
        result = {
            "job": asdict(job),
            "accuracy": accuracy,
            "parameters": size(run.model),
            "bytes": size_of(run.model, 32),
            "step_ms": 1e3 * statistics.median(run.seconds[1:] or run.seconds) / len(jobs),
            "device": torch.cuda.get_device_name() if gpu else "cpu",
        }
        with replacing(args.out / f"{job.name}.json") as part:
            part.write_text(json.dumps(result))
        results.append(result)
    checkpoint.unlink()
    return results


def to_format(moved: Any) -> Any:
    """A network or images in the memory format that their device is fastest with.

    On a GPU in channels_last: a step of WRN 40-1 in bfloat16 took two thirds of the time.
    """
    tensor = moved if isinstance(moved, torch.Tensor) else next(moved.parameters())
    last = tensor.device.type == "cuda"
    return moved.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def run_of(job: Job, per_epoch: int, classes: int, device: str) -> Run:
    """A job's network at its start, with what trains it."""
    method, options = parse(job.method)
    most = most_parameters(job.subject, job.ratio, classes)
    model = method.build(SUBJECTS[job.subject], classes, most, job.seed, options)
    model = to_format(model.to(device))
    steps, recipe = job.epochs * per_epoch, method.recipe
    rate = one_cycle(recipe.lr * job.rate, steps)
    l2 = recipe.l2 if generated_layers(model) else 0.0  # ordinary kernels have it as decay
    return make_run(job.method, model, optimizer_of(model, recipe, device), rate, steps, l2)


def all_done(jobs: Sequence[Job], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of jobs, in their order; those that are not there yet are run, side by side."""
    paths = {job: args.out / f"{job.name}.json" for job in dict.fromkeys(jobs)}
    missing = [job for job, path in paths.items() if not path.exists()]
    gpu = args.device.startswith("cuda")
    parts = together(missing, args.jobs if gpu else 1)
    processes = 1 if gpu else args.jobs
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    manager = SyncManager(ctx=context)
    manager.start(end_with_parent)
    with manager, progress_bar() as progress:
        epochs = manager.Queue()
        task = progress.add_task("epochs", total=sum(job.epochs for job in missing))
        with ProcessPoolExecutor(processes, context, start, (threads,)) as pool:
            running = {pool.submit(work, part, args, epochs) for part in parts}
            while running:
                ended, running = wait(running, POLL, FIRST_COMPLETED)
                while not epochs.empty():
                    progress.update(task, advance=epochs.get())
                for result in (result for future in ended for result in future.result()):
                    print(f"{Job(**result['job'])}: {result['accuracy']:.2%}", flush=True)
    return [json.loads(paths[job].read_text()) for job in jobs]


def together(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs that see the same batches, at most so many at a time, in their order."""
    by_batches: dict[Any, list[Job]] = {}
    for job in jobs:
        by_batches.setdefault(job.batches, []).append(job)
    return [of[at : at + most] for of in by_batches.values() for at in range(0, len(of), most)]


def end_with_parent() -> None:
    """Lets this process end when the one that started it does, be it killed.

    A training that outlives its command would take a core, and write into its folder, unseen.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # as in every process but the first

    def end() -> None:
        parent.join()
        os._exit(1)

    Thread(target=end, daemon=True).start()


def start(threads: int) -> None:
    """Sets up a process."""
    end_with_parent()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def chosen(
    subject: str, ratio: str, method: str, args: argparse.Namespace
) -> tuple[list[Job], list[Job]]:
    """The trainings among which a method's rate is chosen, and those of its row in the table."""
    job = Job(
        subject=subject,
        ratio=ratio,
        method=method,
        rate=args.rates[0],
        seed=args.seeds[0],
        choose=True,
        epochs=args.epochs,
        batch_size=args.batch_size,
        amp=args.amp,
    )
    among = [replace(job, rate=rate) for rate in args.rates]
    return among, [replace(job, seed=seed, choose=args.choose) for seed in args.seeds]


def summarise(args: argparse.Namespace) -> list[Row]:
    """Trains all that is asked for and is not there, and makes the table's rows."""
    asked = dict.fromkeys(
        (subject, "" if method.partition(":")[0] in FREE else ratio, method)
        for subject in args.subjects
        for ratio in args.ratios
        for method in args.methods
    )
    rows = {names: chosen(*names, args) for names in asked}
    tried = [job for among, _ in rows.values() for job in among]
    found = dict(zip(tried, all_done(tried, args) if len(args.rates) > 1 else [], strict=False))
    wanted = []
    for among, of_row in rows.values():
        best = max(among, key=lambda job: found[job]["accuracy"] if found else 0)
        wanted.append([replace(job, rate=best.rate) for job in of_row])
    results = iter(all_done([job for of_row in wanted for job in of_row], args))
    return [row_of(of_row, [next(results) for _ in of_row]) for of_row in wanted]


def row_of(jobs: Sequence[Job], results: Sequence[dict[str, Any]]) -> Row:
    return Row(
        job=jobs[0],
        accuracies=[result["accuracy"] for result in results],
        parameters=results[0]["parameters"],
        bytes=results[0]["bytes"],
        step_ms=statistics.median(result["step_ms"] for result in results),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| network | method | learning rate | parameters | bytes | step | accuracy | seeds |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        method, _ = parse(row.job.method)
        spread = f" ± {100 * statistics.stdev(row.accuracies):.2f}" if row.accuracies[1:] else ""
        lines.append(
            f"| {row.job.subject} | {row.job.method} | {method.recipe.lr * row.job.rate:g} "
            f"| {row.parameters:,} | {row.bytes:,} | {row.step_ms:.1f} ms "
            f"| {statistics.mean(row.accuracies):.2%}{spread} | {len(row.accuracies)} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], subject: str, of: str, path: Path) -> None:
    """Accuracy over parameters, a line for each method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for at, name in enumerate(dict.fromkeys(row.job.method for row in rows)):
        line = sorted((r for r in rows if r.job.method == name), key=lambda row: row.parameters)
        axes.errorbar(
            [row.parameters for row in line],
            [100 * statistics.mean(row.accuracies) for row in line],
            [100 * statistics.stdev(r.accuracies) if r.accuracies[1:] else 0 for r in line],
            color=f"C{at % 10}",
            marker="o" if at < 10 else "s",
            capsize=3,
            label=name,
        )
    axes.set(xscale="log", xlabel="parameters", ylabel=f"accuracy, {of} (%)", title=subject)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("--data-dir", type=Path, required=True, help="as of examples/train_cifar.py")
    names = ", ".join(SUBJECTS)
    known = list(SUBJECTS)
    flag("--subjects", nargs="+", default=known[:1], choices=known, metavar="NET", help=names)
    flag("--methods", nargs="+", default=list(METHODS), metavar="M", help="name or name:a=1,b=2")
    flag("--ratios", nargs="+", type=ratio, default=["6", "10"], metavar="X", help="or paper")
    flag("--rates", nargs="+", type=float, default=[0.5, 1.0, 2.0], metavar="F", help="factors")
    flag("--seeds", nargs="+", type=int, default=[0], metavar="S", help="of the final trainings")
    flag("--epochs", type=positive, default=26, metavar="N", help="passes over the data")
    flag("--steps", type=positive, metavar="N", help="stop each epoch after so many, for a try")
    flag("--batch-size", type=positive, default=128, metavar="N", help="images per step")
    flag("--amp", action="store_true", help="compute in bfloat16")
    flag("--choose", action="store_true", help="compare on held out images only")
    flag("--jobs", type=positive, default=1, metavar="N", help="trainings side by side")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    flag("--out", type=Path, default=Path("runs/accuracy"), help="folder of the results")
    return parser


def ratio(text: str) -> str:
    """An argparse type: a number above 1, or `paper`."""
    if text != "paper" and float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 1, or paper, got {text}")
    return text


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        for method in args.methods:
            parse(method)
        read(args.data_dir)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        rows = summarise(args)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start again to go on") from None
    of = "held out" if args.choose else "test set"
    text = table(rows)
    print(f"\n{args.epochs} epochs, {of}\n\n{text}")
    (args.out / "accuracy.md").write_text(text)
    try:
        for subject in args.subjects:
            mine = [row for row in rows if row.job.subject == subject]
            draw(mine, subject, of, args.out / f"{subject}.png")
    except ImportError:
        print("no picture: matplotlib is missing (extra plot)")
    return rows


if __name__ == "__main__":
    main()
