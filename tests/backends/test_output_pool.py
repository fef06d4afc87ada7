"""The pool of dropped results: who owns what, the setting, threads, fork. In C++: csrc/tests/cpu_output_pool.cpp"""

import copy
import gc
import io
import multiprocessing
import subprocess
import threading

import pytest
import torch
from project import load_setup

import convext
from convext import backends
from convext.backends import native
from convext.output_pool import output_pool

pytestmark = [
    pytest.mark.skipif(backends.unavailable("native", "cpu") is not None, reason="the pool is the compiled library's"),
    pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 cannot wrap memory that is given back later"),
    pytest.mark.skipif(
        native.why_no_output_pool is not None, reason="the pool is off: " + str(native.why_no_output_pool)
    ),
]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def empty_pool():
    """An empty pool of 64 MiB, and convext's own kernels."""
    with output_pool(0), output_pool(64 * MIB), convext.backend("native"):
        yield


def layer(fill=1.0, pixels=64):
    """A result of 32 channels by pixels², every value 32 * fill; 512 KiB with 64 pixels."""
    return convext.conv2d(torch.full((1, 32, pixels, pixels), fill), torch.ones(32, 32, 1, 1))


def test_a_dropped_result_makes_room_for_the_next():
    first = layer()
    address, size = first.data_ptr(), first.untyped_storage().nbytes()
    assert output_pool.kept() == 0
    del first
    assert output_pool.kept() == size == 32 * 64 * 64 * 4
    second = layer(2.0)
    assert second.data_ptr() == address and output_pool.kept() == 0
    assert (second == 64).all()


@pytest.mark.parametrize(
    "share",
    [
        lambda y: y[0, 0],
        lambda y: y.permute(0, 2, 3, 1),
        lambda y: y.detach(),
        lambda y: y.numpy(),
        lambda y: y.untyped_storage(),
        lambda y: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(y)),
        lambda y: memoryview(y.numpy()),
    ],
    ids=["index", "permute", "detach", "numpy", "storage", "dlpack", "memoryview"],
)
def test_whatever_shares_a_result_keeps_its_memory(share):
    y = layer(3.0)
    shared = share(y)
    del y
    gc.collect()
    assert output_pool.kept() == 0
    other = layer(5.0)
    assert (other == 160).all()
    del other
    kept = output_pool.kept()
    values = shared.tolist()
    if isinstance(shared, torch.UntypedStorage):
        values = torch.frombuffer(bytearray(values), dtype=torch.float32)
    assert (torch.as_tensor(values) == 96).all()
    del shared, values
    gc.collect()
    assert output_pool.kept() > kept


def test_what_autograd_saved_is_not_handed_out():
    """The result is dropped, but the backward pass needs it."""
    x = torch.full((1, 32, 64, 64), 2.0)
    w = torch.ones(32, 32, 1, 1, requires_grad=True)
    total = convext.conv2d(x, w).square().sum()
    gc.collect()
    assert (layer(7.0) == 224).all()
    total.backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, 2 * 64 * 2.0 * 64 * 64))


def test_a_training_step_leaves_its_memory_to_the_next():
    network = convext.swap(torch.nn.Sequential(*(torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))))
    x = torch.randn(2, 32, 64, 64)

    def step():
        network(x).square().mean().backward()
        return output_pool.kept()

    assert step() > 0
    assert step() == step()


def test_zero_switches_it_off():
    with output_pool(0):
        layer()
        assert output_pool.kept() == 0


def test_a_result_of_the_pool_comes_back_to_a_pool_that_is_off():
    y = layer()
    with output_pool(0):
        assert (y == 32).all()
        del y
        assert output_pool.kept() == 0


def test_small_results_are_left_to_malloc():
    layer(pixels=8)
    assert output_pool.kept() == 0
    layer(pixels=64)
    assert output_pool.kept() > 0


def test_the_setting_and_the_former_one():
    before = output_pool.limit()
    with output_pool(3 * MIB) as inside:
        assert output_pool.limit() == 3 * MIB and repr(inside) == f"convext.output_pool({3 * MIB})"
        layer(pixels=256)
        layer(pixels=128)
        assert 0 < output_pool.kept() <= 3 * MIB  # the larger result is beyond the limit
    assert output_pool.limit() == before == 64 * MIB
    output_pool(before)
    assert output_pool.limit() == before


