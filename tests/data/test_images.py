"""Images and image placeholders against transformers' Gemma3Processor (its Pillow back end)."""

import io
import re

import numpy as np
import pytest
from gemma_images import gemma_with_images, hf_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t5g2.data.images import (
    START_OF_IMAGE,
    ImageTokens,
    encode_with_images,
    expand_image_placeholders,
    open_image,
    pan_and_scan,
    preprocess,
)
from t5g2.data.tokenizer import load_tokenizer
from t5g2.errors import UserError
from t5g2.models.vision import normalised

SIZE = 56
MODES = ["RGB", "RGBA", "L", "P", "LA", "1", "I;16"]
# Where a file may hold transparency without an alpha channel: by palette entry or by colour.
PALETTE_ALPHA, TRANSPARENT_COLOUR = "P with alpha", ["P with colour", "RGB with colour"]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient, so that no two places and no two turns look alike."""
    rng = np.random.default_rng(width * 10_000 + height)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    colour = (ramp + rng.integers(0, 56, (height, width, 4))).astype(np.uint8)
    image = Image.fromarray(colour, "RGBA")
    base = mode.split()[0]
    image = image if base == "RGBA" else image.convert(base if base == "LA" else "RGB")
    return image if base in ("RGBA", "LA", "RGB") else image.convert(base)


def save(image: Image.Image, path, mode: str = "", **options) -> str:
    if mode == PALETTE_ALPHA:
        options["transparency"] = bytes(range(256))
    if mode in TRANSPARENT_COLOUR:
        options["transparency"] = image.getpixel((0, 0))
    image.save(path, **options)
    return str(path)


@pytest.fixture(scope="module")
def processor(gemma_directory):
    return hf_processor(gemma_directory, image_size=SIZE, tokens_per_image=4)


@pytest.fixture(scope="module")
def gemma_directory(tiny_tokenizer, tmp_path_factory):
    return gemma_with_images(tiny_tokenizer, tmp_path_factory.mktemp("gemma"))


def theirs(processor, image) -> np.ndarray:
    """The bytes of transformers, [images, height, width, channels]."""
    raw = {"do_rescale": False, "do_normalize": False}
    pixels = processor.image_processor(image, return_tensors="np", **raw).pixel_values
    return pixels.transpose(0, 2, 3, 1)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", [*MODES, PALETTE_ALPHA, *TRANSPARENT_COLOUR])
def test_the_bytes_of_every_png_mode_are_those_of_transformers(processor, tmp_path, mode):
    path = save(picture(70, 50, mode), tmp_path / "a.png", mode)
    with Image.open(path) as stored:
        assert stored.mode == mode.split()[0]
    ours = preprocess(open_image(path), SIZE)
    assert ours.shape == (SIZE, SIZE, 3)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours[None], theirs(processor, path))
    np.testing.assert_array_equal(
        preprocess(open_image((tmp_path / "a.png").read_bytes()), SIZE), ours
    )
    # An image already opened goes another way through transformers: alpha is laid on white.
    with Image.open(path) as image:
        opened = preprocess(open_image(image), SIZE)
        np.testing.assert_array_equal(opened[None], theirs(processor, image))
    assert np.array_equal(opened, ours) == (mode not in {"RGBA", "LA", PALETTE_ALPHA})


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_upright_by_its_exif_orientation(processor, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(picture(60, 40), tmp_path / "a.jpg", exif=exif, quality=95)
    image = open_image(path)
    assert image.size == ((60, 40) if orientation < 5 else (40, 60))
    np.testing.assert_array_equal(preprocess(image, SIZE)[None], theirs(processor, path))
    with Image.open(path) as lying:
        np.testing.assert_array_equal(
            preprocess(open_image(lying), SIZE)[None], theirs(processor, lying)
        )


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_kinds_of_jpeg_and_the_first_frame_of_a_gif(processor, tmp_path, mode):
    jpeg = save(picture(60, 40).convert(mode), tmp_path / "a.jpg")
    frames = [picture(30, 20), picture(30, 20).rotate(180)]
    gif = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for path in (jpeg, gif):
        np.testing.assert_array_equal(
            preprocess(open_image(path), SIZE)[None], theirs(processor, path)
        )


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 200), (2000, 3), (SIZE, SIZE), (57, 55), (3000, 2000)]
)
def test_the_bytes_of_every_size_are_those_of_transformers(processor, size):
    image = picture(*size)
    np.testing.assert_array_equal(preprocess(image, SIZE)[None], theirs(processor, image))


def test_normalised_pixels_are_those_of_transformers_at_the_released_size(processor):
    image = picture(640, 480)
    ours = np.asarray(normalised(preprocess(image))).transpose(2, 0, 1)
    reference = processor.image_processor(image, size={"height": 896, "width": 896})
    np.testing.assert_allclose(ours, reference.pixel_values[0], rtol=0, atol=1e-6)


@settings(max_examples=150)
@given(width=st.integers(1, 1400), height=st.integers(1, 1400), data=st.data())
def test_crops_are_those_of_transformers(processor, width, height, data):
    min_size, most = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 6))
    ratio = data.draw(st.floats(1, 3))
    pixels = np.arange(width * height * 3, dtype=np.uint32).view(np.uint8)[: width * height * 3]
    pixels = pixels.reshape(height, width, 3)
    image = Image.fromarray(pixels)
    ours = pan_and_scan(image, min_crop_size=min_size, max_crops=most, min_ratio=ratio)
    reference = processor.image_processor.pan_and_scan(
        pixels.transpose(2, 0, 1), min_size, most, ratio
    )
    assert len(ours) == len(reference)
    for crop, expected in zip(ours, reference, strict=True):
        np.testing.assert_array_equal(np.asarray(crop), expected.transpose(1, 2, 0))


def test_pan_and_scan_by_default_has_the_numbers_of_gemma_3(processor):
    image = picture(1200, 400)
    ours = np.stack([preprocess(part, SIZE) for part in (image, *pan_and_scan(image))])
    numbers = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    reference = processor.image_processor(
        image, do_rescale=False, do_normalize=False, return_tensors="np", **numbers
    )
    assert reference.num_crops.tolist() == [3]
    np.testing.assert_array_equal(ours, reference.pixel_values.transpose(0, 2, 3, 1))


# Newlines, spaces and words in every neighbourhood of an image.
around = st.lists(
    st.sampled_from(
        ["\n", "\n\n", "\n\n\n", " ", "  ", "\t", "a", "The", " cat", "é", "日本", "<td>"]
    ),
    max_size=4,
).map("".join)


@settings(max_examples=150)
@given(data=st.data())
def test_ids_and_text_are_those_of_transformers(processor, gemma_directory, data):
    shapes = data.draw(st.lists(st.sampled_from([(30, 30), (40, 100), (90, 40)]), max_size=3))
    images = [picture(*shape) for shape in shapes]
    text = START_OF_IMAGE.join(data.draw(around) for _ in range(len(images) + 1))
    scan = data.draw(st.booleans())
    numbers = {"min_crop_size": 16, "max_crops": 3, "min_ratio": 1.2}
    crops = [len(pan_and_scan(image, **numbers)) if scan else 0 for image in images]
    reference = processor(
        images=[images] if images else None,
        text=[text],
        do_pan_and_scan=scan,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=3,
        return_text_replacement_offsets=True,
    )
    hf_tokenizer = processor.tokenizer
    tokens = ImageTokens(
        boi_id=hf_tokenizer.boi_token_id,
        image_id=hf_tokenizer.image_token_id,
        eoi_id=hf_tokenizer.eoi_token_id,
        per_image=4,
    )
    ours = encode_with_images(load_tokenizer(gemma_directory), text, crops, tokens)
    assert ours.dtype == np.int32
    assert [hf_tokenizer.bos_token_id, *ours.tolist()] == reference["input_ids"][0]
    expanded = expand_image_placeholders(text, crops, tokens_per_image=4)
    assert hf_tokenizer(expanded).input_ids == reference["input_ids"][0]
    replacements = [r["replacement"] for r in reference["text_replacement_offsets"][0]]
    for replacement in replacements:
        text = text.replace(START_OF_IMAGE, replacement.replace(START_OF_IMAGE, "\0"), 1)
    assert expanded == text.replace("\0", START_OF_IMAGE)


def test_blank_lines_around_an_image_join_the_newlines_beside_them(gemma_directory):
    ours = load_tokenizer(gemma_directory)
    ids = encode_with_images(ours, f"a\n{START_OF_IMAGE}\n\nb", [0], ImageTokens(per_image=2))
    pieces = [ours.id_to_piece(i) if i < ours.vocab_size else i for i in ids.tolist()]
    assert pieces == ["a", "\n" * 3, 255_999, 256_001, 256_001, 256_000, "\n" * 4, "b"]


@pytest.mark.parametrize(("markers", "images"), [(0, 1), (2, 1), (1, 0), (1, 3)])
def test_markers_and_images_must_be_as_many(gemma_directory, markers, images):
    text = "a" + START_OF_IMAGE * markers
    told = re.escape(f"the text has {markers} {START_OF_IMAGE} for {images} image")
    with pytest.raises(UserError, match=told):
        expand_image_placeholders(text, [0] * images)
    with pytest.raises(UserError, match=told):
        encode_with_images(load_tokenizer(gemma_directory), text, [0] * images, ImageTokens())


def unreadable(tmp_path):
    good = io.BytesIO()
    picture(60, 40).save(good, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
    contents = {
        "truncated.png": good.getvalue()[:-900],
        "flipped.png": good.getvalue().replace(b"IDAT", b"IDAT\xff", 1),
        "text.png": b"no image",
        "empty.jpg": b"",
        "bomb.png": bomb.getvalue(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "directory.png").mkdir()
    return [*contents, "directory.png", "missing.png"]


def test_an_unreadable_file_is_a_one_line_error_that_names_it(tmp_path):
    for name in unreadable(tmp_path):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))) as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="exceeds limit"):
        open_image(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="the 0 bytes given"):
        open_image(b"")


def test_an_opened_image_that_is_broken_or_empty_is_named_too(tmp_path):
    unreadable(tmp_path)
    with (
        Image.open(tmp_path / "truncated.png") as lazy,
        pytest.raises(UserError, match=r"truncated\.png"),
    ):
        open_image(lazy)
    with pytest.raises(UserError, match="the image given: an image of 0 by 5 pixels"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"]))
def test_no_damage_to_a_file_raises_anything_but_a_user_error(data, kind):
    content = io.BytesIO()
    picture(20, 10).save(content, kind)
    damaged = bytearray(content.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(1, len(damaged))) :]
    try:
        image = open_image(bytes(damaged))
    except UserError:
        return
    assert image.mode == "RGB"
