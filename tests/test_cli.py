"""The command line, run in-process; once as the installed command."""

import json
import subprocess

import onnxruntime
import pytest
import timm
import torch
from models import randomise
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperize import Plan, dense_state_dict, hyperize, load_timm, make_plan, save
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


def test_plan(capsys):
    assert main(["plan", "resnet18", "--compression", "20", "--embeddings", "channel"]) == 0
    text = capsys.readouterr().out
    assert "channel" in text
    assert "weights are not generated" not in text
    assert main(["plan", "resnet18", "--factorized"]) == 0
    assert "factors 9 weights are not generated" in capsys.readouterr().out
    assert main(["plan", "resnet18", "--compression", "20", "--json"]) == 0
    plan = Plan.from_dict(json.loads(capsys.readouterr().out))
    with torch.device("meta"):
        assert plan == make_plan(timm.create_model("resnet18"), compression=20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher's weights, and images for it."""
    root = tmp_path_factory.mktemp("trained")
    teacher = randomise(timm.create_model("test_resnet", num_classes=5), 0).eval()
    save_file(teacher.state_dict(), root / "teacher.safetensors")
    (root / "images" / "any").mkdir(parents=True)
    for i in range(12):
        noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(root / "images" / "any" / f"{i}.png")
    return root, teacher


def test_fit_convert_and_info(trained, tmp_path, capsys):
    root, teacher = trained
    model = ["test_resnet", "--num-classes", "5"]
    fit = ["fit", *model, "--checkpoint", str(root / "teacher.safetensors"), "--compression", "3"]
    small, better = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    assert main([*fit, "--out", small]) == 0
    output = capsys.readouterr()
    assert "weights fitted" in output.out
    assert "load_timm makes it a test_resnet" in output.out
    assert output.err == ""
    argv = ["--data-dir", str(root / "images"), "--samples", "8", "--json", "--dtype", "bfloat16"]
    assert main([*fit, "--out", better, *argv]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] < 0.6 * (tmp_path / "a.safetensors").stat().st_size
    assert all(site["output_error"] is not None for site in facts["sites"])
    hyper = load_timm(small)
    assert hyper.hypernet.plan.config.embeddings == "channel"
    missed = {site["name"]: site["error"] for site in facts["sites"]}
    for name, weight in dense_state_dict(load_timm(better)).items():
        if name in missed:  # the file is rounded, by 2^-8 at most
            right = teacher.get_parameter(name)
            error = ((weight - right).norm() / right.norm()).item()
            assert error == pytest.approx(missed[name], abs=0.01)

    for out in ("dense.safetensors", "folder"):
        assert main(["convert", "--checkpoint", small, "--out", str(tmp_path / out)]) == 0
    expected = dense_state_dict(hyper)
    for path in ("dense.safetensors", "folder/model.safetensors"):
        state = load_file(tmp_path / path)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    capsys.readouterr()

    assert main(["info", small]) == 0
    text = capsys.readouterr().out
    assert "test_resnet of timm" in text
    assert "checksum right" in text
    page = tmp_path / "page.html"
    assert main(["info", better, "--json", "--html", str(page)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["timm"]["architecture"] == "test_resnet"
    assert facts["rounded_from"] == ["float32"]
    assert facts["report"]["compression"] >= 3
    assert "layer1.0.conv1.weight" in page.read_text()


@pytest.mark.parametrize("generator", [False, True])
def test_export(generator, trained, tmp_path, capsys):
    _, teacher = trained
    path = tmp_path / "hyper.safetensors"
    hyper = hyperize(teacher, compression=3)
    save(hyper, path)
    flags = ["--keep-generator"] if generator else []
    onnx, program = tmp_path / "model.onnx", tmp_path / "model.pt2"
    for out in (onnx, program):
        argv = ["export", "--checkpoint", str(path), "--out", str(out), *flags]
        assert main([*argv, "--input-size", "3", "64", "64"]) == 0
        assert str(out.name) in capsys.readouterr().out
    x = torch.randn(5, 3, 64, 64)  # another batch size than that of the export
    with torch.no_grad():
        expected = hyper(x)
        found = torch.export.load(program).module()(x)
    assert torch.equal(found, expected)
    session = onnxruntime.InferenceSession(onnx)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Kernels of another library: the order of sums differs
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()
    dense = sum(p.numel() for p in teacher.parameters()) * 4
    assert (onnx.stat().st_size < 0.8 * dense) == generator


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
        (["convert", "--checkpoint", __file__, "--out", "x"], "cannot be read"),
        (["info", __file__], "cannot be read"),
        (["fit", "resnet18", "--checkpoint", __file__, "--out", "x"], "does not fit"),
        (["export", "--checkpoint", __file__, "--out", "x.tflite"], "must end in"),
        (["plan", "resnet18", "--embeddings", "channel", "--tile", "1", "8"], "no tiles"),
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


def test_installed_command(capsys):
    done = subprocess.run(["hyperize", "--help"], capture_output=True, text=True, check=True)
    for command in ("report", "plan", "convert", "fit", "export", "zoo", "info"):
        assert command in done.stdout
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"example: hyperize {command} " in " ".join(capsys.readouterr().out.split())
