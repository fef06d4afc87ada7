"""Who computes a convolution is measured on the user's machine, kept (backends/tuned.py), and explained."""

from . import first_sight  # noqa: F401 (tells the selection who measures)
from .explain import Explanation, explain
from .measure import Measured, measure
from .tuner import Tuned, tune, tune_layers

__all__ = ["Explanation", "Measured", "Tuned", "explain", "measure", "tune", "tune_layers"]
