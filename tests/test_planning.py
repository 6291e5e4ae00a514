"""Plans: exact counts, met requests, the largest embedding, and the paper's published numbers."""

import json
import math

import pytest
import timm
import torch
from torch import nn

from hyperize import BudgetError, ConfigError, HyperConfig, Plan, hyperize, make_plan
from hyperize.tiling import Head, make_grid

MODELS = ["resnet18", "mobilenetv3_small_050", "mixnet_s", "inception_v3", "sequencer2d_s"]


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


def count(module):
    return sum(p.numel() for p in module.parameters())


def wide_resnet_kernels(width):
    """The generated convolutions of the paper's WRN 40-k: three stages of six blocks of two."""
    stages = []
    channels = 16
    for stage in (16 * width, 32 * width, 64 * width):
        for _ in range(12):
            stages.append(nn.Conv2d(channels, stage, 3, bias=False))
            channels = stage
    return nn.Sequential(*stages)


def test_mnist_generator_of_the_paper():
    net = nn.Sequential(nn.Conv2d(1, 16, 7), nn.Conv2d(16, 16, 7), nn.Flatten(), nn.Linear(784, 10))
    options = {"embedding_dim": 4, "hidden_dim": 4, "exclude": ("0",)}
    plan = make_plan(net, HyperConfig.paper(**options))
    assert (plan.dense_params, plan.hypernet_params, plan.hyper_params) == (12_544, 4_240, 4_244)
    assert (plan.total_params, plan.total_hyper_params) == (21_210, 12_910)
    assert count(hyperize(net, HyperConfig.paper(**options))) == 12_910


@pytest.mark.parametrize(
    ("width", "dense", "tiles", "hyper"),
    [(1, 557_568, 242, 91_408), (2, 2_225_664, 966, 137_744)],
)
def test_wide_resnets_of_the_paper(width, dense, tiles, hyper):
    with torch.device("meta"):
        net = wide_resnet_kernels(width)
    plan = make_plan(net, HyperConfig.paper())
    assert (plan.dense_params, plan.tiles) == (dense, tiles)
    assert (plan.hypernet_params, plan.hyper_params) == (75_920, hyper)


@pytest.mark.parametrize("trunk_axis", [0, 1])
@pytest.mark.parametrize("ratio", [2, 10, 37.5, 100])
@pytest.mark.parametrize("name", MODELS)
def test_compression_is_met_by_the_largest_embedding(name, ratio, trunk_axis):
    model = meta(name)
    plan = make_plan(model, compression=ratio, trunk_axis=trunk_axis)
    assert plan.compression >= ratio
    explicit = {"tile": plan.tile, "hidden_dim": plan.hidden_dim, "trunk_axis": trunk_axis}
    again = make_plan(model, embedding_dim=plan.embedding_dim, **explicit)
    assert (again.hyper_params, again.dense_params) == (plan.hyper_params, plan.dense_params)
    assert make_plan(model, embedding_dim=plan.embedding_dim + 1, **explicit).compression < ratio


@pytest.mark.parametrize("name", MODELS)
def test_max_params_is_a_total_for_the_model(name):
    model = meta(name)
    limit = int(0.7 * count(model))
    plan = make_plan(model, max_params=limit)
    assert count(hyperize(model, max_params=limit)) == plan.total_hyper_params <= limit
    explicit = {"tile": plan.tile, "hidden_dim": plan.hidden_dim}
    more = make_plan(model, embedding_dim=plan.embedding_dim + 1, **explicit)
    assert more.total_hyper_params > limit


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_built_model(name):
    model = meta(name)
    plan = make_plan(model)
    hyper = hyperize(model)
    assert count(hyper) == plan.total_hyper_params
    assert count(hyper.hypernet) == plan.hypernet_params
    assert plan.total_params == count(model)
    assert all(p.hyper_params < p.site.dense_params for p in plan.sites)


@pytest.mark.parametrize("name", MODELS)
def test_json_round_trip(name):
    plan = make_plan(meta(name))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    for data in ({}, {"sites": 3}, plan.to_dict() | {"extra": 1}):
        with pytest.raises(ConfigError):
            Plan.from_dict(data)


def test_print_explains():
    plan = make_plan(meta("resnet18"))
    text = str(plan)
    for figure in (plan.dense_params, plan.hyper_params, plan.tiles, plan.total_params):
        assert f"{figure:,}" in text
    for word in ("3x3", "skipped", "linear", "torch.fx graph"):
        assert word in text
    assert "trunk" not in text
    assert "trunk" in str(make_plan(meta("resnet18"), hidden_dim=64))


