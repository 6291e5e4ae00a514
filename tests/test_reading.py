"""A generated weight in the hands of a reader: reading works, writing says what to do instead."""

import contextlib
import copy
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from models import CRNN, Convolutions, Stage
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode

from hyperize import HyperizeError, WeightError, hyperize, to_dense
from hyperize.layers import Generated
from hyperize.parts import generated_layers
from hyperize.reading import GeneratedWeight

MERGED = 1e-5
"""Of outputs near 1 in float32: W x + B A x against (W + B A) x, or attention in two orders."""


class Net(nn.Module):
    """A convolution, two linear layers and an LSTM, large enough to be generated."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3)
        self.linear = nn.Linear(64, 64)
        self.twin = nn.Linear(64, 64)
        self.plain = nn.Linear(64, 64)
        self.lstm = nn.LSTM(64, 32)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.lstm(self.plain(self.twin(self.linear(x))))[0]


def make():
    options = {"targets": ("conv2d", "linear", "lstm"), "exclude": "plain"}
    hyper = hyperize(Net(), compression=3, seed=0, **options).eval()
    assert list(generated_layers(hyper)) == ["conv", "linear", "twin", "lstm"]
    return hyper


X = torch.randn(2, 32, 3, 3, generator=torch.Generator().manual_seed(0))

WEIGHTS = {
    "conv": lambda hyper: hyper.conv.weight,
    "linear": lambda hyper: hyper.linear.weight,
    "lstm": lambda hyper: hyper.lstm.weight_hh_l0,
    "all-weights": lambda hyper: hyper.lstm.all_weights[0][0],
}


def _statement(text):
    return lambda w: exec(text, {"torch": torch}, {"w": w})


init = nn.init
T = torch.Tensor

WRITES = {
    # torch.nn.init
    "normal_": init.normal_,
    "uniform_": init.uniform_,
    "trunc_normal_": init.trunc_normal_,
    "xavier_uniform_": init.xavier_uniform_,
    "xavier_normal_": init.xavier_normal_,
    "kaiming_uniform_": init.kaiming_uniform_,
    "kaiming_normal_": init.kaiming_normal_,
    "orthogonal_": init.orthogonal_,
    "zeros_": init.zeros_,
    "ones_": init.ones_,
    "constant_": lambda w: init.constant_(w, 1.0),
    "by-keyword": lambda w: init.normal_(tensor=w),
    # .data
    "data.mul_": lambda w: w.data.mul_(2),
    "data.clamp_": lambda w: w.data.clamp_(-1e-3, 1e-3),
    "data.copy_": lambda w: w.data.copy_(torch.zeros_like(w)),
    "data.fill_": lambda w: w.data.fill_(7),
    "data =": _statement("w.data = torch.zeros_like(w)"),
    "data *=": _statement("w.data *= 2"),
    "data[0] =": _statement("w.data[0] = 0"),
    "detach().zero_": lambda w: w.detach().zero_(),
    # in place
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "add_": lambda w: w.add_(1),
    "clamp_": lambda w: w.clamp_(0, 1),
    "clamp_min_": lambda w: w.clamp_min_(0),
    "fill_": lambda w: w.fill_(1),
    "zero_": T.zero_,
    "lerp_": lambda w: w.lerp_(torch.zeros_like(w), 0.5),
    "addcmul_": lambda w: w.addcmul_(torch.ones_like(w), torch.ones_like(w)),
    "masked_fill_": lambda w: w.masked_fill_(w > 0, 0.0),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([0]), 0.0),
    "renorm_": lambda w: w.renorm_(2, 0, 0.1),
    "bernoulli_": lambda w: w.bernoulli_(0.5),
    "set_": lambda w: w.set_(torch.zeros(2)),
    "resize_": lambda w: w.resize_(1),
    "detach_": lambda w: w.detach_(),
    "[0] =": _statement("w[0] = 0"),
    "[..., 0] =": _statement("w[..., 0] = 0"),
    "+=": _statement("w += 1"),
    "-=": _statement("w -= 1"),
    "*=": _statement("w *= 2"),
    "/=": _statement("w /= 2"),
    "**=": _statement("w **= 2"),
    # functions
    "torch.clamp_": lambda w: torch.clamp_(w, 0, 1),
    "torch.relu_": torch.relu_,
    "out=": lambda w: torch.mul(w, 2, out=w),
    "out=data": lambda w: torch.mul(w, 2, out=w.data),
    "_foreach_mul_": lambda w: torch._foreach_mul_([w], 2.0),
    "_foreach_copy_": lambda w: torch._foreach_copy_([w], [torch.ones_like(w)]),
    "aten.mul_": lambda w: torch.ops.aten.mul_(w, 2),
    "aten.zero_.default": lambda w: torch.ops.aten.zero_.default(w),
    "relu(inplace=True)": lambda w: F.relu(w, inplace=True),
    "dropout(inplace=True)": lambda w: F.dropout(w, 0.5, True, inplace=True),
    "nn.ReLU(inplace=True)": lambda w: nn.ReLU(inplace=True)(w),
    # views
    "view": lambda w: w.view(-1).zero_(),
    "view of data": lambda w: w.view(-1).data.zero_(),
    "transposed": lambda w: w.flatten(1).t().fill_(1),
    "select": lambda w: w.select(0, 0).fill_(1),
    "slice": lambda w: w[0].zero_(),
    "narrow": lambda w: w.narrow(0, 0, 1).zero_(),
    "unbind": lambda w: w.unbind(0)[0].zero_(),
    "chunk": lambda w: w.chunk(2)[0].zero_(),
    "split": lambda w: w.split(2)[1].zero_(),
    "iteration": lambda w: [row.zero_() for row in w],
    "diagonal": lambda w: w.flatten(1).diagonal().zero_(),
    "as_strided": lambda w: w.as_strided((1,), (1,)).zero_(),
    "expand": lambda w: w[None].expand(2, *w.shape)[0].zero_(),
    "contiguous": lambda w: w.contiguous().zero_(),
    "float": lambda w: w.float().zero_(),
    "cpu": lambda w: w.cpu().zero_(),
    # what hangs on a parameter
    "register_hook": lambda w: w.register_hook(lambda grad: grad * 0),
    "post_accumulate": lambda w: w.register_post_accumulate_grad_hook(lambda p: None),
    "retain_grad": T.retain_grad,
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad =": _statement("w.requires_grad = False"),
    "grad": lambda w: w.grad,
    "grad =": _statement("w.grad = torch.zeros_like(w)"),
    "share_memory_": T.share_memory_,
    "nn.Parameter(data)": lambda w: nn.Parameter(w.data).data.zero_(),
    # tools
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w]),
    "clip_grad_norm_": lambda w: nn.utils.clip_grad_norm_([w], 1.0),
    "SGD": lambda w: torch.optim.SGD([w], 0.1),
    "AdamW": lambda w: torch.optim.AdamW([{"params": [w]}]),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_says_what_to_do_instead(write, which, gradients, hyper):
    before = {name: t.clone() for name, t in hyper.state_dict().items()}
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(WeightError, match=r"to_dense\(hyper, include=") as error,
    ):
        WRITES[write](WEIGHTS[which](hyper))
    assert "weight" in str(error.value)
    state = hyper.state_dict()
    assert all(torch.equal(state[name], t) for name, t in before.items())
    assert all(p.requires_grad and p.grad is None for p in hyper.parameters())


@pytest.fixture(scope="module")
def hyper():
    torch.manual_seed(0)
    return make()


READS = {
    "sum": lambda w: w.sum(),
    "norm": lambda w: torch.linalg.vector_norm(w),
    "product": lambda w: w * 2 + 1,
    "matmul": lambda w: w.flatten(1) @ w.flatten(1).t(),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w.flatten(1), w.flatten(1)),
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "max": lambda w: w.flatten(1).max(1).values,
    "topk": lambda w: w.flatten().topk(3)[0],
    "where": lambda w: torch.where(w > 0, w, 0),
    "clone": lambda w: w.clone(),
    "cast": lambda w: w.double(),
    "abs": abs,
    "linear": lambda w: F.linear(torch.ones(1, w[0].numel()), w.flatten(1)),
    "mean-std": lambda w: torch.stack(torch.std_mean(w)),
    "argsort": lambda w: w.flatten().argsort(),
}
VIEWS = {
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "view": lambda w: w.view(-1),
    "item": lambda w: w[0],
    "transposed": lambda w: w.flatten(1).t(),
    "contiguous": lambda w: w.contiguous(),
}


@pytest.mark.parametrize("which", WEIGHTS)
def test_reading_gives_plain_tensors_of_equal_values(which, hyper):
    dense = to_dense(hyper)
    for read, function in READS.items():
        got = function(WEIGHTS[which](hyper))
        assert type(got) is torch.Tensor, read
        assert torch.equal(got, function(WEIGHTS[which](dense).data)), read


@pytest.mark.parametrize("which", WEIGHTS)
def test_views_are_guarded_and_equal(which, hyper):
    dense = to_dense(hyper)
    for read, function in VIEWS.items():
        got = function(WEIGHTS[which](hyper))
        assert type(got) is GeneratedWeight, read
        assert torch.equal(got, function(WEIGHTS[which](dense))), read


def test_a_read_weight_looks_like_the_dense_one(hyper):
    weight, dense = hyper.linear.weight, to_dense(hyper).linear.weight
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "itemsize"):
        assert getattr(weight, name) == getattr(dense, name), name
    assert len(weight) == len(dense)
    assert weight.stride() == dense.stride()
    assert weight.tolist() == dense.tolist()
    assert (weight.detach().numpy() == dense.detach().numpy()).all()
    assert isinstance(weight, nn.Parameter)
    assert {weight: 1}
    assert "tensor" in repr(weight)
    assert f"{weight.mean():.6f}" == f"{dense.mean():.6f}"


def test_a_read_weight_is_saved_as_a_plain_tensor(hyper):
    weight = hyper.linear.weight
    for copied in (
        pickle.loads(pickle.dumps(weight.detach())),
        copy.deepcopy(weight.detach()),
        safetensors.torch.load(safetensors.torch.save({"w": weight}))["w"],
    ):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, weight)


def test_a_read_weight_fills_a_dense_layer(hyper):
    weight = hyper.linear.weight
    layer = nn.Linear(64, 64)
    layer.load_state_dict({"weight": weight, "bias": hyper.linear.bias})
    assert torch.equal(layer.weight, weight)
    with torch.no_grad():
        nn.Linear(64, 64).weight.copy_(weight)
    layer.weight = nn.Parameter(weight.detach().clone())
    assert type(layer.weight) is nn.Parameter
    assert type(layer.weight.data) is torch.Tensor


def test_gradients_of_what_was_read(hyper):
    weight = hyper.linear.weight
    x = torch.randn(3, 64)
    (grad,) = torch.autograd.grad(F.linear(x, weight).sum(), weight)
    assert torch.allclose(grad, x.sum(0).expand(64, 64))
    for allow in (True, False):
        with pytest.raises(WeightError, match="graph does not hold"):
            torch.autograd.grad(hyper(X).sum(), weight, allow_unused=allow)
    copied = copy.deepcopy(hyper)
    copied.linear.weight.square().sum().backward()
    assert copied.linear.weight_embedding.grad.any()


# --------------------------------------------------------------- plain tensors where they belong


class Watch(TorchFunctionMode):
    """Notes every operation that is given a guarded weight."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        values += [v for value in values if isinstance(value, (list, tuple)) for v in value]
        if any(isinstance(value, GeneratedWeight) for value in values):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


