"""`t5g2 plan`: what a recipe needs on a machine, and how fast it can be there."""

import argparse
import json
from pathlib import Path

from t5g2.errors import UserError
from t5g2.files import write_atomically
from t5g2.planning.plan import make_plan
from t5g2.planning.search import candidates, search
from t5g2.planning.table import as_text, ranking
from t5g2.planning.topologies import find_topology
from t5g2.reporting.progress import Progress
from t5g2.settings import read_settings


def run(args: argparse.Namespace) -> int:
    """Prints the plan, or with `--search` the best one; with `--json` writes it, too.

    A step that does not fit is an answer.
    """
    topology = find_topology(args.topology)
    settings = read_settings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    if args.search is not None and args.search < 1:
        raise UserError(f"--search {args.search}: compile at least 1")
    with Progress(0) as progress:
        if args.search is None:
            plan = make_plan(settings, topology, progress.stage)
        else:
            found = search(settings, topology, args.search, progress.stage)
            print(ranking(candidates(settings, topology), found, topology), end="\n\n")
            plan = found[0].plan
    print(as_text(plan))
    if args.json is not None:
        path = Path(args.json)
        try:
            write_atomically(path, json.dumps(plan.to_json(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {path} cannot be written: {error.strerror}") from None
    return 0
