"""One generator for convolutions and a BiLSTM: a text reader (CRNN) and its hyperized twin.

    python examples/crnn.py               # half a minute on two cores
    python examples/crnn.py --steps 20    # a quick look

The data is made here: strips of six digits in a 5x7 pixel font, placed at random, in noise. The
network reads them as in arXiv 1507.05717: convolutions turn the strip into a sequence of columns, a
bidirectional LSTM reads it, and CTC aligns its outputs with the digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import Result, compare, make_parser

from hyperize import to_dense

DIGITS, CELL, HEIGHT = 6, 10, 16
"""Digits on a strip, columns for each, rows of a strip."""
BLANK = 10
"""The class that CTC needs for "no digit"."""
FONT = (  # one byte per column, the top row in the lowest bit
    "3e5149453e 00427f4000 4261514946 2141454b31 1814127f10 "
    "2745454539 3c4a494930 0171090503 3649494936 064949291e"
)


class CRNN(nn.Module):
    """Convolutions, a bidirectional LSTM over the columns, a classifier of each column."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            block(1, 32, pool=(2, 2)), block(32, 64, pool=(2, 2)), block(64, 128, pool=(4, 1))
        )
        self.reader = nn.LSTM(128, hidden, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * hidden, BLANK + 1)

    def forward(self, strips: Tensor) -> Tensor:  # noqa: D102
        columns = self.trunk(strips).squeeze(2).transpose(1, 2)  # (N, T, C)
        return self.classifier(self.reader(columns)[0])


def block(n_in: int, n_out: int, pool: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
        nn.MaxPool2d(pool),
    )


def font() -> Tensor:
    """The digits as images, (10, 7, 5)."""
    columns = torch.tensor([list(bytes.fromhex(glyph)) for glyph in FONT.split()])
    return columns[:, None, :].bitwise_right_shift(torch.arange(7)[:, None]).bitwise_and(1).float()


def strips(batch_size: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields strips, (N, 1, HEIGHT, DIGITS * CELL), and their digits, (N, DIGITS), without end."""
    generator = torch.Generator().manual_seed(seed)
    glyphs = font()
    height, width = glyphs.shape[1:]
    shape = (batch_size, DIGITS)
    while True:
        digits = torch.randint(10, shape, generator=generator)
        top = torch.randint(HEIGHT - height + 1, shape, generator=generator)
        left = torch.randint(CELL - width + 1, shape, generator=generator)
        left += CELL * torch.arange(DIGITS)
        canvas = 0.4 * torch.randn(batch_size, HEIGHT, DIGITS * CELL, generator=generator)
        strip = torch.arange(batch_size)[:, None, None, None]
        rows = (top[..., None] + torch.arange(height))[..., :, None]
        columns = (left[..., None] + torch.arange(width))[..., None, :]
        canvas[strip, rows, columns] += glyphs[digits]
        yield canvas[:, None].to(device), digits.to(device)


def ctc(logits: Tensor, digits: Tensor) -> Tensor:
    n, length = logits.shape[:2]
    return F.ctc_loss(
        logits.log_softmax(2).transpose(0, 1),
        digits,
        input_lengths=torch.full((n,), length),
        target_lengths=torch.full((n,), DIGITS),
        blank=BLANK,
    )


def read(model: nn.Module, images: Tensor) -> list[list[int]]:
    """The digits that the model sees: its best class per column, less repeats and blanks."""
    best = model(images).argmax(2)
    return [[c for c in row.unique_consecutive().tolist() if c != BLANK] for row in best]


def read_correctly(model: nn.Module, images: Tensor, digits: Tensor) -> float:
    """The share of strips whose digits are all right."""
    pairs = zip(read(model, images), digits.tolist(), strict=True)
    return sum(ours == truth for ours, truth in pairs) / len(digits)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Trains both twins, and converts the hyper twin to a dense model.

    Returns:
        The rows of the final table.
    """
    parser = make_parser(
        "One generator for convolutions and a BiLSTM: a CRNN and its hyperized twin.",
        compression=10.0,
        batch_size=32,
        lr=0.02,
    )
    parser.add_argument(
        "--steps", type=int, default=400, metavar="N", help="training steps (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    images, digits = next(strips(1000, args.seed + 1, args.device))
    torch.manual_seed(args.seed)
    hyper, results = compare(
        CRNN(),
        strips(args.batch_size, args.seed, args.device),
        args.steps,
        lambda model: read_correctly(model, images, digits),
        args,
        loss=ctc,
    )
    with torch.no_grad():
        equal = torch.equal(to_dense(hyper)(images), hyper(images))
    print(f"to_dense: outputs {'EQUAL bit for bit' if equal else 'DIFFER'}")
    return results


if __name__ == "__main__":
    main()