MODELS = {
    "net": (make, X),
    "convolutions": (lambda: hyperize(Convolutions(), seed=0).eval(), torch.randn(1, 3, 24, 24)),
    "factorized": (
        lambda: hyperize(Convolutions(), seed=0, factorized=True, embeddings="channel").eval(),
        torch.randn(1, 3, 24, 24),
    ),
    "recompute": (
        lambda: hyperize(Stage(), seed=0, recompute=True).eval(),
        torch.randn(1, 3, 8, 8),
    ),
    "crnn": (lambda: hyperize(CRNN(), seed=0).eval(), torch.randn(1, 1, 8, 16)),
    "attention": (
        lambda: hyperize(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0.0), 2
            ),
            targets=("linear", "attention"),
            seed=0,
        ).eval(),
        torch.randn(2, 5, 64),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_passes_see_plain_tensors(name):
    model, x = MODELS[name][0](), MODELS[name][1]
    for context in (
        contextlib.nullcontext(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with context, Watch() as watch:
            model(x)
        assert watch.seen == []
    with Watch() as watch:
        model.train()(x).sum().backward()
    assert watch.seen == []
    with Watch() as watch:
        read = next(iter(generated_layers(model).values()))
        getattr(read, read.generated[0]).sum()
    assert watch.seen  # otherwise this shows nothing


def test_kernels_are_called_with_plain_tensors(monkeypatch):
    seen = []

    def note(name, function):
        def called(*args, **kwargs):
            seen.append((name, {type(a) for a in args if isinstance(a, torch.Tensor)}))
            return function(*args, **kwargs)

        return called

    for owner, name in ((F, "conv2d"), (F, "linear"), (torch._VF, "lstm")):
        monkeypatch.setattr(owner, name, note(name, getattr(owner, name)))
    make()(X)
    assert {name for name, _ in seen} >= {"conv2d", "linear"}
    assert all(types <= {torch.Tensor, nn.Parameter} for _, types in seen)


@pytest.mark.parametrize("name", ["net", "convolutions", "attention"])
def test_transforms_and_exports_see_plain_tensors(name):
    model, x = MODELS[name][0](), MODELS[name][1]
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x), model(x), rtol=MERGED, atol=MERGED)
    params = {key: p.detach() for key, p in model.named_parameters()}

    def loss(params):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    with Watch() as watch:
        grads = torch.func.grad(loss)(params)
    assert watch.seen == []
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("gradients", [True, False])
def test_the_fast_path_of_transformers_is_taken(gradients, monkeypatch):
    model, x = MODELS["attention"][0](), MODELS["attention"][1]
    dense = to_dense(model)
    calls = []
    fast = torch._transformer_encoder_layer_fwd

    def counted(*args, **kwargs):
        calls.append({type(a) for a in args if isinstance(a, torch.Tensor)})
        return fast(*args, **kwargs)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    with torch.set_grad_enabled(gradients):
        expected = dense(x)
        number = len(calls)
        assert number == (0 if gradients else 2)
        assert torch.equal(model(x), expected)
    assert len(calls) == 2 * number
    assert all(GeneratedWeight not in types for types in calls)


