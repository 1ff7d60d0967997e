"""An exported processor against one made by hand of transformers' classes."""

import json

import numpy as np
import pytest
import torch
from gemma_images import IMAGE_PIECES, gemma_with_images, hf_processor
from PIL import Image
from transformers import (
    AutoProcessor,
    Gemma3Processor,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    pipeline,
)

from t5g2.data.images import ImageTokens, encode_with_images, open_image, preprocess
from t5g2.data.tokenizer import load_tokenizer
from t5g2.interop.processor import image_pieces, write_processor
from t5g2.interop.tokenizer import export_tokenizer
from t5g2.models.vision import normalised

IMAGE_SIZE, TOKENS = 28, 4
PROMPT = "a\n<start_of_image>\n describe it"


@pytest.fixture(scope="module")
def gemma_directory(tiny_tokenizer, tmp_path_factory):
    return gemma_with_images(tiny_tokenizer, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def by_hand(gemma_directory):
    return hf_processor(gemma_directory, image_size=IMAGE_SIZE, tokens_per_image=TOKENS)


@pytest.fixture(scope="module")
def tokens(by_hand):
    names = by_hand.tokenizer
    return ImageTokens(
        boi_id=names.boi_token_id,
        image_id=names.image_token_id,
        eoi_id=names.eoi_token_id,
        per_image=TOKENS,
    )


def export(tokenizer, tokens, directory):
    pieces = image_pieces(
        tokenizer, boi_id=tokens.boi_id, image_id=tokens.image_id, eoi_id=tokens.eoi_id
    )
    export_tokenizer(tokenizer, directory, pieces)
    write_processor(directory, image_size=IMAGE_SIZE, tokens_per_image=TOKENS)
    return directory


@pytest.fixture(scope="module")
def exported(gemma_directory, tokens, tmp_path_factory):
    return export(load_tokenizer(gemma_directory), tokens, tmp_path_factory.mktemp("out") / "hf")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(noise).save(path)
    return path


def test_the_file_is_the_one_that_transformers_saves(by_hand, exported, tmp_path):
    by_hand.save_pretrained(tmp_path)
    name = "processor_config.json"
    assert (exported / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize("scan", [False, True])
def test_autoprocessor_gives_what_one_made_by_hand_gives(by_hand, exported, picture, scan):
    loaded = AutoProcessor.from_pretrained(exported)
    assert type(loaded) is Gemma3Processor
    options = {
        "images": [[str(picture)]],
        "text": [PROMPT],
        "do_pan_and_scan": scan,
        "pan_and_scan_min_crop_size": 32,
        "return_tensors": "np",
    }
    ours, theirs = loaded(**options), by_hand(**options)
    assert set(ours) == set(theirs) == {
        "input_ids", "attention_mask", "token_type_ids", "pixel_values",
    }  # fmt: skip
    assert len(ours["pixel_values"]) == (3 if scan else 1)
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_training_sees_what_the_exported_processor_makes(
    gemma_directory, tokens, exported, picture
):
    theirs = AutoProcessor.from_pretrained(exported)(
        images=[[str(picture)]], text=[PROMPT], return_tensors="np"
    )
    tokenizer = load_tokenizer(gemma_directory)
    ids = encode_with_images(tokenizer, PROMPT, [0], tokens)
    assert [tokenizer.bos_id, *ids.tolist()] == theirs["input_ids"][0].tolist()
    pixels = np.asarray(normalised(preprocess(open_image(picture), IMAGE_SIZE)))
    np.testing.assert_allclose(
        pixels.transpose(2, 0, 1), theirs["pixel_values"][0], rtol=0, atol=1e-6
    )


def test_a_sentencepiece_tokenizer_lends_any_of_its_pieces(tiny_tokenizer, tmp_path, picture):
    first = tiny_tokenizer.sentinel_ids[-3]
    tokens = ImageTokens(boi_id=first, image_id=first + 1, eoi_id=first + 2, per_image=TOKENS)
    loaded = AutoProcessor.from_pretrained(export(tiny_tokenizer, tokens, tmp_path / "hf"))
    marker = tiny_tokenizer.id_to_piece(first)
    made = loaded(images=[[str(picture)]], text=[f"a {marker} b"])["input_ids"][0]
    ours = encode_with_images(tiny_tokenizer, "a <start_of_image> b", [0], tokens)
    assert made == [tiny_tokenizer.bos_id, *ours.tolist()]


@pytest.mark.parametrize("group", ["extra_special_tokens", "model_specific_special_tokens"])
def test_the_models_image_id_decides_and_not_the_tokenizers_own_name(
    gemma_directory, tmp_path, tokens, picture, group
):
    # Gemma 3's tokenizer names an image token beyond T5Gemma 2's vocabulary.
    source = tmp_path / "gemma3"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((gemma_directory / "tokenizer.json").read_bytes())
    config = json.loads((gemma_directory / "tokenizer_config.json").read_text())
    for old in ("extra_special_tokens", "model_specific_special_tokens"):
        config.pop(old, None)
    config[group] = dict(IMAGE_PIECES)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(source)
    other = tokenizer.sentinel_ids[-1]
    moved = ImageTokens(
        boi_id=tokens.boi_id, image_id=other, eoi_id=tokens.eoi_id, per_image=TOKENS
    )
    loaded = AutoProcessor.from_pretrained(export(tokenizer, moved, tmp_path / "hf"))
    assert loaded.tokenizer.image_token_id == other
    ids = loaded(images=[[str(picture)]], text=[PROMPT])["input_ids"][0]
    assert ids.count(other) == TOKENS
    assert ids[1:] == encode_with_images(tokenizer, PROMPT, [0], moved).tolist()


def tiny_model(tokens, vocabulary):
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 7,
        "vision_use_head": False,
    }
    ids = {"image_token_index": tokens.image_id, "eoi_token_index": tokens.eoi_id}
    encoder = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": TOKENS, **ids}
    torch.manual_seed(0)
    config = T5Gemma2Config(encoder=encoder, decoder=text, **ids)
    model = T5Gemma2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_image_text_to_text_pipeline_runs_on_the_directory(tokens, exported, picture):
    processor = AutoProcessor.from_pretrained(exported)
    model = tiny_model(tokens, len(processor.tokenizer))
    model.save_pretrained(exported)
    pipe = pipeline("image-text-to-text", model=str(exported), device="cpu")
    asked = {"generate_kwargs": {"max_new_tokens": 5, "min_new_tokens": 5}}
    answer = pipe(images=str(picture), text=PROMPT, return_tensors=True, **asked)
    inputs = processor(images=[[str(picture)]], text=[PROMPT], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    assert answer[0]["generated_token_ids"].tolist() == expected[0].tolist()
    other = Image.new("RGB", (40, 40), "red")
    moved = model(**inputs, decoder_input_ids=expected).logits
    inputs["pixel_values"] = processor(images=[[other]], text=[PROMPT], return_tensors="pt")[
        "pixel_values"
    ]
    assert (model(**inputs, decoder_input_ids=expected).logits - moved).abs().max() > 1e-4
