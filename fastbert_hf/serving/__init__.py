"""What serves a model where one process is not enough."""

from .load_control import LoadControl


__all__ = ["LoadControl"]
