"""`HyperMuon`: Muon for hyperized models, whose steps are measured in the generated weights.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) changes a matrix by steps
whose singular values are all alike and as large as the learning rate says. Taken on embeddings,
such a step changes the weight by as much as the generator happens to be large, and along the
directions in which it happens to be. Here the step that the WEIGHT makes has equal singular values.
Embeddings Z with gradient G, which a head W makes the weight s Z W^T of, change by

    lr * c * orthogonal(G A^-1/2) A^-1/2,    A = s^2 W^T W,    orthogonal(X) = (X X^T)^-1/2 X

with Muon's factor c for the weight's sides. The same holds for the head, with the mean of A over
its weights, and for each other factor of a family, see `hyperize.family.Metric`. One learning
rate then suits embeddings, generator and dense weights, whatever their scale and number. For a
low-rank matrix of its own this is the rule of LoRA-Muon (arXiv 2606.12921).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from inspect import unwrap
from typing import Any, TypeVar

import torch
from timm.optim import Muon
from torch import Tensor, nn

from hyperize.config import ModelError
from hyperize.family import Metric, Site, widened
from hyperize.hypernet import HyperNet, no_autocast
from hyperize.layers import Generated
from hyperize.parts import generated_layers
from hyperize.tensors import is_sharded
from hyperize.training import param_groups

__all__ = ["HyperMuon"]

_T = TypeVar("_T")

RMS = 0.2
"""Root mean square of a whole step's entries at a learning rate of 1.

It is that of Liu et al. 2025 (arXiv 2502.16982), which timm's Muon has for dense weights.
"""
QUINTIC, QUINTIC_STEPS = (3.4445, -4.7750, 2.0315), 5
"""Muon's iteration, which brings all singular values near 1 in few steps, and their number."""
DAMPING, ROOT_STEPS = 0.01, 16
"""What a Gram matrix gets before it is inverted, in parts of its mean eigenvalue; and the steps of
an inverse root, enough for an eigenvalue of that size among 512."""
SMALLEST = 1e-12
"""What it gets besides, so that a matrix of zeros has an inverse, too."""


class HyperMuon(Muon):  # type: ignore[misc]  # timm has no types
    """Muon whose steps on embeddings and generator are measured in the generated weights.

    What generates no weights is trained as by timm's `Muon`: matrices by Muon, biases and norms by
    NAdam, all at one learning rate. For schedulers, checkpoints, closures and gradient scalers it
    is an optimizer like any other.

        optimizer = HyperMuon(hyper, lr=0.02, weight_decay=0.1)

    Args:
        model: A hyperized model, a part of one, or a plain model, wrapped or not, but not sharded.
            Its trainable parameters are trained. It does not know layers that are hyperized later.
        lr: Learning rate.
        weight_decay: Of matrices, and of the generated weights: the factors that these are products
            of share it equally. What `param_groups` spares, it spares, too; the embeddings of
            several networks or of a vector (`conditions`, `condition_dim`) do not decay.
        momentum: Of Muon.
        capturable: Whether steps are captured in a CUDA graph; needs timm 1.0.31.

    Raises:
        ConfigError: `weight_decay` is not a finite number of at least 0.
        ModelError: The model is not a module, has no trainable parameters, or is sharded.
        ValueError: As of timm's `Muon`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        capturable: bool = False,
    ) -> None:
        groups = param_groups(model, weight_decay)
        self.nets = _by_hypernet(model)
        making = [_matrices(hypernet, _entries(layers)) for hypernet, layers in self.nets]
        of_nets = {id(param) for params in making for param in params}
        for group in groups:
            group["params"] = [param for param in group["params"] if id(param) not in of_nets]
        for (hypernet, _), params in zip(self.nets, making, strict=True):
            factors = 1 + hypernet.family.degree + len(hypernet.plan.shared)
            params = [param for param in params if param.requires_grad]
            tables = [p for p in params if p.ndim > 2]  # of several networks
            matrices = [p for p in params if p.ndim == 2]
            groups.append({"params": matrices, "weight_decay": weight_decay / factors})
            groups.append({"params": tables, "weight_decay": 0.0})
        options = {"capturable": True} if capturable else {}
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=True, **options)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "nets": self.nets}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: Computes the loss anew, as for any optimizer.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "adamw_lr" in group:  # of older timm, whose biases and norms follow no schedule
                group["adamw_lr"] = group["lr"]
        groups = {id(param): group for group in self.param_groups for param in group["params"]}
        done = [p for net in self.nets for p in self._change(*net, groups)]
        gradients = [param.grad for param in done]
        for param in done:
            param.grad = None
        try:
            unwrap(Muon.step)(self)  # torch's wrapper would call the hooks of this step once more
        finally:
            for param, gradient in zip(done, gradients, strict=True):
                param.grad = gradient
        return loss

    def _change(
        self, hypernet: HyperNet, layers: Sequence[Generated], groups: dict[int, dict[str, Any]]
    ) -> list[nn.Parameter]:
        """The step of a hypernetwork and its embeddings; returns what it has changed."""
        entries = _entries(layers)
        matrices = _matrices(hypernet, entries)
        params = [p for p in matrices if id(p) in groups and p.grad is not None]
        if not params or not entries:
            return []
        family = hypernet.family
        with no_autocast(params[0].device.type):
            metrics = family.metrics(hypernet, [entry.site for entry in entries])
            if metrics is None:
                return []
            shared = {id(hypernet.get_parameter(path)): of for path, of in metrics[1].items()}
            tables = {id(entry.table) for entry in entries}
            params = [p for p in params if id(p) in shared or id(p) in tables]
            updates = {id(p): self._update(p, groups[id(p)]) for p in params}
            parts = [
                _Part(p, updates[id(p)][0][0], shared[id(p)], groups[id(p)]["lr"])
                for p in params
                if id(p) in shared
            ]
            for entry, of_entry in zip(entries, metrics[0], strict=True):
                if (key := id(entry.table)) in updates:
                    update, seen = (t[entry.network] for t in updates[key])
                    rows, lr = family.split(entry.site[2]), groups[key]["lr"] * seen
                    both = entry.site[0].split(rows), update.split(rows)
                    parts += [_Part(*part, lr) for part in zip(*both, of_entry, strict=True)]
            _take([part.laid_out() for part in parts])
        return params

    def _update(self, param: nn.Parameter, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Decays a parameter, and makes what its step is to be the orthogonal form of.

        Returns:
            Gradients with Nesterov's momentum, (B, m, n), and which of the B networks this step's
            loss has reached, (B,) of ones and zeros. What has decayed of its momentum would make a
            whole step of another network otherwise.
        """
        assert param.grad is not None
        param.mul_(1 - group["lr"] * group["weight_decay"])
        state, momentum = self.state[param], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        shape = (-1, *param.shape[-2:])  # (m, n) or (B, m, n) -> (B, m, n)
        gradient, buffer = param.grad.reshape(shape), state["momentum_buffer"].view(shape)
        seen = gradient.new_ones(len(gradient))
        if param.ndim > 2:
            seen = (gradient != 0).flatten(1).any(1).to(gradient)
        buffer.lerp_(gradient, (1 - momentum) * seen[:, None, None])
        return gradient.lerp(buffer, momentum), seen


@dataclass(frozen=True)
class _Entry:
    """The embeddings of one weight in one network.

    Attributes:
        table: The parameter that holds them, of all networks if there are several.
        network: Which of these.
        site: What the weight is made of.
    """

    table: nn.Parameter
    network: int
    site: Site


@dataclass(frozen=True)
class _Part:
    """A matrix of parameters, or some rows of one, that makes weights.

    Attributes:
        value: View of the parameter, (m, n).
        update: What is to be made orthogonal, (m, n).
        metric: How far it moves the weights.
        lr: Learning rate.
    """

    value: Tensor
    update: Tensor
    metric: Metric
    lr: Any

    def laid_out(self) -> _Part:
        """With value and update in the metric's shape."""
        shape = self.metric.shape
        if shape is None:
            return self
        count = math.prod(shape)
        value, update = (x.reshape(-1)[:count].view(shape) for x in (self.value, self.update))
        return replace(self, value=value, update=update)


def _by_hypernet(model: nn.Module) -> list[tuple[HyperNet, list[Generated]]]:
    """The hypernetworks of a model with the layers that they generate for."""
    found: dict[HyperNet, list[Generated]] = {}
    for layer in generated_layers(model).values():
        found.setdefault(layer.hypernet, []).append(layer)
    for hypernet, layers in found.items():
        tables = [layer.embedding(name) for layer in layers for name in layer.generated]
        params = [*hypernet.parameters(), *tables]
        if any(map(is_sharded, params)):
            raise ModelError(
                "HyperMuon takes whole matrices, and those of this model are sharded (DTensors). "
                "Train it with DistributedDataParallel, or with an optimizer that goes entry by "
                "entry, as torch.optim.AdamW."
            )
    return list(found.items())


