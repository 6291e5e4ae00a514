"""Layers that are not generated, of which each of several networks has its own.

Batch norm's statistics above all: those of one network are wrong for another. Such a layer keeps
its class's forward, fields and repr; only the class is swapped, and each of its parameters and
buffers becomes a table with one entry for each network, (K, *), under the same name. Who reads a
parameter as an attribute gets the entry of the network that is meant.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from hyperize.conditions import Conditions, samplewise
from hyperize.config import ConditionError
from hyperize.layers import ENGINES, put
from hyperize.reading import guarded

__all__: list[str] = []


class Private(nn.Module):
    """Mixin of a layer whose parameters and buffers are tables, of which a condition takes one."""

    dense_class: type[nn.Module]
    """The class this layer had; `to_dense` restores it."""
    conditions: Conditions
    """Those of the hyperized model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense class's, with the parameters and buffers of the network that is meant.

        In training the buffers that it has updated are written back to the table.
        """
        params, buffers = self.rows()
        if self.conditions.now.each:
            return self._forward_each({**params, **buffers}, *args, **kwargs)
        shell = self._shell(params, buffers)
        output = shell.forward(*args, **kwargs)
        if self.training and buffers:
            rows = self.conditions.now.rows
            with torch.no_grad():
                for name, row in shell._buffers.items():
                    if row is not None and (table := self._buffers[name]) is not None:
                        table.index_copy_(0, rows.to(table.device), row[None])
        return output

    def rows(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters and the buffers of the network that is meant."""
        select = self.conditions.select
        params = {name: select(t) for name, t in self._parameters.items() if t is not None}
        return params, {name: select(t) for name, t in self._buffers.items() if t is not None}

    def _forward_each(self, rows: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or (self.training and any(n in rows for n in self._buffers)):
            raise ConditionError(
                f"{self.dense_class.__name__} cannot compute with one condition for each sample"
                f"{' in training' if self.training else ''}; call the model for the samples of one "
                "condition at a time."
            )

        def one(rows: dict[str, Tensor], x: Tensor) -> Tensor:
            params = {name: row for name, row in rows.items() if name in self._parameters}
            buffers = {name: row for name, row in rows.items() if name in self._buffers}
            output: Tensor = self._shell(params, buffers).forward(x[None])
            return output[0]

        return samplewise(one, rows, args[0])

    def _shell(self, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> nn.Module:
        """The layer as it was, with given tensors; what it sets on itself is dropped."""
        shell: nn.Module = object.__new__(self.dense_class)
        shell.__dict__.update(self.__dict__)
        shell.__dict__["_parameters"] = {name: params.get(name) for name in self._parameters}
        shell.__dict__["_buffers"] = {name: buffers.get(name) for name in self._buffers}
        return shell

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Twins are made at run time, so pickle cannot find them by name: make them again instead.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        names = tuple(name for name, param in self._parameters.items() if param is not None)
        return (_new_private, (self.dense_class, names), *reduced[2:])


_TWINS: dict[tuple[type[nn.Module], tuple[str, ...]], type[Private]] = {}


def private_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[Private]:
    """The private twin of a class with such parameters; one for each."""
    if (dense, names) not in _TWINS:
        members: dict[str, Any] = {name: _entry(name) for name in names}
        members |= {
            "dense_class": dense,
            "__doc__": f"{dense.__name__} of which each network has its own.",
            "__module__": dense.__module__,  # by which torch.fx tells leaves
        }
        twin = type(f"Private{dense.__name__}", (Private, dense), members)
        _TWINS.setdefault((dense, names), twin)  # threads that make it at once all get the first
    return _TWINS[dense, names]


def _entry(name: str) -> property:
    def read(self: Private) -> Tensor:
        table = self._parameters[name]
        assert table is not None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.conditions.select(table)
        reader = sys._getframe(1)
        module, function = str(reader.f_globals.get("__name__")), reader.f_code.co_name
        # A layer's repr asks whether it has a bias
        if module.startswith(ENGINES) or function in ("get_parameter", "extra_repr"):
            return table
        entry = self.conditions.select(table)
        # The forward of a layer around this one, as of torch's own encoders, only reads
        if module.startswith(("torch.nn.modules.", "hyperize.")) and function != "reset_parameters":
            return entry
        return guarded(entry, f"{name} of a {type(self).__name__}")

    return property(read, doc=f"The `{name}` of the network that the condition names.")


def _new_private(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty private layer, for pickle and deepcopy to fill."""
    twin = private_class(dense, names)
    layer: nn.Module = twin.__new__(twin)
    return layer


def repeat(module: nn.Module, names: tuple[str, ...], networks: int) -> None:
    """Makes tables of some parameters and buffers, in place, with equal entries."""
    for name in names:
        if (param := module._parameters.get(name)) is not None:
            table = torch.stack([param.detach()] * networks)
            module._parameters[name] = nn.Parameter(table, requires_grad=param.requires_grad)
        elif (buffer := module._buffers.get(name)) is not None:
            module._buffers[name] = torch.stack([buffer] * networks)


def make_private(module: nn.Module, names: tuple[str, ...], conditions: Conditions) -> None:
    """Turns a layer into its private twin, in place."""
    repeat(module, names, conditions.networks)
    module.__dict__["conditions"] = conditions
    module.__class__ = private_class(
        type(module), tuple(n for n, param in module._parameters.items() if param is not None)
    )


def make_dense(module: Private, rows: dict[str, Tensor]) -> None:
    """Turns a private layer back into its dense class, in place; mirrors `make_private`.

    Args:
        module: A private layer.
        rows: Its parameters and buffers from now on.
    """
    for name, row in rows.items():
        put(module, name, row)
    del module.__dict__["conditions"]
    module.__class__ = module.dense_class  # type: ignore[assignment]
