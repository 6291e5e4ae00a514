"""The console command `hyperize`: thin; flags are named as in timm."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from hyperize.conditions import conditions_of
from hyperize.config import FileError, HyperConfig, HyperizeError
from hyperize.files import load, read_header, save, write_dense
from hyperize.fitting import fit_
from hyperize.folders import CARD, CONFIG, WEIGHTS, load_timm, save_pretrained
from hyperize.networks import at_condition
from hyperize.onnx import export_onnx
from hyperize.reporting import WIDTH, Report, report
from hyperize.rewrite import hyperize, to_dense
from hyperize.search import make_plan
from hyperize.writing import replacing

__all__ = ["main"]

BATCH = 64
"""Images that a fit runs through the model at once."""
FREE_BATCH = 2
"""Of the inputs with which a program of any batch size is made; 1 would be taken as fixed."""
OK, FAILED, USAGE = 0, 1, 2
"""Exit codes: done; a request that cannot be carried out; a wrong command line (argparse)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if `None`.

    Returns:
        The exit code: 0, or 1 with one line on stderr if the request cannot be carried out.
    """
    args = _parser().parse_args(argv)
    try:
        _check_outputs(args)
        return int(args.run(args))
    except HyperizeError as error:
        print(f"hyperize: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _check_outputs(args: argparse.Namespace) -> None:
    """Looks at what a command will write, before it works; nothing is written or made here.

    Args:
        args: Of any command; one that writes no file has nothing to be checked.

    Raises:
        FileError: An output is an input or another output; is there already, without --force; is a
            folder or a device; or its folder is missing or cannot be written to.
    """
    outputs = list(_outputs(args))
    for at, (title, target, folder) in enumerate(outputs):
        for flag, source in _inputs(args) if os.path.exists(target) else ():
            if any(_same(target, file) for file in _files_read(source)):
                raise FileError(
                    f"{title} is a file that {flag} {source} reads, and no input is overwritten, "
                    "not even with --force; name another file."
                )
        for other, path, _ in outputs[:at]:
            if _same(target, path):
                raise FileError(
                    f"{title} is the same file as {other}, and each output needs a file of its "
                    "own; name another file."
                )
        if os.path.exists(target) and not os.path.isfile(target):
            kind = "a folder" if os.path.isdir(target) else "a device or a pipe"
            raise FileError(f"{title} is {kind}, and the output is a file; name a file.")
        if os.path.lexists(target) and not args.force:
            raise FileError(
                f"{title} exists already, and no file is overwritten unasked; name another file, "
                "or add --force to overwrite it."
            )
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            fault = "cannot be written to" if os.path.isdir(folder) else "is not a folder"
            raise FileError(
                f"{title} cannot be written: {folder} {fault}, and an output goes to a folder that "
                "exists and can be written to; make it so, or name another."
            )


def _outputs(args: argparse.Namespace) -> Iterator[tuple[str, Path, Path]]:
    """The files that a command will write: what errors call each, itself, and the folder for it."""
    for flag in ("out", "html"):
        if (value := getattr(args, flag, None)) is None:
            continue
        path = Path(value)
        if flag == "out" and _is_folder(args):
            folder = path  # which is made, with those above it
            while not os.path.lexists(folder) and folder != folder.parent:
                folder = folder.parent
            for name in (WEIGHTS, CONFIG, CARD):
                yield f"{name} in --{flag} {path}", path / name, folder
        else:
            yield f"--{flag} {path}", path, path.parent


def _inputs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The files and folders that a command reads, each after its flag."""
    for flag, name in (
        ("--checkpoint", "checkpoint"),
        ("--data-dir", "data_dir"),
        ("FILE", "file"),
    ):
        if (value := getattr(args, name, None)) is not None:
            yield from ((flag, one) for one in ([value] if isinstance(value, str) else value))
    values = list((getattr(args, "model_kwargs", None) or {}).values())
    for value in values:  # grows: `checkpoint_path` is text, `pretrained_cfg_overlay` has some
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, str):
            yield "--model-kwargs", value


