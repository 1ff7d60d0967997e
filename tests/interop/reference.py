"""Random T5Gemma 2 models of transformers, and what they compute."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
torch.set_num_threads(1)

VOCABULARY, BOI, EOI, IMAGE, PAD, IGNORED = 131, 10, 11, 12, 0, -100

# A vision tower of four visual tokens an image.
SMALL_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}
IMAGE_TOKENS = 4
# transformers always builds a vision tower: the least one.
LEAST_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}


def hf_config(
    *,
    heads=4,
    kv_heads=1,
    window=8,
    period=3,
    layers=4,
    softcap=None,
    factor=8.0,
    width=64,
    vision=False,
):
    """A tiny T5Gemma2Config, made by transformers alone; with `vision`, images have four tokens."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "sliding_window": window,
        "query_pre_attn_scalar": 24,
        "max_position_embeddings": 512,
        "final_logit_softcapping": softcap,
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": factor, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    encoder = {
        "text_config": text,
        "vision_config": dict(SMALL_VISION if vision else LEAST_VISION),
        "mm_tokens_per_image": IMAGE_TOKENS if vision else 1,
        "boi_token_index": BOI,
        "eoi_token_index": EOI,
    }
    return T5Gemma2Config(encoder=encoder, decoder=dict(text), image_token_index=IMAGE)


def random_model(seed, **settings):
    """A model whose every parameter is random, also those that start as zeros.

    Its projections and embeddings are wider than initial ones, so that attention is not uniform.
    """
    torch.manual_seed(seed)
    model = T5Gemma2ForConditionalGeneration(hf_config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name
            parameter.normal_(0, 0.3 if norm or "eoi" in name else 0.1)
    return model


def save_model(directory, seed, **settings):
    """Saves a random model, and returns the directory."""
    random_model(seed, **settings).save_pretrained(directory)
    return directory


def load_model(directory, **options):
    """The model in a directory, as a user of transformers gets it."""
    return T5Gemma2ForConditionalGeneration.from_pretrained(directory, **options)


def batch(seed, *, encoder_length=29, decoder_length=23):
    """Four rows as numpy arrays input_ids, attention_mask, labels.

    Encoder: one row is full, one is padded on the right, one on the left, one on both sides.
    Decoder: padded on the right. The end-of-image token occurs on both sides.
    """
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(13, VOCABULARY, (4, encoder_length))
    labels = rng.integers(13, VOCABULARY, (4, decoder_length))
    mask = np.ones_like(input_ids)
    input_ids[:, 14] = labels[:, 3] = EOI
    mask[1, -9:] = mask[2, :9] = mask[3, :2] = mask[3, -4:] = 0
    input_ids[mask == 0] = PAD
    for row in range(1, 4):
        labels[row, -3 * row :] = IGNORED
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def batch_with_images(seed, **lengths):
    """As `batch`, but its rows hold 0, 1, 3 and 1 images; pixel_values has the five."""
    arrays = batch(seed, **lengths)
    image = [BOI, *[IMAGE] * IMAGE_TOKENS, EOI]
    for row, starts in enumerate([[], [5], [10, 16, 23], [6]]):
        for start in starts:
            arrays["input_ids"][row, start : start + len(image)] = image
    size = SMALL_VISION["image_size"]
    pixels = np.random.default_rng(seed).uniform(-1, 1, (5, 3, size, size))
    return {**arrays, "pixel_values": pixels.astype(np.float32)}


def torch_batch(arrays):
    return {name: torch.tensor(array) for name, array in arrays.items()}


@torch.no_grad()
def run(model, arrays):
    """Everything the model computes: embeddings, each layer's output, encoder output, logits, loss.

    Returns:
        A dict of float32 numpy arrays; loss is the mean over labels that are not ignored.
    """
    seen = {}

    def hook(name):
        def keep(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return keep

    text = model.model.encoder.text_model
    modules = {
        "encoder/embeddings": text.embed_tokens,
        "decoder/embeddings": model.model.decoder.embed_tokens,
        "encoder/final_norm": text.norm,
        "decoder/final_norm": model.model.decoder.norm,
    }
    if "pixel_values" in arrays:
        modules["image_features"] = model.model.encoder.multi_modal_projector
    for stack, layers in (("encoder", text.layers), ("decoder", model.model.decoder.layers)):
        modules |= {f"{stack}/{i}": layer for i, layer in enumerate(layers)}
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    output = model(**torch_batch(arrays))
    for handle in handles:
        handle.remove()
    seen |= {"logits": output.logits, "loss": output.loss}
    return {name: tensor.float().numpy().copy() for name, tensor in seen.items()}
