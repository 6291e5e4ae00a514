"""One generator for several networks: by number, by a vector, and one for each sample."""

import copy
import pickle
import re
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from models import CRNN, Convolutions, Transposed, UsedTwice, count, meta, randomise
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

import hyperize as hz
from hyperize import (
    ConditionError,
    ConfigError,
    ModelError,
    add_condition,
    at_condition,
    cached,
    caching,
    condition,
    dense_state_dict,
    fit_,
    generated_l2,
    hyperize,
    load,
    make_plan,
    param_groups,
    quantized,
    report,
    save,
    to_dense,
)
from hyperize.parts import generated_layers, private_layers
from hyperize.sites import tensor_bytes

ROUNDING = 1e-5
"""Of float32 through a small network, in sums of another order, against the largest value."""
FITTED = 1e-2
"""Share of the weights that the fit misses where none has to be, after some hundred sweeps."""
K = 3


class Small(nn.Module):
    """Convolutions with biases and batch norms, a group norm, and a linear layer."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, 2 * width, 3, padding=1, groups=2)
        self.gn = nn.GroupNorm(4, 2 * width)
        self.last = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        x = torch.tanh(self.bn(self.stem(x)))
        x = torch.tanh(self.gn(self.body(x)))
        return self.fc(torch.tanh(self.bn2(self.last(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Dynamic(nn.Module):
    """A HyperLSTM between layers to generate."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.lstm = hz.HyperLSTM(16, 24, hyper_size=8, embedding_dim=4)
        self.out = nn.Linear(24, 32)

    def forward(self, x):
        steps = self.conv(x).permute(2, 0, 1)  # (N, C, T) -> (T, N, C)
        return self.out(self.lstm(steps)[0][-1])


MODELS = {
    "small": (Small, (3, 8, 8), {}),
    "channels": (Small, (3, 8, 8), {"embeddings": "channel"}),
    "separable": (Small, (3, 8, 8), {"embeddings": "separable"}),
    "two layers": (Small, (3, 8, 8), {"hidden_dim": 8}),
    "private": (Small, (3, 8, 8), {"private": ("fc", "stem")}),
    "every shape": (Convolutions, (3, 16, 16), {}),
    "transposed": (
        Transposed,
        (2, 8, 8),
        {"targets": ("conv2d", "conv_transpose2d"), "compression": 2},
    ),
    "used twice": (UsedTwice, (3, 8, 8), {}),
    "lstm": (CRNN, (1, 12, 20), {}),
    "attention": (Attention, (6, 32), {"targets": ("linear", "attention")}),
    "private attention": (Attention, (6, 32), {"targets": "linear", "private": "attention"}),
    "private hyperlstm": (
        Dynamic,
        (8, 7),
        {"targets": ("conv1d", "linear"), "private": "lstm", "compression": 1.5},
    ),
    "timm": (lambda: timm.create_model("test_resnet", num_classes=5), (3, 64, 64), {}),
    "factors": (Attention, (6, 32), {"targets": "linear", "factorized": True}),
    "recompute": (Small, (3, 8, 8), {"recompute": True}),
}


def made(name, **options):
    """A dense model, its hyperized version of K networks, and a batch."""
    make, shape, of_model = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make()).eval()
    options = {"conditions": K, "compression": 3, "seed": 0} | of_model | options
    return model, scattered(hyperize(model, **options)).eval(), torch.randn(4, *shape)


def scattered(hyper):
    """Makes what each network has for itself differ between the networks."""
    generator = torch.Generator().manual_seed(1)
    for layer in generated_layers(hyper).values():
        for name in layer.private:
            table = (layer._parameters | layer._buffers)[name].data
            table += 0.1 * torch.rand(table.shape, generator=generator)
    for layer in private_layers(hyper).values():
        for table in (*layer._parameters.values(), *layer._buffers.values()):
            if table is not None and table.is_floating_point():
                table.data += 0.1 * torch.rand(table.shape, generator=generator)
    return hyper


def outputs(hyper, x):
    found = []
    for k in range(K):
        with condition(hyper, k):
            found.append(hyper(x))
    return found


def close(a, b, tolerance=ROUNDING):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# ------------------------------------------------------------------------------- networks, numbered


