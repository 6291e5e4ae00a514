"""What is trained and how: the networks, the ways to make them small, optimizers and rates.

Imported by `benchmarks/accuracy.py`. A method is written as its name and, behind a colon, what
differs from its usual recipe or request: `tile`, `tile:optimizer=muon,l2=0`, `tile:hidden_dim=32`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock
from timm.models.resnet import ResNet as TimmResNet
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_wrn_paper import WideResNet
from train_cifar import SIZES, ResNet

from benchmarks.lowrank import Replace, cp, shrunk, size, svd, tucker
from hyperize import HyperConfig, HyperMuon, hyperize, param_groups
from hyperize.parts import generated_layers

WIDTHS = 0.99
"""Factor by which a thinner network's width is lowered until it is small enough."""


@dataclass(frozen=True)
class Subject:
    """A network to be made small.

    Attributes:
        make: From the number of classes and a factor on its widths to the network.
        options: Of `hyperize`, for all of our methods.
    """

    make: Callable[[int, float], nn.Module]
    options: Mapping[str, Any]


def resnet(n: int, classes: int, width: float) -> nn.Module:
    return ResNet(n, classes, 16 * width)


def wide_resnet(depth: int, k: int, classes: int, width: float) -> nn.Module:
    return WideResNet(depth, k * width, classes)


def resnet18(classes: int, width: float) -> nn.Module:
    """The ResNet-18 of timm with a stem for images of 32 pixels: 3x3, no stride, no pooling."""
    widths = tuple(round(n * width) for n in (64, 128, 256, 512))
    model = TimmResNet(BasicBlock, (2, 2, 2, 2), classes, channels=widths)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def vit(classes: int, width: float) -> nn.Module:
    """A vision transformer for images of 32 pixels: 6 blocks, 3 heads, patches of 4."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=classes,
        img_size=32,
        patch_size=4,
        depth=6,
        embed_dim=3 * round(64 * width),
    )


STEM: Mapping[str, Any] = {"exclude": "conv1"}
SUBJECTS: dict[str, Subject] = {
    **{name: Subject(partial(resnet, n), STEM) for name, n in SIZES.items()},
    **{
        f"wrn{depth}-{k}": Subject(partial(wide_resnet, depth, k), STEM)
        for depth, k in ((16, 1), (40, 1), (40, 2))
    },
    "resnet18": Subject(resnet18, STEM),
    "vit": Subject(vit, {"targets": "linear", "exclude": "head"}),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        optimizer: "sgd" (Nesterov momentum 0.9), "adam", or "muon" (`hyperize.HyperMuon`).
        lr: Middle of the learning rates to choose from.
        decay: Weight decay, of generated weights only for "muon". Decoupled from the gradients but
            for "sgd".
        l2: With a decay of 0: L2 penalty on kernels, generated ones or not, for "sgd" and "adam".
    """

    optimizer: str
    lr: float
    decay: float = 0.0
    l2: float = 0.0


Build = Callable[[Subject, int, int, int, Mapping[str, Any]], nn.Module]
"""From a subject, classes, most parameters, seed and further options to a network."""


@dataclass(frozen=True)
class Method:
    """A way to make a network small, with its usual recipe."""

    build: Build
    recipe: Recipe


def dense(subject: Subject, classes: int, most: int, seed: int, options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return subject.make(classes, 1.0)


def ours(subject: Subject, classes: int, most: int, seed: int, options: Any) -> nn.Module:
    model = dense(subject, classes, most, seed, {})
    return hyperize(model, **{"max_params": most, **subject.options, **options}, seed=seed)


def embedded(embeddings: str) -> Build:
    """Ours, with embeddings of a kind."""

    def build(subject: Subject, classes: int, most: int, seed: int, options: Any) -> nn.Module:
        return ours(subject, classes, most, seed, {"embeddings": embeddings, **options})

    return build


def paper(subject: Subject, classes: int, most: int, seed: int, options: Any) -> nn.Module:
    model = dense(subject, classes, most, seed, {})
    return hyperize(model, HyperConfig.paper(**{**subject.options, **options}, seed=seed))


def thin(subject: Subject, classes: int, most: int, seed: int, options: Any) -> nn.Module:
    width = 1.0
    while True:
        with torch.device("meta"):
            small = size(subject.make(classes, width)) <= most
        if small:
            torch.manual_seed(seed)
            return subject.make(classes, width)
        width *= WIDTHS


def lowrank(replace: Replace) -> Build:
    """Layers as chains of smaller ones, which start at the decomposition of the dense start.

    The spectral initialisation of Khodak et al. 2021 (arXiv 2105.01029).
    """

    def build(subject: Subject, classes: int, most: int, seed: int, options: Any) -> nn.Module:
        model = dense(subject, classes, most, seed, {})
        paths = generated_layers(hyperize(copy.deepcopy(model), compression=2, **subject.options))
        return shrunk(model, paths, replace, most)

    return build


MUON = Recipe("muon", 0.02, decay=0.1)
METHODS: dict[str, Method] = {
    "dense": Method(dense, MUON),
    "thin": Method(thin, MUON),
    "svd": Method(lowrank(svd), MUON),
    "tucker": Method(lowrank(tucker), MUON),
    "cp": Method(lowrank(cp), MUON),
    "paper": Method(paper, MUON),
    "tile": Method(embedded("tile"), MUON),
    "channel": Method(embedded("channel"), MUON),
    "separable": Method(embedded("separable"), MUON),
}
FREE = ("dense", "paper")
"""Methods whose size is what it is."""


def parse(text: str) -> tuple[Method, dict[str, Any]]:
    """A method as written, with what it adds to the request.

    Raises:
        ValueError: There is no such method, or an option is not written as `name=value`.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    method, options = METHODS[name], {}
    types = {field.name: type(getattr(method.recipe, field.name)) for field in fields(Recipe)}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} in {text!r} is no name=value")
        if key in types:
            method = replace(method, recipe=replace(method.recipe, **{key: _typed(value)}))
        else:
            options[key] = _typed(value)
    return method, options


def _typed(text: str) -> Any:
    """A number, a pair of numbers as in 16x16, True or False, or else the text."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    first, times, second = text.partition("x")
    return (int(first), int(second)) if times and (first + second).isdigit() else text


def optimizer_of(model: nn.Module, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    """The recipe's optimizer, whose learning rates are the factors of its parameters' groups.

    Raises:
        ValueError: There is no such optimizer, or the recipe contradicts itself.
    """
    gpu = device.startswith("cuda")
    if recipe.decay and recipe.l2:
        raise ValueError(f"decay={recipe.decay} and l2={recipe.l2}: one of them must be 0")
    if recipe.l2 and recipe.optimizer == "muon":
        raise ValueError(f"l2={recipe.l2}: muon has no L2 penalty; give decay=")
    if recipe.optimizer == "muon":
        return HyperMuon(model, 1.0, recipe.decay, capturable=gpu)
    groups = param_groups(model, recipe.decay or recipe.l2)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, fused=gpu)
    if recipe.optimizer == "adam":
        adam = torch.optim.AdamW if recipe.decay else torch.optim.Adam
        return adam(groups, lr=1.0, fused=gpu, capturable=gpu)
    raise ValueError(f"there is no optimizer {recipe.optimizer!r}; there are sgd, adam and muon")
