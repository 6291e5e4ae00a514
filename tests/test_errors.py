"""Bad input: a typed error that says what to do, and the model as it was."""

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from models import CRNN, Convolutions, Stage, Uncopyable, count
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.nn.utils.parametrizations import weight_norm as weight_norm_parametrization

import hyperize as package
from hyperize import (
    BudgetError,
    ConfigError,
    HyperConfig,
    HyperizeError,
    HyperMuon,
    LayerSpec,
    ModelError,
    as_graph,
    dense_state_dict,
    hyperize,
    load,
    make_plan,
    register_layer,
    report,
    save,
    to_dense,
)
from hyperize.layers import Generated

INVERSE = [to_dense, dense_state_dict, report, as_graph, lambda m: save(m, "never-written")]
INVERSE_NAMES = ["to_dense", "dense_state_dict", "report", "as_graph", "save"]


class Unharmed:
    """Holds a model's values, keys, classes and flags; `check` compares the model with them."""

    def __init__(self, model):
        self.model = model
        self.state = {name: t.clone() for name, t in model.state_dict().items()}
        self.classes = [(path, type(m), m.training) for path, m in model.named_modules()]
        self.ids = [id(t) for t in (*model.parameters(), *model.buffers())]

    def check(self):
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for name, tensor in state.items():
            assert tensor.is_meta or torch.allclose(
                tensor, self.state[name], rtol=0, atol=0, equal_nan=True
            ), name
        found = [(path, type(m), m.training) for path, m in self.model.named_modules()]
        assert found == self.classes
        assert [id(t) for t in (*self.model.parameters(), *self.model.buffers())] == self.ids


def refused(model, error, *words, plan=True, **options):
    """Every way in refuses the model with this error and these words, and leaves it as it was."""
    before = Unharmed(model)
    calls = [lambda: hyperize(model, **options), lambda: hyperize(model, inplace=True, **options)]
    if plan:
        calls.append(lambda: make_plan(model, **options))
    for call in calls:
        with pytest.raises(HyperizeError) as refusal:
            call()
        assert type(refusal.value) is error
        for word in words:
            assert word in str(refusal.value)
        before.check()


def lazy(model):
    return any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())


# ------------------------------------------------------------------------------------ the classes


def test_errors_are_caught_by_their_plain_kinds_too():
    for error in (ConfigError, BudgetError, ModelError, package.FileError):
        assert issubclass(error, HyperizeError)
        assert issubclass(error, ValueError)
    assert issubclass(ModelError, TypeError)


def test_errors_survive_pickling_between_processes():
    error = pickle.loads(pickle.dumps(BudgetError("too small")))
    assert (type(error), str(error)) == (BudgetError, "too small")


# ------------------------------------------------------------------------------------- the request


@pytest.mark.parametrize("model", [None, "resnet18", 3, Stage, {"a": nn.Conv2d(1, 1, 1)}])
def test_not_a_module(model):
    for call in (hyperize, make_plan, to_dense, dense_state_dict, report, as_graph):
        with pytest.raises(ModelError, match=r"Module, got") as refusal:
            call(model)
        assert type(model).__name__ in str(refusal.value)


@pytest.mark.parametrize("value", [0, 1, -1, math.nan, math.inf, -math.inf, "10", True])
def test_compression_that_is_no_compression(value):
    refused(Stage(), ConfigError, "compression", "above 1", repr(value), compression=value)


def test_compression_beyond_reach():
    refused(Stage(), BudgetError, "cannot be met", "reachable range", "1 to", compression=1e9)


@pytest.mark.parametrize("value", [0, -5, 1.5, "1M", True])
def test_max_params_that_is_no_number_of_parameters(value):
    refused(Stage(), ConfigError, "max_params", "positive integer", max_params=value)


def test_max_params_beyond_reach():
    refused(Stage(), BudgetError, "max_params=500", "this model can have", max_params=500)


