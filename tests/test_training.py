"""Parameter groups for optimizers, and the L2 penalty on generated weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from models import CRNN, UsedTwice
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyperize import (
    ConfigError,
    ModelError,
    as_graph,
    generated_l2,
    hyperize,
    param_groups,
)
from hyperize.hypernet import HyperNet
from hyperize.parts import generated_layers

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
"""Of sums in another order, in float32."""
PENALTY = {"rtol": 1e-6, "atol": 0}
"""Of a float32 sum over Gram matrices, against one over all weights."""
DECAY = 0.3


class Net(nn.Module):
    """Two convolutions, of which the second is used twice, and a norm with gains of three axes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.LayerNorm((32, 8, 8))
        self.twice = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def hyper():
    return hyperize(Net(), compression=3, seed=0)


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def names(model, groups):
    """The names of the decayed and of the other parameters, after checking what all groups owe."""
    decayed, free = groups
    assert decayed["weight_decay"] == DECAY
    assert free["weight_decay"] == 0
    name_of = {id(param): name for name, param in model.named_parameters()}
    grouped = [name_of[id(param)] for group in groups for param in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {name for name, p in model.named_parameters() if p.requires_grad}
    return tuple({name_of[id(param)] for param in group["params"]} for group in groups)


# ------------------------------------------------------------------------------ parameter groups
def test_ordinary_weights_of_a_hyper_model_decay_and_nothing_else():
    hyper = hyperize(Net(), compression=3, exclude="first", hidden_dim=8)
    decayed, free = names(hyper, param_groups(hyper, DECAY))
    assert decayed == {"first.weight", "head.weight"}
    assert {"twice.weight", "twice.hypernet.trunk.weight", "norm.weight"} < free


def test_a_wrapped_hyper_model_has_the_same_groups():
    wrapped = nn.Sequential(nn.Identity(), hyperize(CRNN(), compression=4))
    decayed, _ = names(wrapped, param_groups(wrapped, DECAY))
    assert decayed == {"1.head.weight"}


def test_recurrent_weights_that_stay_dense_decay():
    hyper = hyperize(CRNN(), compression=4, embeddings="tile", exclude="lstm")
    decayed, _ = names(hyper, param_groups(hyper, DECAY))
    lstm = {name for name, p in hyper.named_parameters() if "lstm" in name and p.ndim == 2}
    assert len(lstm) == 8
    assert decayed == lstm | {"head.weight"}


def test_groups_of_a_plain_model():
    model = Net()
    decayed, _ = names(model, param_groups(model, DECAY))
    assert decayed == {"first.weight", "twice.weight", "head.weight"}


def test_biases_of_several_axes_do_not_decay():
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    decayed, free = names(model, param_groups(model, DECAY))
    assert decayed == {"in_proj_weight", "out_proj.weight"}
    assert {"bias_k", "bias_v"} < free


def test_a_model_says_itself_what_is_not_to_decay():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3)
    model = nn.ModuleDict({"vit": hyperize(vit, compression=2, targets="linear")})
    decayed, free = names(model, param_groups(model, DECAY))
    assert {"vit.pos_embed", "vit.cls_token"} < free
    assert "vit.patch_embed.proj.weight" in decayed


def test_frozen_parameters_are_left_out_and_tied_ones_come_once():
    model = Net()
    model.other = nn.Linear(32, 5)
    model.other.weight = model.head.weight
    model.first.requires_grad_(False)
    decayed, _ = names(model, param_groups(model, DECAY))
    assert decayed == {"twice.weight", "head.weight"}


def test_an_optimizer_decays_as_the_groups_say(hyper):
    before = {name: p.detach().clone() for name, p in hyper.named_parameters()}
    for param in hyper.parameters():
        param.grad = torch.zeros_like(param)
    torch.optim.SGD(param_groups(hyper, DECAY), lr=1.0).step()
    for name, param in hyper.named_parameters():
        factor = 1 - DECAY if name == "head.weight" else 1
        torch.testing.assert_close(param, factor * before[name], msg=name)


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf"), True, "0.1", None])
def test_a_weight_decay_that_is_none(decay):
    with pytest.raises(ConfigError, match="weight_decay must be a finite number >= 0, got"):
        param_groups(Net(), decay)


def test_there_must_be_something_to_optimize():
    with pytest.raises(ModelError, match="Net has no trainable parameters"):
        param_groups(Net().requires_grad_(False))
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got list"):
        param_groups(list(Net().parameters()))


# ------------------------------------------------------------------- the penalty, and its gradient
def by_hand(hyper):
    """The penalty from the weights' values, each generated for it."""
    layers = generated_layers(hyper).values()
    return sum(getattr(m, name).double().square().sum() for m in layers for name in m.generated)


