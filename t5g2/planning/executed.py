"""Products that a traced program really multiplies: with loops, recomputation and masked blocks."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

# Of the splash kernels' leading arguments, what each block of their grid has to do; 0: nothing.
_BLOCK_MASK = 1


class Executed(NamedTuple):
    """What a program multiplies, on all devices together.

    Attributes:
        flops: 2 m k n of every product [m, k] x [k, n].
        bytes: of the factors and the results of all products.
        in_kernels: FLOPs of those in kernels, which XLA does not see.
    """

    flops: int = 0
    bytes: int = 0
    in_kernels: int = 0

    def plus(self, other: "Executed", times: int = 1) -> "Executed":
        """This and `times` the other."""
        return Executed(*(mine + times * more for mine, more in zip(self, other, strict=True)))


def executed(jaxpr: Jaxpr | ClosedJaxpr) -> Executed:
    """Counts the products of a jaxpr, those in a loop as often as it runs.

    Products whose results nothing needs do not count: XLA drops them, too. Recomputation has such,
    of what a policy of `jax.checkpoint` keeps. Of a conditional its largest branch counts: the
    model has none but those for a platform. A kernel's products are what its `cost_estimate` says;
    without one they count once for each of its blocks, of the splash kernels for each that the mask
    does not hide. In place of their bytes its arguments and results count.

    Raises:
        NotImplementedError: a loop without a known number of turns multiplies, or the mask of a
            splash kernel is no constant.
    """
    return _count(jaxpr, [])[0]


def _count(jaxpr: Jaxpr | ClosedJaxpr, known: list[Any]) -> tuple[Executed, list[Any]]:
    """Products of a jaxpr, and which of its results are constants.

    A constant is known by its value on one device, in one turn of a loop: as such it passes
    through `shard_map`, through calls, and as something that a loop is given or hands out.

    Args:
        jaxpr: the program.
        known: its arguments, None where they are no constants; of another number: none is known.
    """
    total = Executed()
    values: dict[Any, Any] = {}
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    if isinstance(jaxpr, ClosedJaxpr):
        values.update(zip(inner.constvars, jaxpr.consts, strict=True))
    if len(known) == len(inner.invars):
        values.update(zip(inner.invars, known, strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values.get(variable)

    for equation in _needed(inner):
        name, params = equation.primitive.name, equation.params
        given = [value(variable) for variable in equation.invars]
        if name == "dot_general":
            total = total.plus(_product(equation))
        elif name == "pallas_call":
            if (estimate := params["cost_estimate"]) is None:
                flops = _blocks(equation, given) * executed(params["jaxpr"]).flops
            else:
                flops = estimate.flops
            size = _bytes([*equation.invars, *equation.outvars])
            total = total.plus(Executed(flops, size, flops))
        elif name == "cond":
            total = total.plus(max(_count(branch, given[1:])[0] for branch in params["branches"]))
        elif name == "while":
            if executed(params["body_jaxpr"]).flops:
                raise NotImplementedError("products in a loop whose number of turns is not known")
        else:
            turns, carried = 1, 0
            if name == "scan":
                turns = params["length"]
                constants, carried = _scan_arguments(params)
                given[constants : constants + carried] = [None] * carried
            if name == "shard_map":  # Its shapes are those of one device's part.
                # The parameter's name depends on jax's version.
                axes = params.get("newly_manual_axes") or params["manual_axes"]
                turns = math.prod(params["mesh"].shape[axis] for axis in axes)
            for part in _subprograms(params):
                products, results = _count(part, given)
                total = total.plus(products, turns)
                if len(results) == len(equation.outvars):
                    values.update(zip(equation.outvars[carried:], results[carried:], strict=True))
    return total, [value(variable) for variable in inner.outvars]


def _blocks(kernel: Any, given: list[Any]) -> int:
    """Blocks that a kernel works on: those of its grid, but for what splash's mask hides."""
    params = kernel.params
    mapping = params["grid_mapping"]
    blocks = math.prod(mapping.grid)
    # Without a mask splash has no arguments that say what to do.
    if not (params["name"] or "").startswith("splash_") or not mapping.num_index_operands:
        return blocks
    mask = given[_BLOCK_MASK]
    if mask is None or mask.shape != kernel.invars[_BLOCK_MASK].aval.shape:
        raise NotImplementedError(f"{params['name']} with a mask that is not known")
    # All heads of all rows have the same mask, or each head its own.
    return int(np.count_nonzero(mask)) * blocks // mask.size


def _needed(jaxpr: Jaxpr) -> list[Any]:
    """The equations whose results, or effects, are used."""
    used = {v for v in jaxpr.outvars if isinstance(v, Var)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            used.update(v for v in equation.invars if isinstance(v, Var))
            needed.append(equation)
    return needed[::-1]


def _scan_arguments(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's arguments are the same in every turn, and how many next are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # In jax 0.12, a tree of what is constant, carried, and taken in parts.
    constants, carried, _ = params["ft_in"].unpack()
    return len(list(constants)), len(list(carried))


def _subprograms(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr)))
    return [leaf for leaf in leaves if isinstance(leaf, (Jaxpr, ClosedJaxpr))]


def _product(equation: Any) -> Executed:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, (out,) = equation.invars[0], equation.outvars
    flops = 2 * out.aval.size * math.prod(left.aval.shape[axis] for axis in contracted)
    return Executed(flops, _bytes([*equation.invars, out]))


def _bytes(variables: list[Any]) -> int:
    arrays: list[Any] = [v.aval for v in variables if isinstance(v, Var)]
    return sum(array.size * array.dtype.itemsize for array in arrays)
