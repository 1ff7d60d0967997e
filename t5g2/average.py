"""`t5g2 average`: the mean of a run's last checkpoints, as a checkpoint of its own."""

import argparse

from t5g2.checkpoints.average import write_average
from t5g2.checkpoints.directory import in_use, permanent, saved_checkpoints
from t5g2.checkpoints.store import CHECKPOINTS_DIR
from t5g2.errors import UserError
from t5g2.files import to_path


def run(args: argparse.Namespace) -> int:
    """Averages the last `--last` checkpoints of `--run_dir` into `--out`."""
    directory = to_path(args.run_dir) / CHECKPOINTS_DIR
    if not directory.is_dir():
        raise UserError(f"{args.run_dir} is not a run directory: it has no {CHECKPOINTS_DIR}/")
    if args.last < 1:
        raise UserError(f"--last must be at least 1, not {args.last}")
    chosen = permanent(saved_checkpoints(directory))
    steps = ", ".join(str(checkpoint.step) for checkpoint in chosen)
    if len(chosen) < args.last:
        raise UserError(
            f"--last {args.last}: {args.run_dir} has only {len(chosen)} checkpoints"
            f" ({steps or 'none'})"
        )
    chosen = chosen[-args.last :]
    paths = [checkpoint.path for checkpoint in chosen]
    with in_use(paths):
        write_average(paths, to_path(args.out), args.sum_dtype)
    print(f"{args.out}: mean of steps {', '.join(str(checkpoint.step) for checkpoint in chosen)}")
    return 0
