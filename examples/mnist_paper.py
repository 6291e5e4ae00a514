"""MNIST as in "HyperNetworks": a network with one generated convolution, beside its dense twin.

    python examples/mnist_paper.py --data-dir data               # 50 epochs, some minutes
    python examples/mnist_paper.py --data-dir data --epochs 1    # a quick look

Two convolutions of 7x7 and a linear classifier, 21,210 parameters. In the hyper network the second
convolution's kernel, 12,544 weights, is generated from an embedding of 4 numbers: 12,910 parameters
in all. The paper (arXiv 1609.09106, sec. 4.1) reports 99.28 % and 99.24 % test accuracy.

The recipe is the paper's: Adam, batches of 1000, 50 epochs, images padded to 30x30 and cropped at
random. Its learning rate is 0.001; used here is the one of its author's notebook, which starts at
0.005 and decays exponentially towards 0.0001, so that the last step has about that rate.

`--data-dir` is the root that `torchvision.datasets.MNIST` takes. The output folder receives a
picture of both second kernels, `kernels.png`, as in the paper's figure (it needs matplotlib), the
hyper network, for `hyperize.load`, and a checkpoint per epoch: after a kill, start it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paper import experiment, make_parser, make_run, positive, steps_per_epoch
from torch import Tensor, nn
from train_mnist import read
from twins import Result, refuse

from hyperize import HyperConfig, dense_state_dict, hyperize, report

RATES = (0.005, 0.0001)
"""Learning rate of the first and of the last step."""


class MnistNet(nn.Module):
    """The paper's network for MNIST: two 7x7 convolutions and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 7, padding="same")
        self.conv2 = nn.Conv2d(16, 16, 7, padding="same")
        self.fc = nn.Linear(7 * 7 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        # ReLU and pooling commute; this order is the faster one
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc(x.flatten(1))  # (N, 16, 7, 7) -> (N, 784)


def paper_config(**overrides: Any) -> HyperConfig:
    """The paper's setting for this network: Nz = d = 4, the first convolution stays dense."""
    return HyperConfig.paper(embedding_dim=4, hidden_dim=4, exclude="conv1", **overrides)


def figure_class() -> Any:
    """The Figure of matplotlib, which is imported only where something is drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the picture of the kernels needs matplotlib: pip install 'hyperize[plot]'"
        ) from error
    return Figure


def mosaic(kernels: Tensor) -> Tensor:
    """All kernels of a convolution, (out, in, h, w), as one image with gaps of NaN.

    Returns:
        An image of (out * (h + 1) - 1, in * (w + 1) - 1) pixels: a row of kernels for each output
        channel, a column for each input channel.
    """
    framed = F.pad(kernels, (0, 1, 0, 1), value=float("nan"))
    # (out, in, h, w) -> (out * h, in * w)
    image = framed.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return image[:-1, :-1]


def draw_kernels(panels: dict[str, Tensor], path: Path) -> None:
    """Draws mosaics of kernels side by side, each from black to white in its own range.

    Args:
        panels: Title -> kernels, (out, in, h, w).
        path: The PNG file to write.
    """
    figure = figure_class()(figsize=(4 * len(panels), 4.25), layout="constrained")
    for axes, (title, kernels) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        kernels = kernels.detach().float().cpu()
        limit = kernels.abs().flatten().quantile(0.99).item()  # a few outliers would grey the rest
        image = mosaic(kernels).numpy()
        axes.imshow(image, cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    figure.savefig(path, dpi=100)


def make_optimizer(model: nn.Module, generator_rate: float) -> torch.optim.Adam:
    """Adam at a learning rate of 1, or `generator_rate` for the parameters that generate weights.

    The hypernetwork's output is scaled by a constant, the standard deviation of the dense kernel
    at its start, 0.02. One step of Adam then moves a generated weight far less than a dense one:
    at a rate of 1 the kernels keep most of their initial noise (99.19 % of the test images after
    50 epochs of seed 0, against 99.30 % at 5).
    """
    generating: set[nn.Parameter] = set()
    if (hypernet := getattr(model, "hypernet", None)) is not None:
        embeddings = (model.get_parameter(planned.site.name) for planned in hypernet.plan.sites)
        generating = {*embeddings, *hypernet.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if (p in generating) is part], "lr": rate}
        for part, rate in ((False, 1.0), (True, generator_rate))
    ]
    return torch.optim.Adam(groups)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Trains both networks and draws their second kernels.

    Returns:
        The rows of the final table.
    """
    parser = make_parser(
        "MNIST as in the HyperNetworks paper: dense and hyper.",
        batch_size=1000,
        out=Path("runs/mnist_paper"),
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        default=50,
        metavar="N",
        help="passes over the data (default: %(default)s)",
    )
    parser.add_argument(
        "--generator-rate",
        type=float,
        default=5.0,
        metavar="X",
        help="learning rate of what generates, as a multiple of the others' (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        figure_class()  # found wanting now rather than after the training
        train, test = (read(args.data_dir, train).to(args.device) for train in (True, False))
    except ImportError as error:
        refuse(parser, error)
    except FileNotFoundError as error:
        refuse(parser, f"--data-dir {error}")
    torch.manual_seed(args.seed)
    # On a CPU, channels_last takes about 0.6 times the time
    dense = MnistNet().to(args.device).to(memory_format=torch.channels_last)
    hyper = hyperize(dense, paper_config(seed=args.seed))
    print(report(hyper), end="\n\n")
    steps = args.epochs * steps_per_epoch(train, args.batch_size)

    def rate(step: int) -> float:
        first, last = RATES
        return first * (last / first) ** (step / steps)

    runs = [
        make_run(name, model, make_optimizer(model, args.generator_rate), rate, steps)
        for name, model in (("dense", dense), ("hyper", hyper))
    ]
    results = experiment(runs, (train, test), args, pad=1)
    with torch.no_grad():
        panels = {
            "dense: 12,544 weights": dense.conv2.weight,
            "hyper: generated from 4,244 parameters": dense_state_dict(hyper)["conv2.weight"],
        }
        draw_kernels(panels, args.out / "kernels.png")
    print(f"kernels, hyper network and checkpoint: {args.out}")
    return results


if __name__ == "__main__":
    main()
