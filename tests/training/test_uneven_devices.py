"""Uneven fill: devices and microbatches with very different numbers of tokens make one mean."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    program = Path(__file__).with_name("uneven_on_devices.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("split", "accumulation"), enumerate([4, 2]))
def test_splitting_an_uneven_batch_changes_neither_loss_nor_clipped_updates(
    results, split, accumulation
):
    whole, parts = results["whole"], results["split"][split]
    assert (whole["accumulation"], parts["accumulation"]) == (1, accumulation)
    for ours, theirs in zip(parts["steps"], whole["steps"], strict=True):
        assert (ours["inputs"], ours["targets"]) == (theirs["inputs"], theirs["targets"])
        np.testing.assert_allclose(ours["nll"], theirs["nll"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
        assert ours["grad_norm"] > 1  # clipped, to 0.05
    np.testing.assert_allclose(parts["params"], whole["params"], atol=2e-6)


def test_both_sides_are_counted(results):
    for step in results["whole"]["steps"]:
        assert (step["inputs"], step["targets"]) == (64, 50)
