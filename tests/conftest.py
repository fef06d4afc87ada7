"""Fixtures that the suites share. The edge cases are in cases.py, the reference in reference.py."""

import copy
import fcntl
import gc
import os
import tempfile
import zlib
from contextlib import contextmanager

import pytest
import torch
from places import GPU
from project import load_setup

# What a developer has tuned is no business of the tests, nor theirs of his.
CACHE = tempfile.TemporaryDirectory(prefix="convext-tests-")
os.environ["CONVEXT_CACHE"] = CACHE.name

ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]


GIB_PER_PROCESS = 2.5  # what one process of the tests takes at most, with what it starts


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the tests, for N processes")
    parser.addoption(
        "--side-by-side",
        action="store_true",
        help="tests of several files in as many processes as there are cores and memory for, where pytest-xdist is",
    )


def processes_for(options, arguments) -> int:
    """How many processes are worth starting: each has torch to import and the tests to collect."""
    if getattr(options, "usepdb", False) or options.capture == "no" or options.collectonly:
        return 1  # someone sits before it
    files = {os.path.abspath(argument.partition("::")[0]) for argument in arguments}
    if len(files) == 1 and all(os.path.isfile(file) for file in files):
        return 1
    return load_setup().at_once(GIB_PER_PROCESS)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Before xdist reads its own options, which count where they are given."""
    options = config.option
    if not options.side_by_side or hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return
    if options.numprocesses is None and options.dist == "no" and not options.tx:
        count = processes_for(options, config.args)
        if count > 1:
            # Neighbours stay together, for what their files prepare; who is done takes of what others have left.
            options.numprocesses, options.dist = count, "worksteal"
    if options.numprocesses or options.tx:
        # One thread each, which the processes that tests start get, too. Tests about threads set their number.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


# What compiles for minutes comes first: at the end, one process would wait for the other to be done with it.
COMPILES = ("tests/house/test_one_place", "tests/cuda/", "tests/examples/")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.nodeid.startswith(COMPILES))  # stable: neighbours stay together
    index, count = map(int, config.getoption("--part").split("/"))
    mine = [zlib.crc32(item.nodeid.encode()) % count == index - 1 for item in items]  # any order could have a period
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, mine) if not kept])
    items[:] = [item for item, kept in zip(items, mine) if kept]


def pytest_collection_finish():
    """What is there before the first test stays to the end, so no collection of garbage need look through it: torch and
    eleven thousand tests would take long each time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """What tests tell by record_property("told", text), from whichever process: those side by side print nothing."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "told":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Python looks for packages where it is started, and there it would find the source tree, where nothing is built:
    the processes that tests start import what the tests do."""
    former = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(former)


@pytest.fixture(scope="session")
def shared(request, tmp_path_factory):
    """shared(name): a context in which the folder of that name is this process's alone. What one puts there, the others
    of a run side by side find: so nothing is compiled twice."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if hasattr(request.config, "workerinput") else base

    @contextmanager
    def shared(name):
        folder = base / f"shared-{name}"
        folder.mkdir(exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder

    return shared


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def on_its_device(request):
    """Tensors of a test with the mark `gpu` are born on the GPU, and its float32 is not cut down to tf32, which the
    bounds would not allow."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    with torch.device(GPU), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def settings_restored():
    """No test leaves a backend, an instruction set or a number of threads behind."""
    import convext

    threads, forced = torch.get_num_threads(), convext.backends.forced()
    yield
    torch.set_num_threads(threads)
    if convext.backends.forced() != forced:
        convext.backend(forced)


# Suites whose bounds are those of a plain sum. Winograd's own bound is in test_accuracy.py, and the other suites run
# with the default setting.
PLAIN_SUMS = {
    "test_cases",
    "test_isa",
    "test_conv1d",
    "test_conv_transpose",
    "test_conformance_fuzz",
    "test_conformance_opinfo",
    "test_conformance_onnx",
}


@pytest.fixture(scope="module", autouse=True)
def direct_forms(request):
    """No Winograd where the bounds know nothing of it."""
    import convext

    if request.module.__name__ not in PLAIN_SUMS:
        yield
        return
    with convext.accuracy("direct"):
        yield


@pytest.fixture
def count_native():
    """A function that tells how often convext's own kernels ran since the test began: {(pass, kernel): calls}."""
    from convext import backends

    before = backends.counts()

    def count():
        return {
            (pass_, kernel): calls - before.get((backend, pass_, kernel), 0)
            for (backend, pass_, kernel), calls in backends.counts().items()
            if backend == "native" and calls > before.get((backend, pass_, kernel), 0)
        }

    return count


@pytest.fixture
def served_by():
    """A context inside which every pass must be served by the backend of that name, and one at least must be."""
    from convext import backends

    @contextmanager
    def check(name, nothing_to_compute=False):
        before = backends.counts()
        yield
        ran = {key for key, calls in backends.counts().items() if calls > before.get(key, 0)}
        if nothing_to_compute:  # an empty tensor needs no kernel
            return
        assert ran, "no backend was called"
        assert {backend for backend, _, _ in ran} == {name}, f"also served by others: {ran}"

    return check


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this CPU and build offer, in turn, with the kernels capped to it."""
    from convext import _C
    from convext.backends import costs, native

    try:
        _C.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    # Nor is a kernel of the next instruction set below chosen, which half a vector may suit better, or one of AVX-512
    # where AVX512-BF16 has its own.
    next_best = request.param.removesuffix("_bf16")
    seconds = {
        kernel["name"]: dict.fromkeys(costs.native_terms(), 1e-3 if kernel["isa"] == next_best else 1.0)
        for kernel in native.kernels()
        if kernel["isa"] != request.param
    }
    costs.use(costs.Table({}, {}, seconds, {}))
    yield request.param
    _C.set_isa(None)
    costs.use(None)


@pytest.fixture
def sequence_calls(monkeypatch):
    """The numbers of steps of the calls that ran as one (convext/swap/lower/calls.py), in order."""
    from convext.swap.lower import calls as cooperative

    calls = []
    prepared = cooperative.prepared

    def counting(program, *args):
        call = prepared(program, *args)
        if call is None:
            return None

        def counted(x):
            y = call(x)
            if y is not None:
                calls.append(len(program.ops))
            return y

        return counted

    monkeypatch.setattr(cooperative, "prepared", counting)
    return calls


@pytest.fixture
def swapped_and_changed(sequence_calls):
    """f(model, x, change, rtol, atol): a swapped copy that has run as one call, after `change` of it and of the model.
    The change must alter the result by more than the tolerances."""
    import convext

    def swapped_and_changed(model, x, change, rtol, atol=1e-8):
        swapped = convext.swap(copy.deepcopy(model))
        for _ in range(3):
            before = swapped(x)
        assert sequence_calls
        for changed in (model, swapped):
            torch.manual_seed(1)
            change(changed)
        after = model(x)
        assert after.shape != before.shape or not torch.allclose(after, before, rtol, atol), "the change must matter"
        return swapped

    return swapped_and_changed
