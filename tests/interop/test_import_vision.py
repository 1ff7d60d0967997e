"""`t5g2 import` and `export` of models with a vision tower: their own, or another directory's."""

import logging
import shutil

import gemma3_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from gemma_images import gemma_with_images
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

from t5g2 import cli, settings
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.interop.gemma3 import open_gemma3
from t5g2.interop.hf import open_hf
from t5g2.interop.tokenizer import export_tokenizer
from t5g2.models.t5gemma2 import from_parameters

ROWS = 1200  # more than the tokenizers have ids


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def gemma(home, tiny_tokenizer):
    """A text-only Gemma 3 of width 32."""
    model = gemma3_reference.random_text_model(0, vocabulary=ROWS, layers=2, period=2)
    model.save_pretrained(home / "gemma")
    export_tokenizer(tiny_tokenizer, home / "gemma")
    return home / "gemma"


@pytest.fixture(scope="module")
def multimodal(home, tiny_tokenizer):
    """A multimodal Gemma 3 of width 32, and its directory."""
    model = gemma3_reference.random_multimodal_model(1, vision=True, layers=2, vocabulary=ROWS)
    model.save_pretrained(home / "multimodal")
    export_tokenizer(tiny_tokenizer, home / "multimodal")
    return model, home / "multimodal"


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def imported(source, out, *flags):
    assert run("import", source, "--out", out, *flags) == 0
    return settings.model_of(read_meta(out)), read_arrays(out / "params")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("spelling", ["", "vision_model."])
def test_the_tower_of_gemma_3_gives_its_image_features(spelling, multimodal, tmp_path):
    theirs, source = multimodal
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    respelled = {
        key.replace("vision_model.", "").replace("vision_tower.", f"vision_tower.{spelling}"): value
        for key, value in load_file(file).items()
    }
    save_file(respelled, file, metadata={"format": "pt"})
    config, params = open_gemma3(tmp_path / "source")
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.get_image_features(torch.tensor(pixels)).pooler_output.numpy()
    model = from_parameters(config, jax.tree.map(jnp.asarray, params))
    tokens = model.visual_tokens(jnp.moveaxis(jnp.asarray(pixels), 1, -1)[None])
    ours = np.asarray(model.projector(tokens)).reshape(expected.shape)
    assert np.abs(ours - expected).max() < 5e-5 * expected.std()


def test_without_vision_a_multimodal_model_is_imported_as_text_alone(multimodal, tmp_path, capsys):
    with_tower, params = imported(multimodal[1], tmp_path / "one")
    assert "with vision tower" in capsys.readouterr().out
    config, text = imported(multimodal[1], tmp_path / "other", "--no_vision")
    assert "no vision tower" in capsys.readouterr().out
    assert with_tower.vision is not None
    assert config.vision is None
    assert_equal(text, {name: params[name] for name in ("embedder", "encoder", "decoder")})


def test_a_text_model_takes_tower_and_fitting_projector_from_another_directory(
    gemma, multimodal, tmp_path, caplog
):
    plain, text = imported(gemma, tmp_path / "plain")
    donor_config, donor = imported(multimodal[1], tmp_path / "donor")
    with caplog.at_level(logging.WARNING):
        config, params = imported(gemma, tmp_path / "out", "--vision_from", multimodal[1])
    assert plain.vision is None
    assert config.vision == donor_config.vision
    for name in ("vision", "projector"):
        assert_equal(params.pop(name), donor[name])
    assert_equal(params, text)
    assert "projector" not in caplog.text


