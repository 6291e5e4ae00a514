"""Which layers can be rewritten, and the generated twins that stand in for them.

A generated layer keeps its dense class's forward, fields and repr. Only the class is swapped, for a
subclass in which each generated parameter is a property:

    class GeneratedConv2d(Generated, nn.Conv2d):
        @property
        def weight(self):
            return self.hypernet(self.weight_embedding, self.weight_constants, grid)

The mechanism is that of `torch.nn.utils.parametrize`, without its global cache: a weight is a pure
function of (embedding, hypernetwork), evaluated when it is read. The layer owns all that its weight
depends on: the embedding, registered under the name of the parameter that it stands for; two
constants, a buffer; and the hypernetwork, a submodule that all generated layers share.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from hyperize.caching import Cache, find, like_a_parameter, pays
from hyperize.conditions import samplewise
from hyperize.config import KINDS, ConditionError, ConfigError, ModelError, WeightError
from hyperize.factorized import Factoring, multiply
from hyperize.reading import guarded
from hyperize.tensors import is_sharded
from hyperize.tiling import Grid

__all__ = ["LayerSpec", "register_layer"]

HYPERNET = "hypernet"
"""Name of the hypernetwork in each generated layer; part of the file format."""
CONSTANTS = "_constants"
"""Suffix of the buffer with a weight's scale and offset; part of the file format."""
EMBEDDING = "_embedding"
"""Suffix of the attribute by which an embedding is read; the parameter's own name is the weight."""


_REWRITING = tuple(
    f"torch.nn.utils.{name}" for name in ("parametrize", "prune", "spectral_norm", "weight_norm")
)
"""Modules that read a parameter in order to put something else in its place."""
ENGINES = ("torch.distributed.", "accelerate.", "deepspeed.")
"""What reads a module's parameters by name, to shard, move or store them."""
_LOWERED = {
    getattr(layer, method)
    for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for method in ("forward", "_conv_forward")
    if hasattr(layer, method)
} | {layer.forward for layer in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}
"""Methods that hand the layer's weight to an operation which autocast computes in its dtype."""
_WITH_SAMPLES = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers that can compute with a weight of its own for each sample."""
_WITHOUT_RANDOMNESS = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers of which nothing has to be restored to run them again."""


class _Running(threading.local):
    """The generated layer whose own forward is running in this thread."""

    layer: Generated | None = None
    input: Any = None  # of its forward


_running = _Running()


