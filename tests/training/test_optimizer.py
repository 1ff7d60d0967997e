"""The optimizers against torch's, what they leave alone, and where their state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AbstractMesh, PartitionSpec

from t5g2.models.config import ModelConfig
from t5g2.parallel.rules import MESH_AXES, make_layout
from t5g2.training.optimizer import OptimizerConfig, make_optimizer
from t5g2.training.state import state_shardings

NO_CLIPPING = 1e9


def updated(config, params, gradients, rate=0.01):
    """Parameters after a step with each of the gradients, trees like them."""
    optimizer = make_optimizer(config, optax.constant_schedule(rate))
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params


def stepped(make, start, gradients):
    """The same of one parameter, by torch."""
    reference = torch.nn.Parameter(torch.tensor(start))
    theirs = make([reference])
    for gradient in gradients:
        reference.grad = torch.tensor(gradient)
        theirs.step()
    return reference.detach().numpy()


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_it_is_clipping_and_adamw_as_torch_has_them():
    config = OptimizerConfig(clip_norm=0.5, weight_decay=0.1)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(10)]

    params = updated(config, {"q": start}, [{"q": gradient} for gradient in gradients])

    reference = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW(
        [reference], lr=0.01, betas=(config.b1, config.b2), eps=config.eps, weight_decay=0.1
    )
    for gradient in gradients:
        reference.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([reference], 0.5)
        theirs.step()
    np.testing.assert_allclose(params["q"], reference.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_its_state_and_its_updates_are_those_of_optax():
    config = OptimizerConfig(clip_norm=0.5)
    ours = make_optimizer(config, lambda step: 0.01 / (1 + step))
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda step: 0.01 / (1 + step), b1=config.b1, b2=config.b2, weight_decay=0.1),
    )
    params = {"q": random(4, 3)}
    # Checkpoints of either are read by the other.
    states = [ours.init(params), theirs.init(params)]
    for scale in (1.0, 0.01, 3.0):
        gradient = {"q": scale * random(3, 4).T}
        updates, states[0] = ours.update(gradient, states[0], params)
        expected, states[1] = theirs.update(gradient, states[1], params)
        found = (updates, states[0][1][0], states[0][1][2])
        reference = (expected, states[1][1][0], states[1][1][2])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), found, reference
        )


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


def test_adafactor_is_that_of_torch_in_each_layer_alone():
    start, gradients = 3 * random(2, 130, 140), [random(2, 130, 140) * 0.1 for _ in range(5)]
    config = OptimizerConfig(name="adafactor", weight_decay=0.1, clip_norm=NO_CLIPPING)
    ours = updated(config, {"layers": {"up": start}}, [{"layers": {"up": g}} for g in gradients])
    for layer in range(2):
        theirs = stepped(
            # torch takes no rate above 1 / sqrt(step), which 0.01 never is.
            lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1, eps=(1e-15, 1e-3)),
            start[layer],
            [gradient[layer] for gradient in gradients],
        )
        np.testing.assert_allclose(ours["layers"]["up"][layer], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "inner"),
    [("q", (2, 24, 4, 8), 24), ("o", (2, 4, 8, 24), 32), ("gate", (2, 24, 40), 24)],
)
def test_muon_is_that_of_torch_on_the_matrix_that_each_layer_multiplies_with(name, shape, inner):
    start, gradients = random(*shape), [random(*shape) + 0.1 * i for i in range(3)]
    config = OptimizerConfig(name="muon", weight_decay=0.1, clip_norm=NO_CLIPPING)
    ours = updated(config, {"layers": {name: start}}, [{"layers": {name: g}} for g in gradients])
    moved = np.asarray(ours["layers"][name]) - start
    for layer in range(2):
        matrices = [x[layer].reshape(inner, -1) for x in (start, *gradients)]
        theirs = stepped(
            lambda p: torch.optim.Muon(
                p, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            ),
            matrices[0],
            matrices[1:],
        )
        moved_there = theirs - matrices[0]
        off = np.linalg.norm(moved[layer].reshape(inner, -1) - moved_there)
        assert off < 0.02 * np.linalg.norm(moved_there)  # torch orthogonalises in bfloat16


def test_muon_leaves_what_is_no_matrix_of_a_layer_to_adamw():
    params = {
        "embedder": {"table": random(30, 8)},
        "layers": {"k_norm": {"scale": random(2, 8)}, "up": random(2, 8, 8)},
    }
    gradients = [jax.tree.map(lambda x: x * 0.1, params)] * 3
    muon, adamw = (
        updated(OptimizerConfig(name=name, clip_norm=NO_CLIPPING), params, gradients)
        for name in ("muon", "adamw")
    )
    np.testing.assert_array_equal(muon["embedder"]["table"], adamw["embedder"]["table"])
    np.testing.assert_array_equal(*(x["layers"]["k_norm"]["scale"] for x in (muon, adamw)))
    assert not np.allclose(muon["layers"]["up"], adamw["layers"]["up"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_moments_lie_where_their_parameters_lie(name):
    model = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        mlp_dim=256,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        sliding_window=4,
        global_every=2,
    )
    # One key and value head, which two devices cannot share.
    layout = make_layout(AbstractMesh((1, 2, 2, 1), MESH_AXES), {"kv_heads": ()})
    optimizer = make_optimizer(OptimizerConfig(name=name), optax.constant_schedule(0.01))
    shapes, shardings = state_shardings(model, optimizer, layout)
    split = {
        jax.tree_util.keystr(path): (shape.shape, sharding.spec)
        for (path, shape), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes.opt_state),
            jax.tree.leaves(shardings.opt_state),
            strict=True,
        )
    }
    table = [found for path, found in split.items() if path.endswith("['table']")]
    mlp = [
        found
        for path, found in split.items()
        if path.endswith("['encoder']['layers']['mlp']['up']")
    ]
    if name == "adafactor":
        assert ((512,), PartitionSpec("tensor")) in table
        assert ((128,), PartitionSpec("fsdp")) in table
        assert ((2, 128), PartitionSpec(None, "fsdp")) in mlp
        assert ((2, 256), PartitionSpec(None, "tensor")) in mlp
    else:
        assert table == [((512, 128), PartitionSpec("tensor", "fsdp"))] * 2
        moments = 1 if name == "muon" else 2
        assert mlp == [((2, 128, 256), PartitionSpec(None, "fsdp", "tensor"))] * moments
