"""Generation with a key-value cache: greedy or sampled, all at once or token by token.

Local decoder layers cache only their window, as a ring; global layers cache everything generated.
The encoder's keys and values are projected once per layer. Batch and lengths are padded up to
powers of two, so prompts of similar size share one compiled program.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from t5g2.errors import UserError
from t5g2.kernels import vocabulary_loss
from t5g2.kernels.attention import KeyValues
from t5g2.models.attention import decoder_window
from t5g2.models.layers import Embedder, RMSNorm
from t5g2.models.stack import Layer, Tokens, rotations
from t5g2.models.t5gemma2 import T5Gemma2
from t5g2.models.vision import images_by_row

# Prompts and outputs shorter than this share a program with those of this length.
SHORTEST = 16

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its distribution.

    The filters apply in the order temperature, top-k, top-p.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample among the k most likely tokens (and those that tie with the k-th).
        top_p: sample among the fewest most likely tokens whose probabilities sum to at least this.
        seed: of the random streams, one per row.

    Raises:
        UserError: a value is out of range, or a filter is asked for at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be between 0 and 2**32 - 1, not {self.seed}")
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise UserError("top_k and top_p do nothing at temperature 0: set temperature as well")


GREEDY = Sampling()


class Decoder(NamedTuple):
    """What every step reads and none changes: weights in the dtype of `config`, encoder keys."""

    embedder: Embedder
    layers: tuple[Layer, ...]
    final_norm: RMSNorm
    memory: tuple[KeyValues, ...]


Cache = tuple[KeyValues, ...]
"""Per layer, [B, C, K, N] keys and values generated so far; a free slot has segment id 0."""


class _State(NamedTuple):
    """What a step hands to the next: how many tokens there are, the last of each row, the cache."""

    step: Int[Array, ""]
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    cache: Cache


class _Choice(NamedTuple):
    """`Sampling` as arrays, so that other values need no new program; keys None means greedy."""

    eos_ids: Int[Array, " E"]
    keys: Key[Array, " B"] | None
    temperature: Float[Array, ""] | None
    top_p: Float[Array, ""] | None


class _Prompts(NamedTuple):
    """A batch padded to its bucket: rows beyond the caller's are not `live`."""

    input_ids: Int[Array, "B S"]
    attention_mask: Int[Array, "B S"]
    live: Bool[Array, " B"]
    images: Shaped[Array, "B I size size 3"] | None


def _cast(module: ModuleT, dtype: str) -> ModuleT:
    """`module` with its weights in `dtype`; norms multiply in float32, so their scales stay."""
    graph, state = nnx.split(module)
    cast = nnx.map_state(
        lambda path, p: p if path[-1] == "scale" else p.replace(p[...].astype(dtype)), state
    )
    return nnx.merge(graph, cast)


def prefill(
    model: T5Gemma2,
    input_ids: Int[Array, "B S"],
    attention_mask: Int[Array, "B S"],
    capacity: int,
    images: Shaped[Array, "B I size size 3"] | None = None,
) -> tuple[Decoder, Cache]:
    """Encodes the prompts and makes an empty cache for `capacity` decoder positions.

    Args:
        model: the model; its weights are cast and unstacked here, once, not in every step.
        input_ids: encoder tokens.
        attention_mask: 1 for real encoder tokens, 0 for padding.
        capacity: decoder positions to make room for; static under jit.
        images: of each row, if any; see `T5Gemma2.visual_tokens`.
    """
    config, batch = model.config, input_ids.shape[0]
    positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    visual = None if images is None else model.visual_tokens(images)
    memory = model.encode(input_ids, Tokens(attention_mask, positions), visual)
    layers = tuple(_cast(model.decoder, config.dtype).unstacked())
    embedder = _cast(model.embedder, config.dtype)

    def empty(layer: int) -> KeyValues:
        left = decoder_window(config, config.is_global(layer)).left
        slots = capacity if left is None else min(left + 1, capacity)
        states = jnp.zeros((batch, slots, config.num_kv_heads, config.head_dim), config.dtype)
        nowhere = jnp.zeros((batch, slots), jnp.int32)
        return KeyValues(states, states, nowhere, nowhere)

    decoder = Decoder(
        embedder, layers, model.decoder.final_norm, tuple(layer.memory(memory) for layer in layers)
    )
    return decoder, tuple(empty(i) for i in range(config.num_layers))


