"""`HyperConfig`: what the user asks for. Every value in a config is valid on its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict, Unpack

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "BudgetError",
    "ConditionError",
    "ConfigError",
    "FileError",
    "HyperConfig",
    "HyperizeError",
    "ModelError",
    "WeightError",
]

EMBEDDINGS = {"tile", "channel", "separable"}
"""Values of `HyperConfig.embeddings`; `hyperize.families.register_family` adds to them."""
KINDS: dict[type, str] = {}
"""The kind of each class of layers that is known, as `hyperize.layers.register_layer` fills it."""

Tile = tuple[int, int]
"""Channels of one tile along axis 0 and axis 1 of the weight; (out, in) for Conv2d and LSTM."""


class HyperizeError(ValueError):
    """Base class of every error that this library raises for a request it cannot carry out."""


class ConfigError(HyperizeError):
    """A value of a `HyperConfig` is invalid, or a pattern or target in it matches nothing."""


class BudgetError(HyperizeError):
    """The requested compression or parameter total cannot be reached with this model."""


class ModelError(HyperizeError, TypeError):
    """The model (or one of its layers) is of a kind that cannot be rewritten or converted."""


class FileError(HyperizeError):
    """A file is not a readable hyperize checkpoint, or not one for the given model."""


class ConditionError(HyperizeError):
    """A model with conditions was called without one, or with one that it does not have."""


class WeightError(HyperizeError):
    """Something tried to change a generated weight, which is made anew whenever it is read."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name, with the most similar ones, if any are."""
    ratios = {one: SequenceMatcher(None, name.lower(), one.lower()).ratio() for one in known}
    least = max(0.6, max(ratios.values(), default=0) - 0.1)
    near = sorted((one for one in ratios if ratios[one] >= least), key=lambda one: -ratios[one])[:3]
    if not near:
        return "."
    *others, last = map(repr, near)
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


class _Default(float):
    """The request of who makes none, which another request may take the place of."""


