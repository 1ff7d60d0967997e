"""The page of the published plans: what compilers said of the shipped recipes."""

from collections.abc import Iterator, Mapping
from typing import Any

from t5g2.planning.plan import HEADROOM
from t5g2.planning.roofline import utilization
from t5g2.planning.search import estimate
from t5g2.planning.table import binary, decimal, seconds
from t5g2.planning.topologies import Topology
from t5g2.reporting.numbers import compact
from t5g2.settings import Settings

# What a plan should reach by the roofline, the network in turn with the rest.
WANTED_MFU = 0.5

_HEAD = """# Published plans

Made by `python tools/publish_plans.py`, not by hand. Each is the train step of a recipe in
`configs/recipes`, compiled for its machine, which was not there; [planning](planning.md) says what
the numbers mean. Steps are bounds by published figures, computing and network one after the other:
nothing here was timed on the machines named.
"""
_ESTIMATED = """## Not compiled yet

By the estimate of `t5g2 plan --search` alone, which knows nothing of how XLA schedules a step:
`python tools/publish_plans.py NAME` compiles one.
"""


def page(
    settings: Mapping[str, Settings],
    machines: Mapping[str, Topology],
    records: Mapping[str, Mapping[str, Any]],
) -> str:
    """The page as Markdown.

    Args:
        settings: of each recipe, by its name.
        machines: of each recipe.
        records: what was found of those that were compiled.
    """
    known = [name for name in settings if name in records]
    parts = [_HEAD, _overview({name: records[name] for name in known})]
    parts += ["\n".join(_plan(name, records[name])) for name in known]
    if unknown := [name for name in settings if name not in records]:
        lines = ["| recipe | machine | memory | of | step | MFU |", "|---|---|---|---|---|---|"]
        lines += [_estimated(name, settings[name], machines[name]) for name in unknown]
        parts += [_ESTIMATED, "\n".join(lines)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def shortfalls(record: Mapping[str, Any]) -> list[str]:
    """What a plan lacks of what is wanted, in words."""
    lacks = []
    if record["fits"] is False:
        lacks.append(f"does not fit: {record['advice']}")
    left = headroom(record)
    if left is not None and left < HEADROOM and record["fits"] is not False:
        lacks.append(f"{left:.1%} of the memory left, not {HEADROOM:.0%}")
    mfu = in_turn(record)[1]
    if mfu < WANTED_MFU and record["fits"] is not False:
        lacks.append(f"MFU {mfu:.1%}, not {WANTED_MFU:.0%}")
    lacks += [
        f"not so: {check['what']} ({check['found']})"
        for check in record.get("checks", [])
        if not check["holds"]
    ]
    return lacks


def expected(settings: Settings, topology: Topology, record: Mapping[str, Any] | None) -> str:
    """What a recipe's header says of memory and speed, in one line.

    Args:
        settings: the recipe.
        topology: its machine.
        record: what was found; None: it was not compiled.
    """
    assert topology.chip is not None
    room, tokens = binary(topology.chip.hbm_bytes), settings.rows
    tokens *= settings.data.inputs_length + settings.data.targets_length
    if record is None:
        guess = estimate(settings, topology)
        size, time, how = guess.bytes, guess.seconds, "estimated, not compiled yet"
        mfu = utilization(topology.chip, topology.count, guess.flops, guess.seconds)
    elif record["fits"] is False:
        return f"Expected: {binary(record['out_of_memory']['needed'])} of {room}: out of memory."
    else:
        size, (time, mfu) = record["memory_bytes"]["total"], in_turn(record)
        how = "compiled"
    return (
        f"Expected ({how}): {binary(size)} of {room}; by the roofline "
        f"{compact(tokens / time)} tokens/s, MFU {mfu:.0%}."
    )


def headroom(record: Mapping[str, Any]) -> float | None:
    """Share of a device's memory that is left; None: it does not fit."""
    memory = record.get("memory_bytes")
    if memory is None:
        return None
    return 1 - memory["total"] / record["topology"]["chip"]["hbm_bytes"]


def in_turn(record: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a step and its MFU; 0 if it does not fit."""
    bound = record.get("roofline_seconds")
    if bound is None:
        return 0.0, 0.0
    topology = record["topology"]
    time = max(bound["compute"], bound["memory"]) + bound["network"]
    peak = topology["count"] * topology["chip"]["flops"]
    return time, record["flops"]["model"] / (peak * time)


def _needed(record: Mapping[str, Any]) -> int:
    """Bytes of a step that does not fit."""
    return record["out_of_memory"]["needed"]


def _overview(records: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| recipe | machine | rows | mesh | remat | memory | left | step | MFU | tokens/s | 2T |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        batch, chips = record["batch"], record["topology"]["count"]
        cells = [
            f"[{name}](../configs/recipes/{name}.gin)",
            f"{record['machine']} ({chips} chips)",
            f"{batch['rows']} x {batch['inputs']:,}/{batch['targets']:,}",
            _mesh(record["mesh"]) + f", {record['rows_per_device']} rows each",
            record["remat"],
        ]
        left = headroom(record)
        if left is None:
            cells += [
                f"{binary(record['out_of_memory']['needed'])}: out of memory",
                "",
                "",
                "",
                "",
                "",
            ]
        else:
            time, mfu = in_turn(record)
            rate = batch["tokens"] / time
            cells += [
                binary(record["memory_bytes"]["total"]),
                f"{left:.1%}",
                seconds(time),
                f"{mfu:.1%}",
                compact(rate),
                f"{2e12 / rate / 86_400:,.1f} days, {2e12 / rate / 3600 * chips:,.0f} chip-hours",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plan(name: str, record: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}\n"
    made = " and ".join(f"{package} {version}" for package, version in record["versions"].items())
    yield f"{record['parameters']['all']:,} parameters; attention `{record['attention']}`; {made}."
    if lacks := shortfalls(record):
        yield f"\n**Falls short**: {'; '.join(lacks)}."
    yield "\n| each device | |\n|---|---|"
    given = record["given_bytes"]
    lines = [(kind, binary(size)) for kind, size in given.items() if size]
    if memory := record.get("memory_bytes"):
        kinds = ("temporaries", "code", "total")
        lines += [(kind, binary(memory[kind])) for kind in kinds if memory[kind]]
        lines += [
            (f"{e['kind']} over {e['axes']}", f"{e['number']:,} x, {decimal(e['bytes'])}B")
            for e in record["collectives"]
        ]
    if bound := record.get("roofline_seconds"):
        lines += [(f"{kind} alone", seconds(bound[kind])) for kind in ("compute", "memory")]
    flops = record["flops"]
    lines.append(("model FLOPs of those executed", f"{flops['model'] / flops['executed']:.1%}"))
    yield from (f"| {what} | {value} |" for what, value in lines)
    if found := record.get("checks"):
        yield "\nOf the compiled program:\n"
        yield from (
            f"- {'yes' if check['holds'] else '**no**'}: {check['what']} ({check['found']})"
            for check in found
        )


def _mesh(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)


def _estimated(name: str, settings: Settings, topology: Topology) -> str:
    guess, chip = estimate(settings, topology), topology.chip
    assert chip is not None
    mfu = utilization(chip, topology.count, guess.flops, guess.seconds)
    cells = [name, topology.name, binary(guess.bytes), binary(chip.hbm_bytes)]
    return f"| {' | '.join([*cells, seconds(guess.seconds), f'{mfu:.1%}'])} |"
