"""The generator against the paper's equation, written out tile by tile."""

import pytest
import torch
from torch import nn

from hyperize import HyperConfig, hyperize, make_plan
from hyperize.hypernet import HyperNet

EXACT = {"rtol": 0, "atol": 1e-12}
"""float64 sums of at most a few hundred terms of size one, in another order."""

SHAPES = [(64, 32, 3, 3), (20, 12, 3, 3), (33, 50, 1, 1), (96, 1, 3, 3), (60, 9, 1, 7), (48, 20)]


def literal(hypernet, layer):
    """arXiv 1609.09106, eq. 4: K_i = W_out (W_i z + B_i) + B_out, tiles laid out one by one."""
    plan, planned = hypernet.plan, layer.sites["weight"]
    axis, grid = plan.config.trunk_axis, planned.grid
    shape = planned.site.shape
    z, (scale, offset) = layer.weight_embedding, layer.weight_constants
    elements = torch.Size(shape[2:]).numel()
    head = hypernet.heads[grid.kernel]
    w = hypernet.trunk.weight.view(plan.lead, plan.hidden_dim, plan.embedding_dim)
    b = hypernet.trunk.bias.view(plan.lead, plan.hidden_dim)
    rows = torch.zeros(
        -(-grid.rows // plan.lead) * plan.lead, grid.parts * grid.width * elements, dtype=z.dtype
    )
    for tile in range(grid.tiles):
        down, right = divmod(tile, grid.parts)
        for i in range(plan.lead):
            a = w[i] @ z[tile] + b[i]
            k = head.weight @ a + head.bias
            used = k[: grid.width * elements]
            start = right * grid.width * elements
            rows[down * plan.lead + i, start : start + len(used)] = used
    turned = (shape[axis], shape[1 - axis], *shape[2:])
    count = torch.Size(turned).numel()
    if grid.parts > 1:
        rows = rows[: grid.rows, : count // grid.rows]
    kernel = rows.flatten()[:count].view(turned)
    return scale * (kernel.transpose(0, 1) if axis == 1 else kernel) + offset


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tile", [(16, 16), (8, 32), (4, 5)])
def test_agrees_with_the_equation(axis, tile):
    layers = []
    for out, inner, *kernel in SHAPES:
        if kernel and inner == 1:
            layers.append(nn.Conv2d(out, out, kernel, groups=out))
        else:
            layers.append(nn.Conv2d(inner, out, kernel) if kernel else nn.Linear(inner, out))
    config = HyperConfig(
        tile=tile, embedding_dim=3, hidden_dim=5, trunk_axis=axis, targets=("conv2d", "linear")
    )
    hyper = hyperize(nn.ModuleList(layers).double(), config)
    hypernet = hyper[0].hypernet
    assert len(hypernet.plan.sites) == len(SHAPES)
    with torch.no_grad():
        for p in hypernet.parameters():  # biases start at zero: give every term a say
            p.copy_(torch.randn_like(p))
        for layer in hyper:
            layer.weight_constants.copy_(torch.randn(2))
    for layer, planned in zip(hyper, hypernet.plan.sites, strict=True):
        assert layer.sites["weight"] == planned
        weight = layer.weight
        assert weight.is_contiguous()
        assert tuple(weight.shape) == planned.site.shape
        torch.testing.assert_close(weight, literal(hypernet, layer), **EXACT)


def test_many_sites_in_one_call_are_the_single_calls():
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 32, 1))
    hyper = hyperize(model, compression=3, tile=(16, 16))
    arguments = (
        (layer.weight_embedding, layer.weight_constants, layer.grids["weight"]) for layer in hyper
    )
    together = hyper[0].hypernet(*zip(*arguments, strict=True))
    for weight, layer in zip(together, hyper, strict=True):
        assert torch.equal(weight, layer.weight)


def test_seeds():
    model = nn.Sequential(nn.Conv2d(32, 64, 3))
    state = torch.get_rng_state()
    first = hyperize(model, compression=3, seed=1)[0].weight
    assert torch.equal(first, hyperize(model, compression=3, seed=1)[0].weight)
    assert not torch.equal(first, hyperize(model, compression=3, seed=2)[0].weight)
    unseeded = hyperize(model, compression=3)[0].weight
    assert torch.equal(unseeded, hyperize(model, compression=3)[0].weight)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(1)
    assert not torch.equal(unseeded, hyperize(model, compression=3)[0].weight)


def test_the_plan_is_not_copied_with_the_model():
    import copy

    hyper = hyperize(nn.Sequential(nn.Conv2d(32, 64, 3)), compression=3)
    assert copy.deepcopy(hyper)[0].hypernet.plan is hyper[0].hypernet.plan


def test_a_hypernet_holds_what_the_plan_counts():
    plan = make_plan(nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 1)), compression=3)
    hypernet = HyperNet(plan, torch.float64)
    assert sum(p.numel() for p in hypernet.parameters()) == plan.hypernet_params
    assert {t.dtype for t in hypernet.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("trunk_axis", [0, 1])
def test_a_kernel_is_made_of_the_product_of_its_channels(trunk_axis):
    model = nn.Sequential(nn.Conv2d(24, 16, 3), nn.Conv2d(16, 40, 3))
    hyper = hyperize(model, embeddings="channel", trunk_axis=trunk_axis, compression=3).double()
    hypernet = hyper[0].hypernet
    with torch.no_grad():
        for param in hypernet.parameters():
            param.normal_()
    head = hypernet.heads["3x3"]
    for layer in hyper:
        rows, columns = (layer.out_channels, layer.in_channels)[:: 1 - 2 * trunk_axis]
        u, v = layer.weight_embedding.split([rows, columns])
        kernels = torch.einsum("ir,jr,kr->ijk", u, v, head.weight) + head.bias
        if trunk_axis == 1:
            kernels = kernels.transpose(0, 1)
        scale, offset = layer.weight_constants
        expected = scale * kernels + offset
        torch.testing.assert_close(layer.weight.flatten(2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_channels_start_with_the_moments_of_what_they_replace(dtype):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 64, 3))
    with torch.no_grad():
        model[1].weight.add_(0.1)
    model = model.to(dtype)
    hyper = hyperize(model, embeddings="channel", compression=4, targets="conv2d")
    for dense, layer in zip(model, hyper, strict=True):
        ours, theirs = layer.weight.double(), dense.weight.double()
        limit = 0.02 if dtype is torch.bfloat16 else 1e-3
        assert abs(ours.std() / theirs.std() - 1) < limit
        assert abs(ours.mean() - theirs.mean()) < limit * theirs.std()