def gradients(hyper, loss):
    hyper.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in hyper.named_parameters()}


def expected(hyper, inputs):
    """Value of the penalty and gradients of a loss with it, without `generated_l2`."""
    penalty = by_hand(hyper)
    return penalty, gradients(hyper, loss_of(hyper(inputs)) + DECAY * penalty)


def loss_of(output):
    return output.float().square().mean()


def assert_close(got, wanted, **tolerances):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=name, **(tolerances or CLOSE))


def calls(hyper, monkeypatch):
    """A list that grows by an embedding's identity whenever a weight is generated from it."""
    sites = []
    generate = HyperNet._generate

    def counted(self, embedding, constants, grid):
        sites.append(id(embedding))
        return generate(self, embedding, constants, grid)

    monkeypatch.setattr(HyperNet, "_generate", counted)
    return sites


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Net, (2, 3, 8, 8)), (UsedTwice, (2, 3, 8, 8)), (CRNN, (2, 1, 8, 8))],
    ids=["Net", "UsedTwice", "CRNN"],
)
def test_the_penalty_is_that_of_the_generated_weights(model, shape, monkeypatch):
    hyper = hyperize(model(), compression=3, seed=0)
    inputs = torch.randn(shape)
    penalty, wanted = expected(hyper, inputs)
    sites = calls(hyper, monkeypatch)
    hyper(inputs)
    plain = list(sites)
    sites.clear()
    with generated_l2(hyper) as l2:
        loss = loss_of(hyper(inputs))
    value = l2()
    assert sites == plain  # nothing is generated for the penalty
    assert value.shape == ()
    # A sum in float32
    torch.testing.assert_close(value.double(), penalty, rtol=1e-6, atol=0)
    assert_close(gradients(hyper, loss + DECAY * value), wanted)


def test_each_site_is_generated_once_where_each_layer_is_used_once(monkeypatch):
    hyper = hyperize(CRNN(), compression=3)
    sites = calls(hyper, monkeypatch)
    with generated_l2(hyper) as l2:
        hyper(torch.randn(2, 1, 8, 8))
    l2().backward()
    layers = generated_layers(hyper).values()
    embeddings = [id(m.embedding(name)) for m in layers for name in m.generated]
    assert len(embeddings) == len(hyper.hypernet.plan.sites)
    assert sorted(sites) == sorted(embeddings)
    assert hyper.lstm.weight_hh_l0_embedding.grad.abs().sum() > 0


def test_the_gradient_is_that_of_weight_decay_on_a_dense_kernel(hyper, x):
    embeddings = [hyper.first.weight_embedding, hyper.twice.weight_embedding]
    # What SGD would add to the gradients of dense kernels, sent back through the generator
    kernels = [hyper.first.weight, hyper.twice.weight]
    decays = [DECAY * kernel.detach() for kernel in kernels]
    wanted = torch.autograd.grad(kernels, embeddings, decays)
    with generated_l2(hyper) as l2:
        hyper(x)
    got = torch.autograd.grad(0.5 * DECAY * l2(), embeddings)
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("inside", [False, True], ids=["after the block", "inside the block"])
def test_checkpointing_does_not_count_twice(hyper, x, inside):
    penalty, wanted = expected(hyper, x)
    with generated_l2(hyper) as l2:
        loss = loss_of(checkpoint(hyper, x, use_reentrant=False))
        if inside:
            got = gradients(hyper, loss + DECAY * l2())
            torch.testing.assert_close(l2().double(), penalty, **PENALTY)
    if not inside:
        got = gradients(hyper, loss + DECAY * l2())
    assert_close(got, wanted)


def test_reentrant_checkpointing_is_refused(hyper, x):
    with generated_l2(hyper) as l2:
        checkpoint(hyper, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(ModelError, match=r"no gradient.*use_reentrant=False"):
        l2()


def test_under_autocast_the_penalty_is_as_exact_as_without(hyper, x):
    penalty = by_hand(hyper)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(hyper(x))
    wanted = gradients(hyper, loss + DECAY * penalty)
    with torch.autocast("cpu", torch.bfloat16), generated_l2(hyper) as l2:
        loss = loss_of(hyper(x))
        value = l2()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), by_hand(hyper), **PENALTY)
    assert_close(gradients(hyper, loss + DECAY * value), wanted)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.float64, torch.float64)],
    ids=["float16", "float64"],
)
def test_the_sum_has_the_range_of_float32_at_least(x, dtype, wide):
    net = Net()
    nn.init.normal_(net.twice.weight, std=10)  # 9,216 weights: the sum is beyond half's 65,504
    hyper = hyperize(net.to(dtype), compression=3, seed=0)
    with generated_l2(hyper) as l2:
        hyper(x.to(dtype))
    assert l2().dtype == wide
    torch.testing.assert_close(l2().double(), by_hand(hyper).double(), rtol=1e-5, atol=0)
    assert l2() > 65_504


