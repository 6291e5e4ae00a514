"""What is measured on a GPU: `python -m benchmarks --device cuda`, in less than five minutes.

Works are timed in turn, as on a CPU: between CUDA events, several calls at a time, after a warm-up.
What fails is a row that says why. What would end too late is not begun, and its row says so; so
`SUBJECTS` has first what has a target, and what takes a minute to compile only after that.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import hyperize as library
from benchmarks import generation, memory, peers
from benchmarks.device import Cuda
from benchmarks.running import CLASSES, TILES, Case
from benchmarks.timing import QUICK, Effort, Row, in_turn
from hyperize import HyperLSTM, hyperize, to_dense

Work = Callable[[], object]
Makers = Mapping[str, Callable[[], Work]]
"""What makes each of some works, by its key."""

SECONDS = 280.0
"""Of a whole run: nothing is begun that would end later. Loading torch comes on top."""
FULL, BRIEF = Effort(5, 60, 2.5), Effort(5, 40, 0.5)
"""How often things are timed; the latter for the peers, of which there are many rows."""
SETTING_UP = 6.0
"""Seconds that making, moving and warming up one model take at most, if it is not compiled."""
COMPILING = 45.0
"""Seconds for compiling one model, until some have been compiled and one knows better."""
WARM_UP = 4
"""Calls before any is timed: the first ones choose kernels, compile and record CUDA graphs."""
REPETITION, MOST = 0.03, 100
"""Calls are timed so many at a time that they take this many seconds, up to a number of calls."""
REDUCED = "reduce-overhead"
PRECISION = (
    "training by autocast to bfloat16, inference in bfloat16 where a row does not say otherwise, "
    "both in channels_last, all else float32"
)
NO_TIME = "not measured: no time left"

TRAINING = (
    Case("resnet50", 224, 128, 1.05),
    Case("resnet18", 32, 128, 1.20),
    Case("convnext_tiny", 224, 64, 1.08, linear=True),
    Case("vit_small_patch16_224", 224, 64, 1.08, linear=True),
)
INFERENCE = (Case("resnet50", 224, 1, 1.3), Case("resnet50", 224, 128))
COMPILED = (Case("resnet50", 224, 128, 1.03, compiled=True, mode=REDUCED),)
OTHER_TRAINING = (
    Case("mobilenetv3_large_100", 224, 64),
    Case("efficientnet_b0", 224, 64),
    Case("BiLSTM", 100, 64, forms=TILES),
)
OTHER_INFERENCE = (
    Case("resnet18", 224, 1),
    Case("mobilenetv3_large_100", 224, 1),
    Case("convnext_tiny", 224, 1, linear=True),
    Case("vit_small_patch16_224", 224, 1, linear=True),
)
OTHER_COMPILED = (
    Case("resnet18", 32, 128, compiled=True),
    Case("resnet18", 32, 128, compiled=True, mode=REDUCED),
)
OTHER_COMPILED_INFERENCE = (Case("resnet18", 224, 1, forms=TILES, compiled=True, mode=REDUCED),)
SMALL = (
    Case("test_resnet", 32, 2, 1.05),
    Case("test_vit", 160, 2, linear=True),
    Case("BiLSTM", 10, 2, forms=TILES),
)
SMALL_COMPILED = (
    Case("test_resnet", 32, 2, compiled=True, mode=REDUCED),
    Case("test_resnet", 32, 2, forms=TILES, compiled=True),
)
"""With `--quick`."""
CACHED = 1.0
"""What inference inside `hyperize.cached` should take of the dense model's, at most."""
GENERATION, RECURRENT, HYPERLSTM, UNCHANGED = 1.5, 1.05, 4.0, 1.0
"""Other targets; the last is of what should cost nothing."""


@dataclass
class Bench:
    """One run.

    Attributes:
        device: What is measured.
        quick: Small sizes.
        seconds: Of the whole run.
        start: When it began.
        slowest: Seconds that making and warming up a compiled model took at most, so far.
    """

    device: Cuda
    quick: bool = False
    seconds: float = SECONDS
    start: float = field(default_factory=time.perf_counter)
    slowest: float = 0.0

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.start)

    @property
    def effort(self) -> Effort:
        """How often things are timed."""
        return QUICK if self.quick else FULL


@dataclass(frozen=True)
class Pair:
    """A row to come: which of some works is compared with which.

    Attributes:
        name: Of the row.
        subject: A work, by its key.
        yardstick: The other.
        target: Of the row.
        note: Of the row.
    """

    name: str
    subject: str
    yardstick: str = "dense"
    target: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------- comparisons
def compare(
    bench: Bench,
    pairs: Sequence[Pair],
    makers: Makers,
    effort: Effort | None = None,
    compiled: bool = False,
) -> list[Row]:
    """Times some works in turn, each after a warm-up, and makes rows of them.

    A work that fails, or for which there is no time, is missing, and the rows with it say why.

    Args:
        bench: The run.
        pairs: The rows.
        makers: What makes each work, by its key.
        effort: How often, by default the run's.
        compiled: Whether works are compiled at their first call.

    Returns:
        A row for each pair.
    """
    effort = effort or bench.effort
    works: dict[str, Work] = {}
    missing: dict[str, str] = {}
    notes: dict[str, str] = {}
    for key, make in makers.items():
        needs = effort.seconds + ((bench.slowest or COMPILING) if compiled else SETTING_UP)
        if bench.left < needs and not bench.quick:
            missing[key] = f"{NO_TIME}, {bench.left:.0f} s, where {needs:.0f} s are needed"
            continue
        begin, skipped = time.perf_counter(), _skipped_graphs()
        try:
            work = make()
            for _ in range(WARM_UP):
                work()
            bench.device.synchronize()
            works[key] = work
        except Exception as error:  # out of memory, or of a compiler
            missing[key] = failure(error)
            bench.device.free()
            continue
        if compiled:
            took = time.perf_counter() - begin
            bench.slowest = max(bench.slowest, took)
            notes[key] = f"{took:.0f} s"
            if _skipped_graphs() > skipped:
                notes[key] += " without CUDA graphs"
    samples: dict[str, tuple[float, ...]] = {}
    try:
        samples = _measure(bench, pairs[0].name, works, effort)
    except Exception as error:
        missing |= dict.fromkeys(works, failure(error))
    finally:
        works.clear()
    return [_row(pair, samples, missing, notes) for pair in pairs]


def _measure(
    bench: Bench, name: str, works: Mapping[str, Work], effort: Effort
) -> dict[str, tuple[float, ...]]:
    """Seconds of a call of each work, in turn."""
    if len(works) < 2:
        return {}
    seconds = bench.device.seconds
    gc.collect()
    gc.freeze()  # garbage is collected before each time that is taken, and this is none of it
    try:
        once = max(seconds(work) for work in works.values())
        calls = 1 if bench.quick else min(MOST, max(1, math.ceil(REPETITION / once)))
        clock = partial(seconds, calls=calls)
        return dict(zip(works, in_turn(name, list(works.values()), effort, clock), strict=True))
    finally:
        gc.unfreeze()


def _row(
    pair: Pair,
    samples: Mapping[str, tuple[float, ...]],
    missing: Mapping[str, str],
    notes: Mapping[str, str],
) -> Row:
    sides = pair.subject, pair.yardstick
    absent = [missing[key] for key in sides if key in missing]
    if absent:
        return Row(pair.name, target=pair.target, note=absent[0])
    said = pair.note
    if notes:
        said = f"compiled in {notes[pair.subject]} and {notes[pair.yardstick]}"
    ours, theirs = (samples[key] for key in sides)
    return Row(pair.name, ours, theirs, target=pair.target, note=said)


def failure(error: Exception) -> str:
    """What a row says of an error."""
    lines = str(error).splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"[:200]


