"""Compresses a pretrained classifier: fits a generator to its weights, then fine-tunes it.

    python examples/compress_pretrained.py --data-dir data --checkpoint resnet20.safetensors
    python examples/compress_pretrained.py --data-dir data --model resnet18.a1_in1k --pretrained

The pretrained model is the teacher. A hyperized copy is fitted to its weights (`hyperize.fit_`),
which takes seconds, and then trained to give its outputs and the labels (distillation, arXiv
1503.02531). The output folder then holds

    hyper.safetensors    the small file, for `hyperize.load`
    dense.safetensors    the weights that it generates: a plain state dict of the original model
    accuracy.png         the accuracies on the way, if matplotlib is installed
    checkpoint.pt        what a run that was killed goes on from, when started with the same flags

`--data-dir` is what `train_cifar.py` reads; training images are cropped and flipped as there.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from paper import (
    SEEDS,
    Run,
    make_run,
    one_epoch,
    positive,
    resume,
    settings_of,
    steps_per_epoch,
    suspend,
)
from paper import make_parser as make_paper_parser
from quickstart import convert
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torchvision.transforms import Normalize
from train_cifar import SIZES, create_model, read
from twins import Images, predicted, refuse, steps_of, to_floats, train

from hyperize import HyperizeError, fit_, hyperize, param_groups, report, save

WARM_UP = 0.2
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Data:
    """Images as the pretrained model takes them.

    Attributes:
        train: The training set.
        test: The test set.
        normalise: From floats of -1 to 1 to the inputs of the model.
    """

    train: Images
    test: Images
    normalise: Callable[[Tensor], Tensor]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train.labels.max()) + 1

    def sample(self, size: int, batch_size: int, seed: int) -> list[Tensor]:
        """Inputs drawn from the training set, in batches of about equal size."""
        generator = torch.Generator().manual_seed(seed)
        at = torch.randperm(len(self.train.labels), generator=generator)[:size]
        batches = at.to(self.train.pixels.device).tensor_split(math.ceil(len(at) / batch_size))
        return [self.normalise(to_floats(self.train.pixels[part])) for part in batches]

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        """The classes that a model gives to the test set; leaves it in evaluation mode."""
        model.eval()
        return predicted(lambda images: model(self.normalise(images)), self.test)

    def accuracy(self, predictions: Tensor) -> float:
        """The share of the test set that predictions have right."""
        return (predictions == self.test.labels).float().mean().item()


@dataclass(frozen=True)
class Stage:
    """A row of the final table.

    Attributes:
        name: What the model has gone through.
        accuracy: On the test set.
        params: Parameters of the model.
        size: Of its file, in bytes.
    """

    name: str
    accuracy: float
    params: int
    size: int


def number(
    holds: Callable[[float], bool], rule: str, kind: Callable[[str], Any] = float
) -> Callable[[str], Any]:
    """An argparse type: a number that keeps to a rule."""

    def parse(text: str) -> Any:
        if not holds(value := kind(text)):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    parse.__name__ = "number"  # argparse names the type in its errors
    return parse


def make_parser() -> argparse.ArgumentParser:
    """A parser with the flags that say how a pretrained network is trained on."""
    parser = make_paper_parser(
        __doc__.splitlines()[0], batch_size=128, out=Path("runs/compress_pretrained")
    )
    above_0 = number(lambda x: 0 < x < math.inf, "above 0")
    not_negative = number(lambda x: 0 <= x < math.inf, "at least 0")
    count = number(lambda x: x >= 0, "at least 0", int)
    share = number(lambda x: 0 <= x <= 1, "from 0 to 1")

    def flag(name: str, text: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if "default" in options else ""
        parser.add_argument(name, help=text + shown, **options)

    flag("--model", f"{', '.join(SIZES)}, or a model of timm", default="resnet20")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="its weights, .safetensors or .pt"
    )
    weights.add_argument("--pretrained", action="store_true", help="use timm's weights")
    triple = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
    mean, std = (list(t) for t in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD))
    flag("--mean", "of the model's inputs are (pixel / 255 - mean) / std", default=mean, **triple)
    flag("--std", "see --mean", default=std, **triple | {"type": above_0})
    flag(
        "--fit-samples",
        "training images that the fit looks at; 0 fits without data",
        type=count,
        default=512,
        metavar="N",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=positive,
        default=10,
        metavar="N",
        help="passes over the data (default: %(default)s)",
    )
    length.add_argument("--steps", type=positive, metavar="N", help="the same in training steps")
    flag("--lr", "peak of the learning rate", type=above_0, default=3e-3)
    flag("--weight-decay", "of weights that are not generated", type=not_negative, default=0.01)
    flag("--kd-temperature", "divides the logits", type=above_0, default=4.0, metavar="T")
    flag("--kd-weight", "share of distillation in the loss", type=share, default=0.5, metavar="X")
    flag("--amp", "train in bfloat16 where autocast does", action="store_true")
    return parser


def read_data(args: argparse.Namespace) -> Data:
    """The images that the flags name.

    Raises:
        ValueError: They are missing, or cannot be read.
    """
    try:
        train, test = (images.to(args.device) for images in read(args.data_dir))
    except (OSError, ValueError) as error:  # no folder; no image; images of several sizes
        raise ValueError(f"--data-dir {args.data_dir}: {error}") from error
    # Batches come as floats of -1 to 1
    normalise = Normalize([2 * x - 1 for x in args.mean], [2 * x for x in args.std])
    return Data(train, test, normalise)


def load_teacher(args: argparse.Namespace, data: Data) -> nn.Module:
    """The pretrained model.

    Raises:
        ValueError: There are no such weights, or they do not fit the model or the data.
    """
    name = f"--model {args.model}"
    try:
        if not args.pretrained:
            model = create_model(args.model, data.classes)
        elif args.model in SIZES:
            raise ValueError("timm has no weights of it; give a --checkpoint")
        else:  # with the number of classes unsaid, as timm would draw another head at random
            model = timm.create_model(args.model, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if args.checkpoint:
        fill(model, args.checkpoint)
    model = model.to(args.device).eval()
    inputs = data.sample(1, 1, args.seed)[0]
    try:
        outputs = model(inputs)
    except Exception as error:  # any model code can run here, and raise anything
        shape = tuple(inputs.shape[1:])
        raise ValueError(f"{name} cannot run images of the shape {shape}: {error}") from error
    if (shape := tuple(getattr(outputs, "shape", ()))) != (1, data.classes):
        raise ValueError(
            f"{name} gives outputs of the shape {shape} for one image; --data-dir has "
            f"{data.classes} classes"
        )
    return model


def fill(model: nn.Module, path: Path) -> None:
    """Loads a state dict, or a checkpoint of timm with one in it, into a model.

    Raises:
        ValueError: The file is missing, damaged or does not fit.
    """
    if not path.is_file():
        raise ValueError(f"--checkpoint {path}: no such file")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # which the readers raise on a wrong file of any kind
        raise ValueError(
            f"--checkpoint {path} is not a file of weights: {str(error).partition('.')[0]}"
        ) from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"--checkpoint {path} {misfit(model, state)}") from error


def misfit(model: nn.Module, state: dict[str, Any]) -> str:
    """How a state dict differs from what a model needs, in short."""
    needed = model.state_dict()
    parts = []
    if lacking := [name for name in needed if name not in state]:
        parts.append(f"lacks {len(lacking)} of its tensors ({lacking[0]} first)")
    if foreign := [name for name in state if name not in needed]:
        parts.append(f"has {len(foreign)} others ({foreign[0]} first)")
    if parts:
        return f"does not fit the model: it {' and '.join(parts)}"
    name, found, shape = next(
        (name, found, shape)
        for name, tensor in needed.items()
        if (found := tuple(getattr(state[name], "shape", ()))) != (shape := tuple(tensor.shape))
    )
    return (
        f"does not fit the model, or has other classes than --data-dir: its {name} has the shape "
        f"{found}, needed is {shape}"
    )


def make_student_run(student: nn.Module, steps: int, args: argparse.Namespace) -> Run:
    """The student's fine-tuning, at its start."""
    rising = max(1, round(WARM_UP * steps))

    def rate(step: int) -> float:
        if step < rising:
            return args.lr * (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        return args.lr * 0.5 * (1 + math.cos(math.pi * done))

    optimizer = torch.optim.AdamW(param_groups(student, args.weight_decay), lr=1.0)
    return make_run("student", student, optimizer, rate, steps)


def fine_tune(
    run: Run, teacher: nn.Module, data: Data, epoch: int, args: argparse.Namespace
) -> None:
    """Trains for an epoch, or for what is left of the run's steps."""
    torch.manual_seed(args.seed * SEEDS + epoch)  # of dropout: a resumed run draws the same
    run.model.train()
    batches = one_epoch(data.train, args.batch_size, args.seed, epoch, pad=4, flip=True)

    def loss(run: Run, images: Tensor, labels: Tensor) -> Tensor:
        return taught_loss(run.model, teacher, data.normalise(images), labels, args)

    train([run], batches, loss, f"epoch {epoch + 1}")


def taught_loss(
    model: Callable[[Tensor], Tensor],
    teacher: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
) -> Tensor:
    """The loss of a student for a batch, by the flags."""
    # bfloat16 has the range of float32, so that the loss needs no scaling
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=args.amp):
        learned = model(inputs).float()
        if args.kd_weight:
            with torch.no_grad():
                taught = teacher(inputs).float()
    if args.kd_weight:
        return distillation(learned, taught, labels, args.kd_temperature, args.kd_weight)
    return F.cross_entropy(learned, labels)  # the teacher has no say


def distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, weight: float
) -> Tensor:
    """The loss of a student: softened outputs of the teacher, and the labels.

    Args:
        student: Logits, (N, C).
        teacher: Logits, (N, C).
        labels: int64, (N,).
        temperature: Divides the logits of both; what it does to the gradient is undone.
        weight: Share of the teacher, the rest is the labels'.
    """
    kl = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return weight * temperature**2 * kl + (1 - weight) * F.cross_entropy(student, labels)


def print_table(stages: Sequence[Stage]) -> None:
    """Prints one row per stage."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("stage")
    for name in ("test accuracy", "parameters", "file bytes"):
        table.add_column(name, justify="right")
    for row in stages:
        table.add_row(row.name, f"{row.accuracy:.2%}", f"{row.params:,}", f"{row.size:,}")
    Console(width=80, highlight=False).print(table)


def draw(
    stages: Sequence[Stage], epochs: Sequence[float], curve: Sequence[float], path: Path
) -> None:
    """Draws the accuracy over the epochs, and against the number of parameters.

    Args:
        stages: The teacher, the fitted and the fine-tuned student.
        epochs: When the entries of `curve` were taken.
        curve: Accuracies of the student.
        path: The PNG file to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # not needed to train
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install 'hyperize[plot]' and run this again; "
            "nothing is trained twice"
        ) from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_epochs, over_params = figure.subplots(1, 2, sharey=True)
    teacher = stages[0]
    over_epochs.axhline(100 * teacher.accuracy, color="C7", linestyle="--", label=teacher.name)
    over_epochs.plot(epochs, [100 * x for x in curve], "C0o-", label="student")
    over_epochs.set(xlabel="epochs", ylabel="test accuracy (%)")
    for row, style in zip(stages, ("C7s", "C1D", "C0o"), strict=True):
        over_params.plot(row.params / 1e3, 100 * row.accuracy, style, label=row.name)
    over_params.set(xlabel="parameters (thousands)")
    over_params.set_xlim(left=0, right=1.1e-3 * max(row.params for row in stages))
    for axes in (over_epochs, over_params):
        axes.legend(frameon=False, loc="lower right")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def note(run: Run, data: Data, name: str) -> None:
    """Evaluates a run at some point, for its curve."""
    run.curve.append(data.accuracy(data.predict(run.model)))
    print(f"{name}: test accuracy {run.curve[-1]:.2%}")


