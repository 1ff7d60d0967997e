"""`t5g2 evaluate --task`: a user's seqio Tasks on the checkpoints of a run."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest
from small_run import write_corpus, write_recipe

import t5g2
from t5g2 import cli, evaluate_tasks, settings
from t5g2.checkpoints.average import write_average
from t5g2.checkpoints.store import write_parameters
from t5g2.data.vocabularies import seqio_vocabulary
from t5g2.models.t5gemma2 import abstract_model, parameter_tree
from t5g2.pretrained import Prompt
from t5g2.scoring import Scorer

MODULE = "evaluation_tasks"


@pytest.fixture(scope="module")
def run_dir(tiny_tokenizer, tmp_path_factory, standard_library):
    """What a run leaves behind so far: three checkpoints of random weights."""
    home = tmp_path_factory.mktemp("run")
    corpus = write_corpus(home / "corpus", standard_library(20_000))
    recipe = write_recipe(home / "recipe.gin", corpus)
    bindings = ["model.vocab_size=1000", "data.targets_length=24"]
    chosen = settings.read_settings([str(recipe)], bindings)
    (home / "tokenizer").mkdir()
    shutil.copy(tiny_tokenizer.path, home / "tokenizer" / "tokenizer.model")
    (home / "config.gin").write_text(chosen.to_gin())
    for step in (3, 6):
        write_checkpoint(home, chosen, step)
    return home


def write_checkpoint(home, chosen, step):
    rng = np.random.default_rng(step)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        parameter_tree(abstract_model(chosen.model)),
    )
    meta = {
        "step": step,
        "model": settings.model_to_json(chosen.model),
        "settings": chosen.to_json(),
        "tokenizer": "../../tokenizer",
        "versions": {},
    }
    path = home / "checkpoints" / str(step)
    path.mkdir(parents=True)
    write_parameters(path, params, meta)


@pytest.fixture(autouse=True)
def tokenizer_of_the_tasks(run_dir, monkeypatch):
    monkeypatch.setenv("EVALUATION_TOKENIZER", str(run_dir / "tokenizer"))


def evaluate(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def results(directory, name="reversed"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_metrics_are_those_of_the_models_generations_and_scores(run_dir, tmp_path):
    task = ("--task", f"{MODULE}:reversed")
    path = run_dir / "checkpoints" / "6"
    assert evaluate("--checkpoint", path, *task, "--out", tmp_path) == 0
    (found,) = results(tmp_path)
    model = t5g2.load(path)
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    from evaluation_tasks import TEXTS

    pairs = [
        (Prompt(np.array([2, *encode(f"{text} <")])), np.array([*encode(text[::-1]), eos]))
        for text in TEXTS
    ]
    scorer = Scorer(model)
    made = scorer.generate([prompt for prompt, _ in pairs], 24)
    scores = [score.log_likelihood for score in scorer.score(pairs)]
    ends = [
        (prompt, ids if len(ids) == 24 else np.append(ids, eos))
        for (prompt, _), ids in zip(pairs, made, strict=True)
    ]
    sure = [score.log_likelihood for score in scorer.score(ends)]
    assert found["metrics"] == {
        "exact_match": 0.0,
        "count": len(TEXTS),
        "said": "|".join(seqio_vocabulary(model.tokenizer).decode(ids.tolist()) for ids in made),
        "mean_score": pytest.approx(np.mean(scores), abs=1e-3),
        "mean_sure": pytest.approx(np.mean(sure), abs=1e-3),
    }
    assert (found["step"], found["count"], found["split"]) == (6, len(TEXTS), "validation")


def test_all_checkpoints_once_and_followed_until_the_run_ends(
    run_dir, tmp_path, monkeypatch, capsys
):
    home = tmp_path / "run"
    shutil.copytree(run_dir, home)
    both = ("--run_dir", home, "--task", f"{MODULE}:scored", "--examples", 2)
    assert evaluate(*both, "--all") == 0
    assert [row["weights"] for row in results(home / "eval", "scored")] == ["3", "6"]
    with (home / "eval" / "scored.jsonl").open("a") as file:
        file.write('{"task": "sco')  # killed
        file.write("\n")
    assert evaluate(*both, "--all") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["3: done before", "6: done before"]
    monkeypatch.setattr(evaluate_tasks, "_LOOKS_EVERY_SECONDS", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(evaluate_tasks, "is_finished", lambda run_dir: ended.is_set())

    def go_on():
        chosen = settings.run_settings(home)
        write_checkpoint(tmp_path / "beside", chosen, 9)
        (tmp_path / "beside" / "checkpoints" / "9").rename(home / "checkpoints" / "9")
        write_average([home / "checkpoints" / name for name in ("6", "9")], home / "averaged")
        ended.set()

    meanwhile = threading.Timer(0.5, go_on)
    meanwhile.start()
    assert evaluate(*both, "--follow") == 0
    meanwhile.join()
    rows = (home / "eval" / "scored.jsonl").read_text().splitlines()
    done = [json.loads(row)["weights"] for row in rows if row.endswith("}")]
    assert done == ["3", "6", "9", "averaged"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "reversed"), "name a Task as 'module:name'"),
        (("--task", "no_module:x"), "No module named 'no_module'; set PYTHONPATH"),
        (("--task", f"{MODULE}:revresed"), "no seqio Task or Mixture 'revresed'; did you mean"),
        (("--task", f"{MODULE}:unmeasured"), "unmeasured has no metric functions"),
        (("--task", f"{MODULE}:bytes"), "its tokenizer is another than the checkpoint's"),
        (("--task", f"{MODULE}:scored", "--split", "tset"), "no split 'tset'; did you mean 'test'"),
        (("--task", f"{MODULE}:scored", "--targets_length", 3), "evaluate beyond its length with"),
        (("--task", f"{MODULE}:scored", "--all"), "give --run_dir"),
        (("--all",), "only with --task"),
        (("--gin.data.inputs_length=100",), "the checkpoint was trained with 192"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(run_dir, capsys, arguments, message):
    assert evaluate("--checkpoint", run_dir / "checkpoints" / "3", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
