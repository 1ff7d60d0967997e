"""Products that a traced program really multiplies: with loops, recomputation and masked blocks."""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var


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

    Of a conditional its largest branch counts: the model has none but those for a platform. A
    kernel's products count once for each of its blocks, and in place of their bytes its arguments
    and results.

    Raises:
        NotImplementedError: a loop without a known number of turns multiplies.
    """
    total = Executed()
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for equation in inner.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total = total.plus(_product(equation))
        elif name == "pallas_call":
            blocks = math.prod(params["grid_mapping"].grid)
            flops = blocks * executed(params["jaxpr"]).flops
            size = _bytes([*equation.invars, *equation.outvars])
            total = total.plus(Executed(flops, size, flops))
        elif name == "cond":
            total = total.plus(max(executed(branch) for branch in params["branches"]))
        elif name == "while":
            if executed(params["body_jaxpr"]).flops:
                raise NotImplementedError("products in a loop whose number of turns is not known")
        else:
            turns = params["length"] if name == "scan" else 1
            if name == "shard_map":  # Its shapes are those of one device's part.
                # The parameter's name depends on jax's version.
                axes = params.get("newly_manual_axes") or params["manual_axes"]
                turns = math.prod(params["mesh"].shape[axis] for axis in axes)
            for part in _subprograms(params):
                total = total.plus(executed(part), turns)
    return total


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
