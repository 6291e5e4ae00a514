"""A zoo of networks, all fine-tuned from one: in files of their own, as differences, in one file.

    python examples/model_zoo.py --data-dir data --checkpoint resnet20.safetensors

Ten ResNet-20s are fine-tuned from one start, each on CIFAR-10 with all images changed in one way
(grey, on the side, blurred, ...), and judged by test images that are changed alike. Then they are
stored, and what is read back from the files is judged again:

    dense                  a file for each network, of float32 or of 8 bits
    start and differences  the start, and for each network what it differs by, each weight as a
                           product of two matrices of low rank (truncated SVD), all in 8 bits
    start and generator    the start, and one hyperize file of all differences, by `fit_`, in 8 bits
    one generator          one hyperize file of the whole networks, in 8 bits

8 bits are hyperize's rounding, row by row, in all of them; vectors are float16. `--data-dir` is as
of train_cifar.py, `--checkpoint` as of compress_pretrained.py. The folder `--out` receives the
files, `zoo.png` if matplotlib is installed, and `checkpoint.pt`, from which a run that was killed
goes on when it is started with the same flags.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from compress_pretrained import digest, fill
from paper import positive, read_checkpoint, settings_of, write_checkpoint
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import Normalize
from train_cifar import SIZES, ResNet, read
from twins import Images, make_twin, predicted, refuse, shuffled, train

from hyperize import (
    HyperConfig,
    HyperizeError,
    dense_state_dict,
    fit_,
    hyperize,
    load,
    make_plan,
    report,
    save,
)
from hyperize.rounding import decode, encode, is_matrix

NORMALISE = Normalize(
    [2 * x - 1 for x in timm.data.IMAGENET_DEFAULT_MEAN],
    [2 * x for x in timm.data.IMAGENET_DEFAULT_STD],
)
"""From floats of -1 to 1 to what the networks take."""
BITS = 8


def noisy(pixels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-40, 41, pixels.shape, generator=generator, dtype=torch.int16)
    return (pixels.cpu().short() + noise).clamp(0, 255).byte().to(pixels.device)


def pooled(pixels: Tensor, size: int, stride: int) -> Tensor:
    means = F.avg_pool2d(pixels.float(), size, stride, padding=(size - stride) // 2)
    return F.interpolate(means, size=pixels.shape[2:]).round().byte()


VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "grey": lambda x: x.float().mean(1, keepdim=True).round().byte().expand_as(x),
    "colours swapped": lambda x: x[:, [2, 0, 1]],
    "negative": lambda x: 255 - x,
    "dark": lambda x: x // 4,
    "on the side": lambda x: x.rot90(1, (2, 3)),
    "upside down": lambda x: x.flip(2),
    "blurred": lambda x: pooled(x, 3, 1),
    "coarse": lambda x: pooled(x, 2, 2),
    "noisy": noisy,
}
"""Ways to change bytes, (N, 3, H, W)."""


@dataclass(frozen=True)
class Stored:
    """The networks, as they come back from files.

    Attributes:
        name: Of the way of storing them.
        size: Of all its files together, in bytes.
        networks: In the order of `VARIANTS`.
    """

    name: str
    size: int
    networks: list[nn.Module]


@dataclass(frozen=True)
class Row:
    """A row of the table: accuracies are those of the networks, on their own test images."""

    name: str
    size: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Over the networks."""
        return statistics.fmean(self.accuracies)


def changed(images: Images, name: str) -> Images:
    """All images changed in one way."""
    return Images(VARIANTS[name](images.pixels).contiguous(), images.labels)


def fine_tuned(start: nn.Module, images: Images, name: str, args: argparse.Namespace) -> nn.Module:
    """The start, trained on."""
    model = copy.deepcopy(start).to(memory_format=torch.channels_last).train()  # faster on a CPU
    twin = make_twin("dense", model, args.lr, 0.01, args.steps)
    batches = shuffled(images, args.batch_size, args.seed, pad=4, flip=True)

    def loss(_: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(NORMALISE(inputs)), labels)

    train([twin], islice(batches, args.steps), loss, name)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    found = predicted(lambda inputs: model(NORMALISE(inputs)), images)
    return (found == images.labels).float().mean().item()


def write(state: dict[str, Tensor], path: Path, bits: int | None) -> dict[str, Tensor]:
    """Writes tensors to a file, and gives what is read back from it.

    Args:
        state: The tensors.
        path: The file.
        bits: 8 for matrices that are rounded row by row, and vectors of float16; None for tensors
            as they are.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if bits and is_matrix(tensor):
            stored[f"{name}.numbers"], stored[f"{name}.steps"] = encode(tensor.contiguous(), bits)
        else:
            whole = bits is None or not tensor.is_floating_point()
            stored[name] = tensor.contiguous() if whole else tensor.half()
    save_file(stored, path)
    back = load_file(path)
    values = {}
    for name, tensor in state.items():
        if name in back:
            value = back[name].to(tensor.dtype)
        else:
            value = decode(back[f"{name}.numbers"], back[f"{name}.steps"], tensor.dtype)
        values[name] = value.to(tensor.device)
    return values


def filled(start: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A network like the start, with such tensors."""
    model = copy.deepcopy(start)
    model.load_state_dict(state)
    return model.eval()


