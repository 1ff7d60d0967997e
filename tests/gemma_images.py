"""A small Gemma tokenizer that knows images, transformers' processor with it, a model for it."""

import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer, Gemma3Processor, GemmaTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from t5g2.data.tokenizer import load_tokenizer
from t5g2.interop.tokenizer import export_tokenizer
from t5g2.models.config import TINY, VisionConfig
from t5g2.models.t5gemma2 import abstract_model, parameter_tree
from t5g2.pretrained import Pretrained

IMAGE_PIECES = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def gemma_with_images(tokenizer, directory: Path) -> Path:
    """What transformers' GemmaTokenizer saves with our pieces, runs of newlines and image pieces.

    As in Gemma's own, a run of newlines is one piece however it came about.
    """
    export_tokenizer(tokenizer, directory / "ours")
    model = json.loads((directory / "ours" / "tokenizer.json").read_text())["model"]
    vocab = {piece.replace(" ", "▁"): i for piece, i in model["vocab"].items()}
    merges = [(left.replace(" ", "▁"), right.replace(" ", "▁")) for left, right in model["merges"]]
    gemma = GemmaTokenizer(
        vocab=vocab, merges=merges, add_bos_token=True, extra_special_tokens=IMAGE_PIECES
    )
    plain = ["\n" * n for n in range(2, 9)] + ["<td>"]
    sentinels = [f"<sentinel_{k}>" for k in range(len(tokenizer.sentinel_ids))]
    gemma.add_tokens([AddedToken(piece, normalized=False) for piece in plain + sentinels])
    gemma.save_pretrained(directory / "gemma")
    return directory / "gemma"


def hf_processor(directory: Path, *, image_size: int, tokens_per_image: int) -> Gemma3Processor:
    """Made by hand from transformers' classes; nothing of ours but the tokenizer's pieces."""
    images = Gemma3ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return Gemma3Processor(images, tokenizer, image_seq_length=tokens_per_image)


def model_with_images(directory: Path, image_size: int) -> Pretrained:
    """A random model of two layers with a vision tower, for such a tokenizer."""
    tokenizer = load_tokenizer(directory)
    ids = {tokenizer.id_to_piece(token): token for token in range(tokenizer.vocab_size)}
    vision = VisionConfig(
        hidden_size=16,
        mlp_dim=24,
        num_layers=1,
        num_heads=2,
        image_size=image_size,
        patch_size=7,
        tokens_per_image=4,
        boi_id=ids["<start_of_image>"],
        image_id=ids["<image_soft_token>"],
    )
    config = dataclasses.replace(
        TINY,
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        global_every=2,
        vision=vision,
        eoi_id=ids["<end_of_image>"],
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        parameter_tree(abstract_model(config)),
    )
    return Pretrained(config, params, tokenizer, {})
