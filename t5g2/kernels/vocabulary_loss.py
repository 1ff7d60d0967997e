"""Cross-entropy over a large vocabulary without ever holding all logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from t5g2.kernels import layout as layouts
from t5g2.kernels.layout import LENGTH, ROWS, TABLE_AXES, on_shards

# Rows of logits that exist at one time: 512 x 262,144 x 4 bytes = 512 MiB.
TILE = 512


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
    rows: int = TILE,
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

    def losses(table: _Table, hidden: Array, targets: Array) -> Array:
        return table.negative_log_likelihood(logits(hidden, table.rows, softcap), targets, z_loss)

    return _of_tokens(losses, rows, (table,), hidden, targets)


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
    rows: int = TILE,
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
        table: _Table, teacher_table: _Table, hidden: Array, targets: Array, teacher_hidden: Array
    ) -> tuple[Array, Array]:
        own = logits(hidden, table.rows, softcap)
        taught = logits(teacher_hidden, teacher_table.rows, teacher_softcap)
        teacher = jnp.exp(taught - table.logsumexp(taught)[:, None])
        expected = table.sum(jnp.sum(jax.lax.stop_gradient(teacher) * own, axis=-1))
        losses = table.negative_log_likelihood(own, targets, z_loss)
        return losses, table.log_normaliser(own, z_loss) - expected

    tables = (table, teacher_table)
    return _of_tokens(losses, rows, tables, hidden, targets, teacher_hidden)


class _Table(NamedTuple):
    """A device's part of an output embedding, or all of it.

    Attributes:
        rows: [v, D].
        axes: mesh axes whose devices have the other rows.
    """

    rows: Float[Array, "v D"]
    axes: tuple[str, ...] = ()

    def sum(self, x: Array) -> Array:
        """The sum of what the devices have found."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def logsumexp(self, logits: Float[Array, "N v"]) -> Float[Array, " N"]:
        """Of the logits of the whole vocabulary."""
        if not self.axes:
            return jax.nn.logsumexp(logits, axis=-1)
        top = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), self.axes)
        return top + jnp.log(self.sum(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)))

    def log_normaliser(self, logits: Float[Array, "N v"], z_loss: float) -> Float[Array, " N"]:
        """log(Z) of the softmax, with the gradient of log(Z) + z_loss * log(Z)**2."""
        log_z = self.logsumexp(logits)
        if not z_loss:
            return log_z
        besides = z_loss * log_z**2
        return log_z + besides - jax.lax.stop_gradient(besides)

    def negative_log_likelihood(
        self, logits: Float[Array, "N v"], targets: Int[Array, " N"], z_loss: float
    ) -> Float[Array, " N"]:
        count = self.rows.shape[0]
        here = targets - (jax.lax.axis_index(self.axes) * count if self.axes else 0)
        mine = (here >= 0) & (here < count)
        places = jnp.where(mine, here, 0)[:, None]
        picked = jnp.take_along_axis(logits, places, axis=-1)[:, 0]
        return self.log_normaliser(logits, z_loss) - self.sum(jnp.where(mine, picked, 0.0))


def _of_tokens(
    function: Callable[..., Any],
    rows: int,
    tables: tuple[Float[Array, "V ?D"], ...],
    *arrays: Shaped[Array, "B T ..."],
) -> Any:
    """A function of tables and flat tokens, by each device of its own tokens.

    The vocabulary stays split over devices that have the same tokens. Over the others, which have
    tokens of their own, a table is gathered, once. Each device makes tiles of its own tokens: XLA
    would split a tile of all tokens by the width, and add up logits between the devices.

    Args:
        function: `_Table`s and [N, ...] arrays to a tree of [N] arrays.
        rows: tokens per tile, at most.
        tables: output embeddings.
        *arrays: what is known of the tokens.

    Returns:
        The function's tree, of [B, T] arrays.
    """
    layout = layouts.current()
    if layout is None:
        whole = map(_Table, tables)
        return _in_tiles(functools.partial(function, *whole), rows, *arrays)
    vocab_axes, width_axes = map(layout.axes, TABLE_AXES)
    apart = tuple(axis for axis in vocab_axes if axis in layout.tokens())
    alike = tuple(axis for axis in layout.tokens() if axis not in apart + width_axes)
    kept = vocab_axes[: len(vocab_axes) - len(apart)]

    def gathered(table: Array) -> _Table:
        for dim, axes in ((1, width_axes), (0, apart)):
            if axes:
                table = jax.lax.all_gather(table, axes, axis=dim, tiled=True)
        # The gradient is to be summed over the others once, not tile by tile.
        return _Table(jax.lax.pcast(table, alike, to="varying"), kept)

    def local(tables: tuple[Array, ...], arrays: tuple[Array, ...]) -> Any:
        return _in_tiles(functools.partial(function, *map(gathered, tables)), rows, *arrays)

    tokens = layout.spec(ROWS, LENGTH)
    inputs = (layout.parameter_spec(TABLE_AXES), tokens)
    return on_shards(local, layout, inputs, tokens)(tables, arrays)


def _in_tiles(function: Callable[..., Any], rows: int, *arrays: Shaped[Array, "B T ..."]) -> Any:
    """Applies a function of flat tokens to `rows` of them at a time, again in the backward pass.

    Args:
        function: [N, ...] arrays to a tree of [N] arrays.
        rows: tokens per tile, at most.
        *arrays: its arguments, of all tokens of a device.

    Returns:
        The function's tree, of [B, T] arrays.
    """
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
        return None, function(*x)

    _, out = jax.lax.scan(tile, None, tuple(map(tiled, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(batch, length), out)
