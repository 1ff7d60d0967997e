"""Import and export of a model take the memory of one of its arrays, not of all of them."""

import dataclasses
import sys
from pathlib import Path

import pytest

from t5g2.models.config import T5GEMMA2_1B, ModelConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

from import_memory import peak_bytes, write_random_model, write_tokenizer

LARGE = dataclasses.replace(T5GEMMA2_1B, vocab_size=8192, num_layers=6, vision=None)
SMALL = dataclasses.replace(LARGE, num_layers=1, mlp_dim=64, vocab_size=1024)


def peaks(config: ModelConfig, home: Path) -> tuple[int, int]:
    """(bytes of the weights, largest peak of import and export)."""
    source, checkpoint, out = (home / name for name in ("source", "checkpoint", "out"))
    count = write_random_model(config, source)
    tokenizer = write_tokenizer(home / "tokenizer.model")
    importing = peak_bytes("import", source, "--out", checkpoint, "--tokenizer", tokenizer)
    exporting = peak_bytes("export", "--checkpoint", checkpoint, "--out", out)
    return 2 * count, max(importing, exporting)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
def test_the_peak_grows_by_less_than_half_of_the_weights(tmp_path):
    size, peak = peaks(LARGE, tmp_path / "large")
    _, baseline = peaks(SMALL, tmp_path / "small")
    assert size > 600_000_000  # 0.3 billion parameters
    # The largest array has a seventh of them; Orbax and numpy hold it more than once.
    assert peak - baseline < size / 2
