"""When the tests run in several processes, and that these find what one of them has prepared."""

from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

HERE = str(Path(__file__))
OTHER = str(Path(__file__).with_name("test_house.py"))


@pytest.mark.parametrize(
    ("arguments", "given", "processes"),
    [
        ([str(Path(HERE).parent)], {}, 3),
        ([HERE, OTHER], {}, 3),
        ([HERE], {}, 1),  # each would have torch to import
        ([f"{HERE}::one", f"{HERE}::two[a::b]"], {}, 1),
        ([HERE, OTHER], {"usepdb": True}, 1),
        ([HERE, OTHER], {"capture": "no"}, 1),
        ([HERE, OTHER], {"collectonly": True}, 1),
    ],
)
def test_processes_are_started_where_they_are_worth_it(monkeypatch, arguments, given, processes):
    monkeypatch.setattr(conftest, "load_setup", lambda: SimpleNamespace(at_once=lambda gib: 3))
    options = SimpleNamespace(**{"usepdb": False, "capture": "fd", "collectonly": False, **given})
    assert conftest.processes_for(options, arguments) == processes


@pytest.fixture
def main(monkeypatch):
    """main(xdist, **options): what becomes of the options, and of OMP_NUM_THREADS."""
    monkeypatch.setattr(conftest, "processes_for", lambda options, arguments: 2)
    monkeypatch.setattr(conftest.os, "environ", environment := {})

    def run(xdist=True, **given):
        options = SimpleNamespace(**{"side_by_side": True, "numprocesses": None, "dist": "no", "tx": [], **given})
        plugins = SimpleNamespace(hasplugin=lambda name: xdist and name == "xdist")
        conftest.pytest_cmdline_main(SimpleNamespace(option=options, args=[], pluginmanager=plugins))
        return options.numprocesses, options.dist, environment.get("OMP_NUM_THREADS")

    return run


def test_several_processes_have_a_thread_each(main):
    assert main() == (2, "worksteal", "1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"numprocesses": 0}, (0, "no", None)),  # what is asked for counts
        ({"numprocesses": 5, "dist": "load"}, (5, "load", "1")),
        ({"side_by_side": False}, (None, "no", None)),
        ({"xdist": False}, (None, "no", None)),  # pytest -p no:xdist
    ],
)
def test_what_the_caller_asks_for_counts(main, given, expected):
    assert main(**given) == expected


def test_what_one_process_prepares_the_others_find(shared):
    with shared("here") as folder:
        (folder / "compiled").touch()
    with shared("here") as again, shared("there") as other:
        assert (again / "compiled").exists() and not (other / "compiled").exists()
