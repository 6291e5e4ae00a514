"""The same work done by other libraries, where they can do it.

Each peer gets a ResNet and about as many parameters as hyperize's plan has, in the way that its
documentation shows. What it cannot do, and what is not installed, is a row that says so.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.generation import generators, together
from benchmarks.running import CLASSES, FORMS, training_step
from benchmarks.timing import FULL, QUICK, Row, alternate
from hyperize import Plan, hyperize, make_plan


class Cannot(Exception):
    """A peer has no way to do this; the message says why."""


@dataclass(frozen=True)
class Made:
    """A model as a peer makes it.

    Attributes:
        generate: Makes all weights from the parameters.
        parameters: What the weights are made from.
        network: Computes the model's outputs, with the generator in it; None if the peer has none.
    """

    generate: Callable[[], Sequence[Tensor]]
    parameters: list[nn.Parameter]
    network: nn.Module | None


Make = Callable[[nn.Module, Plan], Made]
Compare = Callable[..., Row]


def rows(quick: bool, device: str = "cpu", compare: Compare | None = None) -> Iterator[Row]:
    """What is asked of every peer.

    Args:
        quick: Small sizes.
        device: Of all models.
        compare: Makes a row of its name, hyperize's work, the peer's, and a note; by default
            both are timed in turn on the CPU.
    """
    if compare is None:
        compare = partial(alternate, effort=QUICK if quick else FULL)
    model, batch = ("resnet10t", 2) if quick else ("resnet18", 32)
    for title, (package, make) in PEERS.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Row(f"hyperize / {title}", note=f"{package} is not installed")
            continue
        for what, work in WORKS.items():
            name = f"{what} {model}, hyperize / {title}"
            torch.manual_seed(0)
            try:
                dense = timm.create_model(model).to(device)
                yield work(name, dense, _on(device, make), compare, batch)
            except Cannot as error:
                yield Row(name, note=f"cannot: {error}")
            except Exception as error:  # somebody else's code, and any torch
                yield Row(name, note=f"does not run: {type(error).__name__}: {error}"[:200])


def _on(device: str, make: Make) -> Make:
    """As a peer makes its model, with all of it on a device."""
    if device == "cpu":
        return make

    def elsewhere(dense: nn.Module, plan: Plan) -> Made:
        with torch.device(device):
            made = make(dense, plan)
        for parameter in made.parameters:  # not all of them are made where torch says
            parameter.data = parameter.data.to(device)
        if made.network is not None:
            made.network.to(device)
        return made

    return elsewhere


def _making(name: str, dense: nn.Module, make: Make, compare: Compare, batch: int) -> Row:
    plan = make_plan(dense)
    made = make(copy.deepcopy(dense), plan)
    note = f"{plan.hyper_params:,} / {sum(p.numel() for p in made.parameters):,} parameters"
    return compare(
        name,
        lambda: hyperize(dense, seed=0),
        lambda: make(copy.deepcopy(dense), plan),  # hyperize() copies the model, too
        note=note,
    )


def _generating(name: str, dense: nn.Module, make: Make, compare: Compare, batch: int) -> Row:
    made = make(copy.deepcopy(dense), make_plan(dense))
    gradients = [torch.randn_like(weight) for weight in made.generate()]

    def generate() -> None:
        torch.autograd.grad(made.generate(), made.parameters, gradients, allow_unused=True)

    on_cpu = next(dense.parameters()).device.type == "cpu"
    ours = (generators if on_cpu else together)(hyperize(dense, seed=0))[-1]
    return compare(name, ours, generate, note="forward and backward")


def _training(
    name: str, dense: nn.Module, make: Make, compare: Compare, batch: int, form: str = ""
) -> Row:
    made = make(copy.deepcopy(dense), make_plan(dense))
    if made.network is None:
        raise Cannot("it has no way to put generated weights into a model that is not its own")
    device = next(dense.parameters()).device
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(CLASSES, (batch,))
    images, labels = images.to(device), labels.to(device)
    networks = (hyperize(dense, seed=0, **FORMS[form]).train(), made.network.train())
    ours, theirs = (training_step(network, images, labels) for network in networks)
    return compare(name, ours, theirs, note=f"32 px, batch {batch}")


WORKS: dict[str, Callable[[str, nn.Module, Make, Compare, int], Row]] = {
    "making": _making,
    "generating the weights of": _generating,
    "training step of": _training,
    "training step, factorized, of": partial(_training, form="factorized"),
    "training step, factorized channels, of": partial(_training, form="factorized channels"),
}
"""What each peer is asked for."""


# ------------------------------------------------------------------------------------------- peers
class _HyperLight(nn.Module):
    """As in hyperlight's README: the generator beside the main network."""

    def __init__(self, main: Any, generator: nn.Module) -> None:
        super().__init__()
        self.main, self.generator = main, generator
        self.register_buffer("h", torch.full((1, 1), 0.5))  # its input, one condition

    def weights(self) -> dict[str, Tensor]:
        return self.generator(h=self.h)

    def forward(self, x: Tensor) -> Tensor:
        with self.main.using_externals(self.weights()):
            return self.main(x)


def hyperlight(dense: nn.Module, plan: Plan) -> Made:
    """One fully connected layer writes all weights, so it has more parameters than they are."""
    import hyperlight as hl

    main = hl.hypernetize(dense, modules=hl.find_modules_of_type(dense, [nn.Conv2d]))
    generator = hl.HyperNet(
        input_shapes={"h": (1,)}, output_shapes=main.external_shapes(), hidden_sizes=[]
    )
    model = _HyperLight(main, generator)
    return Made(lambda: list(model.weights().values()), list(generator.parameters()), model)


def hyper_nn(dense: nn.Module, plan: Plan) -> Made:
    """One linear layer writes chunks of the vector of all parameters, biases and norms too."""
    from hypernn.torch import TorchLinearHyperNetwork

    weights = sum(p.numel() for p in dense.parameters())
    chunks, embedding = _chunks(weights, plan.hyper_params)
    model = TorchLinearHyperNetwork.from_target(
        dense, embedding_dim=embedding, num_embeddings=chunks
    )
    parameters = [p for p in model.parameters() if p.numel()]
    return Made(lambda: [model.generate_params()[0]], parameters, model)


def hypnettorch(dense: nn.Module, plan: Plan) -> Made:
    """A chunked hypernetwork without hidden layers, for the shapes of the plan."""
    from hypnettorch.hnets import ChunkedHMLP

    weights = sum(p.site.dense_params for p in plan.sites)
    chunks, embedding = _chunks(weights, plan.hyper_params)
    generator = ChunkedHMLP(
        [list(p.site.shape) for p in plan.sites],
        math.ceil(weights / chunks),
        chunk_emb_size=embedding,
        cond_chunk_embs=True,
        cond_in_size=0,
        layers=(),
        verbose=False,
    )
    return Made(lambda: generator(cond_id=0), list(generator.parameters()), None)


def _chunks(weights: int, parameters: int) -> tuple[int, int]:
    """How many chunks of the weights, and the length of their embeddings, for so many parameters.

    Chunks times embedding + width times (embedding + 1), where the width is that of a chunk.
    """
    chunks = round(math.sqrt(weights))
    width = math.ceil(weights / chunks)
    return chunks, max(1, (parameters - width) // (chunks + width))


def tensorly_torch(factorization: str) -> Make:
    """Factorized convolutions, each of its own, started at random as hyperize() starts."""

    def make(dense: nn.Module, plan: Plan) -> Made:
        from tltorch import FactorizedConv

        rank = plan.hyper_params / plan.dense_params
        factorized = []
        for planned in plan.sites:
            layer = FactorizedConv.from_conv(
                dense.get_submodule(planned.site.path),
                rank=rank,
                factorization=factorization,
                implementation="factorized",
                decompose_weights=False,
            )
            dense.set_submodule(planned.site.path, layer)
            factorized.append(layer)
        return Made(
            lambda: [layer.weight.to_tensor() for layer in factorized],
            [p for layer in factorized for p in layer.parameters()],
            dense,
        )

    return make


PEERS: dict[str, tuple[str, Make]] = {
    "hyperlight": ("hyperlight", hyperlight),
    "hyper-nn": ("hyper-nn", hyper_nn),
    "hypnettorch": ("hypnettorch", hypnettorch),
    "tensorly-torch, Tucker": ("tensorly-torch", tensorly_torch("tucker")),
    "tensorly-torch, CP": ("tensorly-torch", tensorly_torch("cp")),
}
"""Title -> package on PyPI, and how it makes its model of a dense one, which it may change."""
