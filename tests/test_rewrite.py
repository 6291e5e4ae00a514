"""The rewrite and its inverse on real weights: own models first, then every family of the zoo.

The promises are those of a mirror: `to_dense(hyperize(m))` is `m` again in all but the values, and
has the hyperized model's outputs bit for bit.
"""

import copy
import io
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from models import (
    CRNN,
    Cells,
    Convolutions,
    OverChildren,
    Stage,
    Tied,
    Transposed,
    Untraceable,
    UsedTwice,
    calls_of,
    count,
    embeddings_of,
    meta,
    randomise,
    same,
    signature,
    tensors,
)
from timm.layers.std_conv import ScaledStdConv2d
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyperize import HyperConfig, dense_state_dict, hyperize, make_plan, to_dense
from hyperize.hypernet import HyperNet
from hyperize.layers import Generated
from hyperize.parts import generated_layers

SPLIT_SUMS = 1e-5
"""Of outputs near 1 in float32, whose sums kernels split by the number of their threads."""
STD_TOLERANCE = 0.01
"""Of a site's standard deviation: scale and offset are fitted to one draw, in float32."""
MEAN_TOLERANCE = 0.01
"""Of a site's mean, in standard deviations, for the same reason."""
HALF_STD_TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.03}
"""A generator in half precision rounds its constants: bfloat16 has 8 bits, 0.4 % a rounding."""
GRADIENT_TOLERANCE = 1e-4
"""Of a gradient, by its norm: the same sums in float32, in another order."""

ALL_KINDS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"),
)

# name -> (model, shape of its input, options of hyperize): models of no list
OWN = {
    "convolutions": (Convolutions, (2, 3, 24, 24), {}),
    "stage": (Stage, (2, 3, 8, 8), {}),
    "crnn": (CRNN, (2, 1, 8, 16), {}),
    "untraceable": (Untraceable, (2, 3, 8, 8), {}),
    "over-children": (OverChildren, (2, 3, 8, 8), {}),
    "used-twice": (UsedTwice, (2, 3, 8, 8), {}),
    "tied": (Tied, (2, 3, 8, 8), {}),
    "cells": (Cells, (3, 2, 24), {"targets": ("rnn_cell", "gru_cell", "lstm_cell")}),
    "autoencoder-1d": (lambda: Transposed(dims=1), (2, 2, 16), {"targets": ALL_KINDS}),
    "autoencoder-2d": (lambda: Transposed(dims=2), (2, 2, 8, 8), {"targets": ALL_KINDS}),
    "autoencoder-3d": (lambda: Transposed(dims=3), (2, 2, 4, 4, 4), {"targets": ALL_KINDS}),
    "linear-too": (Stage, (2, 3, 8, 8), {"targets": ("conv2d", "linear")}),
    "paper-axis": (Convolutions, (2, 3, 24, 24), {"trunk_axis": 1}),
    "two-layers": (Convolutions, (2, 3, 24, 24), {"hidden_dim": 16}),
    "channels": (Convolutions, (2, 3, 24, 24), {"embeddings": "channel"}),
    "channels-crnn": (CRNN, (2, 1, 8, 16), {"embeddings": "channel", "trunk_axis": 1}),
    "channels-autoencoder": (
        Transposed,
        (2, 2, 8, 8),
        {"embeddings": "channel", "targets": ALL_KINDS},
    ),
    "separable": (Convolutions, (2, 3, 24, 24), {"embeddings": "separable"}),
    "separable-crnn": (CRNN, (2, 1, 8, 16), {"embeddings": "separable", "trunk_axis": 1}),
    "separable-autoencoder": (
        Transposed,
        (2, 2, 8, 8),
        {"embeddings": "separable", "targets": ALL_KINDS},
    ),
    "sequential-root": (
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3)),
        (2, 3, 8, 8),
        {},
    ),
    "a-layer-alone": (lambda: nn.Conv2d(48, 64, 3), (2, 48, 8, 8), {}),
    "an-lstm-alone": (lambda: nn.LSTM(32, 32), (5, 2, 32), {}),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(64, 4, 96, batch_first=True),
        (2, 5, 64),
        {"targets": ("linear", "attention")},
    ),
    # Widths that no tile divides, with standardisation over the weight as it lies in memory
    "odd-widths": (
        lambda: nn.Sequential(
            ScaledStdConv2d(82, 330, 1), nn.ReLU(), ScaledStdConv2d(330, 83, 1), nn.Flatten()
        ),
        (2, 82, 4, 4),
        {"tile": (16, 64), "embedding_dim": 8, "hidden_dim": 8},
    ),
}

