"""What goes beside the weights when a model is shared: its card, and on request the code that it needs."""

from .model_card import Measured, write_model_card
from .push import push_to_hub
from .with_code import save_with_code


__all__ = ["Measured", "push_to_hub", "save_with_code", "write_model_card"]
