"""The compression of networks that hear, with small ones in their place."""

import dataclasses
import importlib
import sys
import types
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


class Voice(nn.Module):
    """Takes spectra as Resemblyzer does, and gives embeddings of length one."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 32, 2, batch_first=True)
        self.linear = nn.Linear(32, 64)

    def forward(self, x):
        return nn.functional.normalize(self.linear(self.lstm(x)[1][0][-1]).relu())


NETWORKS = {"crepe-tiny": Ear, "resemblyzer": Voice}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("compress_audio")
    sounds = importlib.import_module("sounds")
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        made = network()
        subject = dataclasses.replace(sounds.SUBJECTS[name], load=lambda made=made: made)
        monkeypatch.setitem(sounds.SUBJECTS, name, subject)
    monkeypatch.setattr(sounds, "TESTS", 80)
    monkeypatch.setattr(sounds, "SPEAKERS", 10)
    monkeypatch.setattr(module, "EVERY", 4)
    bands = torch.rand(40, 201).numpy()
    librosa = types.SimpleNamespace(filters=types.SimpleNamespace(mel=lambda **_: bands))
    monkeypatch.setitem(sys.modules, "librosa", librosa)
    return module


@pytest.fixture
def sounds(script):
    return importlib.import_module("sounds")


@pytest.fixture
def flags(tmp_path):
    return [
        *("--out", str(tmp_path / "out"), "--steps", "10", "--batch-size", "8"),
        *("--fit-samples", "16", "--compression", "2", "--device", "cpu"),
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_and_its_files(script, sounds, flags, network, tmp_path, capsys):
    stages = script.main([*flags, "--network", network])
    assert [row.name for row in stages] == ["teacher", "fitted", "fine-tuned", "fine-tuned, int8"]
    out = tmp_path / "out"
    assert stages[-1].size == (out / "hyper.safetensors").stat().st_size < stages[0].size / 4
    assert stages[-1].params < 0.55 * stages[0].params
    subject = sounds.SUBJECTS[network]
    exported = NETWORKS[network]().eval()
    exported.load_state_dict(load_file(out / "dense.safetensors"))
    with torch.no_grad():
        assert subject.judge(exported, subject.load(), "cpu", 0) == stages[-1].accuracy
    assert f"fine-tuned: {subject.measure}" in capsys.readouterr().out
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


def test_tones_have_the_pitch_that_they_say(sounds):
    frames, pitch = sounds.tones(50, seed=3)
    assert frames.shape == (50, sounds.FRAME)
    assert torch.allclose(frames.mean(1), torch.zeros(50), atol=1e-5)
    assert torch.allclose(frames.std(1), torch.ones(50), atol=1e-4)
    assert sounds.LOWEST <= float(pitch.min()) <= float(pitch.max()) <= sounds.HIGHEST
    # A tone is like itself a period later, and less so half a period after that
    for frame, hertz in zip(frames, pitch, strict=True):
        period = sounds.RATE / float(hertz)
        if 32 < period < 256:  # longer than a few samples, and three times in a frame
            alike, apart = (
                float((frame[: len(frame) // 3] * frame[lag:][: len(frame) // 3]).mean())
                for lag in (round(period), round(1.5 * period))
            )
            assert alike > apart
    assert torch.equal(sounds.tones(50, seed=3)[0], frames)
    assert not torch.equal(sounds.tones(50, seed=4)[0], frames)


def test_a_tone_is_right_within_half_of_a_semitone(sounds):
    class Knows(nn.Module):
        def __init__(self, cents):
            super().__init__()
            self.cents = cents

        def forward(self, frames):
            pitch = sounds.tones(len(frames), self.seed)[1]
            cents = 1_200 * torch.log2(pitch / 10) + self.cents
            at = ((cents - sounds.FIRST_BIN) / sounds.BIN).round().long()
            self.seed -= 1
            return nn.functional.one_hot(at, sounds.BINS).float()

    for cents, right in ((0, 1.0), (39, 1.0), (-39, 1.0), (61, 0.0), (-61, 0.0)):
        model = Knows(cents)
        model.seed = -1
        assert sounds.pitch_accuracy(model, model, "cpu", 0) == right, cents


@pytest.mark.parametrize(
    "flags", [["--compression", "0"], ["--steps", "0"], ["--bits", "3"], ["--rounded", "2"]]
)
def test_flags_that_are_wrong(script, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["crepe-tiny", "resemblyzer"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.syspath_prepend(EXAMPLES)
    sounds = importlib.import_module("sounds")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    subject = sounds.SUBJECTS[name]
    with pytest.raises(ValueError, match=f"pip install --no-deps {subject.package}"):
        subject.load()


def test_resemblyzers_weights_are_read_from_its_package(sounds, tmp_path, monkeypatch):
    state = sounds.VoiceEncoder().state_dict()
    more = {"similarity_weight": torch.zeros(1)}  # of its training alone
    torch.save({"model_state": state | more, "step": 3}, tmp_path / "pretrained.pt")
    monkeypatch.setattr(sounds, "folder_of", lambda package: tmp_path)
    again = sounds.resemblyzer().state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_voices_are_their_speakers_and_as_loud_as_is_wanted(sounds):
    numbers = torch.tensor([3, 4, 3])
    waves = sounds.voices(numbers, seed=1)
    assert waves.shape == (3, sounds.LENGTH)
    assert torch.equal(waves, sounds.voices(numbers, seed=1))
    assert not torch.equal(waves[0], waves[2])  # two utterances
    assert not torch.equal(waves, sounds.voices(numbers, seed=2))
    assert torch.allclose(waves.square().mean(1).sqrt(), torch.tensor(sounds.LOUDNESS), rtol=0.01)
    seen = sounds.spectra(numbers, 1)
    assert seen.shape == (3, sounds.LENGTH // sounds.HOP + 1, sounds.BANDS)
    assert (seen >= 0).all()


def test_speakers_are_found_by_their_embeddings(sounds, monkeypatch):
    asked = []

    def spectra(speakers, seed, device):
        asked.append((speakers, seed))
        return nn.functional.one_hot(speakers % sounds.SPEAKERS, sounds.SPEAKERS).float()

    monkeypatch.setattr(sounds, "spectra", spectra)
    for student, right in ((nn.Identity(), 1.0), (lambda x: x.roll(1, 1), 0.0)):
        assert sounds.speakers_found(student, nn.Identity(), "cpu", 0) == right
    assert len(asked[0][0]) == sounds.SPEAKERS * sounds.UTTERANCES
    sounds.speech(50, 7, "cpu")
    assert (asked[-1][0] >= sounds.SPEAKERS).all()  # none of the test's
    assert asked[-1][1] != asked[0][1]