def next_logits(
    decoder: Decoder, token: Int[Array, " B"], step: Int[Array, ""], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Float32 logits of what follows `token`, the decoder's input at position `step`.

    Returns:
        The logits, and the cache with this position in the slot of the oldest.
    """
    config = decoder.embedder.config
    position = jnp.full((token.shape[0], 1), step, jnp.int32)
    tokens = Tokens(jnp.ones_like(position), position)
    rotate = rotations(config, position)
    x = decoder.embedder(token[:, None])
    extended: list[KeyValues] = []

    def extend(slots: KeyValues, new: KeyValues) -> KeyValues:
        slot = step % slots.key.shape[1]
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
        extended.append(jax.tree.map(write, slots, new))
        return extended[-1]

    for i, layer in enumerate(decoder.layers):
        is_global = config.is_global(i)
        x = layer(
            x,
            tokens,
            rotate[is_global],
            decoder_window(config, is_global),
            decoder.memory[i],
            functools.partial(extend, cache[i]),
        )
    hidden = decoder.final_norm(x)[:, 0]
    table = decoder.embedder.output_table()
    return vocabulary_loss.logits(hidden, table, config.final_logit_softcap), tuple(extended)


def filter_logits(
    logits: Float[Array, "B V"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> Float[Array, "B V"]:
    """Logits of the distribution to sample from: excluded tokens get -inf.

    Args:
        logits: float32.
        temperature: divisor, above 0.
        top_k: as in `Sampling`; static under jit, at most V.
        top_p: as in `Sampling`, below 1; of the distribution that `top_k` leaves.
    """
    logits = logits / temperature
    if top_k is None and top_p is None:
        return logits
    ranked = jax.lax.top_k(logits, logits.shape[-1] if top_k is None else top_k)[0]
    if top_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        more_likely = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(more_likely < top_p, ranked, jnp.inf)
    least = jnp.min(ranked, axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def _advance(decoder: Decoder, state: _State, choice: _Choice, top_k: int | None) -> _State:
    """One decoder step: `state.token` becomes the token that follows, or pad in finished rows."""
    logits, cache = next_logits(decoder, state.token, state.step, state.cache)
    if choice.keys is None or choice.temperature is None:
        token = jnp.argmax(logits, axis=-1)
    else:
        logits = filter_logits(
            logits, temperature=choice.temperature, top_k=top_k, top_p=choice.top_p
        )
        # A draw depends on nothing but the row's stream, the step and the row's logits.
        keys = jax.vmap(jax.random.fold_in, (0, None))(choice.keys, state.step)
        token = jax.vmap(jax.random.categorical)(keys, logits)
    token = jnp.where(state.done, decoder.embedder.config.pad_id, token).astype(jnp.int32)
    return _State(state.step + 1, token, state.done | jnp.isin(token, choice.eos_ids), cache)


def _start(model: T5Gemma2, prompts: _Prompts, capacity: int) -> tuple[Decoder, _State]:
    decoder, cache = prefill(
        model, prompts.input_ids, prompts.attention_mask, capacity, prompts.images
    )
    bos = jnp.full_like(prompts.live, model.config.bos_id, dtype=jnp.int32)
    return decoder, _State(jnp.zeros((), jnp.int32), bos, ~prompts.live, cache)


def _run(
    model: T5Gemma2,
    prompts: _Prompts,
    choice: _Choice,
    limit: Int[Array, ""],
    capacity: int,
    top_k: int | None,
) -> Int[Array, "B C"]:
    """Encodes, then decodes until every row is done or `limit` tokens are there."""
    decoder, state = _start(model, prompts, capacity)
    tokens = jnp.full((state.token.shape[0], capacity), model.config.pad_id, jnp.int32)

    def unfinished(carry: tuple[_State, Array]) -> Array:
        return (carry[0].step < limit) & ~jnp.all(carry[0].done)

    def body(carry: tuple[_State, Array]) -> tuple[_State, Array]:
        state = _advance(decoder, carry[0], choice, top_k)
        return state, carry[1].at[:, state.step - 1].set(state.token)

    return jax.lax.while_loop(unfinished, body, (state, tokens))[1]


# Compiled once per bucket of shapes and per `top_k`.
_jit_run = jax.jit(_run, static_argnames=("capacity", "top_k"))
_jit_start = jax.jit(_start, static_argnames="capacity")
_jit_advance = jax.jit(_advance, static_argnames="top_k", donate_argnames="state")


def bucket(size: int, smallest: int) -> int:
    """The smallest power of two that holds `size`, and is at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def _prepare(
    model: T5Gemma2,
    input_ids: Int[Array | np.ndarray, "B S"],
    attention_mask: Int[Array | np.ndarray, "B S"] | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    streams: Int[Array | np.ndarray, " B"] | None,
    images: Shaped[Array | np.ndarray, "M size size 3"] | None,
) -> tuple[_Prompts, _Choice]:
    """Checks the arguments of `generate` and pads them to their bucket, on the host."""
    ids, vocab_size = np.asarray(input_ids), model.config.vocab_size
    mask = np.ones(ids.shape) if attention_mask is None else np.asarray(attention_mask)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"input_ids must be integers [batch, length], not empty, not {ids.dtype} {ids.shape}"
        )
    if mask.shape != ids.shape:
        raise UserError(f"attention_mask {mask.shape} must have input_ids' shape {ids.shape}")
    for name, values in (("input_ids", ids), ("eos_ids", np.asarray(eos_ids, np.int64))):
        outside = values[(values < 0) | (values >= vocab_size)]
        if outside.size:
            raise UserError(f"{name}: {outside[0]} is no token of a vocabulary of {vocab_size}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if sampling.top_k is not None and sampling.top_k > vocab_size:
        raise UserError(f"top_k ({sampling.top_k}) exceeds the vocabulary of {vocab_size}")
    rows = ids.shape[0]
    numbers = np.arange(rows) if streams is None else np.asarray(streams)
    if numbers.shape != (rows,):
        raise UserError(f"streams must have one number for each of {rows} rows: {numbers.shape}")
    extra = bucket(rows, 1) - rows
    beyond = ((0, extra), (0, bucket(ids.shape[1], SHORTEST) - ids.shape[1]))
    choice = _Choice(jnp.asarray(eos_ids, jnp.int32), None, None, None)
    if sampling.temperature > 0:
        key = jax.random.key(np.uint32(sampling.seed))
        padded = np.pad(numbers, (0, extra)).astype(np.uint32)
        choice = choice._replace(
            keys=jax.vmap(jax.random.fold_in, (None, 0))(key, padded),
            temperature=jnp.asarray(sampling.temperature, jnp.float32),
            top_p=None if sampling.top_p in (None, 1.0) else jnp.float32(sampling.top_p),
        )
    prompts = _Prompts(
        jnp.asarray(np.pad(ids, beyond), jnp.int32),
        jnp.asarray(np.pad(mask != 0, beyond), jnp.int32),
        jnp.asarray(np.arange(rows + extra) < rows),
        None,
    )
    if images is not None:
        slots = images_by_row(model.config, ids, np.asarray(images))
        spare = bucket(slots.shape[1], 1) - slots.shape[1]
        padding = ((0, extra), (0, spare), (0, 0), (0, 0), (0, 0))
        prompts = prompts._replace(images=jnp.asarray(np.pad(slots, padding)))
    return prompts, choice


def generate(
    model: T5Gemma2,
    input_ids: Int[Array | np.ndarray, "B S"],
    attention_mask: Int[Array | np.ndarray, "B S"] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: tuple[int, ...],
    streams: Int[Array | np.ndarray, " B"] | None = None,
    images: Shaped[Array | np.ndarray, "M size size 3"] | None = None,
) -> Int[np.ndarray, "B T"]:
    """Generates up to `max_new_tokens` tokens for each row, in one compiled program.

    Args:
        model: the model.
        input_ids: encoder tokens.
        attention_mask: 1 for real encoder tokens, 0 for padding on either side; None: all real.
        max_new_tokens: T.
        sampling: how tokens are chosen.
        eos_ids: tokens that end a row (they are part of the output).
        streams: number of each row's random stream; 0, 1, ... by default. Numbering the prompts of
            a file makes their samples independent of how they are batched.
        images: bytes, or floats in [-1, 1], in the order of their places in the rows.

    Returns:
        int32 token ids, without the leading bos; pad after a row's end.

    Raises:
        UserError: an argument has the wrong shape or is out of range.
    """
    prompts, choice = _prepare(
        model, input_ids, attention_mask, max_new_tokens, sampling, eos_ids, streams, images
    )
    capacity = bucket(max_new_tokens, SHORTEST)
    tokens = _jit_run(model, prompts, choice, np.int32(max_new_tokens), capacity, sampling.top_k)
    return np.asarray(tokens)[: len(input_ids), :max_new_tokens]


def stream(
    model: T5Gemma2,
    input_ids: Int[Array | np.ndarray, "B S"],
    attention_mask: Int[Array | np.ndarray, "B S"] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: tuple[int, ...],
    streams: Int[Array | np.ndarray, " B"] | None = None,
    images: Shaped[Array | np.ndarray, "M size size 3"] | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the columns of what `generate` returns as they come, until every row is done.

    Arguments and errors are those of `generate`; errors are raised by the call itself.
    """
    prompts, choice = _prepare(
        model, input_ids, attention_mask, max_new_tokens, sampling, eos_ids, streams, images
    )

    def columns() -> Iterator[Int[np.ndarray, " B"]]:
        decoder, state = _jit_start(model, prompts, bucket(max_new_tokens, SHORTEST))
        for _ in range(max_new_tokens):
            state = _jit_advance(decoder, state, choice, sampling.top_k)
            # A copy: the next step reuses the state's memory.
            yield np.array(state.token)[: len(input_ids)]
            if np.all(state.done):
                return

    return columns()
