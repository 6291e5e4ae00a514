"""hyperize: turn a PyTorch model into a hypernetwork version of itself (arXiv 1609.09106)."""

from hyperize.config import BudgetError, ConfigError, HyperConfig, HyperizeError, ModelError
from hyperize.layers import LayerSpec, register_layer
from hyperize.planning import Plan, make_plan
from hyperize.rewrite import dense_state_dict, hyperize, to_dense

__version__ = "0.1.0"
