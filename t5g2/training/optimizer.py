"""The optimizer: a chain of optax transformations, which a skipped step leaves as they were."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

# Of a Muon update, so that AdamW's rates and decay serve (arXiv:2502.16982, section 2.2).
_MUON_RMS = 0.2
# The axes that a weight of the layers, which are stacked on the first, multiplies and gives.
_MUON_AXES = {
    **dict.fromkeys(("q", "k", "v"), optax.contrib.MuonDimensionNumbers((1,), (2, 3))),
    "o": optax.contrib.MuonDimensionNumbers((1, 2), (3,)),
    **dict.fromkeys(("gate", "up", "down"), optax.contrib.MuonDimensionNumbers((1,), (2,))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Global-norm clipping, an optimizer, decoupled weight decay.

    Attributes:
        name: 'adamw', the recipe's; 'adafactor', as T5 was trained: second moments factored, no
            first ones, updates in proportion to a layer's weights, hence another learning rate
            (about 0.01); 'muon' for the layers' matrices, AdamW for the rest, at AdamW's rates.
        b1: decay of the first moment; of Muon's momentum `momentum`.
        b2: decay of the second moment; Adafactor's is 1 - step**-0.8.
        eps: added to the root of the second moment.
        momentum: Muon's.
        weight_decay: decoupled; norms and the end-of-image embedding are exempt.
        clip_norm: the gradient of the mean loss is scaled down to this global norm.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, not {self.clip_norm}")


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Clipping, then the optimizer at the schedule's rate.

    Its `update` takes `share` besides, which the gradients are to be multiplied by before all, and
    `skipped`, a bool scalar: where that is true, the state, with the schedule's count, keeps its
    bits, and the updates mean nothing.
    """
    made = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}[config.name]
    return optax.chain(_clip_by_global_norm(config.clip_norm), made(config, schedule))


def select(skipped: Any, old: Any, new: Any) -> Any:
    """The old tree where a step is skipped, else the new one."""
    return jax.tree.map(lambda old, new: jnp.where(skipped, old, new), old, new)


def _kept(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of what knows nothing of skipped steps."""

    def update(
        updates: Any, state: Any, params: Any = None, *, skipped: Any = False, **_: Any
    ) -> tuple[Any, Any]:
        updates, new = inner.update(updates, state, params)
        return updates, select(skipped, state, new)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` and the share as one product, which XLA makes where it is read.

    Of a division, or a norm of what was multiplied, it would keep a second gradient.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, share: Any = 1.0, **_: Any
    ) -> tuple[Any, Any]:
        del params
        scale = share * jnp.minimum(1.0, limit / (share * optax.global_norm(updates)))
        return jax.tree.map(lambda update: update * scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose updates read the moments that are kept.

    Were they selected outside, XLA would hold old and new ones (docs/decisions/0007).
    """
    b1, b2 = config.b1, config.b2

    def update(
        updates: Any, state: Any, params: Any = None, *, skipped: Any = False, **_: Any
    ) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        new = select(skipped, state, optax.ScaleByAdamState(count, mu, nu))
        mu_hat = optax.tree.bias_correction(new.mu, b1, count)
        nu_hat = optax.tree.bias_correction(new.nu, b2, count)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mu_hat, nu_hat)
        return scaled, new

    init = optax.scale_by_adam(b1, b2, config.eps).init
    return optax.GradientTransformationExtraArgs(init, update)


def _adamw(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        _scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, _decayed),
        _kept(optax.scale_by_learning_rate(schedule)),
    )


def _adafactor(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Adafactor without momentum (Shazeer and Stern, arXiv:1804.04235, algorithm 4)."""
    return optax.chain(
        _kept(optax.scale_by_factored_rms()),
        _by_layer(optax.clip_by_block_rms(1.0)),
        _by_layer(optax.scale_by_param_block_rms()),
        optax.add_decayed_weights(config.weight_decay, _decayed),
        _kept(optax.scale_by_learning_rate(schedule)),
    )


def _muon(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    muon = optax.contrib.muon(
        schedule,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: _muon_axes(path), params
        ),
        consistent_rms=_MUON_RMS,
    )

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "adamw" if _muon_axes(path) is None else "muon", params
        )

    return optax.partition({"muon": _kept(muon), "adamw": _adamw(config, schedule)}, labels)


def _muon_axes(path: Sequence[Any]) -> optax.contrib.MuonDimensionNumbers | None:
    return _MUON_AXES.get(path[-1].key) if _is_stacked(path) else None


def _by_layer(stateless: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies what acts on each array as a whole to each layer of stacked ones alone."""

    def update(updates: Any, params: Any) -> Any:
        def one(update: jax.Array, param: jax.Array) -> jax.Array:
            return stateless.update(update, optax.EmptyState(), param)[0]

        return jax.tree_util.tree_map_with_path(
            lambda path, u, p: (jax.vmap(one) if _is_stacked(path) else one)(u, p), updates, params
        )

    return optax.stateless(update)


def _is_stacked(path: Sequence[Any]) -> bool:
    return any(entry.key == "layers" for entry in path)


def _decayed(params: Any) -> Any:
    def is_matrix(path: Any, _: Any) -> bool:
        return path[-1].key not in ("scale", "eoi_embedding")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
