"""The command line, run in-process; once as the installed command."""

import json
import subprocess

import pytest
import timm
import torch
from models import randomise
from safetensors.torch import load_file

from hyperize import hyperize, save
from hyperize.cli import main


def test_report(capsys):
    assert main(["report", "resnet18", "--compression", "20"]) == 0
    text = capsys.readouterr().out
    assert "layer1.0.conv1.weight" in text
    assert max(map(len, text.splitlines())) <= 80


def test_report_as_json_takes_every_request(capsys):
    argv = ["report", "resnet18", "--json", "--num-classes", "7", "--exclude", "layer4"]
    argv += ["--tile", "16", "16"]
    assert main([*argv, "--embedding-dim", "8", "--hidden-dim", "16"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["total_dense_params"] == 11_689_512 - 993 * 513
    assert not [site for site in data["sites"] if site["path"].startswith("layer4")]
    assert data["hypernet_params"] == 16 * 16 * 9 + 17 * 16 * 9 + 17 * 16


def test_report_of_dynamic_layers(capsys):
    assert main(["report", "sequencer2d_s", "--lstm", "dynamic"]) == 0
    text = capsys.readouterr().out
    assert "lstm, dynamic" in text
    assert "no dense equivalent" in text.replace("\n", " ")
    assert max(map(len, text.splitlines())) <= 80


def test_convert(tmp_path, capsys):
    dense = randomise(timm.create_model("resnet10t", num_classes=5), 0).eval()
    hyper = hyperize(dense)
    save(hyper, tmp_path / "hyper.safetensors")
    out = tmp_path / "dense.safetensors"
    argv = ["convert", "resnet10t", "--num-classes", "5"]
    files = ["--checkpoint", str(tmp_path / "hyper.safetensors"), "--out", str(out)]
    assert main([*argv, *files]) == 0
    assert "dense.safetensors" in capsys.readouterr().out
    fresh = timm.create_model("resnet10t", num_classes=5).eval()
    fresh.load_state_dict(load_file(out), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh(x), hyper(x))
        assert not torch.equal(fresh(x), dense(x))


def test_zoo(capsys):
    assert main(["zoo", "--filter", "resnet1*t"]) == 0
    output = capsys.readouterr()
    assert output.err == ""  # no progress bar where nobody watches
    assert [line.split()[0] for line in output.out.splitlines()[1:]] == ["resnet10t", "resnet14t"]
    assert main(["zoo", "--filter", "resnet10t", "--json", "--compression", "30"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["compression"] >= 30


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["report", "resnet5"], "near misses"),
        (["report", "resnet18", "--compression", "1"], "above 1"),
        (["report", "resnet18", "--compression", "1e9"], "reachable range"),
        (["report", "resnet18", "--targets", "lstm"], "no lstm layer"),
        (["report", "resnet18", "--model-kwargs", "nonsense=1"], "cannot create"),
        (["zoo", "--filter", "nothing*"], "matches no timm model"),
        (["convert", "resnet18", "--checkpoint", "absent", "--out", "x"], "absent"),
    ],
)
def test_refusals_are_one_line_on_stderr(argv, words, capsys):
    assert main(argv) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert "Traceback" not in output.err


def test_wrong_usage_exits_with_2():
    with pytest.raises(SystemExit) as stop:
        main(["report"])
    assert stop.value.code == 2


def test_installed_command():
    done = subprocess.run(["hyperize", "--help"], capture_output=True, text=True, check=True)
    assert "convert" in done.stdout