@pytest.mark.parametrize("name", MODELS)
def test_each_network_is_its_dense_model_bit_for_bit(name):
    model, hyper, x = made(name)
    kept = {key: t.clone() for key, t in hyper.state_dict().items()}
    different = [y.detach() for y in outputs(hyper, x)]
    assert not close(different[0], different[1], 1e-2)
    tolerance = ROUNDING if name == "factors" else 0
    for k in range(K):
        dense = to_dense(hyper, condition=k)
        assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(dense_state_dict(hyper, condition=k))
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                with condition(hyper, k):
                    y, inside = hyper(x), to_dense(hyper)
                assert close(dense(x), y, tolerance)
                assert close(fresh(x), y, tolerance)
                assert close(inside(x), y, tolerance)
    assert all(torch.equal(t, kept[key]) for key, t in hyper.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_model(name):
    model, hyper, _ = made(name)
    plan = hyper.hypernet.plan
    assert count(hyper) == plan.total_hyper_params
    of_model, of_plan = report(hyper), report(plan)
    assert of_model.total_dense_params == of_plan.total_dense_params == K * count(model)
    assert of_model.total_hyper_params == of_plan.total_hyper_params == count(hyper)
    assert of_model.dense_bytes == of_plan.dense_bytes == K * tensor_bytes(model)
    assert of_model.hyper_bytes == of_plan.hyper_bytes == tensor_bytes(hyper)
    assert plan.compression >= plan.config.compression
    longer = add_condition(hyper)
    assert count(longer) == count(hyper) + plan.further_params
    assert count(longer) == longer.hypernet.plan.total_hyper_params
    assert f"one more adds {plan.further_params:,}" in str(of_model)
    assert hz.Plan.from_dict(plan.to_dict()) == plan


def test_from_the_break_even_on_they_are_smaller_together():
    plan = make_plan(
        meta("resnet18"), conditions=6, embedding_dim=1100, hidden_dim=0, compression=None
    )
    shared = plan.total_hyper_params - 6 * plan.further_params
    for k in range(1, 8):
        smaller = shared + k * plan.further_params < k * plan.total_params
        assert smaller == (k >= plan.break_even)
    assert 1 < plan.break_even <= 6


def test_a_total_is_that_of_all_networks():
    model = meta("resnet18")
    for most in (5_000_000, 12_000_000):
        plan = make_plan(model, conditions=4, max_params=most)
        assert 0.9 * most < plan.total_hyper_params <= most
    with pytest.raises(hz.BudgetError, match="dense models have"):
        make_plan(model, conditions=4, max_params=4 * count(model))
    with pytest.raises(hz.BudgetError, match="cannot be met"):
        make_plan(model, conditions=4, max_params=30_000)


@pytest.mark.parametrize("name", ["small", "channels", "two layers", "lstm"])
@pytest.mark.parametrize("share", [False, True])
def test_each_starts_with_the_statistics_of_the_dense_model(name, share):
    make, _, of_model = MODELS[name]
    torch.manual_seed(0)
    model = make()
    hyper = hyperize(model, conditions=K, compression=3, share=share, seed=0, **of_model)
    for path, layer in generated_layers(hyper).items():
        for param in layer.generated:
            dense = model.get_submodule(path)._parameters[param].detach()
            weights = []
            for k in range(K):
                with condition(hyper, k):
                    weights.append(getattr(layer, param).detach())
                assert float(weights[k].std()) == pytest.approx(float(dense.std()), rel=2e-2)
                assert float(weights[k].mean() - dense.mean()) == pytest.approx(
                    0, abs=2e-3 * float(dense.std())
                )
            assert torch.equal(weights[0], weights[1]) == share


def test_without_a_condition_nothing_is_computed(capsys):
    _, hyper, x = made("small")
    assert "16, 32, kernel_size" in repr(hyper.body)
    for call in (lambda: hyper(x), lambda: to_dense(hyper), lambda: hyper.stem.weight):
        with pytest.raises(ConditionError, match="none was given"):
            call()
    with condition(hyper, 0), pytest.raises(ConditionError):
        raise ConditionError("of the user")
    with pytest.raises(ConditionError, match="none was given"):
        hyper(x)


def test_what_each_network_has_for_itself_is_read_under_a_condition_and_not_written():
    _, hyper, _ = made("private")
    for layer in (hyper.bn, hyper.gn, hyper.fc):
        with pytest.raises(ConditionError, match="none was given"):
            layer.weight  # noqa: B018
        assert layer.get_parameter("weight") is layer._parameters["weight"]
        for k in range(K):
            with condition(hyper, k):
                assert torch.equal(layer.weight, layer._parameters["weight"][k])
                with pytest.raises(hz.WeightError):
                    nn.init.zeros_(layer.weight)
    hyper.bn.reset_running_stats()
    assert hyper.bn.running_mean.shape == (K, 16)
    assert not hyper.bn.running_mean.any()


def test_blocks_nest_and_belong_to_their_thread():
    _, hyper, x = made("small")
    zero, one, _ = outputs(hyper, x)
    errors: list[object] = []

    def elsewhere():
        try:
            hyper(x)
        except ConditionError as error:
            errors.append(error)
        with condition(hyper, 1):
            errors.append(torch.equal(hyper(x), one))

    with condition(hyper, 0):
        with condition(hyper, 1):
            assert torch.equal(hyper(x), one)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(hyper(x), zero)
    assert isinstance(errors[0], ConditionError)
    assert errors[1] is True


def test_a_part_and_a_model_with_such_parts_take_it():
    _, hyper, x = made("small")
    with condition(hyper, 2):
        wanted = hyper.body(torch.tanh(hyper.bn(hyper.stem(x))))
    part = nn.Sequential(hyper.stem, hyper.bn, nn.Tanh(), hyper.body)
    with condition(part, 2):
        assert torch.equal(part(x), wanted)
    with condition(nn.ModuleDict({"inner": nn.Sequential(part)}), 2):
        assert torch.equal(part(x), wanted)


def test_copies_have_conditions_of_their_own():
    _, hyper, x = made("timm")
    zero, one, _ = (y.detach() for y in outputs(hyper, x))
    for again in (copy.deepcopy(hyper), pickle.loads(pickle.dumps(hyper))):
        with condition(again, 0), condition(hyper, 1):
            assert torch.equal(again(x), zero)
            assert torch.equal(hyper(x), one)
        with condition(hyper, 0), pytest.raises(ConditionError):
            again(x)


@pytest.mark.parametrize("name", ["small", "private", "lstm", "attention", "recompute"])
def test_gradients_are_those_of_the_dense_model_and_of_its_network_alone(name):
    _, hyper, x = made(name)
    hyper.train()
    dense = to_dense(hyper, condition=1)
    hyper.zero_grad()
    with condition(hyper, 1):
        y = hyper(x)
    y.square().sum().backward()  # after the block
    assert torch.equal(dense(x), y) or close(dense(x), y)
    dense(x).square().sum().backward()
    tables = {}
    for path, layer in private_layers(hyper).items():
        tables |= {f"{path}.{n}": p for n, p in layer._parameters.items() if p is not None}
    for path, layer in generated_layers(hyper).items():
        tables |= {f"{path}.{n}": layer._parameters[n] for n in layer.private}
    wanted = dict(dense.named_parameters())
    assert tables
    for key, table in tables.items():
        assert close(table.grad[1], wanted[key].grad, 1e-4), key
        assert not table.grad[[0, 2]].any()
    for layer in generated_layers(hyper).values():
        for param in layer.generated:
            assert layer.embedding(param).grad[1].any()
            assert not layer.embedding(param).grad[[0, 2]].any()


def test_each_network_has_its_own_statistics():
    _, hyper, x = made("small")
    hyper.train()
    before = hyper.state_dict()
    before = {key: t.clone() for key, t in before.items()}
    dense = to_dense(hyper, condition=2)
    for scale in (1, 3):
        with condition(hyper, 2):
            hyper(scale * x)
        dense(scale * x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        table, old = getattr(hyper.bn, name), before[f"bn.{name}"]
        assert torch.equal(table[2], getattr(dense.bn, name))
        assert not torch.equal(table[2], old[2])
        assert torch.equal(table[:2], old[:2])


# ------------------------------------------------------------------------------------------ vectors


@pytest.mark.parametrize("name", ["small", "channels", "two layers", "lstm", "transposed"])
def test_embeddings_are_affine_in_a_vector_and_gradients_reach_it(name):
    _, hyper, x = made(name, conditions=None, condition_dim=2)
    layer = next(iter(generated_layers(hyper).values()))
    table = layer.embedding(layer.generated[0])
    v = torch.tensor([0.3, -1.2], requires_grad=True)
    with condition(hyper, v):
        y, chosen = hyper(x), layer.chosen(layer.generated[0])
    assert close(chosen, table[0] + 0.3 * table[1] - 1.2 * table[2])
    assert torch.equal(at_condition(hyper, v)(x), y)
    assert torch.equal(to_dense(hyper, condition=v)(x), y)
    y.sum().backward()
    hyper.double()
    for at in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[at] = 1e-6
        ends = []
        for sign in (1, -1):
            with condition(hyper, v.detach().double() + sign * step), torch.no_grad():
                ends.append(hyper(x.double()).sum())
        slope = float(ends[0] - ends[1]) / 2e-6
        assert float(v.grad[at]) == pytest.approx(slope, rel=1e-3, abs=1e-3)
    with condition(hyper, [0.3, -1.2]):  # a sequence serves
        assert close(hyper(x.double()), y.double(), 1e-4)


def test_a_shared_start_is_independent_of_the_vector():
    _, hyper, x = made("small", conditions=None, condition_dim=4, share=True)
    with condition(hyper, torch.randn(4)):
        y = hyper(x)
    with condition(hyper, torch.zeros(4)):
        assert torch.equal(hyper(x), y)
    _, apart, x = made("small", conditions=None, condition_dim=4)
    stds = []
    for seed in range(20):
        v = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        with condition(apart, v):
            stds.append(float(apart.last.weight.std()))
    # Components of unit variance give the dense deviation in the mean of squares
    mean = sum(std**2 for std in stds) / len(stds)
    assert mean == pytest.approx(float(made("small")[0].last.weight.std()) ** 2, rel=0.25)


# ------------------------------------------------------------------------------------- each sample


@pytest.mark.parametrize("name", ["small", "channels", "private", "every shape", "transposed"])
@pytest.mark.parametrize("vector", [False, True])
def test_samples_are_computed_as_in_a_loop(name, vector):
    if vector and name == "private":
        pytest.skip("vectors have no private layers")
    options = {"conditions": None, "condition_dim": 2} if vector else {}
    if vector:
        options["private"] = ()
    _, hyper, x = made(name, **options)
    ks = torch.randn(4, 2) if vector else torch.tensor([2, 0, 0, 1])
    with condition(hyper, ks):
        y = hyper(x)
    alone = []
    for k, sample in zip(ks, x, strict=True):
        with condition(hyper, k):
            alone.append(hyper(sample[None]))
    alone = torch.cat(alone)
    assert close(y, alone)
    (y**2).sum().backward()
    got = [p.grad.clone() for p in hyper.parameters() if p.grad is not None]
    hyper.zero_grad()
    (alone**2).sum().backward()
    wanted = [p.grad for p in hyper.parameters() if p.grad is not None]
    assert len(got) == len(wanted)
    assert all(close(a, b, 1e-3) for a, b in zip(got, wanted, strict=True) if b.any())


def test_samples_that_cannot_have_their_own_are_refused():
    for name, batch in (("lstm", 4), ("attention", 4)):
        _, hyper, x = made(name)
        with condition(hyper, [0] * batch), pytest.raises(ConditionError, match="one condition"):
            hyper(x)
    _, hyper, x = made("small")
    with condition(hyper, [0, 1, 2]), pytest.raises(ConditionError, match="has 4 samples"):
        hyper(x)
    with condition(hyper.train(), [0, 1, 2, 0]), pytest.raises(ConditionError, match="in training"):
        hyper(x)
    with condition(hyper, [0, 1]), pytest.raises(ConditionError, match="one for each of"):
        at_condition(hyper, [0, 1])


# ------------------------------------------------------------------------- the rest of the library


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions_run_again_with_their_condition(reentrant):
    class Checkpointed(Small):
        regions = True

        def forward(self, x):
            def rest(x):
                inner = lambda x: torch.tanh(self.body(torch.tanh(self.stem(x))))  # noqa: E731
                x = checkpoint(inner, x, use_reentrant=reentrant) if self.regions else inner(x)
                return torch.tanh(self.last(x)).mean((2, 3))

            return self.fc(
                checkpoint(rest, x, use_reentrant=reentrant) if self.regions else rest(x)
            )

    torch.manual_seed(0)
    hyper = scattered(hyperize(randomise(Checkpointed()), conditions=K, compression=3, seed=0))
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    gradients = []
    for regions in (False, True):
        hyper.regions = regions
        hyper.zero_grad()
        with condition(hyper, 0):
            first = hyper(x).square().sum()
        with condition(hyper, 1):
            second = hyper(x).square().sum()
        with condition(hyper, 2):  # which nothing was computed with
            (first + 2 * second).backward()
        gradients.append({n: p.grad for n, p in hyper.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, wanted in gradients[0].items():
        assert close(gradients[1][key], wanted) or not wanted.any(), key


def test_blocks_inside_of_a_checkpointed_region_are_entered_again():
    _, hyper, x = made("small")
    x.requires_grad_()

    def both(x):
        with condition(hyper, 0):
            y = hyper(x)
        with condition(hyper, 1):
            y = y + 2 * hyper(x)
        return y + 3 * hyper(x)

    gradients = []
    for region in (both, lambda x: checkpoint(both, x, use_reentrant=False)):
        hyper.zero_grad()
        with condition(hyper, 2):
            y = region(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in hyper.parameters()])
    assert all(close(a, b) or not b.any() for a, b in zip(*reversed(gradients), strict=True))


def test_a_compiled_model_switches_without_compiling_anew():
    _, hyper, x = made("small")
    compiled = torch.compile(hyper, fullgraph=True, backend="eager")
    wanted = outputs(hyper, x)
    torch._dynamo.utils.counters.clear()
    for k in (0, 2, 1, 0):
        with condition(hyper, k):
            assert close(compiled(x), wanted[k])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_autocast_computes_as_for_the_dense_model():
    _, hyper, x = made("small")
    for k in range(K):
        with torch.autocast("cpu", torch.bfloat16):
            with condition(hyper, k):
                y = hyper(x)
            assert torch.equal(to_dense(hyper, condition=k)(x), y)


@pytest.mark.parametrize("name", ["small", "channels", "lstm", "every shape"])
def test_kept_weights_are_those_of_the_condition(name):
    _, hyper, x = made(name)
    wanted = outputs(hyper, x)
    with cached(hyper):
        for _ in range(2):
            for k, y in enumerate(outputs(hyper, x)):
                assert close(y, wanted[k])
        with torch.no_grad():
            for table in hyper.parameters():
                table.mul_(1.1)
        again = outputs(hyper, x)
    for k, y in enumerate(outputs(hyper, x)):
        assert close(again[k], y)
        assert not close(y, wanted[k], 1e-2)


@pytest.mark.parametrize("vector", [False, True])
def test_kept_weights_are_not_taken_for_those_of_a_later_block(vector):
    """Objects of blocks that are over leave their addresses to those of later ones."""
    options = {"conditions": None, "condition_dim": 2} if vector else {}
    _, hyper, x = made("small", **options)
    given = [torch.randn(2) for _ in range(K)] if vector else [0, torch.tensor(1), 2]
    wanted = []
    for k in given:
        with condition(hyper, k), torch.no_grad():
            wanted.append(hyper(x))
    with cached(hyper), torch.no_grad():
        for turn in range(30):
            at = turn % K
            with condition(hyper, given[at].clone() if vector or at == 1 else given[at]):
                assert close(hyper(x), wanted[at])
        (cache,) = caching._open.caches
        kept = {id(made) for chunk in cache._chunks.values() for made in chunk._made.values()}
        assert len(kept) <= K * len(set(map(id, cache._chunks.values())))


def test_a_tensor_that_is_changed_inside_of_a_block_counts_as_it_is():
    _, hyper, x = made("small")
    wanted = outputs(hyper, x)
    k = torch.tensor(0)
    with cached(hyper), condition(hyper, k):
        for number in (0, 2, 1, 2):
            k.fill_(number)
            assert close(hyper(x), wanted[number])


@pytest.mark.parametrize("name", ["small", "channels", "used twice", "lstm"])
def test_the_penalty_is_that_of_the_weights_that_were_read(name):
    _, hyper, x = made(name)
    squares = []
    for k in range(K):
        with condition(hyper, k):
            layers = generated_layers(hyper).values()
            total = sum(
                layer.generate(n).square().sum() for layer in layers for n in layer.generated
            )
            squares.append(float(total))
    with generated_l2(hyper) as l2, condition(hyper, 1):
        hyper(x)
    assert float(l2()) == pytest.approx(squares[1], rel=1e-4)
    with generated_l2(hyper) as l2:
        outputs(hyper, x)
        assert float(l2()) == pytest.approx(sum(squares), rel=1e-4)
        l2().backward()
    assert all(p.grad is not None for p in hyper.hypernet.parameters())


def test_nothing_of_other_networks_is_decayed():
    _, hyper, _ = made("private")
    decayed, free = param_groups(hyper, 0.1)
    assert {id(p) for p in decayed["params"]} == set()  # but for these all is generated
    assert len(free["params"]) == len(list(hyper.parameters()))
    _, hyper, _ = made("small")
    decayed, _ = param_groups(hyper, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(hyper.fc.weight)]


@pytest.mark.parametrize("name", ["small", "channels", "private", "lstm", "timm"])
@pytest.mark.parametrize("dtype", [None, torch.float16, "int8"])
def test_files_hold_all_networks_and_give_one(name, dtype, tmp_path):
    model, hyper, x = made(name)
    written = save(hyper, tmp_path / "all.safetensors", dtype=dtype)
    again = load(model, written.path).eval()
    assert again.hypernet.plan == hyper.hypernet.plan
    for k in range(K):
        with condition(again, k):
            y = again(x)
        if dtype == "int8":
            with condition(hyper, k), quantized(hyper, 8):
                assert close(hyper(x), y)
        elif dtype is None:
            with condition(hyper, k):
                assert torch.equal(hyper(x), y)
        one = load(model, written.path, condition=k).eval()
        assert torch.equal(one(x), y)
        save(one, tmp_path / "one.safetensors")
        assert torch.equal(load(model, tmp_path / "one.safetensors").eval()(x), y)
    assert set(written.errors) >= ({"body.weight"} if dtype and name == "small" else set())
    with pytest.raises(ConditionError, match="0 to 2"):
        load(model, written.path, condition=3)


def test_a_file_and_a_folder_name_the_model_of_timm(tmp_path):
    _, hyper, x = made("timm", private="fc")
    written = save(hyper, tmp_path / "all.safetensors")
    assert written.recorded == "test_resnet"
    hz.save_pretrained(hyper, tmp_path / "folder")
    again = (hz.load_timm(written.path), hz.from_pretrained(tmp_path / "folder"))
    for model in again:
        for k, y in enumerate(outputs(hyper, x)):
            with condition(model.eval(), k):
                assert torch.equal(model(x), y)
    with pytest.raises(ConditionError, match="at_condition"):
        hz.save_pretrained(hyper, tmp_path / "dense", dense=True)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("name", ["small", "channels", "private", "lstm"])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_further_network_leaves_the_others_alone(name, dtype, tmp_path):
    model, hyper, x = made(name)
    save(hyper, tmp_path / "three.safetensors", dtype=dtype)
    hyper = load(model, tmp_path / "three.safetensors").eval()
    wanted = [y.detach() for y in outputs(hyper, x)]
    longer = add_condition(hyper, like=2)
    assert not any(p.requires_grad for p in longer.hypernet.parameters())
    with condition(longer, 0):
        longer(x).square().sum().backward()  # of a network that is to stay
    assert not any(p.grad.any() for p in longer.parameters() if p.grad is not None)
    longer.zero_grad()
    with condition(longer.eval(), 3):
        assert torch.equal(longer(x), wanted[2])
    optimizer = torch.optim.AdamW(param_groups(longer.train(), 0.1), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        with condition(longer, 3), generated_l2(longer) as l2:
            loss = longer(x).square().mean() + 1e-3 * l2()
        loss.backward()
        optimizer.step()
    with condition(longer.eval(), 3):
        trained = longer(x).detach()
    assert not close(trained, wanted[2], 1e-2)
    save(longer, tmp_path / "four.safetensors", dtype=dtype)
    again = load(model, tmp_path / "four.safetensors").eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, x), wanted, strict=True))
    with condition(again, 3):
        assert close(again(x), trained, 0.1 if dtype else 0)  # rounded to 8 bits
    with pytest.raises(ConditionError, match="none was given"):
        hyper(x)  # which is as it was
    with pytest.raises(ConditionError, match="0 to 2"):
        add_condition(hyper, like=3)


@pytest.mark.parametrize("name", ["small", "channels", "lstm", "transposed"])
def test_one_network_alone_is_a_hyperized_model_like_any(name, tmp_path):
    _, hyper, x = made(name)
    for k in range(K):
        one = at_condition(hyper, k)
        with condition(hyper, k):
            assert torch.equal(one(x), hyper(x))
        assert count(one) == one.hypernet.plan.total_hyper_params == report(one).total_hyper_params
        assert not private_layers(one)
        assert torch.equal(to_dense(one)(x), one(x))
        assert close(hz.as_graph(one)(x), one(x))
    with pytest.raises(ConditionError, match="as_graph"):
        hz.as_graph(hyper)
    with pytest.raises(ConditionError, match="no conditions"):
        at_condition(one, 0)


def test_parts_with_and_without_conditions_live_in_one_model():
    torch.manual_seed(0)
    parts = [randomise(Small()).eval() for _ in range(3)]
    model = nn.ModuleDict(
        {
            "two": hyperize(parts[0], conditions=2, compression=3, seed=0),
            "three": hyperize(parts[1], conditions=3, compression=3, seed=0),
            "one": hyperize(parts[2], compression=3, seed=0),
        }
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    with condition(model, 1):
        wanted = {name: part(x) for name, part in model.items()}
    alone, longer = at_condition(model, 1), add_condition(model, like=1)
    for name, part in alone.items():
        assert torch.equal(part(x), wanted[name])
        assert count(part) == part.hypernet.plan.total_hyper_params
    for name, last in (("two", 2), ("three", 3)):
        with condition(longer[name], last):
            assert torch.equal(longer[name](x), wanted[name])
        assert count(longer[name]) == longer[name].hypernet.plan.total_hyper_params
    assert torch.equal(longer["one"](x), wanted["one"])
    with pytest.raises(ConditionError, match="0 to 1"), condition(model, 2):
        pass


@pytest.mark.long
def test_onnx_is_of_one_network(tmp_path):
    _, hyper, x = made("small")
    for dense in (True, False):
        written = hz.export_onnx(hyper, tmp_path / "one.onnx", x, dense=dense, condition=1)
        assert written.max_error <= ROUNDING
    with pytest.raises(ConditionError, match="condition=k"):
        hz.export_onnx(hyper, tmp_path / "two.onnx", x)
    assert not (tmp_path / "two.onnx").exists()


@pytest.mark.parametrize("options", [{}, {"embeddings": "channel"}, {"embeddings": "separable"}])
@pytest.mark.parametrize("with_data", [False, True])
def test_fitting_takes_a_teacher_for_each_network(options, with_data):
    teachers = []
    for seed in range(K):
        torch.manual_seed(seed)
        teachers.append(randomise(Small()).eval())
    hyper = hyperize(teachers[0], conditions=K, compression=2, private="fc", seed=0, **options)
    data = [torch.randn(16, 3, 8, 8) for _ in range(4)] if with_data else None
    fitted = fit_(hyper.eval(), teachers, data=data)
    assert len(fitted.sites) == K * len(generated_layers(hyper))
    for k, teacher in enumerate(teachers):
        dense = to_dense(hyper, condition=k)
        assert torch.equal(dense.fc.weight, teacher.fc.weight)
        assert torch.equal(dense.gn.weight, teacher.gn.weight)
        assert torch.equal(dense.body.bias, teacher.body.bias)
        assert torch.equal(dense.bn.running_mean, teacher.bn.running_mean) != with_data
        for path in generated_layers(hyper):
            weight = dense.get_submodule(path).weight
            others = [other.get_submodule(path).weight for other in teachers]
            distances = [float((weight - other).detach().norm()) for other in others]
            assert distances[k] < 0.9 * min(d for at, d in enumerate(distances) if at != k)
    with pytest.raises(ModelError, match="a list of 3"):
        fit_(hyper, teachers[:2])
    with pytest.raises(ModelError, match="a list of 3"):
        fit_(hyper, teachers[0])
    with pytest.raises(ModelError, match="one teacher"):
        fit_(at_condition(hyper, 0), teachers)
    other = randomise(Small(24))
    kept = {key: t.clone() for key, t in hyper.state_dict().items()}
    with pytest.raises(ModelError, match="shape"):
        fit_(hyper, [teachers[0], other, teachers[2]])
    assert all(torch.equal(t, kept[key]) for key, t in hyper.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"embeddings": "channel"}])