class Generated(nn.Module):
    """Mixin of every generated layer: its weights are computed from embeddings when read."""

    dense_class: type[nn.Module]
    """The class this layer had; `to_dense` restores it."""
    generated: tuple[str, ...]
    """Names of the generated parameters."""

    hypernet: Any  # a HyperNet, whose module comes after this one
    private: tuple[str, ...]
    """Names of further parameters and buffers of which each of several networks has its own."""
    grids: dict[str, Grid]
    """How each generated parameter is cut into tiles."""
    sites: dict[str, Any]
    """The `PlannedSite` that each was made for, with the paths of that time."""
    factoring: Factoring | None
    """If the factors of the weight can be used in its place, what decides whether they are."""
    lowered: bool
    """Whether the forward uses its weight only in what autocast computes in its dtype."""
    apart = False
    """Whether all parameters have to lie in one buffer of their own."""
    beside: tuple[str, ...] = ()
    """The parameters that follow the generated ones there."""
    room = 0
    """Numbers that follow these, and are not used."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # type(layer)(...), by which adapters and converters make a layer of the same kind
        if args or kwargs:
            return cls.dense_class(*args, **kwargs)
        return super().__new__(cls)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense class's.

        With `HyperConfig.factorized` it is computed with the weight's factors, where they take
        fewer multiply-adds; nothing is to be recomputed then.

        With `HyperConfig.recompute` no weight is kept for the backward pass: the layer is a
        checkpointed region. Convolution and linear layers save their weight before they use it, so
        that running the region again ends there, and of them only the generator runs twice.
        Recurrent and attention layers save what they compute, and run twice as a whole.
        """
        if isinstance(args, fx.Proxy) or any(
            isinstance(value, fx.Proxy) for value in (*args[:1], *kwargs.values())
        ):
            raise ModelError(
                f"torch.fx cannot trace into a generated {self.dense_class.__name__}: its weight "
                "would become a constant. Use hyperize.as_graph(hyper), or trace "
                "to_dense(hyper)."
            )
        if not torch.compiler.is_compiling() and _is_distributed():
            self._check_engine()
        hypernet = self.hypernet
        conditions = hypernet.conditions
        if conditions is not None and conditions.now.each:
            return self._forward_each(*args, **kwargs)
        if self.factoring and hypernet.factorized:
            x = next(iter((*args, *kwargs.values())), None)
            if isinstance(x, Tensor) and self.factoring.pays(self, x):
                return self._multiply(*args, **kwargs)
        if not (hypernet.recompute and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        draws = not isinstance(self, _WITHOUT_RANDOMNESS)
        return checkpoint(
            self._forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs
        )

    def _check_engine(self) -> None:
        """Refuses what FSDP2 and DistributedDataParallel would get wrong, with the remedy.

        Reentrant checkpoints run this layer without gradients in DDP's forward, and once more in
        the backward pass, of which each has a backward pass of its own. DDP expects the gradients
        of the shared generator from one.
        """
        before = self.__dict__.get("_unsharded", ())
        if before and all(p is q for p, q in zip(before, self.hypernet.parameters(), strict=False)):
            raise ModelError(
                "this layer is sharded by FSDP2, and the hypernetwork that it shares is not, so "
                "that its gradients would not be reduced. Use hyperize.shard(hyper)."
            )
        ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if ddp is not None and ddp.training:
            kept = torch.is_grad_enabled() or getattr(ddp, "static_graph", False)
            self.__dict__["_runs_again"] = not kept
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and torch.is_grad_enabled() and self.__dict__.get("_runs_again"):
            raise ModelError(
                "a layer of a hyperized model is in a reentrant checkpoint under "
                "DistributedDataParallel, which would reduce the shared generator's gradients more "
                "than once. Use checkpoint(..., use_reentrant=False), or DDP's static_graph=True."
            )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's work, in which its weights are read."""
        if torch.compiler.is_compiling():  # which reads plain tensors in any case
            return super().forward(*args, **kwargs)  # the dense class's, which comes next
        outer = _running.layer, _running.input
        _running.layer, _running.input = self, next(iter((*args, *kwargs.values())), None)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.layer, _running.input = outer

    def _forward_each(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's work with weights of its own for each sample, along the inputs' first axis.

        torch.vmap makes a grouped convolution of a convolution, and a batched product of a product.
        """
        if not isinstance(self, _WITH_SAMPLES) or kwargs or len(args) != 1:
            raise ConditionError(
                f"{self.dense_class.__name__} cannot compute with one condition for each sample; "
                "call the model for the samples of one condition at a time."
            )
        (x,) = args
        weights = {name: self.generate(name) for name in self.generated}
        weights |= {name: getattr(self, name) for name in self.private}

        def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            y: Tensor = self.dense_forward(weights, x[None])
            return y[0]

        return samplewise(one, weights, x)

    def _multiply(self, input: Tensor) -> Tensor:
        grid = self.grids["weight"]
        factors = self.hypernet(self.chosen("weight"), self.constants("weight"), grid, True)
        return multiply(self, input, factors, grid.axis)

    def generate(self, name: str) -> Tensor:
        """The current value of one generated parameter, attached to the autograd graph."""
        made = None
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            own = _running.layer is self
            made = find(self, name, own, _running.input if own else None)
            if made is not None and not self.hypernet._forward_hooks:
                return made
        conditions = self.hypernet.conditions
        if conditions is not None and conditions.now.each:
            return self._generate_each(name)
        site = self.chosen(name), self.constants(name), self.grids[name]
        # A weight that is there already is passed through for what looks on, as generated_l2 does
        weight: Tensor = self.hypernet(*site) if made is None else self.hypernet(*site, made=made)
        return weight

    def _generate_each(self, name: str) -> Tensor:
        """One generated parameter for each of N conditions, (N, *shape)."""
        embeddings = self.chosen(name).unbind()
        constants = self.constants(name)
        of_each = (constants,) * len(embeddings) if constants.ndim == 1 else constants.unbind()
        return torch.stack(self.hypernet(embeddings, of_each, (self.grids[name],) * len(of_each)))

    def chosen(self, name: str) -> Tensor:
        """The embeddings of one generated parameter that hold now, (tiles, Nz).

        With one condition for each of N samples, (N, tiles, Nz).
        """
        conditions, embedding = self.hypernet.conditions, self.embedding(name)
        if conditions is None:
            return embedding
        return like_a_parameter(conditions.select(embedding), embedding.requires_grad)

    def constants(self, name: str) -> Tensor:
        """Scale and offset of one generated parameter that hold now, (2,).

        With one condition for each of N samples, (N, 2) or, with vectors, (2,).
        """
        found = self.all_constants(name)
        return found if found.ndim == 1 else self.hypernet.conditions.select(found)

    def all_constants(self, name: str) -> Tensor:
        """Scale and offset of one generated parameter, (2,), or (K, 2) of several networks."""
        found = self._buffers[name + CONSTANTS]
        assert found is not None
        return found

    def embedding(self, name: str) -> nn.Parameter:
        """The embeddings of one parameter, (tiles, Nz), or (B, tiles, Nz) of all conditions."""
        # The replicas of nn.DataParallel have tensors as attributes, in the place of parameters
        found = self._parameters[name] if name in self._parameters else self.__dict__[name]
        assert found is not None
        return found

    @property
    def may_multiply(self) -> bool:
        """Whether the layer may compute with factors, so that its weight is not needed."""
        possible = self.factoring and self.factoring.is_possible(self.embedding("weight").device)
        return bool(possible and self.hypernet.factorized)

    def dense_forward(self, weights: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The dense class's forward with given weights; state that it sets on itself is dropped."""
        shell = object.__new__(self.dense_class)
        shell.__dict__.update(self.__dict__)
        shell.__dict__.update({n: getattr(self, n) for n in self.private if n not in weights})
        shell.__dict__.update(weights)
        return shell.forward(*args, **kwargs)

    # ------------------------------------------------------------ a module like its dense twin

    def children(self) -> Iterator[nn.Module]:
        """Those of the dense layer; the hypernetwork is no part of the model's structure.

        It is shown to FSDP2, which looks for parameters here, where it shards a whole model: the
        hypernetwork belongs to the outermost group, see `hyperize.distributed`.
        """
        show = _is_sharding(sys._getframe(1), self.hypernet)
        return iter([m for name, m in super().named_children() if show or name != HYPERNET])

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As `children`; engines that move or store parameters see the hypernetwork, too."""
        show = str(sys._getframe(1).f_globals.get("__name__")).startswith(ENGINES)
        return iter([(n, m) for n, m in super().named_children() if show or n != HYPERNET])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Generated:
        if recurse:  # not by children(); where several layers do it, it changes nothing more
            self.hypernet._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Generated:
        """As of any module; also on the hypernetwork, once for each layer that shares it."""
        self.hypernet.apply(fn)
        return super().apply(fn)

    def train(self, mode: bool = True) -> Generated:
        """As of any module; the hypernetwork has the flag, too, and computes the same with it."""
        self.hypernet.train(mode)
        return super().train(mode)

    def __repr__(self) -> str:
        shell = object.__new__(type(self))
        shell.__dict__.update(self.__dict__)
        shell.__dict__["_modules"] = {k: m for k, m in self._modules.items() if k != HYPERNET}
        return super(Generated, shell).__repr__()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Twins are made at run time, so pickle cannot find them by name: make them again instead.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        names = self.dense_class, self.generated, self.private
        return (_new_generated, names, *reduced[2:])

    def __prepare_scriptable__(self) -> nn.Module:
        raise ModelError(
            f"torch.jit.script cannot compile a generated {self.dense_class.__name__}. Script "
            "to_dense(hyper), or use torch.jit.trace, torch.export or hyperize.as_graph(hyper)."
        )

    # ------------------------------------------------------- what would change a weight is refused

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; a generated name takes nothing but another embedding.

        The latter is for what moves, shards or loads the parameters of a module.
        """
        if name not in self.generated:
            super().register_parameter(name, param)
            return
        present = self._parameters.get(name)
        if param is None or present is None or param.shape != present.shape:
            raise _assignment_error(name)
        if is_sharded(param):  # FSDP2 shards it: the hypernetwork must not stay
            self.__dict__.setdefault("_unsharded", list(self.hypernet.parameters()))
        self._parameters[name] = param

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.generated:
            super().__setattr__(name, value)
        elif "_is_replica" in self.__dict__:
            self.__dict__[name] = value  # nn.DataParallel replaces parameters by tensors
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            raise _assignment_error(name)

    def __delattr__(self, name: str) -> None:
        if name in self.generated:
            raise _assignment_error(name)
        super().__delattr__(name)

    def _after_generating(self) -> None:
        """Hook: the class has just become the generated twin."""

    def _after_densifying(self) -> None:
        """Hook: the class has just become the dense one again."""


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_sharding(frame: Any, hypernet: nn.Module) -> bool:
    """Whether FSDP2 collects the modules of a whole hyperized model, and not of a block of one.

    Args:
        frame: Of the caller of `children`.
        hypernet: The generator. The whole is what hyperize() returned, which refers to it.
    """
    if not frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
        return False
    while frame is not None and "root_modules" not in frame.f_locals:
        frame = frame.f_back
    roots = frame.f_locals["root_modules"] if frame is not None else ()
    return any(vars(m).get(HYPERNET) is hypernet for root in roots for m in root.modules())


class GeneratedRecurrent(Generated, nn.RNNBase):
    """Mixin for nn.RNN, nn.GRU and nn.LSTM, whose fused kernels read `_flat_weights`."""

    @property
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        names = self._flat_weights_names
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not self.apart:
            return [getattr(self, name) for name in names]
        if not pays(self.embedding(self.generated[0])) or find(self, names[0], True) is not None:
            return [self._read(name) for name in names]
        with Cache([self]):  # which has all of them in one buffer, as cuDNN takes them
            return [self._read(name) for name in names]

    def _read(self, name: str) -> Tensor:
        if name in self.generated:
            return self.generate(name)
        made = find(self, name, True)
        return getattr(self, name) if made is None else made

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        """The biases, which follow all weights."""
        return tuple(name for name in self._flat_weights_names if name.startswith("bias"))

    @property
    def room(self) -> int:  # type: ignore[override]
        """Of biases, which cuDNN's memory has for layers without biases too."""
        return 0 if self.bias else sum(grid.shape[0] for grid in self.grids.values())

    @property
    def apart(self) -> bool:  # type: ignore[override]
        """Unless something stands between the weights, or has another dtype."""
        dtypes = {self.embedding(name).dtype for name in self.generated}
        dtypes |= {getattr(self, name).dtype for name in self.beside}
        whole = len(self.generated) + len(self.beside) == len(self._flat_weights_names)
        return whole and len(dtypes) == 1 and not self.proj_size

    def dense_forward(self, weights: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in the base class, with the list that the dense forward reads."""
        flat = [weights[n] if n in weights else getattr(self, n) for n in self._flat_weights_names]
        refs = [None] * len(flat)  # "has not changed since the last call"
        state = {**weights, "_flat_weights": flat, "_flat_weight_refs": refs}
        return super().dense_forward(state, *args, **kwargs)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        # The dense check reads only the dtype of the first weight; generating all of them for
        # that would double the cost of the forward pass.
        if torch.compiler.is_compiling():  # which cannot follow it, and has the kernel's own checks
            return
        first = self.embedding(self.generated[0])
        proxy = SimpleNamespace(_flat_weights=[first], input_size=self.input_size)
        nn.RNNBase.check_input(proxy, input, batch_sizes)  # type: ignore[arg-type]

    # The dense class keeps a list of its weights and refreshes it at each assignment, `.to()`,
    # copy and forward; here the list is computed, so there is nothing to refresh or to flatten.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.generated:
            Generated.__setattr__(self, name, value)
        else:
            nn.Module.__setattr__(self, name, value)

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica: nn.Module = nn.Module._replicate_for_data_parallel(self)
        return replica

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
_TWINS: dict[tuple[type[nn.Module], tuple[str, ...], tuple[str, ...]], type[Generated]] = {}


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
    KINDS[spec.layer] = spec.kind
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
    constants: dict[str, Tensor],
    sites: dict[str, Any],
    hypernet: nn.Module,
    factoring: Factoring | None,
    private: tuple[str, ...] = (),
) -> None:
    """Turns `module` into its generated twin, in place.

    Args:
        module: A dense layer with a registered class.
        embeddings: The embedding that takes the place of each parameter, by parameter name.
        constants: Scale and offset of each, (2,), or (K, 2) of several networks.
        sites: The `PlannedSite` of each.
        hypernet: The shared generator.
        factoring: As `Generated.factoring`.
        private: As `Generated.private`; the module has a table of each, (K, *).
    """
    twin = generated_class(type(module), tuple(embeddings), private)
    module._parameters.update(embeddings)  # in their places
    for name, tensor in constants.items():
        module.register_buffer(name + CONSTANTS, tensor)
    module.add_module(HYPERNET, hypernet)
    grids = {name: site.grid for name, site in sites.items()}
    module.__dict__.update(grids=grids, sites=sites, factoring=factoring)
    module.__class__ = twin
    assert isinstance(module, Generated)
    module._after_generating()


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter or a buffer of a module, whatever its class says to assignments."""
    kept: dict[str, Any] = module._buffers if name in module._buffers else module._parameters
    kept[name] = tensor


def densify_params(module: Generated, weights: dict[str, Tensor]) -> None:
    """Turns a generated twin back into its dense class, in place; mirrors `generate_params`.

    Args:
        module: A generated layer.
        weights: The dense parameter that takes the place of each embedding, by parameter name, and
            the tensor in the place of each table.
    """
    restore = module._after_densifying  # bound now: the dense class has no such method
    del module._modules[HYPERNET]
    for name in module.generated:
        del module._buffers[name + CONSTANTS]
    for name, tensor in weights.items():
        put(module, name, tensor)
    for name in ("grids", "sites", "factoring"):
        del module.__dict__[name]
    module.__class__ = module.dense_class  # type: ignore[assignment]
    restore()


def generated_class(
    dense: type[nn.Module], names: tuple[str, ...], private: tuple[str, ...] = ()
) -> type[Generated]:
    """The generated twin of a dense class; one per class and sets of parameter names."""
    if twin := _TWINS.get((dense, names, private)):
        return twin
    spec = spec_of(dense)
    if spec is None:
        raise ModelError(
            f"{dense.__name__} is not a registered layer; register it with register_layer "
            "(in every process that loads this model)."
        )
    members: dict[str, Any] = {name: _generated_property(name) for name in names}
    members |= {name + EMBEDDING: _embedding_property(name) for name in names}
    members |= {name: _private_property(name) for name in private}
    members |= {
        "dense_class": dense,
        "generated": names,
        "private": private,
        "lowered": dense.forward in _LOWERED
        and getattr(dense, "_conv_forward", nn.Conv2d._conv_forward) in _LOWERED,
        "__doc__": f"{dense.__name__} with generated {', '.join(names)}.",
        # torch.fx tells by it which layers are leaves of a graph, and this is one if its dense
        # twin is.
        "__module__": dense.__module__,
    }
    # setdefault: threads that make the same twin at once all get the first
    return _TWINS.setdefault(
        (dense, names, private), type(f"Generated{dense.__name__}", (spec.mixin, dense), members)
    )


def _new_generated(
    dense: type[nn.Module], names: tuple[str, ...], private: tuple[str, ...] = ()
) -> nn.Module:
    """An empty generated layer, for pickle and deepcopy to fill."""
    twin = generated_class(dense, names, private)
    layer: nn.Module = twin.__new__(twin)
    return layer


def _generated_property(name: str) -> property:
    def read(self: Generated) -> Tensor:
        plain = torch.compiler.is_compiling() or _running.layer is self or torch.jit.is_tracing()
        if not plain:
            reader = sys._getframe(1)
            module, function = str(reader.f_globals.get("__name__")), reader.f_code.co_name
            if module in _REWRITING:
                raise _assignment_error(name)
            if module.startswith(ENGINES) or function == "get_parameter":
                return self.embedding(name)
            # Encoders of torch's own read weights of their layers in their forward, and only read
            plain = function == "forward" and module.startswith("torch.nn.")
        try:
            weight = self.generate(name)
        except AttributeError as error:  # nn.Module would say that there is no such attribute
            raise WeightError(f"{name} cannot be generated: {error}") from error
        return weight if plain else guarded(weight, f"{name} of a {type(self).__name__}")

    def assign(self: Generated, value: Any) -> None:
        raise _assignment_error(name)

    return property(read, assign, doc=f"`{name}`, generated from `{name}{EMBEDDING}`.")


def _private_property(name: str) -> property:
    def read(self: Generated) -> Tensor:
        table = self._parameters[name] if name in self._parameters else self._buffers[name]
        assert table is not None
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code.co_name == "extra_repr":
            return table  # a layer's repr asks whether it has a bias
        chosen: Tensor = self.hypernet.conditions.select(table)
        return chosen

    return property(read, doc=f"The `{name}` of the network that the condition names.")


def _embedding_property(name: str) -> property:
    return property(lambda self: self.embedding(name), doc=f"What `{name}` is generated from.")


def _assignment_error(name: str) -> ModelError:
    return ModelError(
        f"{name} is generated by the hypernetwork, so it cannot be assigned, deleted, pruned or "
        f"parametrized. Change {name}{EMBEDDING}, or make the layer dense first, with "
        "to_dense(hyper, include=...)."
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
