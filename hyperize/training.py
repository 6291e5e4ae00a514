"""What an optimizer and a loss need to know about a hyperized model.

`param_groups` says which parameters weight decay may touch. `generated_l2` is the paper's L2
regularisation, which acts on the GENERATED kernels and not on what generates them (arXiv
1609.09106, sec. 3.1).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperize.caching import version_of
from hyperize.config import ConfigError, ModelError
from hyperize.dynamic import HyperLSTMCell, HyperRNNCell
from hyperize.hypernet import HyperNet
from hyperize.layers import Generated
from hyperize.private import Private
from hyperize.tiling import Grid

__all__ = ["GeneratedL2", "generated_l2", "param_groups"]

_NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Norms whose gains can have several axes; all others' are vectors."""


def param_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Sorts a model's parameters into those that weight decay acts on, and the rest.

    Decayed are the ordinary weights of two axes or more. Not decayed are biases, norms, whatever
    the model's own `no_weight_decay()` names (timm's convention), and all that generates weights:
    small embeddings do not make small weights, as the hypernetwork can grow in exchange. To
    regularise the generated weights, add `generated_l2` to the loss.

        optimizer = torch.optim.AdamW(param_groups(hyper, weight_decay=0.05), lr=1e-3)

    Args:
        model: A hyperized model or a plain one, wrapped or not; not changed.
        weight_decay: Of the decayed group, as the optimizer takes it.

    Returns:
        Two groups, the decayed one first; one of them may be empty. Each trainable parameter is in
        one of them, once, in the order of `model.parameters()`; frozen ones are left out.

    Raises:
        ConfigError: `weight_decay` is not a finite number of at least 0.
        ModelError: `model` is not a module, or has no trainable parameters.
    """
    if (
        isinstance(weight_decay, bool)
        or not isinstance(weight_decay, (int, float))
        or not 0 <= weight_decay < math.inf
    ):
        raise ConfigError(f"weight_decay must be a finite number >= 0, got {weight_decay!r}.")
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    spared = {id(param) for param in _spared(model)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for path, param in model.named_parameters():
        if param.requires_grad:
            vector = param.ndim < 2 or "bias" in path.rpartition(".")[2]
            (free if vector or id(param) in spared else decayed).append(param)
    if not decayed and not free:
        raise ModelError(
            f"{type(model).__name__} has no trainable parameters, so there is nothing to optimize."
        )
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def _spared(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of two axes or more that are not to be decayed all the same."""
    for module in model.modules():
        if isinstance(module, HyperNet):
            yield from module.parameters()
        elif isinstance(module, Generated):
            # A decay would act on the networks that are not meant, too
            tables = (module._parameters.get(name) for name in (*module.generated, *module.private))
            yield from (table for table in tables if table is not None)
        elif isinstance(module, Private):
            yield from module.parameters(recurse=False)
        elif isinstance(module, (HyperLSTMCell, HyperRNNCell)):
            gains = (module.ln_weight, module.hyper_ln_weight)
            yield from (gain for gain in gains if gain is not None)
        elif isinstance(module, _NORMS):
            yield from module.parameters(recurse=False)
        if callable(names := getattr(module, "no_weight_decay", None)):
            named = dict(module.named_parameters(remove_duplicate=False))
            yield from (named[name] for name in names() if name in named)


@dataclass(frozen=True)
class _Record:
    """A weight that was read: what it was made of, and what the hypernetwork has put out for it.

    Attributes:
        site: Embedding, constants and grid.
        versions: The embedding and the hypernetwork's parameters, with their versions then; None
            while torch.compile traces.
        output: The weight, or its factors.
        graph: Whether the forward pass recorded a graph for it.
    """

    hypernet: HyperNet
    site: tuple[Tensor, Tensor, Grid]
    versions: list[tuple[Tensor, Any]] | None
    output: Any
    graph: bool

    def is_current(self) -> bool:
        """Whether the weight is what its parameters would give now.

        Not if they have been changed or replaced since, as by torch.func.functional_call, or freed,
        as by FSDP2.
        """
        z = self.site[0]
        if self.versions is None or z.untyped_storage().size() == 0:
            return False
        now = [z, *(param for *_, param in self.hypernet.sources())]
        return all(
            param is before and version_of(param) == version
            for param, (before, version) in zip(now, self.versions, strict=True)
        )


