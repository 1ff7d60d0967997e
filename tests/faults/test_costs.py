"""What it costs that checkpoints verify."""

import time

import numpy as np
import pytest

from t5g2.checkpoints.manifest import verify
from t5g2.checkpoints.store import read_arrays, write_parameters


@pytest.mark.slow
def test_verifying_takes_less_than_a_tenth_of_a_restore(tmp_path):
    rng, checkpoint = np.random.default_rng(0), tmp_path / "checkpoint"
    checkpoint.mkdir()
    params = {
        f"layer{number}": rng.standard_normal((2560, 2560), np.float32) for number in range(16)
    }
    write_parameters(checkpoint, params, {"step": 1})
    seconds = {"verifying": [], "restoring": []}
    for _ in range(5):  # in turns: what else the machine does slows both
        begin = time.perf_counter()
        verdict = verify(checkpoint)
        middle = time.perf_counter()
        read_arrays(checkpoint / "params")  # which verifies, too
        seconds["verifying"].append(middle - begin)
        seconds["restoring"].append(time.perf_counter() - middle)
    fastest = {name: min(times) for name, times in seconds.items()}
    print(f"{verdict.size:,} bytes:", {name: f"{time:.2f} s" for name, time in fastest.items()})
    assert fastest["verifying"] < 0.1 * fastest["restoring"]
