"""config.json both ways, against transformers' own configuration classes."""

import copy
import dataclasses

import pytest
import reference
from transformers import (
    GenerationConfig,
    SiglipVisionConfig,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
)
from transformers.models.t5gemma2.configuration_t5gemma2 import (
    T5Gemma2DecoderConfig,
    T5Gemma2TextConfig,
)

from t5g2.errors import UserError
from t5g2.interop.hf_config import (
    TEXT_DEFAULTS,
    from_hf_config,
    generation_config,
    to_hf_config,
)
from t5g2.interop.hf_vision import DEFAULTS, IMAGE_ID, from_hf_vision, minimal_vision_shapes
from t5g2.models.config import T5GEMMA2_1B, T5GEMMA2_4B, T5GEMMA2_270M, TINY, VisionConfig

VARIANTS = {
    "270M": T5GEMMA2_270M,
    "1B": T5GEMMA2_1B,
    "4B": T5GEMMA2_4B,
    "tiny": TINY,
    "softcap, no local layers": dataclasses.replace(TINY, final_logit_softcap=30.0, global_every=1),
    "no global layers": dataclasses.replace(TINY, global_every=7),
    "own token ids": dataclasses.replace(TINY, pad_id=3, bos_id=5, eos_id=6, eoi_id=7),
    "no tower": dataclasses.replace(T5GEMMA2_270M, vision=None),
    "own tower": dataclasses.replace(
        TINY,
        vision=VisionConfig(
            hidden_size=24,
            mlp_dim=40,
            num_layers=3,
            num_heads=3,
            image_size=36,
            patch_size=6,
            tokens_per_image=9,
            layer_norm_eps=1e-5,
            boi_id=8,
            image_id=9,
        ),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_the_way_to_config_json_and_back(variant):
    config = VARIANTS[variant]
    assert from_hf_config(to_hf_config(config, config.dtype)) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_transformers_saving_it_again(variant, tmp_path):
    config = VARIANTS[variant]
    theirs = T5Gemma2Config(**to_hf_config(config, config.dtype))
    assert from_hf_config(theirs.to_dict()) == config


def test_transformers_keeps_every_setting_that_we_write():
    written = to_hf_config(TINY)
    kept = T5Gemma2Config(**copy.deepcopy(written)).to_dict()

    def changed(ours, theirs, path=""):
        for key, value in ours.items():
            if isinstance(value, dict):
                yield from changed(value, theirs[key], f"{path}{key}.")
            elif key not in theirs or theirs[key] != value:
                yield path + key

    assert list(changed(written, kept)) == []


def test_settings_left_out_are_the_defaults_of_transformers():
    for defaults in (T5Gemma2TextConfig(), T5Gemma2DecoderConfig()):
        computed = ("layer_types", "rope_parameters")
        for name, value in TEXT_DEFAULTS.items():
            assert name in computed or getattr(defaults, name) == value, name
    # Released 4B: eight heads and four of keys are the class's defaults, which its file omits.
    written = to_hf_config(T5GEMMA2_4B, "bfloat16")
    for text in (written["encoder"]["text_config"], written["decoder"]):
        for name in [n for n in text if n in TEXT_DEFAULTS and text[n] == TEXT_DEFAULTS[n]]:
            del text[name]
        assert "num_attention_heads" not in text
    assert from_hf_config(written) == T5GEMMA2_4B


def test_settings_of_a_tower_left_out_are_the_defaults_of_transformers():
    theirs = SiglipVisionConfig()
    assert {name: getattr(theirs, name) for name in DEFAULTS} == DEFAULTS
    # Released towers name what makes them differ from the class, and no more.
    written = to_hf_config(T5GEMMA2_4B, "bfloat16")
    tower = written["encoder"]["vision_config"]
    for name in [n for n in tower if tower[n] == DEFAULTS[n] and n != "model_type"]:
        del tower[name]
    assert "num_channels" not in tower
    for name in ("mm_tokens_per_image", "boi_token_index", "image_token_index"):
        del written["encoder"][name]
    del written["image_token_index"]
    assert from_hf_config(written) == T5GEMMA2_4B


def test_image_tokens_are_read_in_either_spelling_and_from_where_transformers_reads_them():
    written = to_hf_config(VARIANTS["own tower"])
    encoder = written["encoder"]
    encoder["boi_token_id"] = encoder.pop("boi_token_index") + 20
    encoder["eoi_token_id"] = encoder.pop("eoi_token_index") - 200_000
    written["image_token_id"] = written.pop("image_token_index") + 20
    theirs, ours = T5Gemma2Config(**copy.deepcopy(written)), from_hf_config(written)
    assert ours.vision is not None
    assert (ours.vision.boi_id, ours.eoi_id, ours.vision.image_id) == (28, 56_000, 29)
    assert theirs.image_token_index == theirs.encoder.image_token_index == 29
    assert (theirs.encoder.boi_token_index, theirs.encoder.eoi_token_index) == (28, 56_000)


def test_the_image_token_of_gemma_3_becomes_that_of_t5gemma_2():
    # It is one beyond the rows that the two have in common.
    settings = {"vision_config": {"vision_use_head": False}, "mm_tokens_per_image": 49}
    tower = from_hf_vision(settings, 262_144)
    assert tower is not None
    assert tower.image_id == IMAGE_ID == T5GEMMA2_4B.vision.image_id


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"vision_use_head": True}, "vision_use_head is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_channels": 4}, "num_channels is 4"),
        ({"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model'"),
        ({"image_size": [36, 36]}, r"image_size must be a whole number, not \[36, 36\]"),
        ({"patch_size": 5}, r"patch_size \(5\) must divide image_size"),
        ({"num_attention_heads": 5}, r"num_heads \(5\) must divide"),
    ],
)
def test_a_tower_that_we_do_not_have_is_refused_by_name_unless_left_out(settings, named):
    written = to_hf_config(VARIANTS["own tower"])
    written["encoder"]["vision_config"].update(settings)
    with pytest.raises(UserError, match=named) as caught:
        from_hf_config(written)
    assert "\n" not in str(caught.value)
    without = dataclasses.replace(VARIANTS["own tower"], vision=None)
    assert from_hf_config(written, text_only=True) == without


