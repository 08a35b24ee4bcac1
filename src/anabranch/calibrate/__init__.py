"""Which operators of a model can be in half precision: measured on samples, operator by operator."""

from anabranch.calibrate._calibrate import Calibration, calibrate
from anabranch.calibrate._drawing import draw
from anabranch.calibrate._operator import Finding
from anabranch.calibrate._samples import load_samples

__all__ = ["Calibration", "Finding", "calibrate", "draw", "load_samples"]