@pytest.mark.parametrize(
    ("shape", "head", "rows", "parts", "width", "tiles"),
    [
        ((64, 32, 3, 3), Head("3x3", 16, 9), 64, 2, 16, 8),  # the paper's 32x64 kernel
        ((64, 3, 3, 3), Head("3x3", 16, 9), 13, 1, 15, 1),  # narrow: five rows in one
        ((96, 1, 3, 3), Head("3x3", 16, 9), 6, 1, 16, 1),  # depthwise
        ((40, 40, 1, 1), Head("1", 16, 1), 40, 3, 14, 9),  # parts of equal width, not 16 + 16 + 8
        ((7,), Head("1", 16, 1), 1, 1, 7, 1),  # a vector
    ],
)
def test_grids(shape, head, rows, parts, width, tiles):
    grid = make_grid(shape, 16, head, 0)
    assert (grid.rows, grid.parts, grid.width, grid.tiles) == (rows, parts, width, tiles)
    assert grid.rows * grid.parts * grid.width * head.kernel_elements >= math.prod(shape)


def test_the_generator_is_shared_by_all_kinds():
    net = nn.ModuleDict({"conv": nn.Conv2d(64, 64, 3), "lstm": nn.LSTM(64, 64)})
    plan = make_plan(net, compression=4)
    assert {p.site.kind for p in plan.sites} == {"conv2d", "lstm"}
    hyper = hyperize(net, compression=4)
    assert hyper["conv"].hypernet is hyper["lstm"].hypernet


def test_explicit_sizes_win_over_the_default_request_and_say_so():
    net = nn.Sequential(nn.Conv2d(64, 64, 1))
    plan = make_plan(net, tile=(16, 16), embedding_dim=64, hidden_dim=8)
    assert plan.compression < 10
    assert "not reached" in plan.notes[0]
    assert not any(
        "not reached" in note for note in make_plan(net, HyperConfig.paper(hidden_dim=8)).notes
    )


@pytest.mark.parametrize(
    "options",
    [{"compression": 1e9}, {"max_params": 500_000}, {"compression": 900, "hidden_dim": 64}],
)
def test_unreachable_requests_give_the_reachable_range(options):
    with pytest.raises(BudgetError) as refusal:
        make_plan(meta("resnet18"), **options)
    message = str(refusal.value)
    if "max_params" in options:
        least = int(message.split("can have ")[1].split(" ")[0].replace(",", ""))
        assert make_plan(meta("resnet18"), max_params=least).total_hyper_params <= least
    else:
        most = float(message.split("is 1 to ")[1].split(" ")[0].replace(",", ""))
        reachable = options | {"compression": most * 0.999}  # the message rounds to two digits
        assert make_plan(meta("resnet18"), **reachable).compression >= most * 0.999


def test_layers_that_would_grow_stay_dense_with_the_reason():
    plan = make_plan(meta("resnet18"))
    skip = next(skip for skip in plan.skips if skip.path == "conv1.weight")
    assert "would grow" in skip.reason
    with pytest.raises(BudgetError, match="grow"):
        make_plan(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_patterns_match_subtrees_and_name_near_misses():
    model = meta("resnet18")
    inside = {p.site.path for p in make_plan(model, include=("layer1", "*.conv2")).sites}
    assert "layer1.0.conv1" in inside
    assert "layer3.0.conv2" in inside
    assert "layer3.0.conv1" not in inside
    outside = {p.site.path for p in make_plan(model, exclude="layer4").sites}
    assert outside
    assert not any(path.startswith("layer4") for path in outside)
    for option in ("include", "exclude"):
        with pytest.raises(ConfigError, match=r"layer1\.0\.conv1"):
            make_plan(model, **{option: "layer1.0.conv"})
    with pytest.raises(ConfigError, match="conv2d"):
        make_plan(model, targets=("conv2",))


def test_refusals_are_true():
    linear = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ConfigError, match=r"targets=\('linear',\)"):
        make_plan(linear)
    assert make_plan(linear, targets=("linear",), compression=2).sites
    with pytest.raises(ConfigError, match="nor one of another registered kind"):
        make_plan(nn.Sequential(nn.ReLU()))
    with pytest.raises(ConfigError, match="excluded"):
        make_plan(nn.Sequential(nn.Conv2d(64, 64, 3)), exclude="*")
    with pytest.raises(ConfigError, match="7x7"):
        make_plan(nn.Sequential(nn.Conv2d(64, 64, 3)), tile={"7x7": (16, 16)})


