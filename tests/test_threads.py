"""Threads of Python's: eight at once under whatever Python runs the tests, and what becomes of the compiled libraries
where its global interpreter lock is off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convext import doctor
from convext.backends import bindings

PROGRAM = Path(__file__).parent / "support" / "eight_threads.py"

# A Python that could do without its lock, and was told to.
LOCK_IS_OFF = f"""
import sys, sysconfig
sys._is_gil_enabled = lambda: False
config = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: 1 if name == "Py_GIL_DISABLED" else config(name)
sys.path.insert(0, {str(PROGRAM.parent)!r})
"""


def run(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr  # also of a crash
    return ran.stdout


@pytest.mark.smoke
def test_eight_threads_get_what_one_gets():
    assert int(run(str(PROGRAM), "3")) >= 4 * 8


def test_eight_threads_get_what_one_gets_where_the_lock_is_off():
    """From ATen, for the compiled libraries are off."""
    assert int(run("-c", f"{LOCK_IS_OFF}\nimport eight_threads\nprint(eight_threads.run(3))")) >= 4 * 8


def test_without_the_lock_the_libraries_are_off_and_the_doctor_says_so():
    said = run("-c", f"{LOCK_IS_OFF}\nfrom convext import doctor\nprint(doctor.report())").splitlines()
    assert "threads of Python: all at once, the lock is off; so the compiled libraries are, too" in said
    reason = "off, it needs Python's global interpreter lock, which PYTHON_GIL=0 or -X gil=0 keeps off; leave that out"
    assert f"  native on cpu: {reason}" in said
    assert any(line.startswith("  native on cuda: off, ") for line in said)
    assert "serves cpu: aten" in said


@pytest.mark.parametrize(
    ("free_threaded", "on", "line"),
    [
        (False, True, "one at a time, under the global interpreter lock"),
        (
            True,
            True,
            "one at a time: convext has switched on the lock that this Python could do without",
        ),
    ],
)
def test_the_doctor_says_how_threads_run(monkeypatch, free_threaded, on, line):
    monkeypatch.setattr(bindings, "free_threaded", lambda: free_threaded)
    monkeypatch.setattr(bindings, "lock_is_on", lambda: on)
    assert f"threads of Python: {line}" in doctor.report().splitlines()


def test_the_doctor_speaks_of_this_python():
    assert bindings.free_threaded() or bindings.lock_is_on()
    before = getattr(sys, "_is_gil_enabled", None)
    assert bindings.lock_is_on() == (before is None or before())
