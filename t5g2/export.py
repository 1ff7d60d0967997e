"""`t5g2 export`: a checkpoint as a Hugging Face directory."""

import argparse
from pathlib import Path

from t5g2 import settings
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.data.tokenizer import load_tokenizer
from t5g2.files import new_directory
from t5g2.interop.hf import export_hf
from t5g2.interop.hf_config import WeightDtype
from t5g2.interop.tokenizer import export_tokenizer


def run(args: argparse.Namespace) -> int:
    """Exports `--checkpoint` to `--out` in `--dtype`."""
    export_checkpoint(Path(args.checkpoint), Path(args.out), args.dtype)
    print(f"{args.out}: for transformers' T5Gemma2ForConditionalGeneration and AutoTokenizer")
    return 0


def export_checkpoint(checkpoint: Path, out: Path, dtype: WeightDtype = "float32") -> None:
    """Writes weights, configuration and tokenizer for transformers; all or nothing.

    Raises:
        UserError: `checkpoint` is none, or `out` is taken.
    """
    meta = read_meta(checkpoint)
    config = settings.model_of(meta)
    with new_directory(out) as partial:
        export_hf(read_arrays(checkpoint / "params"), config, partial, dtype=dtype)
        export_tokenizer(load_tokenizer(checkpoint / meta["tokenizer"]), partial)