def test_max_params_above_the_model():
    refused(
        Stage(), BudgetError, "no less than", "nothing would have to be saved", max_params=10**9
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compresion": 10}, ("compresion", "compression")),
        ({"targets": ("conv2",)}, ("unknown target", "did you mean 'conv2d'")),
        ({"targets": ("transformer",)}, ("unknown target", "conv2d", "lstm", "linear")),
        ({"include": ("conv9",)}, ("include", "matches no", "conv1")),
        ({"include": ("stm",)}, ("include", "stem")),
        ({"include": ("norm",)}, ("include", "matches no layer of kind")),
        ({"exclude": ("convv1",)}, ("exclude", "matches no module", "conv1")),
        ({"tile": (0, 4)}, ("tile", "positive")),
        ({"tile": {"5x5": (4, 4)}}, ("tile", "5x5", "3x3")),
        ({"embedding_dim": -1}, ("embedding_dim", "positive")),
        ({"hidden_dim": 2.0}, ("hidden_dim", "positive")),
        ({"seed": "x"}, ("seed", "integer")),
        ({"trunk_axis": 3}, ("trunk_axis", "0 or 1")),
        ({"config": {"compression": 3}}, ("config", "HyperConfig", "dict")),
        ({"exclude": ("*",)}, ("skipped", "excluded")),
    ],
    ids=str,
)
def test_options(options, words):
    refused(Stage(), ConfigError, *words, **options)


def test_include_and_exclude_that_leave_nothing():
    refused(Stage(), ConfigError, "excluded", include=("conv1",), exclude=("conv1",))


def test_no_targets_and_what_there_is_instead():
    model = nn.Sequential(nn.Linear(64, 64), nn.GRU(32, 32))
    words = ("no targets", "no conv2d or lstm layer", "1 linear", "1 gru", "'linear', 'gru'")
    refused(model, ConfigError, *words)


def test_no_targets_at_all():
    refused(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), ConfigError, "no targets")
    refused(nn.Sequential(), ConfigError, "no targets")


def test_everything_would_grow():
    refused(nn.Sequential(nn.Conv2d(1, 2, 1)), BudgetError, "grow")


def test_all_targets_frozen():
    refused(Stage().requires_grad_(False), ConfigError, "skipped", "frozen", "requires_grad=False")


def test_a_config_is_refused_where_it_is_made():
    with pytest.raises(ConfigError, match="compression"):
        HyperConfig(compression=1)


# --------------------------------------------------------------------------------------- the model


def test_hyperized_already():
    refused(hyperize(Stage(), compression=2), ModelError, "hyperized already", "to_dense")


def test_a_part_is_hyperized_already():
    model = nn.Sequential(hyperize(Stage(), compression=2), nn.Linear(10, 10))
    refused(model, ModelError, "'0.stem'", "hyperized already", "one by one", targets=("linear",))
    model[1] = hyperize(model[1], compression=2, targets="linear")  # as the error advises
    assert isinstance(model[1], Generated)


def test_attribute_hypernet_taken():
    model = Stage()
    model.hypernet = nn.Identity()
    refused(model, ModelError, "hypernet", "rename", compression=2)
    model = Stage()
    model.hypernet = "a string"
    refused(model, ModelError, "hypernet", "rename", compression=2)


def test_attribute_of_an_embedding_taken_is_skipped_with_the_reason():
    model = Stage()
    model.conv1.weight_embedding = torch.zeros(3)
    skips = {skip.path: skip.reason for skip in make_plan(model, compression=1.5).skips}
    assert "weight_embedding" in skips["conv1.weight"]
    assert not isinstance(hyperize(model, compression=1.5).conv1, Generated)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (nn.DataParallel, ("DataParallel", ".module")),
        (torch.compile, ("torch.compile", "first")),
        (lambda m: torch.jit.script(m.eval()), ("TorchScript", "scripting")),
    ],
    ids=["DataParallel", "compile", "script"],
)
def test_wrapped(wrap, words, deep):
    model = wrap(nn.Sequential(nn.Conv2d(32, 32, 3)))
    model = nn.Sequential(nn.Conv2d(3, 32, 3), model) if deep else model
    before = [(path, type(m)) for path, m in model.named_modules()]
    for call in (hyperize, make_plan):
        with pytest.raises(ModelError) as refusal:
            call(model, compression=2)
        for word in words:
            assert word in str(refusal.value)
    assert [(path, type(m)) for path, m in model.named_modules()] == before


@pytest.fixture
def _process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_wrapped_by_ddp():
    model = nn.parallel.DistributedDataParallel(Stage())
    refused(model, ModelError, "DistributedDataParallel", ".module", compression=2)


@pytest.mark.usefixtures("_process_group")
def test_a_hyper_model_inside_ddp_trains_and_is_refused_by_the_inverse():
    hyper = hyperize(Stage(), compression=2)
    wrapped = nn.parallel.DistributedDataParallel(hyper)
    wrapped(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in hyper.parameters())
    for call in INVERSE:
        with pytest.raises(ModelError, match="DistributedDataParallel"):
            call(wrapped)
    assert type(to_dense(wrapped.module)) is Stage


