"""Times the train step of a recipe under two settings, in alternating processes.

    python tools/bench/train_step.py --gin_file configs/recipes/quickstart.gin \
        --env GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    python tools/bench/train_step.py --gin_file ... --gin train.rows=16

The first is the recipe as it is, the second has the named environment variables and settings. The
rows are full of random tokens. Prints the best step of each process, and the ratio round by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def measure(gin_file: str, bindings: list[str], steps: int) -> float:
    """Best of `steps` train steps, in seconds."""
    import jax
    from our_step import full_batch, prepare_recipe  # beside this file

    from t5g2.settings import read_settings

    settings = read_settings([gin_file], bindings)
    ours = prepare_recipe(settings)
    room = (settings.data.inputs_length, settings.data.targets_length)
    batch = ours.place(full_batch(settings.rows, *room, settings.model.vocab_size))
    step, state = ours.step, ours.state
    del ours  # The state is consumed.
    best = float("inf")
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    """Alternates the two settings and prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", required=True)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--gin", action="append", default=[], metavar="SECTION.SETTING=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(measure(args.gin_file, args.gin, args.steps))
        return
    base = [sys.executable, __file__, "--child", "--gin_file", args.gin_file]
    base += ["--steps", str(args.steps)]
    changed = [*base, *(part for binding in args.gin for part in ("--gin", binding))]
    variables = dict(variable.split("=", 1) for variable in args.env)
    seconds: dict[str, list[float]] = {"as it is": [], "changed": []}
    for _ in range(args.rounds):
        for name, command, extra in (("as it is", base, {}), ("changed", changed, variables)):
            out = subprocess.run(
                command, env={**os.environ, **extra}, check=True, capture_output=True, text=True
            )
            seconds[name].append(float(out.stdout))
    for name, times in seconds.items():
        print(f"{name:10}", "  ".join(f"{t:8.3f} s" for t in times))
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"{'speed-up':10}", "  ".join(f"{ratio:9.2f} " for ratio in ratios))
    print(json.dumps({**seconds, "median_speed_up": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
