"""Reference steps cost no more than recorded, and the tool asks why where they do."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import step_costs

TABLE = json.loads(step_costs.TABLE.read_text())
COSTS = {"a step": {"flops": 1000, "temporaries": 1000}}


def test_reference_steps_cost_what_is_recorded():
    if jax.__version__ not in TABLE["costs"]:
        pytest.skip(
            f"no costs are recorded for jax {jax.__version__}: tools/step_costs.py --record"
        )
    command = [sys.executable, step_costs.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_growth_is_named():
    found = {"a step": {"flops": 1001, "temporaries": 1005}, "new": {"flops": 1}}
    assert step_costs.grown(COSTS, found) == [
        "a step: flops grew from 1,000 to 1,001",
        "new: flops 1 is not recorded",
    ]
    assert step_costs.grown(COSTS, {"a step": {"flops": 10, "temporaries": 1011}}) == [
        "a step: temporaries grew from 1,000 to 1,011"
    ]


def test_growth_is_recorded_with_its_reason_alone():
    table = {"costs": {"1.2": COSTS}, "reasons": []}
    more = {"a step": {"flops": 2000, "temporaries": 10}}
    with pytest.raises(ValueError, match="flops grew from 1,000 to 2,000"):
        step_costs.record(table, "1.2", more, None)
    assert table["costs"]["1.2"] is COSTS
    step_costs.record(table, "1.2", more, "a second head")
    assert table["costs"]["1.2"] == more
    assert table["reasons"] == [
        {
            "jax": "1.2",
            "reason": "a second head",
            "changes": ["a step: flops grew from 1,000 to 2,000"],
        }
    ]
    # Another version, and less, need none.
    step_costs.record(table, "1.3", COSTS, None)
    step_costs.record(table, "1.2", {"a step": {"flops": 1500, "temporaries": 10}}, None)
    assert len(table["reasons"]) == 1
