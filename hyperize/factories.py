"""Models by the names that the command line takes: of timm, of transformers, of anyone's code."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import nn

from hyperize.config import HyperizeError, did_you_mean

__all__: list[str] = []

_TRANSFORMERS = "transformers"
_WEIGHTS = ["model.safetensors", "pytorch_model.bin"]
_WEIGHTS += [f"{name}.index.json" for name in _WEIGHTS]  # of weights in several files
"""Names that weights have on the Hub."""
_PATIENCE = 5
"""Seconds for the Hub to answer."""


def make(name: str, options: Mapping[str, Any], *, trained: bool = False) -> nn.Module:
    """The model that a name stands for.

    Args:
        name: `resnet18` is a model of timm. `package.module:factory` is called, or taken as it is
            if it is a module; it is looked for in the current folder, too. `transformers:NAME` is a
            folder or a model of the Hub, `transformers.CLASS:NAME` the same by another class than
            `AutoModel`.
        options: Keyword arguments of the factory; of transformers, of the model's configuration.
            `img_size` is for timm alone; with other models it is the size of images.
        trained: With trained weights. Those of a factory are its own in any case.

    Raises:
        HyperizeError: There is no such model, it cannot be made so, or its weights cannot be had.
    """
    place, colon, title = name.partition(":")
    if not colon:
        return _of_timm(name, options, trained)
    options = {key: value for key, value in options.items() if key != "img_size"}
    if place.partition(".")[0] == _TRANSFORMERS:
        return _of_transformers(place, title, options, trained)
    return _of_code(place, title, options)


def make_empty(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model that a name stands for, on the meta device where its code is known to allow it."""
    place, colon, _ = name.partition(":")
    known = not colon or place.partition(".")[0] == _TRANSFORMERS
    where: AbstractContextManager[Any] = torch.device("meta") if known else nullcontext()
    with where:
        return make(name, options)


def _of_timm(name: str, options: Mapping[str, Any], trained: bool) -> nn.Module:
    import timm  # takes longer to import than torch

    if not timm.is_model(name):
        raise HyperizeError(
            f"timm has no model {name!r}{did_you_mean(name, timm.list_models())} Other models are "
            "named package.module:factory, or transformers:NAME."
        )
    if trained and (source := timm.get_pretrained_cfg(name)) and source.hf_hub_id:
        files = [source.hf_hub_filename] if source.hf_hub_filename else _WEIGHTS
        _check_reachable(source.hf_hub_id, files, name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=trained, **options)
    except (TypeError, RuntimeError, ValueError, OSError) as error:
        kind, dot, _ = name.partition(".")
        hint = did_you_mean(name, timm.list_pretrained(f"{kind}.*")) if dot else "."
        said = str(error).rstrip(".")
        raise HyperizeError(f"timm cannot create {name} so: {said}{hint}") from error
    return model


def _of_transformers(place: str, name: str, options: Mapping[str, Any], trained: bool) -> nn.Module:
    try:
        transformers = import_module(_TRANSFORMERS)
    except ImportError as error:
        raise HyperizeError(
            f"{place}:{name} needs transformers ({error}); pip install 'hyperize[transformers]'."
        ) from error
    title = place.removeprefix(_TRANSFORMERS).removeprefix(".") or "AutoModel"
    kind: Any = getattr(transformers, title, None)
    if not hasattr(kind, "from_pretrained"):
        raise HyperizeError(
            f"transformers has no model {title!r}{did_you_mean(title, dir(transformers))} "
            "transformers:NAME is made by AutoModel."
        )
    if not os.path.isdir(name):
        _check_reachable(name, _WEIGHTS if trained else ["config.json"], f"{place}:{name}")
    if unknown := [key for key in ("num_classes", "in_chans") if key in options]:
        raise HyperizeError(
            f"models of transformers have no {unknown[0]}; name what their configuration calls it, "
            "as by --model-kwargs num_labels=10."
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        if trained:
            model: nn.Module = kind.from_pretrained(name, config=config)
        else:
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    except Exception as error:  # of the model's code, or of a file
        raise HyperizeError(f"transformers cannot make {name} so: {error}") from error
    return model


def _of_code(place: str, title: str, options: Mapping[str, Any]) -> nn.Module:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found: Any = import_module(place)
    except Exception as error:  # of the module's code, too
        raise HyperizeError(
            f"the module {place} cannot be imported ({type(error).__name__}: {error}); models are "
            "named as timm's, or package.module:factory, of the current folder or installed."
        ) from error
    for part in title.split("."):
        if not hasattr(found, part):
            raise HyperizeError(f"{place} has no {title!r}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        if options:
            raise HyperizeError(
                f"{place}:{title} is a model already, and takes no {next(iter(options))}."
            )
        return found
    try:
        model = found(**options)
    except Exception as error:  # whatever the factory does
        raise HyperizeError(
            f"{place}:{title} cannot be called so ({type(error).__name__}: {error}); its arguments "
            "are those of --model-kwargs, --num-classes and --in-chans."
        ) from error
    if not isinstance(model, nn.Module):
        raise HyperizeError(
            f"{place}:{title} must return a torch.nn.Module, got {type(model).__name__}."
        )
    return model


def _check_reachable(repo: str, files: list[str], name: str) -> None:
    """Fails at once where one of some files would have to be fetched and cannot be.

    huggingface_hub itself tries again for a minute.
    """
    import huggingface_hub as hub  # takes long to import

    if any(isinstance(hub.try_to_load_from_cache(repo, one), str) for one in files):
        return
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, files[0]), timeout=_PATIENCE)
    except (hub.errors.HfHubHTTPError, hub.errors.EntryNotFoundError):
        return  # an answer; what is wrong will be said
    except Exception as error:  # of several libraries of connections
        weights = files[0] in _WEIGHTS
        advice = "give its weights by --checkpoint FILE" if weights else "name a folder instead"
        raise HyperizeError(
            f"{name} is not on this machine, and {hub.constants.ENDPOINT} cannot be reached "
            f"({type(error).__name__}); {advice}."
        ) from error