def _files_read(source: str) -> Iterator[Path]:
    """An input itself, or if it is a folder, the images in it."""
    yield Path(source)
    for folder, _, names in os.walk(source, followlinks=True):
        for name in names:
            if timm.data.is_img_extension(os.path.splitext(name)[1].lower()):
                yield Path(folder, name)


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, through links or not, there already or not."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _is_folder(args: argparse.Namespace) -> bool:
    """Whether --out names a folder, which that of `convert` does unless it ends in .safetensors."""
    return args.run is _convert and Path(args.out).suffix != ".safetensors"


def _report(args: argparse.Namespace) -> int:
    """The compression report of one timm model, planned on the meta device."""
    _show(report(make_plan(_meta_model(args), _config(args))), args)
    return OK


def _plan(args: argparse.Namespace) -> int:
    """The plan of one timm model: all sizes that `hyperize` would build."""
    plan = make_plan(_meta_model(args), _config(args))
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
    return OK


def _info(args: argparse.Namespace) -> int:
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
    figures = report(load_timm(args.file) if whole else plans[0])
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
    return OK


def _fit(args: argparse.Namespace) -> int:
    """A timm model's weights, to a file of hyperize.save."""
    teachers = [_teacher(args, file) for file in args.checkpoint or [None]]
    data = _images(args, teachers[0]) if args.data_dir else None
    if len(teachers) > 1 and args.conditions is None:
        args.conditions = len(teachers)
    config = _config(args)
    if not (args.embeddings or args.tile or args.hidden_dim):
        config = config.replace(embeddings="channel")  # what fits trained weights best
    hyper = hyperize(teachers[0], config)
    fitted = fit_(hyper, teachers if config.conditions else teachers[0], data=data)
    written = save(hyper, args.out, dtype=_dtype(args))
    if args.json:
        facts = {"file": args.out, "bytes": written.bytes} | fitted.to_dict()
        print(json.dumps(facts, indent=2))
    else:
        print(f"{fitted}\n\n{written}")
    return OK


def _teacher(args: argparse.Namespace, checkpoint: str | None) -> nn.Module:
    """The timm model of `args` with a checkpoint's weights, or those of timm."""
    if checkpoint is None:
        return _timm_model(args, pretrained=True).eval()
    teacher = _timm_model(args)
    try:
        state = timm.models.load_state_dict(checkpoint, weights_only=True)
        teacher.load_state_dict(state)
    except Exception as error:  # which the readers raise on a wrong file of any kind
        raise FileError(f"--checkpoint {checkpoint} does not fit {args.model}: {error}") from error
    return teacher.eval()


def _images(args: argparse.Namespace, model: nn.Module) -> list[torch.Tensor]:
    """Batches of images drawn from a folder, as the model takes them."""
    try:
        dataset = timm.data.create_dataset("", args.data_dir)
    except (OSError, RuntimeError) as error:
        raise FileError(f"--data-dir {args.data_dir} holds no images: {error}") from error
    config = timm.data.resolve_data_config(model=model)
    dataset.transform = timm.data.create_transform(**config)
    generator = torch.Generator().manual_seed(args.seed or 0)
    drawn = torch.randperm(len(dataset), generator=generator)[: args.samples].tolist()
    progress = Console(stderr=True)
    images = [
        dataset[at][0]
        for at in track(drawn, "images", console=progress, disable=not progress.is_terminal)
    ]
    return list(torch.stack(images).split(BATCH))  # (N, C, H, W)


def _convert(args: argparse.Namespace) -> int:
    """A file of hyperize.save, to the dense model's weights."""
    hyper = _loaded(args)
    if _is_folder(args):
        written = save_pretrained(hyper, args.out, dense=True, dtype=_dtype(args))
    else:
        written = write_dense(hyper, args.out, dtype=_dtype(args))
    with safetensors.safe_open(written.path, framework="pt") as file:
        tensors = len(file.keys())
    sizes = f"{_megabytes(args.checkpoint)} -> {_megabytes(written.path)}"
    print(f"{written.path}: {tensors} tensors, {sizes}")
    return OK


