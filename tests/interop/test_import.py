"""`t5g2 import`: what comes in goes out again to the bit, is a checkpoint, and can be trained."""

import dataclasses
import json
import shutil

import gemma3_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file
from small_run import write_corpus, write_recipe

import t5g2
from t5g2 import cli, settings
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.data.corpus import reopen_corpus, row_stream
from t5g2.evaluation import HeldOut
from t5g2.initialization import make_first_state, starting_tokenizer
from t5g2.interop.names import canonical
from t5g2.interop.tokenizer import export_tokenizer
from t5g2.models.t5gemma2 import logical_axes
from t5g2.parallel.mesh import make_mesh
from t5g2.parallel.rules import make_layout, parameter_shardings
from t5g2.reporting.metrics_log import read_metrics
from t5g2.training.optimizer import make_optimizer
from t5g2.training.schedule import make_schedule
from t5g2.training.state import state_shardings
from t5g2.training.step import jit_eval_step

ROWS = 1024  # the tokenizer has 1000 ids


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, tiny_tokenizer):
    directory = tmp_path_factory.mktemp("gemma")
    model = gemma3_reference.random_text_model(0, vocabulary=ROWS, layers=2, period=2)
    model.save_pretrained(directory)
    export_tokenizer(tiny_tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def imported(gemma, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert cli.main(["import", str(gemma), "--out", str(out)]) == 0
    return out


def says(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def tensors_of(directory):
    """Name, as `save_pretrained` spells it, to tensor, from one file or shards."""
    files = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
    return {canonical(key): tensor for tensors in files for key, tensor in tensors.items()}


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_t5gemma_2_comes_back_from_a_round_trip_bit_for_bit(
    dtype, shard_size, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(reference, "VOCABULARY", ROWS)
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    model = reference.random_model(0, vision=True, layers=2, width=32).to(getattr(torch, dtype))
    model.save_pretrained(source, max_shard_size=shard_size)
    assert (len(list(source.glob("*.safetensors"))) > 2) == (shard_size == "100KB")
    export_tokenizer(tiny_tokenizer, source)
    assert cli.main(["import", str(source), "--out", str(checkpoint)]) == 0
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    assert_same_bits(tensors_of(source), tensors_of(out))
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    theirs, info = reference.load_model(out, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == getattr(torch, dtype)


def test_export_rounds_to_the_dtype_that_is_asked_for(gemma, imported, tmp_path):
    out = tmp_path / "half"
    flags = ["--checkpoint", str(imported), "--out", str(out), "--dtype", "bfloat16"]
    assert cli.main(["export", *flags]) == 0
    table = tensors_of(out)["model.encoder.embed_tokens.weight"]
    exact = tensors_of(gemma)["model.embed_tokens.weight"]
    assert torch.equal(table, exact.to(torch.bfloat16))


def test_the_import_is_a_checkpoint_like_any_other(imported, tmp_path, capsys):
    text = ("--text", "import os\n", "--max_new_tokens", 4)
    exported = tmp_path / "hf"
    says(capsys, "export", "--checkpoint", imported, "--out", exported)
    ours = says(capsys, "generate", "--checkpoint", imported, *text)
    assert ours == says(capsys, "generate", "--checkpoint", exported, *text)
    shown = says(capsys, "inspect", "checkpoint", imported)
    assert "none: imported from gemma3_text" in shown
    assert "no: parameters alone" in shown
    assert "give --gin_file" in refused(capsys, "evaluate", "--checkpoint", imported)


def test_the_rope_factor_is_the_sources_own_unless_told(gemma, tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    assert "are divided by 1, as in the source" in says(capsys, "import", gemma, "--out", one)
    flags = ("--rope_factor_global", 8)
    assert "are divided by 8;" in says(capsys, "import", gemma, "--out", other, *flags)
    factors = [settings.model_of(read_meta(path)).rope_factor_global for path in (one, other)]
    assert factors == [1.0, 8.0]


def test_a_tokenizer_beyond_the_models_rows_gives_way_to_the_one_beside_it(
    gemma, tmp_path, tiny_tokenizer
):
    """Gemma 3's tokenizer.json has a token more than its text models, tokenizer.model has not."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(gemma, source)
    spec = json.loads((source / "tokenizer.json").read_text())
    image = {**spec["added_tokens"][0], "content": "<image_soft_token>"}
    spec["added_tokens"] += [
        {**image, "id": i, "content": f"<image_{i}>"} for i in range(1000, ROWS + 1)
    ]
    (source / "tokenizer.json").write_text(json.dumps(spec))
    assert cli.main(["import", str(source), "--out", str(out)]) == 0
    assert t5g2.load(out).tokenizer.fingerprint == tiny_tokenizer.fingerprint


def test_what_cannot_be_imported_is_refused_in_one_line(gemma, tmp_path, capsys):
    def changed(**change):
        directory = tmp_path / f"changed {len(list(tmp_path.iterdir()))}"
        shutil.copytree(gemma, directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **change}))
        return directory

    out = tmp_path / "out"

    def error(*arguments):
        return refused(capsys, "import", *arguments, "--out", out)

    for other in ("gemma2", "llama"):
        message = error(changed(model_type=other))
        assert f"model_type is '{other}'; what can be imported is t5gemma2, gemma3_text" in message
    assert "bos_id 2 but the model 5" in error(changed(bos_token_id=5))
    without = changed()
    for path in without.glob("tokenizer*"):
        path.unlink()
    assert "give --tokenizer PATH" in error(without)
    assert "no tokenizer at" in error(without, "--tokenizer", tmp_path / "nothing")
    assert "has no config.json" in error(tmp_path / "nothing")
    assert "must be above 0" in error(gemma, "--rope_factor_global", 0)
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    assert "is not empty" in error(gemma)
    assert cli.main(["import", str(without), "--tokenizer", str(gemma), "--out", f"{out}2"]) == 0


@pytest.fixture(scope="module")
def recipe(imported, tmp_path_factory, standard_library):
    """Two steps of the imported model."""
    home = tmp_path_factory.mktemp("recipe")
    recipe = write_recipe(home / "recipe.gin", write_corpus(home / "c", standard_library(200_000)))
    with recipe.open("a") as file:
        for name, value in settings.model_to_json(settings.model_of(read_meta(imported))).items():
            file.write(f"model.{name} = {value!r}\n")
        file.write("train.total_steps = 2\nfinish.average_last = 1\nfinish.samples = 0\n")
    return recipe


@pytest.fixture
def train(recipe, imported):
    """`train(run_dir, *bindings, start=imported)`: the recipe's run, from these parameters."""

    def train(run_dir, *bindings, start=imported):
        flags = [f"--gin.{binding}" for binding in (*bindings, f"train.init_from={start}")]
        return cli.main(["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *flags])

    return train


def test_a_run_starts_with_the_loss_of_the_import_and_its_tokenizer(
    train, imported, tmp_path, capsys
):
    start, run_dir = tmp_path / "start", tmp_path / "run"
    shutil.copytree(imported, start)
    assert train(run_dir, "train.stop_at=1", start=start) == 0
    assert "tokenizer: that of train.init_from" in capsys.readouterr().err
    shutil.rmtree(start)  # from here on the run has all it needs
    assert train(run_dir, start=start) == 0

    chosen, layout = settings.run_settings(run_dir), make_layout(make_mesh(settings.MeshConfig()))
    corpus = reopen_corpus(chosen.corpus, run_dir)
    assert corpus.tokenizer.fingerprint == t5g2.load(imported).tokenizer.fingerprint
    rows = row_stream(corpus, "train", chosen.data, chosen.train.rows)
    params = read_arrays(imported / "params")
    step = jit_eval_step(
        layout,
        parameter_shardings(layout, logical_axes(chosen.model), params),
        config=chosen.model,
        num_tasks=len(rows.tasks),
        accumulation=1,
    )
    steps = read_metrics(run_dir / "metrics.jsonl").train
    assert [row["step"] for row in steps] == [1, 2]
    # The first training batch, evaluated.
    expected = HeldOut(rows, step, layout, batches=1).loss(params).loss
    assert steps[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert not np.array_equal(
        t5g2.load(run_dir / "averaged").params["embedder"]["table"], params["embedder"]["table"]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hugging_face_directory_of_t5gemma_2_is_a_start_too(
    dtype, recipe, imported, tmp_path, capsys
):
    flags = ("--out", tmp_path / "hf", "--dtype", dtype)
    says(capsys, "export", "--checkpoint", imported, *flags)
    chosen = settings.read_settings([str(recipe)], [f"train.init_from='{tmp_path / 'hf'}'"])
    assert starting_tokenizer(chosen).path == str(tmp_path / "hf")
    given = dataclasses.replace(chosen.tokenizer, path="another.model")
    assert starting_tokenizer(dataclasses.replace(chosen, tokenizer=given)) == given
    optimizer = make_optimizer(chosen.optimizer, make_schedule(chosen.schedule, 2))
    shapes, shardings = state_shardings(
        chosen.model, optimizer, make_layout(make_mesh(chosen.mesh))
    )
    state = make_first_state(chosen, optimizer, shardings)
    given = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, dtype), np.float32), read_arrays(imported / "params")
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, given)
    assert jax.eval_shape(lambda: state) == shapes
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.step, state.opt_state)))


def test_a_run_of_another_model_is_refused_naming_what_differs(train, gemma, tmp_path, capsys):
    def error(*bindings, **options):
        assert train(tmp_path / "run", *bindings, **options) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    message = error("model.mlp_dim=56", "model.rope_factor_global=8.0", "model.dtype=bfloat16")
    assert message.endswith("model.mlp_dim: 48 -> 56; model.rope_factor_global: 1.0 -> 8.0")
    assert "`t5g2 import`" in error(start=gemma)
    assert "is not a t5g2 checkpoint" in error(start=tmp_path)