def _matrices(hypernet: HyperNet, entries: Sequence[_Entry]) -> list[nn.Parameter]:
    """The embeddings and the hypernetwork's matrices, each once."""
    shared = [param for param in hypernet.parameters() if param.ndim == 2]
    tables = [entry.table for entry in entries]
    return list({id(param): param for param in (*tables, *shared)}.values())


def _entries(layers: Sequence[Generated]) -> list[_Entry]:
    """What the weights of layers are made of, but of those that are dense by now."""
    entries = []
    for layer in layers:
        for name in layer.generated if isinstance(layer, Generated) else ():
            table, constants = layer.embedding(name), layer.all_constants(name)
            for number, z in enumerate(table.view(-1, *table.shape[-2:])):
                own = constants if constants.ndim == 1 else constants[number]
                entries.append(_Entry(table, number, (z, own, layer.grids[name])))
    return entries


def _take(parts: Sequence[_Part]) -> None:
    """Changes the values, those of one shape together."""
    grams = {id(g): g for p in parts for g in (p.metric.right, p.metric.left) if g is not None}
    roots: dict[int, Tensor] = {}
    for alike in _alike(grams.values(), lambda gram: gram.shape):
        made = inverse_root(widened(torch.stack(alike)))
        roots.update(zip(map(id, alike), made, strict=True))
    for group in _alike(parts, _form):
        right = [roots[id(part.metric.right)] for part in group if part.metric.right is not None]
        left = [roots[id(part.metric.left)] for part in group if part.metric.left is not None]
        update = widened(torch.stack([part.update for part in group]))
        steps = _left(left, _right(orthogonal(_left(left, _right(update, right))), right))
        for part, step in zip(group, steps, strict=True):
            size = RMS * math.sqrt(max(part.metric.sides)) * part.lr
            if part.metric.scale is not None:
                size = size / part.metric.scale
            part.value.sub_((step * size).to(part.value.dtype))


def _form(part: _Part) -> tuple[torch.Size, bool, bool]:
    """What parts have in common whose steps are made together."""
    return part.value.shape, part.metric.left is None, part.metric.right is None


def _right(x: Tensor, roots: Sequence[Tensor]) -> Tensor:
    """Matrices x (N, m, n) times a matrix (n, n) for each, if there are any."""
    return x @ torch.stack(list(roots)) if roots else x


def _left(roots: Sequence[Tensor], x: Tensor) -> Tensor:
    """Blocks of rows multiplied by matrices: (b, b) for each of the matrices x, (N, m, n)."""
    if not roots:
        return x
    matrices = torch.stack(list(roots))[:, None]
    blocks = x.unflatten(1, (-1, matrices.shape[-1]))  # (N, m, n) -> (N, m / b, b, n)
    product: Tensor = matrices @ blocks
    return product.flatten(1, 2)  # (N, m / b, b, n) -> (N, m, n)


def orthogonal(x: Tensor) -> Tensor:
    """Matrices with singular values near 1 in the place of their own, by Muon's iteration.

    Args:
        x: (B, m, n).
    """
    a, b, c = QUINTIC
    wide: Tensor = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(QUINTIC_STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def inverse_root(gram: Tensor) -> Tensor:
    """A^-1/2 of positive semidefinite matrices A, to which `DAMPING` is added.

    By Newton's iteration, which is made of products, so that a CUDA graph can have it (Higham 2008,
    "Functions of Matrices", eq. 6.35).

    Args:
        gram: (B, n, n).
    """
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    gram = gram + (DAMPING * mean + SMALLEST) * one
    norm = gram.norm(dim=(1, 2), keepdim=True)
    root, inverse = gram / norm, one.expand_as(gram)
    for _ in range(ROOT_STEPS):
        factor = 1.5 * one - 0.5 * inverse @ root
        root, inverse = root @ factor, factor @ inverse
    result: Tensor = inverse / norm.sqrt()
    return result


def _alike(items: Iterable[_T], key: Callable[[_T], Any]) -> list[list[_T]]:
    """Items in groups of equal keys."""
    groups: dict[Any, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