def _export(args: argparse.Namespace) -> int:
    """A file of hyperize.save, to a program for another runtime."""
    out = Path(args.out)
    if out.suffix not in (".onnx", ".pt2"):
        raise FileError(f"--out must end in .onnx (ONNX) or .pt2 (torch.export), got {out}.")
    hyper = _loaded(args).eval()
    size = args.input_size or timm.data.resolve_data_config(model=hyper)["input_size"]
    batch = args.batch_size or FREE_BATCH
    inputs = (torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)),)
    if out.suffix == ".onnx":
        axes = None if args.batch_size else [{0: "batch"}]
        print(export_onnx(hyper, out, inputs, dense=not args.keep_generator, dynamic=axes))
        return OK
    model = hyper if args.keep_generator else to_dense(hyper)
    shapes = None if args.batch_size else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    try:
        with replacing(out) as part, part.open("wb") as file:  # as a path, it must end in .pt2
            torch.export.save(program, file)
    except RuntimeError as error:  # which torch's writer makes of an OSError
        raise FileError(f"--out {out} cannot be written: {error}") from error
    print(f"{out}: {_megabytes(out)}")
    return OK


def _loaded(args: argparse.Namespace) -> nn.Module:
    """The hyperized model of --checkpoint, of the model named or the one that the file names."""
    if not Path(args.checkpoint).is_file():
        raise FileError(f"--checkpoint {args.checkpoint} is not a file.")
    if args.model is None:
        hyper = load_timm(args.checkpoint)
    else:
        hyper = load(_timm_model(args).eval(), args.checkpoint)
    if args.condition is not None:
        return at_condition(hyper, args.condition)
    if (found := conditions_of(hyper)) and found[0].networks:
        raise FileError(
            f"{args.checkpoint} holds {found[0].networks} networks; say which, by --condition and "
            f"a number from 0 to {found[0].networks - 1}."
        )
    return hyper


def _show(result: Report, args: argparse.Namespace) -> None:
    print(result.to_json() if args.json else result)
    if args.html:
        result.to_html(args.html)


_FIGURES = tuple(
    scope + figure
    for scope in ("", "total_")
    for figure in ("dense_params", "hyper_params", "compression")
)


