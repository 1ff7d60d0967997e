"""A run small enough for a test: a few documents, a narrow model, seconds to train."""

from pathlib import Path

RECIPE = """
model.vocab_size = 512
model.hidden_size = 32
model.mlp_dim = 64
model.num_layers = 2
model.num_heads = 2
model.num_kv_heads = 1
model.head_dim = 16
model.sliding_window = 16
model.global_every = 2
model.query_pre_attn_scalar = 16.0
corpus.path = '{corpus}'
corpus.heldout_share = 0.2
tokenizer.vocab_size = 420
tokenizer.sentinels = 32
data.inputs_length = 192
data.targets_length = 96
train.rows = 4
train.total_steps = 12
train.log_every = 1
evaluation.every = 6
evaluation.batches = 2
checkpoints.every = 3
finish.average_last = 2
finish.samples = 2
finish.sample_tokens = 40
"""


def write_corpus(directory: Path, documents: list[str]) -> Path:
    """Writes documents as text files and returns the directory."""
    directory.mkdir()
    for number, text in enumerate(documents):
        (directory / f"document{number:03}.txt").write_text(text, encoding="utf-8")
    return directory


def write_recipe(path: Path, corpus: Path) -> Path:
    """Writes the gin file of the small run over a corpus and returns its path."""
    path.write_text(RECIPE.format(corpus=corpus))
    return path
