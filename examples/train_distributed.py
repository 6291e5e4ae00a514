r"""Trains a hyperized model of timm on folders of images, on one process or on many.

On one machine, with one process or with one for each of two GPUs (without a GPU: two on the CPU):

    python examples/train_distributed.py --data-dir images --model resnet50
    torchrun --nproc-per-node 2 examples/train_distributed.py --data-dir images --model resnet50

On four machines of eight GPUs, the same command on each of them, with any of them as HOST:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/train_distributed.py --data-dir images --model resnet50 --output /shared/run

`accelerate launch` starts it as well. `--data-dir` has a folder `train`, and a folder `val` or
`test`, each with one folder of images per class. The output folder, which all machines share, then
holds

    hyper.safetensors    the trained model, for `hyperize.load`
    log.jsonl            the loss of each step that is logged, and the accuracy after each epoch
    step_...             what a run that was killed goes on from, when started with the same flags

A run that was killed and started again has, on the same machine, the losses of one that was not:
the order of the images depends on the seed and the epoch, the augmentation of an image on these and
the image, and what the model draws (dropout) on the seed, the step and the process.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from paper import positive
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from twins import progress_bar, refuse

from hyperize import hyperize, param_groups, report, save

WARMUP = 0.05
"""The share of all steps in which the learning rate rises."""


class Order(Sampler[tuple[int, int]]):
    """The images of one epoch in their order, as pairs of the epoch and the image's number.

    Attributes:
        epoch: Which epoch.
        first: How many images are left out, as they have had their turn.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.size - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        return ((self.epoch, image) for image in order[self.first :])


class Augmented(Dataset[tuple[Tensor, int]]):
    """A folder of images, each augmented as its epoch and its number say."""

    def __init__(self, folder: ImageFolder, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        seed = seed_of(self.seed, *key)
        random.seed(seed)  # timm's transforms draw from all three
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return self.folder[key[1]]


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers."""
    return random.Random(repr(numbers)).getrandbits(63)


def make_parser() -> argparse.ArgumentParser:
    """The flags, named as those of timm's own training script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def flag(name: str, text: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if "default" in options else ""
        parser.add_argument(name, help=text + shown, **options)

    flag("--data-dir", "folder of the images", type=Path, required=True)
    flag("--model", "a model of timm", default="resnet18")
    flag("--compression", "weights per generating parameter", type=float, default=4.0, metavar="X")
    flag("--factorized", "compute with factors of weights where faster", action="store_true")
    flag("--img-size", "side of the images, if not the model's own", type=positive, metavar="N")
    flag("--epochs", "passes over the data", type=positive, default=20, metavar="N")
    flag("--batch-size", "images per step and process", type=positive, default=128, metavar="N")
    flag("--lr", "peak of the learning rate", type=float, default=3e-3)
    flag("--weight-decay", "of weights that are not generated", type=float, default=0.05)
    flag("--amp", "compute in bfloat16 where autocast does", action="store_true")
    flag("--workers", "processes that read images, for each", type=int, default=4, metavar="N")
    flag("--seed", "of the initialisation and all that is drawn", type=int, default=0)
    flag(
        "--log-interval", "steps from one loss to the next", type=positive, default=10, metavar="N"
    )
    flag("--checkpoint-interval", "steps, besides after each epoch", type=positive, metavar="N")
    flag("--output", "folder of the results", type=Path, default=Path("runs/distributed"))
    flag("--cpu", "leave GPUs alone", action="store_true")
    return parser


def read(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """The training and the test set.

    Raises:
        OSError: They are not there.
        ValueError: They do not have the same classes.
    """
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
    folders = ImageFolder(root / "train"), ImageFolder(test)
    if folders[0].classes != folders[1].classes:
        raise ValueError(f"{root / 'train'} and {test} have different folders of classes")
    return folders


def make_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The hyperized model, the same on each process.

    Raises:
        ValueError: There is no such model, or it cannot be compressed so.
    """
    torch.manual_seed(args.seed)
    try:
        model = timm.create_model(args.model, num_classes=classes)
    except RuntimeError as error:
        raise ValueError(f"--model {args.model}: {error}") from error
    return hyperize(model, compression=args.compression, factorized=args.factorized, seed=args.seed)


def make_loader(
    data: Dataset[Any], args: argparse.Namespace, order: Order | None = None
) -> DataLoader[Any]:
    """The batches of one process: of whole ones only, in an order, or all, as they are."""
    return DataLoader(
        data,
        args.batch_size,
        sampler=order,
        drop_last=order is not None,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
    )


@dataclass(frozen=True)
class Run:
    """What is trained, and with what; the accelerator has prepared all that it can."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: Order
    batches: DataLoader[Any]
    test_batches: DataLoader[Any]


def make_run(args: argparse.Namespace, accelerator: Accelerator) -> Run:
    """Everything at its start.

    Raises:
        OSError: There are no images.
        ValueError: They, or the flags, cannot be used.
    """
    images, tests = read(args.data_dir)
    together = args.batch_size * accelerator.num_processes
    if len(images) < together:
        raise ValueError(f"a step takes {together} images, {args.data_dir} has {len(images)}")
    model = make_model(args, len(images.classes))
    config = resolve_model_data_config(model)
    if args.img_size:
        config["input_size"] = (3, args.img_size, args.img_size)
    images.transform = create_transform(**config, is_training=True)
    tests.transform = create_transform(**config)
    order = Order(len(images), args.seed)
    batches = make_loader(Augmented(images, args.seed), args, order)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), args.lr)
    accelerator.print(report(model))
    model, optimizer, batches, test_batches = accelerator.prepare(
        model, optimizer, batches, make_loader(tests, args)
    )
    return Run(accelerator, model.train(), optimizer, order, batches, test_batches)