class Overrides(TypedDict, total=False):
    """The fields of a `HyperConfig` as keyword arguments, in the types that they may be given."""

    compression: float | None
    max_params: int | None
    targets: str | type[nn.Module] | Sequence[str | type[nn.Module]]
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    embeddings: str | None
    embedding_dim: int | None
    hidden_dim: int | None
    tile: Sequence[int] | Mapping[str, Sequence[int]] | None
    trunk_axis: Literal[0, 1]
    lstm: str | Mapping[str, str]
    lstm_options: Mapping[str, Any]
    conditions: int | None
    condition_dim: int | None
    share: bool
    private: str | Sequence[str]
    recompute: bool
    factorized: bool
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class HyperConfig:
    """The request that `make_plan` turns into integers.

    Attributes:
        compression: Weights of the rewritten parameters, divided by the parameters of the
            hypernetwork and all embeddings together, at least. Must be finite and above 1;
            `None` makes no request. Not enforced when `embedding_dim` is given.
        max_params: Parameters of the WHOLE model after the rewrite, at most; in the place of
            `compression`, which is None then.
        targets: Kinds of layer to rewrite, as registered with `register_layer`, or their classes.
        include: Globs over module paths (`fnmatch` rules, `*` also crosses dots); only matching
            layers are rewritten.
        exclude: Globs over module paths; matching layers stay dense. Wins over `include`.
        embeddings: What has an embedding of its own. "tile": each tile. "channel": each channel
            along both axes of a weight; the embedding of a kernel is the product of those of its
            two channels, and there is no hidden layer and no choice of tiles. A weight is a CP
            decomposition then, of which all layers share the factor over the kernel. "separable": a
            kernel is the kernel of its column, along the other axis than `trunk_axis`, times a
            number of its own, so that a convolution is a depthwise and a pointwise one (Chollet
            2017, arXiv 1610.02357); tiles of numbers and tiles of kernels have embeddings. It has
            no hidden layer and no choice of tiles either, and 3x3 kernels have an eighth of their
            numbers at most, however little compression is asked for. `None` lets the planner
            choose between "separable" and "tile", by how well networks learn from scratch: see
            `hyperize.separable.Separable`.
        embedding_dim: Length Nz of every tile's embedding; `None` lets the planner take the
            largest that meets the request.
        hidden_dim: Length d of the hypernetwork's hidden layer. 0 is for none: a tile is a linear
            function of its embedding then, and has one channel along `trunk_axis`. `None` lets the
            planner choose; it prefers 0.
        tile: Channels of one tile along axis 0 and axis 1 of the weight (out, in for Conv2d), for
            all kernel sizes or per kernel size as in `{"3x3": (16, 32), "1": (16, 256)}`; layers
            of other kernel sizes stay dense then. The trunk is shared, so the entries at
            `trunk_axis` must agree. `None` lets the planner choose.
        trunk_axis: The axis of the weight along which the hypernetwork's first layer has its own
            slice per channel of a tile. The paper takes the input channels, 1 (arXiv 1609.09106,
            sec. 3.1); 0 is the same form transposed, writes a weight in its memory order and is
            faster.
        lstm: What becomes of the nn.LSTM layers: "static" generates their weights, "dynamic" puts a
            HyperLSTM in their place (and a HyperRNN in that of nn.RNN layers), which has more
            parameters and no dense equivalent. A mapping from globs over module paths to the two
            mixes them; the first that matches decides, and "static" is the rest.
        lstm_options: Of the dynamic layers: `hyper_size`, `embedding_dim`, `layer_norm`,
            `recurrent_dropout`, as in `HyperLSTM`.
        conditions: Number K of networks that one generator makes, each from embeddings of its own;
            `hyperize.condition` says which one computes. Norms, and the biases of generated layers,
            exist once for each network too. `compression` is then that of all K networks.
        condition_dim: Length c of a vector that the embeddings are an affine function of, in the
            place of a number. Nothing but generated weights depends on it.
        share: Whether all networks start equal (with a vector, independent of it), or each with
            embeddings drawn anew. In either case each has the dense model's statistics.
        private: Globs over module paths of further layers whose parameters and buffers exist once
            for each of the K networks, e.g. `"fc"`; they are not generated.
        recompute: Generate each weight again for the backward pass instead of keeping it from the
            forward pass, for the same gradients: less memory, more time. Afterwards it is the
            attribute `hypernet.recompute` of the model.
        factorized: Compute with the factors of a weight in the place of the weight, wherever this
            takes fewer multiply-adds: in nn.Linear and in nn.Conv1d to nn.Conv3d without groups.
            No weight is generated there, and large layers are faster than dense ones; outputs
            differ from those of `to_dense` by rounding. The planner then prefers tiles that end
            with the rows of many weights. Afterwards it is the attribute `hypernet.factorized` of
            the model.
        seed: Seed of the initial hypernetwork and embeddings. `None` takes it from the state of
            torch's global generator, which is read and not advanced.

    Raises:
        ConfigError: A value is out of its range or of the wrong type.
    """

    compression: float | None = _Default(10)
    max_params: int | None = None
    targets: tuple[str, ...] = ("conv2d", "lstm")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    embeddings: str | None = None
    embedding_dim: int | None = None
    hidden_dim: int | None = None
    tile: Tile | tuple[tuple[str, Tile], ...] | Mapping[str, Tile] | None = None
    trunk_axis: Literal[0, 1] = 0
    lstm: str | tuple[tuple[str, str], ...] | Mapping[str, str] = "static"
    lstm_options: tuple[tuple[str, Any], ...] | Mapping[str, Any] = ()
    conditions: int | None = None
    condition_dim: int | None = None
    share: bool = False
    private: tuple[str, ...] = ()
    recompute: bool = False
    factorized: bool = False
    seed: int | None = None

    if TYPE_CHECKING:  # the types of the fields are those after `__post_init__`

        def __init__(self, **options: Unpack[Overrides]) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _kinds(self.targets))
        for name in ("include", "exclude", "private"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        if self.max_params is not None and isinstance(self.compression, _Default):
            object.__setattr__(self, "compression", None)
        object.__setattr__(self, "tile", _tile(self.tile))
        object.__setattr__(self, "lstm", _forms(self.lstm))
        object.__setattr__(self, "lstm_options", _options(self.lstm_options))
        for name in ("max_params", "embedding_dim", "conditions", "condition_dim"):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise ConfigError(f"{name} must be a positive integer or None, got {value!r}.")
        if self.max_params is not None and self.compression is not None:
            raise ConfigError(
                f"compression={self.compression!r} and max_params={self.max_params!r} are two "
                "requests for the same thing; pass one of the two."
            )
        if self.conditions and self.condition_dim:
            raise ConfigError(
                f"conditions={self.conditions} is for numbered networks, condition_dim="
                f"{self.condition_dim} for one that depends on a vector; pass one of the two."
            )
        if self.private and not self.conditions:
            raise ConfigError(
                f"private={self.private!r} is for layers that exist once for each of several "
                "networks; pass conditions=K, the number of networks, too."
            )
        if not isinstance(self.share, bool) or (
            self.share and not (self.conditions or self.condition_dim)
        ):
            raise ConfigError(
                "share says whether several networks start equal, True or False, together with "
                f"conditions=K or condition_dim=c; got share={self.share!r}."
            )
        hidden = self.hidden_dim
        if hidden is not None and not (_positive(hidden) or (hidden == 0 and hidden is not False)):
            raise ConfigError(
                "hidden_dim must be a positive integer, 0 for no hidden layer, or None, got "
                f"{hidden!r}."
            )
        if self.seed is not None and (
            not isinstance(self.seed, int) or isinstance(self.seed, bool)
        ):
            raise ConfigError(f"seed must be an integer or None, got {self.seed!r}.")
        if self.trunk_axis not in (0, 1) or isinstance(self.trunk_axis, bool):
            raise ConfigError(f"trunk_axis must be 0 or 1, got {self.trunk_axis!r}.")
        if len(self.leads) > 1:
            raise ConfigError(
                "tile: the trunk is shared by all kernel sizes, so every tile needs the same "
                f"number of channels along trunk_axis={self.trunk_axis}, got {self.tile!r}."
            )
        if self.embeddings is not None and (
            not isinstance(self.embeddings, str) or self.embeddings not in EMBEDDINGS
        ):
            names = ", ".join(f'"{name}"' for name in sorted(EMBEDDINGS, reverse=True))
            raise ConfigError(f"embeddings must be {names} or None, got {self.embeddings!r}.")
        if self.embeddings in ("channel", "separable") and (hidden or self.tile is not None):
            raise ConfigError(
                f'embeddings="{self.embeddings}" has no hidden layer and no tiles to choose, got '
                f"hidden_dim={hidden!r}, tile={self.tile!r}."
            )
        if hidden == 0 and (leads := self.leads) and leads != {1}:
            raise ConfigError(
                "hidden_dim=0 means tiles of one channel along "
                f"trunk_axis={self.trunk_axis}, got tile={self.tile!r}."
            )
        for name in ("recompute", "factorized"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {value!r}.")
        if not self.targets:
            raise ConfigError('targets is empty; name at least one kind of layer, as "conv2d".')
        if not self.include:
            raise ConfigError('include is empty, so nothing could match; ("*",) matches all.')
        ratio = self.compression
        if ratio is not None and (
            isinstance(ratio, bool)
            or not isinstance(ratio, (int, float))
            or not math.isfinite(ratio)
            or ratio <= 1
        ):
            raise ConfigError(
                "compression is dense weights over generated-from parameters and must be a finite "
                f"number above 1, got {ratio!r}. To choose the size yourself pass embedding_dim, "
                "hidden_dim and tile."
            )
        if ratio is None and self.max_params is None and self.embedding_dim is None:
            raise ConfigError(
                "compression=None makes no request, so the planner needs max_params or "
                "embedding_dim; both are None."
            )

    @classmethod
    def paper(cls, **overrides: Unpack[Overrides]) -> HyperConfig:
        """The CIFAR-10 setting of the paper (arXiv 1609.09106, sec. 4.2): 16x16 tiles, Nz = d = 64.

        Args:
            **overrides: Fields to set otherwise, e.g. `exclude=("conv1",)`: the paper keeps the
                first convolution dense.
        """
        preset: dict[str, Any] = {
            "compression": None,
            "tile": (16, 16),
            "embedding_dim": 64,
            "hidden_dim": 64,
            "trunk_axis": 1,
        }
        return cls(**preset).replace(**overrides)

    def replace(self, **overrides: Unpack[Overrides]) -> HyperConfig:
        """A copy with some fields changed.

        Args:
            **overrides: The fields; of `compression` and `max_params`, one takes the other's place.

        Raises:
            ConfigError: A name is not a field, or a value is invalid.
        """
        known = [f.name for f in fields(self)]
        if unknown := [name for name in overrides if name not in known]:
            raise ConfigError(
                f"unknown option {unknown[0]!r}{did_you_mean(unknown[0], known)} The options are "
                f"{', '.join(known)}."
            )
        requests: dict[str, Any] = {"compression": None, "max_params": None}
        given = any(overrides.get(name) is not None for name in requests)
        changes: dict[str, Any] = {**(requests if given else {}), **overrides}
        return replace(self, **changes)

    @property
    def networks(self) -> int:
        """Number of networks that the generator makes: K, or 1."""
        return self.conditions or 1

    @property
    def rows(self) -> int:
        """Sets of embeddings: one for each network, or 1 + c with a vector of c numbers."""
        return self.networks if self.condition_dim is None else self.condition_dim + 1

    def tile_of(self, kernel: str) -> Tile | None:
        """The tile given for a kernel size as in "3x3", or None if there is none."""
        by_kernel = self.tiles_by_kernel
        return by_kernel.get(kernel) if by_kernel else self.tile  # type: ignore[return-value]

    @property
    def tiles_by_kernel(self) -> dict[str, Tile]:
        """The tile of each kernel size, empty unless `tile` was given per kernel size."""
        tile = self.tile
        if tile is None or isinstance(next(iter(tile)), int):
            return {}
        return dict(tile)  # type: ignore[arg-type]

    @property
    def leads(self) -> set[int]:
        """The channels of the given tiles along `trunk_axis`, empty if no tile was given."""
        pairs = list(self.tiles_by_kernel.values())
        if not pairs and self.tile is not None:
            pairs = [self.tile]  # type: ignore[list-item]
        return {pair[self.trunk_axis] for pair in pairs}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; the inverse of `from_dict`."""
        data = asdict(self)
        for name in ("targets", "include", "exclude", "private"):
            data[name] = list(data[name])
        if by_kernel := self.tiles_by_kernel:
            data["tile"] = {kernel: list(pair) for kernel, pair in by_kernel.items()}
        elif self.tile is not None:
            data["tile"] = list(self.tile)
        data["lstm"] = self.lstm if isinstance(self.lstm, str) else dict(self.lstm)
        data["lstm_options"] = dict(self.lstm_options)
        return data

    def to_json(self) -> str:
        """The fields as a JSON object; the inverse of `from_json`."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HyperConfig:
        """A config from the output of `to_dict`.

        Raises:
            ConfigError: The data is not a mapping, a name is not a field, or a value is invalid.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a config must be a mapping of fields, got {type(data).__name__}.")
        return cls().replace(**data)

    @classmethod
    def from_json(cls, text: str) -> HyperConfig:
        """A config from the output of `to_json`.

        Raises:
            ConfigError: The text is not JSON, or as in `from_dict`.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a config must be a JSON object, got {text[:40]!r}.") from error
        return cls.from_dict(data)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _kinds(value: Any) -> tuple[str, ...]:
    """`HyperConfig.targets` in canonical form: the kinds, by their names."""
    values = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    for item in values:
        if isinstance(item, type) and item not in KINDS:
            kind = next((KINDS[base] for base in item.__mro__ if base in KINDS), None)
            base = f"; {kind!r} is the kind of its base class" if kind else ""
            raise ConfigError(
                f"targets names the class {item.__name__}, which is not registered{base}. "
                "Register it with register_layer, or name layers by include=(...)."
            )
    names = [KINDS[item] if isinstance(item, type) else item for item in values]
    return _strings("targets", {*names} if isinstance(value, (set, frozenset)) else names)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, set, frozenset)) or not all(
        isinstance(item, str) for item in values
    ):
        raise ConfigError(f"{name} must be a string or a sequence of strings, got {value!r}.")
    return tuple(sorted(values)) if isinstance(values, (set, frozenset)) else tuple(values)