def test_without_gradients_the_value_is_the_same(hyper, x):
    with torch.no_grad(), generated_l2(hyper) as l2:
        hyper(x)
        torch.testing.assert_close(l2().double(), by_hand(hyper), **PENALTY)
    with pytest.raises(ModelError, match="without a graph"):
        l2()


def test_sites_that_the_pass_does_not_reach_do_not_count(hyper):
    with generated_l2(hyper) as l2:
        hyper.first(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(l2(), hyper.first.weight.square().sum())


def test_a_later_pass_in_the_same_block_replaces_the_weights(hyper, x):
    with generated_l2(hyper) as l2:
        hyper(x)
        with torch.no_grad():
            hyper.twice.weight_embedding.mul_(2)
        hyper(x)
    _, wanted = expected(hyper, x)
    with generated_l2(hyper):
        loss = loss_of(hyper(x))
    assert_close(gradients(hyper, loss + DECAY * l2()), wanted)


@pytest.mark.parametrize("hoist", [False, True], ids=["at calls", "hoisted"])
def test_the_graph_has_the_same_penalty(hyper, x, hoist):
    penalty, wanted = expected(hyper, x)
    graph = as_graph(hyper, hoist=hoist)
    with generated_l2(graph) as l2:
        loss = loss_of(graph(x))
    torch.testing.assert_close(l2().double(), penalty, **PENALTY)
    assert_close(gradients(hyper, loss + DECAY * l2()), wanted)


def test_several_hypernetworks_in_one_model(x):
    pair = nn.ModuleList(hyperize(Net(), compression=3, seed=seed) for seed in (0, 1))
    with generated_l2(pair) as l2:
        pair[0](x), pair[1](x)
    wanted = sum(by_hand(hyper) for hyper in pair)
    torch.testing.assert_close(l2().double(), wanted, **PENALTY)


def test_a_compiled_model_that_is_first_called_inside_a_block(hyper, x):
    compiled = torch.compile(hyper, backend="eager", fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            hyper.twice.weight_embedding.add_(0.1)
        penalty, wanted = expected(hyper, x)
        with generated_l2(compiled) as l2:
            loss = loss_of(compiled(x))
        torch.testing.assert_close(l2().double(), penalty, **PENALTY)
        assert_close(gradients(hyper, loss + DECAY * l2()), wanted)


def test_a_pass_that_generates_nothing(hyper):
    with generated_l2(hyper) as l2:
        hyper.head(torch.randn(2, 32))
    with pytest.raises(ModelError, match="no weight was generated within generated_l2"):
        l2()


@pytest.mark.parametrize("model", [Net(), [Net()]], ids=["dense", "list"])
def test_only_a_hyperized_model_has_generated_weights(model):
    with (
        pytest.raises(ModelError, match=r"not hyperized|expected a hyperized"),
        generated_l2(model),
    ):
        pass


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})],
    ids=["AdamW", "SGD"],
)
@pytest.mark.parametrize("made", ["fused", "foreach"])
def test_the_groups_suit_fused_optimizers(hyper, x, optimizer, options, made):
    optimizer = optimizer(param_groups(hyper, 0.1), **{made: True}, **options)
    before = {name: p.detach().clone() for name, p in hyper.named_parameters()}
    loss_of(hyper(x)).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in hyper.named_parameters())


def test_the_hook_goes_with_the_block(hyper, x):
    with generated_l2(hyper) as l2:
        assert len(hyper.hypernet._forward_hooks) == 1
        hyper(x)
    assert not hyper.hypernet._forward_hooks
    value = l2()
    with torch.no_grad():
        hyper.twice.weight_embedding.mul_(2)
    hyper(x)
    torch.testing.assert_close(l2(), value, **PENALTY)

    def fails():
        with generated_l2(hyper):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert not hyper.hypernet._forward_hooks


def test_training_with_the_penalty_shrinks_the_generated_weights(hyper, x):
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.Adam(param_groups(hyper, 0.0), lr=0.01)
    before = by_hand(hyper).item()
    for _ in range(20):
        optimizer.zero_grad()
        with generated_l2(hyper) as l2:
            loss = F.cross_entropy(hyper(x), labels)
        (loss + DECAY * l2()).backward()
        optimizer.step()
    assert by_hand(hyper).item() < before / 2