def test_networks_that_such_a_generator_made_are_found_again(options):
    model, made_of, x = made("small", private="fc", **options)
    teachers = [to_dense(made_of, condition=k) for k in range(K)]
    hyper = hyperize(model, made_of.hypernet.plan).eval()
    with torch.no_grad():
        for table in hyper.parameters():
            table.normal_()
    fitted = fit_(hyper, teachers, sweeps=500, tolerance=0.0)
    assert fitted.error < FITTED
    for k, teacher in enumerate(teachers):
        with condition(hyper, k):
            # Sums of products of three factors have more ways to be wrong
            assert close(hyper(x), teacher(x), (30 if options else 1) * FITTED)


def test_rounding_treats_each_embedding_by_itself(tmp_path):
    _, hyper, _ = made("small")
    with torch.no_grad():  # the networks have embeddings of different sizes
        for layer in generated_layers(hyper).values():
            layer.embedding("weight")[0] *= 1000
    written = save(hyper, tmp_path / "f.safetensors", dtype="int8")
    assert max(written.errors.values()) < 0.02
    with safe_open(written.path, "pt") as file:
        z = hyper.body.embedding("weight")
        assert file.get_tensor("body.weight:step").shape == (z.shape[0] * z.shape[1],)


def test_a_page_shows_how_alike_the_networks_are(tmp_path):
    _, hyper, _ = made("small")
    with torch.no_grad():
        for layer in generated_layers(hyper).values():
            z = layer.embedding("weight")
            z[2] = z[0]
            layer.all_constants("weight")[2] = 2 * layer.all_constants("weight")[0]
    report(hyper).to_html(tmp_path / "new.html")
    assert 'id="networks"' not in (tmp_path / "new.html").read_text()  # nothing is trained yet
    with torch.no_grad():
        for head in hyper.hypernet.heads.values():
            head.bias.add_(1e-6)
    found = report(hyper)
    found.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "networks: 3" in text
    table = text[text.index('id="networks"') : text.index("</table>", text.index('id="networks"'))]
    cells = [float(cell) for cell in re.findall(r">(-?[0-9.]+)</td>", table)]
    assert len(cells) == 9
    assert cells[2] == cells[6] == 1
    assert abs(cells[1]) < 0.3
    report(at_condition(hyper, 0)).to_html(tmp_path / "one.html")
    assert 'id="networks"' not in (tmp_path / "one.html").read_text()
    to_dense(hyper, condition=0, inplace=True)
    found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == text  # as it was when the report was made


