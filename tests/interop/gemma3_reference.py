"""Random Gemma 3 models of transformers, text-only and multimodal."""

import torch
from reference import (
    BOI,
    EOI,
    IMAGE,
    IMAGE_TOKENS,
    LEAST_VISION,
    SMALL_VISION,
)  # it also keeps transformers offline and quiet
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

WINDOW = 8


def text_settings(*, vocabulary=131, factor=None, layers=4, period=3, width=32):
    """A tiny Gemma 3's text settings; `factor` None leaves RoPE unscaled, as 270M and 1B do."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if factor is not None:
        rope |= {"rope_type": "linear", "factor": factor}
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "max_position_embeddings": 512,
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }


def _randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.1)
    return model.eval()


def random_text_model(seed, **settings):
    """A Gemma3ForCausalLM whose every parameter is random."""
    torch.manual_seed(seed)
    return _randomised(Gemma3ForCausalLM(Gemma3TextConfig(**text_settings(**settings))))


def random_multimodal_model(seed, *, eoi=EOI, vision=False, **settings):
    """A Gemma3ForConditionalGeneration, every parameter random; `vision`: images of four tokens."""
    torch.manual_seed(seed)
    config = Gemma3Config(
        text_config=text_settings(**settings),
        vision_config=dict(SMALL_VISION if vision else LEAST_VISION),
        mm_tokens_per_image=IMAGE_TOKENS if vision else 1,
        boi_token_index=BOI,
        eoi_token_index=eoi,
        image_token_index=IMAGE,
    )
    return _randomised(Gemma3ForConditionalGeneration(config))