# name, size, options of timm.create_model, which make the largest smaller: each family's smallest
ZOO = [
    ("test_resnet", 64, {}),
    ("resnet10t", 64, {}),
    ("ecaresnet26t", 64, {}),
    ("legacy_seresnet18", 64, {}),
    ("skresnet18", 64, {}),
    ("res2net50_14w_8s", 64, {}),
    ("resnetv2_18", 64, {}),
    ("resnetv2_50x1_bit", 64, {}),  # StdConv2d
    ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64}),  # StdConv2dSame
    ("test_nfnet", 64, {}),  # ScaledStdConv2d
    ("dm_nfnet_f0", 64, {"depths": (1, 1, 1, 1)}),  # ScaledStdConv2dSame
    ("nf_regnet_b0", 64, {}),
    ("test_efficientnet", 64, {}),
    ("tf_efficientnet_b0", 64, {}),  # Conv2dSame
    ("tf_mobilenetv3_small_075", 64, {}),
    ("mixnet_s", 64, {}),  # MixedConv2d
    ("mobilenetv2_035", 64, {}),
    ("mobilenetv3_small_050", 64, {}),
    ("mobilenetv4_conv_small_050", 64, {}),
    ("lcnet_035", 64, {}),
    ("hardcorenas_a", 64, {}),
    ("tinynet_e", 64, {}),
    ("mnasnet_050", 64, {}),
    ("test_convnext", 64, {}),
    ("inception_next_atto", 64, {}),
    ("convmixer_768_32", 64, {}),
    ("regnetx_002", 64, {}),
    ("regnety_002", 64, {}),
    ("densenet121", 64, {}),
    ("dpn48b", 64, {}),
    ("inception_v3", 75, {}),
    ("inception_v4", 75, {}),
    ("vgg11", 64, {"mlp_ratio": 0.125}),
    ("ghostnet_050", 64, {}),
    ("ghostnetv3_050", 64, {}),
    ("hrnet_w18_small", 64, {}),
    ("dla46x_c", 64, {}),
    ("selecsls42", 64, {}),
    ("xception41p", 64, {}),
    ("legacy_xception", 64, {}),
    ("cs3darknet_focus_s", 64, {}),
    ("rexnet_100", 64, {}),
    ("repvgg_a0", 64, {}),
    ("mobileone_s0", 64, {}),
    ("repghostnet_050", 64, {}),
    ("repvit_m0_9", 64, {}),
    ("fastvit_t8", 64, {}),
    ("edgenext_xx_small", 64, {}),
    ("ese_vovnet19b_slim_dw", 64, {}),
    ("hgnetv2_b0", 64, {}),
    ("starnet_s050", 64, {}),
    ("test_byobnet", 64, {}),
    ("mobilevit_xxs", 64, {}),
    ("halonet26t", 256, {}),
    ("lambda_resnet26t", 64, {"img_size": 64}),  # Conv3d
    ("lowformer_b0", 64, {}),  # ConvTranspose2d
    ("efficientvim_m1", 224, {}),  # Conv1d
    ("efficientvit_b0", 64, {}),
    ("test_coatnet", 160, {}),
    ("test_maxvit", 160, {}),
    ("coat_tiny", 64, {"img_size": 64}),
    ("sequencer2d_s", 64, {"img_size": 64, "layers": (1, 1, 2, 1)}),  # LSTM
    ("test_vit", 64, {"img_size": 64}),
    ("vit_tiny_patch16_dinov3_qkvb", 64, {"img_size": 64}),
    ("swin_tiny_patch4_window7_224", 64, {"img_size": 64}),
    ("poolformerv2_s12", 64, {}),
    ("pvt_v2_b0", 64, {}),
    ("levit_conv_128s", 64, {"img_size": 64}),
    ("efficientformer_l1", 224, {}),
    ("efficientformerv2_s0", 64, {"img_size": 64}),
    ("volo_d1_224", 64, {"img_size": 64}),
    ("visformer_tiny", 64, {"img_size": 64}),
    ("xcit_nano_12_p16_224", 64, {}),
    ("test_mambaout", 64, {}),
    ("nasnetalarge", 96, {"num_features": 576}),
    ("tresnet_m", 64, {}),
]