def dense(start: nn.Module, zoo: Sequence[nn.Module], out: Path, bits: int | None) -> Stored:
    """A file for each network."""
    name = f"dense, {bits} bits" if bits else "dense, float32"
    paths = [out / f"dense-{bits or 32}-{k}.safetensors" for k in range(len(zoo))]
    states = [write(model.state_dict(), path, bits) for model, path in zip(zoo, paths, strict=True)]
    return Stored(name, size_of(paths), [filled(start, state) for state in states])


def differences(start: nn.Module, zoo: Sequence[nn.Module], out: Path, rank: int) -> Stored:
    """The start, and for each network the product of two matrices for each weight."""
    paths = [out / f"rank-{rank}-{k}.safetensors" for k in range(len(zoo))]
    first = out / "start.safetensors"
    base = write(start.state_dict(), first, BITS)
    networks = []
    for model, path in zip(zoo, paths, strict=True):
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if is_matrix(tensor):
                left, right = low_rank((tensor - base[name]).flatten(1), rank)
                # (out, rank) is written as (rank, out): a step for each row wants long rows
                state |= {f"{name}.left": left.t().contiguous(), f"{name}.right": right}
            else:
                state[name] = tensor
        back = write(state, path, BITS)
        values = {}
        for name, tensor in base.items():
            if name in back:
                values[name] = back[name]
            else:
                product = back[f"{name}.left"].t() @ back[f"{name}.right"]
                values[name] = tensor + product.view_as(tensor)
        networks.append(filled(start, values))
    return Stored(f"start and differences of rank {rank}", size_of([first, *paths]), networks)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of an (m, r) and an (r, n) matrix, r at most the rank given."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def requests(args: argparse.Namespace) -> Iterator[HyperConfig]:
    """What the generators of differences are to be, the largest first."""
    for compression in sorted(args.compressions):
        yield HyperConfig(
            conditions=len(VARIANTS),
            compression=compression,
            private=("conv1", "linear"),
            seed=args.seed,
        )


def generated(start: nn.Module, zoo: Sequence[nn.Module], out: Path, config: HyperConfig) -> Stored:
    """The start, and one generator for what all networks differ by from it.

    A generator has to spend most of its parameters on what networks that are nearly equal share.
    The start holds that already.
    """
    first, path = out / "start.safetensors", out / f"generator-{config.compression:g}x.safetensors"
    base = write(start.state_dict(), first, BITS)
    plan = make_plan(start, config)
    weights = {planned.site.name for planned in plan.sites}

    def moved(state: dict[str, Tensor], sign: int) -> dict[str, Tensor]:
        return {n: t + sign * base[n] if n in weights else t for n, t in state.items()}

    hyper = hyperize(start, plan)
    print(report(hyper), end="\n\n")
    print(fit_(hyper, [moved(model.state_dict(), -1) for model in zoo]), end="\n\n")
    networks = [filled(start, moved(state, 1)) for state in read_back(hyper, start, path)]
    name = f"start and one generator, {config.compression:g}x"
    return Stored(name, size_of([first, path]), networks)


def generated_whole(
    start: nn.Module, zoo: Sequence[nn.Module], out: Path, config: HyperConfig
) -> Stored:
    """One generator for the whole networks, of channels, which fit these best."""
    hyper = hyperize(start, config, embeddings="channel")
    fit_(hyper, zoo)
    path = out / "whole.safetensors"
    networks = [filled(start, state) for state in read_back(hyper, start, path)]
    return Stored(f"one generator, {config.compression:g}x", size_of([path]), networks)


def read_back(hyper: nn.Module, start: nn.Module, path: Path) -> Iterator[dict[str, Tensor]]:
    """Writes a hyperized model to a file, and gives the dense tensors of its networks from it."""
    save(hyper, path, dtype="int8")
    back = load(start, path)
    for k in range(len(VARIANTS)):
        yield dense_state_dict(back, condition=k)


