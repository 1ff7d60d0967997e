"""A synthetic run."""

from pathlib import Path

import pytest
from synthetic_run import TASKS, train_row, write_lines


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """200 steps in two processes; complete, with everything a report can show."""
    run_dir = tmp_path / "finished"
    evals = [
        {
            "kind": "eval",
            "step": step,
            "split": "heldout",
            "weights": weights,
            "loss": 2.5,
            "by_task": {name: 2.5 * factor for name, factor in TASKS.items()},
            "tokens": 9000,
        }
        for step, weights in ((100, "last"), (200, "last"), (200, "averaged"))
    ]
    facts = {"total_steps": 200, "parameters": 3_000_000, "devices": "1 x cpu"}
    write_lines(
        run_dir,
        [
            {"kind": "start", "step": 0, **facts},
            *({"kind": "train", "step": step, **train_row(step)} for step in range(1, 121)),
            {"kind": "event", "step": 120, "level": "warning", "message": "stopped by SIGTERM"},
            {"kind": "start", "step": 100, **facts},
            *({"kind": "train", "step": step, **train_row(step)} for step in range(101, 201)),
            *evals,
            {
                "kind": "summary",
                "step": 200,
                "unigram_entropy": 6.42,
                "heldout_loss_last": 2.5,
                "heldout_loss_averaged": 2.4,
                "checkpoints_averaged": [150, 200],
                "corpus": {"documents": 1812, "tokens": 9_812_345},
                "data_shares": {"span3_15": 0.25, "span12_50": 0.25, "prefix_75": 0.5},
            },
        ],
    )
    (run_dir / "config.gin").write_text("train.total_steps = 200\n")
    return run_dir
