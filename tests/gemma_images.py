"""A small Gemma tokenizer that knows images, and transformers' processor with it."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tokenizers import AddedToken
from transformers import AutoTokenizer, Gemma3Processor, GemmaTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from t5g2.interop.tokenizer import export_tokenizer

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
