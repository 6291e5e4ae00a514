"""A transformer and its hyperized twin learn to sort digits, on data that is made here.

    python examples/transformer.py               # a minute or two on two cores
    python examples/transformer.py --steps 20    # a quick look

A transformer has few convolutions or none: its weights are in linear layers and in attention, which
are targets only where they are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import Result, compare, make_parser

LENGTH = 16
"""Digits of a sequence."""


class Sorter(nn.Module):
    """A transformer encoder that gives a digit for each position."""

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.digits = nn.Embedding(10, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, digits: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.norm(self.encoder(self.digits(digits) + self.positions)))


def sequences(batch_size: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields digits and the same in order, both (N, LENGTH), without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        digits = torch.randint(10, (batch_size, LENGTH), generator=generator).to(device)
        yield digits, digits.sort().values


def loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Trains both twins.

    Returns:
        The rows of the final table; accuracy is the share of positions that are right.
    """
    parser = make_parser(
        "A transformer and its hyperized twin learn to sort digits.",
        compression=10.0,
        batch_size=64,
        lr=3e-3,
    )
    parser.add_argument(
        "--steps", type=int, default=600, metavar="N", help="training steps (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    digits, target = next(sequences(1000, args.seed + 1, args.device))
    torch.manual_seed(args.seed)
    return compare(
        Sorter(),
        sequences(args.batch_size, args.seed, args.device),
        args.steps,
        lambda model: (model(digits).argmax(2) == target).float().mean().item(),
        args,
        loss=loss,
        targets=("linear", "attention"),
    )[1]


if __name__ == "__main__":
    main()
