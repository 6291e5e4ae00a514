"""`HyperMuon`: steps that are as large in the weights as the learning rate says."""

import copy
import io
import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import CRNN, Convolutions, UsedTwice
from timm.optim import Muon
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperize import (
    ConfigError,
    HyperConfig,
    HyperMuon,
    ModelError,
    condition,
    dense_state_dict,
    hyperize,
    param_groups,
    to_dense,
)
from hyperize.families import FAMILIES
from hyperize.muon import DAMPING, RMS, inverse_root, orthogonal
from hyperize.parts import generated_layers
from hyperize.tiles import OneLayer

LR = 0.02
SINGULAR = (0.6, 1.3)
"""Where Muon's five iterations leave singular values that were not far from each other."""
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}
"""Of products in another order, in float32."""
ROOT = 1e-3
"""Relative error of an inverse root in float32; Muon itself leaves a third."""
FORMS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"hidden_dim": 12, "tile": (4, 8), "embedding_dim": 10, "compression": None},
    "channels": {"embeddings": "channel"},
    "separable": {"embeddings": "separable", "embedding_dim": 24, "compression": None},
}
"""Requests for each family of generators."""


class Net(nn.Module):
    """Three convolutions without norms, of two kernel sizes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 48, 3, padding=1)
        self.c = nn.Conv2d(48, 64, 1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.c(torch.tanh(self.b(self.a(x))))).mean((2, 3)))


def small(form="one layer", **options):
    torch.manual_seed(0)
    return hyperize(Net(), HyperConfig(**{"compression": 3, "seed": 0, **FORMS[form], **options}))


def take(model, optimizer, steps=1, seed=0, k=None):
    """Steps on random batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        with nullcontext() if k is None else condition(model, k):
            loss = F.cross_entropy(model(x), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def weights(hyper):
    return {name: w.clone() for name, w in dense_state_dict(hyper).items()}


def only(model, *params):
    """Leaves a model these trainable parameters."""
    model.requires_grad_(False)
    for param in params:
        param.requires_grad_()
    return model


# ------------------------------------------------------------------------ measured in the weights
@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_of_embeddings_is_muons_step_of_the_weights(axis):
    """Singular values of the weights' change are alike, as large as Muon would have them."""
    hyper = small(trunk_axis=axis)
    layers = generated_layers(hyper)
    only(hyper, *(layer.embedding("weight") for layer in layers.values()))
    before = weights(hyper)
    take(hyper, HyperMuon(hyper, LR, 0.0))
    for path, layer in layers.items():
        grid = layer.grids["weight"]
        rows = grid.cut(dense_state_dict(hyper)[f"{path}.weight"] - before[f"{path}.weight"])
        values = torch.linalg.svdvals(rows)[: min(len(rows), hyper.hypernet.embedding_dim)]
        of_weight = math.prod(grid.shape) / len(rows)
        size = LR * RMS * math.sqrt(max(len(rows), of_weight))
        assert SINGULAR[0] * size < values.min(), path
        assert values.max() < SINGULAR[1] * size, path


@pytest.mark.parametrize("out", [32, 64])
def test_stored_numbers_of_separable_weights_take_muons_step_as_a_matrix(out):
    """Of the weight's own shape, however they are cut into embeddings."""
    torch.manual_seed(0)
    hyper = hyperize(nn.Sequential(nn.Conv2d(40, out, 3)), embeddings="separable", compression=4)
    layer, family = hyper[0], hyper.hypernet.family
    grid, table = layer.grids["weight"], layer.embedding("weight")
    assert table.shape[1] == grid.lead  # they are stored
    count, _ = family.split(grid)
    numbers, kernels = family.thin(hyper.hypernet, (table, layer.constants("weight"), grid))
    assert numbers.shape == (32, 40 * -(-out // 40))
    before, size = numbers.detach().clone(), kernels.detach().square().sum(1).mean().sqrt()
    optimizer = HyperMuon(only(hyper, table), LR, 0.0)
    (layer.weight * torch.randn_like(layer.weight)).sum().backward()
    table.grad[count:] = 0
    optimizer.step()
    after, _ = family.thin(hyper.hypernet, (table, layer.constants("weight"), grid))
    values = torch.linalg.svdvals(after - before) * size
    step = LR * RMS * math.sqrt(max(grid.rows, layer.weight.numel() / grid.rows))
    assert SINGULAR[0] * step < values.min()
    assert values.max() < SINGULAR[1] * step


@pytest.mark.parametrize("form", FORMS)
def test_all_parts_of_a_generator_move_the_weights_alike(form):
    """Each by about as much as a step of Muon moves a dense weight."""
    hyper = small(form)
    layers = generated_layers(hyper)
    tables = [layer.embedding("weight") for layer in layers.values()]
    for part in [tables, *([p] for p in hyper.hypernet.parameters() if p.ndim == 2)]:
        model = copy.deepcopy(hyper)
        moved = dict(zip(map(id, hyper.parameters()), model.parameters(), strict=True))
        only(model, *(moved[id(p)] for p in part))
        before = weights(model)
        take(model, HyperMuon(model, LR, 0.0))
        changes = [
            (w - before[name]).square().mean().sqrt() / LR
            for name, w in dense_state_dict(model).items()
            if name.removesuffix(".weight") in layers and not torch.equal(w, before[name])
        ]
        mean = torch.stack(changes).square().mean().sqrt()
        assert 0.2 * RMS < mean < 1.5 * RMS, [tuple(p.shape) for p in part]


@pytest.mark.parametrize("form", FORMS)
def test_steps_do_not_depend_on_how_large_the_factors_are(form):
    """Only on their product: a generator of ten times the size moves weights as far."""
    one = small(form)
    other = copy.deepcopy(one)
    with torch.no_grad():
        for name, param in other.hypernet.named_parameters():
            if name.startswith("heads") and name.endswith("weight"):
                param.mul_(10)
            elif name.startswith("trunk"):
                param.mul_(5)
        for layer in generated_layers(other).values():
            parts = layer.embedding("weight").split(
                other.hypernet.family.split(layer.grids["weight"])
            )
            parts[-1].div_(50 if form == "two layers" else 10)
    for (name, a), b in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.allclose(a, b, **ROUNDING), name
    before = weights(one)
    for model in (one, other):
        for name, param in model.named_parameters():  # a trunk's bias has no step in weights
            param.requires_grad_(not name.endswith("bias"))
        take(model, HyperMuon(model, LR), steps=2)
    for (name, a), b in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
        assert not torch.equal(a, before[name]) or name.endswith("bias")


@pytest.mark.parametrize("form", FORMS)
def test_the_factors_share_the_decay_of_the_weights(form):
    hyper = small(form)
    with torch.no_grad():
        for name, param in hyper.named_parameters():
            if name.endswith("bias"):
                param.zero_()
        for layer in generated_layers(hyper).values():
            layer.all_constants("weight")[1] = 0
    before = weights(hyper)
    optimizer = HyperMuon(hyper, 0.1, 0.9)
    for param in hyper.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    factors = {"one layer": 2, "separable": 4}.get(form, 3)
    for path in generated_layers(hyper):
        after = dense_state_dict(hyper)[f"{path}.weight"]
        kept = (1 - 0.1 * 0.9 / factors) ** factors
        assert torch.allclose(after, kept * before[f"{path}.weight"], **ROUNDING), path


def test_an_inverse_root_is_that_of_the_eigenvalues():
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, 60, 60, dtype=torch.float64))[0]
    values = torch.stack([torch.logspace(0, -n, 60, dtype=torch.float64) for n in (0, 2, 4)])
    gram = (q * values[:, None]) @ q.mT
    wanted = (q * (values + DAMPING * values.mean(1, True)).rsqrt()[:, None]) @ q.mT
    for scale in (1e-6, 1.0, 1e6):
        found = inverse_root((gram * scale).float()).double() * math.sqrt(scale)
        assert (found - wanted).norm() < ROOT * wanted.norm()
    assert inverse_root(torch.zeros(1, 4, 4)).isfinite().all()


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 7), (16, 16)])
def test_orthogonal_matrices_have_equal_singular_values(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(1e-3 * torch.randn(2, *shape))[:, :, :])
    some = values if shape != (16, 16) else values[:, :12]  # the smallest take more iterations
    assert SINGULAR[0] < some.min()
    assert values.max() < SINGULAR[1]
    assert not orthogonal(torch.zeros(1, 3, 4)).any()


