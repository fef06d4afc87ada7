"""The state machine of the swap's fuzz, and what runs it."""

import contextlib

import torch
import torch.nn.functional as F
from changes import CHANGES
from compare import Difference, Progress
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from session import Session
from torch import nn

import convext


@contextlib.contextmanager
def other_rounding():
    with torch.backends.mkldnn.flags(enabled=False):
        yield


# ---- planted faults: what the fuzz must find -------------------------------------------------------------------------


def weights_of_the_swap(model):
    """Convolutions that go on with the weights they had."""
    for m in model.modules():
        if type(m) is nn.Conv2d:
            weight = m.weight.detach().clone()
            m.forward = lambda x, m=m, weight=weight: m._conv_forward(
                x, weight.to(x.dtype) + (m.weight - m.weight.detach()), m.bias
            )
    return model


def settings_of_the_swap(model):
    """Batch norms that go on with the eps they had."""
    for m in model.modules():
        if type(m) is nn.BatchNorm2d:

            def forward(x, m=m, eps=m.eps):
                now, m.eps = m.eps, eps
                try:
                    return type(m).forward(m, x)
                finally:
                    m.eps = now

            m.forward = forward
    return model


def deaf(model):
    """Sequences that call their parts' forwards, and no hooks."""
    for m in model.modules():
        if type(m) is nn.Sequential:

            def forward(x, m=m):
                for part in m:
                    x = part.forward(x)
                return x

            m.forward = forward
    return model


def slightly_off(model):
    """A relative error of 1e-3."""
    for m in model.modules():
        if type(m) is nn.Conv2d:
            m.forward = lambda x, m=m: type(m).forward(m, x) * 1.001
    return model


def forgets_statistics(model):
    """Running statistics that are not updated without gradients."""
    for m in model.modules():
        if type(m) is nn.BatchNorm2d:

            def forward(x, m=m):
                tracks = m.track_running_stats and torch.is_grad_enabled()
                mean, var = (m.running_mean, m.running_var) if tracks or not m.training else (None, None)
                return F.batch_norm(
                    x, mean, var, m.weight, m.bias, m.training or mean is None, m.momentum or 0.0, m.eps
                )

            m.forward = forward
    return model


FAULTS = {  # and the rules that must bring it to light
    weights_of_the_swap: {"write_a_tensor"},
    settings_of_the_swap: {"layer_setting"},
    deaf: {"hook"},
    slightly_off: {"other_size_from_here_on"},
    forgets_statistics: {"mode"},
}

TWINS = {  # what the second twin is: convext's swap, or plain PyTorch, to test the fuzz itself
    "convext": (convext.swap, contextlib.nullcontext),
    "plain": (lambda model: model, contextlib.nullcontext),
    "rounding": (lambda model: model, other_rounding),
}
RNG = st.randoms(use_true_random=False)


PROGRESS = Progress()


def make_machine(twin="convext", changes=CHANGES):
    """A state machine's class. twin: a name in TWINS, or a function that makes the second twin of a model."""
    swap, context = TWINS[twin] if isinstance(twin, str) else (twin, contextlib.nullcontext)

    def step(self, function, rng):
        self.session.rng = rng
        try:
            done = self.session.step(function)
        except Difference as difference:
            text = f"{difference}\n\nwhat was done:\n{self.session.story()}"
            raise PROGRESS.differ(Difference(text)) from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n\nwhat was done:\n{self.session.story()}"
            raise PROGRESS.differ(Difference(text)) from error
        PROGRESS.count(function.__name__, done)

    class SwapMachine(RuleBasedStateMachine):
        session = None

        @initialize(rng=RNG)
        def build(self, rng):
            PROGRESS.begin()
            self.session = Session(rng, swap, context)
            step(self, first_calls, rng)

        def teardown(self):
            if self.session is not None:
                self.session.close()

    def make_rule(function):
        def do(self, rng):
            step(self, function, rng)

        do.__name__ = do.__qualname__ = function.__name__
        return rule(rng=RNG)(do)

    return type("SwapMachine", (SwapMachine,), {function.__name__: make_rule(function) for function in changes})


def first_calls(s):
    """No change: the network as it was made."""
    return "none"