def is_short(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some of a subject's rows, as in the JSON, were left out for lack of time."""
    return any(row["note"].startswith(NO_TIME) for row in rows)


def _skipped_graphs() -> int:
    """How often a compiled function could not become a CUDA graph, in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


# --------------------------------------------------------------------------- training and inference
def training(bench: Bench) -> Iterator[Row]:
    yield from _training(bench, SMALL if bench.quick else TRAINING)


def inference(bench: Bench) -> Iterator[Row]:
    cases = SMALL if bench.quick else INFERENCE
    yield from _inference(bench, cases)
    yield from _inference(bench, cases[:1], autocast=True)
    yield from _exported(bench, cases[0])


def compiled(bench: Bench) -> Iterator[Row]:
    yield from _training(bench, SMALL_COMPILED[:1] if bench.quick else COMPILED)


def others(bench: Bench) -> Iterator[Row]:
    """What has no target, as far as time is left."""
    if bench.quick:
        yield from _training(bench, SMALL_COMPILED[1:])
        yield from _inference(bench, SMALL_COMPILED[:1])
        return
    yield from _training(bench, OTHER_TRAINING)
    yield from _inference(bench, OTHER_INFERENCE)
    yield from _training(bench, OTHER_COMPILED)
    yield from _inference(bench, OTHER_COMPILED_INFERENCE)


def _training(bench: Bench, cases: Sequence[Case]) -> Iterator[Row]:
    for case in cases:
        title = f"training step, bf16, {case}"
        pairs = []
        for form in case.forms:
            target = None if form else case.target
            pairs.append(Pair(f"{title}{', ' * bool(form)}{form} / dense", form, target=target))
            if form:
                name = f"{title}, {form} / not {form}"
                pairs.append(Pair(name, form, "", UNCHANGED))
        yield from _guarded(bench, pairs, case, partial(_training_makers, bench, case))


def _training_makers(bench: Bench, case: Case) -> Makers:
    dense, inputs = case.make()
    images, labels = (
        bench.device.put(inputs),
        bench.device.put(torch.randint(CLASSES, inputs.shape[:1])),
    )

    def maker(form: str | None) -> Work:
        network = _network(bench, case, dense.train(), form)
        return training_step(bench.device, network, images, labels, case.mode == REDUCED)

    return {"dense": partial(maker, None)} | {form: partial(maker, form) for form in case.forms}


def _inference(bench: Bench, cases: Sequence[Case], autocast: bool = False) -> Iterator[Row]:
    for case in cases:
        title = f"inference, {'autocast to bf16' if autocast else 'bf16'}, {case}"
        pairs = []
        for form in case.forms:
            target = None if form else case.target
            pairs.append(Pair(f"{title}{', ' * bool(form)}{form} / dense", form, target=target))
        if not case.compiled:
            target = CACHED if case.target else None
            pairs.append(Pair(f"{title}, in cached() / dense", "cached", target=target))
        with ExitStack() as stack:
            makers = partial(_inference_makers, bench, case, autocast, stack)
            yield from _guarded(bench, pairs, case, makers)


def _inference_makers(bench: Bench, case: Case, autocast: bool, stack: ExitStack) -> Makers:
    """The works by key; what `cached` opens is closed with the stack."""
    dtype = None if autocast else torch.bfloat16
    dense, inputs = case.make()
    images = bench.device.put(inputs, dtype)

    def maker(form: str | None, cached: bool = False) -> Work:
        network = _network(bench, case, dense.eval(), form, dtype)
        if cached:
            stack.enter_context(_cached(network))
        context = bench.device.autocast if autocast else nullcontext
        return forward(network, images, context, case.mode == REDUCED)

    makers = {"dense": partial(maker, None)} | {form: partial(maker, form) for form in case.forms}
    if not case.compiled:
        makers["cached"] = partial(maker, "", cached=True)
    return makers


def _exported(bench: Bench, case: Case) -> Iterator[Row]:
    pair = Pair(f"inference, bf16, after to_dense, {case} / dense", "exported", target=UNCHANGED)

    def makers() -> Makers:
        dense, inputs = case.make()
        images = bench.device.put(inputs, torch.bfloat16)

        def maker(network: nn.Module) -> Work:
            return forward(bench.device.place(network.eval(), torch.bfloat16), images, nullcontext)

        return {
            "dense": lambda: maker(copy.deepcopy(dense)),
            "exported": lambda: maker(to_dense(hyperize(dense, seed=0))),
        }

    yield from _guarded(bench, [pair], case, makers)


def _guarded(
    bench: Bench,
    pairs: Sequence[Pair],
    case: Case | None,
    makers: Callable[[], Makers],
) -> list[Row]:
    """Compares what is to be made, where making what all of it needs may fail, too."""
    try:
        return compare(bench, pairs, makers(), compiled=case is not None and case.compiled)
    except Exception as error:
        return [Row(pair.name, target=pair.target, note=failure(error)) for pair in pairs]
    finally:
        torch.compiler.reset()
        bench.device.free()


def _network(
    bench: Bench, case: Case, dense: nn.Module, form: str | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of the dense model, or the hyperized model of a form, on the device."""
    network = copy.deepcopy(dense) if form is None else case.hyperize(dense, form)
    network = bench.device.place(network, dtype)
    if case.compiled:
        # Several models run the same code, and none is to get the dynamic sizes of a second one
        compiled = torch.compile(
            network, backend=bench.device.backend, mode=case.mode, dynamic=False
        )
        network = cast(nn.Module, compiled)
    return network


def _cached(hyper: nn.Module) -> AbstractContextManager[None]:
    return library.cached(hyper)


def training_step(
    device: Cuda, network: nn.Module, images: Tensor, labels: Tensor, graphs: bool
) -> Work:
    """A step as one trains: under autocast, with a fused optimizer.

    Args:
        device: Of it all.
        network: In training mode.
        images: A batch.
        labels: Of the batch.
        graphs: Whether the network replays CUDA graphs, which want to know where a step begins.
    """
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9, fused=True)

    def run() -> None:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with device.autocast():
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def forward(
    network: nn.Module,
    images: Tensor,
    context: Callable[[], AbstractContextManager[object]],
    graphs: bool = False,
) -> Work:
    """The forward pass without gradients, in a context that is entered anew each time."""

    @torch.no_grad()
    def run() -> None:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with context():
            network(images)

    return run


