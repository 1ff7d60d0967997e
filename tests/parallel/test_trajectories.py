"""Twenty steps lose the same on every mesh and in any number of microbatches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ports import free_port

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
    for count in (2, 4):
        CASES[f"{name}, {count} microbatches"] = {"mesh": MESHES[name], "accumulation": count}
for remat in ("dots", "attention", "full"):
    CASES[f"remat {remat}"] = {"mesh": MIXED, "model": {"remat": remat}}


def trajectories(directory, cases, devices, processes=1):
    """What `cases` give on so many devices, shared evenly by so many processes."""
    # On a busy machine XLA's 40 s for all devices to come to a collective are not enough.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=400"
    environment = os.environ | {"XLA_FLAGS": patience, "NPROC": "32"}
    address = f"localhost:{free_port()}"
    started = []
    for index in range(processes):
        results = directory / f"{devices}-{processes}-{index}"
        place = (address, str(processes), str(index)) if processes > 1 else ()
        arguments = (str(devices // processes), json.dumps(cases), str(results), *place)
        with open(f"{results}.log", "w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, PROGRAM, *arguments], env=environment, stdout=log, stderr=log
                )
            )
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [path.read_text() for path in directory.glob("*.log")]
    assert codes == [0] * processes, logs
    paths = sorted(directory.glob(f"{devices}-{processes}-?"))
    told = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    # All processes see the same losses, to the bit.
    assert all(
        [run["losses"] for run in runs] == [run["losses"] for run in told[0]] for runs in told
    )
    return told[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """On one device, without and with images."""
    both = trajectories(tmp_path_factory.mktemp("alone"), [{}, {"images": True}], 1)
    for run in both:
        assert len(run["losses"]) == 20
        assert run["losses"][-1] < run["losses"][0] - 0.4
    return dict(zip((False, True), both, strict=True))


def assert_same(run, expected):
    np.testing.assert_allclose(run["losses"], expected["losses"], rtol=1e-5)
    # Adam's updates amplify what rounding does to later gradients.
    np.testing.assert_allclose(run["norms"][0], expected["norms"][0], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_run_loses_the_same_on_every_mesh(alone, tmp_path, name):
    case = CASES[name]
    (run,) = trajectories(tmp_path, [case], 8)
    assert_same(run, alone[case.get("images", False)])


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["data", "fsdp-tensor-context", "context"])
def test_a_run_loses_the_same_in_any_number_of_processes(alone, tmp_path, name, processes):
    case = CASES[name]
    (run,) = trajectories(tmp_path, [case], 8, processes)
    assert_same(run, alone[case.get("images", False)])


def test_rounding_alone_stays_far_below_what_is_asked_of_meshes(alone, tmp_path):
    """Of runs whose parameters begin an ulp aside: what is asked of meshes can be asked."""
    for run in trajectories(tmp_path, [{"nudge": seed} for seed in range(3)], 1):
        np.testing.assert_allclose(run["losses"], alone[False]["losses"], rtol=1e-6)
