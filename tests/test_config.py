"""HyperConfig: every value in it is valid, and it survives JSON."""

import dataclasses
import math

import pytest

from hyperize import ConfigError, HyperConfig

INVALID = [{"compression": value} for value in (0, 1, -1, math.nan, math.inf, "10", True)] + [
    {"compression": None},
    {"max_params": 0},
    {"max_params": 1.5},
    {"embedding_dim": 0},
    {"embedding_dim": True},
    {"hidden_dim": -4},
    {"tile": (16,)},
    {"tile": (0, 16)},
    {"tile": 16},
    {"tile": {}},
    {"tile": {"3x3": 16}},
    {"tile": {3: (16, 16)}},
    {"tile": {"3x3": (16, 16), "1": (8, 16)}},
    {"trunk_axis": 2},
    {"trunk_axis": True},
    {"targets": ()},
    {"targets": (1,)},
    {"targets": 3},
    {"include": ()},
    {"exclude": (None,)},
    {"seed": 1.5},
]

VALID = [
    {},
    {"compression": 1.001},
    {"compression": None, "max_params": 1000},
    {"tile": (8, 32), "embedding_dim": 3, "hidden_dim": 5},
    {"tile": {"3x3": (16, 32), "1": (16, 256)}},
    {"tile": {"3x3": (32, 16), "1": (256, 16)}, "trunk_axis": 1},
    {"targets": ("linear",), "include": ("a.*", "b"), "exclude": "c", "seed": 7},
]


@pytest.mark.parametrize("options", INVALID, ids=str)
def test_invalid_values_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        HyperConfig(**options)


@pytest.mark.parametrize("options", VALID, ids=str)
def test_json_round_trip(options):
    config = HyperConfig(**options)
    assert HyperConfig.from_json(config.to_json()) == config
    assert hash(HyperConfig.from_json(config.to_json())) == hash(config)


def test_frozen_and_canonical():
    config = HyperConfig(include="conv*", tile=[16, 8], targets=["conv2d"])
    assert (config.include, config.tile, config.targets) == (("conv*",), (16, 8), ("conv2d",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.compression = 3


def test_paper_preset_and_overrides():
    paper = HyperConfig.paper(exclude=("conv1",))
    assert (paper.tile, paper.embedding_dim, paper.hidden_dim) == ((16, 16), 64, 64)
    assert (paper.compression, paper.trunk_axis, paper.exclude) == (None, 1, ("conv1",))
    assert HyperConfig.paper(embedding_dim=8).embedding_dim == 8


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="compresion"):
        HyperConfig().replace(compresion=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="compresion"):
        HyperConfig.from_dict({"compresion": 3})
    for text in ("[1]", "{", "3"):
        with pytest.raises(ConfigError):
            HyperConfig.from_json(text)
