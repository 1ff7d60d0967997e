"""The learning rate: linear warm-up, cosine decay to the floor at the run's last step."""

import math

import pytest

from t5g2.training.schedule import ScheduleConfig, make_schedule, warmup_steps


def test_it_warms_up_linearly_then_follows_a_cosine_to_the_floor():
    config = ScheduleConfig(peak_learning_rate=2.0, warmup_steps=100, floor=0.1)
    rate = make_schedule(config, 2000)
    assert float(rate(0)) == pytest.approx(2.0 / 100)
    assert float(rate(49)) == pytest.approx(1.0)
    assert float(rate(99)) == pytest.approx(2.0)
    for step in (100, 500, 1500, 2000):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / 1900))
        assert float(rate(step)) == pytest.approx(2.0 * (0.1 + 0.9 * cosine), rel=1e-5)


def test_a_short_run_warms_up_for_a_tenth_of_it():
    config = ScheduleConfig(warmup_steps=100)
    assert warmup_steps(config, 2000) == 100
    assert warmup_steps(config, 500) == 50
    assert warmup_steps(config, 5) == 0
    # Without any warm-up the first step is at the peak.
    assert float(make_schedule(config, 5)(0)) == pytest.approx(config.peak_learning_rate)
