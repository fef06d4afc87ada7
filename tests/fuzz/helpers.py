"""What networks read from another module: functions and settings that a rule of the fuzz may exchange."""

import functools

import torch
import torch.nn.functional as F

OFFSET = 0.0


def shifted(x, by=0.125):
    return x + by + OFFSET


def squash(x):
    return torch.tanh(x) * 2


def gate(x):
    return F.hardsigmoid(x)


def negated(x):
    return -x


def halved(x):
    return x * 0.5


def scaled_result(function):
    """A user's decorator, which is no part of torch."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 0.75

    return wrapper


def make_scaler(factor):
    def scale(x):
        return x * factor

    return scale


class Scaler:
    """A callable object with a field."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor
