"""What the planner's constants are for: the chosen plan against its neighbours."""

import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from hyperize import make_plan

FEW = 8
"""An embedding shorter than this is taken only where no tiles allow a longer one."""
PAPERS_HIDDEN = 64
"""The hidden layer grows to the paper's size, and no further unless it has to."""
KERNELS = 64
"""Of a tile in ResNet-20 and ResNet-56: they trained fastest and fitted best."""


def cifar_resnet(blocks):
    """The 3x3 convolutions of a ResNet for CIFAR-10 with so many blocks a stage."""
    widths = [16, *[16] * 2 * blocks, *[32] * 2 * blocks, *[64] * 2 * blocks]
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(3, 16, 3),
            *(nn.Conv2d(a, b, 3) for a, b in pairwise(widths)),
        )


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("blocks", [3, 9])
@pytest.mark.parametrize("ratio", [2, 4, 10])
def test_tiles_of_the_resnets_that_were_measured_have_the_kernels_that_were_best(blocks, ratio):
    plan = make_plan(cifar_resnet(blocks), compression=ratio)
    assert {head.kernel: head.trail for head in plan.heads} == {"3x3": KERNELS}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto", "mobilenetv3_small_100"])
@pytest.mark.parametrize("ratio", [5, 20])
def test_the_preferred_tiles_are_near_square(name, ratio):
    """Weights in a tile and number of tiles differ by at most a factor of four, within bounds."""
    plan = make_plan(on_meta(name), compression=ratio, targets=("conv2d", "linear"))
    for head in plan.heads:
        weights = sum(p.site.dense_params for p in plan.sites if p.grid.kernel == head.kernel)
        side = min(math.sqrt(weights), 1152)
        assert side / 4 <= head.width <= max(4 * side, 2 * head.kernel_elements), head


def neighbours(model, plan, **request):
    """Plans of the same request whose tiles are twice or half as large for a kernel size."""
    for head in plan.heads:
        for factor in (0.5, 2):
            tile = plan.tile | {head.kernel: (1, max(1, int(head.trail * factor)))}
            try:
                yield make_plan(model, tile=tile, hidden_dim=0, **request)
            except ValueError:  # of a BudgetError: with these tiles the request cannot be met
                continue


@pytest.mark.parametrize("ratio", [8, 30, 100, 300])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "cifar"])
def test_a_short_embedding_is_taken_only_where_other_tiles_allow_no_longer_one(name, ratio):
    model = cifar_resnet(3) if name == "cifar" else on_meta(name)
    plan = make_plan(model, compression=ratio)
    if plan.embedding_dim < FEW and not plan.hidden_dim:
        for other in neighbours(model, plan, compression=ratio):
            assert other.embedding_dim <= plan.embedding_dim


def test_other_tiles_than_the_preferred_ones_serve_a_request_that_would_leave_few_numbers():
    model = cifar_resnet(3)
    preferred = make_plan(model, tile=(1, KERNELS), hidden_dim=0, compression=130)
    assert preferred.embedding_dim < FEW  # otherwise this shows nothing
    assert make_plan(model, compression=130).embedding_dim > preferred.embedding_dim


@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_a_hidden_layer_balances_the_trunk_and_the_embeddings_up_to_the_papers_size(width):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Conv2d(width, width, 3) for _ in range(8)))
    plan = make_plan(model, tile=(16, 16), compression=4)
    balanced = min(2 ** round(math.log2(plan.tiles / 16)), PAPERS_HIDDEN)
    if plan.hidden_dim == balanced:
        return
    # The other reason: an embedding longer than the numbers that are made of it is redundant
    assert balanced < plan.hidden_dim <= PAPERS_HIDDEN
    half = make_plan(model, tile=(16, 16), hidden_dim=plan.hidden_dim // 2, compression=4)
    assert half.embedding_dim > 16 * half.hidden_dim


def test_the_longest_embedding_that_meets_the_request_is_taken():
    model = on_meta("resnet18")
    plan = make_plan(model, compression=10)
    tile = plan.tile
    longer = make_plan(
        model, tile=tile, embedding_dim=plan.embedding_dim + 1, hidden_dim=0, compression=10
    )
    assert plan.compression >= 10 > longer.compression