def test_training_works_for_each_network():
    _, hyper, x = made("timm", private="fc", share=True)
    hyper.train()
    optimizer = torch.optim.AdamW(param_groups(hyper, 0.0), 3e-3)
    x, labels = torch.randn(8, 3, 32, 32), torch.randint(5, (K, 8))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        total = 0
        for k in range(K):
            with condition(hyper, k):
                total = total + F.cross_entropy(hyper(x), labels[k])
        total.backward()
        optimizer.step()
        losses.append(float(total))
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------------------------------- refusals


def test_what_is_no_condition_is_refused():
    _, hyper, _ = made("small")
    bad = (3, -1, True, 0.5, None, "0", [], [[0]], torch.tensor(0.0), torch.tensor([3]), object())
    for given in bad:
        with pytest.raises(ConditionError, match="0 to 2"), condition(hyper, given):
            pass
    _, hyper, _ = made("small", conditions=None, condition_dim=2)
    for given in (1, [1.0], [1.0, 2.0, 3.0], "ab", torch.zeros(2, 2, 2), None, [True, "x"]):
        with pytest.raises(ConditionError, match="vectors of 2 numbers"), condition(hyper, given):
            pass
    model = Small()
    plain = hyperize(model, compression=3)
    for other in (model, plain):
        with pytest.raises(ConditionError, match="has no conditions"), condition(other, 0):
            pass
    with pytest.raises(ModelError), condition("model", 0):
        pass
    with pytest.raises(ConditionError, match="vectors"):
        add_condition(hyper)
    with pytest.raises(ModelError, match="vector"):
        fit_(hyper, [model, model])


