"""What a pretrained network is worth after compression: ours beside what else one could pick.

    python benchmarks/compress.py --data-dir data --checkpoint resnet20.safetensors --epochs 2
    python benchmarks/compress.py --data-dir data --checkpoint resnet56.safetensors
        --model resnet56 --methods channel thin tucker
    python benchmarks/compress.py --data-dir data --checkpoint resnet20.safetensors --epochs 10
        --kd-weight 0 --ratios 5 10 --methods scratch scratch-tile thin --seed 1
    python benchmarks/compress.py --data-dir data --checkpoint resnet20.safetensors --epochs 1
        --ratios 2 4 10 --methods continued channel thin svd tucker cp --bit-steps 100

Every method gets as many parameters as ours or fewer, the same data, batches, schedule and
distillation from the same teacher (`examples/compress_pretrained.py`). Those that start from
trained weights have the learning rate `--lr`, those that start from scratch `--scratch-lr`:

    channel       hyperize with embeddings of channels, then fit_ with data
    fit           hyperize, then fit_ with data
    free          the same, fitted without data
    scratch       hyperize with embeddings of channels, at its random start
    scratch-tile  hyperize, at its random start
    thin          a narrower network, at its random start
    dense         the network itself, at its random start
    continued     the network itself, trained on for as long as the others
    svd           each convolution as two, by truncated SVD
    tucker        each as three, by tensorly's partial_tucker over the channels
    cp            each as four, by tensorly's parafac

With `--bit-steps` each trained model is then written in 32, 16, 8 and 4 bits, as it is and after so
many steps with the rounding (a tenth of the learning rate, all methods alike), and the accuracies
are drawn over the lengths of the files.

Results are kept in the output folder, one JSON file each; what is there is not run again. At the
end a table of all seeds found there with the same settings is printed, and drawn if matplotlib is
there. Needs tensorly (extra `bench`).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from compress_pretrained import (
    Data,
    fine_tune,
    load_teacher,
    make_student_run,
    number,
    read_data,
    taught_loss,
)
from compress_pretrained import make_parser as make_compress_parser
from paper import SEEDS, Run, steps_per_epoch
from train_cifar import SIZES, ResNet
from twins import predicted, shuffled, steps_of, train

from benchmarks import frontier
from benchmarks.lowrank import Replace, cp, shrunk, size, svd, tucker
from hyperize import fit_, hyperize
from hyperize.parts import generated_layers

SETTINGS = (
    "epochs", "steps", "batch_size", "weight_decay", "kd_temperature", "kd_weight", "amp",
    "fit_samples", "mean", "std", "bit_steps",
)  # fmt: skip
"""Flags that a result depends on, besides those that differ between methods."""
OTHERS = ("thin", "dense", "continued", "svd", "tucker", "cp")
"""Methods that have nothing to do with hyperize."""


@dataclass(frozen=True)
class Row:
    """A row of the table: a method's test accuracies over its seeds.

    Attributes:
        method: One of `METHODS`.
        ratio: Of the compression.
        parameters: Of the model.
        before: Mean accuracy before training.
        after: Mean accuracy after it.
        spread: Standard deviation of the latter, of two seeds or more.
        seeds: How many.
    """

    method: str
    ratio: float
    parameters: int
    before: float
    after: float
    spread: float | None
    seeds: int


def ours(teacher: nn.Module, ratio: float, args: argparse.Namespace, **options: Any) -> nn.Module:
    return hyperize(teacher, compression=ratio, exclude="conv1", seed=args.seed, **options)


def fitted(embeddings: str) -> Callable[..., nn.Module]:
    """A method that fits ours to the teacher with data."""

    def method(teacher: nn.Module, ratio: float, args: argparse.Namespace, data: Data) -> nn.Module:
        model = ours(teacher, ratio, args, embeddings=embeddings)
        fit_(model, teacher, data=data.sample(args.fit_samples, args.batch_size, args.seed))
        return model

    return method


def free(teacher: nn.Module, ratio: float, args: argparse.Namespace, data: Data) -> nn.Module:
    model = ours(teacher, ratio, args)
    fit_(model, teacher)
    # Estimated for every method, so that weights alone are compared
    update_bn(data.sample(args.fit_samples, args.batch_size, args.seed), model)
    return model


def scratch(embeddings: str) -> Callable[..., nn.Module]:
    """A method that starts ours at random."""

    def method(teacher: nn.Module, ratio: float, args: argparse.Namespace, data: Data) -> nn.Module:
        return ours(dense(teacher, ratio, args, data), ratio, args, embeddings=embeddings)

    return method


def dense(teacher: nn.Module, ratio: float, args: argparse.Namespace, data: Data) -> nn.Module:
    torch.manual_seed(args.seed)
    return ResNet(SIZES[args.model], data.classes)


def continued(teacher: nn.Module, ratio: float, args: argparse.Namespace, data: Data) -> nn.Module:
    return copy.deepcopy(teacher)


def thin(teacher: nn.Module, ratio: float, args: argparse.Namespace, data: Data) -> nn.Module:
    most = size(ours(teacher, ratio, args))
    torch.manual_seed(args.seed)
    models = [ResNet(SIZES[args.model], data.classes, width) for width in range(1, 16)]
    return max((m for m in models if size(m) <= most), key=size)


def decomposed(replace: Replace) -> Callable[..., nn.Module]:
    """A method that replaces every convolution that ours generates."""

    def method(teacher: nn.Module, ratio: float, args: argparse.Namespace, data: Data) -> nn.Module:
        hyper = ours(teacher, ratio, args)
        model = shrunk(teacher, generated_layers(hyper), replace, size(hyper), 1.0 / ratio)
        update_bn(data.sample(args.fit_samples, args.batch_size, args.seed), model)
        return model

    return method


METHODS: dict[str, Callable[..., nn.Module]] = {
    "channel": fitted("channel"),
    "fit": fitted("tile"),
    "free": free,
    "scratch": scratch("channel"),
    "scratch-tile": scratch("tile"),
    "thin": thin,
    "dense": dense,
    "continued": continued,
    "svd": decomposed(svd),
    "tucker": decomposed(tucker),
    "cp": decomposed(cp),
}
FROM_SCRATCH = ("scratch", "scratch-tile", "thin", "dense")
CALLED = {"channel": "hyperize", "continued": "dense", "dense": "dense-from-scratch"}
"""What the frontier calls methods that are not called so there."""
WHOLE = ("dense", "continued")
"""Methods without a ratio, which run once."""


def run(
    name: str, ratio: float, teacher: nn.Module, data: Data, args: argparse.Namespace
) -> dict[str, Any]:
    """Compresses and fine-tunes by one method; or reads what an earlier run has found."""
    lr = args.scratch_lr if name in FROM_SCRATCH else args.lr
    settings = {"model": args.model, "method": name, "ratio": ratio, "lr": lr, "seed": args.seed}
    settings |= {flag: getattr(args, flag) for flag in SETTINGS}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    path = args.out / f"{args.model}-{ratio:g}x-{name}-seed{args.seed}-{digest}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.perf_counter()
    model = METHODS[name](teacher, ratio, args, data)
    seconds = time.perf_counter() - start
    before = data.accuracy(data.predict(model))
    steps = steps_of(args, data.train)
    student = make_student_run(model, steps, argparse.Namespace(**vars(args) | {"lr": lr}))
    curve = []
    for epoch in range(math.ceil(student.steps / steps_per_epoch(data.train, args.batch_size))):
        fine_tune(student, teacher, data, epoch, args)
        curve.append(data.accuracy(data.predict(model)))
    result = {
        "settings": settings,
        "parameters": size(model),
        "before": before,
        "curve": curve,
        "preparation_s": seconds,
        "files": files(model, teacher, data, lr, args) if args.bit_steps else [],
    }
    path.write_text(json.dumps(result))
    return result


def files(
    model: nn.Module, teacher: nn.Module, data: Data, lr: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """What a trained model's files are worth."""

    def accuracy(compute: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return data.accuracy(predicted(lambda x: compute(data.normalise(x)), data.test))

    def train_on(model: nn.Module, bits: int) -> None:
        flags = argparse.Namespace(**vars(args) | {"lr": frontier.FALL * lr})
        run = make_student_run(model, args.bit_steps, flags)
        compute = frontier.in_bits(model, bits)
        batches = shuffled(data.train, args.batch_size, -1 - args.seed * SEEDS, pad=4, flip=True)

        def loss(run: Run, images: Tensor, labels: Tensor) -> Tensor:
            return taught_loss(compute, teacher, data.normalise(images), labels, args)

        train([run], batches, loss, f"{bits} bits")
        model.eval()

    return frontier.measure(model.eval(), accuracy, train_on)


def shown(folder: Path, wanted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files of all results, means over the seeds that a folder has for each."""
    seeds = by_settings(folder)
    rows = []
    for result in wanted:
        found = seeds[json.dumps(result["settings"] | {"seed": None})]
        method, ratio = (result["settings"][name] for name in ("method", "ratio"))
        name = CALLED.get(method, method)
        for at, first in enumerate(result["files"]):
            trained = [r["files"][at]["trained"] for r in found]
            row = {"name": name if method in WHOLE else f"{name} {ratio:g}x", "bits": first["bits"]}
            row |= {
                "bytes": round(statistics.mean(r["files"][at]["bytes"] for r in found)),
                "as_is": statistics.mean(r["files"][at]["as_is"] for r in found),
                "trained": statistics.mean(trained),
                "spread": statistics.stdev(trained) if len(trained) > 1 else None,
            }
            rows.append(row)
    return rows


def by_settings(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results in a folder by all their settings but the seed."""
    seeds: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        seeds.setdefault(json.dumps(result["settings"] | {"seed": None}), []).append(result)
    return seeds


def summarise(folder: Path, wanted: Sequence[dict[str, Any]]) -> list[Row]:
    """The mean over all seeds that a folder has for each of some settings."""
    seeds = by_settings(folder)
    rows = []
    for result in wanted:
        found = seeds[json.dumps(result["settings"] | {"seed": None})]
        after = [r["curve"][-1] for r in found]
        rows.append(
            Row(
                method=result["settings"]["method"],
                ratio=result["settings"]["ratio"],
                parameters=result["parameters"],
                before=statistics.mean(r["before"] for r in found),
                after=statistics.mean(after),
                spread=statistics.stdev(after) if len(after) > 1 else None,
                seeds=len(found),
            )
        )
    return rows


def print_table(rows: Sequence[Row]) -> None:
    print("\n| | method | parameters | before | after training | seeds |")
    print("|---|---|---:|---:|---:|---:|")
    for row in rows:
        spread = "" if row.spread is None else f" ± {100 * row.spread:.2f}"
        print(
            f"| {row.ratio:g}x | {row.method} | {row.parameters:,} | {row.before:.2%} "
            f"| {row.after:.2%}{spread} | {row.seeds} |"
        )


def draw(
    rows: Sequence[Row],
    name: str,
    taught: float,
    path: Path,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Accuracy before and after training, one group of bars per ratio.

    Args:
        rows: Of the table.
        name: Of the network and the data.
        taught: The teacher's accuracy.
        path: The PNG file to write.
        notes: Text for the file's metadata.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ratios = sorted({row.ratio for row in rows})
    figure = Figure(figsize=(4.2 * len(ratios), 3.8), layout="constrained")
    panels = figure.subplots(1, len(ratios), squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        shown = [row for row in rows if row.ratio == ratio]
        names = [row.method for row in shown]
        colors = ["C7" if name in OTHERS else "C0" for name in names]
        spread = [100 * (row.spread or 0) for row in shown]
        bars = axes.barh(names, [100 * row.after for row in shown], xerr=spread, color=colors)
        axes.barh(names, [100 * row.before for row in shown], color="white", alpha=0.45)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, fmt="%.1f", padding=3, bbox=white, zorder=3)
        teacher = axes.axvline(100 * taught, color="C3", lw=1, label="the teacher, not trained on")
        axes.set(title=f"{ratio:g}x", xlabel="test accuracy (%)", xlim=(0, 100))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    stages = [
        (Patch(color=color, alpha=alpha), f"{whose}, {when}")
        for color, whose in (("C0", "hyperize"), ("C7", "others"))
        for alpha, when in ((0.55, "before training"), (1, "after"))
    ]
    handles, labels = zip(*stages, (teacher, teacher.get_label()), strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(name)
    figure.savefig(path, dpi=120, metadata=notes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_compress_parser()
    parser.description = __doc__.splitlines()[0]
    parser.set_defaults(out=Path("runs/compress_benchmark"))
    flag = parser.add_argument
    flag("--ratios", type=float, nargs="+", default=[4.0, 10.0], metavar="X")
    flag("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    flag("--scratch-lr", type=float, default=1e-2, metavar="LR")
    at_least_0 = number(lambda x: x >= 0, "at least 0", int)
    flag("--bit-steps", type=at_least_0, default=0, metavar="N", help="0: write no files")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        data = read_data(args)
        teacher = load_teacher(args, data)
    except ValueError as error:
        parser.error(str(error))
    taught = data.accuracy(data.predict(teacher))
    print(f"{args.model}: {size(teacher):,} parameters, {taught:.2%}", flush=True)
    results = []
    for ratio in args.ratios:
        for name in args.methods:
            if name in WHOLE and ratio != args.ratios[0]:
                continue
            result = run(name, ratio, teacher, data, args)
            results.append(result)
            print(f"{ratio:g}x {name}: {result['before']:.2%}", end="")
            print("", *(f"{accuracy:.2%}" for accuracy in result["curve"]), flush=True)
    rows = summarise(args.out, results)
    print_table(rows)
    written = shown(args.out, results) if args.bit_steps else []
    if written:
        frontier.print_table(written)
    try:
        draw(rows, args.model, taught, args.out / f"{args.model}.png")
        if written:
            frontier.draw(written, args.model, taught, args.out / f"{args.model}-files.png")
    except ImportError:
        print("no picture: matplotlib is missing (extra plot)")


if __name__ == "__main__":
    main()