@pytest.mark.parametrize(("given", "error", "message"), [
    (-1, ValueError, "output_pool: bytes must be at least 0 and less than 2**63, got -1"),
    (1 << 63, ValueError, "output_pool: bytes must be at least 0 and less than 2**63, got 9223372036854775808"),
    (1.5, TypeError, "output_pool: bytes must be an int, got 1.5"),
    (True, TypeError, "output_pool: bytes must be an int, got True"),
    ("1G", TypeError, "output_pool: bytes must be an int, got '1G'"),
])  # fmt: skip
def test_other_settings_are_errors_and_change_nothing(given, error, message):
    with pytest.raises(error) as caught:
        output_pool(given)
    assert str(caught.value) == message
    assert output_pool.limit() == 64 * MIB


def test_what_one_does_with_tensors_works_with_results():
    y = layer(2.0)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    assert torch.equal(copy.deepcopy(y), y)
    assert torch.equal(y.clone().share_memory_(), y)
    y.resize_(16, 64, 64)  # smaller fits
    assert (y == 64).all()
    y.share_memory_()
    assert y.is_shared() and (y == 64).all()


def test_memory_of_a_result_is_given_up_and_taken_again():
    """As FSDP and reversible networks do with `untyped_storage().resize_`."""
    y = layer(2.0)
    storage, size = y.untyped_storage(), y.untyped_storage().nbytes()
    storage.resize_(0)
    assert storage.nbytes() == 0 and output_pool.kept() == size
    other = layer(5.0)
    storage.resize_(size)  # by torch's allocator
    y.fill_(3.0)
    assert (other == 160).all() and (y == 3).all()
    kept = output_pool.kept()
    del y, storage
    assert output_pool.kept() == kept  # torch's memory went back to torch


def test_a_result_grows_and_keeps_its_values():
    y = layer()
    size = y.untyped_storage().nbytes()
    grown = y.resize_(3, 32, 64, 64)
    assert output_pool.kept() == size
    assert (layer(9.0) == 288).all()
    assert (grown[0] == 32).all()
    grown.zero_()
    assert grown.untyped_storage().nbytes() == 3 * size


def test_a_result_moves_to_shared_memory():
    y = layer()
    size = y.untyped_storage().nbytes()
    y.share_memory_()
    assert y.is_shared() and output_pool.kept() == size
    assert (layer(9.0) == 288).all() and (y == 32).all()


def test_gradients_are_as_resizable_as_results():
    x, w = torch.ones(1, 32, 64, 64, requires_grad=True), torch.ones(32, 32, 1, 1, requires_grad=True)
    convext.conv2d(x, w).sum().backward()
    x.grad.untyped_storage().resize_(0)
    x.grad.untyped_storage().resize_(32 * 64 * 64 * 4)
    assert x.grad.untyped_storage().resizable()


def test_another_release_of_torch_gets_no_pool(monkeypatch):
    """Storages may look otherwise there than csrc/storage/storage.cpp was compiled for."""
    monkeypatch.setattr(native.torch, "__version__", "2.99.0")
    assert "runs with 2.99.0" in native._use_storage()
    native._C.use_storage(0)
    try:
        layer()
        assert output_pool.kept() == 0
    finally:
        monkeypatch.undo()
        assert native._use_storage() is None
    layer()
    assert output_pool.kept() > 0


def test_threads_get_results_of_their_own():
    wrong = []

    def work(value):
        held = []
        for _ in range(100):
            held.append(layer(float(value)))
            if len(held) == 3:
                wrong.extend(y for y in held if not (y == 32 * value).all())
                held.pop(0)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(queue):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    y = layer(2.0)
    kept = output_pool.kept()
    correct = bool((y == 64).all())
    del y
    queue.put((output_pool.limit(), correct, output_pool.kept() - kept))


def test_a_forked_process_has_a_pool_of_its_own():
    torch.set_num_threads(1)
    y = layer(3.0)
    size = y.untyped_storage().nbytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    limit, correct, came_back = queue.get(timeout=60)
    child.join()
    assert limit == 64 * MIB and correct and came_back == size
    assert (y == 96).all() and output_pool.kept() == 0


def test_no_data_race(tmp_path):
    """csrc/tests/cpu_output_pool.cpp under the thread sanitizer; under the others and without: csrc/tests/run.py."""
    program = tmp_path / "cpu_output_pool"
    setup = load_setup()
    sources = [
        str(setup.CSRC / "cpu" / "runtime" / "output_pool.cpp"),
        str(setup.CSRC / "tests" / "cpu_output_pool.cpp"),
    ]
    command = [*setup.compiler().split(), f"-I{setup.CSRC}", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread"]
    built = subprocess.run([*command, "-o", str(program), *sources], capture_output=True, text=True)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("this compiler came without the thread sanitizer's library")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
