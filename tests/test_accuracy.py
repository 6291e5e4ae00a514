"""The comparison of methods trained from scratch, on tiny images made here."""

import argparse
import importlib
import json
import queue
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
CLASSES = ("blue", "green", "red")
BATCH = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An ImageFolder data set: three classes, each of one colour, in noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, size in (("train", 16), ("test", 5)):
        for channel, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(size):
                pixels = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 50
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.accuracy")


@pytest.fixture
def recipes(accuracy):
    return importlib.import_module("benchmarks.recipes")


@pytest.fixture
def lowrank(accuracy):
    return importlib.import_module("benchmarks.lowrank")


def job(accuracy, **other):
    fields = {
        "subject": "resnet20",
        "ratio": "5",
        "method": "tile",
        "rate": 1.0,
        "seed": 0,
        "choose": False,
        "epochs": 2,
        "batch_size": BATCH,
        "amp": False,
    }
    return accuracy.Job(**fields | other)


def flags(data, out):
    return argparse.Namespace(data_dir=data, out=out, device="cpu", steps=None)


def test_rates_are_chosen_on_held_out_images_and_the_test_set_is_touched_once(
    accuracy, data, tmp_path, capsys
):
    asked = (
        f"--data-dir {data} --out {tmp_path} --methods dense thin tile --ratios 5 10 --rates 1 3"
    )
    asked += f" --seeds 0 1 --epochs 1 --batch-size {BATCH} --jobs 2 --device cpu"
    rows = accuracy.main(asked.split())
    assert [(row.job.method, row.job.ratio) for row in rows] == [
        ("dense", ""), ("thin", "5"), ("tile", "5"), ("thin", "10"), ("tile", "10"),
    ]  # fmt: skip
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    tried = [r for r in results if r["job"]["choose"]]
    final = [r for r in results if not r["job"]["choose"]]
    assert len(tried) == len(rows) * 2
    assert len(final) == len(rows) * 2
    for row in rows:
        name = row.job.method, row.job.ratio
        mine = [r for r in tried if (r["job"]["method"], r["job"]["ratio"]) == name]
        best = max(r["accuracy"] for r in mine)
        assert row.job.rate in [r["job"]["rate"] for r in mine if r["accuracy"] == best]
        assert len(row.accuracies) == 2
    most = rows[0].parameters
    assert all(r.parameters <= most / float(r.job.ratio) for r in rows[1:])
    printed = capsys.readouterr().out
    assert printed.count("resnet20 |") == len(rows)
    assert (tmp_path / "resnet20.png").read_bytes()[1:4] == b"PNG"
    # What is there is not run again
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.json"))]
    again = accuracy.main(asked.split())
    assert again == rows
    assert written == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.json"))]


@pytest.mark.parametrize(
    "method",
    ["tile", "thin", "tile:optimizer=adam,lr=0.01,decay=0,l2=0.0005"],
)
def test_an_interrupted_training_ends_as_if_it_had_not_been(accuracy, method, data, tmp_path):
    class Killed(queue.Queue):
        def put(self, item):
            raise KeyboardInterrupt

    results = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        args = flags(data, tmp_path / name)
        if name == "killed":
            with pytest.raises(KeyboardInterrupt):
                accuracy.work([job(accuracy, method=method)], args, Killed())
            assert list(args.out.glob("*.pt"))
        steps = queue.Queue()
        results += accuracy.work([job(accuracy, method=method)], args, steps)
        assert steps.qsize() == (2 if name == "whole" else 1)
        assert [path.suffix for path in args.out.iterdir()] == [".json"]
    for result in results:
        del result["step_ms"]
    assert results[0] == results[1]


def test_trainings_end_with_the_command_that_is_killed(data, tmp_path):
    asked = f"--data-dir {data} --out {tmp_path} --methods tile --rates 1 --epochs 100000"
    command = [sys.executable, ROOT / "benchmarks" / "accuracy.py", *asked.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("*.pt")):
        time.sleep(0.1)
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)  # until every process that has this output has ended


