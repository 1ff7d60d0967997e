"""Which steps are bad, by the numbers of those before."""

import math

import numpy as np
import pytest

from t5g2.parallel.mesh import MeshConfig, make_mesh
from t5g2.training.bad_steps import BadStepsConfig, Drawn, Guard
from t5g2.training.limits import Limits
from t5g2.training.step import LossSums, StepMetrics

SUMS = LossSums(np.ones(1, np.float32), np.ones(1, np.float32), np.int32(1))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def watch(guard, losses, norm=1.0, skipped=False, begin=1):
    for number, loss in enumerate(losses, begin):
        cursors = np.zeros((1, 3), np.int32)
        guard.add(Drawn(number, number, cursors, cursors))
        metrics = StepMetrics(
            SUMS,
            loss=np.float32(loss),
            grad_norm=np.float32(norm),
            skipped=np.bool_(skipped),
            digest=np.uint32(5),
            param_norm=np.float32(1),
            update_norm=np.float32(1),
        )
        guard.watch([metrics])


def noise(count, seed=0):
    return 3 + 0.1 * np.random.default_rng(seed).standard_normal(count)


def test_a_spike_is_what_lies_so_many_standard_deviations_above_the_mean(mesh):
    guard = Guard(BadStepsConfig(window=50, sigmas=5.0), mesh, None)
    values = noise(80)
    watch(guard, values)
    assert not guard.found()  # before the limits are set there is none
    guard.renew()
    recent = values[-50:].astype(np.float32).astype(float)
    limit = recent.mean() + 5 * recent.std()
    watch(guard, [limit - 1e-3, limit + 1e-3, limit / 2], begin=81)
    (bad,) = guard.found()
    assert (bad.kind, bad.policy, bad.drawn.step) == ("spike", "log", 82)
    assert guard.sound
    # "log": the devices leave nothing out but what is not finite.
    assert [bool(guard.limits.finite), float(guard.limits.loss)] == [True, math.inf]


def test_a_higher_level_is_a_spike_for_a_while_only(mesh):
    guard = Guard(BadStepsConfig(window=20, sigmas=4.0), mesh, None)
    watch(guard, noise(20))
    told = []
    for begin in range(21, 200, 10):
        guard.renew()
        watch(guard, noise(10, begin) + 3, begin=begin)
        told.append(len(guard.found()))
    assert told[0] == 10
    assert told[-5:] == [0] * 5


def test_the_limits_go_to_the_devices_and_outlive_the_process(mesh):
    config = BadStepsConfig(window=10, spike="skip", nonfinite="log")
    guard = Guard(config, mesh, None)
    watch(guard, noise(10))
    guard.renew()
    assert not bool(guard.limits.finite)
    again = Guard(config, mesh, guard.state())
    assert again.state() == guard.state()
    assert [float(x) for x in again.limits] == [float(x) for x in guard.limits]
    watch(again, [9.0], begin=11)
    assert again.found()[0].kind == "spike"


def test_too_many_in_a_row_stop_and_a_stretch_goes_from_the_first_to_the_last(mesh):
    guard = Guard(BadStepsConfig(most_in_a_row=3), mesh, None)
    watch(guard, [math.nan] * 2, skipped=True)
    assert guard.sound
    watch(Guard(BadStepsConfig(most_in_a_row=3), mesh, guard.state()), [3.0])
    again = Guard(BadStepsConfig(most_in_a_row=3), mesh, guard.state())
    watch(again, [math.inf], skipped=True, begin=3)
    assert again.stop == "bad_steps: 3 steps in a row were skipped"
    back = Guard(BadStepsConfig(nonfinite="rollback"), mesh, None)
    watch(back, [3, math.nan, 3, 3, math.nan, 3])
    assert back.stretch is not None
    assert [drawn.step for drawn in back.stretch] == [2, 5]
    assert not back.sound


@pytest.mark.parametrize(
    ("loss", "norm", "limits", "left_out"),
    [
        (math.nan, 1, Limits(True, math.inf, math.inf), True),
        (1, math.inf, Limits(True, math.inf, math.inf), True),
        (math.nan, math.nan, Limits(False, math.inf, math.inf), False),
        (2, 1, Limits(False, 1.9, math.inf), True),
        (2, 1, Limits(False, 2.0, 0.9), True),
        (2, 1, Limits(True, 2.0, 1.0), False),
    ],
)
def test_what_is_left_out(loss, norm, limits, left_out):
    assert bool(limits.exceeded(np.float32(loss), np.float32(norm))) == left_out
