"""What a GPU's kernels read and write, from XLA's text of the program that launches them."""

import collections
from collections.abc import Mapping

from t5g2.planning.hlo import Instruction, byte_count, computations, inner, instructions

# These are no kernels: they name, order or group what others make.
_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id"),
}
_PICKS = {"dynamic-slice", "slice", "gather"}


def hbm_traffic(text: str) -> int:
    """Bytes that all kernels of a program read and write on one device, loops and all.

    Kernels run one after the other: each reads its arguments from memory and writes its results
    there, once. Of an array that it picks a part from, that part counts, and what it changes in
    place, that change. Some of it may be in the cache still, which nobody can tell here.

    Args:
        text: of the compiled module.
    """
    parts = computations(text)
    bodies = {part.name: {i.name: i for i in instructions(part.lines)} for part in parts}
    within = inner(parts)
    return sum(
        part.times * sum(_moved(i, bodies[part.name], bodies) for i in bodies[part.name].values())
        for part in parts
        if part.name not in within
    )


def _moved(
    kernel: Instruction,
    around: Mapping[str, Instruction],
    bodies: Mapping[str, Mapping[str, Instruction]],
) -> int:
    if kernel.opcode in _NOTHING or kernel.opcode.endswith(("-done", "-update")):
        return 0
    if kernel.opcode == "fusion":
        body = bodies[kernel.called]
        root = next(i for i in body.values() if i.root)
        return _read(body) + _written(root, body)
    if kernel.opcode in _PICKS:
        return 2 * byte_count(kernel.shape)
    if kernel.opcode == "dynamic-update-slice":
        return 2 * byte_count(around[kernel.operands[1]].shape)
    made = byte_count(kernel.shape)
    if kernel.opcode.endswith("-start") and kernel.opcode != "all-reduce-start":
        return made  # Its arguments are among its results.
    return made + sum(byte_count(around[name].shape) for name in kernel.operands)


def _read(body: Mapping[str, Instruction]) -> int:
    """Bytes of a fusion's arguments that it looks at."""
    users: dict[str, list[tuple[Instruction, int]]] = collections.defaultdict(list)
    for instruction in body.values():
        for place, name in enumerate(instruction.operands):
            users[name].append((instruction, place))

    def looked_at(array: Instruction) -> int:
        whole, parts = byte_count(array.shape), 0
        for user, place in users[array.name]:
            if user.opcode == "bitcast":
                parts += looked_at(user)
            elif user.opcode in _PICKS and place == 0:
                parts += byte_count(user.shape)
            elif user.opcode not in ("dynamic-update-slice", "scatter") or place:
                return whole
        return min(parts, whole)

    return sum(looked_at(i) for i in body.values() if i.opcode == "parameter")


def _written(result: Instruction, body: Mapping[str, Instruction]) -> int:
    """Bytes that a fusion writes for one of its results."""
    match result.opcode:
        case "tuple":
            return sum(_written(body[name], body) for name in result.operands)
        case "bitcast":
            return _written(body[result.operands[0]], body)
        case "dynamic-update-slice":
            return byte_count(body[result.operands[1]].shape)
        case "scatter":  # Adds to what is there.
            return 2 * byte_count(body[result.operands[-1]].shape)
    return byte_count(result.shape)
