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
        f"layer{number}": rng.standard_normal((2048, 2048), np.float32) for number in range(8)
    }
    write_parameters(checkpoint, params, {"step": 1})
    seconds: dict[str, list[tuple[float, float]]] = {"verifying": [], "restoring": []}
    for _ in range(5):  # in turns: what else the machine does slows both
        moments = [clocks()]
        verdict = verify(checkpoint)
        moments.append(clocks())
        read_arrays(checkpoint / "params")  # which verifies, too
        moments.append(clocks())
        for name, begin, end in zip(seconds, moments, moments[1:], strict=False):
            seconds[name].append((end[0] - begin[0], end[1] - begin[1]))
    wall, processors = (
        {name: min(times[clock] for times in taken) for name, taken in seconds.items()}
        for clock in (0, 1)
    )
    print(f"{verdict.size:,} bytes: seconds {wall}, of processors {processors}")
    # Of processors: a machine that does other work stretches the shorter one by more.
    assert processors["verifying"] < 0.1 * processors["restoring"]


def clocks():
    return time.perf_counter(), time.process_time()