def test_a_tower_that_transformers_configured_is_read_as_configured():
    config = from_hf_config(reference.hf_config(vision=True).to_dict())
    assert config.vision == VisionConfig(
        hidden_size=24,
        mlp_dim=40,
        num_layers=3,
        num_heads=2,
        image_size=28,
        patch_size=7,
        tokens_per_image=4,
        boi_id=10,
        image_id=12,
    )


def test_rope_settings_of_earlier_transformers_are_understood():
    written = to_hf_config(T5GEMMA2_270M, "bfloat16")
    for text in (written["encoder"]["text_config"], written["decoder"]):
        del text["rope_parameters"], text["layer_types"]
        text |= {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        }
    assert from_hf_config(written) == T5GEMMA2_270M


def test_minimal_vision_tensors_are_those_of_the_tower_that_transformers_builds():
    model = T5Gemma2ForConditionalGeneration(T5Gemma2Config(**to_hf_config(TINY)))
    shapes = {
        f"model.encoder.{name}": tuple(p.shape)
        for part in ("vision_tower", "multi_modal_projector")
        for name, p in getattr(model.model.encoder, part).named_parameters(prefix=part)
    }
    assert minimal_vision_shapes(TINY.hidden_size) == shapes


def test_generation_config_is_one_of_transformers():
    written = generation_config(TINY)
    kept = GenerationConfig(**written).to_dict()
    assert {name: kept[name] for name in written} == written | {
        "transformers_version": kept["transformers_version"]
    }


def changed(**settings):
    """config.json of TINY with text settings changed on both sides."""
    written = to_hf_config(TINY)
    for text in (written["encoder"]["text_config"], written["decoder"]):
        text.update(settings)
    return written


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, "layer_types"),
        ({"hidden_size": "128"}, "hidden_size must be a whole number"),
        ({"sliding_window": None}, "sliding_window must be a whole number"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "rope_type"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary"),
    ],
)
def test_a_setting_that_we_do_not_have_is_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named) as caught:
        from_hf_config(changed(**settings))
    assert "\n" not in str(caught.value)


def test_stacks_of_different_shape_are_refused_and_the_difference_named():
    written = to_hf_config(TINY)
    written["decoder"]["num_hidden_layers"] = 5
    with pytest.raises(UserError, match=r"num_hidden_layers \(6 and 5\)"):
        from_hf_config(written)


def test_another_model_type_is_refused():
    with pytest.raises(UserError, match="'llama'"):
        from_hf_config({"model_type": "llama"})


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"eos_token_id": [1, 106]}, "of eos_token_id [1, 106] only the first"),
    ],
)
def test_what_is_accepted_but_not_used_is_logged(settings, logged, caplog):
    assert from_hf_config(changed(**settings)) == TINY
    assert logged in caplog.text


def test_dropout_and_half_precision_are_logged(caplog):
    assert from_hf_config(to_hf_config(TINY) | {"dropout_rate": 0.1, "dtype": "float16"}) == TINY
    assert "dropout_rate 0.1" in caplog.text
    assert "float16" in caplog.text


def test_a_model_that_transformers_cannot_build_is_not_exported():
    with pytest.raises(UserError, match="hidden_size 127"):
        to_hf_config(dataclasses.replace(TINY, hidden_size=127))
    with pytest.raises(UserError, match=r"query_pre_attn_scalar 32\.5"):
        to_hf_config(dataclasses.replace(TINY, query_pre_attn_scalar=32.5))