def _zoo(args: argparse.Namespace) -> int:
    """One row per timm model, planned on the meta device."""
    names = timm.list_models(args.filter or "")
    if not names:
        raise HyperizeError(f"--filter {args.filter!r} matches no timm model.")
    config = _config(args)
    progress = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for name in track(names, "planning", console=progress, disable=not progress.is_terminal):
        args.model = name
        try:
            result = report(make_plan(_meta_model(args), config))
        except HyperizeError as error:
            rows.append({"model": name, "refused": str(error)})
            continue
        rows.append({"model": name} | {figure: getattr(result, figure) for figure in _FIGURES})
    if args.json:
        print(json.dumps(rows, indent=2))
        return OK
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold", ratio=1)
    for column in ("targets", "hyper", "ratio", "model", "hyper", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if "refused" in row:
            table.add_row(row["model"], "-", "-", "-", "-", "-", "-")
            continue
        cells = []
        for scope in ("", "total_"):
            cells += [f"{row[f'{scope}{side}_params'] / 1e6:,.2f}M" for side in ("dense", "hyper")]
            cells.append(f"{row[f'{scope}compression']:.2f}")
        table.add_row(row["model"], *cells)
    console = Console(width=WIDTH, markup=False, highlight=False)
    console.print(table)
    if refused := [row for row in rows if "refused" in row]:
        console.print(f"\n{len(refused)} of {len(rows)} models refused:")
        for row in refused:
            console.print(f"{row['model']}: {row['refused']}")
    return OK


def _meta_model(args: argparse.Namespace) -> nn.Module:
    """The timm model of `args` on the meta device."""
    with torch.device("meta"):
        return _timm_model(args)


def _timm_model(args: argparse.Namespace, pretrained: bool = False) -> nn.Module:
    """The timm model of `args`."""
    flags = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    flags["img_size"] = args.img_size
    kwargs = {k: v for k, v in flags.items() if v is not None} | (args.model_kwargs or {})
    if not timm.is_model(args.model):
        near = timm.list_models(f"*{args.model}*")[:3]
        hint = f"; near misses: {', '.join(near)}" if near else ""
        raise HyperizeError(f"timm has no model {args.model!r}{hint}.")
    try:
        model: nn.Module = timm.create_model(args.model, pretrained=pretrained, **kwargs)
        return model
    except (TypeError, RuntimeError, ValueError, OSError) as error:
        raise HyperizeError(f"timm cannot create {args.model} so: {error}") from error


def _config(args: argparse.Namespace) -> HyperConfig:
    names = [field.name for field in fields(HyperConfig) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return HyperConfig(**given)


def _megabytes(path: str | Path) -> str:
    return f"{Path(path).stat().st_size / 1e6:.1f} MB"


def _dtype(args: argparse.Namespace) -> Any:
    """As `save` takes it; bits have no dtype of torch."""
    in_bits = args.dtype in ("int8", "int4")
    return args.dtype if in_bits or not args.dtype else getattr(torch, args.dtype)


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperize",
        description="Generate a model's weights from one shared hypernetwork.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int],
        parents: list[argparse.ArgumentParser],
        text: str,
        example: str,
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            parents=parents,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example: {example}",
        )
        command.set_defaults(run=run)
        return command

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model (as in timm)")
    group.add_argument("--num-classes", type=int, metavar="N")
    group.add_argument("--in-chans", type=int, metavar="N")
    group.add_argument("--img-size", type=int, metavar="N")
    group.add_argument(
        "--model-kwargs",
        type=_key_value,
        action=_Collect,
        nargs="*",
        metavar="KEY=VALUE",
        help="further arguments of timm.create_model",
    )

    request = argparse.ArgumentParser(add_help=False)
    group = request.add_argument_group("request")
    group.add_argument(
        "--compression",
        type=float,
        metavar="X",
        help="dense target weights over what they are generated from, at least (default 10)",
    )
    group.add_argument(
        "--max-params", type=int, metavar="N", help="a total for the whole model instead"
    )
    group.add_argument("--targets", nargs="+", metavar="KIND", help="default: conv2d lstm")
    group.add_argument("--include", nargs="+", metavar="GLOB", help="module paths to rewrite")
    group.add_argument("--exclude", nargs="+", metavar="GLOB", help="module paths to leave dense")
    group.add_argument("--embedding-dim", type=int, metavar="N", help="default: planned")
    group.add_argument("--hidden-dim", type=int, metavar="N", help="default: planned")
    group.add_argument(
        "--tile", nargs=2, type=int, metavar=("OUT", "IN"), help="default: planned by kernel size"
    )
    group.add_argument(
        "--lstm", choices=("static", "dynamic"), help="generate LSTM weights, or put HyperLSTMs"
    )
    group.add_argument(
        "--embeddings",
        choices=("tile", "channel"),
        help="what has an embedding of its own; default: tile, of fit: channel",
    )
    group.add_argument(
        "--factorized",
        action="store_true",
        default=None,
        help="compute with the factors of weights where that is faster",
    )
    group.add_argument(
        "--conditions", type=int, metavar="K", help="networks of one architecture to generate"
    )
    group.add_argument(
        "--private", nargs="+", metavar="GLOB", help="further layers of which each has its own"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the initial hypernetwork")

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print JSON")
    page = argparse.ArgumentParser(add_help=False)
    page.add_argument("--html", metavar="F", help="write a page to look at as well")
    force = argparse.ArgumentParser(add_help=False)
    force.add_argument(
        "--force", action="store_true", help="overwrite files that exist; never the input"
    )
    rounding = argparse.ArgumentParser(add_help=False)
    rounding.add_argument(
        "--dtype", choices=("float16", "bfloat16"), help="round the parameters for the file"
    )
    few_bits = argparse.ArgumentParser(add_help=False)
    few_bits.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "int8", "int4"),
        help="round the parameters for the file; in int8 it is a quarter as long",
    )

    command = add(
        "report",
        _report,
        [model, request, output, page, force],
        "what compressing a timm model saves",
        "hyperize report resnet50 --compression 20 --html report.html",
    )
    command.add_argument("model", help="timm model name, as resnet50")

    command = add(
        "plan",
        _plan,
        [model, request, output],
        "all sizes that hyperize() would choose for a timm model",
        "hyperize plan resnet50 --compression 20 --targets conv2d linear",
    )
    command.add_argument("model", help="timm model name, as resnet50")

    command = add(
        "fit",
        _fit,
        [model, request, output, few_bits, force],
        "fit a generator to a timm model's trained weights",
        "hyperize fit resnet18 --checkpoint resnet18.safetensors --data-dir images --out "
        "hyper.safetensors",
    )
    command.add_argument("model", help="timm model name, as resnet18.a1_in1k")
    command.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="F",
        help="its state dict; otherwise timm's pretrained weights; of several one generator makes "
        "all the networks",
    )
    command.add_argument("--out", required=True, metavar="F", help="file of hyperize.save to write")
    command.add_argument(
        "--data-dir",
        metavar="DIR",
        help="images, unlabelled, of which the fit minimises the layers' output errors; far better "
        "than weights alone",
    )
    command.add_argument(
        "--samples", type=_count, default=512, metavar="N", help="of them (default: %(default)s)"
    )

    hyper = argparse.ArgumentParser(add_help=False)
    hyper.add_argument(
        "model", nargs="?", help="timm model name; default: the one that the file names"
    )
    hyper.add_argument("--checkpoint", required=True, metavar="F", help="file of hyperize.save")
    hyper.add_argument(
        "--condition", type=int, metavar="K", help="which of several networks in the file, from 0"
    )

    command = add(
        "convert",
        _convert,
        [model, hyper, rounding, force],
        "a file of hyperize.save to dense weights",
        "hyperize convert --checkpoint hyper.safetensors --out dense.safetensors",
    )
    command.add_argument(
        "--out",
        required=True,
        metavar="OUT",
        help="a .safetensors file of a state dict, or a folder for timm.create_model('local-dir:')",
    )

    command = add(
        "export",
        _export,
        [model, hyper, force],
        "a file of hyperize.save to ONNX or torch.export",
        "hyperize export --checkpoint hyper.safetensors --out model.onnx",
    )
    command.add_argument("--out", required=True, metavar="F", help="file to write: .onnx or .pt2")
    command.add_argument(
        "--input-size", nargs=3, type=_count, metavar=("C", "H", "W"), help="default: the model's"
    )
    command.add_argument(
        "--batch-size", type=_count, metavar="N", help="fix the batch size; default: it is free"
    )
    command.add_argument(
        "--keep-generator",
        action="store_true",
        help="keep the generator in the file, which is small then and generates at run time",
    )

    command = add(
        "info",
        _info,
        [output, page, force],
        "what is in a file of hyperize.save",
        "hyperize info hyper.safetensors --html report.html",
    )
    command.add_argument("file", metavar="FILE", help="file of hyperize.save")

    command = add(
        "zoo",
        _zoo,
        [model, request, output],
        "a table over many timm models",
        "hyperize zoo --filter 'resnet*' --compression 20",
    )
    command.add_argument("--filter", metavar="GLOB", help="timm model names, as 'resnet*'")
    return parser


class _Collect(argparse.Action):
    """Gathers key=value pairs into a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, dict(values))


if __name__ == "__main__":
    sys.exit(main())