def test_explicit_sizes_that_save_nothing_are_noted():
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    plan = make_plan(model, HyperConfig.paper())
    assert plan.hyper_params > plan.dense_params
    assert any("save nothing" in note for note in plan.notes)
    assert not make_plan(model, compression=1.5).notes


@pytest.mark.parametrize("trunk_axis", [0, 1])
@pytest.mark.parametrize(
    ("shape", "rows", "width"),
    [
        ((64, 32, 3, 3), 128, 16),
        ((20, 20, 3, 3), 25, 16),  # over the ends of rows, all tiles full
        ((9, 5, 3, 3), 3, 16),  # but the last
        ((96, 1, 3, 3), 6, 16),  # depthwise
        ((2, 3, 3, 3), 1, 6),  # smaller than a tile
        ((7,), 1, 7),  # a vector
    ],
)
def test_tiles_of_one_channel_go_over_the_weight_in_order(shape, rows, width, trunk_axis):
    grid = make_grid(shape, 1, Head("3x3", 16, 9), trunk_axis)
    assert (grid.rows, grid.parts, grid.width, grid.tiles) == (rows, 1, width, rows)
    assert 0 <= grid.rows * grid.width - math.prod(shape[:2]) < 16


@pytest.mark.parametrize("name", MODELS)
def test_without_a_hidden_layer_there_is_no_trunk(name):
    model = meta(name)
    plan = make_plan(model, hidden_dim=0)
    assert (plan.hidden_dim, plan.lead, plan.fan_in) == (0, 1, plan.embedding_dim)
    heads = sum(head.width * (plan.embedding_dim + 1) for head in plan.heads)
    assert plan.hypernet_params == heads
    assert plan.hyper_params == plan.tiles * plan.embedding_dim + heads
    hyper = hyperize(model, plan)
    assert not [key for key in hyper.state_dict() if "trunk" in key]
    assert count(hyper) == plan.total_hyper_params


def test_hidden_dim_decides_between_the_forms():
    model = meta("resnet18")
    assert make_plan(model).hidden_dim == 0  # what the planner prefers
    for options in ({"hidden_dim": 32}, {"tile": (16, 16)}):
        plan = make_plan(model, **options)
        assert plan.hidden_dim > 0
        assert plan.hypernet_params > plan.lead * plan.hidden_dim * (plan.embedding_dim + 1)
    for tile in ((16, 16), {"3x3": (16, 16)}):
        with pytest.raises(ConfigError, match="one channel"):
            HyperConfig(hidden_dim=0, tile=tile)
    with pytest.raises(ConfigError, match="one channel"):
        HyperConfig(hidden_dim=0, tile=(1, 16), trunk_axis=1)
    HyperConfig(hidden_dim=0, tile=(16, 1), trunk_axis=1)
    for value in (-1, 1.0, False, True, "0"):
        with pytest.raises(ConfigError, match="hidden_dim"):
            HyperConfig(hidden_dim=value)


def test_a_plan_is_taken_in_place_of_a_request():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    plan = make_plan(model, compression=6, seed=0)
    one, other = hyperize(model, plan), hyperize(model, compression=6, seed=0)
    assert torch.equal(one[1].weight, other[1].weight)
    with pytest.raises(ConfigError, match="compression"):
        hyperize(model, plan, compression=5)


def plan_of(name, **options):
    """A plan that meets its request, and is built to the exact count."""
    model = meta(name)
    plan = make_plan(model, compression=4, **options)
    assert plan.compression >= 4
    assert count(hyperize(model, plan)) == plan.total_hyper_params
    return plan


