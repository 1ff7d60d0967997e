"""The structure of a compiled program, read from XLA's text of it."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_CALL = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^\s,)]+)"
)
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([^\s,)]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%(?P<condition>[^\s,)]+), body=%(?P<body>[^\s,)]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"%(\S+) = [su]32\[\]\S* constant\((\d+)\)")
_COMPARE = re.compile(r"ROOT .* compare\(%(\S+), %(\S+?)\), direction=LT")
_INDEX = re.compile(r"\bindex=(\d+)")
_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<operands>[^()]*)(?P<attributes>.*)$"
)
_ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+\d+(?:[a-z]\w*)?)\[(?P<sizes>[\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
        name: of its result.
        shape: of its result, as XLA prints it.
        opcode: what it does.
        operands: names of what it does it to.
        attributes: all that is printed behind them.
        root: whether it is the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool

    @property
    def called(self) -> str:
        """Of a fusion or a call, the computation that says what it does."""
        match = _CALLED.search(self.attributes)
        assert match is not None
        return match[1]


class Array(NamedTuple):
    """An array in a shape: its type, as XLA names it, and its sizes."""

    type: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its elements, tiles aside."""
        bits = 8 if self.type == "pred" else int(re.findall(r"\d+", self.type)[0])
        return math.prod(self.sizes) * bits // 8


class Computation(NamedTuple):
    """A part of a program: a loop's body, a fusion, or the whole.

    Attributes:
        name: of the entry "".
        lines: its instructions.
        times: how often it runs.
    """

    name: str
    lines: list[str]
    times: int


def computations(text: str) -> list[Computation]:
    """All parts of a program.

    Raises:
        NotImplementedError: a loop that turns a number of times which the text does not tell.
    """
    bodies = _bodies(text)
    times = _multiplicities(bodies)
    return [Computation(name, lines, times[name]) for name, lines in bodies.items()]


def instructions(lines: Iterable[str]) -> Iterator[Instruction]:
    """The instructions of a computation."""
    for line in lines:
        if match := _INSTRUCTION.match(line):
            operands = re.findall(r"%([^\s,]+)", match["operands"])
            yield Instruction(
                match["name"],
                match["shape"],
                match["opcode"],
                operands,
                match["attributes"],
                match["root"] is not None,
            )


def inner(parts: Iterable[Computation]) -> set[str]:
    """Computations that are a part of one kernel: of a fusion, or what a reduction applies."""
    return {
        match[1]
        for part in parts
        for line in part.lines
        if " call(" not in line and (match := _CALLED.search(line))
    }


def arrays(shape: str) -> list[Array]:
    """The arrays in a shape as XLA prints it."""
    return [Array(m["type"], dimensions(m["sizes"])) for m in _ARRAY.finditer(shape)]


def dimensions(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    return tuple(int(size) for size in text.split(",") if size)


def byte_count(shape: str) -> int:
    """Bytes of all arrays in a shape."""
    return sum(array.bytes for array in arrays(shape))


def _bodies(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; that of the entry is ""."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            lines = bodies.setdefault("" if match["entry"] else match["name"], [])
        else:
            lines.append(line)
    return bodies


def _multiplicities(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    called: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            if "=%" not in line and "={%" not in line:
                continue
            turns = 1
            if match := _LOOP.search(line):
                turns = _trip_count(line, bodies[match["condition"]], bodies[match["body"]])
            callees = _CALL.findall(line)
            if branches := _BRANCHES.search(line):
                callees += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
            called[name] += [(callee, turns) for callee in callees]
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for callee, turns in called[name]:
            visit(callee, count * turns)

    visit("", 1)
    return times


def _trip_count(loop: str, condition: list[str], body: list[str]) -> int:
    """How often a loop turns: XLA knows, or it counts from 0 to the constant in its condition."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    bounds = _constants(condition)
    compared = [match.groups() for line in condition if (match := _COMPARE.search(line))]
    if len(compared) != 1 or compared[0][1] not in bounds:
        raise NotImplementedError(f"a loop of unknown length: {loop.strip()[:200]}")
    counter, bound = compared[0]
    return -(-bounds[bound] // _step(_elements(condition).get(counter), body))


def _step(place: int | None, body: list[str]) -> int:
    """What a turn adds to the counter at that place of a loop's state; 1 if it does not say.

    XLA unrolls the loops that it makes of products and exchanges: two turns in one.
    """
    made = {instruction.name: instruction for instruction in instructions(body)}
    result = next((i for i in made.values() if i.root and i.opcode == "tuple"), None)
    if place is None or result is None:
        return 1
    counter = made[result.operands[place]]
    if counter.opcode == "copy":
        counter = made[counter.operands[0]]
    if counter.opcode == "add":
        elements, constants = _elements(body), _constants(body)
        for one, other in itertools.permutations(counter.operands):
            if elements.get(one) == place and other in constants:
                return constants[other]
    return 1


def _constants(lines: list[str]) -> dict[str, int]:
    """The numbers among a computation's values, by their names."""
    return {m[1]: int(m[2]) for line in lines if (m := _BOUND.search(line))}


def _elements(lines: list[str]) -> dict[str, int]:
    """Which place of the computation's argument a value is, by its name."""
    return {
        instruction.name: int(match[1])
        for instruction in instructions(lines)
        if instruction.opcode == "get-tuple-element"
        and (match := _INDEX.search(instruction.attributes))
    }
