"""What the console command does, by the public functions of this package."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich
import safetensors
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from hyperize.conditions import conditions_of
from hyperize.config import FileError, HyperizeError
from hyperize.factories import make, make_empty
from hyperize.files import FileReport, load, read_header, save, write_dense
from hyperize.fitting import FitReport, fit_
from hyperize.folders import load_timm, save_pretrained
from hyperize.layers import CONSTANTS
from hyperize.networks import at_condition
from hyperize.onnx import export_onnx
from hyperize.outputs import images, is_folder
from hyperize.parts import difference
from hyperize.reporting import Report, report
from hyperize.rewrite import hyperize, to_dense
from hyperize.search import make_plan
from hyperize.sites import tensor_bytes
from hyperize.writing import replacing

__all__: list[str] = []

BATCH = 64
"""Images that a fit runs through the model at once."""
FREE_BATCH = 2
"""Of the inputs with which a program of any batch size is made; 1 would be taken as fixed."""


def _report(args: argparse.Namespace) -> None:
    """The compression report of one model, of timm hyperized on the meta device."""
    _show(report(hyperize(_planned(args), args.config), full=args.all), args)


def _plan(args: argparse.Namespace) -> None:
    """The plan of one model: all sizes that `hyperize` would build."""
    plan = make_plan(_planned(args), args.config)
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)


def _info(args: argparse.Namespace) -> None:
    """What is in a file of hyperize.save."""
    header = read_header(args.file)
    plans, config = header["plans"], header["timm"]
    if not config and len(plans) > 1:
        raise FileError(
            f"{args.file} has {len(plans)} hypernetworks and names no timm model, without which "
            "they have no common report; use hyperize.report(hyperize.load(model, path))."
        )
    rounded = sorted({str(dtype).removeprefix("torch.") for dtype in header["dtypes"].values()})
    whole = config and (args.html or len(plans) > 1)
    figures = report(load_timm(args.file) if whole else plans[0], full=args.all)
    facts = {
        "file": str(args.file),
        "bytes": Path(args.file).stat().st_size,
        "format": header["format"],
        "versions": header["versions"],
        "timm": config and {name: config.get(name) for name in ("architecture", "model_args")},
        "rounded_from": rounded,
        "bits": sorted({bits for bits, *_ in header["bits"].values()}),
    }
    if args.json:
        print(json.dumps(facts | {"report": figures.to_dict()}, indent=2))
    else:
        made = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
        print(f"{args.file}: {facts['bytes']:,} bytes, checksum right, written by {made}")
        print(f"model: {config['architecture'] + ' of timm' if config else plans[0].model}")
        if rounded:
            bits = "".join(f", matrices to {bits} bits" for bits in facts["bits"])
            print(f"parameters are rounded, from {', '.join(rounded)}{bits}")
        print(f"\n{figures}")
    if args.html:
        figures.to_html(args.html)


def _fit(args: argparse.Namespace) -> None:
    """A model's weights, to a file of hyperize.save."""
    teachers = [_teacher(args, file) for file in args.checkpoint or [None]]
    data = _images(args, teachers[0]) if args.data_dir else None
    config = args.config
    if not (args.embeddings or args.tile or args.hidden_dim):
        config = config.replace(embeddings="channel")  # what fits trained weights best
    hyper = hyperize(teachers[0], config)
    fitted = fit_(hyper, teachers if config.conditions else teachers[0], data=data)
    written = save(hyper, args.out, dtype=_dtype(args))
    if args.json:
        facts = {"file": args.out, "bytes": written.bytes} | fitted.to_dict()
        print(json.dumps(facts, indent=2))
    else:
        dense = sum(tensor_bytes(teacher) for teacher in teachers)
        taken = sum(map(len, data or ()))
        for line in _of_fit(args, taken, report(hyper), fitted, written, dense):
            print(line)


def _of_fit(
    args: argparse.Namespace,
    taken: int,
    figures: Report,
    fitted: FitReport,
    written: FileReport,
    dense: int,
) -> Iterator[str]:
    """What was fitted to what, how well, how large the file is, and what to do with it."""
    source = " and ".join(args.checkpoint) if args.checkpoint else "its own weights"
    if taken:
        source += f", with {taken} images of {args.data_dir}"
    yield (
        f"{args.model}, {source}: {figures.dense_params:,} of "
        f"{figures.total_dense_params:,} parameters are generated from {figures.hyper_params:,}"
    )
    yield str(fitted)
    yield (
        "An error is the norm of what is missed over the norm of the weights or outputs: 0 is "
        "exact, 1 no better than zeros."
    )
    if not taken:
        yield "With --data-dir and a few hundred unlabelled images outputs are missed far less."
    yield f"\n{written}"
    yield f"dense {dense:,} bytes, {dense / written.bytes:.1f} times as many"
    name = "" if written.recorded else f" {shlex.join(_model_words(args))}"
    file = shlex.quote(args.out)
    network = " --condition 0" if args.config.conditions else ""
    yield "\nnext, before it is used, measure its accuracy, or train it on:"
    yield f"  hyperize info {file}"
    for command, out in (("convert", "dense.safetensors"), ("export", "model.onnx")):
        yield f"  hyperize {command}{name} --checkpoint {file}{network} --out {out}"


