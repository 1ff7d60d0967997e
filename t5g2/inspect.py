"""`t5g2 inspect`: a look at data, a configuration, a checkpoint, or one run or several."""

import argparse
import time
from pathlib import Path

from t5g2.errors import UserError
from t5g2.files import to_path, write_atomically


def run(args: argparse.Namespace) -> int:
    """Prints the view that `args.what` names."""
    if args.what == "run":
        print(_runs(args))
        return 0
    # Apart, because they import jax: a look at a run is to take no second.
    from t5g2 import inspect_setup

    views = {
        "data": inspect_setup.data,
        "config": inspect_setup.config,
        "checkpoint": inspect_setup.checkpoint,
    }
    print(views[args.what](args))
    return 0


def _runs(args: argparse.Namespace) -> str:
    run_dirs = [to_path(path) for path in args.run_dirs]
    if args.html is not None:
        return _page(run_dirs, to_path(args.html))
    from t5g2.reporting import run_text
    from t5g2.reporting.metrics_log import read_metrics

    histories = {str(path): read_metrics(path, most=run_text.RECORDS) for path in run_dirs}
    if len(histories) == 1:
        ((name, history),) = histories.items()
        return run_text.summary(name, history, time.time())
    return run_text.comparison(histories, time.time())


def _page(run_dirs: list[Path], page: Path) -> str:
    from t5g2.reporting.compare_page import compare_page
    from t5g2.reporting.report import write_report

    try:
        if len(run_dirs) == 1:
            write_report(run_dirs[0], page)
        else:
            write_atomically(page, compare_page(run_dirs))
    except OSError as error:
        raise UserError(f"--html {page} cannot be written: {error.strerror}") from None
    return f"{page}: open it in a browser"
