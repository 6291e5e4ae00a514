"""Weights generated together: in a call of the model, as on an accelerator, and in a block."""

import contextlib
import copy
import pickle
import threading

import pytest
import timm
import torch
from models import CRNN, Cells, Convolutions, Transposed, Untraceable, UsedTwice, accelerate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hyperize import ModelError, cached, fit_, generated_l2, hyperize, to_dense
from hyperize.caching import _open
from hyperize.hypernet import HyperNet
from hyperize.parts import generated_layers

ROUNDING = 1e-5
"""Of float32 products of other sizes, after some layers, against the largest value."""
HALF = 5e-2
"""Of outputs in half precision after a few layers, each of which rounds to 8 bits: by how much
weights of operands rounded to bfloat16 change them."""


def _vit():
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=7)


def _resnet():
    return timm.create_model("resnet18", num_classes=7)


MODELS = {
    "convolutions": (Convolutions, (2, 3, 16, 16), {}),
    "convolutions, channels": (Convolutions, (2, 3, 16, 16), {"embeddings": "channel"}),
    "convolutions, separable": (Convolutions, (2, 3, 16, 16), {"embeddings": "separable"}),
    "convolutions, two layers": (Convolutions, (2, 3, 16, 16), {"hidden_dim": 8}),
    "convolutions, paper's tiles": (
        Convolutions,
        (2, 3, 16, 16),
        {"tile": (16, 16), "embedding_dim": 8, "hidden_dim": 8, "compression": None},
    ),
    "convolutions, turned": (Convolutions, (2, 3, 16, 16), {"trunk_axis": 1}),
    "crnn": (CRNN, (2, 1, 8, 16), {}),
    "used twice": (UsedTwice, (2, 3, 8, 8), {}),
    "transposed": (Transposed, (2, 2, 8, 8), {"targets": ("conv2d", "conv_transpose2d")}),
    "cells": (Cells, (2, 5, 24), {"targets": ("rnn_cell", "gru_cell", "lstm_cell")}),
    "resnet": (_resnet, (2, 3, 32, 32), {}),
    "vit": (_vit, (2, 3, 32, 32), {"targets": ("conv2d", "linear")}),
    "vit, factors": (_vit, (2, 3, 32, 32), {"targets": "linear", "factorized": True}),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, shape, options = MODELS[request.param]
    torch.manual_seed(0)
    options = {"compression": 3, "seed": 0} | options
    return hyperize(make(), **options), torch.randn(shape)


@pytest.fixture
def accelerated(monkeypatch):
    """As if the CPU were an accelerator, on which a call makes its weights together."""
    accelerate(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def _nothing_stays_open():
    yield
    assert not _open.caches


@pytest.fixture
def made(monkeypatch):
    """The numbers of weights that were made together, in order; 1 where one was made alone."""
    numbers = []
    together, alone = HyperNet.together, HyperNet._generate

    def many(self, embeddings, *args):
        numbers.append(len(embeddings))
        return together(self, embeddings, *args)

    def one(self, *args):
        numbers.append(1)
        return alone(self, *args)

    monkeypatch.setattr(HyperNet, "together", many)
    monkeypatch.setattr(HyperNet, "_generate", one)
    return numbers


def close(a, b, tolerance=ROUNDING):
    scale = float(b.detach().abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-30))


def gradients(model, output):
    model.zero_grad()
    output.float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same_gradients(got, wanted, tolerance=ROUNDING):
    largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for name, gradient in wanted.items():
        assert (got[name] is None) == (gradient is None), name
        if gradient is not None:
            # Some are a sum that is zero but for rounding, as those of biases before a norm
            atol = tolerance * max(float(gradient.abs().max()), 1e-2 * largest)
            assert torch.allclose(got[name], gradient, rtol=0, atol=atol), name


# --------------------------------------------------------------------------------- the same results


def test_a_block_gives_the_same_outputs_and_gradients(case):
    hyper, x = case
    hyper.eval()
    output = hyper(x)
    wanted = gradients(hyper, output)
    with cached(hyper):
        got = hyper(x)
        assert close(got, output)
    same_gradients(gradients(hyper, got), wanted)


def test_a_call_on_an_accelerator_gives_the_same_outputs_and_gradients(case, accelerated, made):
    hyper, x = case
    hyper.eval()
    alone = hyper.forward(x)  # without the hooks
    assert set(made) <= {1, 2, 4, 8}  # a recurrent layer makes its own together
    wanted = gradients(hyper, alone)
    made.clear()
    output = hyper(x)
    assert close(output, alone)
    assert len(made) < len(generated_layers(hyper)) or len(made) <= 3
    same_gradients(gradients(hyper, output), wanted)


def test_the_dense_model_has_the_same_outputs_bit_for_bit(case, accelerated):
    hyper, x = case
    hyper.eval()
    if hyper.hypernet.factorized:
        pytest.skip("layers that compute with factors are equal but for rounding")
    dense = to_dense(hyper)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            assert torch.equal(dense(x), hyper(x))
    assert not dense._forward_pre_hooks
    assert not dense._forward_hooks
    assert not dense._forward_hooks_always_called


def test_a_root_that_is_itself_a_layer(accelerated):
    hyper = hyperize(nn.Conv2d(16, 32, 3), compression=3)
    dense = to_dense(hyper)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(hyper(x), dense(x))
    assert not dense._forward_pre_hooks
    assert not dense._forward_hooks


def test_a_dense_model_of_a_block_has_the_outputs_of_the_block(case):
    hyper, x = case
    hyper.eval()
    if hyper.hypernet.factorized:
        pytest.skip("layers that compute with factors are equal but for rounding")
    with cached(hyper):
        assert torch.equal(to_dense(hyper)(x), hyper(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_outputs_are_those_but_for_rounding(case, accelerated, dtype):
    hyper, x = case
    hyper.eval()
    with torch.autocast("cpu", dtype):
        alone = hyper.forward(x)
        output = hyper(x)
    assert output.dtype == alone.dtype
    assert close(output, alone, HALF)
    got, wanted = gradients(hyper, output), gradients(hyper, alone)
    assert all(g.dtype == torch.float32 for g in got.values() if g is not None)
    assert {n for n, g in got.items() if g is None} == {n for n, g in wanted.items() if g is None}


def test_under_autocast_weights_are_made_in_its_dtype(accelerated):
    hyper = hyperize(Convolutions(), compression=3)
    seen = {}
    for path, layer in generated_layers(hyper).items():
        layer._forward = _noting(layer, seen, path)
    with torch.autocast("cpu", torch.bfloat16), cached(hyper):
        hyper(torch.randn(2, 3, 16, 16))
        assert hyper.stem.weight.dtype == torch.float32  # whoever reads it from outside
    assert set(seen.values()) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        hyper(torch.randn(2, 3, 16, 16))
    assert set(seen.values()) == {torch.float32}


def _noting(layer, seen, path):
    generate, forward = layer.generate, type(layer)._forward.__get__(layer)

    def noted(name):
        weight = generate(name)
        seen[path] = weight.dtype
        return weight

    def run(*args):
        layer.__dict__["generate"] = noted
        try:
            return forward(*args)
        finally:
            del layer.__dict__["generate"]

    return run


def test_autocast_keeps_no_cast_of_a_weight():
    """It keeps those of leaves that require a gradient, for as long as its region lasts."""
    hyper = hyperize(Convolutions(), compression=3)
    with torch.no_grad():
        assert hyper.stem.generate("weight").requires_grad  # as the dense parameter does
        with torch.autocast("cpu", torch.bfloat16):
            assert not hyper.stem.generate("weight").requires_grad


def test_sums_of_gradients_over_many_tiles_do_not_overflow_in_float16(accelerated):
    hyper = hyperize(nn.Sequential(nn.Linear(512, 512)), targets="linear", compression=20)
    params = list(hyper.hypernet.parameters())
    found = []
    for run, autocasts in ((hyper.forward, False), (hyper, True)):
        with torch.autocast("cpu", torch.float16, enabled=autocasts):
            y = run(torch.ones(1, 512))
        found.append(torch.autograd.grad(30_000 * y.float().sum(), params))  # float16 can hold it
    assert float(found[0][1].abs().max()) > 65_504  # and cannot hold this, of the head's bias
    assert all(close(got, wanted, 1e-2) for wanted, got in zip(*found, strict=True))


def test_a_region_without_autocast_gets_weights_in_float32(accelerated):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)

        def forward(self, x):
            x = self.a(x)
            with torch.autocast("cpu", enabled=False):
                return self.b(x.float())

    hyper = hyperize(Model(), compression=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert hyper(torch.randn(1, 3, 8, 8)).dtype == torch.float32


def test_convolutions_of_channels_last_get_their_weights_so(accelerated):
    hyper = hyperize(Convolutions(), compression=3).eval()
    x = torch.randn(2, 3, 16, 16)
    last = x.contiguous(memory_format=torch.channels_last)
    formats = []
    original = torch.nn.functional.conv2d

    def conv2d(x, weight, *args):
        formats.append((x, weight))
        return original(x, weight, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", conv2d)
        y = hyper(last)
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for _, weight in formats)
        formats.clear()
        wanted = hyper(x)
        assert all(weight.is_contiguous() for _, weight in formats)
    assert close(y, wanted)
    same_gradients(gradients(hyper, hyper(last)), gradients(hyper, hyper(x)))


def test_derivatives_of_any_order(accelerated):
    hyper = hyperize(UsedTwice(8), compression=2).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.double)
    params = list(hyper.parameters())

    def penalty(run):
        first = torch.autograd.grad(run(x).sin().sum(), params, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), params)

    for got, wanted in zip(penalty(hyper), penalty(hyper.forward), strict=True):
        assert torch.allclose(got, wanted)


# -------------------------------------------------------------- what a kept weight must not outlive


def test_a_kept_weight_is_made_once_in_a_block(case, made):
    hyper, x = case
    hyper.eval()
    if hyper.hypernet.factorized:
        pytest.skip("layers compute with factors, which are not kept")
    with cached(hyper), torch.no_grad():
        hyper(x)
        first = len(made)
        for _ in range(3):
            hyper(x)
    assert len(made) == first


@pytest.mark.parametrize("block", [False, True], ids=["calls", "block"])
def test_a_step_of_an_optimizer_is_seen(block, accelerated):
    hyper = hyperize(Convolutions(), compression=3)
    optimizer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    x = torch.randn(2, 3, 16, 16)
    with cached(hyper) if block else contextlib.nullcontext():
        for _ in range(3):
            optimizer.zero_grad()
            hyper(x).square().mean().backward()
            optimizer.step()
            assert torch.equal(hyper(x), to_dense(hyper)(x))
    assert close(hyper(x), hyper.forward(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda hyper, other: hyper.load_state_dict(other.state_dict()),
        lambda hyper, other: hyper.load_state_dict(other.state_dict(), assign=True),
        lambda hyper, other: [p.requires_grad_(False) for p in hyper.hypernet.parameters()],
        lambda hyper, other: [p.requires_grad_(False) for p in hyper.parameters()],
        lambda hyper, other: hyper.double(),
    ],
    ids=["loaded", "assigned", "generator frozen", "all frozen", "double"],
)
def test_a_change_of_parameters_in_a_block_is_seen(change):
    hyper, other = (hyperize(UsedTwice(), compression=2, seed=seed) for seed in (0, 1))
    x = torch.randn(2, 3, 8, 8)
    with cached(hyper):
        hyper(x)
        change(hyper, other)
        x = x.to(hyper.hypernet.heads["3x3"].weight.dtype)
        inside = hyper(x)
    outside = hyper(x)
    assert close(inside, outside)
    assert inside.requires_grad == outside.requires_grad


def test_a_change_of_one_embedding_in_a_block_is_seen():
    hyper = hyperize(UsedTwice(), compression=2)
    x = torch.randn(2, 3, 8, 8)
    with cached(hyper), torch.no_grad():
        before = hyper(x)
        hyper.last.weight_embedding.mul_(2)
        assert not close(hyper(x), before)
        before = hyper(x)
        hyper.last.weight_constants.mul_(2)
        assert not close(hyper(x), before)
        assert close(hyper(x), hyper.forward(x))
    with torch.no_grad():
        assert close(hyper(x), hyper.forward(x))


def test_weights_are_kept_for_each_mode():
    hyper = hyperize(UsedTwice(), compression=2)
    x = torch.randn(2, 3, 8, 8)
    with cached(hyper):
        with torch.no_grad():
            assert not hyper(x).requires_grad
        with torch.inference_mode():
            assert hyper(x).is_inference()
        assert all(g is not None for g in gradients(hyper, hyper(x)).values())
        assert hyper.stem.weight.requires_grad


def test_a_second_backward_through_one_graph_is_refused_as_by_torch():
    hyper = hyperize(UsedTwice(), compression=2)
    x = torch.randn(2, 3, 8, 8)
    with cached(hyper):
        hyper(x).sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            hyper(x).sum().backward()
    with cached(hyper):  # several calls, one backward pass
        (hyper(x).sum() + hyper(2 * x).sum()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block", [False, True], ids=["calls", "block"])
def test_checkpointed_regions_repeat_what_they_did(reentrant, block, accelerated):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, padding=1)
            self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1))
            self.tail = nn.Conv2d(32, 32, 3)
            self.checkpoints = False

        def forward(self, x):
            x = self.stem(x)
            if self.checkpoints:
                x = checkpoint(self.body, x, use_reentrant=reentrant)
            else:
                x = self.body(x)
            return self.tail(x)

    hyper = hyperize(Model(), compression=3)
    x = torch.randn(2, 3, 8, 8)
    wanted = gradients(hyper, hyper(x))
    hyper.checkpoints = True
    with cached(hyper) if block else contextlib.nullcontext():
        output = hyper(x)
        if block:  # the backward pass, too
            same_gradients(gradients(hyper, output), wanted)
    if not block:
        same_gradients(gradients(hyper, output), wanted)
        # The whole model in a region, which is run again with its hooks
        output = checkpoint(hyper, x, use_reentrant=reentrant) if not reentrant else hyper(x)
        same_gradients(gradients(hyper, output), wanted)


