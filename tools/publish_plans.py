"""Plans of the shipped recipes, compiled for their machines, as docs/plans.md.

    python tools/publish_plans.py                      # all of them: minutes of compiling each
    python tools/publish_plans.py 270m_v5e-16 ...      # these alone; the others stay as they are
    python tools/publish_plans.py --render             # docs/plans.md again, nothing compiled

What was found is kept in docs/plans.json, one record for each recipe, and told in a line of each
recipe's header. The step is checked, too: fused attention, no large buffers, no needless exchange
of the vocabulary's table; one that fails is not published, and what was there before stays. Exits
with 1 if a plan that it made falls short of what is wanted, and says of what.

Needs the extras `tpu` and `cuda`, each for its machines.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

from t5g2.errors import UserError
from t5g2.files import write_atomically
from t5g2.planning.buffers import checks
from t5g2.planning.compile import CompiledStep
from t5g2.planning.plan import HEADROOM, make_plan
from t5g2.planning.publishing import WANTED_MFU, expected, page, shortfalls
from t5g2.planning.topologies import find_topology
from t5g2.settings import read_settings

ROOT = Path(__file__).parent.parent
RECORDS, PAGE = ROOT / "docs/plans.json", ROOT / "docs/plans.md"
_COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}
# Recipe to machine.
PUBLISHED = {
    "270m_v5e-16": "v5e-16",
    "270m_h100-8": "h100:8",
    "1b_v5e-256": "v5e-256",
    "1b_v6e-64": "v6e-64",
    "4b_v5p-512": "v5p-512",
    "4b_v5p-1024": "v5p-1024",
}


def record(name: str) -> dict[str, Any]:
    """Compiles a recipe's step and says what it is; in a process of its own."""
    topology = find_topology(PUBLISHED[name])
    settings = read_settings([str(_recipe(name))])
    plan = make_plan(settings, topology, lambda _: contextlib.nullcontext())
    compiler = _COMPILERS[topology.platform]
    versions = {package: importlib.metadata.version(package) for package in ("jax", compiler)}
    found: dict[str, Any] = {"machine": PUBLISHED[name], **plan.to_json(), "versions": versions}
    if isinstance(plan.result, CompiledStep):
        room = (settings.data.inputs_length, settings.data.targets_length)
        made = checks(plan.result.text, settings.model, room, plan.mesh, plan.parts.accumulation)
        found["checks"] = [check._asdict() for check in made]
    return found


def _recipe(name: str) -> Path:
    return ROOT / f"configs/recipes/{name}.gin"


def main() -> int:
    """Makes the plans that are named, and the page of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PUBLISHED))
    parser.add_argument("--render", action="store_true", help="compile nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - set(PUBLISHED):
        parser.error(
            f"no such plan: {', '.join(sorted(unknown))}; there are {', '.join(PUBLISHED)}"
        )
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    failed = False
    for name in [] if args.render else args.names or PUBLISHED:
        print(f"{name} ...", flush=True)
        # What a compiler has taken of the memory it gives back with its process alone.
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            try:
                found = pool.submit(record, name).result()
            except UserError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
        for what in shortfalls(found):
            failed = True
            print(f"{name}: {what}", file=sys.stderr)
        if not all(check["holds"] for check in found.get("checks", [])):
            print(f"{name}: not published", file=sys.stderr)
            continue
        records[name] = found
        ordered = {name: records[name] for name in PUBLISHED if name in records}
        write_atomically(RECORDS, json.dumps(ordered, indent=1) + "\n")
    settings = {name: read_settings([str(_recipe(name))]) for name in PUBLISHED}
    machines = {name: find_topology(machine) for name, machine in PUBLISHED.items()}
    write_atomically(PAGE, page(settings, machines, records))
    for name, recipe in settings.items():
        line = expected(recipe, machines[name], records.get(name))
        text = _recipe(name).read_text()
        write_atomically(_recipe(name), re.sub("(?m)^# Expected.*$", f"# {line}", text))
    print(f"wanted: {HEADROOM:.0%} of the memory left, MFU {WANTED_MFU:.0%}; see {PAGE}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
