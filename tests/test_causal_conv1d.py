"""causal_conv1d and causal_conv1d_update against their definition, written with PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import convext

ACTIVATIONS = {"silu": F.silu, "identity": lambda y: y, "gelu": F.gelu, "relu": F.relu}


def definition(x, w, bias, activation, state=None):
    front = x.new_zeros(*x.shape[:2], w.shape[-1] - 1) if state is None else state
    y = F.conv1d(torch.cat([front, x], -1), w.reshape(len(w), 1, -1), bias, groups=len(w))
    return ACTIVATIONS[activation](y)


def drawn(n, c, length, s, dtype=torch.float64, transposed=False, state=False):
    torch.manual_seed(0)
    x = torch.randn(n, c, length, dtype=dtype)
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    states = torch.randn(n, c, s - 1, dtype=dtype) if state else None
    return x, torch.randn(c, s, dtype=dtype), torch.randn(c, dtype=dtype), states


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 20), length=st.integers(1, 40), s=st.integers(1, 5),
    transposed=st.booleans(), state=st.booleans(), activation=st.sampled_from(sorted(ACTIVATIONS)),
    flat=st.booleans(), with_bias=st.booleans(),
)  # fmt: skip
def test_it_is_its_definition_with_its_gradients(n, c, length, s, transposed, state, activation, flat, with_bias):
    x, w, bias, front = drawn(n, c, length, s, transposed=transposed, state=state)
    bias = bias if with_bias else None
    given_w = w if flat else w.unsqueeze(1)
    tensors = [t.requires_grad_() for t in (x, given_w, bias, front) if t is not None]
    y, final = convext.causal_conv1d(
        x, given_w, bias, activation=activation, initial_state=front, return_final_state=True
    )
    expected = definition(x, given_w, bias, activation, front)
    before = x.new_zeros(n, c, s - 1) if front is None else front
    expected_final = torch.cat([before, x], -1)[..., length:]
    assert final.shape == (n, c, s - 1)
    torch.testing.assert_close(final, expected_final, rtol=0, atol=0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    found = torch.autograd.grad((y * dy).sum() + (final * dfinal).sum(), tensors)
    wanted = torch.autograd.grad((expected * dy).sum() + (expected_final * dfinal).sum(), tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_other_types(dtype, transposed):
    x, w, bias, front = drawn(2, 24, 50, 4, dtype, transposed, state=True)
    y = convext.causal_conv1d(x, w, bias, initial_state=front)
    expected = definition(x.double(), w.double(), bias.double(), "silu", front.double())
    assert y.dtype == dtype
    # Sums of four products in float32, whose roundings silu passes on with a slope of at most 1.1, and one of storage.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=2**-20 * float(expected.abs().max()))


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (3, 1, 7, 2), (13,), (2, 11)], ids=str)
@pytest.mark.parametrize("more", [0, 3])
def test_a_stream_is_its_sequence(chunks, more):
    """In pieces of any length, with a state of any size that suffices, as in one call."""
    x, w, bias, _ = drawn(2, 6, sum(chunks), 4)
    state, pieces, start = torch.zeros(2, 6, 3 + more, dtype=x.dtype), [], 0
    for length in chunks:
        piece = x[..., start] if length == 1 else x[..., start : start + length]
        y = convext.causal_conv1d_update(piece, state, w, bias)
        assert y.shape == piece.shape
        pieces.append(y.unsqueeze(-1) if length == 1 else y)
        start += length
    torch.testing.assert_close(torch.cat(pieces, -1), definition(x, w, bias, "silu"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, F.pad(x, (3 + more, 0))[..., -(3 + more) :], rtol=0, atol=0)


def test_a_sequence_goes_on_as_a_stream():
    x, w, bias, _ = drawn(2, 6, 20, 4)
    y, state = convext.causal_conv1d(x[..., :15], w, bias, return_final_state=True)
    rest = [convext.causal_conv1d_update(x[..., i], state, w, bias) for i in range(15, 20)]
    torch.testing.assert_close(
        torch.cat([y, torch.stack(rest, -1)], -1), definition(x, w, bias, "silu"), rtol=1e-12, atol=1e-12
    )


def test_the_final_state_has_memory_of_its_own():
    x, w, bias, _ = drawn(1, 4, 9, 3)
    _, state = convext.causal_conv1d(x, w, bias, return_final_state=True)
    kept = state.clone()
    x.zero_()
    assert torch.equal(state, kept)


def test_autocast_and_subclasses():
    x, w, bias, _ = drawn(1, 4, 9, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert convext.causal_conv1d(x, w, bias).dtype == torch.bfloat16
    seen = []

    class Heard(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    convext.causal_conv1d(x.as_subclass(Heard), w, bias)
    assert seen[0] is convext.causal_conv1d


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_whole():
    x, w, bias, front = drawn(2, 6, 12, 4, state=True)

    def call(x, front):
        return convext.causal_conv1d(x, w, bias, initial_state=front, return_final_state=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, front), call(x, front), rtol=1e-12, atol=1e-12)


BAD = [
    (dict(x=torch.zeros(2, 4)), ValueError, r"x: expected \(N, C, L\), got \(2, 4\)"),
    (dict(x=torch.zeros(4)), ValueError, "weight: expected .* for x"),
    (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    (dict(weight=3), TypeError, "weight: expected a tensor, got int"),
    (dict(weight=torch.zeros(5, 3)), ValueError, r"weight: expected .* with C = 4 .* got \(5, 3\)"),
    (dict(weight=torch.zeros(4, 2, 3)), ValueError, "weight: expected .* got"),
    (dict(weight=torch.zeros(4)), ValueError, "weight: expected .* got"),
    (dict(initial_state=torch.zeros(2, 4, 3)), ValueError, r"initial_state: expected .* \(2, 4, 2\), got \(2, 4, 3\)"),
    (dict(activation="sliu"), ValueError, "activation.*'sliu'"),
    (dict(weight=torch.zeros(4, 3, dtype=torch.float64)), RuntimeError, "weight"),
    (dict(bias=torch.zeros(5)), RuntimeError, "bias"),
]


@pytest.mark.parametrize(("change", "error", "said"), BAD, ids=[said for *_, said in BAD])
def test_bad_input_names_the_argument(change, error, said):
    arguments = dict(x=torch.zeros(2, 4, 8), weight=torch.zeros(4, 3)) | change
    with pytest.raises(error, match=said):
        convext.causal_conv1d(**arguments)


@pytest.mark.parametrize(
    ("x", "state", "error", "said"),
    [
        (torch.ones(2, 4), torch.zeros(2, 4, 1), ValueError, r"state: .* M >= 2, got \(2, 4, 1\)"),
        (torch.ones(2, 4), torch.zeros(1, 4, 2), ValueError, "state: expected"),
        (torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 2), ValueError, r"x: expected \(N, C\) or"),
        (torch.ones(2, 4), torch.zeros(2, 4, 2, dtype=torch.float64), RuntimeError, "state: expected x's dtype"),
    ],
)
def test_a_bad_update_writes_nothing(x, state, error, said):
    with pytest.raises(error, match=said):
        convext.causal_conv1d_update(x, state, torch.ones(4, 3))
    assert not state.any()
