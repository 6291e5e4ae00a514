"""A family of generators is one class, and tiling is one pair of inverses."""

import copy
import math

import pytest
import torch
from models import Convolutions, count, randomise
from torch import nn

from hyperize import (
    ConfigError,
    Family,
    HyperConfig,
    HyperMuon,
    fit_,
    hyperize,
    load,
    make_plan,
    register_family,
    report,
    save,
    to_dense,
)
from hyperize.channels import Channels
from hyperize.config import EMBEDDINGS
from hyperize.families import FAMILIES
from hyperize.muon import RMS
from hyperize.parts import generated_layers
from hyperize.products import linear
from hyperize.solver import Problem, Target
from hyperize.tiles import OneLayer, TwoLayers
from hyperize.tiling import Head, kernel_name, make_grid

LR = 0.02
ROUNDING = 1e-4
"""Of outputs near 1 in float32, which factors and weights sum up in different orders."""


class Toy(OneLayer):
    """A toy: embeddings go through one square layer, shared by all weights, before the head."""

    name = embeddings = "toy"

    def serves(self, config):
        return config.embeddings == "toy"

    def shared(self, lead, hidden, nz):
        return {"mixer": (nz, nz)}

    def hidden(self, net, z, scale, grid):
        weight, bias = net.layer("mixer")
        x = linear(z, weight, bias)
        return x if scale is None else x * scale

    def readers(self, net, block):
        return [net.get_submodule("mixer")]

    def start(self, problem):
        problem.randomise()


@pytest.fixture
def toy():
    register_family(Toy())
    yield HyperConfig(compression=4, embeddings="toy", targets=("conv2d", "linear"), seed=0)
    del FAMILIES["toy"]
    EMBEDDINGS.discard("toy")


def wide():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128 * 16, 32),
    )  # fmt: skip


def test_a_family_of_ones_own_is_planned_to_the_exact_count_and_made_dense_bit_for_bit(toy):
    model = randomise(wide())
    plan = make_plan(model, toy)
    hyper = hyperize(model, plan)
    assert plan.family_name == "toy"
    assert count(hyper) == plan.total_hyper_params
    assert plan.compression >= 4
    assert sum(row.hyper_params for row in report(hyper).sites) + plan.hypernet_params == (
        plan.hyper_params
    )
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(hyper(x), to_dense(hyper)(x))


def test_it_trains_in_all_its_parts(toy):
    hyper = hyperize(randomise(wide()), toy)
    hyper(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in hyper.parameters())
    assert any("mixer" in name for name, _ in hyper.named_parameters())


def test_its_embeddings_take_steps_that_are_measured_in_the_weights(toy):
    """Through the layer of its own, which HyperMuon trains by Muon, as it has no metric."""
    hyper = hyperize(randomise(wide()), toy)
    mixer = hyper.hypernet.get_submodule("mixer").weight
    with torch.no_grad():
        mixer.mul_(torch.logspace(-1, 1, len(mixer))[:, None])
    optimizer = HyperMuon(hyper, LR, 0.0)
    hyper(torch.randn(2, 3, 8, 8)).square().sum().backward()
    before, trained = copy.deepcopy(hyper), mixer.clone()
    for param in hyper.hypernet.parameters():
        param.grad = None
    optimizer.step()
    for path, layer in generated_layers(hyper).items():
        change = layer.weight - before.get_submodule(path).weight
        rows = layer.grids["weight"].cut(change)
        values = torch.linalg.svdvals(rows)[: min(len(rows), len(mixer))]
        size = LR * RMS * math.sqrt(max(len(rows), change.numel() / len(rows)))
        assert values.max() < 1.3 * size
        assert values[3] > 0.6 * size  # two images have a gradient of low rank
    assert torch.equal(mixer, trained)
    hyper(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(mixer, trained)


def test_it_fits_in_its_blocks(toy):
    teacher = randomise(wide())
    fitted = fit_(hyperize(teacher, toy), teacher)
    assert fitted.history[-1] < 0.9  # of what zero weights would miss
    assert all(b <= a for a, b in zip(fitted.history, fitted.history[1:], strict=False))
    data = [torch.randn(8, 3, 8, 8)]
    assert fit_(hyperize(teacher, toy), teacher, data=data).history[-1] < 0.9


def test_it_is_saved_and_loaded_equal(toy, tmp_path):
    hyper = hyperize(randomise(wide()), toy)
    save(hyper, tmp_path / "toy.safetensors")
    again = load(wide(), tmp_path / "toy.safetensors")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(hyper(x), again(x))


# ------------------------------------------------------------------------------ separable weights
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (96, 32, 5, 5), (30, 64, 3, 3), (64, 48, 3)])
def test_a_separable_weight_is_numbers_times_kernels_of_columns(shape, axis):
    """A column has one kernel, or as many as it takes to have one for each row, in turns."""
    conv = (nn.Conv1d, nn.Conv2d)[len(shape) - 3](shape[1], shape[0], shape[2])
    hyper = hyperize(
        nn.Sequential(conv), embeddings="separable", compression=1.5, trunk_axis=axis, seed=0,
        targets=("conv1d", "conv2d"),
    )  # fmt: skip
    layer = hyper[0]
    weight = layer.weight.detach().double() - layer.constants("weight")[1]
    turned = weight.transpose(0, axis).flatten(2)  # (rows, columns, k)
    rows, columns, _ = turned.shape
    turns = -(-rows // columns)
    for turn in range(turns):
        values = torch.linalg.svdvals(turned[turn::turns].transpose(0, 1))  # of (columns, rows, k)
        assert (values[:, 1] < 1e-5 * values[:, 0]).all()
    for turn in range(1, turns):
        values = torch.linalg.svdvals(turned[turn - 1 : turn + 1].transpose(0, 1))
        assert (values[:, 1] > 1e-3 * values[:, 0]).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_kernel_of_a_separable_weight_is_told_from_its_numbers_embedding(axis):
    """As the map of a report's page colours it."""
    conv = nn.Conv2d(40, 70, 3)
    options = {"embeddings": "separable", "compression": 3, "trunk_axis": axis}
    layer = hyperize(nn.Sequential(conv), **options, seed=0)[0]
    family, grid = layer.hypernet.family, layer.grids["weight"]
    places = torch.tensor([(0, 0), (0, 39), (33, 7), (69, 0), (69, 39)])
    for out, into in places:
        z = layer.weight_embedding
        told = family.embeddings_at(z, grid, out[None], into[None])
        kernel = layer.weight[out, into]
        (gradient,) = torch.autograd.grad(kernel.square().sum(), z)
        of_numbers = gradient[: family.split(grid)[0]]
        (reached,) = of_numbers.any(1).nonzero()
        assert torch.equal(told, z[reached])


@pytest.mark.parametrize("compression", [2, 12])
def test_a_constant_separable_weight_learns(compression):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    nn.init.constant_(model[1].weight, 0.5)
    hyper = hyperize(model, embeddings="separable", compression=compression, seed=0)
    assert (hyper.hypernet.embedding_dim == hyper.hypernet.plan.lead) == (compression == 2)
    assert torch.allclose(hyper[1].weight, torch.tensor(0.5))
    hyper(torch.randn(2, 64, 6, 6)).square().sum().backward()
    assert hyper[1].weight_embedding.grad.any()


@pytest.mark.parametrize(
    ("options", "fitted"),
    [({}, False), ({"conditions": 2}, False), ({"condition_dim": 2}, False), ({}, True)],
    ids=str,
)
def test_stored_numbers_are_as_large_as_the_weight(options, fitted):
    """So that Adam, whose steps are as large as its rate, takes them at the pace of the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(3)))
    with torch.no_grad():
        for layer, size in zip(model, (1, 0.1, 10), strict=True):
            layer.weight.mul_(size)
    hyper = hyperize(model, embeddings="separable", compression=2, seed=0, **options)
    if fitted:
        fit_(hyper, model)
    plan = hyper.hypernet.plan
    assert plan.embedding_dim == plan.lead
    for layer, dense in zip(hyper, model, strict=True):
        count = plan.family.split(layer.grids["weight"])[0]
        for z, (scale, _) in zip(
            layer.weight_embedding.view(-1, *layer.weight_embedding.shape[-2:]),
            layer.all_constants("weight").view(-1, 2).expand(plan.config.rows, 2),
            strict=True,
        ):
            assert scale == 1
            ratio = z[:count].std() / dense.weight.std()
            assert 1 / 3 < ratio < 3  # the rest is the kernels'


@pytest.mark.parametrize("compression", [2, 12])
def test_balancing_separable_embeddings_changes_no_weight(compression):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    hyper = hyperize(model, embeddings="separable", compression=compression, seed=0)
    layers = generated_layers(hyper)
    targets = [
        Target(p, layer.grids["weight"], layer.weight.detach()) for p, layer in layers.items()
    ]
    z = [
        layer.weight_embedding * torch.rand(hyper.hypernet.embedding_dim)
        for layer in layers.values()
    ]
    problem = Problem(hyper.hypernet, targets, z, "relative")
    before = {at: problem.generate(at) for at in problem.z}
    problem.balance()
    for at, weight in before.items():
        assert torch.allclose(problem.generate(at), weight, atol=ROUNDING)


def test_a_depthwise_weight_can_be_anything_though_it_has_one_column():
    model = nn.Sequential(nn.Conv2d(64, 64, 5, groups=64), nn.Conv2d(64, 64, 5))
    hyper = hyperize(model, embeddings="separable", compression=2, seed=0)
    values = torch.linalg.svdvals(hyper[0].weight.flatten(1))
    assert values.min() > 1e-2 * values.max()


def test_it_computes_with_factors(toy):
    hyper = hyperize(randomise(wide()), toy.replace(factorized=True))
    assert any(layer.factoring for layer in generated_layers(hyper).values())
    x = torch.randn(2, 3, 8, 8)
    dense = to_dense(hyper)(x)
    assert not torch.equal(hyper(x), dense)
    assert torch.allclose(hyper(x), dense, atol=ROUNDING * float(dense.detach().abs().max()))


def test_a_family_without_a_name_or_with_a_taken_one_is_refused():
    with pytest.raises(ConfigError, match="registered already"):
        register_family(OneLayer())
    with pytest.raises(ConfigError, match="takes a Family"):
        register_family(OneLayer)
    with pytest.raises(ConfigError, match=r"Family\.name must be a string"):
        register_family(Family())
    with pytest.raises(ConfigError, match="embeddings must be"):
        HyperConfig(embeddings="toy")


SHAPES = [
    *((64, 32, 3, 3), (33, 17, 3, 3), (7, 300, 1, 1), (96, 1, 5, 5), (1, 96, 1, 7), (128, 64)),
    *((5, 6, 3), (4, 3, 2, 2, 2), (200,)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("lead", [1, 4, 16])
@pytest.mark.parametrize("trail", [1, 8, 24, 500])
@pytest.mark.parametrize("axis", [0, 1])
def test_cut_and_join_are_inverses(shape, lead, trail, axis):
    grid = make_grid(shape, lead, Head(kernel_name(shape), trail, math.prod(shape[2:])), axis)
    weight = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    rows = grid.cut(weight)
    assert rows.shape == (grid.rows * grid.parts, grid.width * grid.elements)
    assert torch.equal(grid.join(rows), weight)
    assert torch.equal(rows[rows != 0].sort().values, weight.flatten())  # each number once
    tiles = grid.stack(rows)
    assert len(tiles) == grid.tiles
    assert torch.equal(grid.unstack(tiles), rows)
    numbers = grid.unstack(torch.arange(grid.tiles)[:, None].expand(-1, grid.lead).contiguous())
    numbers = grid.join(numbers.expand(-1, grid.width * grid.elements).contiguous())
    numbers = numbers.reshape(*(*shape[:2], 1)[:2], -1)[:, :, 0]
    ends = torch.meshgrid(*map(torch.arange, numbers.shape), indexing="ij")
    assert torch.equal(grid.tiles_at(*ends), numbers)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_kernel_of_channels_comes_from_the_embedding_that_is_told(axis):
    options = {"embeddings": "channel", "compression": 2, "trunk_axis": axis}
    hyper = hyperize(nn.Sequential(nn.Conv2d(24, 40, 3)), **options)
    layer, net = hyper[0], hyper.hypernet
    first, second = torch.tensor([0, 39, 7]), torch.tensor([23, 0, 5])
    z = net.family.embeddings_at(layer.chosen("weight"), layer.grids["weight"], first, second)
    weight, bias = net.head("3x3")
    scale, offset = layer.weight_constants
    made = (z @ weight.t() + bias) * scale + offset
    torch.testing.assert_close(made.view(3, 3, 3), layer.weight[first, second])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_of_channels_is_the_weight_itself(axis):
    grid = Channels().grid((6, 5, 3, 3), 1, Head("3x3", 1, 9), axis)
    weight = torch.randn(6, 5, 3, 3)
    assert torch.equal(grid.join(grid.cut(weight)), weight)
    assert grid.tiles == 11


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ({}, OneLayer),
        ({"hidden_dim": 8}, TwoLayers),
        ({"tile": (16, 16), "embedding_dim": 8}, TwoLayers),
        ({"tile": (1, 64)}, OneLayer),
        ({"tile": (1, 64), "hidden_dim": 8}, TwoLayers),
        ({"embeddings": "channel"}, Channels),
    ],
)
def test_the_request_decides_the_family(options, family):
    plan = make_plan(Convolutions(), compression=2, **options)
    assert type(plan.family) is family
