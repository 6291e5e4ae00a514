"""Weights that are generated again for the backward pass: the same gradients, and nothing kept."""

import copy
import gc
from collections import Counter

import pytest
import timm
import torch
from models import CRNN, Convolutions, UsedTwice, randomise
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hyperize import ConfigError, HyperConfig, generated_l2, hyperize, load, save
from hyperize.parts import find_groups


def vision(name):
    return lambda: randomise(timm.create_model(name), 0)


def lstm():
    return nn.LSTM(24, 32, num_layers=2, dropout=0.5, bidirectional=True)


CASES = {
    "resnet18": (vision("resnet18"), (2, 3, 64, 64), {}),
    "convnext": (vision("test_convnext"), (2, 3, 160, 160), {"targets": ("conv2d", "linear")}),
    "vit": (vision("test_vit"), (2, 3, 160, 160), {"targets": ("conv2d", "linear")}),
    "convolutions": (lambda: randomise(Convolutions(), 0), (2, 3, 20, 20), {"compression": 3}),
    "used twice": (UsedTwice, (2, 3, 8, 8), {"compression": 2}),
    "crnn": (CRNN, (2, 1, 16, 32), {"compression": 3}),
    "lstm with dropout": (lstm, (5, 3, 24), {"compression": 3}),
    "gru": (lambda: nn.GRU(24, 32, 2), (5, 3, 24), {"targets": "gru", "compression": 3}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64),
        (5, 2, 32),
        {"targets": ("attention", "linear"), "compression": 2},
    ),
}


def case(name, **options):
    make, shape, given = CASES[name]
    torch.manual_seed(0)
    # test_vit and test_convnext are too small for ten times
    options = {"seed": 0, "compression": 2 if "targets" in given else 10} | given | options
    return hyperize(make(), **options).train(), torch.randn(shape)


def generator(model):
    return find_groups(model)[0].hypernet


def step(model, x, amp=False):
    """The outputs, and the gradients of all parameters."""
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    y.float().square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert (gradient is None) == (other[1][name] is None), name
        assert gradient is None or torch.equal(gradient, other[1][name]), name
    assert any(gradient.any() for gradient in one[1].values() if gradient is not None)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("embeddings", ["tile", "channel", "separable"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same_bit_for_bit(name, embeddings, amp):
    model, x = case(name, embeddings=embeddings)
    again, _ = case(name, embeddings=embeddings, recompute=True)
    assert generator(again).recompute
    kept = step(copy.deepcopy(model), x, amp)
    assert_same(kept, step(again, x, amp))
    generator(model).recompute = True
    assert_same(kept, step(model, x, amp))


@pytest.mark.parametrize("name", CASES)
def test_no_weight_outlives_the_forward_pass(name):
    def alive(recompute):
        model, x = case(name, recompute=recompute)
        weights = []  # their memory, as layers keep views of them
        generator(model).register_forward_hook(
            lambda *args: weights.append(StorageWeakRef(args[2].untyped_storage()))
        )
        y = model(x)
        gc.collect()
        count = sum(not ref.expired() for ref in weights)
        del y
        assert weights
        return count

    assert alive(recompute=True) == 0
    assert alive(recompute=False) > 0


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket._qualified_op_name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet18", "convolutions"])
def test_convolutions_run_once_and_the_generator_twice(name):
    counts = []
    for recompute in (False, True):
        model, x = case(name, recompute=recompute)
        with Count() as count:
            step(model, x)
        counts.append(count.calls)
    kept, again = counts
    assert again["aten::convolution"] == kept["aten::convolution"] > 0
    assert again["aten::convolution_backward"] == kept["aten::convolution_backward"]
    sites = len(generator(model).plan.sites)
    assert again["aten::addmm"] == kept["aten::addmm"] + sites


def test_nothing_is_recomputed_without_gradients():
    model, x = case("resnet18", recompute=True)
    calls = []
    generator(model).register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        model.eval()(x)
    assert len(calls) == len(generator(model).plan.sites)


def test_it_works_inside_torch_compile():
    model, x = case("convolutions")
    kept = step(torch.compile(model, fullgraph=True), x)
    model.zero_grad()
    torch.compiler.reset()
    generator(model).recompute = True
    again = step(torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(again[0], kept[0])  # fused otherwise, so rounded otherwise
    for name, gradient in kept[1].items():
        torch.testing.assert_close(again[1][name], gradient, msg=name)


def test_it_works_with_checkpointing_and_double_backward():
    model, x = case("resnet18")
    model.set_grad_checkpointing()
    kept = step(model, x)
    generator(model).recompute = True
    assert_same(kept, step(model, x))
    gradients = []
    for recompute in (False, True):
        model, x = case("convolutions", recompute=recompute)
        parameters = list(model.parameters())
        first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
        norm = sum(gradient.square().sum() for gradient in first)
        gradients.append(torch.autograd.grad(norm, parameters, allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert one is None or torch.equal(one, other)


def test_the_penalty_on_generated_weights_is_the_same():
    results = []
    for recompute in (False, True):
        model, x = case("resnet18", recompute=recompute)
        with generated_l2(model) as l2:
            y = model(x)
        (y.square().mean() + l2()).backward()
        results.append((y.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(*results)


def test_files_keep_the_choice(tmp_path):
    model, x = case("resnet18", recompute=True)
    save(model, tmp_path / "f")
    again = load(CASES["resnet18"][0](), tmp_path / "f").train()
    assert generator(again).recompute
    assert_same(step(model, x), step(again, x))


def test_it_is_true_or_false():
    with pytest.raises(ConfigError, match="recompute"):
        HyperConfig(recompute="yes")
