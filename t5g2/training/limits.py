"""Beyond which loss or gradient norm a step's update is left out: decided on the devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float

from t5g2.parallel.rules import replicated


class Limits(NamedTuple):
    """What a step is measured against; an input of the compiled step, so that it may change.

    Attributes:
        finite: bool scalar, whether what is not finite is left out.
        loss: float32 scalar, the largest mean loss in nats that is not left out; may be infinite.
        grad_norm: float32 scalar, and the largest norm of the gradient before clipping.
    """

    finite: Any
    loss: Any
    grad_norm: Any

    def exceeded(self, loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether the update of a step with these is left out."""
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        return (self.finite & ~finite) | (loss > self.loss) | (grad_norm > self.grad_norm)


NO_LIMITS = Limits(np.bool_(False), np.float32(np.inf), np.float32(np.inf))


def place(limits: Limits, mesh: Mesh | AbstractMesh) -> Limits:
    """Limits, the same in every process, on all devices."""

    def placed(value: Any) -> jax.Array:
        array = np.asarray(value)
        return jax.make_array_from_callback((), replicated(mesh), lambda _: array)

    return Limits(*map(placed, limits))
