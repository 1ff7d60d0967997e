"""Cross-entropy over a large vocabulary without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    rows: int = ROWS,
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target, in nats, float32.

    Logits are made `rows` tokens at a time and made again in the backward pass, so memory does not
    grow with `B * T * V`.

    Args:
        hidden: [B, T, D] final hidden states.
        table: [V, D] output embedding, in the dtype to multiply in.
        targets: [B, T] token ids.
        softcap: final logit soft-capping, or None.
        rows: tokens per tile.
    """
    batch, length, width = hidden.shape
    count = batch * length
    tiles = -(-count // rows)
    rows = -(-count // tiles)  # as even as can be, so that padding is at most tiles - 1 rows
    pad = tiles * rows - count
    flat_hidden = jnp.pad(hidden.reshape(count, width), ((0, pad), (0, 0)))
    flat_targets = jnp.pad(targets.reshape(count), (0, pad))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tile(_: None, x: tuple[Array, Array]) -> tuple[None, Array]:
        tile_hidden, tile_targets = x
        tile_logits = logits(tile_hidden, table, softcap)
        picked = jnp.take_along_axis(tile_logits, tile_targets[:, None], axis=-1)[:, 0]
        return None, jax.nn.logsumexp(tile_logits, axis=-1) - picked

    tiled = (flat_hidden.reshape(tiles, rows, width), flat_targets.reshape(tiles, rows))
    _, losses = jax.lax.scan(tile, None, tiled)
    return losses.reshape(-1)[:count].reshape(batch, length)