def _model_words(args: argparse.Namespace) -> Iterator[str]:
    """The model and its arguments, as they are written on a command line."""
    yield args.model
    for flag in ("num_classes", "in_chans", "img_size"):
        if (value := getattr(args, flag)) is not None:
            yield from (f"--{flag.replace('_', '-')}", str(value))
    if args.model_kwargs:
        yield "--model-kwargs"
        for key, value in args.model_kwargs.items():
            yield f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _teacher(args: argparse.Namespace, checkpoint: str | None) -> nn.Module:
    """The model of `args` with a checkpoint's weights, or those that it comes with."""
    if checkpoint is None:
        return make(args.model, _options(args), trained=True).eval()
    teacher = make(args.model, _options(args))
    state = _state(checkpoint)
    if any(name.endswith(CONSTANTS) for name in state):
        raise FileError(
            f"--checkpoint {checkpoint} is of a hyperized model, and a fit is to dense weights; "
            "make it dense by hyperize convert."
        )
    if wrong := difference(teacher.state_dict(), state):
        raise FileError(
            f"--checkpoint {checkpoint} does not fit {args.model}: {wrong}; name the model that it "
            "is of, and its --num-classes."
        )
    teacher.load_state_dict(state)
    return teacher.eval()


def _state(checkpoint: str) -> dict[str, Tensor]:
    """The state dict in a file, which nobody vouches for."""
    import timm  # knows the forms in which training scripts leave weights

    try:
        state: dict[str, Tensor] = timm.models.load_state_dict(checkpoint, weights_only=True)
    except Exception as error:  # which the readers raise on a wrong file of any kind
        advice = "it is no file of weights that torch or safetensors can read"
        if isinstance(error, OSError) and error.strerror:
            advice = error.strerror
        if "Unsupported global" in str(error):  # as torch and timm call what they refuse
            advice = (
                "there are pickled objects in it, which could run any code; make a file of weights "
                "alone, by torch.save(model.state_dict(), path)"
            )
        raise FileError(f"--checkpoint {checkpoint} cannot be read: {advice}.") from error
    return state


def _images(args: argparse.Namespace, model: nn.Module) -> list[Tensor]:
    """Batches of images drawn from a folder, as the model takes them."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    transform: Callable[[Any], Tensor] = create_transform(
        **resolve_data_config(_size(args), model=model)
    )
    files = list(images(args.data_dir))
    generator = torch.Generator().manual_seed(args.seed or 0)
    drawn = torch.randperm(len(files), generator=generator)[: args.samples].tolist()
    progress = Console(stderr=True)
    taken = []
    for at in track(drawn, "images", console=progress, disable=not progress.is_terminal):
        try:
            with Image.open(files[at]) as image:
                taken.append(transform(image.convert("RGB")))
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            raise FileError(
                f"{files[at]} in --data-dir cannot be read as an image ({error}); repair or remove "
                "it."
            ) from error
    return list(torch.stack(taken).split(BATCH))  # (N, C, H, W)


def _size(args: argparse.Namespace) -> dict[str, Any]:
    """The size of images, if it is given, as timm takes it."""
    return {"img_size": args.img_size} if args.img_size else {}


def _convert(args: argparse.Namespace) -> None:
    """A file of hyperize.save, to the dense model's weights."""
    hyper = _loaded(args)
    if is_folder(args):
        written = save_pretrained(hyper, args.out, dense=True, dtype=_dtype(args))
    else:
        written = write_dense(hyper, args.out, dtype=_dtype(args))
    with safetensors.safe_open(written.path, framework="pt") as file:
        tensors = len(file.keys())
    sizes = f"{_megabytes(args.checkpoint)} -> {_megabytes(written.path)}"
    print(f"{written.path}: {tensors} tensors, {sizes}")


