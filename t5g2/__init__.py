"""t5g2: pretrain T5Gemma-2-style encoder-decoders with the UL2 objective, in JAX.

`load` gives a trained model; `data.batches` gives what it is trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from t5g2 import data

if TYPE_CHECKING:
    from t5g2.pretrained import Pretrained

__all__ = ["data", "load"]


def load(path: str | Path, dtype: Literal["float32", "bfloat16"] | None = None) -> Pretrained:
    """Loads a t5g2 checkpoint or a Hugging Face directory; see `t5g2.pretrained.load`."""
    # Imported here, so that importing t5g2 costs nothing.
    from t5g2 import pretrained

    return pretrained.load(path, dtype)
