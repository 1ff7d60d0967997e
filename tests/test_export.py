"""An exported run is the same model in transformers: weights, logits, greedy text, tokenizer."""

import numpy as np
import pytest
import torch
import transformers
from small_run import write_corpus, write_recipe

import t5g2
from t5g2 import cli, settings
from t5g2.data.corpus import open_corpus
from t5g2.pretrained import Prompt


@pytest.fixture(scope="module")
def exported(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("exported")
    corpus = write_corpus(home / "corpus", standard_library(200_000))
    recipe = write_recipe(home / "recipe.gin", corpus)
    flags = ["--run_dir", str(home / "run"), "--gin_file", str(recipe)]
    assert cli.main(["train", *flags, "--gin.finish.samples=0"]) == 0
    return home / "run" / "export"


@pytest.fixture(scope="module")
def theirs(exported):
    model, info = transformers.T5Gemma2ForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def heldout_examples(exported):
    """Denoised held-out documents, one of each denoiser, not packed."""
    chosen = settings.run_settings(exported.parent)
    tokenizer = t5g2.load(exported).tokenizer
    corpus = open_corpus(chosen.corpus, tokenizer)
    mixture = corpus.mixture("heldout", chosen.data)
    stream = t5g2.data.batches(mixture, {"inputs": 192, "targets": 96}, batch_size=8)
    batch = next(stream)
    first = batch["decoder_segment_ids"] == 1
    return {
        "input_ids": np.where(batch["encoder_segment_ids"] == 1, batch["encoder_input_tokens"], 0),
        "mask": (batch["encoder_segment_ids"] == 1).astype(np.int32),
        "decoder_input_ids": np.where(first, batch["decoder_input_tokens"], 0),
        "real": first,
    }


def test_logits_on_held_out_text_are_equal(exported, theirs, heldout_examples):
    batch = heldout_examples
    ours = t5g2.load(exported).logits(batch["input_ids"], batch["decoder_input_ids"], batch["mask"])
    with torch.no_grad():
        reference = theirs(
            input_ids=torch.tensor(batch["input_ids"]),
            attention_mask=torch.tensor(batch["mask"]),
            decoder_input_ids=torch.tensor(batch["decoder_input_ids"]),
        ).logits.numpy()
    real = batch["real"]
    difference = np.abs(np.asarray(ours)[real] - reference[real]).max()
    assert difference < 5e-5 * reference[real].std()


def test_greedy_generation_is_equal_token_for_token(exported, theirs, heldout_examples):
    model, batch = t5g2.load(exported), heldout_examples
    prompts = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True)]
    ours = model.generate_ids([Prompt(ids) for ids in prompts], 48)
    for prompt, made in zip(prompts, ours, strict=True):
        reference = theirs.generate(
            torch.tensor(prompt[None]), max_new_tokens=48, do_sample=False, num_beams=1
        )[0, 1:].tolist()
        if 1 in reference:
            reference = reference[: reference.index(1)]
        assert made.tolist() == reference


def test_the_tokenizer_travels_along(exported):
    ours = t5g2.load(exported).tokenizer
    reference = transformers.AutoTokenizer.from_pretrained(exported)
    text = "def f(x):\n    return x  # ünïcödé\n"
    assert reference(text).input_ids == [ours.bos_id, *ours.encode(text)]
    assert reference.decode(ours.encode(text)) == text
    assert reference.convert_tokens_to_ids("<sentinel_0>") == ours.sentinel_ids[0]


def test_text_is_the_same_from_the_checkpoint_and_from_the_export(exported):
    one, other = t5g2.load(exported), t5g2.load(exported.parent / "averaged")
    for text in ("import os\n", "def f(<sentinel_0>):\n    return <sentinel_1>\n"):
        assert one.generate(text, max_new_tokens=16) == other.generate(text, max_new_tokens=16)
