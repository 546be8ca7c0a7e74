"""A stage's objective as a pure function of flat parameters; losses, small models and checks."""

from .checks import ask, check_examples, check_layers
from .layout import Layout, Places
from .losses import cross_entropy, mean_squared_error, next_token_loss, target_function, target_name
from .models import EmbeddingHead, convnet, mlp, softmax_regression
from .objective import Lanes, Objective
from .wrapping import Wrapped, wrap

__all__ = [
    "EmbeddingHead",
    "Lanes",
    "Layout",
    "Objective",
    "Places",
    "Wrapped",
    "ask",
    "check_examples",
    "check_layers",
    "convnet",
    "cross_entropy",
    "mean_squared_error",
    "mlp",
    "next_token_loss",
    "softmax_regression",
    "target_function",
    "target_name",
    "wrap",
]
