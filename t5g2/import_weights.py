"""`t5g2 import`: a Hugging Face directory of T5Gemma 2 or Gemma 3 as a checkpoint."""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from t5g2.checkpoints.store import package_versions, write_parameters
from t5g2.data.tokenizer import Tokenizer, load_tokenizer
from t5g2.errors import UserError
from t5g2.files import new_directory, to_path
from t5g2.interop import gemma3
from t5g2.interop.hf import open_hf, read_hf_config
from t5g2.interop.vision_transfer import with_tower
from t5g2.models.config import ModelConfig
from t5g2.settings import model_to_json
from t5g2.signals import terminable
from t5g2.training.metrics import Totals

TOKENIZER_DIR = "tokenizer"


def run(args: argparse.Namespace) -> int:
    """Imports `directory` into `--out`; all or nothing."""
    source, out, factor = to_path(args.directory), to_path(args.out), args.rope_factor_global
    if factor is not None and not 0 < factor < float("inf"):
        raise UserError(f"--rope_factor_global must be above 0, not {factor}")
    with terminable(), new_directory(out) as partial:
        model_type, config, params = _open(source, text_only=args.no_vision)
        if args.vision_from is not None:
            donor = to_path(args.vision_from)
            config, params = with_tower((config, params), _open(donor)[1:], donor)
        if factor is not None:
            config = dataclasses.replace(config, rope_factor_global=factor)
        tokenizer = _tokenizer(source, args.tokenizer, config)
        meta = {
            "step": 0,
            **Totals()._asdict(),
            "model": model_to_json(config),
            "imported_from": model_type,
            "tokenizer": TOKENIZER_DIR,
            "versions": package_versions(),
        }
        _copy_tokenizer(tokenizer, partial / TOKENIZER_DIR)
        write_parameters(partial, params, meta)
    tower = "no vision tower" if config.vision is None else "with vision tower"
    print(
        f"{out}: from {model_type}, {tower}, tokenizer {tokenizer.path.name} "
        f"({tokenizer.vocab_size} ids)"
    )
    if model_type in gemma3.MODEL_TYPES:
        print(
            f"positions of global layers are divided by {config.rope_factor_global:g}"
            + (", as in the source" if factor is None else "")
            + "; T5Gemma 2 was adapted with --rope_factor_global 8"
        )
    return 0


def _open(source: Path, *, text_only: bool = False) -> tuple[str, ModelConfig, dict[str, Any]]:
    """Model type, configuration and (lazy) parameters of a directory."""
    model_type = read_hf_config(source).get("model_type")
    if model_type == "t5gemma2":
        return model_type, *open_hf(source, text_only=text_only)
    if model_type in gemma3.MODEL_TYPES:
        return model_type, *gemma3.open_gemma3(source, text_only=text_only)
    raise UserError(
        f"{source}: model_type is {model_type!r}; what can be imported is t5gemma2, "
        f"{' and '.join(gemma3.MODEL_TYPES)}"
    )


def _tokenizer(source: Path, given: str | None, config: ModelConfig) -> Tokenizer:
    """The tokenizer given, or the source's own, made sure to suit the model."""
    found = [source / name for name in ("tokenizer.json", "tokenizer.model")]
    candidates = [path for path in found if path.is_file()] if given is None else [to_path(given)]
    if not candidates:
        raise UserError(f"{source} has no tokenizer.json or tokenizer.model: give --tokenizer PATH")
    tokenizer = load_tokenizer(candidates[0])
    if tokenizer.vocab_size > config.vocab_size and len(candidates) > 1:
        # Gemma 3's tokenizer.json has a token for images beyond the rows of its text models.
        tokenizer = load_tokenizer(candidates[1])
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids but the model {config.vocab_size} "
            "embeddings: give --tokenizer PATH of one that fits"
        )
    for name in ("pad_id", "eos_id", "bos_id"):
        theirs, ours = getattr(tokenizer, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"{tokenizer.path} has {name} {theirs} but the model {ours}: give --tokenizer PATH "
                "of the model's own"
            )
    return tokenizer


def _copy_tokenizer(tokenizer: Tokenizer, home: Path) -> None:
    home.mkdir()
    shutil.copyfile(tokenizer.path, home / f"tokenizer{tokenizer.path.suffix}")
    description = tokenizer.path.with_name("tokenizer_config.json")
    if description.is_file():  # Read again by `t5g2 export`.
        shutil.copyfile(description, home / description.name)
