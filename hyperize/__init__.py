"""hyperize: turn a PyTorch model into a hypernetwork version of itself (arXiv 1609.09106)."""

from hyperize.config import (
    BudgetError,
    ConfigError,
    FileError,
    HyperConfig,
    HyperizeError,
    ModelError,
)
from hyperize.distributed import shard
from hyperize.dynamic import HyperLSTM, HyperLSTMCell, HyperRNN, HyperRNNCell
from hyperize.export import OnnxReport, as_graph, export_onnx
from hyperize.files import FileReport, from_pretrained, load, load_timm, save, save_pretrained
from hyperize.fitting import FitReport, SiteFit, fit_, fit_plan
from hyperize.layers import LayerSpec, register_layer
from hyperize.planning import Plan, make_plan
from hyperize.reporting import Report, report
from hyperize.rewrite import dense_state_dict, hyperize, to_dense
from hyperize.training import generated_l2, param_groups

__all__ = [
    "hyperize",
    "HyperConfig",
    "make_plan",
    "Plan",
    "report",
    "Report",
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
    "HyperLSTM",
    "HyperLSTMCell",
    "HyperRNN",
    "HyperRNNCell",
    "param_groups",
    "generated_l2",
    "shard",
    "HyperizeError",
    "ConfigError",
    "BudgetError",
    "ModelError",
    "FileError",
]

__version__ = "0.1.0"
