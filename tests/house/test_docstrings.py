"""What public docstrings promise: every parameter, its default, what is raised; and their examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path

import pytest
import torch

import convext

ROOT = Path(__file__).resolve().parents[2]


def public(module: types.ModuleType) -> dict[str, object]:
    """The functions and classes that a module offers: those it lists, or those it defines, by their full names."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", defined)
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for name in names
        if not name.startswith("_") and not isinstance(getattr(module, name), types.ModuleType)
    }


PUBLIC = public(convext) | public(convext.nn)


def signature_of(value) -> inspect.Signature:
    function = value.__init__ if inspect.isclass(value) else value
    if inspect.isclass(value) and "__init__" not in vars(value):
        function = value.__mro__[1].__init__  # Conv2d: torch's
    signature = inspect.signature(function)
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "self"])


def described(doc: str) -> dict[str, str]:
    """{parameter: what its entry under "Args:" says}"""
    section = re.search(r"^Args:\n((?: +.*\n|\n)+)", inspect.cleandoc(doc) + "\n", re.M)
    entries = re.split(r"^    (?=\w)", section[1], flags=re.M)[1:] if section else []
    found = {}
    for entry in entries:
        names, _, text = entry.partition(":")
        found |= dict.fromkeys(re.split(r",\s*", names), " ".join(text.split()))
    return found


def test_there_is_something_to_check():
    assert {"convext.conv2d", "convext.conv_bn_relu", "convext.nn.ConvBNReLU", "convext.accuracy"} <= PUBLIC.keys()
    assert {name for name in convext.__all__ if f"convext.{name}" not in PUBLIC} == {
        "autograd",
        "backends",
        "functional",
        "nn",
        "ops",
        "problem",  # modules
    }


def test_entries_are_read_as_they_stand():
    doc = """Title.

    Args:
        x: (N, C),
            or more.
        a, b: as in `f`.

    Returns: y
    """
    assert described(doc) == {"x": "(N, C), or more.", "a": "as in `f`.", "b": "as in `f`."}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_described_with_its_default(name):
    value, entries = PUBLIC[name], described(PUBLIC[name].__doc__)
    parameters = signature_of(value).parameters
    assert entries.keys() == parameters.keys()
    for parameter in parameters.values():
        text = entries[parameter.name]
        assert len(text) > 3, parameter.name
        if parameter.default is not parameter.empty and not text.startswith(("as in ", "how ")):
            assert "default" in text.lower(), f"{parameter.name}: {text}"


def test_the_defaults_are_the_functions_own():
    """Where an entry gives a default as a number or a name, that is the function's."""
    checked = 0
    for name, value in PUBLIC.items():
        parameters = signature_of(value).parameters
        for parameter, text in described(value.__doc__).items():
            default = parameters[parameter].default
            told = re.findall(r'[Dd]efault (\d[\w.-]*|True|False)|("\w+"|\bNone),? \(?(?:the )?default', text)
            for number, word in told:
                said = word.strip('"') or number.rstrip(".")
                same = said == str(default) or said[0].isdigit() and float(said) == default
                assert same, f"{name} {parameter}: {text}"
                checked += 1
    assert checked > 15


@pytest.mark.parametrize("name", PUBLIC)
def test_what_it_raises_is_said(name):
    assert (
        re.search(r"\bRaises? ", PUBLIC[name].__doc__)
        and "rror" in PUBLIC[name].__doc__
        or re.search(r"Raises as `Conv2d`|Raises where `convext\.conv_bn_act` does", PUBLIC[name].__doc__)
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_and_result_has_a_type(name):
    value = PUBLIC[name]
    signature = signature_of(value)
    if inspect.isclass(value) and signature == signature_of(value.__mro__[1]):
        return  # whose arguments are those of torch's layer
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    assert inspect.isclass(value) or signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", PUBLIC)
def test_tensors_have_their_shapes(name):
    """A class or function of tensors gives the shape of what goes in and comes out."""
    value = PUBLIC[name]
    if value in (convext.verify, convext.tune, convext.swap):
        return  # whose tensors are what the model takes
    if "Tensor" in str(signature_of(value)) or inspect.isclass(value) and issubclass(value, torch.nn.Module):
        shapes = r"\(N, K, P, Q\)|\(N, C, L\)|\(N, K, Q\)|\(N, K, Z, P, Q\)|\(N, C ?\* ?m\w*, P, Q\)|as `conv2d`"
        assert re.search(shapes, value.__doc__)


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name):
    assert ">>> " in PUBLIC[name].__doc__


def modules(package: str, *but: str) -> list[str]:
    """A package's name and those of its modules."""
    path = importlib.import_module(package).__path__
    return [package, *(f"{package}.{module.name}" for module in pkgutil.iter_modules(path) if module.name not in but)]


MODULES = (
    modules(
        *("convext", "__main__", "_C", "_CUDA", "_call", "libconvext", "libconvext_cuda", "libconvext_storage"),
        *("bench", "demo", "swap", "triton", "tune"),
    )
    + modules("convext.swap", "capture")
    + modules("convext.tune")
    + modules("convext.swap.capture")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_module_says_what_it_is_for(name):
    assert len(importlib.import_module(name).__doc__) > 20


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for test in finder.find(module, name, module=module, extraglobs={"torch": torch, "convext": convext}):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


def test_the_examples_are_found():
    public = {name.rpartition(".")[2] for name in PUBLIC} - {"conv_bn_relu"}  # the same object as conv_bn_act
    assert convext.conv_bn_relu is convext.conv_bn_act
    assert public <= {name.rpartition(".")[2] for name in EXAMPLES}


def settings() -> tuple[object, ...]:
    return (
        convext.output_pool.limit(),
        convext.backends.forced(),
        convext.backends.native.accuracy(),
        convext.layer_by_layer.on,
        convext.export_ops.on,
        convext.backends.tuned.mode,
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    before = settings()
    printed = []
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    assert runner.run(EXAMPLES[name], out=printed.append, clear_globs=False).failed == 0, "".join(printed)
    assert settings() == before  # an example leaves no setting behind


def test_the_readmes_first_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    names = {"model": model, "x": torch.randn(1, 3, 12, 12)}
    exec(code, names)
    assert names["model"] is model and type(model[0]) is torch.nn.Conv2d
