"""Who computes a convolution is measured on the user's machine, kept (backends/tuned.py), and explained."""

from .explain import Explanation, explain
from .measure import Measured, measure
from .tuner import Tuned, tune

__all__ = ["Explanation", "Measured", "Tuned", "explain", "measure", "tune"]
