"""lm-evaluation-harness runs the exported model, offline, and finds our log-likelihoods."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5g2.checkpoints.store import write_parameters
from t5g2.export import export_checkpoint
from t5g2.models.config import TINY
from t5g2.models.t5gemma2 import abstract_model, parameter_tree
from t5g2.pretrained import load
from t5g2.scoring import Scorer
from t5g2.settings import model_to_json

TASKS = {
    "choose": """
target_delimiter: ""
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "continue": """
output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {max_gen_toks: 8, until: ["never"]}
metric_list: [{metric: exact_match}]
""",
}
SENTINEL = "<sentinel_0>"
DOCUMENTS = [
    {"text": "import os<sentinel_0>", "choices": ["<sentinel_0>\nimport re", "<sentinel_0>def"]},
    {"text": "def f(self):<sentinel_0>", "choices": ["<sentinel_0> return", "<sentinel_0>class x"]},
    {"text": "for i in range(<sentinel_0>", "choices": ["<sentinel_0>10):", "<sentinel_0>import"]},
]


@pytest.fixture(scope="module")
def exported(tiny_tokenizer, tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    config = dataclasses.replace(
        TINY, vocab_size=tiny_tokenizer.vocab_size, num_layers=2, global_every=2
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        parameter_tree(abstract_model(config)),
    )
    # Otherwise what random weights say is what they hear: bos.
    for leaf in jax.tree.leaves(params):
        if leaf.shape == (config.vocab_size, config.hidden_size):
            leaf[config.bos_id] = 0
    checkpoint = home / "checkpoint"
    (checkpoint / "tokenizer").mkdir(parents=True)
    shutil.copy(tiny_tokenizer.path, checkpoint / "tokenizer" / "tokenizer.model")
    meta = {"step": 0, "model": model_to_json(config), "tokenizer": "tokenizer", "versions": {}}
    write_parameters(checkpoint, params, meta)
    export_checkpoint(checkpoint, home / "export")
    return home / "export"


def harness(exported, home, batch_size):
    """Runs the tasks; returns the logged answers of each, by document."""
    (home / "documents.jsonl").write_text(
        "".join(json.dumps({**document, "label": 0}) + "\n" for document in DOCUMENTS)
    )
    for name, text in TASKS.items():
        (home / f"{name}.yaml").write_text(
            f"task: tiny_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {home}/documents.jsonl}}}}\n"
            f'test_split: test\ndoc_to_text: "{{{{text}}}}"\n{text}'
        )
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={exported},backend=seq2seq,dtype=float32"),
        *("--tasks", "tiny_choose,tiny_continue", "--include_path", str(home)),
        *("--batch_size", str(batch_size), "--log_samples", "--output_path", str(home / "out")),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    ran = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = {}
    for path in (home / "out").rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        found[path.name.split("_")[2]] = [row["resps"] for row in rows]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_harness_finds_the_log_likelihoods_and_generations_that_we_do(
    exported, tmp_path, batch_size
):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (pip install 'lm_eval[hf]')")
    model = load(exported)
    scorer = Scorer(model)
    prompts = [model.encode(document["text"]) for document in DOCUMENTS]
    tokenizer = model.tokenizer
    pairs = [
        (prompt, [tokenizer.sentinel_ids[0], *tokenizer.encode(choice.removeprefix(SENTINEL))])
        for prompt, document in zip(prompts, DOCUMENTS, strict=True)
        for choice in document["choices"]
    ]
    found = harness(exported, tmp_path, batch_size)
    theirs = [float(choice[0][0]) for document in found["choose"] for choice in document]
    ours = [score.log_likelihood for score in scorer.score(pairs)]
    np.testing.assert_allclose(theirs, ours, atol=1e-3)
    made = [tokenizer.decode(ids, skip_special=True) for ids in scorer.generate(prompts, 8)]
    assert any(text.strip() for text in made)
    # Of an encoder-decoder the harness lets the answer be as much longer as the context is long.
    for document, text in zip(found["continue"], made, strict=True):
        assert document[0][0].strip().startswith(text.strip())
