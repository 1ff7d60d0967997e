"""Records of images and text against transformers' processor, and what is wrong with bad ones."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from gemma_images import gemma_with_images, hf_processor
from PIL import Image

from t5g2.data.image_text import ImageTexts
from t5g2.data.images import ImageTokens
from t5g2.data.sources.records import BadRecords
from t5g2.data.tokenizer import load_tokenizer
from t5g2.errors import UserError

SIZE, TOKENS = 28, 4
MARK = "<start_of_image>"


@pytest.fixture(scope="module")
def gemma_directory(tiny_tokenizer, tmp_path_factory):
    return gemma_with_images(tiny_tokenizer, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def processor(gemma_directory):
    return hf_processor(gemma_directory, image_size=SIZE, tokens_per_image=TOKENS)


@pytest.fixture(scope="module")
def opened(gemma_directory, processor):
    """Opens a manifest, with a number of bad records allowed."""
    names = processor.tokenizer
    tokens = ImageTokens(
        boi_id=names.boi_token_id,
        image_id=names.image_token_id,
        eoi_id=names.eoi_token_id,
        per_image=TOKENS,
    )
    tokenizer = load_tokenizer(gemma_directory)

    def opened(path, allowed=0):
        bad = BadRecords(allowed)
        texts = ImageTexts(path, tokenizer, tokens=tokens, image_size=SIZE, bad=bad, name="photos")
        return texts, bad

    return opened


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 20)), ("b.jpg", (20, 60)), ("c.png", (28, 28))):
        noise = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / name)
    return tmp_path


def write(directory: Path, *records, name="all.jsonl") -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    (directory / name).write_text("".join(f"{line}\n" for line in lines))
    return directory / name


def test_the_encoder_gets_what_the_processor_makes_of_the_prompt(photos, opened, processor):
    prompt, caption = f"One:\n{MARK} two\n\n{MARK}", "\n\nA cat, and its mat.\n"
    names = ["photos/a.png", "photos/b.jpg"]
    texts, _ = opened(write(photos, {"text": prompt + caption, "images": names}))
    (example,) = texts
    reference = processor(
        images=[[str(photos / name) for name in names]],
        text=[prompt],
        return_tensors="np",
        do_rescale=False,
        do_normalize=False,
    )
    assert [2, *example.ids[: example.prefix].tolist()] == reference["input_ids"][0].tolist()
    target = example.ids[example.prefix :].tolist()
    assert target == processor.tokenizer(caption, add_special_tokens=False).input_ids
    assert example.ids.dtype == np.int32
    assert example.images.dtype == np.uint8
    np.testing.assert_array_equal(example.images, reference["pixel_values"].transpose(0, 2, 3, 1))


def test_a_directory_is_all_its_manifests_in_the_order_of_their_names(photos, opened):
    for name, image in (("2.jsonl", "c.png"), ("1.jsonl", "a.png")):
        record = {"text": f"{MARK} {name}", "images": [f"photos/{image}"], "licence": "CC0-1.0"}
        write(photos, record, "", {**record, "text": f"{MARK} again"}, name=name)
    whole, _ = opened(photos)
    parts = [*opened(photos / "1.jsonl")[0], *opened(photos / "2.jsonl")[0]]
    assert len(whole) == len(parts) == 4
    for ours, part in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(ours.ids, part.ids)
        np.testing.assert_array_equal(ours.images, part.images)
    before = whole.fingerprint()
    write(photos, {"text": f"{MARK} x", "images": ["photos/a.png"]}, name="3.jsonl")
    assert opened(photos)[0].fingerprint() != before == whole.fingerprint()


def test_a_copy_in_another_process_reads_the_same(photos, opened):
    record = {"text": f"{MARK} a thing", "images": ["photos/a.png"]}
    texts, _ = opened(write(photos, record, record))
    copy = pickle.loads(pickle.dumps(texts))
    np.testing.assert_array_equal(copy[1].ids, texts[1].ids)
    np.testing.assert_array_equal(copy[1].images, texts[1].images)
    with pytest.raises(IndexError):
        texts[2]


BAD = {
    "no JSON": ("{", "not JSON"),
    "no text": ({"images": ["photos/a.png"]}, "no field 'text'"),
    "no images": ({"text": f"{MARK} x"}, "'images' is not a list of file names"),
    "a number": ({"text": f"{MARK} x", "images": [1]}, "'images' is not a list of file names"),
    "text alone": ({"text": "x", "images": []}, "text alone belongs in a source of text"),
    "a marker too many": (
        {"text": f"{MARK}{MARK} x", "images": ["photos/a.png"]},
        f"the text has 2 {MARK} for 1 image",
    ),
    "nothing to learn": ({"text": f"x {MARK} \n", "images": ["photos/a.png"]}, "nothing to learn"),
    "no such image": ({"text": f"{MARK} x", "images": ["photos/no.png"]}, "photos/no.png: cannot"),
    "no image": ({"text": f"{MARK} x", "images": ["all.jsonl"]}, "all.jsonl: no image of a kind"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_named_or_counted_and_empty(photos, opened, case):
    record, message = BAD[case]
    good = {"text": f"{MARK} x", "images": ["photos/a.png"]}
    path = write(photos, good, "", record, good)
    texts, _ = opened(path)
    told = re.escape(f"{path}, line 3: ") + ".*" + re.escape(message)
    with pytest.raises(UserError, match=told) as error:
        texts[1]
    assert "\n" not in str(error.value)
    texts, bad = opened(path, allowed=1)
    first, empty, last = texts
    assert bad.count("photos") == 1
    assert len(empty.ids) == empty.prefix == 0
    assert empty.images.shape == (0, SIZE, SIZE, 3)
    np.testing.assert_array_equal(first.ids, last.ids)
    assert first.images.shape == (1, SIZE, SIZE, 3)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path, opened):
    with pytest.raises(UserError, match=r"all\.jsonl\.gz: .*decompress it"):
        opened(tmp_path / "all.jsonl.gz")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/none.jsonl: cannot be read")):
        opened(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"no \*\.jsonl file in this directory"):
        opened(tmp_path)