class Case:
    """A model, its hyperized form as made, and `live`: that with every part of it put to use."""

    def __init__(self, make, shape, options=None):
        self.make = make
        self.options = options or {}
        torch.manual_seed(0)
        self.model = make().eval()
        self.before = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.classes = [(path, type(m)) for path, m in self.model.named_modules()]
        self.plan = make_plan(self.model, **self.options)
        self.hyper = hyperize(self.model, **self.options)
        self.live = randomise(copy.deepcopy(self.hyper))
        self.dense = to_dense(self.live)
        self.x = torch.randn(shape)
        with torch.no_grad():
            self.output = self.live(self.x)


def _own(name):
    make, shape, options = OWN[name]
    return Case(make, shape, {"compression": 1.5} | options)


def _zoo(name):
    size, options = next(entry[1:] for entry in ZOO if entry[0] == name)
    return Case(lambda: timm.create_model(name, **options), (2, 3, size, size))


@pytest.fixture(scope="module", params=[*OWN, *(entry[0] for entry in ZOO)])
def case(request):
    """One of the models; made once for all tests of it, which change nothing in it."""
    return _own(request.param) if request.param in OWN else _zoo(request.param)


# ------------------------------------------------------------ every property, over all the models


def test_outputs_are_those_of_the_dense_model_bit_for_bit(case):
    assert all(torch.isfinite(t).all() for t in tensors(case.output))
    with torch.no_grad():
        assert same(case.dense(case.x), case.output)


def test_the_hypernetwork_matters(case):
    changed = copy.deepcopy(case.live)
    hypernet = next(m for m in changed.modules() if isinstance(m, HyperNet))
    with torch.no_grad():
        for head in hypernet.heads.values():
            head.weight.add_(0.1 * torch.randn_like(head.weight))
        assert not same(changed(case.x), case.output)


def test_each_generated_weight_lies_in_memory_as_the_dense_one(case):
    for path, layer in generated_layers(case.live).items():
        dense = case.dense.get_submodule(path)
        for name in layer.generated:
            weight, expected = getattr(layer, name), getattr(dense, name)
            assert torch.equal(weight, expected)
            assert weight.stride() == expected.stride(), (path, name, weight.shape)


def test_dense_state_dict_is_the_originals_in_all_but_values(case):
    state = case.dense.state_dict()
    assert signature(state) == signature(case.before)
    assert [(path, type(m)) for path, m in case.dense.named_modules()] == case.classes
    flags = {name: p.requires_grad for name, p in case.model.named_parameters()}
    assert {name: p.requires_grad for name, p in case.dense.named_parameters()} == flags


def test_dense_weights_load_strictly_into_a_fresh_model(case):
    fresh = case.make().eval()
    fresh.load_state_dict(case.dense.state_dict(), strict=True)
    with torch.no_grad():
        assert same(fresh(case.x), case.output)


def test_dense_state_dict_is_that_of_to_dense(case):
    state, expected = dense_state_dict(case.live), case.dense.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_deepcopy_and_pickle_keep_outputs(case):
    for twin in (copy.deepcopy(case.live), pickle.loads(pickle.dumps(case.live))):
        assert signature(twin.state_dict()) == signature(case.live.state_dict())
        assert {id(p) for p in twin.parameters()}.isdisjoint(map(id, case.live.parameters()))
        with torch.no_grad():
            assert same(twin(case.x), case.output)


def test_every_parameter_gets_the_gradient_that_it_has_to(case):
    # Through training mode, in which timm's models drop what they cached without gradients
    live, dense = (copy.deepcopy(model).train().eval() for model in (case.live, case.dense))
    torch.manual_seed(1)
    direction = [torch.randn_like(t) for t in tensors(case.output)]
    for model in (live, dense):
        sum(
            (t * d).sum() for t, d in zip(tensors(model(case.x)), direction, strict=True)
        ).backward()
    expected = dict(dense.named_parameters())
    layers = generated_layers(live)
    for path, layer in layers.items():
        for name in layer.generated:
            weight = expected.pop(f"{path}.{name}" if path else name)
            embedding = getattr(layer, name + "_embedding")
            assert (embedding.grad is None) == (weight.grad is None), path
            if weight.grad is None:
                continue
            # The chain rule, through this one site
            (through,) = torch.autograd.grad(getattr(layer, name), embedding, weight.grad)
            assert _close(embedding.grad, through), path
            assert embedding.grad.any() == weight.grad.any(), path
    for name, param in dict(live.named_parameters()).items():
        if name in expected:
            assert (param.grad is None) == (expected[name].grad is None), name
            assert param.grad is None or _close(param.grad, expected[name].grad), name
    hypernet = next(m for m in live.modules() if isinstance(m, HyperNet))
    for name, param in hypernet.named_parameters():
        assert param.grad is not None, name
        assert param.grad.any(), name
        assert torch.isfinite(param.grad).all(), name