def train(run: Run, args: argparse.Namespace, progress: dict[str, Any]) -> None:
    """Trains to the end, with a checkpoint after each epoch and, if asked for, in between."""
    accelerator, order = run.accelerator, run.order
    together = args.batch_size * accelerator.num_processes
    per_epoch = order.size // together
    steps, step = args.epochs * per_epoch, progress["step"]
    log = Log(args.output / "log.jsonl", progress["log"], accelerator.is_main_process)
    with progress_bar() as bar:
        task = bar.add_task("training", total=steps, completed=step)
        for epoch in range(step // per_epoch, args.epochs):
            order.epoch, order.first = epoch, step % per_epoch * together
            for inputs, labels in run.batches:
                set_rate(run.optimizer, rate(step, steps, args.lr))
                torch.manual_seed(seed_of(args.seed, step, accelerator.process_index, 0))
                loss = F.cross_entropy(run.model(inputs), labels)
                accelerator.backward(loss)
                run.optimizer.step()
                run.optimizer.zero_grad()
                step += 1
                if step % args.log_interval == 0:
                    value = accelerator.reduce(loss.detach(), "mean").item()
                    log.write(epoch=epoch, step=step, loss=value)
                    bar.update(task, description=f"loss: {value:.3f}")
                bar.update(task, completed=step)
                due = args.checkpoint_interval and step % args.checkpoint_interval == 0
                if due and step % per_epoch:
                    suspend(run, args.output, progress | {"step": step, "log": log.size})
            figure = accuracy(run)
            log.write(epoch=epoch, accuracy=figure)
            accelerator.print(f"epoch {epoch + 1} of {args.epochs}: accuracy {figure:.2%}")
            suspend(run, args.output, progress | {"step": step, "log": log.size})


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step: up in a line, down along a cosine."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def accuracy(run: Run) -> float:
    """The share of the test set, over all processes, that the model classifies correctly."""
    run.model.eval()
    correct = [
        run.accelerator.gather_for_metrics(run.model(inputs).argmax(1) == labels)
        for inputs, labels in run.test_batches
    ]
    run.model.train()
    return torch.cat(correct).float().mean().item()


# -------------------------------------------------------------------------------------- checkpoints
def settings_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What makes a run what it is: all flags but places and helpers, and what makes an epoch."""
    others = ("data_dir", "output", "workers", "cpu", "checkpoint_interval")
    flags = {name: value for name, value in vars(args).items() if name not in others}
    return flags | {"processes": run.accelerator.num_processes, "images": run.order.size}


def suspend(run: Run, output: Path, progress: dict[str, Any]) -> None:
    """Writes all that `resume` needs; a kill at any moment leaves the old one or the new one."""
    accelerator = run.accelerator
    part, target = output / ".part", output / f"step_{progress['step']:09}"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "progress.json").write_text(json.dumps(progress))
        part.rename(target)
        for old in output.glob("step_*"):
            if old != target:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(run: Run, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Brings the prepared objects to where a checkpoint, if there is one, left them.

    Returns:
        The steps that are done, the length of the log then, and the settings.

    Raises:
        ValueError: The checkpoint was made with other settings.
    """
    checkpoint = max(output.glob("step_*"), default=None)
    if checkpoint is None:
        return {"step": 0, "log": 0, "settings": settings}
    progress = json.loads((checkpoint / "progress.json").read_text())
    if other := {k: v for k, v in progress["settings"].items() if settings.get(k) != v}:
        ours = {name: settings.get(name) for name in other}
        raise ValueError(
            f"{checkpoint} was made with {other}, not {ours}; choose another --output, or delete it"
        )
    run.accelerator.load_state(str(checkpoint))
    run.accelerator.print(f"resumed after step {progress['step']}: {checkpoint}")
    return progress


class Log:
    """Lines of JSON, which only the main process writes; of an older log the first `size` bytes."""

    def __init__(self, path: Path, size: int, main: bool) -> None:
        self.path, self.size, self.main = path, size, main
        if main:
            path.touch()
            with path.open("r+b") as file:
                file.truncate(size)

    def write(self, **record: Any) -> None:
        """Appends a line."""
        if self.main:
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                self.size = file.tell()


# --------------------------------------------------------------------------------------------- main
def main(argv: Sequence[str] | None = None) -> float:
    """Trains, or goes on with it, and saves the model.

    Returns:
        The accuracy on the test set.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    accelerator = Accelerator(
        cpu=args.cpu or not torch.cuda.is_available(), mixed_precision="bf16" if args.amp else "no"
    )
    try:
        run = make_run(args, accelerator)
        args.output.mkdir(parents=True, exist_ok=True)
        progress = resume(run, args.output, settings_of(run, args))
    except (OSError, ValueError) as error:
        refuse(parser, error)
    train(run, args, progress)
    if accelerator.is_main_process:
        save(accelerator.unwrap_model(run.model), args.output / "hyper.safetensors")
    figure = accuracy(run)
    accelerator.end_training()
    return figure


if __name__ == "__main__":
    main()