# ------------------------------------------------------------------------- an ordinary optimizer
def test_for_a_plain_model_it_is_muon():
    one = Net()
    other = copy.deepcopy(one)
    take(one, HyperMuon(one, LR, 0.3), 3)
    take(other, Muon(param_groups(other, 0.3), LR, nesterov=True), 3)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_what_generates_nothing_is_trained_by_muon():
    hyper = small(exclude="a")
    other = copy.deepcopy(hyper)
    take(hyper, HyperMuon(hyper, LR, 0.3))
    take(other, Muon(param_groups(other, 0.3), LR, nesterov=True))
    same = [torch.equal(a, b) for a, b in zip(hyper.parameters(), other.parameters(), strict=True)]
    of = {name: equal for (name, _), equal in zip(hyper.named_parameters(), same, strict=True)}
    assert all(of[name] for name in ("a.weight", "a.bias", "b.bias", "head.weight", "head.bias"))
    assert not of["b.weight"]
    assert not of["b.hypernet.heads.3x3.weight"]


MODELS = {
    "resnet": (lambda: timm.create_model("test_resnet"), (8, 3, 32, 32), {}),
    "vit": (
        lambda: timm.create_model("test_vit", img_size=64),
        (8, 3, 64, 64),
        {"targets": "linear"},
    ),
    "convolutions": (Convolutions, (8, 3, 16, 16), {"targets": ("conv2d", "linear")}),
    "used twice": (UsedTwice, (8, 3, 8, 8), {}),
    "crnn": (CRNN, (8, 1, 8, 16), {}),
    "dynamic": (CRNN, (8, 1, 8, 16), {"lstm": "dynamic"}),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", [{}, {"hidden_dim": 8}, {"embeddings": "channel"}])
def test_every_parameter_of_a_model_is_trained(model, form):
    torch.manual_seed(0)
    make, shape, options = MODELS[model]
    hyper = hyperize(make(), compression=3, seed=0, **options, **form).train()
    optimizer = HyperMuon(hyper, 1e-2)
    x, losses = torch.randn(shape), []
    before = [p.clone() for p in hyper.parameters()]
    for _ in range(8):
        out = hyper(x).reshape(8, -1)[:, :5]
        losses.append(F.cross_entropy(out, torch.arange(8) % 5))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for (name, param), old in zip(hyper.named_parameters(), before, strict=True):
        assert param.isfinite().all(), name
        assert not torch.equal(param, old), name


def test_what_is_frozen_stays():
    hyper = small()
    hyper.b.requires_grad_(False)  # with the generator, which makes its weight
    optimizer = HyperMuon(hyper, LR)
    before = copy.deepcopy(hyper)
    take(hyper, optimizer)
    assert torch.equal(hyper.b.weight, before.b.weight)
    assert not torch.equal(hyper.a.weight, before.a.weight)


def test_what_the_loss_does_not_reach_stays():
    hyper = small()
    optimizer = HyperMuon(hyper, LR, 0.0)
    before = copy.deepcopy(hyper)
    hyper.a(torch.randn(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(hyper.b.embedding("weight"), before.b.embedding("weight"))
    assert not torch.equal(hyper.a.embedding("weight"), before.a.embedding("weight"))


def test_a_state_dict_goes_on_to_the_same_bits():
    hyper = small()
    optimizer = HyperMuon(hyper, LR)
    take(hyper, optimizer, 3)
    file = io.BytesIO()
    torch.save((hyper.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    model_state, state = torch.load(file, weights_only=True)
    again = small()
    again.load_state_dict(model_state)
    other = HyperMuon(again, 1.0)
    other.load_state_dict(state)
    for model, of in ((hyper, optimizer), (again, other)):
        take(model, of, 2, seed=1)
    assert all(map(torch.equal, hyper.parameters(), again.parameters()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_trains_its_own_model(copied):
    hyper = small()
    optimizer = HyperMuon(hyper, LR)
    take(hyper, optimizer)
    again, other = copied((hyper, optimizer))
    take(hyper, optimizer, seed=1)
    take(again, other, seed=1)
    assert all(map(torch.equal, hyper.parameters(), again.parameters()))
    assert not any(map(lambda a, b: a is b, hyper.parameters(), again.parameters()))


def test_schedules_hooks_and_closures():
    hyper = small()
    optimizer = HyperMuon(hyper, LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=10, cycle_momentum=False
    )
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    x = torch.randn(8, 3, 8, 8)

    def closure():
        optimizer.zero_grad()
        loss = hyper(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    assert calls == ["before", "after"]
    assert optimizer.step(closure) < first
    gradients = [p.grad for p in hyper.parameters()]
    assert all(g is not None for g in gradients)
    before = weights(hyper)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(w, before[name]) for name, w in dense_state_dict(hyper).items())


def test_autocast_makes_no_difference():
    """A learning rate's worth of bfloat16 is not what an inverse root can be made of."""
    one = small()
    other = copy.deepcopy(one)
    for model, enabled in ((one, False), (other, True)):
        optimizer = HyperMuon(model, LR)
        model(torch.ones(2, 3, 8, 8)).square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
    names = [name for name, _ in one.named_parameters() if "head.weight" not in name]
    for name in names:
        assert torch.equal(one.get_parameter(name), other.get_parameter(name)), name


class OneDevice(TorchDispatchMode):
    """Refuses operations between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        assert {t.device.type for t in leaves if isinstance(t, torch.Tensor)} <= {"meta"}, func
        return out


@pytest.mark.parametrize("options", [*FORMS.values(), {"conditions": 2}, {"condition_dim": 2}])
def test_a_step_of_the_generator_stays_on_its_device(options):
    """A CUDA graph takes no copies from the host, and no values to it."""
    hyper = small(**options).to("meta")
    optimizer = HyperMuon(hyper, LR)
    for param in hyper.parameters():
        param.grad = torch.empty_like(param)
    optimizer.step()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad(), OneDevice():
        (net,) = optimizer.nets
        assert optimizer._change(*net, groups)


def test_layers_that_are_dense_again_are_left_alone():
    hyper = small()
    optimizer = HyperMuon(hyper, LR)
    assert to_dense(hyper, include="b", inplace=True) is hyper
    before = hyper.b.weight.clone()
    take(hyper, optimizer)
    assert torch.equal(hyper.b.weight, before)


# ------------------------------------------------------------------------------- several networks
def test_a_step_of_one_network_leaves_the_embeddings_of_the_others():
    """Muon would make whole steps of what is left of their momentum."""
    hyper = small(conditions=3)
    optimizer = HyperMuon(hyper, LR)
    take(hyper, optimizer, 2, k=0)
    tables = [layer.embedding("weight") for layer in generated_layers(hyper).values()]
    before = [table.clone() for table in tables]
    momentum = [optimizer.state[table]["momentum_buffer"] for table in tables]
    momentum_before = [buffer.clone() for buffer in momentum]
    take(hyper, optimizer, 2, k=1)
    for buffer, old in zip(momentum, momentum_before, strict=True):
        assert torch.equal(buffer[0], old[0])
        assert not torch.equal(buffer[1], old[1])
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[0], old[0])
        assert torch.equal(table[2], old[2])
        assert not torch.equal(table[1], old[1])


def test_the_network_that_is_trained_moves_as_one_alone_would():
    several, one = small(conditions=2, share=True), small(conditions=2, share=True)
    sizes = []
    for hyper in (several, one):
        layers = generated_layers(hyper)
        only(hyper, *(layer.embedding("weight") for layer in layers.values()))
        with condition(hyper, 1):
            before = hyper.b.weight.clone()
        take(hyper, HyperMuon(hyper, LR, 0.0), k=1)
        with condition(hyper, 1):
            sizes.append((hyper.b.weight - before).square().mean().sqrt() / LR)
    assert sizes[0] == sizes[1]
    assert 0.3 * RMS < sizes[0] < 1.3 * RMS


def test_networks_of_a_vector_are_trained():
    hyper = small(condition_dim=2)
    before = [p.clone() for p in hyper.parameters()]
    take(hyper, HyperMuon(hyper, LR), 2, k=torch.tensor([0.5, -1.0]))
    assert not any(map(torch.equal, before, hyper.parameters()))


# --------------------------------------------------------------------------------------- refusals
def test_a_family_that_cannot_tell_is_trained_by_muon(monkeypatch):
    hyper = small()
    other = copy.deepcopy(hyper)
    monkeypatch.setattr(OneLayer, "metrics", lambda self, net, sites: None)
    assert isinstance(hyper.hypernet.family, OneLayer)
    take(hyper, HyperMuon(hyper, LR, 0.0))
    take(other, Muon(other.parameters(), LR, nesterov=True))
    assert all(map(torch.equal, hyper.parameters(), other.parameters()))


def test_a_matrix_without_a_metric_is_trained_by_muon(monkeypatch):
    hyper = small("two layers")
    told = FAMILIES["two layers"].metrics

    def metrics(net, sites):
        own, shared = told(net, sites)
        return own, {path: of for path, of in shared.items() if path != "trunk.weight"}

    monkeypatch.setattr(hyper.hypernet.family, "metrics", metrics)
    before = hyper.hypernet.trunk.weight.clone()
    take(hyper, HyperMuon(hyper, LR))
    assert not torch.equal(hyper.hypernet.trunk.weight, before)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ModelError, match="has no trainable parameters"):
        HyperMuon(small().requires_grad_(False))
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got list"):
        HyperMuon(list(small().parameters()))
    with pytest.raises(ConfigError, match="weight_decay must be"):
        HyperMuon(small(), LR, -1)
    with pytest.raises(ValueError, match="learning rate"):
        HyperMuon(small(), -1.0)
