"""Models of timm: what a file says of one, and how it is made again, by timm's own code.

A description comes from a file of unknown origin, so that it may ask for little: a name of timm's
registry and plain, bounded arguments.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperize.config import ConfigError, FileError, HyperizeError
from hyperize.plan import Plan
from hyperize.rewrite import apply_plans

__all__: list[str] = []

TIMM_ARGS = (
    *("num_classes", "in_chans", "img_size", "patch_size", "window_size", "global_pool"),
    *("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "output_stride"),
    *("act_layer", "norm_layer", "dynamic_img_size", "strict_img_size", "reg_tokens"),
    *("class_token", "qkv_bias"),
)
"""Arguments of timm.create_model that a file may give: none names code, a file or a place on the
network, and none can ask for work without bounds, as a depth would."""
LARGEST_ARG = 2**16
"""Of the whole numbers among them."""


def create(config: Mapping[str, Any]) -> nn.Module:
    """The timm model of a config in the keys of `config.json`, at random or on meta.

    Raises:
        FileError: It asks for something else than a model of timm's registry and plain arguments.
    """
    import timm  # takes longer to import than torch

    name = config["architecture"]
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise FileError(f"{name!r} is not the name of a model that this version of timm has.")
    args = {"num_classes": config["num_classes"]} | config.get("model_args", {})
    if args.get("global_pool") == "" and args["num_classes"] != 0:
        raise FileError("a classifier without pooling is not what timm's models can compute.")
    if problem := _forbidden(args):
        raise FileError(f"{problem}; make the model yourself and use hyperize.load(model, path).")
    source = timm.models.PretrainedCfg(**config["pretrained_cfg"]).to_dict(remove_source=True)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = timm.create_model(name, pretrained=False, pretrained_cfg=source, **args)
    return model


def _forbidden(args: Mapping[str, Any]) -> str | None:
    """What a file may not ask of timm, if anything."""
    for name, value in args.items():
        if name not in TIMM_ARGS:
            return f"the argument {name} is not one that a file may give to timm"
        values = value if isinstance(value, (list, tuple)) else (value,)
        if len(values) > 4 or not all(
            v is None or (isinstance(v, (bool, float)) or _word(v) or _bounded(v)) for v in values
        ):
            return f"{name}={value!r} is not a plain value that a file may give to timm"
    return None


def _word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w*", value) is not None


def _bounded(value: Any) -> bool:
    return isinstance(value, int) and abs(value) <= LARGEST_ARG


def describe(
    hyper: nn.Module, plans: Sequence[Plan], timm_args: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, str]:
    """What `load_timm` needs of a timm model, in the keys of config.json; or why there is none.

    Raises:
        ConfigError: `timm_args` are given, and do not make this model.
    """
    config, reason = None, f"{type(hyper).__name__} is not a model of timm."
    if isinstance(getattr(hyper, "pretrained_cfg", None), dict):
        try:
            # timm keeps the drop rates with the model, but leaves them out of a description
            kept = getattr(hyper, "_model_args", {})
            rates = {name: kept[name] for name in kept if name.endswith("_rate")}
            config = _describe(hyper, rates | dict(timm_args or {}))
            reason = _misfit(hyper, plans, config)
        except Exception as error:  # of timm's code, on a model that may have been changed
            reason = f"timm cannot describe it ({error})."
    if reason and timm_args is not None:
        raise ConfigError(
            f"timm_args={dict(timm_args)!r} do not make this model: {reason} Leave them out to "
            "write a file for load(model, path)."
        )
    return (None if reason else config), reason


def _describe(hyper: nn.Module, timm_args: dict[str, Any]) -> dict[str, Any]:
    from timm.models._hub import save_config_for_hf  # private, and only needed here

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(hyper, path, model_args=timm_args)
        described: dict[str, Any] = json.loads(path.read_text())
    return described


def _misfit(hyper: nn.Module, plans: Sequence[Plan], config: Mapping[str, Any]) -> str:
    """How the model of a config differs from the dense one of a hyperized model; "" if it doesn't.

    Names and shapes of all tensors are compared, and what the modules print of themselves, in
    which activations, strides and the like appear.
    """
    try:
        with torch.device("meta"):
            made = create(config).train(hyper.training)
        again = apply_plans(made, plans)
    except HyperizeError as error:
        return str(error)
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (hyper, again))
    if ours != theirs:
        return f"timm.create_model({config['architecture']!r}) makes other tensors than it has."
    if repr(hyper) != repr(again):
        return f"timm.create_model({config['architecture']!r}) makes other layers than it has."
    return ""