_FORMS = ("static", "dynamic")


def _forms(value: Any) -> str | tuple[tuple[str, str], ...]:
    """`HyperConfig.lstm` in canonical form: one of the two, or pairs of (glob, one of the two)."""
    if isinstance(value, str) and value in _FORMS:
        return value
    rule = (
        'lstm must be "static", "dynamic", or a mapping from globs to these as '
        f'{{"decoder.*": "dynamic"}}, got {value!r}.'
    )
    try:
        pairs = tuple(dict(value).items())
    except (TypeError, ValueError) as error:
        raise ConfigError(rule) from error
    if not pairs or not all(isinstance(glob, str) and form in _FORMS for glob, form in pairs):
        raise ConfigError(rule)
    return pairs


def _options(value: Any) -> tuple[tuple[str, Any], ...]:
    """`HyperConfig.lstm_options` in canonical form; their values are checked by HyperLSTM."""
    try:
        pairs = tuple(sorted(dict(value).items()))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lstm_options must be a mapping, got {value!r}.") from error
    known = ("hyper_size", "embedding_dim", "layer_norm", "recurrent_dropout")
    if unknown := [name for name, _ in pairs if name not in known]:
        raise ConfigError(
            f"lstm_options has no {unknown[0]!r}; the options are {', '.join(known)}."
        )
    return pairs


def _tile(value: Any) -> Tile | tuple[tuple[str, Tile], ...] | None:
    """`HyperConfig.tile` in canonical form: None, a pair, or a sorted tuple of (kernel, pair)."""
    if value is None:
        return None
    rule = (
        "tile must be (out, in) with positive integers, or a mapping from kernel sizes to such "
        f'pairs as {{"3x3": (16, 32)}}, got {value!r}.'
    )
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_positive, value)):
        return (value[0], value[1])
    try:
        items = dict(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(rule) from error
    pairs = []
    for kernel, pair in items.items():
        canonical = _tile(pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else None
        if not isinstance(kernel, str) or canonical is None or not isinstance(canonical[0], int):
            raise ConfigError(rule)
        pairs.append((kernel, canonical))
    if not pairs:
        raise ConfigError(rule)
    return tuple(sorted(pairs))