@pytest.mark.parametrize("trunk_axis", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_channels_have_embeddings_along_both_axes(name, trunk_axis):
    plan = plan_of(name, embeddings="channel", trunk_axis=trunk_axis)
    nz = plan.embedding_dim
    for planned in plan.sites:
        out, columns = planned.site.shape[:2]
        assert planned.hyper_params == (out + columns) * nz < planned.site.dense_params
    heads = sum(head.kernel_elements * (nz + 1) for head in plan.heads)
    assert plan.hyper_params == sum(p.hyper_params for p in plan.sites) + heads


@pytest.mark.parametrize("trunk_axis", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_separable_weights_have_embeddings_of_numbers_and_of_kernels(name, trunk_axis):
    plan = plan_of(name, embeddings="separable", trunk_axis=trunk_axis)
    nz = plan.embedding_dim
    assert nz <= plan.lead  # a longer one would add nothing
    trails = {head.kernel: head.trail for head in plan.heads}
    for planned in plan.sites:
        shape = planned.site.shape
        rows, columns = shape[trunk_axis], shape[1 - trunk_axis]
        kernels = columns * math.ceil(rows / columns)  # as many as rows, at least
        numbers = math.ceil(rows / math.ceil(rows / columns)) * kernels
        tiles = math.ceil(numbers / plan.lead) + math.ceil(kernels / trails[planned.site.kernel])
        assert planned.hyper_params == tiles * nz < planned.site.dense_params
    shared = sum(head.width for head in plan.heads) + (plan.lead if nz < plan.lead else 0)
    assert plan.hyper_params == sum(p.hyper_params for p in plan.sites) + shared * (nz + 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "vgg16"])
def test_separable_weights_leave_no_more_dense_than_tiles(name):
    """Though those of one element are as large where the numbers are stored."""
    model = meta(name)
    plans = [make_plan(model, embeddings=e, compression=4) for e in ("separable", "tile")]
    separable, tile = (plan.dense_params for plan in plans)
    assert separable > 0.95 * tile
    stored = plans[0].embedding_dim == plans[0].lead
    assert stored == (name == "resnet18")  # the others have many weights of one element


def test_separable_weights_have_a_largest_size():
    model = meta("resnet18")
    large, larger = (make_plan(model, embeddings="separable", compression=c) for c in (6, 2))
    assert large.hyper_params == larger.hyper_params
    assert large.embedding_dim == large.lead  # the numbers are stored
    small = make_plan(model, embeddings="separable", compression=10)
    assert large.lead < small.lead  # they are generated, in larger tiles
    assert small.embedding_dim < small.lead
    plan = make_plan(model, embeddings="separable", embedding_dim=300)
    assert plan.embedding_dim == 300 < plan.lead


@pytest.mark.parametrize("request_by", ["compression", "max_params"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_the_planner_takes_separable_weights_that_use_two_thirds_of_the_request(name, request_by):
    """In networks of 3x3 kernels, where their numbers are stored; tiles for any other request."""
    model = meta(name)
    stored = make_plan(model, embeddings="separable", compression=2)
    kept = stored.total_params - stored.dense_params
    for allowed, embeddings in [(0.99, "tile"), (1.01, "separable"), (1.49, "separable")]:
        most = int(allowed * stored.hyper_params)
        limit = {"compression": stored.dense_params / most, "max_params": kept + most}
        plan = make_plan(model, **{request_by: limit[request_by]})
        assert plan.family.embeddings == embeddings, allowed
        if embeddings == "separable":
            assert plan.hyper_params == stored.hyper_params
    assert make_plan(model, compression=stored.compression / 1.51).family.embeddings == "tile"


@pytest.mark.parametrize(
    "options",
    [
        {"embeddings": "tile"},
        {"tile": (1, 64)},
        {"hidden_dim": 0},
        {"embedding_dim": 64},
        {"conditions": 2},
        {"condition_dim": 2},
        {"compression": 10},
    ],
    ids=str,
)
def test_the_planner_takes_tiles_where_the_request_is_for_them(options):
    assert make_plan(meta("resnet18"), compression=8).family.embeddings == "separable"
    plan = make_plan(meta("resnet18"), **{"compression": 8, **options})
    assert plan.family.embeddings == "tile"


@pytest.mark.parametrize("name", ["resnet50", "convnext_atto", "vgg11", "densenet121"])
def test_the_planner_takes_tiles_where_other_kernels_than_3x3_have_many_weights(name):
    model = meta(name)
    assert all(make_plan(model, compression=c).family.embeddings == "tile" for c in range(2, 12))


@pytest.mark.parametrize("embeddings", ["channel", "separable"])
def test_channels_leave_nothing_to_choose_but_their_length(embeddings):
    model = meta("resnet18")
    assert embeddings in str(make_plan(model, embeddings=embeddings))
    assert make_plan(model, embeddings=embeddings, embedding_dim=7).embedding_dim == 7
    for options in ({"tile": (1, 16)}, {"hidden_dim": 16}):
        with pytest.raises(ConfigError, match=embeddings):
            make_plan(model, embeddings=embeddings, **options)
    with pytest.raises(ConfigError, match="embeddings"):
        make_plan(model, embeddings="channels")
