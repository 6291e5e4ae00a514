"""A model of your own, hyperized: a small U-Net that finds disks in noise, on data made here.

    python examples/own_model.py                # a minute or two on two cores
    python examples/own_model.py --steps 20     # a quick look

Nothing in it is from timm. Everything is here, top to bottom: model, training, and the files with
which the model comes back in another program.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperize import hyperize, load, param_groups, report, save, to_dense


class UNet(nn.Module):
    """Down twice, up twice, with skip connections."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.down1, self.down2, self.middle = block(1, a), block(a, b), block(b, c)
        self.up2, self.up1 = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.merge2, self.merge1 = block(2 * b, b), block(2 * a, a)
        self.head = nn.Conv2d(a, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.middle(F.max_pool2d(coarse, 2))
        x = self.merge2(torch.cat([self.up2(x), coarse], 1))
        x = self.merge1(torch.cat([self.up1(x), fine], 1))
        return self.head(x)


def block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()
    )


def scenes(n: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images (n, 1, size, size) of two disks each in noise, and where the disks are."""
    centre, radius = torch.rand(n, 2, 2, 1, 1) * size, 3 + 4 * torch.rand(n, 2, 1, 1)
    rows, columns = torch.arange(size)[:, None], torch.arange(size)
    distance = torch.hypot(rows - centre[:, :, 0], columns - centre[:, :, 1])  # (n, 2, size, size)
    disks = (distance < radius).any(1, keepdim=True).float()
    return disks + torch.randn_like(disks), disks


def overlap(model: nn.Module, images: Tensor, disks: Tensor) -> float:
    """Intersection over union of the disks and what the model takes for them."""
    with torch.no_grad():
        found, truth = model.eval()(images) > 0, disks > 0
    return ((found & truth).sum() / (found | truth).sum()).item()


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, writes the small file, reads it, and returns the overlap on new images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--compression", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("runs/own_model"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    # Transposed convolutions are targets only where they are named, as all but Conv2d and LSTM
    targets = ("conv2d", "conv_transpose2d")
    hyper = hyperize(UNet(), compression=args.compression, targets=targets, seed=0)
    print(report(hyper))

    optimizer = torch.optim.AdamW(param_groups(hyper), lr=3e-3)
    for step in range(args.steps):
        images, disks = scenes(16)
        loss = F.binary_cross_entropy_with_logits(hyper(images), disks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    reached = overlap(hyper, *scenes(200))
    print(f"overlap with the disks of new images: {reached:.1%}")

    # Another program needs the class of the model, and the file
    args.out.mkdir(parents=True, exist_ok=True)
    print(save(hyper, args.out / "unet.safetensors"))
    again = load(UNet(), args.out / "unet.safetensors").eval()
    dense = to_dense(again)  # a plain UNet, for where there is no hyperize
    images, _ = scenes(2)
    with torch.no_grad():
        assert torch.equal(hyper(images), again(images))
        assert torch.equal(hyper(images), dense(images))
    return reached


if __name__ == "__main__":
    main()
