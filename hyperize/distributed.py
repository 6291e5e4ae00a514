"""Sharding over processes: which parts of a hyperized model are gathered together.

Layers in many blocks call the one hypernetwork. FSDP2 gathers a group of parameters when the module
that it was made for is called, so a group of the hypernetwork's own would be gathered once for each
weight. In the root's group it is gathered once per pass, and its gradients are reduced once, after
all layers have added theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from hyperize.config import ConfigError, ModelError
from hyperize.hypernet import HyperNet
from hyperize.layers import HYPERNET, Generated
from hyperize.parts import find_groups
from hyperize.sites import M
from hyperize.tensors import is_sharded

__all__ = ["shard"]

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def shard(hyper: M, blocks: Iterable[nn.Module] | None = None, **options: Any) -> M:
    """Shards a hyperized model over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    First the blocks, then the whole model, whose group holds the hypernetwork and the layers
    outside of blocks. Make the optimizer afterwards, as this replaces the parameters.

    `to_dense` and `save` refuse a sharded model. They take an unsharded copy, made of the full
    state dict:

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(hyper, options=options)  # on all processes
        whole = hyperize(timm.create_model("resnet50"), hyper.hypernet.plan)
        whole.load_state_dict(state)  # on rank 0, which alone has it

    Both are of `torch.distributed.checkpoint.state_dict`. Its `get_state_dict`, written by
    `torch.distributed.checkpoint.save`, can be resumed with any number of processes.

    Args:
        hyper: A hyperized model; sharded in place.
        blocks: Modules of the model, each to be gathered when it is called. By default they are
            found: elements of the outermost `nn.Sequential`s, `nn.ModuleList`s and
            `nn.ModuleDict`s that consist of several modules and share no parameter with the rest.
        **options: Of `fully_shard`, for blocks and root alike: `mesh`, `mp_policy`,
            `reshard_after_forward`, ...

    Returns:
        `hyper` itself, now an `FSDPModule`.

    Raises:
        ModelError: The model is not hyperized, is wrapped or sharded already, or has parameters
            without axes, which cannot be sharded.
        ConfigError: A block is not a module below the model, cannot be called, holds the
            hypernetwork, or shares a parameter with modules outside of it.
    """
    from torch.distributed.fsdp import fully_shard

    groups = find_groups(hyper)
    shared = {id(p) for group in groups for p in group.hypernet.parameters()}
    _check_params(hyper, options.get("ignored_params") or ())
    if blocks is None:
        blocks = [block for block in _elements(hyper) if not _misplaced(hyper, block, shared)]
    else:
        blocks = list(blocks)
        _check_blocks(hyper, blocks, shared)
    chosen = {id(block) for block in blocks}
    for module in reversed(list(hyper.modules())):  # inner blocks before those around them
        if id(module) in chosen:
            fully_shard(module, **options)
    # FSDP2 does not look into blocks again, where all layers of a hypernetwork may be
    names = {f"{HYPERNET}_{at}": group.hypernet for at, group in enumerate(groups)}
    hyper._modules.update(names)
    try:
        fully_shard(hyper, **options)
    finally:
        for name in names:
            del hyper._modules[name]
    return hyper


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists that consist of several modules."""
    for child in module.children():
        if isinstance(child, _LISTS) or not isinstance(module, _LISTS):
            yield from _elements(child)
        elif next(child.children(), None) is not None:
            yield child


def _check_params(hyper: nn.Module, ignored: Iterable[Tensor]) -> None:
    skipped = {id(param) for param in ignored}
    params = {name: p for name, p in hyper.named_parameters() if id(p) not in skipped}
    if sharded := [name for name, p in params.items() if is_sharded(p)]:
        raise ModelError(
            f"the model is sharded already: {sharded[0]} is a DTensor. Call shard once, on the "
            "model that hyperize() returned, with the blocks that are to be groups of their own."
        )
    scalars = [name for name, p in params.items() if p.ndim == 0]
    if scalars:
        raise ModelError(
            f"{scalars[0]} has no axes, so it cannot be sharded (one of {len(scalars)} such "
            "parameters). Make it a vector of one element, or name it in ignored_params and "
            "reduce its gradient yourself."
        )


def _check_blocks(hyper: nn.Module, blocks: list[nn.Module], shared: set[int]) -> None:
    paths = {id(module): path for path, module in hyper.named_modules()}
    for block in blocks:
        if not isinstance(block, nn.Module) or not paths.get(id(block)):
            raise ConfigError(
                f"blocks must be modules below the model, got a {type(block).__name__} that is "
                f"{'the model itself' if block is hyper else 'none of them'}. The model is sharded "
                "in any case, after its blocks; name blocks as model.layer1[0]."
            )
        if reason := _misplaced(hyper, block, shared):
            raise ConfigError(f"{paths[id(block)]} cannot be a block: it {reason}.")


def _misplaced(hyper: nn.Module, block: nn.Module, shared: set[int]) -> str:
    """Why a module cannot have a group of its own; empty if it can.

    Args:
        hyper: The whole model.
        block: The module.
        shared: The hypernetworks' parameters by id, which are in the model's own group.
    """
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        return "is a container that is never called itself; name its elements"
    below = list(block.modules())
    owned = {module.hypernet for module in below if isinstance(module, Generated)}
    if any(isinstance(module, HyperNet) and module not in owned for module in below):
        verb = "is" if isinstance(block, HyperNet) else "holds"
        return f"{verb} the hypernetwork, which has to be in the model's own group"
    rest = hyper.named_modules(memo={block})  # without what can be reached through the block only
    outside = {id(param) for _, module in rest for param in module._parameters.values()}
    own = ((name, id(p)) for name, p in block.named_parameters() if id(p) not in shared)
    if tied := [name for name, number in own if number in outside]:
        return f"shares {tied[0]} with a module outside of it; name one around both, or none"
    return ""
