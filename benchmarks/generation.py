"""Generating weights, against the bare matrix products and against copying memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import FULL, QUICK, Effort, Row, alternate, per_item
from hyperize import HyperConfig, cached, hyperize
from hyperize.layers import Generated
from hyperize.parts import find_groups, generated_layers

Work = Callable[[], object]

LIMIT = 1.3
"""Generating ResNet-50's weights should take no more than this times its bare products."""


def rows(quick: bool) -> Iterator[Row]:
    effort = QUICK if quick else FULL
    models = ("resnet10t",) if quick else ("resnet50", "resnet18", "mobilenetv3_large_100")
    for name in models:
        target = LIMIT if name == "resnet50" else None
        yield from _of_model(name, timm.create_model(name), HyperConfig(seed=0), effort, target)
    forms = {"paper's form": HyperConfig.paper(seed=0)}
    forms["embeddings of channels"] = HyperConfig(embeddings="channel", seed=0)
    for form, config in forms.items():
        dense = timm.create_model(models[0])
        yield from _of_model(f"{models[0]}, {form}", dense, config, effort, None)
    yield from _growth("depth", (4, 8) if quick else (4, 16, 64), effort)
    yield from _growth("width", (32, 64) if quick else (64, 128, 256), effort)


def _of_model(
    name: str, dense: nn.Module, config: HyperConfig, effort: Effort, target: float | None
) -> Iterator[Row]:
    forward, both = generators(hyperize(dense, config))
    bare_forward, bare_both = products(hyperize(dense, config))
    title = f"generating all weights of {name}"
    yield alternate(f"{title} / bare products", forward, bare_forward, effort, target=target)
    yield alternate(
        f"{title}, forward and backward / bare products", both, bare_both, effort, target=target
    )
    if config == HyperConfig(seed=0):
        yield alternate(f"{title} / copying them", forward, copies(hyperize(dense, config)), effort)


def generators(hyper: nn.Module) -> tuple[Work, Work]:
    """Generate all weights: without gradients, and with the backward pass."""
    layers = [(m, name) for m in generated_layers(hyper).values() for name in m.generated]
    hypernet = find_groups(hyper)[0].hypernet
    parameters = [layer.embedding(name) for layer, name in layers]
    parameters += hypernet.parameters()
    gradients = _gradients(layers)

    @torch.no_grad()
    def forward() -> None:
        for layer, name in layers:
            layer.generate(name)

    def both() -> None:
        weights = [layer.generate(name) for layer, name in layers]
        torch.autograd.grad(weights, parameters, gradients)

    return forward, both


def together(hyper: nn.Module) -> tuple[Work, Work, Work]:
    """Generate all weights in a block of `cached`, entered anew each time.

    Returns:
        Reading each as an attribute, without gradients; what its layer does to read it, likewise;
        and the latter with the backward pass.
    """
    layers = [(m, name) for m in generated_layers(hyper).values() for name in m.generated]
    parameters, gradients = list(hyper.parameters()), _gradients(layers)

    @torch.no_grad()
    def read() -> None:
        with cached(hyper):
            for layer, name in layers:
                getattr(layer, name)

    @torch.no_grad()
    def forward() -> None:
        with cached(hyper):
            for layer, name in layers:
                layer.generate(name)

    def both() -> None:
        with cached(hyper):
            weights = [layer.generate(name) for layer, name in layers]
        # The model's own parameters, as norms and biases, have no part in this
        torch.autograd.grad(weights, parameters, gradients, allow_unused=True)

    return read, forward, both


def _gradients(layers: list[tuple[Generated, str]]) -> list[Tensor]:
    """Noise in the place of the gradients of generated weights."""
    return [
        torch.randn(layer.grids[name].shape, device=layer.embedding(name).device)
        for layer, name in layers
    ]


def products(hyper: nn.Module, joined: bool = False) -> tuple[Work, Work]:
    """The matrix products of the same sizes: forward, and forward and backward.

    A product's backward pass is two products. What comes besides (scales, offsets, biases, sums
    over the sites) is the generator's, and not here.

    Args:
        hyper: The hyperized model.
        joined: One product for all weights of a head, in the place of one for each weight.
    """
    operands = [
        pair
        for layer in generated_layers(hyper).values()
        for name in layer.generated
        for pair in _operands(layer, name)
    ]
    if joined:
        sharing: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for pair in operands:
            sharing.setdefault(pair[1].shape, []).append(pair)
        operands = [
            (torch.cat([left for left, _ in pairs]), pairs[0][1]) for pairs in sharing.values()
        ]
    gradients = [left.new_empty(len(left), right.shape[1]).normal_() for left, right in operands]

    @torch.no_grad()
    def forward() -> None:
        for left, right in operands:
            torch.mm(left, right)

    @torch.no_grad()
    def both() -> None:
        kept = [torch.mm(left, right) for left, right in operands]
        for (left, right), gradient in zip(operands, gradients, strict=True):
            torch.mm(gradient, right.t())
            torch.mm(left.t(), gradient)
        del kept  # alive until then, as the generated weights are

    return forward, both


@torch.no_grad()
def _operands(layer: Generated, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """What the products of a generated weight multiply."""
    hypernet, embedding = layer.hypernet, layer.embedding(name)
    site = embedding, layer.get_buffer(f"{name}_constants"), layer.grids[name]
    rows, weight, _ = hypernet.family.factors(hypernet, site)
    yield rows.clone(), weight.clone().t()
    for shared in hypernet.plan.shared:
        yield embedding.detach(), hypernet.layer(shared)[0].detach().t()


def copies(hyper: nn.Module) -> Work:
    """Copies all weights once: what is written, is read before. The limit is memory's speed."""
    weights = [torch.randn(p.site.shape) for p in find_groups(hyper)[0].plan.sites]

    def copy() -> None:
        for weight in weights:
            weight.clone()

    return copy


def _growth(axis: str, sizes: tuple[int, ...], effort: Effort) -> Iterator[Row]:
    """Time per weight in deeper or wider networks, against that of the smallest."""

    def generator(size: int) -> tuple[Work, int]:
        layers, channels = (size, 64) if axis == "depth" else (8, size)
        convolutions = [nn.Conv2d(channels, channels, 3) for _ in range(layers)]
        # The planner would give larger models longer embeddings, and more work per weight
        hyper = hyperize(
            nn.Sequential(*convolutions), embedding_dim=64, hidden_dim=0, tile=(1, 64), seed=0
        )
        return generators(hyper)[1], layers * channels**2 * 9

    base, few = generator(sizes[0])
    unit = "layers" if axis == "depth" else "channels"
    for size in sizes[1:]:
        run, many = generator(size)
        name = f"generating, per weight, {size} {unit} / {sizes[0]} {unit}"
        growth = size / sizes[0]
        row = alternate(name, run, base, effort, series=f"generation, {axis}", growth=growth)
        yield per_item(row, many, few)
