"""A plan as a person reads it."""

from collections.abc import Sequence

from t5g2.planning.compile import CompiledStep, OutOfMemory
from t5g2.planning.plan import HEADROOM, RUN_TOKENS, Plan
from t5g2.planning.search import Candidate, Found
from t5g2.planning.topologies import Topology
from t5g2.reporting.numbers import compact

_GIB, _MIB = 2**30, 2**20
# Of a GPU's memory jax takes so much unless it is told otherwise (docs.jax.dev, "GPU memory
# allocation").
_PREALLOCATED = 0.75
_ALL = "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"


def as_text(plan: Plan) -> str:
    """The whole plan, section by section."""
    sections = [_what(plan), _flops(plan), _memory(plan)]
    if isinstance(plan.result, CompiledStep):
        sections.append(_network(plan.result))
    if plan.roofline is not None:
        sections.append(_time(plan))
    return "\n\n".join(sections)


def ranking(tried: Sequence[Candidate], found: Sequence[Found], topology: Topology) -> str:
    """What `--search` found: the plans, best first, and how the best one is asked for.

    Args:
        tried: all candidates.
        found: those that were planned, best first.
        topology: the machine.
    """
    assert topology.chip is not None
    room = (1 - HEADROOM) * topology.chip.hbm_bytes
    fitting = sum(candidate.bytes <= room for candidate in tried)
    lines = [
        f"{topology.name}: {len(tried)} ways to run it, of which {fitting} seem to fit; compiled, "
        "best first:",
        f"  {'data':>5} {'fsdp':>5} {'tensor':>6} {'rows':>5} {'remat':>6} "
        f"{'estimate':>22}  {'memory':>10} {'left':>6} {'step':>9} {'MFU':>6}",
    ]
    for candidate, plan in found:
        mesh, estimate = plan.mesh, f"{binary(candidate.bytes)} {seconds(candidate.seconds)}"
        lines.append(
            f"  {mesh['data']:>5} {mesh['fsdp']:>5} {mesh['tensor']:>6} "
            f"{plan.parts.rows_per_device:>5} {plan.settings.model.remat:>6} {estimate:>22}  "
            + _verdict(plan)
        )
    best = " ".join(f"--gin.{binding}" for binding in found[0].candidate.bindings)
    words = "None of them fits; the nearest" if found[0].plan.fits is False else "The first"
    lines.append(f"{words}: {best}")
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    if isinstance(plan.result, OutOfMemory):
        needed, available = plan.result
        return f"{binary(needed):>10} out of memory: {binary(needed - available)} too much"
    assert plan.roofline is not None
    assert plan.headroom is not None
    time = plan.roofline.in_turn
    return (
        f"{binary(plan.result.memory.total):>10} {plan.headroom:>6.1%} {seconds(time):>9} "
        f"{plan.utilization(time):>6.1%}"
    )


def _what(plan: Plan) -> str:
    load, chip = plan.load, plan.topology.chip
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"
    images = f", {load.images} images a row" if load.images else ""
    kind = "CPU" if chip is None else chip.name
    return _columns(
        f"{plan.topology.name}: {plan.topology.count} x {kind}",
        [
            ("mesh", axes),
            ("batch", f"{load.rows:,} rows of {load.inputs:,} + {load.targets:,} tokens{images}"),
            ("", f"{load.tokens:,} tokens, in {plan.parts.accumulation} microbatch(es) of"),
            ("", f"{plan.parts.rows_per_device:,} row(s) on each device"),
            ("remat", plan.settings.model.remat),
            ("attention", plan.attention),
            ("parameters", f"{plan.parameters[0]:,}, of which {plan.parameters[1]:,} train"),
        ],
    )