# ----------------------------------------------------------------- what would replace the weight


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


REPLACING = {
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "random_unstructured": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
    "identity": lambda m: prune.identity(m, "weight"),
    "custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones(1)),
    "global_unstructured": lambda m: prune.global_unstructured(
        [(m, "weight")], prune.L1Unstructured, amount=0.5
    ),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Double()),
    "deleted": lambda m: delattr(m, "weight"),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(64, 64))),
    "tensor": lambda m: setattr(m, "weight", torch.zeros(64, 64)),
    "none": lambda m: setattr(m, "weight", None),
    "register_parameter": lambda m: m.register_parameter("weight", nn.Parameter(torch.zeros(2))),
    "register_none": lambda m: m.register_parameter("weight", None),
    "reset_parameters": lambda m: m.reset_parameters(),
    "shared": lambda m: setattr(m, "weight", make().twin.weight),
    "shared with a dense layer": lambda m: setattr(m, "weight", nn.Linear(64, 64).weight),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("layer", ["conv", "linear"])
@pytest.mark.parametrize("replace", REPLACING)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_replaces_a_weight_is_refused_and_leaves_the_layer_whole(replace, layer, gradients):
    hyper = make()
    target = hyper.get_submodule(layer)
    fields = set(vars(target)) - {"_runs_again"}
    state, output = hyper.state_dict(), hyper(X)
    before = {name: t.clone() for name, t in state.items()}
    with torch.set_grad_enabled(gradients), pytest.raises(HyperizeError):
        REPLACING[replace](target)
    assert list(hyper.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in hyper.state_dict().items())
    assert set(vars(target)) - {"_runs_again"} == fields
    assert not target._forward_pre_hooks
    assert isinstance(target, Generated)
    assert torch.equal(hyper(X), output)
    assert torch.equal(copy.deepcopy(hyper)(X), output)


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
def test_a_dense_layer_cannot_share_a_generated_weight(gradients):
    """It would keep the tensor that was read then, and go on without the generator."""
    hyper = make()
    with torch.set_grad_enabled(gradients), pytest.raises((HyperizeError, ValueError)):
        hyper.plain.weight = hyper.linear.weight
    assert type(hyper.plain.weight) is nn.Parameter


