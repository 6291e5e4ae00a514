"""The command line, run in-process; once as the installed command."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from models import randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hyperize import (
    HyperConfig,
    Plan,
    __version__,
    condition,
    dense_state_dict,
    hyperize,
    load,
    load_timm,
    make_plan,
    save,
)
from hyperize.cli import _parser, main


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
    assert "test_resnet, " in output.out
    assert "322,560 of 373,173 parameters are generated from" in output.out
    assert "--data-dir" in output.out
    assert "dense 1,501,132 bytes, 2.3 times as many" in output.out
    assert f"hyperize convert --checkpoint {small} --out dense.safetensors" in output.out
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


def test_info_of_several_hypernetworks(tmp_path, capsys):
    parts = [hyperize(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3))) for _ in range(2)]
    path = tmp_path / "hyper.safetensors"
    save(torch.nn.Sequential(*parts), path)
    assert main(["info", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "2 hypernetworks" in output.err
    model = timm.create_model("test_resnet")
    for name in ("layer3", "layer4"):
        setattr(model, name, hyperize(getattr(model, name), compression=2))
    save(model, path)
    assert main(["info", str(path), "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["report"]["sites"]
    assert {site["path"].partition(".")[0] for site in sites} == {"layer3", "layer4"}


FIT = ["fit", "test_resnet", "--num-classes", "5", "--compression", "3"]
FIT += ["--checkpoint", "teacher.safetensors"]
CONVERT = ["convert", "--checkpoint", "hyper.safetensors"]
EXPORT = ["export", "--checkpoint", "hyper.safetensors", "--input-size", "3", "64", "64"]
REPORT, INFO = ["report", "test_resnet"], ["info", "hyper.safetensors"]
FOLDER = ("model.safetensors", "config.json", "README.md")
"""The files that `convert` writes to a folder."""
OLD = b"old"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with files that have the names of a command's inputs."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in ("teacher.safetensors", "hyper.safetensors", "images/a.PNG", "images/notes.txt"):
        Path(name).write_bytes(name.encode())
    Path("folder").mkdir()
    return tmp_path


@pytest.fixture
def refused(place, monkeypatch, capsys):
    """Runs a command line that must be refused before any work, and gives what it says."""

    def work(*args, **kwargs):
        pytest.fail("the work began")

    for name in ("make", "make_empty", "load_timm", "load", "read_header"):
        monkeypatch.setattr(f"hyperize.commands.{name}", work)

    def contents():
        paths = [path for path in place.rglob("*") if path.is_file() or not path.exists()]
        links = {path: os.readlink(path) for path in place.rglob("*") if path.is_symlink()}
        files = {path: path.read_bytes() for path in paths if path.exists()}
        return links, files, sorted(place.rglob("*"))

    def run(argv):
        before = contents()
        assert main(argv) == 1
        assert contents() == before
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert line.startswith("hyperize: ")
        return line

    return run


def aliases(name):
    """Makes other paths to a file of the current folder, by what kind they are."""
    os.symlink(name, "link")
    os.symlink("link", "second")
    os.link(name, "hard")
    os.symlink(".", "here")
    paths = {"same": name, "dots": f"images/../{name}", "absolute": os.path.abspath(name)}
    return paths | {"link": "link", "second": "second", "hard": "hard", "folder": f"here/{name}"}


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
@pytest.mark.parametrize(
    "kind", ["same", "dots", "absolute", "link", "second", "hard", "folder", "reverse"]
)
@pytest.mark.parametrize(
    ("flag", "name", "argv", "out"),
    [
        ("--checkpoint", "teacher.safetensors", FIT[:-2], "--out"),
        ("--checkpoint", "hyper.safetensors", ["convert"], "--out"),
        ("--checkpoint", "hyper.safetensors", ["export"], "--out"),
        ("FILE", "hyper.safetensors", ["info"], "--html"),
    ],
    ids=["fit", "convert", "export", "info"],
)
def test_an_output_is_never_the_input(flag, name, argv, out, kind, force, refused):
    paths = aliases(name)
    target = name if kind == "reverse" else paths[kind]
    source = paths["link"] if kind == "reverse" else name
    if argv == ["convert"] and "." not in target:  # it would be a folder
        os.rename(target, target := f"{target}.safetensors")
        source = target if kind == "reverse" else source
    given = [source] if flag == "FILE" else [flag, source]
    said = refused([*argv, *given, out, target, *force])
    assert f"{out} {target} is a file that {flag} {source} reads" in said


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
@pytest.mark.parametrize("name", FOLDER)
def test_a_folder_to_write_does_not_hold_the_input(name, force, refused):
    os.rename("hyper.safetensors", f"folder/{name}")
    os.symlink("folder", "link")
    for folder in ("folder", "link", "folder/../link/."):
        argv = ["convert", "--checkpoint", f"folder/{name}", "--out", folder]
        assert "no input is overwritten" in refused([*argv, *force])


@pytest.mark.parametrize(
    "given",
    [
        ["--data-dir", "images"],
        ["--data-dir", "linked"],
        ["--model-kwargs", "checkpoint_path=images/a.PNG"],
        ["--model-kwargs", 'pretrained_cfg_overlay={"file": "images/a.PNG"}'],
    ],
)
def test_other_inputs_are_not_overwritten_either(given, refused):
    Path("linked").mkdir()
    os.symlink("../images", "linked/class")
    argv = [*FIT, "--out", "images/a.PNG", "--force", *given]
    assert "no input is overwritten" in refused(argv)


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        (FIT, ["--out", "old.safetensors"]),
        (CONVERT, ["--out", "old.safetensors"]),
        *((CONVERT, ["--out", "folder", name]) for name in FOLDER),
        (EXPORT, ["--out", "old.onnx"]),
        (EXPORT, ["--out", "old.pt2"]),
        (REPORT, ["--html", "old.html"]),
        (INFO, ["--html", "old.html"]),
    ],
    ids=lambda value: "-".join(value[:1] + value[-1:]),
)
@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_a_file_that_exists_is_not_overwritten_unasked(argv, out, kind, refused):
    old = Path(*out[1:3]) if out[1] == "folder" else Path(out[1])
    if kind == "file":
        old.write_bytes(OLD)
    else:
        old.symlink_to(Path("images", "notes.txt" if kind == "link" else "absent").absolute())
    said = refused([*argv, *(out[:2] if out[1] == "folder" else out)])
    assert f"{old.name} " in said
    assert "exists already" in said
    assert "--force" in said


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        (FIT, "new.safetensors"),
        (CONVERT, "new.safetensors"),
        (CONVERT, "folder"),
        (EXPORT, "new.onnx"),
        (EXPORT, "new.pt2"),
        (REPORT, "new.html"),
        (INFO, "new.html"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_force_overwrites_and_nothing_else(argv, out, trained, place, capsys):
    root, teacher = trained
    shutil.copy(root / "teacher.safetensors", place)
    save(hyperize(teacher, compression=3), "hyper.safetensors")
    inputs = {
        name: Path(name).read_bytes() for name in ("teacher.safetensors", "hyper.safetensors")
    }
    argv = [*argv, "--html" if out.endswith(".html") else "--out", out]
    written = [Path(out, name) for name in FOLDER] if out == "folder" else [Path(out)]
    before = set(place.rglob("*"))
    assert main(argv) == 0  # wants no flag as long as nothing is there
    assert {place / path for path in written} == set(place.rglob("*")) - before
    for path in written:
        path.write_bytes(OLD)
    assert main(argv) == 1
    assert all(path.read_bytes() == OLD for path in written)
    assert main([*argv, "--force"]) == 0
    assert all(len(path.read_bytes()) > len(OLD) for path in written)
    assert {place / path for path in written} == set(place.rglob("*")) - before
    assert all(Path(name).read_bytes() == data for name, data in inputs.items())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*FIT, "--out", "absent/x.safetensors"], "absent is not a folder"),
        ([*FIT, "--out", "hyper.safetensors/x.safetensors"], "hyper.safetensors is not a folder"),
        ([*FIT, "--out", "folder"], "--out folder is a folder"),
        ([*FIT, "--out", "pipe"], "a device or a pipe"),
        ([*FIT, "--out", ""], "is a folder"),
        ([*FIT, "--out", "locked/x.safetensors"], "locked cannot be written to"),
        ([*CONVERT, "--out", "absent/x.safetensors"], "absent is not a folder"),
        ([*CONVERT, "--out", "pipe.safetensors"], "pipe.safetensors is a folder"),
        ([*CONVERT, "--out", "images/notes.txt"], "notes.txt must end in .safetensors"),
        ([*CONVERT, "--out", "images/notes.txt/x/y"], "images/notes.txt is not a folder"),
        ([*CONVERT, "--out", "dangling"], "dangling is not a folder"),
        ([*CONVERT, "--out", "locked"], "locked cannot be written to"),
        ([*CONVERT, "--out", "locked/x/y"], "locked cannot be written to"),
        ([*CONVERT, "--out", "full"], "config.json in --out full is a folder"),
        ([*EXPORT, "--out", "absent/x.onnx"], "absent is not a folder"),
        ([*EXPORT, "--out", "absent/x.pt2"], "absent is not a folder"),
        ([*EXPORT, "--out", "pipe"], "a device or a pipe"),
        ([*REPORT, "--html", "absent/x.html"], "absent is not a folder"),
        ([*REPORT, "--html", "folder"], "--html folder is a folder"),
        ([*REPORT, "--html", ""], "is a folder"),
        ([*INFO, "--html", "locked/x.html"], "locked cannot be written to"),
        ([*INFO, "--html", "folder"], "--html folder is a folder"),
        ([*CONVERT, "--out", "twins"], "same file as model.safetensors in --out twins"),
        ([*FIT, "--out", "h.pth"], "--out h.pth must end in .safetensors"),
        ([*CONVERT, "--out", "dense.pth"], "--out dense.pth must end in .safetensors"),
        ([*EXPORT, "--out", "x.tflite"], "--out x.tflite must end in .onnx or .pt2"),
        ([*REPORT, "--html", "page.pdf"], "--html page.pdf must end in .html or .htm"),
    ],
    ids=lambda value: "-".join([value[0], value[-1]]) if isinstance(value, list) else "",
)
def test_outputs_are_checked_before_the_work(argv, words, refused, monkeypatch):
    os.mkfifo("pipe")
    os.symlink("absent", "dangling")
    Path("hyper.safetensors").chmod(0o777)  # may be written and searched, as a folder
    for folder in ("locked", "pipe.safetensors", "full/config.json", "twins"):
        Path(folder).mkdir(parents=True)
    Path("twins/model.safetensors").write_bytes(OLD)
    os.link("twins/model.safetensors", "twins/config.json")
    # Root, as which tests may run, can write to any folder
    allowed = os.access
    monkeypatch.setattr(
        "hyperize.outputs.os.access",
        lambda path, mode: allowed(path, mode) and Path(path).name != "locked",
    )
    assert words in refused([*argv, "--force"])


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_program_is_written_whole_or_not_at_all(error, trained, place, monkeypatch, capsys):
    def stop(program, file):
        file.write(b"a part")
        raise error("disk full")

    _, teacher = trained
    save(hyperize(teacher, compression=3), "hyper.safetensors")
    Path("model.pt2").write_bytes(OLD)
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(torch.export, "save", stop)
    assert main([*EXPORT, "--out", "model.pt2", "--force"]) == 1
    assert "model.pt2 cannot be written: disk full" in capsys.readouterr().err
    assert Path("model.pt2").read_bytes() == OLD
    assert sorted(place.rglob("*")) == before


def test_what_only_the_system_refuses_is_a_typed_error(place, capsys):
    # The name is allowed, but not with the ending that it has while it is written
    name = "x" * 245 + ".html"
    assert main([*REPORT, "--html", name]) == 1
    said = capsys.readouterr().err
    assert f"{name} cannot be written: " in said
    assert ".part" not in said


def test_zoo(capsys):
    assert main(["zoo", "--filter", "resnet1*t"]) == 0
    output = capsys.readouterr()
    assert output.err == ""  # no progress bar where nobody watches
    assert [line.split()[0] for line in output.out.splitlines()[1:]] == ["resnet10t", "resnet14t"]
    assert main(["zoo", "--filter", "resnet10t", "--json", "--compression", "30"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["compression"] >= 30


FIT_OWN = [
    "fit",
    "test_resnet",
    "--num-classes",
    "5",
    "--compression",
    "3",
    "--out",
    "x.safetensors",
]


@pytest.fixture
def wrong(trained, tmp_path, monkeypatch):
    """The current folder, with inputs that cannot be used."""
    root, teacher = trained
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "teacher.safetensors", ".")
    save(hyperize(teacher, compression=3), "hyper.safetensors")
    save_file(timm.create_model("test_vit").state_dict(), "other.safetensors")
    torch.save(teacher, "pickled.pth")
    Path("noise.pth").write_bytes(bytes(range(256)))
    for folder in ("empty", "damaged/any"):
        Path(folder).mkdir(parents=True)
    whole = next((root / "images").rglob("*.png")).read_bytes()
    Path("damaged/any/a.png").write_bytes(whole[: len(whole) // 2])
    Path("own.py").write_text(OWN)


OWN = """
from torch import nn