class GeneratedL2:
    """The sum of squares of the weights generated within `generated_l2`; call it for the value."""

    def __init__(self) -> None:
        self._records: dict[Any, _Record] = {}  # by the weight, and its condition
        self._thread = threading.get_ident()

    def __call__(self) -> Tensor:
        """The penalty, a scalar with a graph.

        Each site counts once, however often its weight was generated. Sites that the forward pass
        did not reach do not count.

        Returns:
            The sum of squares, in float32 or, for weights that have it, float64.

        Raises:
            ModelError: No weight was generated, or it was without a graph, while gradients are
                asked for now.
        """
        records = list(self._records.values())
        if not records:
            raise ModelError(
                "no weight was generated within generated_l2(), so there is nothing to sum. Run "
                "the forward pass of the hyperized model inside the `with` block; a model that "
                "torch.compile has compiled has to be called inside such a block from the first."
            )
        if torch.is_grad_enabled() and not all(record.graph for record in records):
            raise ModelError(
                "a weight was generated without a graph, so its penalty would have no gradient. "
                "Run the forward pass without no_grad(); checkpoint with use_reentrant=False."
            )
        groups: dict[HyperNet, list[_Record]] = {}
        for record in records:
            groups.setdefault(record.hypernet, []).append(record)
        return torch.stack([_squares(*group) for group in groups.items()]).sum()

    def _record(self, hypernet: HyperNet, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the hypernetwork.

        It only keeps references. Arithmetic here would be part of a checkpointed region, whose
        recomputation has to repeat it exactly.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and threading.get_ident() != self._thread:
            return  # a forward pass of somebody else's
        embeddings, constants, grids = args[:3]
        if isinstance(grids, Grid):
            embeddings, constants, grids, output = (embeddings,), (constants,), (grids,), (output,)
        shared = [] if compiling else [param for *_, param in hypernet.sources()]
        graph, conditions = torch.is_grad_enabled(), hypernet.conditions
        held = None if compiling or conditions is None else conditions.key()
        sites = zip(embeddings, constants, grids, output, strict=True)
        for at, (z, c, grid, out) in enumerate(sites):
            versions = None if compiling else [(param, version_of(param)) for param in (z, *shared)]
            # The newest replaces an older one: parameters may have changed in between
            # Embeddings that a condition has chosen are new tensors each time
            key = id(z) if conditions is None else (id(grid), held, at)
            self._records[key] = _Record(hypernet, (z, c, grid), versions, out, graph)


def _squares(hypernet: HyperNet, records: list[_Record]) -> Tensor:
    """The sum of squares of the weights of one hypernetwork, of their parameters if it can be."""
    if all(record.is_current() for record in records):
        total = hypernet.squares(*zip(*(record.site for record in records), strict=True))
        if total is not None:
            return total
    squares = []
    for record in records:
        out, grid = record.output, record.site[2]
        weight = out if isinstance(out, Tensor) else hypernet.expand(out, grid)
        wide = torch.promote_types(weight.dtype, torch.float32)  # half's range is too small
        squares.append(weight.to(wide).square().sum())
    return torch.stack(squares).sum()


@contextmanager
def generated_l2(hyper: nn.Module) -> Iterator[GeneratedL2]:
    """Keeps the weights that are generated inside the block, for an L2 penalty on them.

    The weights that the forward pass read count. The sum is not taken over them, but computed from
    embeddings and hypernetwork: the squared norm of a product of two matrices follows from their
    Gram matrices, which are small. It works with modules used several times, under autocast, and
    with non-reentrant checkpointing. Forward passes that other threads run meanwhile are left out.

        with generated_l2(hyper) as l2:
            loss = F.cross_entropy(hyper(images), labels)
        (loss + 0.5 * weight_decay * l2()).backward()

    With the factor above its gradient is the one that `weight_decay` adds for a dense kernel in
    SGD. Enter the block anew for each step, and call `l2()` before the backward pass.

    Args:
        hyper: A hyperized model, wrapped or not, a part of one, or the graph of one from
            `as_graph`; its hypernetworks carry a forward hook inside the block.

    Yields:
        The penalty, to be called.

    Raises:
        ModelError: The model is not hyperized.
    """
    if not isinstance(hyper, nn.Module):
        raise ModelError(f"expected a hyperized torch.nn.Module, got {type(hyper).__name__}.")
    hypernets = [module for module in hyper.modules() if isinstance(module, HyperNet)]
    if not hypernets:
        raise ModelError(
            f"{type(hyper).__name__} is not hyperized: it has no hypernetwork, so no weight is "
            "generated. For a dense model use the optimizer's weight decay."
        )
    penalty = GeneratedL2()
    with ExitStack() as hooks:
        for hypernet in hypernets:
            hooks.callback(hypernet.register_forward_hook(penalty._record).remove)
        yield penalty
