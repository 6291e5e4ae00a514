"""Which layers can be rewritten, and the generated twins that stand in for them.

A generated layer keeps its dense class's forward, fields and repr. Only the class is swapped, for a
subclass in which each generated parameter is a property:

    class GeneratedConv2d(Generated, nn.Conv2d):
        @property
        def weight(self):
            return self._hypernet(self.weight_embedding, self._site_index["weight"])

The mechanism is that of `torch.nn.utils.parametrize`, without its global cache: a weight is a pure
function of (embedding, hypernetwork), evaluated when it is read. The hypernetwork is registered
once in the model; the layers hold it in `__dict__`, where neither the state dict nor FSDP sees it a
second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperize.config import ConfigError, ModelError
from hyperize.factorized import is_plain, multiply

__all__ = ["LayerSpec", "register_layer"]

EMBEDDING = "_embedding"
"""Suffix of the parameter that takes the place of a generated one; part of the file format."""


_WITHOUT_RANDOMNESS = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers of which nothing has to be restored to run them again."""


class Generated(nn.Module):
    """Mixin of every generated layer: its weights are computed from embeddings when read."""

    dense_class: type[nn.Module]
    """The class this layer had; `to_dense` restores it."""
    generated: tuple[str, ...]
    """Names of the generated parameters."""

    _hypernet: Any  # a HyperNet, whose module comes after this one
    _site_index: dict[str, int]
    _plain: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense class's.

        With `HyperConfig.factorized` it is computed with the weight's factors, where they take
        fewer multiply-adds; nothing is to be recomputed then.

        With `HyperConfig.recompute` no weight is kept for the backward pass: the layer is a
        checkpointed region. Convolution and linear layers save their weight before they use it, so
        that running the region again ends there, and of them only the generator runs twice.
        Recurrent and attention layers save what they compute, and run twice as a whole.
        """
        if self._plain and self._hypernet.factorized:
            site = self._site_index["weight"]
            if site in self._hypernet.factorable:
                return self._multiply(site, *args, **kwargs)
        if not (self._hypernet.recompute and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        draws = not isinstance(self, _WITHOUT_RANDOMNESS)
        return checkpoint(
            self._forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs
        )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's work, in which its weights are read."""
        return super().forward(*args, **kwargs)  # the dense class's, which comes next

    def _multiply(self, site: int, input: Tensor) -> Tensor:
        factors = self._hypernet(self.weight_embedding, site, True)
        return multiply(self, input, factors, self._hypernet.trunk_axis)

    def generate(self, name: str) -> Tensor:
        """The current value of one generated parameter, attached to the autograd graph."""
        return self._hypernet(getattr(self, name + EMBEDDING), self._site_index[name])

    def dense_forward(self, weights: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The dense class's forward with given weights; state that it sets on itself is dropped."""
        shell = object.__new__(self.dense_class)
        shell.__dict__.update(self.__dict__)
        shell.__dict__.update(weights)
        return shell.forward(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self.generated:
            raise _assignment_error(name)
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Twins are made at run time, so pickle cannot find them by name: make them again instead.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_new_generated, (self.dense_class, self.generated), *reduced[2:])

    def _after_generating(self) -> None:
        """Hook: the class has just become the generated twin."""

    def _after_densifying(self) -> None:
        """Hook: the class has just become the dense one again."""


class GeneratedRecurrent(Generated, nn.RNNBase):
    """Mixin for nn.RNN, nn.GRU and nn.LSTM, whose fused kernels read `_flat_weights`."""

    @property
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        return [getattr(self, name) for name in self._flat_weights_names]

    def dense_forward(self, weights: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in the base class, with the list that the dense forward reads."""
        flat = [weights[n] if n in weights else getattr(self, n) for n in self._flat_weights_names]
        refs = [None] * len(flat)  # "has not changed since the last call"
        state = {**weights, "_flat_weights": flat, "_flat_weight_refs": refs}
        return super().dense_forward(state, *args, **kwargs)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        # The dense check reads only the dtype of the first weight; generating all of them for
        # that would double the cost of the forward pass.
        first = getattr(self, self.generated[0] + EMBEDDING)
        proxy = SimpleNamespace(_flat_weights=[first], input_size=self.input_size)
        nn.RNNBase.check_input(proxy, input, batch_sizes)  # type: ignore[arg-type]

    # The dense class keeps a list of its weights and refreshes it at each assignment, `.to()` and
    # forward; here the list is computed, so there is nothing to refresh and nothing to flatten.
    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    def _init_flat_weights(self) -> None: ...

    def _update_flat_weights(self) -> None: ...

    def flatten_parameters(self) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_flat_weight_refs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self.__dict__["_flat_weight_refs"] = []

    def _after_generating(self) -> None:
        self.__dict__.pop("_flat_weights")
        self.__dict__["_flat_weight_refs"] = []

    def _after_densifying(self) -> None:
        nn.RNNBase._init_flat_weights(self)


class GeneratedAttention(Generated, nn.MultiheadAttention):
    """Mixin for nn.MultiheadAttention, whose forward reads its weights several times."""

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, with each weight generated once."""
        weights = {name: self.generate(name) for name in self.generated}
        return self.dense_forward(weights, *args, **kwargs)


@dataclass(frozen=True)
class LayerSpec:
    """How one type of layer is rewritten.

    Attributes:
        kind: Name of the target, as in `HyperConfig.targets`.
        layer: The layer's class. Subclasses are included, unless they are registered themselves.
        params: Names of the parameters to generate, or a function from a layer to them. Each is
            floating point, of shape (axis 0, axis 1, *kernel) or (axis 0,), and read by the
            layer's forward as an attribute of the layer.
        mixin: Base of the generated twin, for layers that read their weights in other ways.
    """

    kind: str
    layer: type[nn.Module]
    params: tuple[str, ...] | Callable[[Any], Iterable[str]] = ("weight",)
    mixin: type[Generated] = Generated

    def params_of(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of `module` that this spec generates."""
        return tuple(self.params(module) if callable(self.params) else self.params)


_SPECS: dict[type[nn.Module], LayerSpec] = {}
_TWINS: dict[tuple[type[nn.Module], tuple[str, ...]], type[Generated]] = {}


def register_layer(spec: LayerSpec) -> LayerSpec:
    """Makes a type of layer known as a target; opt in with `HyperConfig(targets=(..., spec.kind))`.

    Args:
        spec: The description of the layer.

    Returns:
        The same spec.

    Raises:
        ConfigError: It is not a `LayerSpec` of an `nn.Module` subclass, or its kind or its class is
            registered already.
    """
    if not isinstance(spec, LayerSpec):
        raise ConfigError(f"register_layer takes a LayerSpec, got {type(spec).__name__}.")
    if not (isinstance(spec.layer, type) and issubclass(spec.layer, nn.Module)):
        raise ConfigError(
            f"LayerSpec.layer must be a subclass of torch.nn.Module, got {spec.layer!r}."
        )
    if not spec.kind or not isinstance(spec.kind, str):
        raise ConfigError(f"LayerSpec.kind must be a non-empty string, got {spec.kind!r}.")
    if not (isinstance(spec.mixin, type) and issubclass(spec.mixin, Generated)):
        raise ConfigError(
            f"LayerSpec.mixin must be a subclass of hyperize.layers.Generated, got {spec.mixin!r}."
        )
    if spec.layer in _SPECS:
        raise ConfigError(
            f"{spec.layer.__name__} is registered already, as {_SPECS[spec.layer].kind!r}."
        )
    if spec.kind in registered_kinds():
        raise ConfigError(f"the kind {spec.kind!r} is taken; choose another name.")
    _SPECS[spec.layer] = spec
    return spec


def registered_kinds() -> tuple[str, ...]:
    """Names of all targets, in the order of their registration."""
    return tuple(spec.kind for spec in _SPECS.values())


def spec_of(cls: type[nn.Module]) -> LayerSpec | None:
    """The spec of a layer class, its own or its nearest registered base's."""
    return next((_SPECS[base] for base in cls.__mro__ if base in _SPECS), None)


def generate_params(
    module: nn.Module,
    embeddings: dict[str, nn.Parameter],
    site_index: dict[str, int],
    hypernet: nn.Module,
) -> None:
    """Turns `module` into its generated twin, in place.

    Args:
        module: A dense layer with a registered class.
        embeddings: The embedding that takes the place of each parameter, by parameter name.
        site_index: The hypernetwork's index of each of these parameters.
        hypernet: The shared generator; referenced, not registered.
    """
    names = tuple(embeddings)
    module.__dict__["_plain"] = is_plain(module)
    twin = generated_class(type(module), names)
    _replace(module._parameters, {name: (name + EMBEDDING, embeddings[name]) for name in names})
    module.__dict__["_hypernet"] = hypernet
    module.__dict__["_site_index"] = dict(site_index)
    module.__class__ = twin
    assert isinstance(module, Generated)
    module._after_generating()


def densify_params(module: Generated, weights: dict[str, nn.Parameter]) -> None:
    """Turns a generated twin back into its dense class, in place; mirrors `generate_params`.

    Args:
        module: A generated layer.
        weights: The dense parameter that takes the place of each embedding, by parameter name.
    """
    restore = module._after_densifying  # bound now: the dense class has no such method
    _replace(
        module._parameters, {name + EMBEDDING: (name, weight) for name, weight in weights.items()}
    )
    for name in ("_hypernet", "_site_index", "_plain"):
        del module.__dict__[name]
    module.__class__ = module.dense_class  # type: ignore[assignment]
    restore()


def _replace(params: dict[str, Any], changes: dict[str, tuple[str, nn.Parameter]]) -> None:
    """Renames and replaces entries of a `_parameters` dict without moving them."""
    items = [changes.get(name, (name, value)) for name, value in params.items()]
    params.clear()
    params.update(items)


def generated_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[Generated]:
    """The generated twin of a dense class; one per class and set of parameter names."""
    if twin := _TWINS.get((dense, names)):
        return twin
    spec = spec_of(dense)
    if spec is None:
        raise ModelError(
            f"{dense.__name__} is not a registered layer; register it with register_layer "
            "(in every process that loads this model)."
        )
    members: dict[str, Any] = {name: _generated_property(name) for name in names}
    members |= {
        "dense_class": dense,
        "generated": names,
        "__doc__": f"{dense.__name__} with generated {', '.join(names)}.",
        "__module__": __name__,
    }
    # setdefault: threads that make the same twin at once all get the first
    return _TWINS.setdefault(
        (dense, names), type(f"Generated{dense.__name__}", (spec.mixin, dense), members)
    )


def _new_generated(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty generated layer, for pickle and deepcopy to fill."""
    twin = generated_class(dense, names)
    return twin.__new__(twin)


def _generated_property(name: str) -> property:
    def read(self: Generated) -> Tensor:
        return self.generate(name)

    def assign(self: Generated, value: Any) -> None:
        raise _assignment_error(name)

    return property(read, assign, doc=f"`{name}`, generated from `{name}{EMBEDDING}`.")


def _assignment_error(name: str) -> ModelError:
    return ModelError(
        f"{name} is generated by the hypernetwork and cannot be assigned. Change "
        f"{name}{EMBEDDING}, or convert the model with to_dense() first."
    )


def _attention_params(module: nn.MultiheadAttention) -> tuple[str, ...]:
    # The output projection is a Linear of its own.
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return tuple(name for name in names if module._parameters.get(name) is not None)


def _recurrent_params(module: nn.RNNBase) -> tuple[str, ...]:
    return tuple(name for name in module._flat_weights_names if name.startswith("weight"))


for _spec in (
    LayerSpec("conv2d", nn.Conv2d),
    LayerSpec("lstm", nn.LSTM, _recurrent_params, GeneratedRecurrent),
    LayerSpec("conv1d", nn.Conv1d),
    LayerSpec("conv3d", nn.Conv3d),
    LayerSpec("conv_transpose1d", nn.ConvTranspose1d),
    LayerSpec("conv_transpose2d", nn.ConvTranspose2d),
    LayerSpec("conv_transpose3d", nn.ConvTranspose3d),
    LayerSpec("linear", nn.Linear),
    LayerSpec("attention", nn.MultiheadAttention, _attention_params, GeneratedAttention),
    LayerSpec("gru", nn.GRU, _recurrent_params, GeneratedRecurrent),
    LayerSpec("rnn", nn.RNN, _recurrent_params, GeneratedRecurrent),
    LayerSpec("lstm_cell", nn.LSTMCell, ("weight_ih", "weight_hh")),
    LayerSpec("gru_cell", nn.GRUCell, ("weight_ih", "weight_hh")),
    LayerSpec("rnn_cell", nn.RNNCell, ("weight_ih", "weight_hh")),
):
    register_layer(_spec)
