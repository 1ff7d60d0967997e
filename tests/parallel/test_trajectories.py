"""Twenty steps lose the same on every mesh, in any number of processes and of microbatches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

PROGRAMS = Path(__file__).parent
DEVICES = 8
MIXED = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "fsdp-tensor": {"data": 1, "fsdp": 4, "tensor": 2},
    "fsdp-tensor-context": MIXED,
    "context": {"data": 1, "context": 8},
    "shared-heads": {"data": 1, "fsdp": 2, "tensor": 4, "rules": {"kv_heads": []}},
    "other-rules": {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "rules": {"vocab": ["tensor", "fsdp"], "embed": ["data"]},
    },
}
CASES = {name: {"mesh": mesh} for name, mesh in MESHES.items()}
for name in ("data", "fsdp-tensor-context", "context"):
    CASES[f"{name}, images"] = {"mesh": MESHES[name], "images": True}
for parts in (2, 4):
    CASES[f"{parts} microbatches"] = {"mesh": MIXED, "accumulation": parts}
    CASES[f"data, {parts} microbatches"] = {"mesh": {"data": 8}, "accumulation": parts}
for policy in ("dots", "full"):
    CASES[f"remat {policy}"] = {"mesh": MIXED, "model": {"remat": policy}}
CASES["all at once"] = {
    "mesh": MIXED,
    "model": {"remat": "full"},
    "accumulation": 2,
    "images": True,
}


def started(devices, cases, *place):
    """A process that runs `cases` on so many devices of its own."""
    command = [sys.executable, PROGRAMS / "on_meshes.py", str(devices), json.dumps(cases)]
    # On a busy machine XLA's 40 s for all devices to come to a collective are not enough.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=400"
    environment = os.environ | {"XLA_FLAGS": patience, "NPROC": "32"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *map(str, place)], text=True, env=environment, **pipes)


def results(processes):
    """What each process printed."""
    try:
        written = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, written, strict=True):
        assert process.returncode == 0, errors
    return [[json.loads(line) for line in out.splitlines()] for out, _ in written]


@pytest.fixture(scope="module")
def alone():
    """On one device, without and with images."""
    (both,) = results([started(1, [{}, {"images": True}])])
    for run in both:
        assert len(run["losses"]) == 20
        assert run["losses"][-1] < run["losses"][0] - 0.5
    return dict(zip((False, True), both, strict=True))


def assert_same(run, expected):
    np.testing.assert_allclose(run["losses"], expected["losses"], rtol=1e-5)
    # Adam's updates amplify what rounding does to later gradients.
    np.testing.assert_allclose(run["norms"][0], expected["norms"][0], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_run_loses_the_same_on_every_mesh(alone, name):
    case = CASES[name]
    ((run,),) = results([started(DEVICES, [case])])
    assert_same(run, alone[case.get("images", False)])


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_loses_the_same_in_several_processes(alone, count):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    cases = [{"mesh": MESHES[name]} for name in ("data", "fsdp-tensor-context", "context")]
    processes = [
        started(DEVICES // count, cases, coordinator, count, index) for index in range(count)
    ]
    for runs in results(processes):
        for run in runs:
            assert_same(run, alone[False])
