"""Hyperize a timm model, and convert it back to a plain one: same outputs, bit for bit.

    python examples/quickstart.py
    python examples/quickstart.py --model resnet18 --compression 20 --out resnet18.safetensors

No data and no download: the weights are random, as at the start of a training run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hyperize import dense_state_dict, hyperize, report


def randomise_norms(model: nn.Module) -> None:
    """Draws the gains of all batch norms, in place.

    timm starts the last norm of each residual block at zero, where no convolution of the block has
    any influence on the output: two models would agree whatever their weights.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)


def convert(hyper: nn.Module, path: Path) -> None:
    """Writes the dense weights of a hyperized model to a safetensors file."""
    save_file({name: t.contiguous() for name, t in dense_state_dict(hyper).items()}, path)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> bool:
    """Runs the round trip.

    Returns:
        Whether the outputs of both models are equal.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="resnet50", help="a convolutional model of timm (default: %(default)s)"
    )
    parser.add_argument(
        "--compression",
        type=float,
        default=10.0,
        metavar="X",
        help="weights per parameter (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=2,
        metavar="N",
        help="images to compare (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and images (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="F", help="keep the dense .safetensors file")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    model = timm.create_model(args.model)
    randomise_norms(model)
    hyper = hyperize(model, compression=args.compression).eval()  # and now you would train it
    print(report(hyper), end="\n\n")

    fresh = timm.create_model(args.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = args.out or Path(folder) / f"{args.model}.safetensors"
        convert(hyper, path)
        fresh.load_state_dict(load_file(path), strict=True)

    images = torch.randn(args.batch_size, 3, 224, 224)
    ours, theirs = hyper(images), fresh(images)
    equal = torch.equal(ours, theirs)
    print(
        f"{args.model} loaded strictly from the dense file: outputs "
        f"{'EQUAL bit for bit' if equal else f'DIFFER by up to {(ours - theirs).abs().max():g}'} "
        f"({ours.numel():,} logits, {ours.min():.1f} to {ours.max():.1f})"
    )
    return equal


if __name__ == "__main__":
    main()
