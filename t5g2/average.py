"""`t5g2 average`: the mean of a run's last checkpoints, as a checkpoint of its own."""

import argparse
from pathlib import Path

from t5g2.checkpoints.average import write_average
from t5g2.checkpoints.store import CHECKPOINTS_DIR, CheckpointStore
from t5g2.errors import UserError


def run(args: argparse.Namespace) -> int:
    """Averages the last `--last` checkpoints of `--run_dir` into `--out`."""
    directory = Path(args.run_dir) / CHECKPOINTS_DIR
    if not directory.is_dir():
        raise UserError(f"{args.run_dir} is not a run directory: it has no {CHECKPOINTS_DIR}/")
    if args.last < 1:
        raise UserError(f"--last must be at least 1, not {args.last}")
    with CheckpointStore(directory) as store:
        steps = store.steps()
        if len(steps) < args.last:
            raise UserError(
                f"--last {args.last}: {args.run_dir} has only {len(steps)} checkpoints"
                f" ({', '.join(map(str, steps)) or 'none'})"
            )
        chosen = steps[-args.last :]
        write_average([store.path(step) for step in chosen], Path(args.out))
    print(f"{args.out}: mean of steps {', '.join(map(str, chosen))}")
    return 0