def _flops(plan: Plan) -> str:
    flops, total = plan.flops, plan.executed.flops
    rows = [(part, 3 * count) for part, count in flops.trained.items()]
    rows += [(f"{part} (forward alone)", count) for part, count in flops.frozen.items()]
    extras = [
        ("teacher (forward alone)", plan.teacher_flops),
        (f"recomputed: remat '{plan.settings.model.remat}'", plan.recomputed),
        ("masked attention, its blocks again, padding", plan.masked),
    ]
    lines = [*rows, ("model FLOPs", flops.total), *((n, c) for n, c in extras if c)]
    lines.append(("executed", total))
    if plan.made_again:
        lines.append(("made again by XLA itself", plan.made_again))
    if plan.repeated > 0:
        lines.append(("the same on more than one device", plan.repeated))
    return _columns(
        "FLOPs of a step, all devices, forward and backward; rows full, one example each",
        [(name, f"{decimal(count):>7} {count / total:7.1%}") for name, count in lines],
    )


def _memory(plan: Plan) -> str:
    chip, state = plan.topology.chip, plan.state
    lines = [
        (name, binary(size)) for name, size in state._asdict().items() if size or name != "teacher"
    ]
    match plan.result:
        case CompiledStep(memory=memory):
            lines += [
                ("filled up to tiles", binary(memory.arguments - sum(state))),
                ("outputs", binary(memory.outputs)),
                ("temporaries", binary(memory.temporaries)),
                ("program", binary(memory.code)),
                ("total", binary(memory.total)),
            ]
            if chip is not None and plan.headroom is not None:
                few = f": less than {HEADROOM:.0%}" if plan.headroom < HEADROOM else ""
                lines.append(("of", f"{binary(chip.hbm_bytes)}, {plan.headroom:.1%} left{few}"))
                if plan.topology.platform == "gpu" and plan.headroom < 1 - _PREALLOCATED:
                    lines.append(("jax takes", f"{_PREALLOCATED:.0%} by itself: {_ALL}"))
        case OutOfMemory(needed, available):
            over = needed - available
            lines.append(
                ("needed", f"{binary(needed)} of {binary(available)}: {binary(over)} too much")
            )
    if advice := plan.advice():
        lines.append(("does not fit", advice))
    return _columns("Memory of each device", lines)


def _network(result: CompiledStep) -> str:
    lines = [
        (f"{kind} over {axes}", f"{number:>6,} {decimal(size):>7}B")
        for kind, axes, number, size in result.collectives
    ]
    return _columns("Sent by each device in a step", lines or [("nothing", "")])


def _time(plan: Plan) -> str:
    bound = plan.roofline
    assert bound is not None
    lines = [
        ("computing", seconds(bound.compute)),
        ("memory", seconds(bound.memory)),
        ("network", seconds(bound.network)),
    ]
    cases = [
        ("all at the same time", bound.overlapped),
        ("network in turn with the rest", bound.in_turn),
    ]
    for name, time in cases:
        needed = plan.budget(time)
        rate = compact(plan.load.tokens / time)
        lines += [
            (
                name,
                f"{seconds(time)} a step, MFU {plan.utilization(time):.1%}, {rate} tokens/s",
            ),
            (
                f"  {compact(RUN_TOKENS)} tokens",
                f"{needed.days:,.1f} days, {needed.chip_hours:,.0f} chip-hours",
            ),
        ]
    return _columns("Shortest time of a step, by published figures: a bound, not a forecast", lines)


def binary(size: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / _GIB:,.2f} GiB" if size > _GIB / 10 else f"{size / _MIB:,.2f} MiB"


def decimal(value: float) -> str:
    """Three digits and a prefix: 1.46e16 as "14.6 P"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    exponent = 0
    while value >= 999.5 and exponent < len(prefixes) - 1:
        value, exponent = value / 1000, exponent + 1
    return f"{value:#.3g}".rstrip(".") + f" {prefixes[exponent]}"


def seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1000:,.3g} ms"


def _columns(title: str, lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:{width}}  {value}".rstrip() for name, value in lines)])
