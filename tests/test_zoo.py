"""The zoo: every model of timm on the meta device, and a default subset of them.

    pytest -n auto -m zoo           # all names of timm.list_models(), minutes
    pytest -n auto                  # everything else, and the subset below

One test per model, as making the model is most of its time.
"""

from unittest import mock

import pytest
import timm
from models import count, meta, signature
from torch import nn

from hyperize import ConfigError, HyperConfig, make_plan, to_dense
from hyperize.layers import Generated, spec_of
from hyperize.parts import generated_layers
from hyperize.rewrite import apply_plan
from hyperize.sites import find_sites

COMPRESSION = 10.0
"""The default request."""
NETWORKS = 4
"""Of which each is to be generated, too."""

SUBSET = [
    "beit_base_patch16_224",
    "botnet26t_256",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "crossvit_9_240",
    "csatv2",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "dm_nfnet_f0",
    "efficientvim_m1",
    "fasternet_t0",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gmlp_ti16_224",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "iformer_t",
    "inception_resnet_v2",
    "lambda_resnet26t",
    "lcnetv2_small",
    "lowformer_b0",
    "mambaout_femto",
    "mobilenetv5_base",
    "mvitv2_tiny",
    "naflexvit_base_patch16_gap",  # without a target: its patches are embedded by a Linear
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pnasnet5large",
    "rdnet_tiny",
    "resnet50",
    "samvit_base_patch16",
    "sequencer2d_s",
    "shvit_s1",
    "swiftformer_xs",
    "swinv2_cr_tiny_224",
    "tf_efficientnetv2_s",
    "tiny_vit_5m_224",
    "tnt_s_patch16_224",
    "twins_svt_small",
    "vgg11",
    "vit_relpos_small_patch16_224",
]


def check(name):
    model = meta(name)
    targets = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.LSTM))}
    if not targets:
        with pytest.raises(ConfigError, match="no targets: the model has no conv2d or lstm layer"):
            make_plan(model)
        return
    before = signature(model.state_dict())
    classes = [(path, type(m)) for path, m in model.named_modules()]
    buffers = [path for path, _ in model.named_buffers()]  # those outside the state dict, too

    total = count(model)
    found = find_sites(model, HyperConfig())
    with mock.patch("hyperize.search.find_sites", return_value=found):  # traces once for both
        plan = make_plan(model)
        explicit = {"tile": plan.tile, "hidden_dim": plan.hidden_dim}
        more = make_plan(model, embedding_dim=plan.embedding_dim + 1, **explicit)
    assert plan.compression >= COMPRESSION
    assert more.compression < COMPRESSION
    _check_every_target_is_accounted_for(targets, plan)

    hyper = apply_plan(model, plan, inplace=True)
    assert count(hyper) == plan.total_hyper_params
    assert plan.total_params == total
    assert plan.total_params - plan.total_hyper_params == plan.dense_params - plan.hyper_params
    assert set(generated_layers(hyper)) == {planned.site.path for planned in plan.sites}

    dense = to_dense(hyper, inplace=True)
    assert signature(dense.state_dict()) == before
    assert [(path, type(m)) for path, m in dense.named_modules()] == classes
    assert [path for path, _ in dense.named_buffers()] == buffers
    assert not any(isinstance(m, Generated) for m in dense.modules())

    with mock.patch("hyperize.sites._order", lambda model, targets: (list(targets), "as before")):
        several = make_plan(dense, conditions=NETWORKS)
    assert several.compression >= COMPRESSION
    hyper = apply_plan(dense, several, inplace=True)
    assert count(hyper) == several.total_hyper_params
    dense = to_dense(hyper, condition=NETWORKS - 1, inplace=True)
    assert signature(dense.state_dict()) == before
    assert [(path, type(m)) for path, m in dense.named_modules()] == classes


def _check_every_target_is_accounted_for(targets, plan):
    """Each weight of each target is a site or a skip with a reason, exactly once."""
    weights = {
        f"{path}.{param}": module.get_parameter(param).numel()
        for path, module in targets.items()
        for param in spec_of(type(module)).params_of(module)
    }
    sites = [planned.site.name for planned in plan.sites]
    skips = [skip.path for skip in plan.skips]
    assert sorted(sites + skips) == sorted(weights)
    assert all(skip.reason for skip in plan.skips)
    assert sum(planned.site.dense_params for planned in plan.sites) == plan.dense_params
    assert plan.dense_params + sum(skip.params for skip in plan.skips) == sum(weights.values())


@pytest.mark.parametrize("name", SUBSET)
def test_subset(name):
    check(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", timm.list_models())
def test_all(name):
    check(name)


def test_the_list_is_that_of_timm():
    assert set(SUBSET) <= set(timm.list_models())
    assert len(timm.list_models()) > 1000
