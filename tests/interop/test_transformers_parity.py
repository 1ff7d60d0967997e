"""Our model against transformers' T5Gemma2ForConditionalGeneration, loaded by `load_hf`."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import torch
from flax import nnx, traverse_util

from t5g2.interop.hf import export_hf, load_hf
from t5g2.interop.names import VISION_PREFIXES, canonical, names_of
from t5g2.models.attention import decoder_window, encoder_window
from t5g2.models.config import TINY
from t5g2.models.stack import Tokens, rotations
from t5g2.models.t5gemma2 import abstract_model, parameter_tree, split_frozen
from t5g2.models.vision import images_by_row


def model_of(config, params):
    """Our model with given parameters."""
    graph, state = nnx.split(abstract_model(config))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    return nnx.merge(graph, state)


def ours_of(directory, **execution):
    config, params = load_hf(directory)
    return model_of(dataclasses.replace(config, **execution), params)


def shift_right(labels, bos=2):
    inputs = jnp.concatenate([jnp.full_like(labels[:, :1], bos), labels[:, :-1]], axis=1)
    return jnp.where(inputs == reference.IGNORED, reference.PAD, inputs)


def tokens_of(mask):
    mask = jnp.asarray(mask, jnp.int32)
    return Tokens(mask, jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape))


# Compiling is most of what these tests do; the function is the same without optimisation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def with_slots(config, arrays):
    """The batch with each row's images in slots of its own, channels last, in `images`."""
    if "pixel_values" not in arrays:
        return arrays
    pixels = np.moveaxis(arrays["pixel_values"], 1, -1)
    return {**arrays, "images": images_by_row(config, arrays["input_ids"], pixels)}


def encode_decode(model, arrays):
    """Encoder output, logits, and the mean loss over the labels that count."""
    labels = arrays["labels"]
    visual = model.visual_tokens(arrays["images"]) if "images" in arrays else None
    memory = model.encode(arrays["input_ids"], tokens_of(arrays["attention_mask"]), visual)
    hidden = model.decode(shift_right(labels), tokens_of(jnp.ones(labels.shape)), memory)
    counts = labels != reference.IGNORED
    losses = model.token_losses(hidden, jnp.where(counts, labels, 0))
    return memory, model.logits(hidden), jnp.sum(losses * counts) / jnp.sum(counts)


forward = quick_jit(encode_decode)


@functools.partial(quick_jit, static_argnums=(4,))
def one_layer(layer, x, tokens, rotate, window, memory):
    keys = None if memory is None else layer.memory(memory)
    return layer(x, tokens, rotate, window, keys)


def run_ours(model, arrays):
    """What `reference.run` gives: the layers one by one, the rest by the whole model."""
    config, seen = model.config, {}
    arrays = with_slots(config, arrays)

    def run(stack, ids, tokens, memory, window):
        rotate = rotations(config, tokens.positions)
        x = seen[f"{stack}/embeddings"] = model.embedder(ids)
        if stack == "encoder" and "images" in arrays:
            visual = model.visual_tokens(arrays["images"])
            counts = np.sum(ids == reference.IMAGE, axis=1) // reference.IMAGE_TOKENS
            used = np.arange(arrays["images"].shape[1]) < counts[:, None]
            features = model.projector(visual).reshape(*used.shape, reference.IMAGE_TOKENS, -1)
            seen["image_features"] = features[used]
            x = model.embed(ids, visual)
        layers = quick_jit(lambda stack: stack.unstacked())(getattr(model, stack))
        for i, layer in enumerate(layers):
            is_global = config.is_global(i)
            x = one_layer(layer, x, tokens, rotate[is_global], window(config, is_global), memory)
            seen[f"{stack}/{i}"] = x
        seen[f"{stack}/final_norm"] = getattr(model, stack).final_norm(x)

    memory, seen["logits"], seen["loss"] = forward(model, arrays)
    decoder_ids = shift_right(arrays["labels"])
    run("encoder", arrays["input_ids"], memory.tokens, None, encoder_window)
    run("decoder", decoder_ids, tokens_of(np.ones(decoder_ids.shape)), memory, decoder_window)
    return {name: np.asarray(array, np.float32) for name, array in seen.items()}


def assert_close(ours, theirs, arrays, tolerance=5e-5):
    """Each tensor within `tolerance` of its standard deviation, on rows that are not padding."""
    assert ours.keys() == theirs.keys()
    real = {
        "encoder": arrays["attention_mask"] == 1,
        "decoder": np.ones(arrays["labels"].shape, bool),
    }
    for name, expected in theirs.items():
        rows = real.get(name.split("/")[0], ...)
        scale = expected[rows].std() if expected.ndim else abs(expected)
        error = np.abs(ours[name] - expected)[rows].max() / scale
        assert error < tolerance, f"{name} is off by {error:.1e} of its standard deviation"