def _close(a, b):
    return (a - b).norm() <= GRADIENT_TOLERANCE * max(b.norm(), torch.finfo(b.dtype).tiny)


def test_initial_weights_have_the_mean_and_deviation_of_those_they_replace(case):
    for planned in case.plan.sites:
        dense = case.model.get_parameter(planned.site.name)
        layer = case.hyper.get_submodule(planned.site.path)
        weight = getattr(layer, planned.site.param)
        if (dense == dense.flatten()[0]).all():
            assert torch.equal(weight, dense), planned.site.name
            continue
        std, mean = torch.std_mean(dense, correction=0)
        new_std, new_mean = torch.std_mean(weight, correction=0)
        assert abs(new_std / std - 1) < STD_TOLERANCE, planned.site.name
        assert abs(new_mean - mean) < MEAN_TOLERANCE * std, planned.site.name


def test_the_original_is_not_modified(case):
    after = case.model.state_dict()
    assert list(after) == list(case.before)
    assert all(torch.equal(after[name], case.before[name]) for name in after)
    assert [(path, type(m)) for path, m in case.model.named_modules()] == case.classes
    assert not any(isinstance(m, Generated) for m in case.model.modules())
    memory = {t.data_ptr() for t in case.model.state_dict().values() if t.numel()}
    assert not memory & {t.data_ptr() for t in case.hyper.state_dict().values()}
    memory = {t.data_ptr() for t in case.live.state_dict().values() if t.numel()}
    assert not memory & {t.data_ptr() for t in case.dense.state_dict().values()}


def test_counts_are_the_plans(case):
    assert count(case.hyper) == case.plan.total_hyper_params
    assert count(case.dense) == case.plan.total_params == count(case.model)


def test_state_dict_round_trip_between_seeds(case):
    other = hyperize(case.model, seed=99, **case.options)
    assert other.load_state_dict(case.live.state_dict()).missing_keys == []
    with torch.no_grad():
        assert same(other(case.x), case.output)


# ------------------------------------------------------------------------------------ global state


def snapshot():
    return {
        "rng": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [Stage, CRNN, Untraceable])
def test_no_global_state_changes(make, grad, seed):
    model = make()
    with torch.set_grad_enabled(grad):
        before = snapshot()
        hyper = hyperize(model, compression=2, seed=seed)
        to_dense(hyper)
        dense_state_dict(hyper)
        assert snapshot() == before
    assert all(p.requires_grad for p in hyper.parameters())


def test_training_flags_are_kept():
    model = Stage()
    model.norm.eval()
    model.drop.eval()
    hyper = hyperize(model, compression=2)
    flags = {path: m.training for path, m in model.named_modules()}
    assert {path: hyper.get_submodule(path).training for path in flags} == flags
    assert {path: m.training for path, m in to_dense(hyper).named_modules()} == flags


def test_the_default_dtype_does_not_leak_in():
    model = Stage()
    expected = hyperize(model, compression=2, seed=0).state_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        state = hyperize(model, compression=2, seed=0).state_dict()
    finally:
        torch.set_default_dtype(before)
    assert signature(state) == signature(expected)


def test_the_default_device_does_not_leak_in():
    # As with torch.set_default_device("cuda") and a model on the CPU; meta is always there.
    model = Stage()
    expected = hyperize(model, compression=2, seed=0).state_dict()
    with torch.device("meta"):
        state = hyperize(model, compression=2, seed=0).state_dict()
        dense = to_dense(hyperize(model, compression=2, seed=0)).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not any(t.is_meta for t in dense.values())


