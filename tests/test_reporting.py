"""The report: rows add up to totals, totals are the model's own, the table is readable."""

import json

import pytest
import timm
import torch
from torch import nn

from hyperize import ModelError, hyperize, make_plan, report, to_dense
from hyperize.parts import generated_layers

MODELS = ["resnet18", "mobilenetv3_small_050", "sequencer2d_s", "vit_tiny_patch16_224"]

GOLDEN = """\
weight              kind     shape       dense   hyper   ratio
──────────────────────────────────────────────────────────────
0.weight            conv2d   64x16x3x3   9,216     200    46.1
1.weight_ih_l0      lstm     128x64      8,192   1,600     5.1
1.weight_hh_l0      lstm     128x32      4,096     800     5.1
hypernet (shared)                                1,072

Sequential                    dense    hyper   ratio
────────────────────────────────────────────────────
targets, parameters          21,504    3,672    5.86
whole model, parameters      22,929    5,097    4.50
whole model, bytes on disk   91,716   20,412    4.49

rewritten: 3, order of the torch.fx graph
generator: 126,208 multiply-adds per forward pass
skipped: 2.weight (8 weights): would grow: its embeddings are no smaller
dense: 1 linear (1,056 weights): not a target
note: compression 10 was not asked of these explicit sizes and is not reached:
5.86"""


def bytes_of(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", MODELS)
def test_totals_are_the_models_own(name):
    dense = timm.create_model(name)
    hyper = hyperize(dense)
    result = report(hyper)
    assert result.total_dense_params == sum(p.numel() for p in dense.parameters())
    assert result.total_hyper_params == sum(p.numel() for p in hyper.parameters())
    assert result.dense_bytes == bytes_of(dense)
    assert result.hyper_bytes == bytes_of(hyper)
    layers = generated_layers(hyper).values()
    embeddings = [layer.embedding(name) for layer in layers for name in layer.generated]
    assert len(result.sites) == len(embeddings)
    assert sum(row.hyper_params for row in result.sites) == sum(p.numel() for p in embeddings)
    for row in result.sites:
        assert tuple(dense.get_parameter(f"{row.path}.{row.param}").shape) == row.shape
    assert result.compression >= 10
    known = {f"{row.path}.{row.param}" for row in result.sites} | {s.path for s in result.skipped}
    convs = {n for n, m in dense.named_modules() if isinstance(m, (nn.Conv2d, nn.LSTM))}
    assert convs == {name.rpartition(".")[0] for name in known}


@pytest.mark.parametrize("name", MODELS)
def test_plan_and_model_report_the_same(name):
    dense = timm.create_model(name)
    assert report(make_plan(dense)) == report(hyperize(dense))


def test_a_changed_model_is_counted_as_it_is():
    hyper = hyperize(timm.create_model("resnet18"))
    before = report(hyper)
    hyper.reset_classifier(10)
    hyper.half()
    after = report(hyper)
    assert after.total_hyper_params == sum(p.numel() for p in hyper.parameters())
    assert after.total_dense_params == before.total_dense_params - 513 * 990
    assert after.dense_bytes == bytes_of(to_dense(hyper))


def test_printed_table():
    layers = nn.Conv2d(16, 64, 3), nn.LSTM(64, 32), nn.Conv2d(1, 8, 1), nn.Linear(32, 33)
    model = nn.Sequential(*layers)
    options = {"tile": (16, 8), "embedding_dim": 25, "hidden_dim": 2}
    lines = str(report(hyperize(model, **options))).splitlines()
    assert max(map(len, lines)) <= 80
    assert "\n".join(lines) == GOLDEN


@pytest.mark.parametrize("name", MODELS)
def test_tables_fit_80_columns(name):
    assert max(map(len, str(report(make_plan(timm.create_model(name)))).splitlines())) <= 80


def test_hint_where_linear_holds_the_weights():
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224")
    assert "linear" in report(make_plan(vit)).hints[0]
    assert not report(make_plan(vit, targets=("conv2d", "linear"))).hints


def test_formats():
    result = report(make_plan(timm.create_model("resnet18"), exclude="layer4"))
    data = json.loads(result.to_json())
    assert data["dense_params"] == sum(site["dense_params"] for site in data["sites"])
    assert {"path", "param", "kind", "shape"} <= data["sites"][0].keys()
    assert {skip["reason"] for skip in data["skipped"]} >= {"excluded"}
    markdown = result.to_markdown()
    assert f"{result.dense_params:,}" in markdown
    assert markdown.count("weight` | conv2d") == len(result.sites)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), 3, None])
def test_other_things_are_refused(thing):
    with pytest.raises(ModelError):
        report(thing)
