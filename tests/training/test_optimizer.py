"""The optimizer against torch's AdamW, and what it leaves alone."""

import jax.numpy as jnp
import numpy as np
import optax
import torch

from t5g2.training.optimizer import OptimizerConfig, make_optimizer


def test_it_is_clipping_and_adamw_as_torch_has_them():
    config = OptimizerConfig(clip_norm=0.5, weight_decay=0.1)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(10)]

    params = {"q": jnp.asarray(start)}
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"q": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)

    reference = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW(
        [reference], lr=0.01, betas=(config.b1, config.b2), eps=config.eps, weight_decay=0.1
    )
    for gradient in gradients:
        reference.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([reference], 0.5)
        theirs.step()
    np.testing.assert_allclose(params["q"], reference.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_norms_and_the_end_of_image_embedding_do_not_decay():
    params = {
        "norm": {"scale": jnp.ones(3)},
        "embedder": {"eoi_embedding": jnp.ones(3), "table": jnp.ones((2, 3))},
    }
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), optax.constant_schedule(0.1))
    zeros = {
        "norm": {"scale": jnp.zeros(3)},
        "embedder": {"eoi_embedding": jnp.zeros(3), "table": jnp.zeros((2, 3))},
    }
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not updates["norm"]["scale"].any()
    assert not updates["embedder"]["eoi_embedding"].any()
    np.testing.assert_allclose(updates["embedder"]["table"], -0.05, rtol=1e-6)