def test_inplace_returns_the_same_object():
    model = Stage()
    keys = list(model.state_dict())
    hyper = hyperize(model, compression=2, inplace=True)
    assert hyper is model
    assert isinstance(hyper.conv1, Generated)
    x = torch.randn(2, 3, 8, 8)
    hyper.eval()
    expected = hyper(x)
    dense = to_dense(hyper, inplace=True)
    assert dense is model
    assert list(dense.state_dict()) == keys
    assert type(dense.conv1) is nn.Conv2d
    assert not any(isinstance(m, HyperNet) for m in dense.modules())
    assert not hasattr(dense, "hypernet")
    assert torch.equal(dense(x), expected)


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    model = Stage()
    one, again, two = (hyperize(model, compression=2, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], two["conv1.weight"])


def test_without_a_seed_the_global_generator_decides():
    model = Stage()
    torch.manual_seed(5)
    one = hyperize(model, compression=2).state_dict()
    torch.manual_seed(5)
    again = hyperize(model, compression=2).state_dict()
    torch.manual_seed(6)
    two = hyperize(model, compression=2).state_dict()
    assert torch.equal(one["conv1.weight"], again["conv1.weight"])
    assert not torch.equal(one["conv1.weight"], two["conv1.weight"])


def test_attributes_and_methods_of_timm_stay():
    model = timm.create_model("test_resnet").eval()
    hyper = hyperize(model)
    assert type(hyper) is type(model)
    assert hyper.pretrained_cfg == model.pretrained_cfg
    assert hyper.layer1[0].conv2.kernel_size == model.layer1[0].conv2.kernel_size
    x = torch.randn(1, 3, 64, 64)
    dense = to_dense(hyper)
    assert torch.equal(hyper.forward_features(x), dense.forward_features(x))
    assert same(hyper.forward_intermediates(x), dense.forward_intermediates(x))
    assert hyper.get_classifier() is hyper.fc


def test_features_only_models():
    model = timm.create_model("test_resnet", features_only=True).eval()
    hyper = hyperize(model)
    x = torch.randn(1, 3, 64, 64)
    assert len(hyper(x)) == len(model(x))
    assert same(hyper(x), to_dense(hyper)(x))


# ----------------------------------------------------------------------- constant and half weights


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("trunk_axis", [0, 1])
def test_constant_layers_start_so_and_learn(value, trunk_axis):
    model = Stage()
    nn.init.constant_(model.conv2.weight, value)  # whose output is used as it is
    hyper = hyperize(model, embedding_dim=4, trunk_axis=trunk_axis).eval()
    assert torch.equal(hyper.conv2.weight, model.conv2.weight)
    optimizer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    hyper(torch.randn(2, 3, 8, 8)).square().sum().backward()
    gradient = hyper.conv2.weight_embedding.grad
    assert gradient.abs().amax(1).min() > 0  # of every tile's embedding
    optimizer.step()
    assert hyper.conv2.weight.std() > 0


