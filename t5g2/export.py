"""`t5g2 export`: a checkpoint as a Hugging Face directory."""

import argparse
import logging
from pathlib import Path

from t5g2 import settings
from t5g2.checkpoints.store import open_arrays, read_meta
from t5g2.data.tokenizer import Tokenizer, load_tokenizer
from t5g2.files import new_directory, to_path
from t5g2.interop.hf import write_hf
from t5g2.interop.hf_config import WeightDtype
from t5g2.interop.processor import image_pieces, write_processor
from t5g2.interop.tokenizer import export_tokenizer
from t5g2.models.config import ModelConfig
from t5g2.signals import terminable

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Exports `--checkpoint` to `--out` in `--dtype`."""
    with terminable():
        export_checkpoint(to_path(args.checkpoint), to_path(args.out), args.dtype)
    print(f"{args.out}: for transformers' T5Gemma2ForConditionalGeneration and AutoProcessor")
    return 0


def export_checkpoint(checkpoint: Path, out: Path, dtype: WeightDtype | None = None) -> None:
    """Writes weights, configuration, tokenizer and processor for transformers; all or nothing.

    Args:
        checkpoint: which.
        out: the new directory.
        dtype: of the weights; None: each as it is in the checkpoint.

    Raises:
        UserError: `checkpoint` is none, or `out` is taken.
    """
    meta = read_meta(checkpoint)
    config = settings.model_of(meta)
    tokenizer = load_tokenizer(checkpoint / meta["tokenizer"])
    with new_directory(out) as partial:
        write_hf(open_arrays(checkpoint / "params"), config, partial, dtype=dtype)
        _write_tokenizer(tokenizer, config, partial)


def _write_tokenizer(tokenizer: Tokenizer, config: ModelConfig, out: Path) -> None:
    """Writes the tokenizer and, for a model that reads images, the processor."""
    vision, pieces = config.vision, {}
    if vision is not None:
        ids = {"boi_id": vision.boi_id, "image_id": vision.image_id, "eoi_id": config.eoi_id}
        if max(ids.values()) < tokenizer.vocab_size:
            pieces = image_pieces(tokenizer, **ids)
            write_processor(
                out, image_size=vision.image_size, tokens_per_image=vision.tokens_per_image
            )
        else:
            logger.warning(
                "%s has no image tokens (%s): no processor is written",
                tokenizer.path,
                ", ".join(f"{name} {token}" for name, token in ids.items()),
            )
    export_tokenizer(tokenizer, out, pieces)
