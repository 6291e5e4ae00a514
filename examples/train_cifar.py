"""CIFAR-10: ResNet-20, or a model of timm, and its hyperized twin, trained side by side.

    python examples/train_cifar.py --data-dir data --epochs 20
    python examples/train_cifar.py --data-dir data --steps 50    # a quick look
    python examples/train_cifar.py --data-dir data --model resnet18 --device cuda

`--data-dir` is the root that `torchvision.datasets.CIFAR10` takes, or else one with a folder
`train` and a folder `test` as `torchvision.datasets.ImageFolder` reads them: one folder per class.
The images of the latter are decoded once and kept beside them in `images.npz`, which is made anew
when files come or go; delete it after changing an image in place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, ImageFolder
from twins import Images, Result, classified, compare, make_parser, refuse, shuffled, steps_of

LAYOUT = (
    "expected is torchvision's CIFAR10 (a folder cifar-10-batches-py), or train/CLASS/IMAGE and "
    "test/CLASS/IMAGE with one folder per class"
)


SIZES = {f"resnet{6 * n + 2}": n for n in (3, 5, 7, 9, 18)}
"""Names of CIFAR-10's own networks -> the n of `ResNet`."""


class ResNet(nn.Module):
    """The CIFAR-10 ResNet of 6n + 2 layers (arXiv 1512.03385, sec. 4.2), ResNet-20 for n = 3.

    Args:
        n: Blocks per stage.
        num_classes: Outputs.
        width: Channels of the first stage; the others have two and four times as many, rounded.
    """

    def __init__(self, n: int = 3, num_classes: int = 10, width: float = 16) -> None:
        super().__init__()
        a, b, c = (max(1, round(factor * width)) for factor in (1, 2, 4))
        self.conv1 = nn.Conv2d(3, a, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = nn.Sequential(*(Block(a, a) for _ in range(n)))
        self.layer2 = nn.Sequential(Block(a, b), *(Block(b, b) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(Block(b, c), *(Block(c, c) for _ in range(n - 1)))
        self.linear = nn.Linear(c, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (option A)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.stride = 1 if n_in == n_out else 2
        self.spare = n_out - n_in
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        front = self.spare // 2
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, front, self.spare - front)))


def read(root: Path) -> tuple[Images, Images]:
    """The training and the test set, of either layout.

    Raises:
        FileNotFoundError: The folder has neither.
    """
    if (root / "cifar-10-batches-py").is_dir():
        sets = (CIFAR10(root, train=train) for train in (True, False))
        arrays = [(s.data, s.targets) for s in sets]
    elif (root / "train").is_dir() and (root / "test").is_dir():
        arrays = read_folders(root)
    else:
        raise FileNotFoundError(f"{root} holds no images in a known layout; {LAYOUT}")
    train, test = (
        Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.as_tensor(labels))
        for pixels, labels in arrays
    )
    return train, test


def read_folders(root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels (N, H, W, C) and labels of `train` and `test`, from the cache if it is current."""
    folders = [ImageFolder(root / name) for name in ("train", "test")]
    cache = root / "images.npz"
    if cache.is_file():
        with np.load(cache) as file:
            arrays = [(file[f"pixels{i}"], file[f"labels{i}"]) for i in range(len(folders))]
        if all(
            np.array_equal(labels, folder.targets)
            for (_, labels), folder in zip(arrays, folders, strict=True)
        ):
            return arrays
    arrays = [(decode(folder), np.array(folder.targets)) for folder in folders]
    named = {
        f"{name}{i}": array
        for i, pair in enumerate(arrays)
        for name, array in zip(("pixels", "labels"), pair, strict=True)
    }
    if os.access(root, os.W_OK):  # a read-only folder is decoded anew each time
        part = root / f".images.{os.getpid()}.npz"
        np.savez(part, **named)
        part.replace(cache)
    return arrays


def decode(folder: ImageFolder) -> np.ndarray:
    console = Console(stderr=True)
    paths = [path for path, _ in folder.samples]
    name = f"decoding {Path(folder.root).name}"
    return np.stack(
        [
            np.asarray(folder.loader(path))
            for path in track(paths, name, console=console, disable=not console.is_terminal)
        ]
    )


def create_model(name: str, num_classes: int) -> nn.Module:
    """One of `SIZES`, or else a model of timm, at its initialisation."""
    if name in SIZES:
        return ResNet(SIZES[name], num_classes)
    return timm.create_model(name, num_classes=num_classes)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Trains both twins.

    Returns:
        The rows of the final table.
    """
    parser = make_parser(
        "CIFAR-10: a residual network and its hyperized twin.",
        compression=4.0,
        batch_size=128,
        lr=0.01,
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the images")
    parser.add_argument(
        "--model",
        default="resnet20",
        help=f"{', '.join(SIZES)}, or a model of timm (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=20,
        metavar="N",
        help="passes over the data (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, instead of epochs")
    args = parser.parse_args(argv)
    try:
        train, test = (images.to(args.device) for images in read(args.data_dir))
    except FileNotFoundError as error:
        refuse(parser, f"--data-dir {error}")
    torch.manual_seed(args.seed)
    model = create_model(args.model, num_classes=int(train.labels.max()) + 1)
    batches = shuffled(train, args.batch_size, args.seed, pad=4, flip=True)
    steps = steps_of(args, train)
    return compare(model, batches, steps, lambda model: classified(model, test), args)[1]


if __name__ == "__main__":
    main()