@pytest.mark.usefixtures("_process_group")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # FSDP: one process cannot shard
def test_wrapped_by_fsdp():
    model = FullyShardedDataParallel(Stage(), device_id=torch.device("cpu"))
    before = [(path, type(m)) for path, m in model.named_modules()]
    for call in (hyperize, make_plan):
        with pytest.raises(ModelError, match=r"FSDP.*first, then shard"):
            call(model, compression=2)
    assert [(path, type(m)) for path, m in model.named_modules()] == before


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("part", ["", "conv1"])
def test_sharded_by_fsdp2(part):
    model = Stage()
    fully_shard(model.get_submodule(part), mesh=init_device_mesh("cpu", (1,)))
    for call in (hyperize, make_plan):
        with pytest.raises(ModelError, match=r"FSDP2.*first, then shard"):
            call(model, compression=2)
    assert not any(isinstance(m, Generated) for m in model.modules())


@pytest.mark.usefixtures("_process_group")
def test_a_hyper_model_under_fsdp2_trains_and_is_refused_by_the_inverse():
    hyper = hyperize(Stage(), compression=2)
    expected = copy.deepcopy(hyper).eval()(x := torch.randn(2, 3, 8, 8))
    fully_shard(hyper, mesh=init_device_mesh("cpu", (1,)))
    output = hyper.eval()(x)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert all(p.grad is not None for p in hyper.parameters())
    for call in INVERSE:
        with pytest.raises(ModelError, match="FSDP2"):
            call(hyper)


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("part", ["", "conv1"])
def test_an_optimizer_of_whole_matrices_refuses_shards(part):
    hyper = hyperize(Stage(), compression=2)
    fully_shard(hyper.get_submodule(part), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ModelError, match="HyperMuon takes whole matrices"):
        HyperMuon(hyper)


@pytest.mark.usefixtures("_process_group")
def test_a_hyper_model_whose_generator_alone_is_sharded_is_refused_by_the_inverse():
    hyper = hyperize(Stage(), compression=2)
    fully_shard(hyper.hypernet, mesh=init_device_mesh("cpu", (1,)))
    for call in (to_dense, dense_state_dict, report):
        with pytest.raises(ModelError, match="sharded"):
            call(hyper)


@pytest.mark.parametrize("part", [False, True])
def test_lazy_modules(part):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.LazyConv2d(32, 3))
    model = model if part else model[1]
    for call in (hyperize, make_plan):
        with pytest.raises(ModelError, match=r"uninitialised lazy module.*forward pass"):
            call(model)
    assert lazy(model)


def test_a_lazy_head_is_refused_too():
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.LazyLinear(3))
    with pytest.raises(ModelError, match="lazy"):
        hyperize(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm is deprecated
@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        weight_norm_parametrization,
        spectral_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "weight_norm.P", "spectral_norm", "spectral_norm.P", "prune"],
)
def test_parametrized_layers(change):
    model = Stage()
    change(model.conv1)
    refused(model, ModelError, "conv1", "parametrized", 'exclude=("conv1",)', compression=1.5)
    # As the error advises; in place, because a layer that some of these changed cannot be copied
    hyper = hyperize(model, compression=1.5, exclude=("conv1",), inplace=True)
    assert isinstance(hyper.conv2, Generated)
    assert not isinstance(hyper.conv1, Generated)
    hyper(torch.randn(2, 3, 8, 8)).sum().backward()


def test_a_parametrized_recurrent_layer():
    model = CRNN()
    weight_norm_parametrization(model.lstm, "weight_hh_l0")
    refused(model, ModelError, "weight_hh_l0", "lstm", "parametrized", compression=1.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value):
    model = Stage()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = value
    refused(model, ModelError, "conv1.weight", "not finite", plan=False, compression=1.5)
    make_plan(model, compression=1.5)  # planning reads no weight


def test_layers_on_several_devices():
    model = Stage()
    model.conv1.to("meta")
    refused(model, ModelError, "several devices", "cpu", "meta", "include", compression=1.5)
    hyper = hyperize(model, compression=1.5, exclude=("conv1",))  # as the error advises
    assert hyper.conv1.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_dtypes_without_arithmetic(dtype):
    # Converted by hand, as .to() refuses whole numbers
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    if dtype.is_floating_point:
        for layer in model:
            layer.weight.requires_grad_(True)
    with pytest.raises(HyperizeError):
        hyperize(model, compression=1.5)


