"""The families by name: those of this package, and what is registered besides."""

from __future__ import annotations

from hyperize.channels import Channels
from hyperize.config import EMBEDDINGS, ConfigError
from hyperize.family import Family
from hyperize.separable import Separable
from hyperize.tiles import OneLayer, TwoLayers

__all__ = ["register_family"]


FAMILIES: dict[str, Family] = {}
"""Families by name, in the order in which the planner prefers them."""


def register_family(family: Family) -> Family:
    """Makes a family of generators known, to be asked for by `HyperConfig.embeddings`.

    Register it in every process that loads a model or a file with it.

    Args:
        family: An instance of a subclass of `Family`.

    Returns:
        The same.

    Raises:
        ConfigError: It is no `Family` with a name and a value of `embeddings`, or its name is
            taken.
    """
    if not isinstance(family, Family):
        raise ConfigError(f"register_family takes a Family, got {type(family).__name__}.")
    for field in ("name", "embeddings"):
        if not isinstance(getattr(family, field, None), str):
            raise ConfigError(f"{type(family).__name__}.{field} must be a string.")
    if family.name in FAMILIES:
        raise ConfigError(f"the family {family.name!r} is registered already; choose another name.")
    FAMILIES[family.name] = family
    EMBEDDINGS.add(family.embeddings)
    return family


for _family in (Separable(), OneLayer(), TwoLayers(), Channels()):
    register_family(_family)
