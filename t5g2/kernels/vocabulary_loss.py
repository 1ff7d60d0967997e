"""Cross-entropy over a large vocabulary without ever holding all logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from t5g2.kernels import layout as layouts
from t5g2.kernels.layout import LENGTH, ROWS, TABLE_AXES, Layout, on_shards

# Rows of logits that exist at one time: 512 x 262,144 x 4 bytes = 512 MiB.
TILE = 512


class Teaching(NamedTuple):
    """What a teacher says of the tokens; no gradient flows into it.

    Attributes:
        hidden: its final hidden states, of a width of their own.
        table: its output embedding, in the dtype to multiply in.
        teaches: targets that its distribution over the vocabulary replaces.
        softcap: its final logit soft-capping, or None.
    """

    hidden: Float[Array, "B T W"]
    table: Float[Array, "V W"]
    teaches: Bool[Array, "B T"]
    softcap: float | None


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
    rows: int = TILE,
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target, in nats, float32: to evaluate.

    Logits are made `rows` tokens at a time, so memory does not grow with `B * T * V`. A backward
    pass would make them again; to train, `summed_losses` makes them once.

    Args:
        hidden: [B, T, D] final hidden states.
        table: [V, D] output embedding, in the dtype to multiply in.
        targets: [B, T] token ids.
        softcap: final logit soft-capping, or None.
        rows: tokens per tile.
    """

    def local(table: Array, hidden: Array, targets: Array) -> Array:
        own = _gathered(table)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tile(_: None, x: tuple[Array, Array]) -> tuple[None, Array]:
            out = logits(x[0], own.rows, softcap)
            return None, own.logsumexp(out) - own.at_targets(out, x[1])

        return _in_tiles(tile, None, rows, hidden, targets)[1]

    layout = layouts.current()
    if layout is None:
        return local(table, hidden, targets)
    tokens = layout.spec(ROWS, LENGTH)
    inputs = (layout.parameter_spec(TABLE_AXES), tokens, tokens)
    return on_shards(local, layout, inputs, tokens)(table, hidden, targets)