def test_recomputed_weights_are_not_kept(accelerated, made):
    hyper = hyperize(Convolutions(), compression=3, recompute=True)
    hyper(torch.randn(2, 3, 16, 16)).sum().backward()
    with torch.no_grad():
        hyper(torch.randn(2, 3, 16, 16))
    assert set(made) == {1}


def test_layers_that_are_skipped_have_no_gradient(accelerated):
    class Drops(nn.Module):
        """Stochastic depth that leaves out whole layers."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 32, 3, padding=1) for i in (3, 32, 32))
            self.skips = True

        def forward(self, x):
            x = self.a(x)
            return self.c(x if self.skips else self.b(x))

    hyper = hyperize(Drops(), compression=3)
    got = gradients(hyper, hyper(torch.randn(2, 3, 8, 8)))
    assert {name for name, g in got.items() if g is None} == {"b.weight", "b.bias"}
    hyper.skips = False
    assert all(g is not None for g in gradients(hyper, hyper(torch.randn(2, 3, 8, 8))).values())


def test_the_penalty_counts_what_was_reached(accelerated):
    hyper = hyperize(Untraceable(), compression=3)
    x = torch.randn(2, 3, 8, 8)
    reached = []
    for path, layer in generated_layers(hyper).items():
        layer.register_forward_hook(lambda *_, path=path: reached.append(path))
    with generated_l2(hyper) as l2:
        hyper(x)
    wanted = sum(hyper.get_submodule(path).weight.square().sum() for path in set(reached))
    assert 0 < len(set(reached)) < 4
    torch.testing.assert_close(l2(), wanted, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"embeddings": "channel"},
        {"embeddings": "channel", "trunk_axis": 1},
        {"embeddings": "separable"},
        {"embeddings": "separable", "trunk_axis": 1},
        {"hidden_dim": 8},
        {"trunk_axis": 1},
        {"tile": (16, 16), "embedding_dim": 8, "hidden_dim": 8, "compression": None},
        {"tile": (4, 16), "embedding_dim": 8, "hidden_dim": 8, "compression": None},
        {"tile": (1, 50), "embedding_dim": 8, "compression": None},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "default",
)
@pytest.mark.parametrize("width", [20, 32])
def test_the_penalty_of_every_family_and_padding(options, width):
    hyper = hyperize(Convolutions(width), **{"compression": 2, "seed": 0} | options).double()
    layers = generated_layers(hyper).values()
    if options.get("tile") == (1, 50):
        assert any(layer.grids["weight"].padding for layer in layers)
    with generated_l2(hyper) as l2:
        hyper(torch.randn(1, 3, 16, 16, dtype=torch.double))
    value = l2()
    wanted = sum(layer.generate("weight").square().sum() for layer in layers)
    assert torch.allclose(value, wanted, rtol=1e-10)
    params = [p for name, p in hyper.named_parameters() if "hypernet" in name]
    params += [layer.weight_embedding for layer in layers]
    for _ in range(2):  # also the second time
        got = torch.autograd.grad(value, params, retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(wanted, params, retain_graph=True), strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("embeddings", ["tile", "channel", "separable"])
def test_a_second_backward_pass_reaches_what_it_reaches(embeddings, accelerated):
    hyper = hyperize(Convolutions(), compression=2, embeddings=embeddings)
    layers = list(generated_layers(hyper).values())
    with cached(hyper):
        weights = [layer.generate("weight") for layer in layers]
    for reached in (0, 2, 0):
        hyper.zero_grad()
        weights[reached].sum().backward(retain_graph=True)
        got = [at for at, m in enumerate(layers) if m.weight_embedding.grad is not None]
        assert got == [reached]


def test_hooks_on_parameters_run_once(accelerated):
    hyper = hyperize(UsedTwice(), compression=2)
    calls = []
    for name, param in hyper.named_parameters():
        param.register_hook(lambda g, name=name: calls.append(name))
    hyper(torch.randn(2, 3, 8, 8)).sum().backward()
    assert sorted(calls) == sorted(name for name, _ in hyper.named_parameters())


def test_hooks_may_scale_a_gradient(accelerated):
    hyper = hyperize(UsedTwice(), compression=2)
    x = torch.randn(2, 3, 8, 8)
    wanted = gradients(hyper, hyper(x))
    for param in hyper.parameters():
        param.register_hook(lambda g: 2 * g)
    got = gradients(hyper, hyper(x))
    same_gradients(got, {name: 2 * g for name, g in wanted.items()})


@pytest.mark.parametrize("embeddings", ["tile", "channel", "separable"])
def test_gradients_are_accumulated_and_changed_in_place(embeddings, accelerated):
    hyper = hyperize(Convolutions(), compression=3, embeddings=embeddings)
    x = torch.randn(2, 3, 16, 16)
    once = {name: g.clone() for name, g in gradients(hyper, hyper(x)).items()}
    hyper(x).square().mean().backward()
    params = list(hyper.parameters())
    same_gradients(
        {n: p.grad for n, p in hyper.named_parameters()}, {n: 2 * g for n, g in once.items()}
    )
    for param in params:
        param.grad.mul_(0.5)
        param.grad += 0
    same_gradients({n: p.grad for n, p in hyper.named_parameters()}, once)
    nn.utils.clip_grad_norm_(params, 1e-3)
    total = sum(float(p.grad.square().sum()) for p in params) ** 0.5
    assert total == pytest.approx(1e-3, rel=1e-3)
    hyper.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params)


def test_frozen_parts_get_no_gradient(accelerated):
    hyper = hyperize(_resnet(), compression=3)
    x = torch.randn(2, 3, 32, 32)
    for param in hyper.hypernet.parameters():
        param.requires_grad_(False)
    hyper.layer1[0].conv1.weight_embedding.requires_grad_(False)
    got = gradients(hyper, hyper(x))
    frozen = {name for name, p in hyper.named_parameters() if not p.requires_grad}
    assert {name for name, g in got.items() if g is None} == frozen
    assert not hyper.layer1[0].conv1.weight.requires_grad
    assert hyper.layer1[0].conv2.weight.requires_grad
    with cached(hyper):  # of which one product makes the weights that train, and one the others
        hyper(x)
        assert not hyper.layer1[0].conv1.weight.requires_grad
        assert hyper.layer1[0].conv2.weight.requires_grad


# ------------------------------------------------------------------------------- threads, accidents


def test_threads_have_their_own(accelerated):
    hyper = hyperize(Convolutions(), compression=3).eval()
    inputs = [torch.randn(2, 3, 16, 16) for _ in range(8)]
    wanted = [hyper(x) for x in inputs]
    got = [None] * len(inputs)

    def run(at):
        with torch.no_grad() if at % 2 else torch.enable_grad():
            got[at] = hyper(inputs[at])

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_another_thread_does_not_read_a_blocks_weights(made):
    hyper = hyperize(UsedTwice(), compression=2)
    x = torch.randn(2, 3, 8, 8)
    with cached(hyper):
        hyper(x)
        made.clear()
        thread = threading.Thread(target=hyper, args=(x,))
        thread.start()
        thread.join()
    assert set(made) == {1}


class _Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3)
        self.error = error

    def forward(self, x):
        x = self.a(x)
        if self.error is not None:
            raise self.error
        return self.b(x)


def test_a_call_that_fails_leaves_nothing(accelerated):
    hyper = hyperize(_Fails(ValueError("on purpose")), compression=2)
    with pytest.raises(ValueError, match="on purpose"):
        hyper(torch.randn(1, 3, 8, 8))
    assert not _open.caches


class Interrupt(BaseException):
    """Like KeyboardInterrupt, which pytest takes for its own."""


def test_a_call_that_was_interrupted_serves_nobody(accelerated):
    hyper = hyperize(_Fails(None), compression=2)
    hyper.error = Interrupt()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(Interrupt):
        hyper(x)
    assert len(_open.caches) == 1  # torch runs no hooks then
    hyper.hypernet.heads["3x3"].weight.data.mul_(2)  # which no version tells of
    assert close(hyper.a(x), nn.functional.conv2d(x, hyper.a.weight, hyper.a.bias, padding=1))
    assert torch.equal(hyper.a.weight, copy.deepcopy(hyper).a.weight)
    hyper.error = None
    assert close(hyper(x), hyper.forward(x))
    assert not _open.caches


def test_parts_alone_and_copies_work(accelerated):
    hyper = hyperize(_resnet(), compression=3).eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = hyper(x)
    assert torch.equal(copy.deepcopy(hyper)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(hyper))(x), wanted)
    assert close(hyper.forward_head(hyper.forward_features(x)), wanted)
    assert close(nn.Sequential(*hyper.children())(x), wanted)
    with cached(hyper):
        assert close(hyper.forward_head(hyper.forward_features(x)), wanted)


def test_a_replaced_layer_is_left_alone(accelerated):
    hyper = hyperize(UsedTwice(), compression=2)
    x = torch.randn(2, 3, 8, 8)
    with cached(hyper):
        hyper(x)
        hyper.last = nn.Conv2d(32, 32, 3, padding=1)
        hyper.stem = copy.deepcopy(hyper.stem)
        assert close(hyper(x), hyper.forward(x))
    assert close(hyper(x), hyper.forward(x))


def test_swapped_parameters_are_used(accelerated):
    hyper = hyperize(Convolutions(), compression=2)
    other = hyperize(Convolutions(), compression=2, seed=3)
    x = torch.randn(2, 3, 16, 16)
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    with cached(hyper):
        hyper(x)
        assert close(torch.func.functional_call(hyper, state, (x,)), other(x))

    def loss(params):
        return torch.func.functional_call(hyper, params, (x,)).square().mean()

    params = dict(hyper.named_parameters())
    got = torch.func.grad(loss)(params)
    same_gradients(got, gradients(hyper, hyper(x)))


def test_only_what_is_hyperized_has_weights_to_keep():
    with pytest.raises(ModelError, match="not hyperized"), cached(UsedTwice()):
        pass


def test_fits_and_compiled_models(accelerated):
    hyper = hyperize(UsedTwice(), compression=2)
    x = torch.randn(2, 3, 8, 8)
    fit_(hyper, UsedTwice())
    compiled = torch.compile(hyper, backend="aot_eager", fullgraph=True)
    assert close(compiled(x), hyper(x))
    with cached(hyper):
        assert close(compiled(x), hyper(x))


# --------------------------------------------------------------------------------- recurrent layers


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_weights_lie_in_one_buffer_as_cudnn_wants_it(kind, bias, accelerated):
    layer = kind(12, 20, num_layers=2, bidirectional=True, bias=bias)
    targets = kind.__name__.lower()
    hyper = hyperize(nn.Sequential(layer), targets=targets, compression=2)
    flat = hyper[0]._flat_weights
    names = hyper[0]._flat_weights_names
    assert [tuple(w.shape) for w in flat] == [tuple(w.shape) for w in layer._flat_weights]
    # cuDNN's order: all weights, then all biases, one behind the other from the storage's start
    order = sorted(range(len(flat)), key=lambda at: names[at].startswith("bias"))
    offset = 0
    for at in order:
        assert flat[at].untyped_storage().data_ptr() == flat[0].untyped_storage().data_ptr()
        assert flat[at].storage_offset() == offset
        assert flat[at].is_contiguous()
        offset += flat[at].numel()
    rows = 0 if bias else sum(w.shape[0] for w in flat)  # cuDNN has room for biases in any case
    assert flat[0].untyped_storage().nbytes() == 4 * (offset + rows)
    for at, name in enumerate(names):
        assert torch.allclose(flat[at], getattr(hyper[0], name))


def test_a_block_keeps_the_buffer(accelerated, made):
    hyper = hyperize(nn.Sequential(nn.LSTM(12, 20)), targets="lstm", compression=2)
    x = torch.randn(5, 2, 12)
    with cached(hyper), torch.no_grad():
        pointers = {hyper[0]._flat_weights[0].data_ptr() for _ in range(3)}
        hyper[0](x)
    assert len(pointers) == 1
    assert made == [2]


def test_a_changed_bias_is_seen_in_a_block(accelerated):
    hyper = hyperize(nn.Sequential(nn.LSTM(12, 20)), targets="lstm", compression=2)
    x = torch.randn(5, 2, 12)
    with cached(hyper), torch.no_grad():
        before = hyper[0](x)[0]
        hyper[0].bias_ih_l0.add_(1)
        after = hyper[0](x)[0]
    assert not close(after, before)
    assert close(after, hyper[0](x)[0])


# ----------------------------------------------------------------------------------------- launches

_VIEWS = {
    *("view", "t", "transpose", "permute", "slice", "select", "expand", "detach", "unsqueeze"),
    *("squeeze", "alias", "as_strided", "split", "_unsafe_view", "reshape", "_reshape_alias"),
    "unbind",
}


class _Count(TorchDispatchMode):
    """Counts operations that an accelerator would have to launch."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        self.number += name not in _VIEWS and not name.startswith("split")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "size", "options", "most"),
    [
        ("resnet50", 64, {}, 0.6),
        ("resnet18", 64, {}, 1.6),  # the same operations for fewer weights
        ("convnext_tiny", 64, {"targets": ("conv2d", "linear")}, 1.5),
        ("vit_small_patch16_224", 224, {"targets": ("conv2d", "linear")}, 0.7),
        ("mobilenetv3_large_100", 64, {}, 1.5),
        ("resnet34", 64, {"compression": 8}, 3),  # separable weights
    ],
)
def test_operations_beyond_the_dense_models(name, size, options, most):
    """For each weight, forward and backward, on the meta device; one by one it takes 10.9."""
    with torch.device("meta"):
        model = timm.create_model(name)
        x = torch.randn(2, 3, size, size)
    hyper = hyperize(model, **options)
    numbers = []
    for each in (model, hyper):
        with _Count() as count:
            each(x).sum().backward()
        numbers.append(count.number)
    assert 0 < numbers[1] - numbers[0] <= most * len(hyper.hypernet.plan.sites)
