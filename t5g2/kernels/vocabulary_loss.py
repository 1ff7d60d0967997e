"""Cross-entropy over a large vocabulary without ever holding all logits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from t5g2.kernels.on_mesh import current_mesh, on_own_rows

# Rows of logits that exist at one time: 512 x 262,144 x 4 bytes = 512 MiB.
ROWS = 512


def logits(
    hidden: Float[Array, "... D"], table: Float[Array, "V D"], softcap: float | None
) -> Float[Array, "... V"]:
    """Output logits `hidden @ table.T` in float32, soft-capped if `softcap` is given."""
    out = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    return out if softcap is None else softcap * jnp.tanh(out / softcap)


def token_losses(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    rows: int = ROWS,
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target, in nats, float32.

    Logits are made `rows` tokens at a time and made again in the backward pass, so memory does not
    grow with `B * T * V`. The gradient, not the value, has `z_loss` times the square of the
    logarithm of the softmax's normaliser besides (PaLM, arXiv:2204.02311, section 5).

    Args:
        hidden: [B, T, D] final hidden states.
        table: [V, D] output embedding, in the dtype to multiply in.
        targets: [B, T] token ids.
        softcap: final logit soft-capping, or None.
        z_loss: see above; PaLM's is 1e-4.
        rows: tokens per tile.
    """

    def losses(table: Array, hidden: Array, targets: Array) -> Array:
        return _negative_log_likelihood(logits(hidden, table, softcap), targets, z_loss)

    return _in_tiles(losses, rows, table, hidden, targets)


def distilled_losses(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    teacher_hidden: Float[Array, "B T W"],
    teacher_table: Float[Array, "V W"],
    *,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    z_loss: float = 0.0,
    rows: int = ROWS,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Losses against the targets and against a teacher's distribution over the vocabulary.

    Args:
        hidden: as in `token_losses`, like what is not named here.
        table: as above.
        targets: as above.
        teacher_hidden: the teacher's final hidden states, of a width of their own.
        teacher_table: its output embedding.
        softcap: as above.
        teacher_softcap: the teacher's.
        z_loss: as above, of both.
        rows: as above.

    Returns:
        Negative log-likelihoods as by `token_losses`; and cross-entropies between the teacher's
        distribution and the model's, in nats, of which no gradient flows into the teacher.
    """

    def losses(
        tables: tuple[Array, Array], hidden: Array, targets: Array, teacher_hidden: Array
    ) -> tuple[Array, Array]:
        table, teacher_table = tables
        own = logits(hidden, table, softcap)
        teacher = jax.nn.softmax(logits(teacher_hidden, teacher_table, teacher_softcap), axis=-1)
        expected = jnp.sum(jax.lax.stop_gradient(teacher) * own, axis=-1)
        losses = _negative_log_likelihood(own, targets, z_loss)
        return losses, _log_normaliser(own, z_loss) - expected

    return _in_tiles(losses, rows, (table, teacher_table), hidden, targets, teacher_hidden)


def _negative_log_likelihood(
    logits: Float[Array, "N V"], targets: Int[Array, " N"], z_loss: float
) -> Float[Array, " N"]:
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return _log_normaliser(logits, z_loss) - picked


def _log_normaliser(logits: Float[Array, "N V"], z_loss: float) -> Float[Array, " N"]:
    """log(Z) of the softmax, with the gradient of log(Z) + z_loss * log(Z)**2."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    if not z_loss:
        return log_z
    besides = z_loss * log_z**2
    return log_z + besides - jax.lax.stop_gradient(besides)


def _in_tiles(
    function: Callable[..., Any], rows: int, tables: Any, *arrays: Shaped[Array, "B T ..."]
) -> Any:
    """Applies a function of flat tokens to `rows` of them at a time, again in the backward pass.

    On a mesh each device makes tiles of its own tokens: XLA would split a tile of all tokens, which
    are one device's, by the width, and add up logits between the devices.

    Args:
        function: of the tables and [N, ...] arrays; gives a tree of [N] arrays.
        rows: tokens per tile, at most.
        tables: what all tiles share.
        *arrays: of all tokens.

    Returns:
        The function's tree, of [B, T] arrays.
    """
    tiled = functools.partial(_own_tiles, function, rows)
    return on_own_rows(tiled, current_mesh())(tables, *arrays)


def _own_tiles(function: Callable[..., Any], rows: int, tables: Any, *arrays: Array) -> Any:
    """`_in_tiles` on one device."""
    batch, length = arrays[0].shape[:2]
    count = batch * length
    tiles = -(-count // rows)
    rows = -(-count // tiles)  # as even as can be, so that padding is at most tiles - 1 rows

    def tiled(array: Array) -> Array:
        flat = array.reshape(count, *array.shape[2:])
        padded = jnp.pad(flat, ((0, tiles * rows - count), *[(0, 0)] * (flat.ndim - 1)))
        return padded.reshape(tiles, rows, *array.shape[2:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tile(_: None, x: tuple[Array, ...]) -> tuple[None, Any]:
        return None, function(tables, *x)

    _, out = jax.lax.scan(tile, None, tuple(map(tiled, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(batch, length), out)