def test_a_model_that_cannot_be_copied():
    model = Uncopyable()
    before = Unharmed(model)
    with pytest.raises(ModelError, match=r"cannot be copied.*open file.*inplace=True"):
        hyperize(model, compression=2)
    before.check()
    hyper = hyperize(model, compression=2, inplace=True)  # as the error advises
    assert hyper is model
    with pytest.raises(ModelError, match=r"cannot be copied.*inplace=True"):
        to_dense(hyper)
    assert isinstance(hyper.conv, Generated)
    assert to_dense(hyper, inplace=True) is model
    assert type(model.conv) is nn.Conv2d


def test_a_tensor_subclass_is_skipped_with_the_reason():
    class Tagged(torch.Tensor):
        pass

    model = Stage()
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach().as_subclass(Tagged))
    skips = {skip.path: skip.reason for skip in make_plan(model, compression=1.5).skips}
    assert "Tagged" in skips["conv1.weight"]


# -------------------------------------------------------------------------------------- the inverse


@pytest.mark.parametrize("call", INVERSE, ids=INVERSE_NAMES)
def test_the_inverse_of_a_model_that_is_not_hyperized(call):
    model = Stage()
    before = Unharmed(model)
    with pytest.raises(ModelError, match=r"not hyperized.*hyperize"):
        call(model)
    before.check()


@pytest.mark.parametrize("call", INVERSE, ids=INVERSE_NAMES)
def test_the_inverse_of_a_part_without_generated_layers(call):
    hyper = hyperize(timm.create_model("test_resnet"), compression=4)
    before = Unharmed(hyper)
    with pytest.raises(ModelError, match=r"BatchNorm.*not hyperized.*part of it with generated"):
        call(hyper.layer2[0].bn1)
    before.check()


@pytest.mark.parametrize("call", INVERSE, ids=INVERSE_NAMES)
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_the_inverse_of_a_wrapped_model(call, wrap):
    hyper = hyperize(Stage(), compression=2)
    with pytest.raises(ModelError, match=r"wrapped by.*pass the model inside"):
        call(wrap(hyper))
    assert type(to_dense(hyper)) is Stage


def test_assignment_to_a_generated_weight():
    hyper = hyperize(Stage(), compression=2)
    before = Unharmed(hyper)
    for value in (nn.Parameter(torch.zeros(32, 32, 3, 3)), torch.zeros(32, 32, 3, 3), None):
        with pytest.raises(ModelError, match=r"weight_embedding.*to_dense"):
            hyper.conv1.weight = value
    with pytest.raises(ModelError, match=r"weight_embedding"):
        hyper.conv1.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match=r"weight_embedding.*to_dense"):
        del hyper.conv1.weight
    before.check()


