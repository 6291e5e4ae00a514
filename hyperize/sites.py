"""Finding what can be rewritten: every target in the tree is a Site, or a Skip with a reason, once.

A torch.fx graph of the model decides the order; the tree of modules decides what there is. Tracing
descends into everything but targets, modules that hold no target, and modules that timm marks as
not to be traced; targets inside the latter follow in order of registration, and so do targets that
the graph does not reach. A model that cannot be traced is taken in order of registration.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from hyperize.config import ConfigError, HyperConfig, ModelError, did_you_mean
from hyperize.dynamic import dynamic_twin
from hyperize.layers import (
    CONSTANTS,
    EMBEDDING,
    HYPERNET,
    Generated,
    registered_kinds,
    spec_of,
)
from hyperize.source import written_parameter
from hyperize.tensors import is_sharded
from hyperize.tiling import kernel_name

__all__: list[str] = []

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be generated."""

M = TypeVar("M", bound=nn.Module)
"""The class of a model, which a rewrite keeps."""

_TRACING = threading.Lock()
"""Held while torch.fx patches nn.Module: two tracers at once could leave it patched."""


@dataclass(frozen=True)
class Site:
    """One parameter to generate.

    Attributes:
        path: Path of the layer in the model.
        param: Name of the parameter in the layer.
        kind: The layer's kind, e.g. "conv2d".
        shape: Shape of the dense parameter.
        itemsize: Bytes of one weight.
        aliases: The layer's other paths, if one instance is registered more than once.
        plain: Whether the layer's output is a product with the weight, as nn.Linear's or an
            ungrouped convolution's is.
    """

    path: str
    param: str
    kind: str
    shape: tuple[int, ...]
    itemsize: int = 4
    aliases: tuple[str, ...] = ()
    plain: bool = False

    @property
    def name(self) -> str:
        """Name of the dense parameter in the model's state dict."""
        return f"{self.path}.{self.param}" if self.path else self.param

    @property
    def kernel(self) -> str:
        """Its kernel size as `hyperize.tiling.kernel_name` calls it."""
        return kernel_name(self.shape)

    @property
    def dense_params(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DynamicSite:
    """A recurrent layer to put a dynamic hypernetwork in the place of.

    Attributes:
        path: Path of the layer in the model.
        kind: "lstm" or "rnn".
        dense_params: Parameters of the layer.
        hyper_params: Parameters of its HyperLSTM or HyperRNN.
        itemsize: Bytes of one of them.
        aliases: The layer's other paths.
    """

    path: str
    kind: str
    dense_params: int
    hyper_params: int
    itemsize: int = 4
    aliases: tuple[str, ...] = ()

    @property
    def growth(self) -> int:
        """Parameters that are added."""
        return self.hyper_params - self.dense_params


@dataclass(frozen=True)
class PrivateSite:
    """A layer whose parameters and buffers exist once for each of several networks.

    Attributes:
        path: Path of the layer in the model.
        names: Names of these parameters and buffers in the layer.
        params: Numbers in the parameters, of one network.
        bytes: Of parameters and buffers, of one network.
        generated: Whether the layer's weights are generated, and these are its other parameters.
        aliases: The layer's other paths.
    """

    path: str
    names: tuple[str, ...]
    params: int
    bytes: int
    generated: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """A target that stays dense.

    Attributes:
        path: Path of the parameter, or of the layer where all its parameters are skipped.
        reason: Why.
        params: Number of weights that stay dense.
    """

    path: str
    reason: str
    params: int


@dataclass(frozen=True)
class Untargeted:
    """Weights of a known kind of layer that is not among the targets.

    Attributes:
        kind: The kind of layer, as it would be named in `HyperConfig.targets`.
        layers: Number of layers.
        params: Number of weights that could be generated.
    """

    kind: str
    layers: int
    params: int


@dataclass(frozen=True)
class Found:
    """What `find_sites` returns: sites in order, skips, other known layers, and how the order came.

    Attributes:
        sites: In the order of the forward pass as far as the graph shows it.
        dynamic: Recurrent layers to make dynamic, likewise.
        skips: Targets that stay dense.
        untargeted: Layers of known kinds that are not targets.
        private: With several networks, what exists once for each: norms, layers that the request
            names, and of layers to be generated what is not generated.
        order: How the sites were found and ordered, as a sentence.
        total_params: Parameters of the whole dense model, shared ones counted once.
        total_bytes: Bytes of its parameters and buffers, likewise.
    """

    sites: tuple[Site, ...]
    dynamic: tuple[DynamicSite, ...]
    skips: tuple[Skip, ...]
    untargeted: tuple[Untargeted, ...]
    private: tuple[PrivateSite, ...]
    order: str
    total_params: int
    total_bytes: int


def find_sites(model: nn.Module, config: HyperConfig) -> Found:
    """Finds and orders the parameters to generate; changes nothing.

    Args:
        model: A plain model, on any device, meta too.
        config: `targets`, `include`, `exclude` and `lstm` are used.

    Raises:
        ModelError: The model, or a selected layer, is of a kind that cannot be rewritten.
        ConfigError: A target is not a registered kind, or a pattern matches nothing.
    """
    _check_model(model)
    _check_targets(config)
    if hasattr(model, HYPERNET):
        raise ModelError(
            f"{type(model).__name__} has an attribute {HYPERNET!r} already, the name under which "
            "the generator is to be had; rename the attribute."
        )
    paths: dict[nn.Module, list[str]] = {}  # every module with all its paths, in tree order
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    layers = {names[0]: module for module, names in paths.items() if spec_of(type(module))}
    kinds = set(config.targets)
    if config.lstm != "static" and "lstm" in kinds:
        dynamic_of = {path: m for path, m in layers.items() if _is_dynamic(m, paths[m], config)}
        _check_forms(config, [paths[m] for m in layers.values() if _kind(m) in _DYNAMIC_KINDS])
    else:
        dynamic_of = {}
    if dynamic_of and (config.conditions or config.condition_dim):
        raise ConfigError(
            f"{next(iter(dynamic_of)) or 'the model'} would become a dynamic hypernetwork, whose "
            'weights have no conditions; use lstm="static" with conditions or condition_dim.'
        )
    targets = {p: m for p, m in layers.items() if _kind(m) in kinds or p in dynamic_of}
    kind = f"layer of kind {', '.join(config.targets)}"
    check_patterns("include", config.include, (paths[m] for m in targets.values()), kind)
    check_patterns("exclude", config.exclude, paths.values(), "module")
    check_patterns("private", config.private, paths.values(), "module")
    included = {p: m for p, m in targets.items() if matches(paths[m], config.include)}
    selected = {p: m for p, m in included.items() if not matches(paths[m], config.exclude)}
    _check_layers(selected)

    owners = _owners(model)
    sites: list[Site] = []
    dynamic: list[DynamicSite] = []
    skips: list[Skip] = []
    ordered, order = _order(model, targets)
    for path in ordered:
        module = targets[path]
        if path in selected and matches(paths[module], config.private):
            skips.append(Skip(path, "private: there is one for each network", weights_of(module)))
            continue
        if path not in selected:
            reason = "excluded" if path in included else "not included"
            skips.append(Skip(path, reason, weights_of(module)))
            continue
        if path in dynamic_of:
            assert isinstance(module, nn.RNNBase)
            if obstacle := _dynamic_obstacle(module, owners):
                skips.append(Skip(path, obstacle, weights_of(module)))
            else:
                twin = dynamic_twin(module, dict(config.lstm_options), "meta")
                dynamic.append(
                    DynamicSite(
                        path=path,
                        kind=_kind(module),
                        dense_params=sum(p.numel() for p in module.parameters()),
                        hyper_params=sum(p.numel() for p in twin.parameters()),
                        itemsize=next(module.parameters()).element_size(),
                        aliases=tuple(paths[module][1:]),
                    )
                )
            continue
        for param in _params(module):
            weight = getattr(module, param)
            aliases = tuple(paths[module][1:])
            shape = tuple(weight.shape)
            size = weight.element_size()
            site = Site(path, param, _kind(module), shape, size, aliases, is_plain(module))
            if obstacle := _obstacle(module, param, owners):
                skips.append(Skip(site.name, obstacle, weight.numel()))
            else:
                sites.append(site)
    _check_devices(model, sites)
    untargeted: dict[str, list[int]] = {}
    for path, module in layers.items():
        if path not in targets:
            untargeted.setdefault(_kind(module), []).append(weights_of(module))
    return Found(
        sites=tuple(sites),
        dynamic=tuple(dynamic),
        skips=tuple(skips),
        untargeted=tuple(Untargeted(k, len(n), sum(n)) for k, n in untargeted.items()),
        private=tuple(_private(model, paths, {site.path for site in sites}, config)),
        order=order,
        total_params=sum(p.numel() for p in model.parameters()),
        total_bytes=tensor_bytes(model),
    )


_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms, SyncBatchNorm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
"""Layers whose statistics, and what is learned about them, are a network's own."""


def _private(
    model: nn.Module, paths: dict[nn.Module, list[str]], generated: set[str], config: HyperConfig
) -> Iterator[PrivateSite]:
    """As `Found.private`; `generated` are the paths of layers with sites."""
    owners = _owners(model) if config.conditions else {}
    for module, names in paths.items() if config.conditions else ():
        path, aliases = names[0], tuple(names[1:])
        own = {**module._parameters, **module._buffers}
        for name in _params(module) if path in generated else ():
            del own[name]
        held = {name: tensor for name, tensor in own.items() if tensor is not None}
        if not held or not (
            path in generated or isinstance(module, _NORMS) or matches(names, config.private)
        ):
            continue
        params = {n: t for n, t in held.items() if n in module._parameters}
        for name, param in params.items():
            if len(owners[id(param)]) > 1:
                raise ModelError(
                    f"{path}.{name} is to exist once for each network, and is tied: one tensor "
                    f"under {', '.join(owners[id(param)])}. Untie it, or exclude the layer."
                )
        if path not in generated and is_parametrized(module):
            raise ModelError(
                f"{path} is to exist once for each network, and is parametrized; remove the "
                "parametrization, or leave the layer out of private."
            )
        yield PrivateSite(
            path=path,
            names=tuple(held),
            params=sum(param.numel() for param in params.values()),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
            generated=path in generated,
            aliases=aliases,
        )


def parameters_of(model: nn.Module, sites: Sequence[Site]) -> list[nn.Parameter]:
    """The dense parameters of sites, which may have been found in another model.

    Raises:
        ModelError: The model lacks one, has one of another shape, or one that has to stay dense.
    """
    owners = _owners(model) if sites else {}
    found = []
    for site in sites:
        try:
            layer = model.get_submodule(site.path)
            weight = layer._parameters[site.param]
        except (AttributeError, KeyError) as error:
            raise ModelError(
                f"the plan names {site.name}, which the model does not have."
            ) from error
        if isinstance(layer, Generated):
            raise ModelError(f"{site.name} is generated already; use to_dense() first.")
        if weight is None or tuple(weight.shape) != site.shape:
            shape = None if weight is None else tuple(weight.shape)
            raise ModelError(f"the plan has {site.name} of shape {site.shape}, the model {shape}.")
        if obstacle := _obstacle(layer, site.param, owners):
            raise ModelError(
                f"the plan generates {site.name}, which has to stay dense in this model: "
                f"{obstacle}. Make a plan of this model."
            )
        found.append(weight)
    _check_devices(model, sites)
    return found


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_WRAPPERS = {  # class name -> what it is called, what to do
    "OptimizedModule": ("torch.compile", "hyperize the model first, then compile it"),
    "DistributedDataParallel": ("DistributedDataParallel", "hyperize .module, then wrap it"),
    "DataParallel": ("DataParallel", "hyperize .module, then wrap it"),
    "FullyShardedDataParallel": ("FSDP", "hyperize the model first, then shard it"),
    "FSDPModule": ("fully_shard (FSDP2)", "hyperize the model first, then shard it"),
    "ScriptModule": ("TorchScript", "hyperize the model before scripting it"),
}


def wrapper_of(module: nn.Module) -> tuple[str, str] | None:
    """The wrapper that a module is, and what to do about it; None for a plain module.

    Told by class name, so that nothing of torch.distributed is imported. Wrappers without
    parameters, such as scripted activations, are plain.
    """
    names = {base.__name__ for base in type(module).__mro__}
    found = next((wrapper for name, wrapper in _WRAPPERS.items() if name in names), None)
    return found if found and next(module.parameters(), None) is not None else None


def structural_copy(model: M, tensor: Callable[[Tensor], Tensor]) -> M:
    """A deep copy of the modules and their Python state, with every tensor replaced by `tensor(t)`.

    Args:
        model: Any module; not changed.
        tensor: Called once per parameter and buffer; the identity shares the tensors.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): tensor(t) for t in tensors}
    return copy.deepcopy(model, memo | fresh_hooks(model))


def fresh_hooks(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` in which each empty table of hooks has its copy already.

    A module has about ten of them, and copying them one by one would take half of the time.
    """
    return {
        id(table): OrderedDict()
        for module in model.modules()
        for table in vars(module).values()
        if type(table) is OrderedDict and not table
    }


class SiteTracer(fx.Tracer):
    """A torch.fx tracer whose leaves are targets, no-trace modules and modules without targets.

    Args:
        root: The model that will be traced.
        targets: Modules to keep whole.
    """

    def __init__(self, root: nn.Module, targets: Iterable[nn.Module]) -> None:
        layers = sys.modules.get("timm.layers")  # if it is not there, the model is not timm's
        functions = layers.get_notrace_functions() if layers else ()
        super().__init__(autowrap_functions=tuple(f for f in functions if callable(f)))
        self._targets = {id(module) for module in targets}
        self._opaque = tuple(layers.get_notrace_modules()) if layers else ()
        self._thread = threading.get_ident()
        self._holders: set[int] = set()  # ids of modules with a target somewhere below them
        for path, module in root.named_modules(remove_duplicate=False):
            if id(module) in self._targets:
                self._holders.update(id(parent) for parent in _ancestors(root, path))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._targets or id(m) not in self._holders or self.is_opaque(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:  # torch.fx patches the calls of every thread
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_opaque(self, module: nn.Module) -> bool:
        """Whether timm marks the module as one that must not be traced."""
        return type(module) in self._opaque

    def trace_defaults(self, root: nn.Module) -> fx.Graph:
        """Traces with every argument that has a default held at it."""
        signature = inspect.signature(type(root).forward)
        defaults = {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if isinstance(parameter.default, (bool, int, float, str, type(None)))
        }
        with _TRACING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.trace(root, concrete_args=defaults or None)


def _order(model: nn.Module, targets: dict[str, nn.Module]) -> tuple[list[str], str]:
    """The targets' paths, in the order of the graph where there is one, and how it came."""
    registered = list(targets)
    if registered in ([], [""]):
        return registered, "the model is itself a target" if registered else "no targets"
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            reached = list(_trace_order(model, targets))
    except Exception as error:  # any model code can run here, and raise anything
        why = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return registered, f"order of registration; torch.fx could not trace the model ({why})"
    finally:
        random.setstate(python_state)
    ordered = list(dict.fromkeys(reached))
    known = set(ordered)
    rest = [path for path in registered if path not in known]
    order = "order of the torch.fx graph"
    if rest:
        order += f"; {len(rest)} of {len(registered)} layers are not in it and follow as registered"
    return ordered + rest, order


def _trace_order(model: nn.Module, targets: dict[str, nn.Module]) -> Iterator[str]:
    """Yields the targets' paths as the graph calls them, repeats included."""
    # A copy on the meta device: forward may set attributes, update buffers or draw random numbers,
    # and none of that may reach the user's model.
    twin = structural_copy(model, to_meta).eval()
    modules = dict(twin.named_modules(remove_duplicate=False))
    path_of = {id(modules[path]): path for path in targets}
    tracer = SiteTracer(twin, (modules[path] for path in targets))
    for node in tracer.trace_defaults(twin).nodes:
        if node.op == "call_module":
            for module in modules[node.target].modules():
                if id(module) in path_of:
                    yield path_of[id(module)]


def to_meta(tensor: Tensor) -> Tensor:
    """An empty tensor like a given one on the meta device; for `structural_copy`."""
    meta = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta, requires_grad=tensor.requires_grad)
    return meta


def _ancestors(root: nn.Module, path: str) -> Iterator[nn.Module]:
    module = root
    for name in path.split(".") if path else ():
        yield module
        module = module._modules[name]  # type: ignore[assignment]


def name_of(model: nn.Module) -> str:
    """What a model is called: by timm's name of its architecture, or its class's."""
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("architecture") if isinstance(config, dict) else None
    return named or type(model).__name__


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer, as `HyperConfig.targets` names it; None for other modules."""
    spec = spec_of(type(module))
    return spec.kind if spec else None


def _kind(module: nn.Module) -> str:
    spec = spec_of(type(module))
    assert spec is not None
    return spec.kind


def _params(module: nn.Module) -> tuple[str, ...]:
    spec = spec_of(type(module))
    assert spec is not None
    return spec.params_of(module)


def weights_of(module: nn.Module) -> int:
    """Number of weights of a layer of a known kind that could be generated."""
    found = (module._parameters.get(name) for name in _params(module))
    return sum(p.numel() for p in found if p is not None)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter is registered, once per owning module."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append(f"{path}.{name}" if path else name)
    return owners


def _obstacle(module: nn.Module, param: str, owners: dict[int, list[str]]) -> str | None:
    """Why a selected parameter has to stay dense, or None."""
    weight = module._parameters[param]
    assert weight is not None
    names = owners[id(weight)]
    if len(names) > 1:
        return f"tied: one tensor under {', '.join(names)}"
    if not weight.requires_grad:
        return "frozen (requires_grad=False); a generated weight would change with the generator"
    if weight.dtype not in DTYPES:
        return f"dtype {weight.dtype} has no arithmetic to train a generator in"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"a tensor subclass ({type(weight.data).__name__}), whose format would be lost"
    if weight.numel() == 0:
        return "empty"
    for name in (param + EMBEDDING, param + CONSTANTS, HYPERNET):
        if hasattr(module, name):
            return f"the layer has an attribute {name} already"
    return written_parameter(module, [param])


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes as nn.Linear, or as an nn.Conv1d to nn.Conv3d without groups."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(layer, nn.Linear):
        return _is_method(layer.forward, nn.Linear.forward)
    return any(
        isinstance(layer, base)
        and layer.groups == 1
        and _is_method(layer.forward, base.forward)
        and _is_method(layer._conv_forward, base._conv_forward)
        for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )


def _is_method(bound: object, function: object) -> bool:
    return getattr(bound, "__func__", None) is function  # which a function of one instance has not


_DYNAMIC_KINDS = ("lstm", "rnn")


def _is_dynamic(module: nn.Module, paths: list[str], config: HyperConfig) -> bool:
    """Whether `config.lstm` makes a layer dynamic."""
    if _kind(module) not in _DYNAMIC_KINDS:
        return False
    if isinstance(config.lstm, str):
        return config.lstm == "dynamic"
    forms = (form for glob, form in dict(config.lstm).items() if matches(paths, [glob]))
    return next(forms, "static") == "dynamic"


def _dynamic_obstacle(layer: nn.RNNBase, owners: dict[int, list[str]]) -> str | None:
    """Why a recurrent layer cannot be made dynamic, or None."""
    if type(layer) not in (nn.LSTM, nn.RNN):
        return f"a subclass ({type(layer).__name__}), whose own code would be lost"
    if layer.proj_size:
        return "proj_size has no dynamic form"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "has hooks, which would be lost"
    obstacles = (_obstacle(layer, name, owners) for name in layer._parameters)
    return next((obstacle for obstacle in obstacles if obstacle), None)


def matches(paths: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a pattern matches one of a layer's paths, or a module that the layer is part of."""
    prefixes = set(paths)
    for path in paths:
        prefixes.update(path[:at] for at, char in enumerate(path) if char == ".")
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
    for path, module in model.named_modules():
        where = f"its part {path!r}" if path else "the model"
        if isinstance(module, Generated):
            raise ModelError(
                f"{where} is hyperized already; convert it with to_dense() first, or hyperize "
                "parts without generated layers, one by one: model.head = hyperize(model.head)."
            )
        if wrapper := wrapper_of(module):
            raise ModelError(f"{where} is wrapped by {wrapper[0]}; {wrapper[1]}.")
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if any(is_lazy(t) for t in tensors):
            raise ModelError(
                f"{where} is an uninitialised lazy module ({type(module).__name__}), its shapes "
                "are unknown; run a forward pass on a sample input first."
            )
        if any(map(is_sharded, tensors)):
            raise ModelError(f"{where} holds DTensors; hyperize the model before sharding it.")


def _check_devices(model: nn.Module, sites: Iterable[Site]) -> None:
    devices = dict.fromkeys(str(model.get_parameter(site.name).device) for site in sites)
    if len(devices) > 1:
        raise ModelError(
            f"the selected layers lie on several devices ({', '.join(devices)}), but they share "
            "one generator, which lies on one; select the layers of one device with include, or "
            "hyperize the model before splitting it."
        )


def _check_layers(selected: dict[str, nn.Module]) -> None:
    """Refuses layers whose parameters are computed by something else already."""
    for path, module in selected.items():
        for param in _params(module):
            # In this order: to read a parametrized weight is to compute it, which can change it
            # (spectral_norm advances its power iteration).
            if is_parametrized(module, param) or (
                param not in module._parameters and hasattr(module, param)
            ):
                raise ModelError(
                    f"{param} of {path or 'the model'!r} is parametrized (weight_norm, "
                    "spectral_norm, pruning or the like), so it is not a plain parameter; remove "
                    f'the parametrization, or exclude the layer with exclude=("{path}",).'
                )
            if module._parameters.get(param) is None:
                raise ModelError(
                    f"{type(module).__name__} at {path or 'the root'!r} has no parameter "
                    f"{param!r}, which its LayerSpec names; correct the LayerSpec's params."
                )


def _near_misses(pattern: str, names: list[str]) -> str:
    """The end of a sentence about a pattern that matches none of the names."""
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    return f"; near misses: {', '.join(near)}" if near else ""


def _check_forms(config: HyperConfig, layers: list[list[str]]) -> None:
    """Each glob of `config.lstm` has to match a recurrent layer."""
    globs = [] if isinstance(config.lstm, str) else list(dict(config.lstm))
    for glob in globs:
        if not any(matches(paths, [glob]) for paths in layers):
            hint = _near_misses(glob, [path for paths in layers for path in paths])
            raise ConfigError(f"lstm pattern {glob!r} matches no nn.LSTM or nn.RNN{hint}.")


def _check_targets(config: HyperConfig) -> None:
    kinds = registered_kinds()
    for kind in config.targets:
        if kind not in kinds:
            raise ConfigError(
                f"unknown target {kind!r}{did_you_mean(kind, kinds)} The registered kinds are "
                f"{', '.join(kinds)}."
            )


def check_patterns(
    option: str, patterns: Iterable[str], layers: Iterable[list[str]], what: str
) -> None:
    """Each pattern has to match something.

    Args:
        option: Which option has the patterns.
        patterns: Globs over module paths.
        layers: The paths of each module that may match.
        what: What these are.

    Raises:
        ConfigError: A pattern matches none of them.
    """
    candidates = list(layers)
    for pattern in patterns:
        if pattern == "*" or any(matches(paths, [pattern]) for paths in candidates):
            continue
        hint = _near_misses(pattern, [path for paths in candidates for path in paths])
        raise ConfigError(
            f"{option} pattern {pattern!r} matches no {what}{hint}. Patterns are globs over "
            'module paths, as "layer1", "layer1.*" or "*.conv1".'
        )