def net(width=32, num_classes=10):
    layers = nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    return nn.Sequential(*layers, *head)

made = net()

def number():
    return 3
"""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["report", "resnte50"], "did you mean 'resnet50'"),
        (["report", "resnet18.a1_in1kk"], "did you mean 'resnet18.a1_in1k'"),
        (["report", "resnet18", "--compression", "1"], "above 1"),
        (["report", "resnet18", "--compression", "1e9"], "reachable range"),
        (["report", "resnet18", "--compression", "3", "--max-params", "9"], "one of the two"),
        (["report", "resnet18", "--targets", "lstm"], "no lstm layer"),
        (["report", "resnet18", "--targets", "conv"], "did you mean 'conv2d'"),
        (["report", "resnet18", "--model-kwargs", "nonsense=1"], "cannot create"),
        (["report", "own:nte"], "own has no 'nte'; did you mean 'net'?"),
        (["report", "own:number"], "must return a torch.nn.Module, got int"),
        (["report", "own:net", "--model-kwargs", "wide=1"], "cannot be called so (TypeError"),
        (["report", "own:made", "--num-classes", "3"], "is a model already"),
        (["report", "absent.module:net"], "cannot be imported (ModuleNotFoundError"),
        (["report", "transformers.BertModle:x"], "did you mean 'BertModel'"),
        (["report", "transformers:damaged"], "transformers cannot make damaged"),
        (["zoo", "--filter", "nothing*"], "matches no timm model"),
        (["convert", "resnet18", "--checkpoint", "absent", "--out", "x"], "absent does not exist"),
        (["convert", "--checkpoint", "own.py", "--out", "x"], "cannot be read"),
        (["convert", "own:net", "--checkpoint", "hyper.safetensors", "--out", "x"], "does not fit"),
        (["info", "own.py"], "cannot be read"),
        (["info", "empty"], "FILE empty is not a file"),
        ([*FIT_OWN, "--checkpoint", "own.py"], "no file of weights"),
        ([*FIT_OWN, "--checkpoint", "noise.pth"], "no file of weights"),
        ([*FIT_OWN, "--checkpoint", "pickled.pth"], "pickled objects"),
        ([*FIT_OWN, "--checkpoint", "hyper.safetensors"], "hyperize convert"),
        (
            [*FIT_OWN, "--checkpoint", "other.safetensors"],
            "92 missing (conv1.0.weight first), 80 unexpected (blocks.0.attn.proj.bias first)",
        ),
        (
            [*FIT_OWN, "--num-classes", "7", "--checkpoint", "teacher.safetensors"],
            "2 of another shape (fc.weight first)",
        ),
        ([*FIT_OWN, "--data-dir", "absent"], "--data-dir absent does not exist"),
        ([*FIT_OWN, "--data-dir", "own.py"], "--data-dir own.py is not a folder"),
        ([*FIT_OWN, "--data-dir", "empty"], "--data-dir empty holds no images"),
        (
            [*FIT_OWN, "--checkpoint", "teacher.safetensors", "--data-dir", "damaged"],
            "damaged/any/a.png in --data-dir cannot be read",
        ),
        (["plan", "resnet18", "--embeddings", "channel", "--tile", "1", "8"], "no tiles"),
        (
            [*EXPORT[:3], "--input-size", "4,64", "64", "--out", "x.pt2"],
            "torch.export cannot take the ResNet",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join([value[0], value[-1]]),
)
def test_refusals_are_one_line_on_stderr(argv, words, wrong, capsys):
    before = sorted(Path().rglob("*"))
    assert main(argv) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("hyperize: ")
    assert words in line
    assert [path for path in sorted(Path().rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["repport"], "invalid choice: 'repport'"),
        (["report"], "no model is named"),
        (["report", "resnet18", "--model", "resnet34"], "two models are named"),
        (["report", "resnet18", "--compresion", "3"], "did you mean '--compression'?"),
        (["report", "resnet18", "--compresion=3"], "unknown argument --compresion;"),
        (["report", "resnet18", "resnet34"], "unknown argument resnet34"),
        (["plan", "resnet18", "--tile", "3"], "expected 2 values, got 1"),
        (["export", "--input-size", "3,x,2"], "must be a whole number, got 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line_with_a_suggestion(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert "--help has all arguments" in line


QUICK = """
import resource, sys
from hyperize.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
assert not {"torch", "timm", "numpy"} & set(sys.modules), "a heavy import"
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["report", "--help"], 0),
        (["report", "resnet18", "--compresion", "3"], 2),
        (["report", "resnet18", "--compression", "1"], 1),
        (["report", "resnet18", "--html", "page.pdf"], 1),
        (["fit", "resnet18", "--checkpoint", "absent", "--out", "x.safetensors"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_wrong_arguments_need_no_torch(argv, code):
    command = [sys.executable, "-c", QUICK, *argv]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    found = [run.stdout.splitlines()[-1].split() for run in runs]
    assert {int(number) for number, _ in found} == {code}
    assert min(float(seconds) for _, seconds in found) < 0.3


def test_the_library_is_imported_without_what_takes_longer_than_torch():
    heavy = "{'timm', 'torchvision', 'torch._dynamo', 'torch.distributed.fsdp', 'triton', 'sympy'}"
    code = "import sys, torch; before = set(sys.modules); import hyperize; hyperize.hyperize; "
    code += f"print(sorted({heavy} & (set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hyperize", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"hyperize {__version__}\n")


def test_an_interrupted_table_keeps_its_rows():
    """Rows are there as they are planned, and Ctrl-C is no error of Python's."""
    command = [sys.executable, "-m", "hyperize", "zoo", "--filter", "*"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Children of a job in a shell's background ignore the signal, and pass that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        lines = [run.stdout.readline() for _ in range(4)]
        run.send_signal(signal.SIGINT)
        rest, error = run.communicate()
    assert run.returncode == 130
    assert error == "hyperize: interrupted\n"
    names = [line.split()[0] for line in [*lines[1:], *rest.splitlines()]]
    assert names == timm.list_models()[: len(names)]


def test_an_interrupted_json_table_is_whole(monkeypatch, capsys):
    def planned(*args):
        yield {"model": "first"}
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperize.commands._planned_rows", planned)
    assert main(["zoo", "--filter", "resnet10t", "--json"]) == 130
    output = capsys.readouterr()
    assert json.loads(output.out) == [{"model": "first"}]
    assert output.err == "hyperize: interrupted\n"


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "transformers:some/model"])
def test_without_a_network_weights_fail_at_once(name, tmp_path):
    """huggingface_hub would try again for the better part of a minute."""
    nowhere = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "hyperize", "fit", name, "--targets", "linear,conv2d"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "x.safetensors")],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot be reached" in line
    assert "--checkpoint FILE" in line


