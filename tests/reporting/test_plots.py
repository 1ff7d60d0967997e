import math

import pytest
from matplotlib.image import imread
from synthetic_run import train_row

from t5g2.reporting.metrics_log import RunHistory, read_metrics
from t5g2.reporting.plots import plot_loss


def _train(losses, **changes):
    return [
        {"kind": "train", "step": step, "time": 0.0, **train_row(step, loss=loss, **changes)}
        for step, loss in enumerate(losses, start=1)
    ]


def test_a_finished_run_is_drawn(finished_run):
    path = finished_run / "loss.png"
    plot_loss(read_metrics(finished_run), path)
    picture = imread(path)
    assert picture.shape[0] > 700
    assert picture.shape[1] > 900
    assert picture[..., :3].std() > 0.02  # there is something on it
    assert [p.name for p in finished_run.glob("*loss.png*")] == ["loss.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "history",
    [
        RunHistory(),
        RunHistory(train=_train([3.0])),
        RunHistory(train=_train([math.nan])),
        RunHistory(train=_train([math.nan, math.inf, -math.inf])),
        RunHistory(train=_train([3.0, math.nan, 2.0]), summary={"unigram_entropy": 6.0}),
        RunHistory(train=_train([2.0] * 300 + [1e9])),
        RunHistory(train=_train([3.0, 2.0], tokens=7)),
        RunHistory(train=_train([3.0, 2.0], grad_norm=0.0, learning_rate=0.0)),
        RunHistory(train=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]),
        RunHistory(eval=[{"step": 5, "loss": 2.0, "weights": "averaged", "by_task": {"a": 1.0}}]),
    ],
    ids=[
        "nothing", "one", "nan", "all-not-finite", "gap", "spike", "same-tokens", "zeros",
        "bare", "only-heldout",
    ],
)  # fmt: skip
def test_degenerate_runs_are_drawn_too(history, tmp_path):
    plot_loss(history, tmp_path / "loss.png", title="a $run_name$ <b>")
    assert imread(tmp_path / "loss.png").size
