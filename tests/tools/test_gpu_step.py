"""The benchmark for GPUs makes do with jax, flax, optax and numpy."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "tools" / "bench"

# What pip brings with flax stays; of our own dependencies nothing else is found.
PROGRAM = """
import importlib.machinery, sys
gone = {"array_record", "gin", "grain", "isal", "jaxtyping", "matplotlib", "pyarrow", "PIL",
        "safetensors", "sentencepiece", "seqio", "tensorboardX", "tensorflow", "tokenizers",
        "zstandard"}
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in gone else find(name, *rest)
)
import gpu_step
job = gpu_step.Job(side="t5g2", size="270m", length=512, rows=2, peer_rows=1, steps=1,
                   remat="dots", attention="auto", layers=1, profile=None)
gpu_step.stand_in()
import our_step
from t5g2.data.batch import empty_batch, fill_rows
from t5g2.planning.rate import chip_of
flops, tokens = gpu_step.needed(gpu_step.model_of(job), next(gpu_step.batches(job)))
stream, batch = gpu_step.stream_of(job), empty_batch(2, 512, 512)
fill_rows(batch, stream, 0, stream.start())
filled = sum((batch[f"{side}_segment_ids"] != 0).sum() for side in ("encoder", "decoder"))
assert tokens == filled > 1600, (tokens, filled)
assert flops > 6 * tokens * 1e6
assert not gone - {"isal", "jaxtyping"} & set(sys.modules)
"""


def test_rows_and_step_come_without_any_other_package():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=BENCH, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