def size_of(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def ways(start: nn.Module, zoo: Sequence[nn.Module], args: argparse.Namespace) -> Iterator[Stored]:
    """All ways of storing a zoo."""
    yield dense(start, zoo, args.out, None)
    yield dense(start, zoo, args.out, BITS)
    for rank in args.ranks:
        yield differences(start, zoo, args.out, rank)
    for config in requests(args):
        yield generated(start, zoo, args.out, config)
    yield generated_whole(start, zoo, args.out, next(requests(args)))


def fine_tuned_zoo(start: nn.Module, images: Images, args: argparse.Namespace) -> list[nn.Module]:
    """The zoo; of what the checkpoint has of it, nothing is trained again.

    Raises:
        ValueError: The checkpoint was made with other flags.
    """
    path = args.out / "checkpoint.pt"
    names = ("steps", "batch_size", "lr", "seed")
    settings = {"start": digest(start)} | {n: v for n, v in settings_of(args).items() if n in names}
    state: dict[str, Any] = {"settings": settings, "networks": {}}
    if path.exists():
        state = read_checkpoint(path, settings)
        print(f"resumed with {len(state['networks'])} networks: {path}")
    for name in VARIANTS:
        if name not in state["networks"]:
            model = fine_tuned(start, changed(images, name), name, args)
            state["networks"][name] = model.state_dict()
            write_checkpoint(path, state)
    return [filled(start, state["networks"][name]) for name in VARIANTS]


def print_table(rows: Sequence[Row]) -> None:
    """Prints one row per way of storing."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name in ("bytes", "networks of float32", "mean accuracy", "most lost"):
        table.add_column(name, justify="right")
    first = next(row for row in rows if row.name == "dense, float32")
    for row in rows:
        worth = f"{len(row.accuracies) * row.size / first.size:.2f}" if row.size else ""
        lost = max(a - b for a, b in zip(first.accuracies, row.accuracies, strict=True))
        figures = (f"{row.mean:.2%}", f"{100 * lost:.2f} points")
        table.add_row(row.name, f"{row.size:,}" if row.size else "", worth, *figures)
    Console(width=100, highlight=False).print(table)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the accuracy over the bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "dense": "s",
        "start and differences": "o-",
        "start and one generator": "D-",
        "one generator": "X",
    }
    for kind, style in kinds.items():
        of = [row for row in rows if row.name.startswith(kind)]
        axes.plot([row.size / 1e6 for row in of], [100 * row.mean for row in of], style, label=kind)
    axes.set(xlabel="bytes of all files (millions)", ylabel="mean accuracy (%)", xscale="log")
    axes.set_title(f"{len(VARIANTS)} networks fine-tuned from one start")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Fine-tunes, stores and judges.

    Returns:
        The rows of the table.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data-dir", type=Path, required=True, help="as of train_cifar.py")
    flag(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights of the start, .safetensors or .pt",
    )
    flag(
        "--out",
        type=Path,
        default=Path("runs/model_zoo"),
        metavar="DIR",
        help="folder of the results; a run found there is resumed (default: %(default)s)",
    )
    flag("--model", choices=SIZES, default="resnet20", help="of the start (default: %(default)s)")
    flag("--steps", type=positive, default=100, metavar="N", help="of a network (%(default)s)")
    flag("--batch-size", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    flag("--lr", type=float, default=2e-3, help="peak of the rate (default: %(default)s)")
    flag(
        "--test-images",
        type=positive,
        default=1000,
        metavar="N",
        help="that judge a network, drawn at random (default: %(default)s)",
    )
    flag(
        "--ranks",
        type=positive,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        metavar="N",
        help="of the differences (default: %(default)s)",
    )
    flag(
        "--compressions",
        type=float,
        nargs="+",
        default=[3.0, 5.0, 10.0],
        metavar="X",
        help="of the generators (default: %(default)s)",
    )
    flag("--seed", type=int, default=0, help="of batches and embeddings (default: %(default)s)")
    cuda = torch.cuda.is_available()
    flag("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        images, test = (half.to(args.device) for half in read(args.data_dir))
    except FileNotFoundError as error:
        refuse(parser, f"--data-dir {error}")
    start = ResNet(SIZES[args.model], int(images.labels.max()) + 1)
    try:
        fill(start, args.checkpoint)
        for config in requests(args):  # found wanting now rather than after the training
            make_plan(start, config)
        args.out.mkdir(parents=True, exist_ok=True)
        start = start.to(args.device).eval()
        zoo = fine_tuned_zoo(start, images, args)
    except (HyperizeError, OSError, ValueError) as error:
        refuse(parser, error)
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted; the same command goes on from {args.out}\n")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(test.labels), generator=generator)[: args.test_images]
    drawn = drawn.to(args.device)
    judges = [changed(Images(test.pixels[drawn], test.labels[drawn]), name) for name in VARIANTS]

    def row(name: str, size: int, networks: Sequence[nn.Module]) -> Row:
        pairs = zip(networks, judges, strict=True)
        return Row(name, size, [accuracy(model, images) for model, images in pairs])

    rows = [row("not fine-tuned", 0, [start] * len(zoo))]
    for stored in ways(start, zoo, args):
        rows.append(row(stored.name, stored.size, stored.networks))
    print_table(rows)
    try:
        draw(rows, args.out / "zoo.png")
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"files, plot and checkpoint: {args.out}")
    return rows


if __name__ == "__main__":
    main()