def test_a_layer_makes_another_of_its_class():
    """As PEFT's LoRA and converters do, by `type(layer)(...)`: a dense one, with these sizes."""
    hyper = make()
    made = type(hyper.conv)(3, 8, 5)
    assert type(made) is nn.Conv2d
    assert made.weight.shape == (8, 3, 5, 5)


# ---------------------------------------------------------------------------- loops over a model


def test_loops_over_linear_layers_leave_the_generator_alone():
    hyper = hyperize(Net(), compression=3, seed=0, exclude=["linear", "twin", "plain"])
    before = weights_of(hyper)
    linear = [m for m in hyper.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 3
    for module in linear:
        nn.init.normal_(module.weight)
        parametrizations.spectral_norm(module)
        prune.l1_unstructured(module, "bias", 0.5)
    for module in hyper.modules():
        if not isinstance(module, Generated) and hasattr(module, "reset_parameters"):
            assert isinstance(module, nn.Linear)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(hyper), before, strict=True))


@pytest.mark.parametrize(
    "loop",
    [
        lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None,
        lambda m: nn.init.kaiming_normal_(m.weight) if isinstance(m, nn.Conv2d) else None,
        lambda m: m.reset_parameters() if isinstance(m, (nn.Conv2d, nn.Linear)) else None,
        lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None,
    ],
    ids=["linear", "conv", "reset", "reset-by-name"],
)
def test_initialisers_of_a_whole_model_are_refused(loop):
    hyper = make()
    before = weights_of(hyper)
    with pytest.raises(WeightError, match="prepare the dense model before"):
        hyper.apply(loop)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(hyper), before, strict=True))


