"""Swapped networks trained by two processes over gloo: what they compute is what unswapped ones do.

Both processes run all of tests/support/distributed_worker.py once; each scenario is a test here."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

WORKER = pathlib.Path(__file__).parents[1] / "support" / "distributed_worker.py"
SCENARIOS = re.findall(r"^@scenario\ndef (\w+)", WORKER.read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{scenario: how it failed in either process, or ""}"""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), folder],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=400)[0])
    finally:
        for process in processes:
            process.kill()
    found = [
        json.loads((folder / f"{rank}.json").read_text()) if (folder / f"{rank}.json").exists() else {}
        for rank in range(2)
    ]
    return {
        name: "".join(
            each.get(name, f"process {rank} did not come so far:\n{output}")
            for rank, (each, output) in enumerate(zip(found, outputs))
        )
        for name in SCENARIOS
    }


@pytest.mark.timeout(450)
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name, outcomes):
    assert not outcomes[name], outcomes[name]