# ------------------------------------------------------------------------------- recurrent networks
def lstm(bench: Bench) -> Iterator[Row]:
    """An nn.LSTM, forward and backward, in float32 and by autocast."""
    features, hidden, steps = (8, 16, 5) if bench.quick else (256, 512, 100)

    def dense() -> nn.Module:
        return nn.Sequential(nn.LSTM(features, hidden))

    for batch in (2, 1) if bench.quick else (64, 1):
        for autocast in (False, True):
            name = f"LSTM({features}, {hidden}), T {steps}, batch {batch}, {_precision(autocast)}"
            pair = Pair(f"{name} / dense", "hyper", target=None if autocast else RECURRENT)
            makers = {
                "dense": dense,
                "hyper": lambda: hyperize(dense(), seed=0),
            }
            yield from _recurrent(bench, pair, makers, (steps, batch, features), autocast)


def hyperlstm(bench: Bench) -> Iterator[Row]:
    """A HyperLSTM, forward and backward, against nn.LSTM of the same hidden size."""
    features, hidden, steps, batch = (8, 16, 5, 2) if bench.quick else (128, 512, 100, 32)
    small = 8 if bench.quick else 128
    for autocast in (False, True):
        name = f"HyperLSTM({features}, {hidden}), T {steps}, batch {batch}, {_precision(autocast)}"
        pair = Pair(f"{name} / nn.LSTM", "hyper", target=None if autocast else HYPERLSTM)
        makers = {
            "dense": lambda: nn.LSTM(features, hidden),
            "hyper": lambda: HyperLSTM(features, hidden, hyper_size=small, embedding_dim=16),
        }
        yield from _recurrent(bench, pair, makers, (steps, batch, features), autocast)


def _precision(autocast: bool) -> str:
    return "autocast to bf16" if autocast else "float32"


def _recurrent(
    bench: Bench,
    pair: Pair,
    modules: Mapping[str, Callable[[], nn.Module]],
    shape: tuple[int, int, int],
    autocast: bool,
) -> list[Row]:
    context = bench.device.autocast if autocast else nullcontext

    def makers() -> Makers:
        x = bench.device.put(torch.randn(shape)).requires_grad_()

        def maker(make: Callable[[], nn.Module]) -> Work:
            return there_and_back(make().to(bench.device.type), x, context)

        return {key: partial(maker, make) for key, make in modules.items()}

    return _guarded(bench, [pair], None, makers)


def there_and_back(
    module: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager[object]]
) -> Work:
    """The gradients of the input and all parameters; nothing accumulates."""
    wanted = [x, *module.parameters()]
    with torch.no_grad(), context():
        gradient = torch.randn_like(module(x)[0])

    def run() -> None:
        with context():
            y = module(x)[0]
        torch.autograd.grad(y, wanted, gradient)

    return run