def summed_losses(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    teaching: Teaching | None = None,
    rows: int = TILE,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """The loss that is trained on, with the gradient made in the same pass, and all tokens' losses.

    A token's loss is its target's negative log-likelihood or, where a teacher teaches, the
    cross-entropy between the teacher's distribution and the model's. Of the weights' gradient
    nothing is known, and of the second result's.

    The gradients of `hidden` and `table` are made of a tile of logits while they are there, `rows`
    tokens at a time: three products of the head's size, not four, and nothing to keep for the
    backward pass but those gradients. They have `z_loss` times the square of the logarithm of the
    softmax's normaliser besides (PaLM, arXiv:2204.02311, section 5); the value has not.

    Args:
        hidden: [B, T, D] final hidden states, in the dtype to multiply in.
        table: [V, D] output embedding, in the dtype to keep; its gradient is summed in float32.
        targets: [B, T] token ids.
        weights: [B, T] of the tokens in the sum.
        softcap: final logit soft-capping, or None.
        z_loss: see above; PaLM's is 1e-4.
        teaching: see above.
        rows: tokens per tile.

    Returns:
        The weighted sum in nats, and [B, T] negative log-likelihoods, float32.
    """
    given = _Given(targets, weights, *(() if teaching is None else teaching[:3]))
    head = _Head(softcap, z_loss, None if teaching is None else teaching.softcap, rows)
    return _summed(head, hidden, table, given)


class _Given(NamedTuple):
    """What the loss reads beside what it trains."""

    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    teacher_hidden: Float[Array, "B T W"] | None = None
    teacher_table: Float[Array, "V W"] | None = None
    teaches: Bool[Array, "B T"] | None = None


class _Head(NamedTuple):
    """What is known when the loss is traced."""

    softcap: float | None
    z_loss: float
    teacher_softcap: float | None
    rows: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(head: _Head, hidden: Array, table: Array, given: _Given) -> tuple[Array, Array]:
    total, losses = _on_devices(head, False, hidden, table, given)
    return total, losses


def _forward(head: _Head, hidden: Array, table: Array, given: _Given) -> tuple[Any, Any]:
    total, losses, *gradients = _on_devices(head, True, hidden, table, given)
    return (total, losses), gradients


def _backward(_: _Head, gradients: list[Array], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    return (*((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients), None)


_summed.defvjp(_forward, _backward)


def _on_devices(
    head: _Head, differentiate: bool, hidden: Array, table: Array, given: _Given
) -> tuple[Array, ...]:
    """Each device works on its own tokens.

    The vocabulary stays split over devices that have the same tokens. Over the others, which have
    tokens of their own, a table is gathered, once, and its gradient summed, once. Each device makes
    tiles of its own tokens: XLA would split a tile of all tokens by the width, and add up logits
    between the devices.

    Returns:
        As `summed_losses`, and with `differentiate` the gradients of `hidden` and `table`.
    """
    layout = layouts.current()
    local = functools.partial(_local, head, differentiate)
    if layout is None:
        return local(hidden, table, given)
    tokens, parts = layout.spec(ROWS, LENGTH), layout.parameter_spec(TABLE_AXES)
    specs: list[Any] = [tokens, tokens]
    if given.teaches is not None:
        specs += [tokens, parts, tokens]
    outputs = (PartitionSpec(), tokens) + ((tokens, parts) if differentiate else ())
    return on_shards(local, layout, (tokens, parts, _Given(*specs)), outputs)(hidden, table, given)


def _local(
    head: _Head, differentiate: bool, hidden: Array, table: Array, given: _Given
) -> tuple[Array, ...]:
    """`_on_devices`, of one device's tokens and its part of the tables."""
    own = _gathered(table.astype(hidden.dtype))
    teacher = None if given.teacher_table is None else _gathered(given.teacher_table)

    def tile(gradient: Array | None, x: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
        hidden, targets, weights, *taught = x
        out = logits(hidden, own.rows, head.softcap)
        log_z = own.logsumexp(out)
        losses = trained = log_z - own.at_targets(out, targets)
        if teacher is not None:
            likely = logits(taught[0], teacher.rows, head.teacher_softcap)
            likely = jnp.exp(likely - teacher.logsumexp(likely)[:, None])
            soft = log_z - own.sum(jnp.sum(likely * out, axis=-1))
            trained = jnp.where(taught[1], soft, losses)
        if gradient is None:
            return None, (trained * weights, losses)
        # Of log Z + z_loss (log Z)^2 - sum_v goal_v out_v, by out.
        goal = own.is_target(targets).astype(jnp.float32)
        if teacher is not None:
            goal = jnp.where(taught[1][:, None], likely, goal)
        scale = weights * (1.0 + 2.0 * head.z_loss * log_z)
        by_out = scale[:, None] * jnp.exp(out - log_z[:, None]) - weights[:, None] * goal
        if head.softcap is not None:
            by_out *= 1.0 - jnp.square(out / head.softcap)
        by_out = by_out.astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        by_hidden = product("nv,vd->nd", by_out, own.rows).astype(hidden.dtype)
        gradient += product("nv,nd->vd", by_out, hidden)
        return gradient, (trained * weights, losses, by_hidden)

    arrays = [hidden, given.targets, given.weights]
    if given.teacher_hidden is not None and given.teaches is not None:
        arrays += [given.teacher_hidden, given.teaches]
    zeros = own.zeros() if differentiate else None
    gradient, (trained, losses, *by_hidden) = _in_tiles(tile, zeros, head.rows, *arrays)
    total = jnp.sum(trained)
    if (layout := layouts.current()) is not None and layout.tokens():
        total = jax.lax.psum(total, layout.tokens())
    if not differentiate:
        return total, losses
    return total, losses, own.sum(by_hidden[0]), _scattered(gradient, table.dtype, hidden.dtype)


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

    def here(self, targets: Int[Array, " N"]) -> Int[Array, " N"]:
        """Their rows, which are none of these where other devices have them."""
        return targets - (jax.lax.axis_index(self.axes) * self.rows.shape[0] if self.axes else 0)

    def at_targets(
        self, logits: Float[Array, "N v"], targets: Int[Array, " N"]
    ) -> Float[Array, " N"]:
        """The targets' logits."""
        here = self.here(targets)
        mine = (here >= 0) & (here < self.rows.shape[0])
        places = jnp.where(mine, here, 0)[:, None]
        picked = jnp.take_along_axis(logits, places, axis=-1)[:, 0]
        return self.sum(jnp.where(mine, picked, 0.0))

    def is_target(self, targets: Int[Array, " N"]) -> Bool[Array, "N v"]:
        """Which rows are the targets."""
        return self.here(targets)[:, None] == jnp.arange(self.rows.shape[0])

    def zeros(self) -> Float[Array, "v D"]:
        """For a float32 gradient, which differs between devices as far as rows and tokens do."""
        zeros = jnp.zeros(self.rows.shape, jnp.float32)
        if (layout := layouts.current()) is None:
            return zeros
        return jax.lax.pcast(zeros, self.axes + layout.tokens(), to="varying")


class _Split(NamedTuple):
    """How a table lies on a mesh.

    Attributes:
        kept: axes that split the vocabulary between devices that have the same tokens.
        apart: and between devices that have tokens of their own, minor to those.
        width: axes that split its width.
        alike: axes of tokens that do not split it.
    """

    kept: tuple[str, ...]
    apart: tuple[str, ...]
    width: tuple[str, ...]
    alike: tuple[str, ...]

    @classmethod
    def of(cls, layout: Layout) -> "_Split":
        """Of the tables in a layout."""
        vocab, width = map(layout.axes, TABLE_AXES)
        apart = tuple(axis for axis in vocab if axis in layout.tokens())
        alike = tuple(axis for axis in layout.tokens() if axis not in apart + width)
        return cls(vocab[: len(vocab) - len(apart)], apart, width, alike)


def _gathered(table: Float[Array, "v d"]) -> _Table:
    """A table as a device multiplies its own tokens with it."""
    layout = layouts.current()
    if layout is None:
        return _Table(table)
    split = _Split.of(layout)
    for dim, axes in ((1, split.width), (0, split.apart)):
        if axes:
            table = jax.lax.all_gather(table, axes, axis=dim, tiled=True)
    # The gradient is to be summed over the others once, not tile by tile.
    return _Table(jax.lax.pcast(table, split.alike, to="varying"), split.kept)


def _scattered(gradient: Float[Array, "v D"], kept: Any, sent: Any) -> Float[Array, "v d"]:
    """The gradients of what `_gathered` gave the devices, summed, on those whose part it is.

    Args:
        gradient: float32.
        kept: dtype of the result.
        sent: dtype to sum in between devices.
    """
    if (layout := layouts.current()) is None:
        return gradient.astype(kept)
    split, gradient = _Split.of(layout), gradient.astype(sent)
    for dim, axes in ((0, split.apart), (1, split.width)):
        if axes:
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
    return (jax.lax.psum(gradient, split.alike) if split.alike else gradient).astype(kept)


def _in_tiles(
    function: Callable[..., Any], start: Any, rows: int, *arrays: Shaped[Array, "B T ..."]
) -> tuple[Any, Any]:
    """Applies a function of flat tokens to `rows` of them at a time.

    Args:
        function: of what is carried, and a tuple of [N, ...] arrays; to what is carried on, and a
            tree of [N, ...] arrays.
        start: what is carried at first.
        rows: tokens per tile, at most.
        *arrays: the arrays, of all tokens of a device.

    Returns:
        What is carried in the end, and the function's tree, of [B, T, ...] arrays.
    """
    batch, length = arrays[0].shape[:2]
    count = batch * length
    tiles = -(-count // rows)
    rows = -(-count // tiles)  # as even as can be, so that padding is at most tiles - 1 rows

    def tiled(array: Array) -> Array:
        flat = array.reshape(count, *array.shape[2:])
        padded = jnp.pad(flat, ((0, tiles * rows - count), *[(0, 0)] * (flat.ndim - 1)))
        return padded.reshape(tiles, rows, *array.shape[2:])

    carried, out = jax.lax.scan(function, start, tuple(map(tiled, arrays)))

    def whole(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:count].reshape(batch, length, *x.shape[2:])

    return carried, jax.tree.map(whole, out)