CASES = {
    "four heads, window 8, two periods of three and two layers more, scanned": (
        {"heads": 4, "kv_heads": 1, "window": 8, "period": 3, "layers": 8},
        {"scan_layers": True},
    ),
    "eight heads, odd window, a period of three and a layer more, softcap, unrolled": (
        {"heads": 8, "kv_heads": 4, "window": 7, "period": 3, "layers": 4, "softcap": 3.0},
        {"scan_layers": False},
    ),
    "rows with no, one and three images": (
        {"heads": 8, "kv_heads": 4, "window": 7, "period": 2, "layers": 4, "vision": True},
        {},
    ),
}


def batch_for(settings, seed, **lengths):
    make = reference.batch_with_images if settings.get("vision") else reference.batch
    return make(seed, **lengths)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_equals_transformers(case, tmp_path):
    settings, execution = CASES[case]
    reference.save_model(tmp_path, 1, **settings)
    arrays = batch_for(settings, 1)
    computed = run_ours(ours_of(tmp_path, **execution), arrays)
    for implementation in ("eager", "sdpa"):
        theirs = reference.load_model(tmp_path, attn_implementation=implementation)
        assert_close(computed, reference.run(theirs, arrays), arrays)


VARIATIONS = list(itertools.product([(4, 1), (8, 4)], [8, 7], [3, 6], [None, 3.0], [False, True]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(VARIATIONS)))
def test_every_layer_equals_transformers_in_all_variations(seed, tmp_path):
    (heads, kv_heads), window, period, softcap, vision = VARIATIONS[seed]
    settings = {
        "heads": heads,
        "kv_heads": kv_heads,
        "window": window,
        "period": period,
        "softcap": softcap,
        "vision": vision,
    }
    reference.save_model(tmp_path, seed, layers=14, **settings)
    arrays = batch_for(settings, seed, encoder_length=29 + seed, decoder_length=23 + seed)
    theirs = reference.run(reference.load_model(tmp_path), arrays)
    scanned = run_ours(ours_of(tmp_path, scan_layers=True), arrays)
    assert_close(scanned, theirs, arrays)
    model = ours_of(tmp_path, scan_layers=False)
    _, logits, loss = forward(model, with_slots(model.config, arrays))
    unrolled = {**scanned, "logits": np.asarray(logits), "loss": np.asarray(loss)}
    assert_close(unrolled, theirs, arrays)