def test_models_that_are_not_timms(wrong, capsys):
    assert (
        main(
            [
                "fit",
                "own:net",
                "--compression",
                "3",
                "--model-kwargs",
                "width=48",
                "--out",
                "a.safetensors",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "own:net, its own weights: 20,736 of 22,618 parameters are generated from" in said
    assert "  hyperize convert own:net --model-kwargs width=48 --checkpoint a.safetensors" in said
    for line in (line.strip() for line in said.splitlines() if line.startswith("  hyperize ")):
        if "export" not in line:
            assert main(shlex.split(line)[1:]) == 0  # what it says to type next works
    model = nn.Sequential(*own_layers(48))
    model.load_state_dict(load_file("dense.safetensors"))
    hyper = load(nn.Sequential(*own_layers(48)), "a.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), hyper(x))
    capsys.readouterr()
    argv = ["report", "--model", "torchvision.models:resnet18", "--num-classes", "7", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["total_dense_params"] == 11_180_103


def own_layers(width):
    layers = nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3)
    return *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)


def test_installed_command(capsys):
    done = subprocess.run(["hyperize", "--help"], capture_output=True, text=True, check=True)
    for command in ("report", "plan", "convert", "fit", "export", "zoo", "info"):
        assert command in done.stdout
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"example: hyperize {command} " in " ".join(capsys.readouterr().out.split())


def test_several_checkpoints_become_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        model = randomise(timm.create_model("test_resnet", num_classes=4), seed)
        save_file(model.state_dict(), f"{seed}.safetensors")
    fit = "fit test_resnet --num-classes 4 --compression 3 --private fc --out all.safetensors"
    assert main([*fit.split(), "--checkpoint", *(f"{seed}.safetensors" for seed in range(3))]) == 0
    assert "of network" in capsys.readouterr().out
    model = timm.create_model("test_resnet", num_classes=4)
    hyper = load(model, "all.safetensors").eval()
    for k in range(3):
        convert = (
            f"convert --checkpoint all.safetensors --condition {k} --out {k}-dense.safetensors"
        )
        assert main(convert.split()) == 0
        model.load_state_dict(load_file(f"{k}-dense.safetensors"))
        teacher = load_file(f"{k}.safetensors")
        assert torch.equal(model.fc.weight, teacher["fc.weight"])
        x = torch.randn(2, 3, 64, 64)
        with condition(hyper, k):
            assert torch.equal(hyper(x), model.eval()(x))
    capsys.readouterr()
    for arguments, words in (
        ("convert --checkpoint all.safetensors --out d.safetensors", "3 networks; say which"),
        ("convert --checkpoint all.safetensors --out d.safetensors --condition 3", "0 to 2"),
        (f"{fit} --force --conditions 2 --checkpoint 0.safetensors", "a list of 2"),
    ):
        assert main(arguments.split()) == 1
        assert words in capsys.readouterr().err
    assert main(["report", "test_resnet", "--conditions", "4", "--compression", "3"]) == 0
    assert "networks: 4" in capsys.readouterr().out


def test_models_of_transformers(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    )
    transformers.BertModel(config).save_pretrained("bert")
    argv = ["transformers:bert", "--targets", "linear", "--compression", "3"]
    assert main(["fit", *argv, "--out", "bert.safetensors"]) == 0
    argv = ["convert", "transformers:bert", "--checkpoint", "bert.safetensors"]
    assert main([*argv, "--out", "dense.safetensors"]) == 0
    dense = transformers.BertModel(config)
    dense.load_state_dict(load_file("dense.safetensors"))
    kind = "transformers.BertForSequenceClassification:bert"
    capsys.readouterr()
    options = ["--targets", "linear", "--model-kwargs", "num_labels=7", "--json"]
    assert main(["report", kind, *options]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][-1]["shape"] == [7, 64]
    assert main(["report", kind, "--num-classes", "7"]) == 1
    assert "num_labels" in capsys.readouterr().err


def test_values_are_divided_by_spaces_or_commas(capsys):
    argv = ["plan", "resnet18", "--json", "--exclude", "layer4,layer3", "--tile", "16,8"]
    assert main([*argv, "--targets", "conv2d,", "linear", "--recompute", "--hidden-dim", "4"]) == 0
    config = Plan.from_dict(json.loads(capsys.readouterr().out)).config
    assert config.targets == ("conv2d", "linear")
    assert config.exclude == ("layer4", "layer3")
    assert (config.tile, config.recompute) == ((16, 8), True)


def test_every_option_has_a_flag():
    flags = _parser().commands["fit"].format_help()
    for field in fields(HyperConfig):
        assert f"--{field.name.replace('_', '-')} " in flags.replace("]", " "), field.name
