"""The train step and the evaluation step: one jit each, over the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5g2.data.batch import empty_batch
from t5g2.data.packing import ImageSlots
from t5g2.kernels.layout import Layout, installed
from t5g2.models.config import ModelConfig
from t5g2.models.stack import Tokens
from t5g2.models.t5gemma2 import T5Gemma2, from_parameters, split_frozen
from t5g2.parallel.rules import batch_shardings, replicated
from t5g2.training.limits import NO_LIMITS, Limits, place
from t5g2.training.optimizer import select
from t5g2.training.state import TrainState
from t5g2.training.teacher import Teacher

DeviceBatch = dict[str, Array]


class LossSums(NamedTuple):
    """Sums over real tokens, by task; sums of two batches add up.

    Attributes:
        nll: negative log-likelihood of targets in nats, by task.
        targets: number of real target tokens, by task.
        inputs: number of real encoder tokens.
        distilled: with a teacher, the loss that is trained on, in nats, over all tasks.
    """

    nll: Float[Array, " tasks"]
    targets: Float[Array, " tasks"]
    inputs: Int[Array, ""]
    distilled: Float[Array, ""] | None = None


class EvalSums(NamedTuple):
    """What an evaluation step reports; sums of two batches add up.

    Attributes:
        sums: by task.
        nll: by position of the target in its example, in buckets 0, 1, 2-3, 4-7, ...
        targets: number of real target tokens in each of these buckets.
    """

    sums: LossSums
    nll: Float[Array, " buckets"]
    targets: Float[Array, " buckets"]


class StepMetrics(NamedTuple):
    """What a train step reports.

    Attributes:
        sums: losses and token counts of the batch.
        loss: mean over the batch's targets of what is trained on, in nats.
        grad_norm: global norm of the mean gradient, before clipping.
        skipped: whether the update was left out.
        digest: sum of the rows' checksums (mod 2**32): what the step was fed.
        param_norm: global norm of the parameters that train, after the step.
        update_norm: global norm of what the step added to them.
    """

    sums: LossSums
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    skipped: Bool[Array, ""]
    digest: UInt32[Array, ""]
    param_norm: Float[Array, ""]
    update_norm: Float[Array, ""]


def loss_sums(
    config: ModelConfig,
    params: Any,
    batch: DeviceBatch,
    num_tasks: int,
    teacher: Teacher | None = None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], LossSums]:
    """Summed loss of a packed batch, and its parts by task.

    Returns:
        The sum over targets, weighted, of what is trained on: their negative log-likelihoods, or,
        of those that `teacher` teaches, the cross-entropies with its distribution; `z_loss` acts on
        its gradient alone (see `vocabulary_loss.summed_losses`). And `LossSums`.
    """
    model, hidden = _decoded(config, params, batch)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    teaching = None
    if teacher is not None:
        taught_by, states = _decoded(teacher.config, teacher.params, batch)
        teaching = taught_by.teaching(states, teacher.teaches(targets))
    total, losses = model.summed_losses(hidden, targets, weights, z_loss, teaching)
    losses *= weights
    sums = _by_task(losses, batch, num_tasks)
    return total, sums._replace(distilled=None if teacher is None else total)


def _by_task(losses: Float[Array, "B T"], batch: DeviceBatch, num_tasks: int) -> LossSums:
    nll, targets = _sums_by(batch["decoder_task_ids"], num_tasks, losses, batch)
    return LossSums(nll, targets, inputs=jnp.sum(batch["encoder_segment_ids"] != 0))


def _sums_by(
    groups: Int[Array, "B T"], count: int, losses: Float[Array, "B T"], batch: DeviceBatch
) -> tuple[Float[Array, " groups"], Float[Array, " groups"]]:
    """Weighted losses and weights of target tokens, added up by group."""
    group = jax.nn.one_hot(groups, count, dtype=jnp.float32)
    weights = batch["decoder_loss_weights"]
    return jnp.einsum("bt,btk->k", losses, group), jnp.einsum("bt,btk->k", weights, group)


def eval_sums(config: ModelConfig, params: Any, batch: DeviceBatch, num_tasks: int) -> EvalSums:
    """Summed losses of a packed batch by task, and by the targets' positions in their examples."""
    model, hidden = _decoded(config, params, batch)
    losses = model.token_losses(hidden, batch["decoder_target_tokens"])
    losses *= batch["decoder_loss_weights"]
    positions = batch["decoder_positions"]
    # 0, 1, 2-3, 4-7, ...: the number of bits of a position.
    buckets = 32 - jax.lax.clz(positions)
    count = (positions.shape[1] - 1).bit_length() + 1
    by_position = _sums_by(buckets, count, losses, batch)
    return EvalSums(_by_task(losses, batch, num_tasks), *by_position)


def _decoded(
    config: ModelConfig, params: Any, batch: DeviceBatch
) -> tuple[T5Gemma2, Float[Array, "B T D"]]:
    """The model, and its final hidden states for a packed batch."""
    model = from_parameters(config, params)
    encoder = Tokens(batch["encoder_segment_ids"], batch["encoder_positions"])
    decoder = Tokens(batch["decoder_segment_ids"], batch["decoder_positions"])
    memory = model.encode(batch["encoder_input_tokens"], encoder, _visual_tokens(model, batch))
    return model, model.decode(batch["decoder_input_tokens"], decoder, memory)


def _visual_tokens(model: T5Gemma2, batch: DeviceBatch) -> Float[Array, "B N W"] | None:
    """The frozen tower's output: stored in the batch, made of its images, or None without any."""
    if "image_features" in batch:
        features = batch["image_features"].astype(model.config.dtype)
        return features.reshape(features.shape[0], -1, features.shape[-1])
    return model.visual_tokens(batch["images"]) if "images" in batch else None