def test_vectors_of_all_parameters():
    hyper = make()
    output = hyper(X)
    vector = nn.utils.parameters_to_vector(hyper.parameters())
    nn.utils.vector_to_parameters(vector * 1.1, hyper.parameters())
    assert not torch.equal(hyper(X), output)
    nn.utils.vector_to_parameters(vector, hyper.parameters())
    assert torch.equal(hyper(X), output)


# ------------------------------------------------------------------------------------------ PEFT

ADAPTERS = {
    "lora": ("LoraConfig", {"init_lora_weights": False}),
    "dora": ("LoraConfig", {"init_lora_weights": False, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}),
    "loha": ("LoHaConfig", {"init_weights": False}),
}


@pytest.mark.parametrize("layers", [["conv"], ["linear"], ["conv", "linear"]], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_run_on_generated_layers_and_are_not_merged_into_them(adapter, layers):
    peft = pytest.importorskip("peft")
    kind, options = ADAPTERS[adapter]
    hyper = make()
    plain, expected = hyper(X), weights_of(hyper)
    adapted = peft.get_peft_model(
        hyper, getattr(peft, kind)(target_modules=layers, **options)
    ).eval()
    output = adapted(X)
    assert not torch.equal(output, plain)
    adapted(X).sum().backward()
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert not any("hypernet" in name for name in trained)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(HyperizeError):
            merge()
        assert torch.equal(adapted(X), output)
    adapted.unmerge_adapter()  # nothing was merged
    assert torch.equal(adapted(X), output)
    now = weights_of(adapted.get_base_model())
    assert all(torch.equal(a, b) for a, b in zip(now, expected, strict=True))


def test_adapters_are_merged_into_a_layer_made_dense():
    peft = pytest.importorskip("peft")
    partly = to_dense(make(), include="linear")
    config = peft.LoraConfig(target_modules=["linear"], init_lora_weights=False)
    adapted = peft.get_peft_model(partly, config).eval()
    output = adapted(X)
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(X), output, rtol=MERGED, atol=MERGED)


def weights_of(model):
    return [
        layer.generate(name).detach()
        for layer in generated_layers(model).values()
        for name in layer.generated
    ]
