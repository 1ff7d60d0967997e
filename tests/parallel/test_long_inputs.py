"""A row of 128K input tokens evaluates the same on one device as split over eight."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_inputs_of_128k_tokens_on_eight_devices_equal_one(tmp_path):
    program = Path(__file__).with_name("long_inputs.py")
    results = {}
    for devices in (1, 8):
        out = tmp_path / f"{devices}.npz"
        command = [sys.executable, program, str(devices), out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        results[devices] = np.load(out)
    one, eight = results[1], results[8]
    assert one["inputs"] == eight["inputs"] == 131_000
    assert one["targets"].sum() == 60
    np.testing.assert_allclose(eight["nll"], one["nll"], rtol=1e-5)