# --------------------------------------------------------------------- generation, memory and peers
def weights(bench: Bench) -> Iterator[Row]:
    """Generating all weights of ResNet-50 together, in float32."""
    model = "test_resnet" if bench.quick else "resnet50"
    title = f"generating all weights of {model} together"
    each, joined = "products", "products, one for each head"
    pairs = [
        Pair(f"{title}, read as attributes / bare {each}", "read", each, GENERATION),
        Pair(f"{title}, read as attributes / bare {joined}", "read", joined, GENERATION),
        Pair(f"{title}, without attributes / bare {each}", "forward", each),
        Pair(f"{title}, without attributes / bare {joined}", "forward", joined),
    ]
    back = [
        Pair(f"{title}, forward and backward / bare {each}", "both", each),
        Pair(f"{title}, forward and backward / bare {joined}", "both", joined),
    ]

    def makers(backward: bool) -> Makers:
        hyper = bench.device.place(hyperize(timm.create_model(model), seed=0))
        read, ahead, both = generation.together(hyper)
        ours = {"both": both} if backward else {"read": read, "forward": ahead}
        theirs = {
            key: generation.products(hyper, key == joined)[backward] for key in (each, joined)
        }
        return {key: partial(_as_it_is, work) for key, work in {**ours, **theirs}.items()}

    yield from _guarded(bench, pairs, None, partial(makers, False))
    yield from _guarded(bench, back, None, partial(makers, True))


def _as_it_is(work: Work) -> Work:
    return work


def peaks(bench: Bench) -> Iterator[Row]:
    """The allocator's peak of one step of Adam, which is fused, in float32."""
    model, pixels, batch = ("test_resnet", 64, 1) if bench.quick else ("vgg11", 224, 1)
    title = f"peak memory of an Adam step, {model}, {pixels} px, batch {batch}"
    measured: dict[str, int] = {}
    failed: dict[str, str] = {}
    try:
        dense = timm.create_model(model)
        _peak(bench, copy.deepcopy(dense), pixels, batch)  # what libraries allocate but once
    except Exception as error:
        yield Row(f"{title} / dense", unit="bytes", note=failure(error))
        return
    for kind in memory.KINDS:
        try:
            measured[kind] = _peak(bench, _of_kind(kind, dense), pixels, batch)
        except Exception as error:
            failed[kind] = failure(error)
    for kind in list(memory.KINDS)[1:]:
        name = f"{title}{'' if kind == 'hyper' else f', {kind}'} / dense"
        if problem := failed.get(kind) or failed.get("dense"):
            yield Row(name, unit="bytes", note=problem)
        else:
            yield Row(name, (measured[kind],), (measured["dense"],), "bytes")


def _of_kind(kind: str, dense: nn.Module) -> nn.Module:
    if kind == "dense":
        return copy.deepcopy(dense)
    return hyperize(dense, targets=memory.TARGETS, seed=0, **memory.KINDS[kind])


def _peak(bench: Bench, network: nn.Module, pixels: int, batch: int) -> int:
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(CLASSES, (batch,))

    def life() -> None:
        model = network.train().to(bench.device.type)
        optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
        output = model(images.to(bench.device.type))
        nn.functional.cross_entropy(output, labels.to(bench.device.type)).backward()
        optimizer.step()

    return bench.device.peak_memory(life)


def libraries(bench: Bench) -> Iterator[Row]:
    """The other libraries of `benchmarks.peers`, in float32."""

    def in_turn_here(name: str, ours: Work, theirs: Work, note: str) -> Row:
        makers = {"ours": partial(_as_it_is, ours), "theirs": partial(_as_it_is, theirs)}
        effort = QUICK if bench.quick else BRIEF
        (row,) = compare(bench, [Pair(name, "ours", "theirs", note=note)], makers, effort)
        return row

    for row in peers.rows(bench.quick, bench.device.type, in_turn_here):
        yield row
        bench.device.free()
        if row.note.startswith(NO_TIME):
            return


SUBJECTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "training": training,
    "inference": inference,
    "lstm": lstm,
    "hyperlstm": hyperlstm,
    "generation": weights,
    "memory": peaks,
    "compiled": compiled,
    "peers": libraries,
    "others": others,
}
"""What can be measured, in the order of running and of the table.

Planned seconds on an H100: training 35, inference 20, lstm 20, hyperlstm 10, generation 10, memory
15, compiled 60 to 130, peers 40; "others" would take 100 more and gets what is left of `SECONDS`.
"""


def subjects(device: Cuda, seconds: float) -> dict[str, Callable[[bool], Iterator[Row]]]:
    """The subjects on a device, in a run that begins now."""
    bench = Bench(device, seconds=seconds)

    def of(rows: Callable[[Bench], Iterator[Row]], quick: bool) -> Iterator[Row]:
        bench.quick = quick
        return rows(bench)

    return {name: partial(of, rows) for name, rows in SUBJECTS.items()}