def test_requests_that_make_no_sense_are_refused():
    model = Small()
    before = [type(m) for m in model.modules()]
    for options, words in (
        ({"conditions": 0}, "conditions must be a positive integer"),
        ({"conditions": True}, "conditions must be a positive integer"),
        ({"conditions": 2.0}, "conditions must be a positive integer"),
        ({"condition_dim": 0}, "condition_dim must be a positive integer"),
        ({"conditions": 2, "condition_dim": 2}, "one of the two"),
        ({"private": "fc"}, "pass conditions=K"),
        ({"private": "fc", "condition_dim": 2}, "pass conditions=K"),
        ({"conditions": 2, "private": "fcs"}, "matches no module; near misses: fc"),
        ({"share": True}, "share says"),
        ({"conditions": 2, "share": 1}, "share says"),
    ):
        with pytest.raises(ConfigError, match=words):
            hyperize(model, compression=3, **options)
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ConfigError, match="dynamic"):
        hyperize(CRNN(), conditions=2, lstm="dynamic")
    with pytest.raises(ConfigError, match="make all layers dense"):
        to_dense(made("small")[1], include="body", condition=0)
    tied = Small()
    tied.bn2.weight = tied.gn.weight
    with pytest.raises(ModelError, match="tied"):
        hyperize(tied, conditions=2, compression=3)