def torch_gradients(model, arrays):
    """The loss, and the gradient of every parameter that has one, under its name on disk."""
    model.zero_grad()
    loss = model(**reference.torch_batch(arrays)).loss
    loss.backward()
    gradients = {
        canonical(name): parameter.grad.numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients


@pytest.mark.parametrize("vision", [False, True])
def test_the_gradient_of_every_parameter_equals_autograd(vision, tmp_path):
    settings = {"heads": 8, "kv_heads": 4, "window": 7, "period": 2, "layers": 5, "softcap": 3.0}
    reference.save_model(tmp_path, 2, vision=vision, **settings)
    arrays = batch_for({"vision": vision}, 2)
    model = reference.load_model(tmp_path)
    model.model.encoder.vision_tower.requires_grad_(False)
    _, theirs = torch_gradients(model, arrays)
    model = ours_of(tmp_path)
    arrays = with_slots(model.config, arrays)
    gradient = quick_jit(jax.grad(lambda model: encode_decode(model, arrays)[2]))(model)
    ours = traverse_util.flatten_dict(parameter_tree(gradient), sep="/")
    for name in names_of(model.config):
        for layer, key in name.keys(model.config):
            got = np.asarray(ours[name.path])
            got = name.to_disk(got if layer is None else got[layer])
            expected = theirs.pop(key, None)
            if expected is None:  # the frozen tower, and the projector where there is no image
                assert key.startswith(VISION_PREFIXES)
                assert not got.any(), f"{key} has a gradient"
                continue
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            assert error < 1e-4, f"gradient of {key} is off by {error:.1e}"
    assert not theirs


@pytest.mark.parametrize("vision", [False, True])
def test_twenty_steps_of_adamw_give_the_losses_of_torch(vision, tmp_path):
    reference.save_model(tmp_path, 3, period=2, layers=2, vision=vision)
    batches = [batch_for({"vision": vision}, seed % 2) for seed in range(20)]
    rates = {"weight_decay": 0.1, "eps": 1e-8}

    theirs = reference.load_model(tmp_path)
    theirs.model.encoder.vision_tower.requires_grad_(False)
    torch_optimizer = torch.optim.AdamW(theirs.parameters(), 3e-3, betas=(0.9, 0.95), **rates)
    expected = []
    for arrays in batches:
        expected.append(torch_gradients(theirs, arrays)[0])
        torch_optimizer.step()

    config, params = load_hf(tmp_path)
    params, frozen = split_frozen(jax.tree.map(jnp.asarray, params))
    optimizer = optax.adamw(3e-3, b1=0.9, b2=0.95, **rates)

    @quick_jit
    def step(params, state, arrays):
        loss, gradient = jax.value_and_grad(
            lambda params: encode_decode(model_of(config, {**params, **frozen}), arrays)[2]
        )(params)
        updates, state = optimizer.update(gradient, state, params)
        return loss, optax.apply_updates(params, updates), state

    state, losses = optimizer.init(params), []
    for arrays in batches:
        loss, params, state = step(params, state, with_slots(config, arrays))
        losses.append(float(loss))
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_bfloat16_differs_from_transformers_by_no_more_than_rounding(tmp_path):
    squares = collections.defaultdict(list)
    for seed in range(4):
        # A width whose square root is not a bfloat16, and weights that are.
        settings = {"heads": 8, "kv_heads": 4, "period": 2, "layers": 5, "width": 80}
        model = reference.random_model(seed, **settings)
        model.to(torch.bfloat16).save_pretrained(tmp_path)
        arrays = reference.batch(seed)
        exact = reference.run(reference.load_model(tmp_path, dtype=torch.float32), arrays)
        model = ours_of(tmp_path)
        assert model.config.dtype == "bfloat16"
        logits = {"exact": exact["logits"], "ours": np.asarray(forward(model, arrays)[1])}
        for name in ("eager", "sdpa"):
            theirs = reference.load_model(tmp_path, dtype=torch.bfloat16, attn_implementation=name)
            theirs = reference.run(theirs, arrays)
            embedded = np.asarray(model.embedder(arrays["input_ids"]), np.float32)
            np.testing.assert_array_equal(embedded, theirs["encoder/embeddings"])
            logits[name] = theirs["logits"]
        for a, b in itertools.combinations(logits, 2):
            squares[a, b].append(np.mean((logits[a] - logits[b]) ** 2))

    distance = {pair: np.sqrt(np.mean(values)) for pair, values in squares.items()}
    # We round no worse than transformers' two implementations of attention do, and differ from
    # each as independent roundings do, which is how those two differ from each other.
    allowed = max(distance["exact", "eager"], distance["exact", "sdpa"])
    assert distance["exact", "ours"] < 1.1 * allowed
    for name in ("eager", "sdpa"):
        independent = np.hypot(distance["exact", "ours"], distance["exact", name])
        assert distance["ours", name] < independent


def random_params(config, seed):
    """Parameters of our model, made by numpy: projections ~ N(0, 0.1²), the rest ~ N(0, 0.3²)."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        scale = 0.3 if path[-1].key in ("scale", "eoi_embedding") else 0.1
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, parameter_tree(abstract_model(config)))


def test_an_exported_model_loads_in_transformers_and_gives_the_same_logits(tmp_path):
    params = random_params(TINY, 5)
    export_hf(params, TINY, tmp_path / "out")
    theirs, info = reference.load_model(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    arrays = reference.batch(5, encoder_length=90, decoder_length=70)
    _, logits, _ = forward(model_of(TINY, params), arrays)
    expected = reference.run(theirs, arrays)["logits"]
    assert np.abs(logits - expected).max() < 5e-5 * expected.std()


def test_a_bfloat16_export_holds_the_weights_rounded_as_torch_rounds_them(tmp_path):
    params = random_params(TINY, 6)
    export_hf(params, TINY, tmp_path / "out", dtype="bfloat16")
    theirs = reference.load_model(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    weights = theirs.state_dict()
    table = torch.tensor(params["embedder"]["table"]).to(torch.bfloat16)
    assert torch.equal(weights["lm_head.out_proj.weight"], table)
    gate = torch.tensor(params["decoder"]["layers"]["mlp"]["gate"][4].T).to(torch.bfloat16)
    assert torch.equal(weights["model.decoder.layers.4.mlp.gate_proj.weight"], gate)
