"""Products by oneDNN: torch's own to rounding, with all derivatives, and torch's own elsewhere."""

import runpy
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from models import randomise
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from hyperize import hyperize, products, to_dense

SINGLE = 1e-5
"""Relative error, in norm, of float32 products in another order; 1e-6 was measured."""
N, M, D = 300, 250, 70
"""More multiply-adds than `LEAST`."""
needs_onednn = pytest.mark.skipif(not products._ONEDNN, reason="a torch without oneDNN or MKL")


def error(got, wanted):
    return float((got - wanted).detach().norm() / wanted.detach().norm())


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with each product by oneDNN."""
    made = []
    by_onednn = products.by_onednn

    def counted(*args):
        made.append(args)
        return by_onednn(*args)

    monkeypatch.setattr(products, "by_onednn", counted)
    return made


@pytest.fixture
def operands():
    return [torch.randn(size, requires_grad=True) for size in ((N, D), (M, D), (M,))]


GRADIENTS = {
    "plain": lambda: torch.randn(N, M),
    "expanded": lambda: torch.randn(1, 1).expand(N, M),
    "transposed": lambda: torch.randn(M, N).t(),
    "with gaps": lambda: torch.randn(N, 2 * M)[:, ::2],
}


@needs_onednn
@pytest.mark.parametrize("kind", GRADIENTS)
def test_values_and_gradients_are_those_of_torch(kind, operands, calls):
    assert N * M * D >= products.LEAST
    gradient = GRADIENTS[kind]()
    got, wanted = products.linear(*operands), F.linear(*operands)
    assert len(calls) == 1
    assert error(got, wanted) < SINGLE
    assert got.is_contiguous()
    found = torch.autograd.grad(got, operands, gradient)
    assert len(calls) == 3
    for one, other in zip(found, torch.autograd.grad(wanted, operands, gradient), strict=True):
        assert one.shape == other.shape
        assert error(one, other) < SINGLE


@needs_onednn
@pytest.mark.parametrize("wanted", range(3))
def test_only_the_gradients_that_are_asked_for_are_computed(wanted, operands, calls):
    for at, operand in enumerate(operands):
        operand.requires_grad_(at == wanted)
    products.linear(*operands).sum().backward()
    assert [operand.grad is not None for operand in operands] == [at == wanted for at in range(3)]
    assert len(calls) == (1 if wanted == 2 else 2)


@needs_onednn
def test_what_no_gradient_needs_may_change_in_place(operands):
    x, weight, bias = operands
    y = products.linear(x, weight.detach(), bias)
    wanted = torch.autograd.grad(F.linear(*operands).sum(), x)[0]
    with torch.no_grad():
        x.zero_()
    assert error(torch.autograd.grad(y.sum(), x)[0], wanted) < SINGLE
    y = products.linear(x.detach(), weight, bias)
    with torch.no_grad():
        weight.zero_()
    assert not torch.autograd.grad(y.sum(), weight)[0].any()  # x is zero now


@needs_onednn
def test_derivatives_of_derivatives(operands, calls):
    def derivatives(linear):
        squares = linear(*operands).square().sum()
        first = torch.autograd.grad(squares, operands, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), operands, create_graph=True
        )
        third = torch.autograd.grad(sum(g.square().sum() for g in second), operands)
        return [*first, *second, *third]

    got = derivatives(products.linear)
    assert len(calls) > 6
    for one, other in zip(got, derivatives(F.linear), strict=True):
        assert error(one, other) < SINGLE


@needs_onednn
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_value_does_not_depend_on_what_is_recorded(mode, operands):
    wanted = products.linear(*operands)
    with mode():
        assert torch.equal(products.linear(*operands), wanted)
    plain = [operand.detach() for operand in operands]
    assert torch.equal(products.linear(*plain), wanted)
    assert torch.equal(products.linear(*map(nn.Parameter, plain)), wanted)


@needs_onednn
@pytest.mark.parametrize("padded", [(N, D + 3), (2 * N, D)])
def test_operands_may_be_views(padded, operands, calls):
    x = torch.randn(padded)[:: padded[0] // N, :D].requires_grad_()
    weight = torch.randn(D, M).t().requires_grad_()
    bias = operands[2]
    inputs = (x, weight, bias)
    got, wanted = products.linear(*inputs), F.linear(*inputs)
    assert error(got, wanted) < SINGLE
    gradient = torch.randn(N, M)
    found = torch.autograd.grad(got, inputs, gradient)
    assert len(calls) == 3
    for one, other in zip(found, torch.autograd.grad(wanted, inputs, gradient), strict=True):
        assert error(one, other) < SINGLE


def test_elsewhere_it_is_torch_s_own(operands, calls):
    x, weight, bias = operands
    assert torch.equal(products.linear(x[:3], weight, bias), F.linear(x[:3], weight, bias))
    doubles = [operand.double() for operand in operands]
    assert torch.equal(products.linear(*doubles), F.linear(*doubles))
    empty = x[:0]
    assert products.linear(empty, weight, bias).shape == (0, M)
    on_meta = [operand.to("meta") for operand in operands]
    assert products.linear(*on_meta).shape == (N, M)
    with torch.backends.mkldnn.flags(enabled=False):
        products.linear(*operands)
    with FlopCounterMode(display=False) as counter:
        products.linear(*operands)
    assert counter.get_total_flops() == 2 * N * M * D
    assert not calls


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_transforms_and_tracers_know_it(operands, calls):
    x, weight, bias = (operand.detach() for operand in operands)

    def loss(x, weight):
        return products.linear(x, weight, bias).square().sum()

    wanted = torch.autograd.grad(F.linear(operands[0], weight, bias).square().sum(), operands[0])[0]
    assert error(grad(loss)(x, weight), wanted) < SINGLE
    many = vmap(lambda row: products.linear(row, weight, bias))(torch.stack([x, x]))
    assert error(many[1], F.linear(x, weight, bias)) < SINGLE
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(products.linear(dual, weight, bias)).tangent
    assert error(tangent, torch.ones_like(x) @ weight.t()) < SINGLE
    compiled = torch.compile(products.linear, backend="eager", fullgraph=True)
    assert error(compiled(x, weight, bias), F.linear(x, weight, bias)) < SINGLE
    # Its check would run the function itself
    traced = torch.jit.trace(lambda x: products.linear(x, weight, bias), (x,), check_trace=False)
    assert error(traced(x), F.linear(x, weight, bias)) < SINGLE
    exported = torch.export.export(_Module(weight, bias), (x,))
    assert error(exported.module()(x), F.linear(x, weight, bias)) < SINGLE
    assert not calls


@needs_onednn
def test_private_functions_are_asked_last(operands, monkeypatch):
    x, weight, bias = operands

    def asked(*tensors):
        raise AssertionError("asked")

    for name in ("_transforms_active", "_is_batched", "_dispatch_modes"):
        monkeypatch.setattr(products, name, asked)
    products.linear(x[:3], weight, bias)
    products.linear(*(operand.double() for operand in operands))
    products.linear(*(operand.to("meta") for operand in operands))
    with pytest.raises(AssertionError, match="asked"):
        products.linear(*operands)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C._functorch, "is_legacy_batchedtensor"),
        (torch.ops, "mkldnn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_torch_without_a_private_function_has_its_own_products(
    place, name, operands, monkeypatch
):
    with monkeypatch.context() as patch:
        if place is torch.ops:
            patch.setattr(place, name, types.SimpleNamespace())
        else:
            patch.delattr(place, name)
        lacking = runpy.run_path(products.__file__)
    assert lacking["_ONEDNN"] is False
    assert torch.equal(lacking["linear"](*operands), F.linear(*operands))
    a, b = operands[0].detach(), operands[1].detach().t()
    assert torch.equal(lacking["product"](a, b), a @ b)
    assert not lacking["is_transformed"](a)


@needs_onednn
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batches_of_gradients_are_torch_s(operands, calls):
    """Which hides them in tensors that oneDNN would have to be called on one by one."""
    gradients = torch.randn(2, N, M)
    y = products.linear(*operands)
    calls.clear()
    found = torch.autograd.grad(y, operands, gradients, retain_graph=True, is_grads_batched=True)
    assert not calls
    for at, gradient in enumerate(gradients):
        for one, other in zip(found, torch.autograd.grad(y, operands, gradient, True), strict=True):
            assert error(one[at], other) < SINGLE


class _Module(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x):
        return products.linear(x, self.weight, self.bias)


@needs_onednn
@pytest.mark.parametrize(
    "options",
    [{}, {"embeddings": "channel"}, {"trunk_axis": 1}, {"hidden_dim": 32}],
    ids=["tiles", "channels", "turned", "hidden layer"],
)
def test_a_model_trains_with_both_alike_and_its_dense_form_is_exact(options, calls, monkeypatch):
    hyper = hyperize(randomise(timm.create_model("resnet18")), seed=0, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    results = []
    for use in (True, False):
        monkeypatch.setattr(products, "_ONEDNN", use)
        hyper.zero_grad()
        calls.clear()
        y = hyper(x)
        y.square().mean().backward()
        assert bool(calls) == use
        assert torch.equal(to_dense(hyper)(x), y)
        results.append([y.detach(), *(p.grad for p in hyper.parameters())])
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 10 * SINGLE  # through a network
