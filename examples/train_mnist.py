"""MNIST: a small convolutional network and its hyperized twin, trained side by side.

    python examples/train_mnist.py --data-dir data               # two epochs
    python examples/train_mnist.py --data-dir data --steps 100   # a quick look

`--data-dir` is the root that `torchvision.datasets.MNIST` takes: it holds the four idx files,
unpacked, in `MNIST/raw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.datasets import MNIST
from twins import Images, Result, classified, compare, make_parser, refuse, shuffled, steps_of


class ConvNet(nn.Module):
    """Three convolutions with batch norm, and a linear classifier."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        channels = (1, 32, 64, 128)
        self.blocks = nn.Sequential(*(block(n_in, n_out) for n_in, n_out in pairwise(channels)))
        self.classifier = nn.Linear(channels[-1] * 3 * 3, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.classifier(self.blocks(images).flatten(1))


def block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def read(root: Path, train: bool) -> Images:
    """The training or the test set.

    Raises:
        FileNotFoundError: The folder does not hold it.
    """
    try:
        dataset = MNIST(root, train=train)
    except RuntimeError as error:  # torchvision's, whose advice is a download that it calls a flag
        raise FileNotFoundError(
            f"{root} does not hold MNIST; expected are the files "
            "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte in it, unpacked"
        ) from error
    return Images(dataset.data[:, None], dataset.targets)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Trains both twins.

    Returns:
        The rows of the final table.
    """
    parser = make_parser(
        "MNIST: a small convolutional network and its hyperized twin.",
        compression=10.0,
        batch_size=128,
        lr=0.02,
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="root of torchvision's MNIST")
    parser.add_argument(
        "--epochs",
        type=int,
        default=2,
        metavar="N",
        help="passes over the data (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, instead of epochs")
    args = parser.parse_args(argv)
    try:
        train, test = (read(args.data_dir, train).to(args.device) for train in (True, False))
    except FileNotFoundError as error:
        refuse(parser, f"--data-dir {error}")
    torch.manual_seed(args.seed)
    batches = shuffled(train, args.batch_size, args.seed, pad=1)
    steps = steps_of(args, train)
    return compare(ConvNet(), batches, steps, lambda model: classified(model, test), args)[1]


if __name__ == "__main__":
    main()