@pytest.mark.parametrize("subject", ["resnet20", "wrn16-1", "resnet18", "vit"])
def test_methods_keep_to_the_parameters_and_compute(recipes, lowrank, subject):
    of = recipes.SUBJECTS[subject]
    most = lowrank.size(recipes.METHODS["dense"].build(of, 10, 0, 0, {})) // 6
    names = [n for n in recipes.METHODS if n not in recipes.FREE]
    if subject in ("resnet18", "vit"):  # whose decompositions take minutes, or are those of `svd`
        names = [n for n in names if n not in ("tucker", "cp")]
    for name in names:
        method, options = recipes.parse(name)
        model = method.build(of, 10, most, 0, options)
        least = 0.7 if name == "separable" else 0.8  # which has a largest size
        assert least * most < lowrank.size(model) <= most, name
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("linear", [False, True])
def test_chains_of_full_rank_are_the_layers(lowrank, linear):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5) if linear else torch.nn.Conv2d(4, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 6) if linear else torch.randn(2, 4, 8, 8)
    model = torch.nn.Sequential(layer)
    for replace in (lowrank.svd,) if linear else (lowrank.svd, lowrank.tucker):
        small = lowrank.shrunk(model, ["0"], replace, 10**6, share=4.0)
        assert isinstance(small[0], torch.nn.Sequential)
        assert torch.allclose(small(x), layer(x), atol=1e-5)  # float32 through three products
    with pytest.raises(ValueError, match="ranks of 1"):
        lowrank.shrunk(model, ["0"], lowrank.svd, 3)


def test_trainings_in_one_process_are_those_of_each_alone(accuracy, data, tmp_path):
    """As on a GPU, where runs on the same batches share a process."""
    jobs = [
        job(accuracy, method="tile"),
        job(accuracy, method="thin"),
        job(accuracy, method="tile", ratio="8"),
    ]
    apart = [job(accuracy, method="tile", seed=1), job(accuracy, method="tile", choose=True)]
    assert accuracy.together([*jobs, *apart], 2) == [jobs[:2], jobs[2:], *([one] for one in apart)]
    results = []
    for name, parts in (("alone", [[one] for one in jobs]), ("together", [jobs])):
        (tmp_path / name).mkdir()
        args = flags(data, tmp_path / name)
        results.append([one for of in parts for one in accuracy.work(of, args, queue.Queue())])
    for result in (one for of in results for one in of):
        del result["step_ms"]
    assert results[0] == results[1]


def test_what_a_recipe_says_reaches_its_parameters(recipes):
    for text, kind in (("", "HyperMuon"), (",optimizer=adam", "AdamW"), (",optimizer=sgd", "SGD")):
        method, options = recipes.parse(f"tile:decay=0.3{text}")
        model = method.build(recipes.SUBJECTS["resnet20"], 10, 60_000, 0, options)
        optimizer = recipes.optimizer_of(model, method.recipe, "cpu")
        assert type(optimizer).__name__ == kind
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(decay) == len(list(model.parameters()))
        assert {g["lr"] for g in optimizer.param_groups} == {1.0}
        assert decay[id(model.conv1.weight)] == 0.3
        assert decay[id(model.bn1.weight)] == 0
        of_both = {decay[id(p)] for p in (model.hypernet.heads["3x3"].weight, table(model))}
        assert of_both == ({0.15} if kind == "HyperMuon" else {0.0})


def table(model):
    return model.layer1[0].conv1.embedding("weight")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer=lbfgs", "lbfgs"),
        ("l2=0.1", "one of them must be 0"),
        ("decay=0,l2=0.1", "muon has no L2"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(recipes, text, words):
    method, _ = recipes.parse(f"tile:{text}")
    with pytest.raises(ValueError, match=words):
        recipes.optimizer_of(torch.nn.Linear(2, 2), method.recipe, "cpu")


def test_what_cannot_be_read_is_refused(accuracy, recipes, data, capsys):
    for text, words in (("tiles", "no method 'tiles'"), ("tile:l2", "no name=value")):
        with pytest.raises(ValueError, match=words):
            recipes.parse(text)
        with pytest.raises(SystemExit):
            accuracy.main(f"--data-dir {data} --methods {text}".split())
    for ratio in ("0.5", "x"):
        with pytest.raises(SystemExit):
            accuracy.main(f"--data-dir {data} --ratios {ratio}".split())
    with pytest.raises(SystemExit):
        accuracy.main(["--data-dir", "nowhere"])
    assert "nowhere" in capsys.readouterr().err
