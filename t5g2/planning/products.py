"""Products that each device computes, read from XLA's text of a compiled program.

A program that is split badly computes the same on several devices; that shows only here.
"""

import collections
import math
import re
from typing import NamedTuple

from t5g2.planning.hlo import computations, dimensions

# The first array of a tuple is a library's result, the other what it works in.
_SHAPE = re.compile(r"^\s*(?:ROOT )?%(\S+) = \(?[a-z]\w*\[([\d,]*)\]")
_DOT = re.compile(r" dot\(%([^\s,]+), .*lhs_contracting_dims=\{([\d,]*)\}")
_CUBLAS = re.compile(
    r" custom-call\(%([^\s,]+), .*custom_call_target=\"__cublas.*"
    r"\"lhs_contracting_dimensions\":\[([\d,\"]*)\]"
)
_CONVOLUTION = re.compile(r" convolution\(%([^\s,]+), %([^\s,)]+)\)")
# XLA names what it makes again after what it made: %fusion.7.remat2. It may make that nowhere else.
_NAME = re.compile(r"^\s*(?:ROOT )?%(?P<name>(?P<original>[^\s=]+?)(?:\.remat\d*)*) = ")
_FUSED = re.compile(r" fusion\(.*\bcalls=%([^\s,]+)")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


class Products(NamedTuple):
    """FLOPs of all products that one device computes.

    Attributes:
        flops: of all of them.
        again: of those that XLA itself chose to make twice, to spare memory.
    """

    flops: int
    again: int


def device_products(text: str) -> Products:
    """Counts a compiled program's products, those in a loop as often as it turns.

    TPU's products are convolutions, whose windows stand for the axes of a batch. GPU's are dots
    within fusions, or calls of cuBLAS.
    """
    parts = computations(text)
    once = {name: _products(lines) for name, lines, _ in parts}
    total = sum(times * sum(once[name].values()) for name, _, times in parts)
    again = 0
    for name, lines, times in parts:
        copies: dict[str, list[int]] = collections.defaultdict(list)
        for line in lines:
            if match := _NAME.match(line):
                fused = _FUSED.search(line)
                inside = sum(once[fused[1]].values()) if fused else 0
                copies[match["original"]].append(inside + once[name].get(match["name"], 0))
        # Of what is made at several places one is not made again.
        again += times * sum(sum(flops[1:]) for flops in copies.values())
    return Products(total, again)


def _products(lines: list[str]) -> dict[str, int]:
    """FLOPs of a computation's own products, by the names of their results."""
    found = {}
    sizes: dict[str, list[int]] = {}
    for line in lines:
        if match := _SHAPE.match(line):
            sizes[match[1]] = list(dimensions(match[2]))
            if dot := _DOT.search(line) or _CUBLAS.search(line):
                axes = dimensions(dot[2].replace('"', ""))
                contracted = [sizes[dot[1]][axis] for axis in axes]
                found[match[1]] = 2 * math.prod(sizes[match[1]]) * math.prod(contracted)
            elif convolution := _CONVOLUTION.search(line):
                left, right = sizes[convolution[1]], sizes[convolution[2]]
                found[match[1]] = _convolution(line, left, right, sizes[match[1]])
    return found


def _convolution(line: str, left: list[int], right: list[int], out: list[int]) -> int:
    """2 x batch x features in and out x pairs of a place and a part of the window over it."""
    labels = _LABELS.search(line)
    assert labels is not None
    inputs, kernel, result = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (left, right, out), strict=True)
    )
    flops = 2 * result["b"] * result["f"] * kernel["i"]
    for axis in range(len(left) - 2):
        place = str(axis)
        options = {
            name: int(values.split("x")[axis].split("_")[0])
            for name, values in re.findall(
                r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)", line
            )
        }
        flops *= _pairs(inputs[place], kernel[place], result[place], options)
    return flops


def _pairs(inputs: int, kernel: int, outputs: int, options: dict[str, int]) -> int:
    """How many parts of the window, at all its places, lie on a number, not beside or between."""
    stride, dilation = options.get("stride", 1), options.get("rhs_dilate", 1)
    spread, padding = options.get("lhs_dilate", 1), options.get("pad", 0)
    positions = (
        place * stride + part * dilation - padding
        for place in range(outputs)
        for part in range(kernel)
    )
    return sum(p >= 0 and p % spread == 0 and p // spread < inputs for p in positions)
