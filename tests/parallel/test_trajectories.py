"""Twenty steps lose the same on every mesh and in any number of microbatches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("on_meshes.py")
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
for name in ("data", "fsdp-tensor-context"):
    CASES[f"{name}, images"] = {"mesh": MESHES[name], "images": True}
CASES["2 microbatches"] = {"mesh": MIXED, "accumulation": 2}
for remat in ("dots", "attention", "full"):
    CASES[f"remat {remat}"] = {"mesh": MIXED, "model": {"remat": remat}}


def trajectories(devices, cases):
    """What `cases` give on so many devices."""
    command = [sys.executable, PROGRAM, str(devices), json.dumps(cases)]
    # On a busy machine XLA's 40 s for all devices to come to a collective are not enough.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=400"
    environment = os.environ | {"XLA_FLAGS": patience, "NPROC": "32"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def alone():
    """On one device, without and with images."""
    both = trajectories(1, [{}, {"images": True}])
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
    (run,) = trajectories(8, [case])
    assert_same(run, alone[case.get("images", False)])