def train_step(
    state: TrainState,
    batch: DeviceBatch,
    limits: Limits = NO_LIMITS,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    num_tasks: int,
    accumulation: int,
    teacher: Teacher | None = None,
    z_loss: float = 0.0,
) -> tuple[TrainState, StepMetrics]:
    """One update on one global batch.

    The loss is the mean over the real target tokens of the whole batch, however it is split into
    `accumulation` microbatches; clipping acts on that mean's gradient. Frozen parameters have no
    gradient, no optimizer state and no decay. Where loss or gradient are beyond `limits`, the
    parameters and the optimizer state (with the schedule's count) keep their bits; the step counts
    all the same.
    """
    trained, frozen = split_frozen(state.params)

    def loss(trained: Any, microbatch: DeviceBatch) -> tuple[Float[Array, ""], LossSums]:
        return loss_sums(config, {**trained, **frozen}, microbatch, num_tasks, teacher, z_loss)

    gradient = jax.grad(loss, has_aux=True)
    gradients, sums = _summed(functools.partial(gradient, trained), batch, accumulation)
    count = jnp.maximum(jnp.sum(sums.targets), 1.0)
    share = 1.0 / count
    mean = (jnp.sum(sums.nll) if sums.distilled is None else sums.distilled) / count
    norm = share * optax.global_norm(gradients)
    skipped = limits.exceeded(mean, norm)
    updates, opt_state = optimizer.update(
        gradients, state.opt_state, trained, share=share, skipped=skipped
    )
    new = select(skipped, trained, optax.apply_updates(trained, updates))
    digest = jnp.sum(batch["row_digest"], dtype=jnp.uint32)
    metrics = StepMetrics(
        sums,
        mean,
        norm,
        skipped,
        digest,
        param_norm=optax.global_norm(new),
        # Of the updates themselves, XLA would keep those, too.
        update_norm=optax.global_norm(jax.tree.map(jnp.subtract, new, trained)),
    )
    return TrainState(state.step + 1, {**new, **frozen}, opt_state), metrics


def _summed(function: Callable[[DeviceBatch], Any], batch: DeviceBatch, accumulation: int) -> Any:
    """The sum of a function's trees over `accumulation` microbatches, one after the other."""
    if accumulation == 1:
        return function(batch)
    # Strided, so that every device works on its own rows in each microbatch.
    microbatches = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), batch
    )
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, microbatch: DeviceBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    return jax.lax.scan(add, zeros, microbatches)[0]


def trace_train_step(
    layout: Layout,
    shapes: TrainState,
    shardings: TrainState,
    *,
    rows: int,
    room: tuple[int, int],
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    num_tasks: int,
    accumulation: int,
    images: ImageSlots | None = None,
    teacher: Teacher | None = None,
    z_loss: float = 0.0,
) -> jax.stages.Traced:
    """`train_step` for a layout, traced; its arguments are state, batch, limits and teacher.

    Args:
        layout: the mesh and its rules.
        shapes: of the train state.
        shardings: of the train state.
        rows: rows of the global batch (B).
        room: encoder and decoder tokens of a row (S, T).
        config: see `train_step`, as what follows.
        optimizer: as above.
        num_tasks: as above.
        accumulation: as above.
        images: room for images in a row.
        teacher: see `train_step`.
        z_loss: see `loss_sums`.
    """

    def step(
        state: TrainState, batch: DeviceBatch, limits: Limits, teacher: Teacher | None
    ) -> tuple[TrainState, StepMetrics]:
        with installed(layout):
            return train_step(
                state,
                batch,
                limits,
                config=config,
                optimizer=optimizer,
                num_tasks=num_tasks,
                accumulation=accumulation,
                teacher=teacher,
                z_loss=z_loss,
            )

    batch_shapes = jax.eval_shape(lambda: empty_batch(rows, *room, images))
    jitted = jax.jit(
        step,
        # A teacher lies where it lies.
        in_shardings=(
            shardings,
            batch_shardings(layout, batch_shapes),
            replicated(layout.mesh),
            None,
        ),
        out_shardings=(shardings, replicated(layout.mesh)),
        donate_argnums=0,
    )
    return jitted.trace(shapes, batch_shapes, NO_LIMITS, teacher)


def compile_train_step(
    layout: Layout, *args: Any, teacher: Teacher | None = None, **kwargs: Any
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """What `trace_train_step` gives, compiled: of state, which is consumed, batch and limits.

    Without limits (see `t5g2.training.limits.place`) every update is made.
    """
    compiled = trace_train_step(layout, *args, teacher=teacher, **kwargs).lower().compile()
    without = place(NO_LIMITS, layout.mesh)
    return lambda state, batch, limits=without: compiled(state, batch, limits, teacher)


def jit_eval_step(
    layout: Layout,
    params_shardings: Any,
    *,
    config: ModelConfig,
    num_tasks: int,
    accumulation: int,
) -> Callable[[Any, DeviceBatch], EvalSums]:
    """`eval_sums` of one batch, in `accumulation` microbatches, compiled for a layout.

    The batch lies as by `batch_shardings`.
    """

    def step(params: Any, batch: DeviceBatch) -> EvalSums:
        with installed(layout):
            sums = functools.partial(eval_sums, config, params, num_tasks=num_tasks)
            return _summed(sums, batch, accumulation)

    return jax.jit(
        step, in_shardings=(params_shardings, None), out_shardings=replicated(layout.mesh)
    )
