"""A loaded model's prompts: the ids and pixels of transformers' processor, and what is refused."""

import dataclasses

import numpy as np
import pytest
from gemma_images import gemma_with_images, hf_processor, model_with_images
from PIL import Image

from t5g2.errors import UserError
from t5g2.models.vision import normalised
from t5g2.pretrained import Pretrained

SIZE = 28


@pytest.fixture(scope="module")
def directory(tiny_tokenizer, tmp_path_factory):
    return gemma_with_images(tiny_tokenizer, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def model(directory):
    return model_with_images(directory, SIZE)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A wide image of noise, large enough for crops, and a small one."""
    home, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    for name, shape in (("wide.png", (300, 800, 3)), ("small.png", (40, 30, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(home / name)
    return [home / "wide.png", home / "small.png"]


@pytest.mark.parametrize("pan_and_scan", [False, True])
def test_a_prompt_has_the_ids_and_pixels_of_transformers_processor(
    model, directory, images, pan_and_scan
):
    text = "import <start_of_image> as left\n\n<start_of_image>\ndef main():"
    processor = hf_processor(directory, image_size=SIZE, tokens_per_image=4)
    pictures = [Image.open(path).convert("RGB") for path in images]
    theirs = processor(
        text=text,
        images=pictures,
        return_tensors="np",
        images_kwargs={
            "do_pan_and_scan": pan_and_scan,
            "pan_and_scan_min_crop_size": 256,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    )
    prompt = model.encode(text, images, pan_and_scan=pan_and_scan)
    np.testing.assert_array_equal(prompt.ids[:-1], theirs["input_ids"][0])
    assert prompt.ids[-1] == model.tokenizer.sentinel_ids[0]  # the text is to be continued
    pixels = np.moveaxis(np.asarray(normalised(prompt.images)), -1, 1)
    assert len(pixels) == (2 if not pan_and_scan else 2 + 3)
    np.testing.assert_allclose(pixels, theirs["pixel_values"], atol=2 / 255)


def test_images_stand_before_a_text_that_names_no_place_for_them(model, images):
    marked = model.encode("<start_of_image>A cat", images[:1])
    np.testing.assert_array_equal(model.encode("A cat", images[:1]).ids, marked.ids)


def test_images_may_stand_on_both_sides_of_a_sentinel(model, images):
    prompt = model.encode("<start_of_image> <sentinel_3> <start_of_image>", images)
    places = prompt.ids == model.config.vision.image_id
    sentinel = int(np.flatnonzero(prompt.ids == model.tokenizer.sentinel_ids[3])[0])
    assert places[:sentinel].sum() == places[sentinel:].sum() == 4
    assert len(prompt.images) == 2


def test_generate_and_stream_say_what_the_model_generates(model, images):
    prompt = model.encode("A cat", images[:1])
    (expected,) = model.generate_ids([prompt], 12)
    text = model.decode("A cat", expected)
    assert model.generate("A cat", images[0], 12) == text
    assert "".join(model.stream("A cat", images[:1], 12)).rstrip() == text.rstrip()


def test_rows_with_and_without_images_share_a_batch(model, images):
    prompts = [
        model.encode("A cat", images[:1]),
        model.encode("def"),
        model.encode("<start_of_image> and <start_of_image>", images),
    ]
    together = model.generate_ids(prompts, 8)
    for prompt, ids in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(model.generate_ids([prompt], 8)[0], ids)


def test_logits_take_pixel_values_as_transformers_has_them(model, images):
    prompt = model.encode("A cat", images[:1])
    pixels = np.moveaxis(np.asarray(normalised(prompt.images)), -1, 1)
    decoder_ids = np.array([[2, 5, 9]])
    got = model.logits(prompt.ids[None], decoder_ids, pixel_values=pixels)
    expected = model.model(prompt.ids[None], decoder_ids, images=prompt.images[None])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(model.logits(prompt.ids[None], decoder_ids) - expected).max() > 1e-2


def test_what_cannot_be_shown_is_refused(model, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:200])
    text_only = Pretrained(
        dataclasses.replace(model.config, vision=None),
        {name: model.params[name] for name in ("embedder", "encoder", "decoder")},
        model.tokenizer,
        {},
    )
    for use, message in (
        (lambda: model.generate("<start_of_image> A cat"), "1 <start_of_image> for 0 images"),
        (lambda: model.generate("<start_of_image> A", images), "1 <start_of_image> for 2 images"),
        (lambda: model.generate("A cat", tmp_path / "none.png"), "none.png: cannot be read"),
        (lambda: model.generate("A cat", tmp_path / "broken.png"), "broken.png: cannot be decoded"),
        (lambda: text_only.generate("A cat", images[0]), "it has no vision tower"),
        (
            lambda: text_only.logits(
                np.array([[5]]), np.array([[2]]), pixel_values=np.zeros((1, 3, SIZE, SIZE))
            ),
            "it has no vision tower",
        ),
    ):
        with pytest.raises(UserError, match=message):
            use()
    assert isinstance(text_only.generate("A <start_of_image>", None, 2), str)
