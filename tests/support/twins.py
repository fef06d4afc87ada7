"""A plain and a swapped twin of a model go through the same steps, and what they give is compared."""

import torch

import convext

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(make):
    """The same model each time. It is not a deep copy of one: that would part aliases and reorder sets."""
    torch.manual_seed(0)
    return make().double().eval()


def outcomes(model, steps):
    """What the steps give, as it is at that moment, and last the exception that ended them, if one did."""
    results = []
    try:
        for value in steps(model):
            results.append(value.detach().clone() if isinstance(value, torch.Tensor) else value)
    except Exception as error:
        results.append(error)
    return results


def agree(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        return
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, Exception):
        assert str(found).startswith(str(expected))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            agree(*pair)
    elif isinstance(expected, dict):
        agree(list(found.items()), list(expected.items()))
    else:
        assert found == expected


def check(make, steps, factors=None, differs=False, raises=None, modes=(False, True)):
    """Both twins give the same. `factors`: each result of the plain one is so many times feats(X). `differs`: not all
    of its results are one. `raises`: what the steps end with."""
    for grad in modes:
        with torch.set_grad_enabled(grad):
            expected = outcomes(made(make), steps)
            found = outcomes(convext.swap(made(make)), steps)
            reference = made(make).feats(X).detach() if factors else None
        assert expected
        ended = expected[-1] if isinstance(expected[-1], Exception) else None
        assert type(ended) is (raises or type(None)), ended
        if factors:
            agree(expected, [reference * factor for factor in factors])
        if differs:
            first = expected[0]
            assert any(y.shape != first.shape or not torch.allclose(y, first) for y in expected)
        agree(found, expected)


def times(count, x=X):
    """Steps: so many calls."""

    def steps(model):
        for _ in range(count):
            yield model(x)

    return steps