@pytest.mark.parametrize("first", ["to half", "hyperize"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [Convolutions, CRNN])
def test_dtypes(make, dtype, first):
    torch.manual_seed(0)
    model = randomise(make()).eval()
    if first == "hyperize":
        hyper = hyperize(model, compression=1.5).to(dtype)
    else:
        model = model.to(dtype)
        hyper = hyperize(model, compression=1.5)
        for path, layer in generated_layers(hyper).items():
            for name in layer.generated:
                std = getattr(model.get_submodule(path), name).double().std()
                error = abs(getattr(layer, name).double().std() / std - 1)
                assert error < HALF_STD_TOLERANCE.get(dtype, STD_TOLERANCE), (path, name)
    assert all(p.dtype == dtype for p in hyper.parameters())
    dense = to_dense(hyper)
    assert all(p.dtype == dtype for p in dense.parameters())
    x = torch.randn(2, 1 if make is CRNN else 3, 16, 16, dtype=dtype)
    output = hyper(x)
    assert output.dtype == dtype
    assert torch.isfinite(output).all()
    assert same(output, dense(x))


def test_layers_of_several_dtypes():
    model = Stage().eval()
    model.conv2.half()
    hyper = hyperize(model, compression=2)
    assert hyper.conv2.weight.dtype == torch.float16
    assert hyper.conv1.weight.dtype == torch.float32
    assert signature(dense_state_dict(hyper)) == signature(model.state_dict())


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_nfnet"])
def test_channels_last(name):
    hyper = hyperize(randomise(timm.create_model(name)).eval())
    hyper = hyper.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert same(hyper(x), to_dense(hyper)(x))


@pytest.mark.parametrize("make", [Convolutions, CRNN])
def test_autocast_does_not_reach_the_generator(make):
    hyper = hyperize(randomise(make()).eval(), compression=1.5)
    dense = to_dense(hyper)
    x = torch.randn(2, 1 if make is CRNN else 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for path, layer in generated_layers(hyper).items():
            for name in layer.generated:
                assert same(getattr(layer, name), getattr(dense.get_submodule(path), name))
        assert same(hyper(x), dense(x))


def test_training_under_autocast_gives_gradients_in_single_precision():
    hyper = hyperize(Stage(), compression=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hyper(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for name, param in hyper.named_parameters():
        assert param.grad is not None, name
        assert param.grad.dtype == torch.float32, name


# -------------------------------------------------------- compilers, checkpointing, copies, threads

COMPILED = {
    "convolutions": (Convolutions, 24),
    "stage": (Stage, 8),
    "used-twice": (UsedTwice, 8),
    "standardised": (
        lambda: nn.Sequential(ScaledStdConv2d(3, 64, 1), ScaledStdConv2d(64, 64, 3)),
        8,
    ),
    "test_resnet": (lambda: timm.create_model("test_resnet"), 64),
    "test_efficientnet": (lambda: timm.create_model("test_efficientnet"), 64),
}


def _compiled_case(name):
    make, size = COMPILED[name]
    hyper = hyperize(randomise(make()).eval(), compression=2)
    return hyper, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name, backend):
    hyper, x = _compiled_case(name)
    torch.compiler.reset()
    compiled = torch.compile(hyper, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert same(compiled(x), hyper(x))


def test_compiled_training_step_has_the_eager_gradients():
    hyper, x = _compiled_case("stage")
    twin = copy.deepcopy(hyper)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for model in (hyper, compiled):
        model(x).square().sum().backward()
    for (name, a), b in zip(hyper.named_parameters(), twin.parameters(), strict=True):
        assert _close(b.grad, a.grad), name


@pytest.mark.parametrize("name", COMPILED)
def test_exports(name):
    hyper, x = _compiled_case(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(hyper, (x,)).module()
        assert same(exported(x), hyper(x))


def _gradients(model, x, run=None):
    torch.manual_seed(0)
    output = (run or model)(x)
    output.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_grad_checkpointing_of_timm_gives_equal_gradients(name):
    options = {"img_size": 64} if name == "test_vit" else {}
    hyper = hyperize(randomise(timm.create_model(name, **options)), compression=2).train()
    twin = copy.deepcopy(hyper)
    twin.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 64, 64)
    expected, found = _gradients(hyper, x), _gradients(twin, x)
    for key in expected:
        assert torch.equal(expected[key], found[key]), key


@pytest.mark.parametrize("make", [Convolutions, CRNN, Stage])
def test_checkpointing_the_whole_model_gives_equal_gradients(make):
    hyper = hyperize(randomise(make()), compression=1.5).train()
    twin = copy.deepcopy(hyper)
    x = torch.randn(2, 1 if make is CRNN else 3, 16, 16)
    expected = _gradients(hyper, x)
    found = _gradients(twin, x, lambda x: checkpoint(twin, x, use_reentrant=False))
    for key in expected:
        assert torch.equal(expected[key], found[key]), key


def test_an_average_of_weights_follows():
    hyper = hyperize(Stage(), compression=2)
    average = ModelEmaV3(hyper, decay=0.5)
    start = average.module.conv1.weight.clone()
    with torch.no_grad():
        for p in hyper.parameters():
            p.add_(torch.randn_like(p))
    average.update(hyper)
    moved = average.module.conv1.weight_embedding
    assert not torch.equal(start, average.module.conv1.weight)
    assert not torch.equal(moved, hyper.conv1.weight_embedding)
    x = torch.randn(2, 3, 8, 8)
    averaged = average.module.eval()
    assert same(averaged(x), to_dense(averaged)(x))


@pytest.mark.parametrize("make", [Convolutions, CRNN])
def test_threads(make):
    hyper = hyperize(randomise(make()).eval(), compression=1.5)
    inputs = [torch.randn(2, 1 if make is CRNN else 3, 16, 16) for _ in range(32)]

    def run(x):
        with torch.no_grad():
            return hyper(x)

    # Both in pools: a new thread has its own number of threads for the kernels, and so for sums.
    # Under load sums may still be split otherwise, which was seen once; a thread that got another's
    # weight would differ in the first digits.
    with ThreadPoolExecutor(1) as pool:
        serial = list(pool.map(run, inputs))
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(run, inputs))
    torch.testing.assert_close(threaded, serial, rtol=SPLIT_SUMS, atol=SPLIT_SUMS)


@pytest.fixture
def _module_class(monkeypatch):
    """Puts back what torch.fx patches while it traces, should a test leave it patched."""
    for name in ("__call__", "__getattr__"):
        monkeypatch.setattr(nn.Module, name, getattr(nn.Module, name))


@pytest.mark.usefixtures("_module_class")
def test_threads_that_hyperize_at_once():
    before = nn.Module.__call__, nn.Module.__getattr__
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda _: hyperize(Stage(), compression=2), range(64)))
    assert (nn.Module.__call__, nn.Module.__getattr__) == before
    assert len({type(model.conv1) for model in models}) == 1


@pytest.mark.usefixtures("_module_class")
def test_a_thread_that_hyperizes_does_not_disturb_one_that_runs():
    hyper = hyperize(Convolutions(), compression=1.5).eval()
    x = torch.randn(1, 3, 16, 16)

    def run(_):
        with torch.no_grad():
            return hyper(x)

    with ThreadPoolExecutor(1) as runner, ThreadPoolExecutor(1) as planner:
        outputs = runner.map(run, range(200))
        plans = planner.map(lambda _: make_plan(Stage(), compression=2), range(20))
        assert len(list(plans)) == 20
        assert all(isinstance(output, torch.Tensor) for output in outputs)


def test_torch_save_and_load():
    hyper = hyperize(CRNN(), compression=1.5).eval()
    file = io.BytesIO()
    torch.save(hyper, file)
    file.seek(0)
    x = torch.randn(2, 1, 8, 16)
    assert same(torch.load(file, weights_only=False)(x), hyper(x))


def test_a_part_of_a_model_can_be_copied_with_its_generator():
    hyper = hyperize(Convolutions(), compression=1.5)
    part = copy.deepcopy(hyper.dilated)
    assert torch.equal(part.weight, hyper.dilated.weight)
    assert part.hypernet is not hyper.hypernet


def test_a_copy_has_one_generator():
    twin = copy.deepcopy(hyperize(Convolutions(), compression=1.5))
    generators = {id(layer.hypernet) for layer in generated_layers(twin).values()}
    assert generators == {id(twin.hypernet)}


# -------------------------------------------------------------- sharing, freezing, meta, containers


def test_a_module_used_several_times_is_one_site():
    plan = make_plan(UsedTwice(), compression=1.5)
    names = [p.site.name for p in plan.sites]
    assert names.count("block.weight") == 1
    assert "same.weight" not in names
    assert next(p.site for p in plan.sites if p.site.path == "block").aliases == ("same",)
    hyper = hyperize(UsedTwice(), compression=1.5)
    assert hyper.block is hyper.same
    dense = to_dense(hyper)
    assert dense.block is dense.same
    assert list(dense.state_dict()) == list(UsedTwice().state_dict())


def test_tied_weights_stay_tied_and_dense_with_the_reason():
    plan = make_plan(Tied(), compression=1.5)
    reasons = {skip.path: skip.reason for skip in plan.skips}
    for path in ("encoder.weight", "decoder.weight"):
        assert "tied" in reasons[path]
        assert "encoder.weight" in reasons[path]
        assert "decoder.weight" in reasons[path]
    hyper = hyperize(Tied(), compression=1.5)
    assert hyper.encoder.weight is hyper.decoder.weight
    dense = to_dense(hyper)
    assert dense.encoder.weight is dense.decoder.weight
    assert count(dense) == count(Tied())


def test_frozen_weights_stay_dense_with_the_reason():
    model = Stage()
    model.conv1.weight.requires_grad_(False)
    hyper = hyperize(model, compression=1.5)
    plan = make_plan(model, compression=1.5)
    assert "frozen" in next(s.reason for s in plan.skips if s.path == "conv1.weight")
    assert not isinstance(hyper.conv1, Generated)
    assert torch.equal(hyper.conv1.weight, model.conv1.weight)
    assert not to_dense(hyper).conv1.weight.requires_grad


def test_a_frozen_hyper_model_gives_frozen_dense_weights():
    hyper = hyperize(Stage(), compression=2).requires_grad_(False)
    assert not any(p.requires_grad for p in to_dense(hyper).parameters())


@pytest.mark.parametrize("make", [Stage, CRNN, UsedTwice])
def test_meta_in_meta_out_then_loaded(make):
    with torch.device("meta"):
        blank = make()
    hyper = hyperize(blank, compression=1.5)
    assert all(t.is_meta for t in (*hyper.parameters(), *hyper.buffers()))
    assert signature(dense_state_dict(hyper)) == signature(blank.state_dict())
    source = hyperize(make(), compression=1.5).eval()
    hyper.load_state_dict(source.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*hyper.parameters(), *hyper.buffers()))
    x = torch.randn(2, 1 if make is CRNN else 3, 8, 16)
    with torch.no_grad():
        assert same(hyper.eval()(x), source(x))


def test_a_model_on_meta_gives_the_plan_of_the_real_one():
    assert make_plan(timm.create_model("test_resnet")) == make_plan(meta("test_resnet"))


@pytest.mark.parametrize("root", [nn.Sequential, OverChildren])
def test_a_root_that_runs_its_children_does_not_run_the_generator(root):
    model = OverChildren() if root is OverChildren else nn.Sequential(*OverChildren().children())
    hyper = hyperize(model, compression=1.5)
    assert "hypernet" not in dict(hyper.named_children())
    assert sum(isinstance(m, HyperNet) for m in hyper.modules()) == 1
    assert hyper(torch.randn(2, 3, 8, 8)).shape == (2, 32, 8, 8)


def test_a_module_dict_root():
    model = nn.ModuleDict({"a": nn.Conv2d(32, 32, 3), "b": nn.LSTM(32, 32)})
    hyper = hyperize(model, compression=1.5)
    assert list(hyper) == ["a", "b"]
    assert list(to_dense(hyper).state_dict()) == list(model.state_dict())


def test_an_untraceable_model_says_so():
    assert "could not trace" in make_plan(Untraceable(), compression=1.5).order
    assert "torch.fx graph" in make_plan(Stage(), compression=1.5).order


def test_order_is_that_of_the_graph():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(32, 32, 3)
            self.first = nn.Conv2d(32, 32, 3)

        def forward(self, x):
            return self.last(self.first(x))

    plan = make_plan(Backwards(), compression=1.5)
    assert [p.site.path for p in plan.sites] == ["first", "last"]


