"""The generator: embeddings in, weights out. It knows its layers, and no sites.

The linear hypernetwork of "HyperNetworks" (Ha, Dai, Le, arXiv 1609.09106, sec. 3.1 and eq. 4), with
one head per kernel size, in one of the forms of `hyperize.families`. Each weight is scaled and
shifted by two constants that its layer holds, so that it starts with the mean and the standard
deviation of the weight it replaces, as the main network's initialisation wants it (the aim of
"hyperfan-in": Chang, Flokas, Lipson 2020, arXiv 2312.08399).

The hypernetwork is a submodule of every layer that it generates for, so that each part of a model
owns what its weights depend on. It sees to it that a walk over several of these layers meets it
once: in `named_modules`, and in the state dict, where it stands below the first of them.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hyperize.caching import like_a_parameter
from hyperize.conditions import conditions_for
from hyperize.config import ConfigError, did_you_mean
from hyperize.factorized import expand
from hyperize.family import Site
from hyperize.plan import Plan
from hyperize.tiling import Grid

__all__ = ["HyperNet"]

SAMPLED = 2**18
"""Random numbers that stand for all; the standard deviation is then right to 0.14 percent."""


class Affine(nn.Module):
    """Weight and bias of an affine map, which the hypernetwork applies.

    It is not an nn.Linear, so that loops over a model's linear layers, to initialise, prune,
    quantize or normalise them, do not take a part of the generator for a layer of the model.
    """

    def __init__(
        self, n_in: int, n_out: int, dtype: torch.dtype | None, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(n_out, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


_OPTIONS = ("recompute", "factorized")
"""What may be set on a hypernetwork, under the names that `HyperConfig` has for it."""


class HyperNet(nn.Module):
    """The shared hypernetwork of a plan.

    Shapes of its parameters, with the family's hidden size d, and trail and k of each head:

    - `heads.<kernel>.weight` (trail * k, d or Nz), `heads.<kernel>.bias` (trail * k)
    - with a hidden layer, `trunk.weight` (lead * d, Nz), `trunk.bias` (lead * d)

    Args:
        plan: Its sizes.
        dtype: Of all parameters.
        device: Of all parameters.

    Attributes:
        plan: The plan that it was made for.
        conditions: Of all layers; None if there is one network.
        recompute: As `HyperConfig.recompute`; may be set.
        factorized: As `HyperConfig.factorized`; may be set.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.family = plan.family
        self.embedding_dim, self.fan_in = plan.embedding_dim, plan.fan_in
        self.conditions = conditions_for(plan.config)
        self.recompute, self.factorized = plan.config.recompute, plan.config.factorized
        where = torch.get_default_device() if device is None else device
        for name, (n_in, n_out) in plan.shared.items():
            self.add_module(name, Affine(n_in, n_out, dtype, where))
        self.heads = nn.ModuleDict(
            {head.kernel: Affine(self.fan_in, head.width, dtype, where) for head in plan.heads}
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPTIONS and not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}.")
        made = "heads" in self.__dict__.get("_modules", ())
        if made and not (name.startswith("_") or hasattr(self, name)):
            raise ConfigError(
                f"a hypernetwork has no option {name!r}{did_you_mean(name, _OPTIONS)} Those that "
                f"may be set are {' and '.join(_OPTIONS)}."
            )
        super().__setattr__(name, value)

    def head(self, kernel: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head for a kernel size."""
        layer = cast(Affine, self.heads[kernel])
        return layer.weight, layer.bias

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of one of the family's shared layers."""
        layer = cast(Affine, self._modules[name])
        return layer.weight, layer.bias

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draws the parameters so that embeddings of unit variance give weights of unit variance.

        Args:
            generator: A CPU generator; the draw is the same on every device.
        """
        for layer in self.modules():
            if isinstance(layer, Affine):
                noise = torch.randn(layer.weight.shape, generator=generator, device="cpu")
                layer.weight.copy_(noise / math.sqrt(layer.weight.shape[1]))
                layer.bias.zero_()

    def forward(
        self,
        embedding: Tensor | tuple[Tensor, ...],
        constants: Tensor | tuple[Tensor, ...],
        grid: Grid | tuple[Grid, ...],
        factors: bool = False,
        made: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Generates a weight, or several weights in one call.

        Args:
            embedding: The weight's embeddings, (tiles, Nz), or (rows + columns, Nz) of channels.
            constants: The weight's scale and offset, (2,).
            grid: How the weight is cut.
            factors: Stop before the last product. Only where the family has such factors.
            made: The weight, if it is there already, for what looks on here.

        Returns:
            The weight, contiguous, in the dense parameter's shape and the embedding's dtype; a
            tuple of weights for tuples of arguments. Or the weight's factors, as
            `hyperize.factorized.multiply` takes them, in the embedding's dtype.
        """
        if made is not None:
            return made
        if not isinstance(grid, Grid):
            return tuple(
                self._generate(*site) for site in zip(embedding, constants, grid, strict=True)
            )
        assert isinstance(embedding, Tensor)
        assert isinstance(constants, Tensor)
        return (self._factorize if factors else self._generate)(embedding, constants, grid)

    def _generate(self, embedding: Tensor, constants: Tensor, grid: Grid) -> Tensor:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, as a parameter
                return self._generate(embedding, constants, grid)
        with no_autocast(embedding.device.type):
            site = self._site(embedding, constants, grid)
            weight = self.family.weight(self, site).to(embedding.dtype)
        return like_a_parameter(weight, embedding.requires_grad)

    def together(
        self,
        embeddings: Sequence[Tensor],
        constants: Sequence[Tensor],
        grids: Sequence[Grid],
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Generates several weights in as few operations as possible.

        Args:
            embeddings: As in `forward`, of each weight; all of one dtype, on one device.
            constants: As in `forward`.
            grids: As in `forward`.
            dtype: Of the weights; by default the embeddings'.

        Returns:
            The weights that `forward` generates, but for the rounding of products of other sizes
            and, with a lower dtype, of their operands.
        """
        first = embeddings[0]
        with no_autocast(first.device.type):
            sites = [self._site(*site) for site in zip(embeddings, constants, grids, strict=True)]
            if dtype is None:
                weights = self.family.together(self, sites, sites[0][0].dtype)
                weights = [weight.to(first.dtype) for weight in weights]
            else:
                weights = self.family.together(self, sites, dtype)
        return [like_a_parameter(weight, first.requires_grad) for weight in weights]

    def squares(
        self, embeddings: Sequence[Tensor], constants: Sequence[Tensor], grids: Sequence[Grid]
    ) -> Tensor | None:
        """The sum of squares of several weights, in float32 or more; None if it has to be made.

        Arguments as in `together`. The weights are not made.
        """
        with no_autocast(embeddings[0].device.type):
            sites = [self._site(*site) for site in zip(embeddings, constants, grids, strict=True)]
            return self.family.squares(self, sites)

    def sources(self) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
        """Each parameter with the table that holds it and its name there."""
        layers = (*self.heads._modules.values(), *self._modules.values())
        tables = (layer._parameters for layer in layers if layer is not None)
        return [(table, name, p) for table in tables for name, p in table.items() if p is not None]

    def _factorize(self, embedding: Tensor, constants: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        with no_autocast(embedding.device.type):
            thin = self.family.thin_factors(self, self._site(embedding, constants, grid))
            return tuple(factor.to(embedding.dtype) for factor in thin)

    def _site(self, embedding: Tensor, constants: Tensor, grid: Grid) -> Site:
        # FSDP's mixed precision casts parameters, and an embedding may have its own dtype
        return embedding.to(self.head(grid.kernel)[0].dtype), constants, grid

    def expand(self, factors: tuple[Tensor, ...], grid: Grid) -> Tensor:
        """A weight, of the factors that `forward` has returned; equal but for rounding."""
        with no_autocast(factors[0].device.type):
            return expand(factors, grid.shape, grid.axis)

    @torch.no_grad()
    def moments(
        self,
        embedding: Tensor,
        constants: Tensor,
        grid: Grid,
        grams: dict[tuple[str, int], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the weight that `forward` would generate.

        The latter is that of `SAMPLED` numbers of either factor where there are more, all drawn
        alike.

        Args:
            embedding: As in `forward`.
            constants: As in `forward`.
            grid: As in `forward`.
            grams: What weights of the same head share, kept from call to call; empty at first.
        """
        with no_autocast(embedding.device.type):
            site = self._site(embedding, constants, grid)
            factors = self.family.factors(self, site)
        # No product, or one less what is padding
        if factors is None or len(factors[0]) * len(factors[1]) != math.prod(grid.shape):
            return moments(self._generate(embedding, constants, grid).float())
        rows, weight, bias = (t.float() for t in factors)
        # All products of two sets of vectors, whose moments follow from those of the sets
        row = rows.mean(0)  # (d,)
        mean = row @ weight.mean(0) + bias.mean()
        enough = max(1, SAMPLED // self.fan_in)
        some = rows[:enough]
        gram = grams.get((grid.kernel, len(weight)))
        if gram is None:
            few = weight[: math.ceil(enough / grid.elements) * grid.elements]  # whole kernels
            gram = few.t() @ few / len(few)
            if weight.data_ptr() == self.head(grid.kernel)[0].data_ptr():  # others share it
                grams[grid.kernel, len(weight)] = gram
        square = (some.t() @ some * gram).sum() / len(some)
        square += 2 * (row @ (bias @ weight)) / len(weight) + bias.square().mean()
        return mean, (square - mean.square()).sqrt()

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.family.name}, embedding_dim={self.embedding_dim}"

    # ------------------------------------------------------- one module below many, met once a walk

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; also once a walk where duplicates are asked for."""
        memo = set() if memo is None else memo
        if self not in memo:
            yield from super().named_modules(memo, prefix, remove_duplicate)
            memo.add(self)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; adds nothing to a state dict that holds this hypernetwork already."""
        destination = kwargs.get("destination")
        if destination is not None and not self._opens(destination):
            return destination
        return super().state_dict(*args, **kwargs)

    def _opens(self, destination: Any) -> bool:
        """Whether this is the first time that a walk which fills `destination` comes by."""
        seen = self.__dict__.setdefault("_seen", {})
        key = id(destination)
        if key in seen and seen[key]() is destination:
            return False
        with suppress(TypeError):  # a plain dict, which has no weak references
            seen[key] = weakref.ref(destination, lambda _: seen.pop(key, None))
        return True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loads = self.__dict__.setdefault("_loads", {})
        load = loads.get(threading.get_ident())
        if load is None or load.missing is not missing_keys:
            load = loads[threading.get_ident()] = _Load(missing_keys)
        own = {prefix + name: param for name, param in self.named_parameters()}
        given = [key for key in own if key in state_dict]
        if given and load.loaded:
            if not all(_equal(own[key], state_dict[key]) for key in given):
                error_msgs.append(
                    f"{prefix[:-1]} is one hypernetwork with other parts of this model, but the "
                    "state dict has different values for it in different places."
                )
        elif given:
            missing_keys[:] = [key for key in missing_keys if key not in load.reported]
            load.loaded = True
        else:
            if not load.loaded and not load.reported:
                load.reported = list(own)
                missing_keys.extend(own)
            state_dict.update(own)  # so that nothing below changes, or is missing once more
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_seen", "_loads")}


@dataclass
class _Load:
    """What one call of `load_state_dict` has done to a hypernetwork, which it meets several times.

    Attributes:
        missing: The list of missing keys, which is the same one throughout the call.
        reported: The hypernetwork's keys among them, until a later layer has them.
        loaded: Whether a layer had them.
    """

    missing: list[str]
    reported: list[str] = field(default_factory=list)
    loaded: bool = False


def _equal(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return a is b or a.is_meta or bool((a == b.to(a)).all())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; twenty times as fast as torch.std_mean on a CPU."""
    mean, size = x.mean(), x.numel()
    square = torch.linalg.vector_norm(x).square() / size
    if mean.square() < 0.5 * square:  # otherwise too little would be left of the difference
        return mean, (square - mean.square()).sqrt()
    return mean, torch.linalg.vector_norm(x - mean) / math.sqrt(size)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A dense parameter keeps its dtype under autocast, and so does a generated one."""
    # Compilers of older torch versions cannot ask, and what they compile for has autocast
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the meta device has no autocast