def _export(args: argparse.Namespace) -> None:
    """A file of hyperize.save, to a program for another runtime."""
    out = Path(args.out)
    hyper = _loaded(args).eval()
    size = args.input_size
    if not size:
        from timm.data import resolve_data_config

        size = resolve_data_config(_size(args), model=hyper)["input_size"]
    batch = args.batch_size or FREE_BATCH
    inputs = (torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)),)
    if out.suffix == ".onnx":
        axes = None if args.batch_size else [{0: "batch"}]
        print(export_onnx(hyper, out, inputs, dense=not args.keep_generator, dynamic=axes))
        return
    model = hyper if args.keep_generator else to_dense(hyper)
    shapes = None if args.batch_size else ({0: torch.export.Dim("batch")},)
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # of the model's code, or of the exporter
        raise HyperizeError(
            f"torch.export cannot take the {type(hyper).__name__} with inputs of {size}: {error}"
        ) from error
    try:
        with replacing(out) as part, part.open("wb") as file:  # as a path, it must end in .pt2
            torch.export.save(program, file)
    except RuntimeError as error:  # which torch's writer makes of an OSError
        raise FileError(f"--out {out} cannot be written: {error}") from error
    print(f"{out}: {_megabytes(out)}")


def _loaded(args: argparse.Namespace) -> nn.Module:
    """The hyperized model of --checkpoint, of the model named or the one that the file names."""
    if args.model is None:
        hyper = load_timm(args.checkpoint)
    else:
        hyper = load(make(args.model, _options(args)).eval(), args.checkpoint)
    if args.condition is not None:
        return at_condition(hyper, args.condition)
    if (found := conditions_of(hyper)) and found[0].networks:
        raise FileError(
            f"{args.checkpoint} holds {found[0].networks} networks; say which, by --condition and "
            f"a number from 0 to {found[0].networks - 1}."
        )
    return hyper


def _show(result: Report, args: argparse.Namespace) -> None:
    if args.json:
        print(result.to_json())
    elif rich.get_console().is_terminal:
        rich.print(result)  # in colour
    else:
        print(result)
    if args.html:
        result.to_html(args.html)


_FIGURES = tuple(
    scope + figure
    for scope in ("", "total_")
    for figure in ("dense_params", "hyper_params", "compression")
)


def _zoo(args: argparse.Namespace) -> None:
    """One row per timm model, printed as it is planned."""
    import timm

    names = timm.list_models(args.filter or "")
    if not names:
        raise HyperizeError(f"--filter {' '.join(args.filter)} matches no timm model.")
    wide = max(map(len, names))
    rows: list[dict[str, Any]] = []
    if not args.json:
        _print_row("model".ljust(wide), "targets", "hyper", "ratio", "model", "hyper", "ratio")
    try:
        for row in _planned_rows(args, names):
            rows.append(row)
            if not args.json:
                _print_row(row["model"].ljust(wide), *_cells(row))
    finally:  # what there is, also after an interruption
        if args.json:
            print(json.dumps(rows, indent=2))
    if not args.json and (refused := [row for row in rows if "refused" in row]):
        print(f"\n{len(refused)} of {len(rows)} models refused:")
        for row in refused:
            print(f"{row['model']}: {row['refused']}")


def _planned_rows(args: argparse.Namespace, names: list[str]) -> Iterator[dict[str, Any]]:
    console = Console(stderr=True)
    shown = args.json and console.is_terminal  # rows are progress enough
    for name in track(names, "planning", console=console, disable=not shown):
        try:
            result = report(make_plan(make_empty(name, _options(args)), args.config))
        except HyperizeError as error:
            yield {"model": name, "refused": str(error)}
        else:
            yield {"model": name} | {figure: getattr(result, figure) for figure in _FIGURES}


def _cells(row: dict[str, Any]) -> Iterator[str]:
    for scope in ("", "total_"):
        for side in ("dense", "hyper"):
            count = row.get(f"{scope}{side}_params")
            yield "-" if count is None else f"{count / 1e6:,.2f}M"
        ratio = row.get(f"{scope}compression")
        yield "-" if ratio is None else f"{ratio:.2f}"


def _print_row(model: str, *cells: str) -> None:
    wide = (9, 9, 6) * 2
    row = "".join(cell.rjust(width + 1) for cell, width in zip(cells, wide, strict=True))
    print(f"{model}{row}", flush=True)


def _planned(args: argparse.Namespace) -> nn.Module:
    """The model of `args`, without values where it can be made so."""
    return make_empty(args.model, _options(args))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the model."""
    flags = {name: getattr(args, name) for name in ("num_classes", "in_chans", "img_size")}
    given = {name: value for name, value in flags.items() if value is not None}
    return given | (args.model_kwargs or {})


def _megabytes(path: str | Path) -> str:
    return f"{Path(path).stat().st_size / 1e6:.1f} MB"


def _dtype(args: argparse.Namespace) -> Any:
    """As `save` takes it; bits have no dtype of torch."""
    in_bits = args.dtype in ("int8", "int4")
    return args.dtype if in_bits or not args.dtype else getattr(torch, args.dtype)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "report": _report,
    "plan": _plan,
    "fit": _fit,
    "convert": _convert,
    "export": _export,
    "info": _info,
    "zoo": _zoo,
}
"""By their names on the command line."""