def test_each_layer_generates_its_weight_once_per_forward():
    hyper = hyperize(Convolutions(), compression=1.5)
    calls = calls_of(hyper)
    hyper(torch.randn(1, 3, 16, 16))
    assert len(calls) == len(make_plan(Convolutions(), compression=1.5).sites)
    assert sorted(calls) == sorted(embeddings_of(hyper))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 24, "vdim": 40}, {"bias": False, "add_bias_kv": True}], ids=str
)
def test_attention_generates_its_weights_once_per_forward(options, training):
    layer = nn.MultiheadAttention(64, 4, batch_first=True, **options)
    hyper = hyperize(layer, targets="attention", compression=1.5).train(training)
    dense = to_dense(hyper)
    calls = calls_of(hyper)
    inputs = [torch.randn(2, n, d) for n, d in ((5, 64), (7, layer.kdim), (7, layer.vdim))]
    assert same(hyper(*inputs), dense(*inputs))
    assert sorted(calls) == sorted(embeddings_of(hyper))
    with torch.no_grad():
        assert same(hyper(*inputs, need_weights=False), dense(*inputs, need_weights=False))


def test_hooks_are_kept():
    model = Stage()
    seen = []
    model.conv1.register_forward_hook(lambda *args: seen.append("conv1"))
    hyper = hyperize(model, compression=2)
    hyper(torch.randn(1, 3, 8, 8))
    to_dense(hyper).eval()(torch.randn(1, 3, 8, 8))
    assert seen == ["conv1", "conv1"]


def test_explicit_settings_are_built():
    config = HyperConfig(tile=(8, 16), embedding_dim=5, hidden_dim=7)
    hyper = hyperize(Stage(), config)
    assert hyper.hypernet.trunk.weight.shape == (8 * 7, 5)
    assert hyper.conv1.weight_embedding.shape == (4 * 2, 5)
