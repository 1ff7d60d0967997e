"""What it costs that checkpoints verify."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoints.keeping import CheckpointConfig, CheckpointStore
from t5g2.checkpoints.manifest import verify
from t5g2.training.state import TrainState


@pytest.mark.slow
def test_verifying_takes_less_than_a_tenth_of_a_runs_restore(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        f"layer{number}": jnp.asarray(rng.standard_normal((2048, 2048), np.float32))
        for number in range(8)
    }
    state = TrainState(jnp.int32(1), params, (params,))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    seconds: dict[str, list[tuple[float, float]]] = {"verifying": [], "restoring": []}
    with CheckpointStore(tmp_path, CheckpointConfig()) as store:
        store.save(state, jnp.zeros((1, 1), np.int32), {}, temporary=False)
        assert store.wait() == 1
        for _ in range(5):  # in turns: what else the machine does slows both
            moments = [clocks()]
            verdict = verify(store.path(1))
            moments.append(clocks())
            store.restore(1, state, shardings)
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
