"""What a dial promises: how much faster a speed is on a user's own texts, and how many answers may differ there."""

from .certificates import Certificate, certify
from .dial import Calibration, calibrate
from .drift import Drift, drift, drift_of_answers


__all__ = ["Calibration", "Certificate", "Drift", "calibrate", "certify", "drift", "drift_of_answers"]
