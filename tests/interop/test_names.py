"""The table of names against transformers' own list of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from flax import traverse_util
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from t5g2.interop.hf_config import from_hf_config, to_hf_config
from t5g2.interop.hf_vision import minimal_vision_shapes
from t5g2.interop.names import TEXT_NAMES, TIED, VISION_NAMES, canonical, names_of
from t5g2.models.config import T5GEMMA2_1B, T5GEMMA2_4B, T5GEMMA2_270M, TINY, VisionConfig
from t5g2.models.t5gemma2 import abstract_model, parameter_tree

SIZES = {"270M": T5GEMMA2_270M, "1B": T5GEMMA2_1B, "4B": T5GEMMA2_4B, "tiny": TINY}


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_ours_and_of_transformers_is_named_exactly_once(size):
    config, names = SIZES[size], names_of(SIZES[size])
    with torch.device("meta"):
        model = T5Gemma2ForConditionalGeneration(T5Gemma2Config(**to_hf_config(config)))
    theirs = {canonical(name): tuple(p.shape) for name, p in model.named_parameters()}
    for placeholder in () if config.vision else minimal_vision_shapes(config.hidden_size):
        del theirs[placeholder]
    ours = traverse_util.flatten_dict(parameter_tree(abstract_model(config)), sep="/")
    assert sorted(name.path for name in names) == sorted(ours)
    named = {}
    for name in names:
        for layer, key in name.keys(config):
            assert key not in named
            shape = ours[name.path].shape
            named[key] = name.disk_shape(shape if layer is None else shape[1:])
    assert named == theirs


def test_tied_tensors_are_those_that_transformers_ties():
    with torch.device("meta"):
        model = T5Gemma2ForConditionalGeneration(T5Gemma2Config(**to_hf_config(TINY)))
    tied = {canonical(k): canonical(v) for k, v in model.all_tied_weights_keys.items()}
    assert tied == TIED


@pytest.mark.parametrize("name", TEXT_NAMES + VISION_NAMES, ids=lambda name: name.path)
def test_from_disk_inverts_to_disk(name):
    small = VisionConfig(
        hidden_size=8,
        mlp_dim=12,
        num_heads=2,
        image_size=28,
        patch_size=7,
        tokens_per_image=4,
        boi_id=10,
        image_id=12,
    )
    config = dataclasses.replace(TINY, vision=small)
    leaf = traverse_util.flatten_dict(parameter_tree(abstract_model(config)), sep="/")[name.path]
    shape = leaf.shape[1:] if "{layer}" in name.key else leaf.shape
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    stored = name.to_disk(array)
    assert stored.shape == name.disk_shape(shape)
    again = np.empty_like(array)
    name.from_disk(stored, again)
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_matrix_of_several_tiles_is_transposed_to_the_bit(dtype):
    """300 x 257: two whole tiles and a part, both ways; NaN and its payload with the rest."""
    (name,) = (name for name in TEXT_NAMES if name.path == "encoder/layers/mlp/gate")
    dtype = jnp.dtype(dtype)
    bits = np.random.default_rng(0).integers(0, 256, (300, 257 * dtype.itemsize), np.uint8)
    matrix = bits.view(dtype)
    stored, again = name.to_disk(matrix), np.empty_like(matrix)
    name.from_disk(stored, again)
    assert stored.tobytes() == matrix.T.tobytes()
    assert again.tobytes() == matrix.tobytes()


def test_a_projection_on_disk_is_what_torch_multiplies_by():
    """q and o of random states, by our contraction and by `x @ weight.T`."""
    names = {name.path: name for name in TEXT_NAMES}
    rng = np.random.default_rng(0)
    x, q, o = (rng.normal(size=s) for s in ((5, 8), (8, 4, 6), (4, 6, 8)))
    heads = np.einsum("td,dhn->thn", x, q)
    stored_q = names["encoder/layers/attention/q"].to_disk(q)
    np.testing.assert_allclose((x @ stored_q.T).reshape(5, 4, 6), heads)
    stored_o = names["encoder/layers/attention/o"].to_disk(o)
    np.testing.assert_allclose(
        heads.reshape(5, 24) @ stored_o.T, np.einsum("thn,hnd->td", heads, o)
    )


@pytest.mark.parametrize("size", ["270M", "1B", "4B"])
def test_parameters_of_released_sizes_are_as_many_as_transformers_counts(size):
    # On the meta device, tied tensors once.
    published = {"270M": 786_029_296, "1B": 2_115_977_456, "4B": 7_508_928_880}
    tree = parameter_tree(abstract_model(SIZES[size]))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == published[size]


def test_a_model_that_transformers_configured_is_read_as_configured():
    config = from_hf_config(reference.hf_config(heads=8, kv_heads=4, window=7).to_dict())
    assert (config.num_heads, config.num_kv_heads, config.sliding_window) == (8, 4, 7)
    assert (config.global_every, config.rope_factor_global, config.eoi_id) == (3, 8.0, 11)