def test_a_projector_of_another_width_gives_way_to_a_new_one_the_same_each_time(
    gemma, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(reference, "VOCABULARY", ROWS)
    donor = reference.save_model(tmp_path / "donor", 3, vision=True, layers=2, width=64)
    with caplog.at_level(logging.WARNING):
        config, params = imported(gemma, tmp_path / "out", "--vision_from", donor)
    assert "is for a model of width 64, not 32: a new one is drawn" in caplog.text
    assert_equal(params["vision"], jax.tree.map(np.asarray, open_hf(donor)[1]["vision"]))
    weight = params["projector"]["weight"]
    assert weight.shape == (config.vision.hidden_size, 32)
    assert weight.std() == pytest.approx(config.initializer_range, rel=0.1)
    assert not params["projector"]["norm"]["scale"].any()
    _, again = imported(gemma, tmp_path / "again", "--vision_from", donor)
    assert_equal(again, params)


def test_a_tower_from_the_wrong_place_is_refused_in_one_line(
    gemma, multimodal, tmp_path, capsys, monkeypatch
):
    def refused(*arguments):
        assert run("import", *arguments, "--out", tmp_path / "out") == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "has no vision tower" in refused(gemma, "--vision_from", gemma)
    assert "leave out --vision_from" in refused(multimodal[1], "--vision_from", multimodal[1])
    assert "not allowed with" in refused(gemma, "--no_vision", "--vision_from", multimodal[1])
    assert "no config.json" in refused(gemma, "--vision_from", tmp_path)
    monkeypatch.setattr(reference, "IMAGE", ROWS + 3)
    monkeypatch.setattr(reference, "VOCABULARY", ROWS + 10)
    donor = reference.save_model(tmp_path / "donor", 3, vision=True, layers=2)
    assert f"image_id ({ROWS + 3})" in refused(gemma, "--vision_from", donor)
    assert not (tmp_path / "out").exists()


def test_every_wrong_tensor_of_the_image_side_is_named_at_once(multimodal, tmp_path, capsys):
    shutil.copytree(multimodal[1], tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    (bias,) = [key for key in tensors if key.endswith("layers.1.self_attn.k_proj.bias")]
    (patch,) = [key for key in tensors if key.endswith("patch_embedding.weight")]
    del tensors[bias]
    tensors[patch] = torch.zeros(24, 3, 5, 5)
    tensors[bias.replace("k_proj.bias", "rel.bias")] = torch.zeros(3)
    save_file(tensors, file)
    assert run("import", tmp_path / "source", "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    for part in (
        "missing: model.vision_tower.encoder.layers.1.self_attn.k_proj.bias;",
        "unexpected: model.vision_tower.encoder.layers.1.self_attn.rel.bias;",
        "patch_embedding.weight [24, 3, 5, 5] instead of [24, 3, 7, 7]",
    ):
        assert part in message


def test_an_export_runs_in_the_image_text_to_text_pipeline(tiny_tokenizer, tmp_path, monkeypatch):
    tokens = gemma_with_images(tiny_tokenizer, tmp_path / "tokenizer")
    pieces = AutoTokenizer.from_pretrained(tokens)
    monkeypatch.setattr(reference, "VOCABULARY", ROWS)
    monkeypatch.setattr(reference, "BOI", pieces.boi_token_id)
    monkeypatch.setattr(reference, "EOI", pieces.eoi_token_id)
    monkeypatch.setattr(reference, "IMAGE", pieces.image_token_id)
    model = reference.random_model(5, vision=True, layers=2)
    model.save_pretrained(tmp_path / "source")
    shutil.copytree(tokens, tmp_path / "source", dirs_exist_ok=True)
    out = tmp_path / "out"
    imported(tmp_path / "source", tmp_path / "checkpoint")
    assert run("export", "--checkpoint", tmp_path / "checkpoint", "--out", out) == 0

    Image.effect_noise((40, 50), 90).convert("RGB").save(tmp_path / "noise.png")
    theirs = AutoModelForImageTextToText.from_pretrained(out)
    prompt = "<start_of_image> is what"
    inputs = AutoProcessor.from_pretrained(out)(
        images=[[str(tmp_path / "noise.png")]], text=[prompt], return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(theirs.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    pipe = pipeline("image-text-to-text", model=str(out), device="cpu")
    answer = pipe(
        images=str(tmp_path / "noise.png"),
        text=prompt,
        return_tensors=True,
        generate_kwargs={"max_new_tokens": 6, "do_sample": False},
    )
    assert answer[0]["generated_token_ids"].tolist() == expected[0].tolist()


def test_a_tokenizer_without_the_image_tokens_is_exported_without_processor(
    tiny_tokenizer, tmp_path, caplog
):
    model = gemma3_reference.random_multimodal_model(
        1, vision=True, layers=2, vocabulary=ROWS, eoi=ROWS - 1
    )
    model.save_pretrained(tmp_path / "source")
    export_tokenizer(tiny_tokenizer, tmp_path / "source")
    imported(tmp_path / "source", tmp_path / "checkpoint")
    flags = ("--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out")
    assert run("export", *flags) == 0
    assert f"no image tokens (boi_id 10, image_id 12, eoi_id {ROWS - 1})" in caplog.text
    assert not (tmp_path / "out" / "processor_config.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
