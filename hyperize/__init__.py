"""hyperize: turn a PyTorch model into a hypernetwork version of itself (arXiv 1609.09106)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperize.calls import cached
    from hyperize.conditions import condition
    from hyperize.config import (
        BudgetError,
        ConditionError,
        ConfigError,
        FileError,
        HyperConfig,
        HyperizeError,
        ModelError,
        WeightError,
    )
    from hyperize.distributed import shard
    from hyperize.dynamic import HyperLSTM, HyperLSTMCell, HyperRNN, HyperRNNCell
    from hyperize.families import register_family
    from hyperize.family import Family
    from hyperize.files import FileReport, load, save
    from hyperize.fitting import FitReport, SiteFit, fit_, fit_plan
    from hyperize.folders import from_pretrained, load_timm, save_pretrained
    from hyperize.graph import as_graph
    from hyperize.layers import LayerSpec, register_layer
    from hyperize.muon import HyperMuon
    from hyperize.networks import add_condition, at_condition
    from hyperize.onnx import OnnxReport, export_onnx
    from hyperize.plan import Plan
    from hyperize.reporting import Report, report, to_html
    from hyperize.rewrite import dense_state_dict, hyperize, to_dense
    from hyperize.rounding import quantized
    from hyperize.search import make_plan
    from hyperize.training import generated_l2, param_groups

__all__ = [
    "hyperize",
    "HyperConfig",
    "make_plan",
    "Plan",
    "report",
    "Report",
    "to_html",
    "to_dense",
    "dense_state_dict",
    "as_graph",
    "export_onnx",
    "OnnxReport",
    "save",
    "load",
    "load_timm",
    "save_pretrained",
    "from_pretrained",
    "FileReport",
    "fit_",
    "fit_plan",
    "FitReport",
    "SiteFit",
    "register_layer",
    "LayerSpec",
    "register_family",
    "Family",
    "HyperLSTM",
    "HyperLSTMCell",
    "HyperRNN",
    "HyperRNNCell",
    "HyperMuon",
    "param_groups",
    "generated_l2",
    "condition",
    "at_condition",
    "add_condition",
    "cached",
    "quantized",
    "shard",
    "HyperizeError",
    "ConfigError",
    "BudgetError",
    "ConditionError",
    "ModelError",
    "FileError",
    "WeightError",
]

__version__ = "0.1.0"


if not TYPE_CHECKING:
    _MODULES = (
        "calls",
        "conditions",
        "config",
        "distributed",
        "dynamic",
        "families",
        "family",
        "files",
        "fitting",
        "folders",
        "graph",
        "layers",
        "networks",
        "onnx",
        "plan",
        "reporting",
        "rewrite",
        "rounding",
        "search",
        "training",
    )
    """Where the public names are from, but for `HyperMuon`, for which timm has to be imported."""

    def __getattr__(name: str) -> Any:
        """Imports all public names when the first is used: `hyperize --help` need not wait."""
        if name not in __all__:
            raise AttributeError(f"module 'hyperize' has no attribute {name!r}")
        for module in ("muon",) if name == "HyperMuon" else _MODULES:
            public = vars(import_module(f"hyperize.{module}"))
            globals().update({key: public[key] for key in public["__all__"] if key in __all__})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
