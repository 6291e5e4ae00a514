"""The report: rows add up to totals, totals are the model's own, the table is readable."""

import io
import json
import re

import pytest
import timm
import torch
from models import meta
from rich.console import Console
from torch import nn

from hyperize import ModelError, fit_, hyperize, make_plan, report, to_dense
from hyperize.cli import main
from hyperize.parts import generated_layers
from hyperize.tables import collapse, shorten

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
generator: 126,208 multiply-adds per forward pass, 6 for each weight
skipped: 2.weight (8 weights): would grow: its embeddings are no smaller
dense: 1 linear (1,056 weights): not a target
note: compression 10 was not asked of these explicit sizes and is not reached:
5.86"""


def flat(result):
    """What is printed, in one line."""
    return " ".join(str(result).split())


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


@pytest.mark.parametrize("targets", [("conv2d",), ("conv2d", "linear")])
def test_a_new_classifier_is_counted(targets):
    """Whether the old one was generated or not, its weights are in no figure any more."""
    hyper = hyperize(timm.create_model("test_resnet"), targets=targets, compression=4)
    before = report(hyper)
    hyper.reset_classifier(7)
    after = report(hyper)
    inputs = hyper.fc.in_features
    if "linear" in targets:
        assert ("fc.weight", 7 * inputs) in {(skip.path, skip.params) for skip in after.skipped}
    else:
        assert [(kind.layers, kind.params) for kind in after.untargeted] == [(1, 7 * inputs)]
    assert f"{1000 * inputs:,}" in str(before)
    assert f"{1000 * inputs:,}" not in str(after)
    hyper.reset_classifier(0)
    assert not any(skip.path.startswith("fc") for skip in report(hyper).skipped)
    assert report(hyper).untargeted == ()


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


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_tables_are_as_wide_as_the_terminal_and_never_wrap(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    result = report(make_plan(meta("resnet18")))
    lines = str(result).splitlines()
    assert max(map(len, lines)) <= width
    rows = lines[2 : lines.index("")]
    names = [f"{row.path}.{row.param}" for row in result.sites]
    assert len(rows) == len(names) + 1  # and the hypernetwork
    for line, name, site in zip(rows, names, result.sites, strict=False):
        shown = line.split()[0]
        begin, _, end = shown.partition("…")
        assert name == shown or (name.startswith(begin) and name.endswith(end))
        assert f"{site.dense_params:,}" in line
    assert ("…" in str(result)) == (width in (40, 80))  # at 60 other columns make room
    if width == 140:
        assert all(name in line for line, name in zip(rows, names, strict=False))


def test_names_are_shortened_in_the_middle():
    assert shorten("layer2.0.downsample.0.weight", 15) == "layer2.….weight"
    assert shorten("fc.weight", 9) == "fc.weight"
    assert len(shorten("layer2.0.downsample.0.weight", 10)) == 10


def test_repeated_blocks_are_one_row_with_their_sums():
    plan = make_plan(meta("resnet152"))
    short, full = report(plan), report(plan, full=True)
    assert short == full
    rows = short._printed_rows()
    assert len(full._printed_rows()) == len(short.sites) + 1
    assert len(rows) <= 40 < len(short.sites)
    for column, total in ((3, short.dense_params), (4, short.hyper_params)):
        assert sum(int(row[column].replace(",", "") or 0) for row in rows) == total
    assert "layer3.1-35.conv1.weight" in str(short)
    assert "report(..., full=True) shows each" in flat(short)
    assert all(row.path in str(full) for row in full.sites if "downsample" not in row.path)
    assert "full=True" not in str(full)


def test_only_equal_rows_are_collapsed():
    rows = [("a.0.w", 1), ("a.1.w", 1), ("a.2.w", 2), ("a.4.w", 1), ("b.w", 1), ("c2.w", 1)]
    assert collapse(rows) == [
        ("a.0-1,4.w", [0, 1, 3]),
        ("a.2.w", [2]),
        ("b.w", [4]),
        ("c2.w", [5]),
    ]
    nested = [(f"{i}.x.{j}.w", 0) for i in range(3) for j in range(2)]
    assert collapse(nested) == [("0-2.x.0-1.w", [0, 2, 4, 1, 3, 5])]
    assert collapse([]) == []


@pytest.mark.parametrize("thing", ["report", "plan", "fit"])
def test_every_form_of_a_report(thing):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("<b>", nn.Conv2d(32, 32, 3))
    hyper = hyperize(model, compression=4)
    made = {
        "report": lambda: report(hyper),
        "plan": lambda: hyper.hypernet.plan,
        "fit": lambda: fit_(hyper, model, sweeps=1),
    }[thing]()
    text = str(made)
    assert repr(made) == text
    assert "\x1b" not in text  # which can go into a file
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=80, color_system="standard").print(made)
    coloured = file.getvalue()
    assert "\x1b[" in coloured
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == text.splitlines()
    html = made._repr_html_()
    assert len(html) < 2_000
    assert html.count("background:#ea580c") >= 2  # bars
    assert "<b>." not in html
    figure = {
        "report": lambda: f"{made.total_dense_params:,}",
        "plan": lambda: f"{made.total_params:,}",
        "fit": lambda: f"{made.error:.3f}",
    }[thing]()
    assert figure in html
    assert figure in text


def test_long_fits_show_the_largest_errors():
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(41)))
    made = fit_(hyperize(model, compression=4), model, sweeps=1)
    worst = sorted(made.sites, key=lambda site: -site.error)
    lines = str(made).splitlines()
    shown = [line.split()[0] for line in lines if re.match(r"\d+\.weight +0\.\d+$", line)]
    assert shown == [site.name for site in worst[:10]]
    assert "the 10 largest errors" in str(made)


def test_multiply_adds_have_a_yardstick():
    hyper = hyperize(meta("resnet18"))
    result = report(hyper)
    assert result.forward_macs == pytest.approx(1.814e9, rel=1e-3)  # as torchvision publishes it
    share = result.generator_macs / result.forward_macs
    assert f"{share:.2g} of a forward pass at 224 px, batch 1" in flat(result)
    hyper.reset_classifier(10)
    assert report(hyper).forward_macs == result.forward_macs - 990 * 512
    two = report(hyperize(meta("test_resnet"), compression=4, conditions=2))
    one = report(hyperize(meta("test_resnet"), compression=4))
    assert two.forward_macs == one.forward_macs > 0
    plan = report(make_plan(meta("resnet18")))
    each = plan.generator_macs / plan.dense_params
    assert f"per forward pass, {each:.0f} for each weight" in flat(plan)


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


def test_the_command_line_shows_all_rows_when_asked(capsys):
    assert main(["report", "resnet101"]) == 0
    short = capsys.readouterr().out
    assert main(["report", "resnet101", "--all"]) == 0
    full = capsys.readouterr().out
    assert short.count("\n") < 45 < 100 < full.count("\n")
    assert "layer3.1-22.conv1.weight" in short
    assert "layer3.22.conv1.weight" in full


@pytest.mark.parametrize("terminal", [True, False])
def test_the_command_line_has_colours_on_a_terminal(terminal, monkeypatch, capsys):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # by which a test says that there is one
        monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("rich._console", None)  # the next print looks at it anew
    assert main(["report", "test_resnet", "--compression", "4"]) == 0
    out = capsys.readouterr().out
    assert ("\x1b[" in out) == terminal
    assert "targets, parameters" in out
