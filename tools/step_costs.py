"""What reference train steps cost, as compiled for CPU, against a recorded table.

    python tools/step_costs.py                                # exit code 1 if a number grew
    python tools/step_costs.py --record                       # where none grew
    python tools/step_costs.py --record --reason "z-loss reads the logits twice"

No timing: FLOPs of all products, bytes that XLA's instructions read and write, memory, and how
many collectives there are and what they send; of small steps on one device and on eight virtual
ones. The table (tests/planning/step_costs.json) is kept for each version of jax; a number that
grows is recorded with its reason alone, which stays in the table.
"""

import argparse
import json
import sys
from pathlib import Path

import jax

from t5g2.parallel.mesh import configure_devices
from t5g2.planning.collectives import collectives
from t5g2.planning.compile import trace_step
from t5g2.planning.executed import executed
from t5g2.planning.products import device_products
from t5g2.settings import read_settings

TABLE = Path(__file__).parents[1] / "tests" / "planning" / "step_costs.json"
# XLA's buffers on a CPU depend a little on how many cores it makes loops for.
_ROUNDING = 1.01
_EXACT = ("flops", "traced flops", "collectives", "bytes sent")
_DEVICES = 8
# Machine code that is not to run: what is counted is decided before it is made.
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_MODEL = (
    "model.vocab_size=2048",
    "model.hidden_size=64",
    "model.mlp_dim=128",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.sliding_window=64",
    "model.global_every=2",
    "data.inputs_length=384",
    "data.targets_length=256",
    "train.total_steps=100",
    "train.rows=8",
)
STEPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one device, float32": (1, ()),
    "eight devices, data x fsdp x tensor, bfloat16, remat, two microbatches": (
        8,
        (
            "mesh.data=2",
            "mesh.fsdp=2",
            "mesh.tensor=2",
            "model.dtype=bfloat16",
            "model.remat=full",
            "train.accumulation=2",
        ),
    ),
}

Costs = dict[str, int]


def measure() -> dict[str, Costs]:
    """Compiles the steps; costs of each by name, those of one device.

    "traced flops" are all devices' together, with what is multiplied again; "bytes accessed" has
    loops' bodies once.
    """
    found = {}
    for name, (count, bindings) in STEPS.items():
        settings = read_settings([], [*_MODEL, *bindings])
        step = trace_step(settings, jax.devices()[:count])
        compiled = step.traced.lower().compile(_FAST)
        text, sizes = compiled.as_text(), compiled.memory_analysis()
        sent = collectives(text, dict(step.mesh.shape))
        found[name] = {
            "flops": device_products(text).flops,
            "traced flops": executed(step.traced.jaxpr).flops,
            "bytes accessed": int(compiled.cost_analysis()["bytes accessed"]),
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "collectives": sum(c.number for c in sent),
            "bytes sent": sum(c.bytes for c in sent),
        }
    return found


def grown(recorded: dict[str, Costs], found: dict[str, Costs]) -> list[str]:
    """What costs more than was recorded, and what was not recorded, a line each."""
    lines = []
    for step, costs in found.items():
        for name, value in costs.items():
            before = recorded.get(step, {}).get(name)
            if before is None:
                lines.append(f"{step}: {name} {value:,} is not recorded")
            elif value > before * (1 if name in _EXACT else _ROUNDING):
                lines.append(f"{step}: {name} grew from {before:,} to {value:,}")
    return lines


def record(table: dict, version: str, found: dict[str, Costs], reason: str | None) -> None:
    """Puts costs into the table.

    Raises:
        ValueError: something grew, and there is no reason.
    """
    before = table["costs"].get(version)
    lines = [] if before is None else grown(before, found)
    if lines and not reason:
        raise ValueError("\n".join([*lines, "--reason says why"]))
    if lines:
        table["reasons"].append({"jax": version, "reason": reason, "changes": lines})
    table["costs"][version] = found


def main() -> None:
    """Prints the costs beside the recorded ones, or records them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--reason", help="why what grew had to")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    configure_devices(read_settings([], [*_MODEL, f"mesh.cpu_devices={_DEVICES}"]).mesh)
    version = jax.__version__
    table = {"costs": {}, "reasons": []}
    if args.table.exists():
        table = json.loads(args.table.read_text())
    found = measure()
    recorded = table["costs"].get(version)
    for step, costs in found.items():
        print(step)
        for name, value in costs.items():
            before = (recorded or {}).get(step, {}).get(name)
            known = "not recorded" if before is None else f"recorded {before:>14,}"
            print(f"  {name:16} {value:>14,}   {known}")
    if args.record:
        try:
            record(table, version, found, args.reason)
        except ValueError as error:
            sys.exit(str(error))
        args.table.write_text(json.dumps(table, indent=1) + "\n")
    elif recorded is None:
        print(f"nothing is recorded for jax {version}: --record does it")
    elif lines := grown(recorded, found):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
