"""What a record says of the steps since the last one."""

import numpy as np
import pytest

from t5g2.training.metrics import mean_loss
from t5g2.training.step import LossSums


def sums(nll, targets):
    return LossSums(
        nll=np.float32(nll), targets=np.float32(targets), inputs=np.int32(1), distilled=None
    )


def test_losses_by_task_weighed_by_their_targets_make_the_loss_again():
    mean = mean_loss([sums([30, 8, 0], [10, 4, 0]), sums([0, 16, 0], [0, 4, 0])], ["a", "b", "c"])
    assert mean.by_task == {"a": 3.0, "b": 3.0}
    assert mean.targets_by_task == {"a": 10, "b": 8}
    again = sum(mean.by_task[name] * mean.targets_by_task[name] for name in mean.by_task)
    assert again / mean.targets == pytest.approx(mean.loss) == 3.0
    assert sum(mean.targets_by_task.values()) == mean.targets == 18


def test_a_task_without_a_target_is_left_out_of_the_mean():
    mean = mean_loss([sums([5, 0], [2, 0])], ["a", "b"])
    assert "b" not in mean.by_task
    assert "b" not in mean.targets_by_task
    assert mean.loss == 2.5