def test_dense_weights_do_not_load_into_a_hyper_model():
    model = Stage()
    hyper = hyperize(model, compression=2)
    for whole, state in (
        (hyper, model.state_dict()),
        (copy.deepcopy(hyper), model.state_dict()),
        (nn.Sequential(hyper), nn.Sequential(model).state_dict()),
    ):
        before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(ModelError, match=r"stem\.weight.*fit_\(hyper, state_dict\)"):
                whole.load_state_dict({name: t + 1 for name, t in state.items()}, strict=strict)
        assert all(torch.equal(t, before[name]) for name, t in whole.state_dict().items())
    to_dense(hyper).load_state_dict(model.state_dict())
    hyper.load_state_dict(hyperize(model, compression=2, seed=3).state_dict())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("recompte", True, "did you mean 'recompute'"), ("recompute", 1, "True or False")],
)
def test_the_options_of_a_model_are_checked(name, value, words):
    hyper = hyperize(Stage(), compression=2)
    with pytest.raises(ConfigError, match=words):
        setattr(hyper.hypernet, name, value)
    hyper.hypernet.recompute = True
    assert copy.deepcopy(hyper).hypernet.recompute


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"compression": 10, "max_params": 500}, "pass one of the two"),
        ({"compresion": 3}, "did you mean 'compression'"),
        ({"targets": "conv"}, "did you mean 'conv2d', 'conv1d' or 'conv3d'"),
        ({"targets": [nn.Conv2d, nn.ReLU]}, "ReLU, which is not registered"),
        ({"targets": type("Own", (nn.Conv2d,), {})}, "'conv2d' is the kind of its base class"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_meant(request_, words):
    refused(Stage(), ConfigError, words, **request_)
    if "compression" in request_:
        with pytest.raises(ConfigError, match=words):
            HyperConfig(**request_)


def test_one_request_takes_the_place_of_the_other():
    config = HyperConfig(max_params=500).replace(compression=3)
    assert (config.compression, config.max_params) == (3, None)
    config = config.replace(max_params=500)
    assert (config.compression, config.max_params) == (None, 500)
    assert HyperConfig.from_json(config.to_json()) == config
    assert HyperConfig.from_json(HyperConfig().to_json()) == HyperConfig()


def test_targets_are_kinds_or_classes():
    chosen = HyperConfig(targets=[nn.Conv2d, "linear"]).targets
    assert chosen == ("conv2d", "linear")
    assert HyperConfig(targets=nn.LSTM).targets == ("lstm",)


def test_a_report_after_the_head_was_replaced_does_not_break():
    # timm users do this to every pretrained model
    hyper = hyperize(timm.create_model("test_resnet"), targets=("conv2d", "linear"), compression=4)
    hyper.reset_classifier(5)
    dense = to_dense(hyper)
    assert type(dense.fc) is nn.Linear
    assert dense.fc.out_features == 5
    assert report(hyper).total_hyper_params == count(hyper)


# ----------------------------------------------------------------------------------- registration


class Scaled(nn.Module):
    """A layer of no library, for the registry."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return x @ self.matrix


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (None, ("LayerSpec", "NoneType")),
        (LayerSpec("conv2d", Scaled), ("conv2d", "taken")),
        (LayerSpec("scaled", nn.Conv2d), ("Conv2d", "registered already")),
        (LayerSpec("scaled", Scaled()), ("subclass of torch.nn.Module",)),
        (LayerSpec("scaled", int), ("subclass of torch.nn.Module", "int")),
        (LayerSpec("", Scaled), ("non-empty",)),
        (LayerSpec(3, Scaled), ("non-empty string", "3")),
        (LayerSpec("scaled", Scaled, mixin=nn.Module), ("mixin", "Generated")),
    ],
    ids=["None", "kind", "class", "instance", "int", "empty", "number", "mixin"],
)
def test_registration(spec, words):
    with pytest.raises(ConfigError) as refusal:
        register_layer(spec)
    for word in words:
        assert word in str(refusal.value)
    refused(nn.Sequential(Scaled()), ConfigError, "unknown target", targets=("scaled",))


@pytest.fixture
def _registry(monkeypatch):
    monkeypatch.setattr("hyperize.layers._SPECS", dict(package.layers._SPECS))


@pytest.mark.usefixtures("_registry")
def test_a_registered_layer_of_ones_own():
    register_layer(LayerSpec("scaled", Scaled, ("matrix",)))
    model = nn.Sequential(Scaled(), nn.ReLU(), Scaled())
    hyper = hyperize(model, targets=("scaled",), compression=4)
    x = torch.randn(3, 64)
    dense = to_dense(hyper)
    assert torch.equal(dense(x), hyper(x))
    assert type(dense[0]) is Scaled
    twin = pickle.loads(pickle.dumps(hyper))
    assert torch.equal(twin(x), hyper(x))


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("params", [("weight",), ("matrix", "bias"), ()])
def test_a_spec_that_names_what_is_not_there(params):
    register_layer(LayerSpec("scaled", Scaled, params))
    model = nn.Sequential(Scaled(), Scaled())
    with pytest.raises(HyperizeError):
        hyperize(model, targets=("scaled",), compression=4)
    assert not any(isinstance(m, Generated) for m in model.modules())


def test_a_plan_for_another_model():
    from hyperize.rewrite import apply_plan

    plan = make_plan(Stage(), compression=1.5)
    for model in (Convolutions(), Stage(channels=48), nn.Sequential()):
        before = Unharmed(model)
        for inplace in (False, True):
            with pytest.raises(ModelError, match="the plan"):
                apply_plan(model, plan, inplace=inplace)
        before.check()


def test_loading_what_is_no_checkpoint(tmp_path):
    model = Stage()
    before = Unharmed(model)
    for name, content in {"empty": b"", "text": b"not a checkpoint", "gone": None}.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(package.FileError, match=name):
            load(model, path)
    save(hyperize(Convolutions(), compression=1.5), tmp_path / "other")
    with pytest.raises(package.FileError, match="Stage"):
        load(model, tmp_path / "other")
    before.check()
