"""What a dial promises: how much faster a speed is, measured on a user's own texts."""

from .dial import Calibration, calibrate


__all__ = ["Calibration", "calibrate"]