def digest(model: nn.Module) -> str:
    """What tells a model's weights from others."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return hashlib.sha256(to_bytes(state)).hexdigest()


def main(argv: Sequence[str] | None = None) -> list[Stage]:
    """Fits and fine-tunes, or goes on with it; writes the files and prints the table.

    Returns:
        The rows of the table.
    """
    parser = make_parser()
    flag = parser.add_argument
    flag(
        "--compression",
        type=float,
        default=4.0,
        metavar="X",
        help="weights per generating parameter (default: %(default)s)",
    )
    flag(
        "--embeddings",
        choices=("channel", "tile"),
        default="channel",
        help="what has an embedding of its own; those of channels keep more of trained weights "
        "(default: %(default)s)",
    )
    args = parser.parse_args(argv)
    checkpoint = args.out / "checkpoint.pt"
    try:  # every mistake is found now rather than after the training
        data = read_data(args)
        teacher = load_teacher(args, data)
        student = hyperize(
            teacher, compression=args.compression, embeddings=args.embeddings, seed=args.seed
        )
        run = make_student_run(student, steps_of(args, data.train), args)
        args.out.mkdir(parents=True, exist_ok=True)
        # A run is known by the teacher's weights, not by the place where they were
        settings = settings_of(args) | {"checkpoint": digest(teacher)}
        done = resume(checkpoint, [run], settings) if checkpoint.exists() else None
    except (HyperizeError, OSError, ValueError) as error:
        refuse(parser, error)
    print(report(student), end="\n\n")

    taught = data.accuracy(data.predict(teacher))
    print(f"teacher: test accuracy {taught:.2%}")
    if done is None:
        size = args.fit_samples
        inputs = data.sample(size, args.batch_size, args.seed) if size else None
        print(fit_(student, teacher, data=inputs))
        done = 0
        note(run, data, "fitted")
        suspend(checkpoint, [run], settings, done)
    else:
        print(f"resumed after epoch {done}: {checkpoint}")
    per_epoch = steps_per_epoch(data.train, args.batch_size)
    for epoch in range(done, math.ceil(run.steps / per_epoch)):
        fine_tune(run, teacher, data, epoch, args)
        note(run, data, f"epoch {epoch + 1}, step {run.schedule.last_epoch:,}")
        suspend(checkpoint, [run], settings, epoch + 1)

    save(student, small := args.out / "hyper.safetensors")
    convert(student, dense := args.out / "dense.safetensors")
    exported = create_model(args.model, data.classes)
    exported.load_state_dict(load_file(dense))
    predictions = data.predict(exported.to(args.device))
    if others := int((predictions != data.predict(student)).sum()):
        refuse(parser, f"{dense} gives other predictions for {others} test images")
    reached = data.accuracy(predictions)

    def stage(name: str, accuracy: float, model: nn.Module, path: Path) -> Stage:
        params = sum(param.numel() for param in model.parameters())
        return Stage(name, accuracy, params, path.stat().st_size)

    stages = [
        stage("teacher", taught, teacher, dense),  # a file of its weights would be as long
        stage("fitted", run.curve[0], student, small),
        stage("fine-tuned", reached, student, small),
        stage("exported, dense", reached, exported, dense),
    ]
    print()
    print_table(stages)
    print(f"\n{dense}: the same predictions as the student's for all test images")
    ends = [min(epoch * per_epoch, run.steps) / per_epoch for epoch in range(len(run.curve))]
    try:
        draw(stages[:3], ends, run.curve, args.out / "accuracy.png")
    except ImportError as error:
        print(f"no picture: {error}")
    return stages


if __name__ == "__main__":
    main()
