"""The distributed training example: killed and resumed, on one process and on two."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config

import hyperize

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = ("blue", "green", "red")
PER_EPOCH = 4
"""Steps: 33 images in batches of 8, the last image left out."""
TIMEOUT = 120
"""Seconds after which a run hangs; it takes 10."""
ANOTHER_SUM = 1e-4
"""Relative error of losses whose steps summed in another order; 4e-7 was measured."""


@pytest.fixture
def script(monkeypatch, forget_accelerate):
    """The example, imported as a script would be."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_distributed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny set of images: three classes, each of one colour, in noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, size in (("train", 11), ("val", 5)):
        for channel, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(size):
                pixels = rng.integers(0, 200, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 25
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def flags(root):
    return [
        *("--data-dir", str(root), "--model", "test_resnet", "--img-size", "32", "--workers", "0"),
        *("--epochs", "6", "--batch-size", "8", "--log-interval", "1", "--cpu"),
        *("--checkpoint-interval", "3"),
    ]


def records(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output):
    return [record["loss"] for record in records(output) if "loss" in record]


def start(folder, *command):
    """The example as a program, with what it prints in a file."""
    with (folder / "printed.txt").open("a") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def kill_in_the_middle(process, output, lines):
    """Kills a run and all its processes when its log has so many lines."""
    end, log = time.monotonic() + TIMEOUT, output / "log.jsonl"
    try:
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, (output.parent / "printed.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        process.wait()
    assert list(output.glob("step_*"))
    assert not (output / "hyper.safetensors").exists()


def test_a_run_and_its_files(script, root, flags, tmp_path, capsys):
    output = tmp_path / "run"
    accuracy = script.main([*flags, "--output", str(output)])
    assert accuracy > 0.8
    printed = capsys.readouterr()
    assert not printed.err
    assert "epoch 6 of 6: accuracy" in printed.out
    steps = [(r["epoch"], r["step"]) for r in records(output) if "loss" in r]
    assert steps == [(i // PER_EPOCH, i + 1) for i in range(6 * PER_EPOCH)]
    figures = [r["accuracy"] for r in records(output) if "accuracy" in r]
    assert len(figures) == 6
    assert figures[-1] == accuracy
    assert np.mean(losses(output)[-4:]) < 0.8 * np.mean(losses(output)[:4])

    # The file alone gives the accuracy, with timm's own reading of the images
    plain = timm.create_model("test_resnet", num_classes=3)
    model = hyperize.load(plain, output / "hyper.safetensors")
    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    images = ImageDataset(str(root / "val"), transform=create_transform(**config))
    with torch.no_grad():
        hits = [model.eval()(x[None]).argmax().item() == y for x, y in images]
    assert np.mean(hits) == pytest.approx(accuracy)
    assert hyperize.report(model).compression > 3.9


def test_a_killed_run_goes_on_as_if_it_had_not_been(script, flags, tmp_path, capsys):
    flags += ["--epochs", "12"]  # time enough to be killed
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script.main([*flags, "--output", str(whole)])
    again = [*flags, "--output", str(killed)]
    process = start(tmp_path, str(EXAMPLES / "train_distributed.py"), *again)
    kill_in_the_middle(process, killed, lines=9)
    before = (killed / "log.jsonl").read_text()

    capsys.readouterr()
    script.main(again)
    assert "resumed after step" in capsys.readouterr().out
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert (whole / "log.jsonl").read_text().startswith(before[: before.rindex("\n")])
    files = [(output / "hyper.safetensors").read_bytes() for output in (whole, killed)]
    assert files[0] == files[1]


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3])  # in the middle of the first epoch, of the second
@pytest.mark.parametrize("part", ["before", "within", "after"])
def test_a_checkpoint_is_there_or_not(at, part, script, flags, tmp_path, monkeypatch, capsys):
    flags += ["--epochs", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    script.main([*flags, "--output", str(whole)])
    suspend, count = script.suspend, 0
    again = [*flags, "--output", str(stopped)]
    with monkeypatch.context() as patched:

        def stop(*_):
            raise Stop

        def stopping(*args):
            nonlocal count
            count += 1
            if count == at:
                if part == "before":
                    raise Stop
                if part == "within":  # all is written, but not yet where it is looked for
                    patched.setattr(script.Path, "rename", stop)
            suspend(*args)
            if count == at:
                raise Stop

        patched.setattr(script, "suspend", stopping)
        with pytest.raises(Stop):
            script.main(again)
    checkpoints = [path.name for path in stopped.glob("step_*")]
    done = [0, 3, 4, 6, 8][at if part == "after" else at - 1]
    assert checkpoints == ([f"step_{done:09}"] if done else [])
    capsys.readouterr()
    script.main(again)
    assert (f"resumed after step {done}:" in capsys.readouterr().out) == (done > 0)
    assert (stopped / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert [path.name for path in stopped.glob("step_*")] == ["step_000000008"]

    # A run that is finished is only evaluated
    monkeypatch.setattr(script, "suspend", None)
    script.main(again)
    assert (stopped / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


def test_two_processes_are_one_with_larger_batches(script, flags, tmp_path):
    flags += ["--model", "test_convnext", "--epochs", "12"]  # without statistics of a batch
    script.main([*flags, "--output", str(tmp_path / "one")])
    flags += ["--batch-size", "4"]
    two = tmp_path / "two"
    command = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(EXAMPLES / "train_distributed.py"), *flags, "--output", str(two)),
    ]
    kill_in_the_middle(start(tmp_path, *command), two, lines=9)
    assert start(tmp_path, *command).wait(TIMEOUT) == 0
    printed = (tmp_path / "printed.txt").read_text()
    assert printed.count("resumed after step") == 1  # by the main process
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=ANOTHER_SUM)
    assert [r.keys() for r in records(two)] == [r.keys() for r in records(tmp_path / "one")]
    hyperize.load(timm.create_model("test_convnext", num_classes=3), two / "hyper.safetensors")


def test_half_precision_and_workers(script, forget_accelerate, flags, tmp_path):
    """What an image becomes does not depend on who reads it; bfloat16 is not float32."""
    curves = {}
    for name, more in {"plain": (), "workers": ("--workers", "1"), "amp": ("--amp",)}.items():
        forget_accelerate()
        script.main([*flags, "--epochs", "1", *more, "--output", str(tmp_path / name)])
        curves[name] = losses(tmp_path / name)
    assert curves["workers"] == curves["plain"]
    assert curves["amp"] != curves["plain"]
    assert curves["amp"] == pytest.approx(curves["plain"], rel=0.2)


def test_factors_of_weights_make_the_same_curve(script, forget_accelerate, flags, tmp_path):
    flags += ["--model", "resnet10t", "--epochs", "1"]
    for name, more in {"weights": (), "factors": ("--factorized",)}.items():
        forget_accelerate()
        script.main([*flags, *more, "--output", str(tmp_path / name)])
    assert losses(tmp_path / "weights") != losses(tmp_path / "factors")
    first, second = (losses(tmp_path / name) for name in ("weights", "factors"))
    assert second == pytest.approx(first, rel=ANOTHER_SUM)
    plain = timm.create_model("resnet10t", num_classes=3)
    assert hyperize.load(plain, tmp_path / "factors" / "hyper.safetensors").hypernet.factorized


def test_what_is_drawn(script, root):
    order = script.Order(20, seed=0)
    epochs = []
    for order.epoch in (0, 1, 0):
        epochs.append(list(order))
        assert sorted(image for _, image in epochs[-1]) == list(range(20))
    assert epochs[0] == epochs[2]
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    order.first = 7
    assert list(order) == epochs[0][7:]
    assert len(order) == 13

    folder, _ = script.read(root)
    folder.transform = create_transform((3, 32, 32), is_training=True)
    images = script.Augmented(folder, seed=0)
    first = images[0, 5][0]
    assert not torch.equal(images[1, 5][0], first)
    assert not torch.equal(script.Augmented(folder, seed=1)[0, 5][0], first)
    assert torch.equal(images[0, 5][0], first)


def test_the_learning_rate(script):
    rates = [script.rate(step, 100, 2.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == rates[5] == 2.0
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert 0 < rates[-1] < 0.01
    assert script.rate(0, 1, 2.0) == 2.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--data-dir", "nowhere"], "nowhere/train"),
        (["--model", "resnet19"], "--model resnet19: Unknown model (resnet19)"),
        (["--compression", "1e9"], "compression"),
        (["--batch-size", "34"], "a step takes 34 images"),
        (["--lr", "-1"], "learning rate"),
        (["--weight-decay", "-1"], "weight_decay must be a finite number"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_are_wrong(options, error, script, flags, tmp_path, capsys):
    code = "2" if error.startswith("argument") else "1"
    with pytest.raises(SystemExit, match=code):
        script.main([*flags, "--output", str(tmp_path / "run"), *options])
    assert error in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_run_is_known_by_its_flags(script, flags, tmp_path, capsys):
    flags = [*flags, "--epochs", "1", "--output", str(tmp_path)]
    script.main(flags)
    with pytest.raises(SystemExit, match="1"):
        script.main([*flags, "--lr", "0.1"])
    assert "was made with {'lr': 0.003}, not {'lr': 0.1}" in capsys.readouterr().err


def test_folders_that_differ(script, root, tmp_path, flags, capsys):
    (tmp_path / "test").symlink_to(root / "val")  # a folder may be named so, too
    (tmp_path / "train").symlink_to(root / "train")
    assert [len(folder) for folder in script.read(tmp_path)] == [33, 15]
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "red").symlink_to(root / "val" / "red")
    with pytest.raises(SystemExit, match="1"):
        script.main([*flags, "--data-dir", str(tmp_path), "--output", str(tmp_path / "run")])
    assert "have different folders of classes" in " ".join(capsys.readouterr().err.split())
