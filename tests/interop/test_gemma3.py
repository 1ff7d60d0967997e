"""Gemma 3 directories as T5Gemma 2: the function is kept, and what is wrong is named."""

import json
import logging

import gemma3_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from t5g2.errors import UserError
from t5g2.interop.gemma3 import from_gemma3_config, open_gemma3
from t5g2.interop.hf_config import TEXT_DEFAULTS
from t5g2.models.attention import decoder_window
from t5g2.models.config import VisionConfig
from t5g2.models.stack import Memory, Tokens, rotations
from t5g2.models.t5gemma2 import from_parameters

EOI, LENGTH = 11, 29


def load_gemma3(directory, **options):
    config, params = open_gemma3(directory, **options)
    return config, jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module", params=["text", "text factor 8", "multimodal", "older multimodal"])
def pair(request, tmp_path_factory):
    """A Gemma 3 of transformers, its directory, and our reading of it."""
    directory = tmp_path_factory.mktemp("gemma")
    if request.param.startswith("text"):
        factor = 8.0 if request.param.endswith("8") else None
        model = gemma3_reference.random_text_model(0, factor=factor)
        model.save_pretrained(directory)
    else:
        model = gemma3_reference.random_multimodal_model(1, factor=8.0, eoi=EOI)
        model.save_pretrained(directory)
        older = request.param.startswith("older")
        respell(directory, "language_model.model." if older else "model.language_model.")
    return model, directory, *load_gemma3(directory)


def respell(directory, prefix):
    """Gives the text tensors of a multimodal directory one of the two spellings there are."""

    def change(tensors):
        for key in list(tensors):
            for known in ("language_model.model.", "model.language_model."):
                if key.startswith(known):
                    tensors[prefix + key.removeprefix(known)] = tensors.pop(key)

    rewrite(directory, change)
    assert any(key.startswith(prefix) for key in load_file(directory / "model.safetensors"))


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def ids():
    ids = np.random.default_rng(0).integers(13, 131, (2, LENGTH))
    ids[:, 5] = EOI  # in the multimodal models it takes its embedding from a parameter of its own
    return ids


def everything(ids, segment):
    """Tokens of one segment, positions from the row's start."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return Tokens(jnp.full(ids.shape, segment, jnp.int32), jnp.asarray(positions))


def assert_within(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() < 5e-5 * theirs.std()


def test_the_decoder_without_an_encoder_is_gemma_3(pair, ids):
    theirs, _, config, params = pair
    model = from_parameters(config, jax.tree.map(jnp.asarray, params))
    memory = Memory(model.encoder.final_norm(model.embedder(ids[:, :7])), everything(ids[:, :7], 0))
    logits = jax.jit(lambda m: m.logits(m.decode(ids, everything(ids, 1), memory)))(model)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    assert_within(logits, expected)


def test_the_encoder_under_causal_masks_is_gemma_3(pair, ids):
    theirs, _, config, params = pair
    model = from_parameters(config, jax.tree.map(jnp.asarray, params))

    def hidden(model):
        tokens = everything(ids, 1)
        rotate = rotations(config, tokens.positions)

        def apply(layer, is_global, x):
            return layer(x, tokens, rotate[is_global], decoder_window(config, is_global))

        return model.encoder(model.embedder(ids), apply)

    text = getattr(theirs.model, "language_model", theirs.model)
    with torch.no_grad():
        expected = text(input_ids=torch.tensor(ids)).last_hidden_state.numpy()
    assert_within(jax.jit(hidden)(model), expected)


def test_encoder_and_decoder_start_as_the_same_arrays(pair):
    _, _, _, params = pair
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], params["decoder"])


def test_rope_is_that_of_the_source(pair):
    theirs, _, config, _ = pair
    rope = theirs.config.get_text_config().rope_parameters["full_attention"]
    assert config.rope_factor_global == rope.get("factor", 1.0)


def test_defaults_are_those_of_transformers():
    theirs = Gemma3TextConfig().to_dict()
    derived = {"layer_types", "rope_parameters"}  # filled in from other settings
    assert {name: theirs[name] for name in TEXT_DEFAULTS if name not in derived} == {
        name: value for name, value in TEXT_DEFAULTS.items() if name not in derived
    }


def test_an_end_of_image_token_beyond_the_vocabulary_embeds_as_zeros(tmp_path):
    gemma3_reference.random_text_model(0).save_pretrained(tmp_path)
    config, params = load_gemma3(tmp_path)
    assert config.eoi_id >= config.vocab_size
    assert not params["embedder"]["eoi_embedding"].any()


def test_the_image_rows_of_a_multimodal_vocabulary_are_cut_off(tmp_path):
    model = gemma3_reference.random_multimodal_model(
        0, vocabulary=262_208, width=8, layers=1, eoi=256_000
    )
    model.save_pretrained(tmp_path)
    config, params = load_gemma3(tmp_path)
    table = model.get_input_embeddings().weight.detach().numpy()
    assert config.vocab_size == 262_144
    np.testing.assert_array_equal(params["embedder"]["table"], table[:262_144])
    np.testing.assert_allclose(
        params["embedder"]["eoi_embedding"], table[256_000] * np.sqrt(8), rtol=1e-6
    )


def test_the_image_side_is_left_out_on_demand_and_counted_in_one_line(tmp_path, caplog):
    model = gemma3_reference.random_multimodal_model(0)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        config, _ = load_gemma3(tmp_path, text_only=True)
    assert config.vision is None
    vision = sum(
        "vision_tower" in name or "projector" in name for name, _ in model.named_parameters()
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: {vision} tensors of the image side are left out"
    ]


def test_every_wrong_tensor_is_named_at_once(tmp_path):
    gemma3_reference.random_text_model(0).save_pretrained(tmp_path)

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.zeros(3)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)

    rewrite(tmp_path, change)
    with pytest.raises(UserError) as error:
        load_gemma3(tmp_path)
    for part in (
        "missing: model.norm.weight;",
        "unexpected: model.extra.weight;",
        "wrong shape: model.layers.1.mlp.up_proj.weight [2, 2] instead of [48, 32]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type"),
        ({"model_type": "gemma2"}, "'gemma2'"),
    ],
)
def test_what_t5g2_does_not_have_is_refused_by_name(changed, named):
    settings = {"model_type": "gemma3_text", **gemma3_reference.text_settings(), **changed}
    with pytest.raises(UserError, match=named):
        from_gemma3_config(settings)


def test_the_spelling_of_released_configs_is_understood():
    """Before transformers 5: scaling beside the bases, and whatever equals a default left out."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    images = {"vision_config": tower, "mm_tokens_per_image": 256, "image_token_index": 262_144}
    config = {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16", **images}
    model = from_gemma3_config(json.loads(json.dumps(config)))
    assert model.vision == VisionConfig()
    assert (model.rope_factor_global, model.rope_theta_global) == (8.0, 1e6)
    assert (model.num_heads, model.num_kv_heads, model.global_every) == (8, 4, 6)
    assert (model.vocab_size, model.dtype, model.eoi_id) == (262_144, "bfloat16", 256_000)
