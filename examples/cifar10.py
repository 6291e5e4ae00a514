"""Trains a hyperized ResNet-18 on CIFAR-10, and writes a small file and one of dense weights.

    python examples/cifar10.py --data-dir data --download
    python examples/cifar10.py --data-dir images    # train/CLASS/IMAGE and test/CLASS/IMAGE

Read it from top to bottom: nothing is imported from the other examples.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import CIFAR10, ImageFolder

from hyperize import HyperMuon, dense_state_dict, hyperize, report, save


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, writes both files, and returns the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10, or two folders")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 to --data-dir")
    parser.add_argument("--compression", type=float, default=10.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    # Data: torchvision's CIFAR-10, or folders of images of any size with one folder per class
    resize, to_input = T.Resize((32, 32)), [T.ToTensor(), T.Normalize([0.5] * 3, [0.25] * 3)]
    still = T.Compose([resize, *to_input])
    moved = T.Compose([resize, T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *to_input])
    try:
        if args.download or not (args.data_dir / "train").is_dir():
            train = CIFAR10(args.data_dir, True, moved, download=args.download)
            test = CIFAR10(args.data_dir, False, still)
        else:
            train = ImageFolder(args.data_dir / "train", moved)
            test = ImageFolder(args.data_dir / "test", still)
    except (OSError, RuntimeError) as error:
        expected = "neither CIFAR-10 (--download fetches it) nor train/CLASS and test/CLASS"
        parser.exit(1, f"{parser.prog}: --data-dir {args.data_dir} has {expected}: {error}\n")
    batches = DataLoader(train, 128, shuffle=True, num_workers=2)

    # The model, hyperized: the same class and the same calls with a tenth of the weights
    model = timm.create_model("resnet18", num_classes=len(train.classes))
    hyper = hyperize(model, compression=args.compression, seed=0).to(device)
    print(report(hyper))

    # Training, as of any model; the optimizer measures its steps in the generated weights
    optimizer = HyperMuon(hyper, lr=0.02, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=args.epochs * len(batches), cycle_momentum=False
    )
    for epoch in range(args.epochs):
        hyper.train()
        for images, labels in batches:
            loss = F.cross_entropy(hyper(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        right = 0
        hyper.eval()
        with torch.no_grad():
            for images, labels in DataLoader(test, 500, num_workers=2):
                right += (hyper(images.to(device)).argmax(1).cpu() == labels).sum().item()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {right / len(test):.2%}")

    # Two files: a small one with the generator, and one that needs no hyperize
    args.out.mkdir(parents=True, exist_ok=True)
    print(save(hyper, args.out / "hyper.safetensors", dtype="int8"))
    save_file(dense_state_dict(hyper), args.out / "dense.safetensors")
    return right / len(test)


if __name__ == "__main__":
    main()
