"""Records of images and text against transformers' processor, and what is wrong with bad ones."""

import dataclasses
import gzip
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from gemma_images import gemma_with_images, hf_processor
from PIL import Image
from source_files import write_mixture

from t5g2.data.sources import CorpusConfig
from t5g2.data.sources.image_text import ImageDocuments, ImageRecords, ImageTexts
from t5g2.data.sources.mixture_file import read_mixture
from t5g2.data.sources.opening import SPLITS, open_mixture
from t5g2.data.sources.records import BadRecords
from t5g2.data.tokenizer import load_tokenizer
from t5g2.errors import UserError
from t5g2.models.config import TINY, VisionConfig

SIZE, TOKENS = 28, 4
MARK = "<start_of_image>"


@pytest.fixture(scope="module")
def gemma_directory(tiny_tokenizer, tmp_path_factory):
    return gemma_with_images(tiny_tokenizer, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def processor(gemma_directory):
    return hf_processor(gemma_directory, image_size=SIZE, tokens_per_image=TOKENS)


@pytest.fixture(scope="module")
def model(processor):
    """Reads small images."""
    names = processor.tokenizer
    vision = VisionConfig(
        hidden_size=8,
        mlp_dim=8,
        num_layers=1,
        num_heads=1,
        image_size=SIZE,
        patch_size=7,
        tokens_per_image=TOKENS,
        boi_id=names.boi_token_id,
        image_id=names.image_token_id,
    )
    return dataclasses.replace(TINY, vision=vision, eoi_id=names.eoi_token_id)


@pytest.fixture(scope="module")
def opened(gemma_directory, model):
    """Opens a manifest, with a number of bad records allowed."""
    tokenizer = load_tokenizer(gemma_directory)

    def opened(path, allowed=0):
        bad = BadRecords(allowed)
        root = path if path.is_dir() else path.parent
        names = sorted(p.name for p in root.glob("*.jsonl")) if path.is_dir() else [path.name]
        records = ImageRecords(root, names, "text")
        documents = ImageDocuments("photos", records, range(len(records)), bad, model)
        return ImageTexts(documents, tokenizer), bad

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
    example = texts.example(0)
    images = texts.images(0)
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
    assert example.images == 2
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, reference["pixel_values"].transpose(0, 2, 3, 1))


def test_a_directory_is_all_its_manifests_in_the_order_of_their_names(photos, opened):
    for name, image in (("2.jsonl", "c.png"), ("1.jsonl", "a.png")):
        record = {"text": f"{MARK} {name}", "images": [f"photos/{image}"], "licence": "CC0-1.0"}
        write(photos, record, "", {**record, "text": f"{MARK} again"}, name=name)
    whole, _ = opened(photos)
    parts = [(opened(photos / f"{name}.jsonl")[0], i) for name in "12" for i in range(2)]
    assert len(whole) == len(parts) == 4
    for number, (part, i) in enumerate(parts):
        np.testing.assert_array_equal(whole[number], part[i])
        np.testing.assert_array_equal(whole.images(number), part.images(i))
    records = whole.documents.records
    assert records.images == ["photos/a.png", "photos/c.png"]
    before = records.fingerprint()
    write(photos, {"text": f"{MARK} x", "images": ["photos/a.png"]}, name="3.jsonl")
    after = opened(photos)[0].documents.records
    assert after.fingerprint() != before == records.fingerprint()


def test_a_copy_in_another_process_reads_the_same(photos, opened):
    record = {"text": f"{MARK} a thing", "images": ["photos/a.png"]}
    texts, _ = opened(write(photos, record, record))
    copy = pickle.loads(pickle.dumps(texts))
    np.testing.assert_array_equal(copy[1], texts[1])
    np.testing.assert_array_equal(copy.images(1), texts.images(1))
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
    first, empty, last = (texts.example(i) for i in range(3))
    assert bad.count("photos") == 1
    assert len(empty.ids) == empty.prefix == empty.images == 0
    np.testing.assert_array_equal(first.ids, last.ids)
    assert first.images == 1


def source(model, directory, **described):
    """The source of a mixture file in a directory."""
    spec = {"name": "photos", "path": "all.jsonl", "format": "image_text", **described}
    file = write_mixture(directory / "mixture.toml", spec)
    config = CorpusConfig(mixture=str(file), heldout_share=0.3)
    (found,) = open_mixture(read_mixture(config), config, model)
    return found


def test_what_is_said_of_an_image_is_all_in_one_split(photos, model):
    records = []
    for number in range(30):
        (photos / f"{number}.png").write_bytes((photos / "photos" / "a.png").read_bytes())
        for language in ("a thing", "ein Ding", "une chose"):
            records.append({"text": f"{MARK}{language} {number}", "images": [f"{number}.png"]})
    np.random.default_rng(0).shuffle(records)
    write(photos, *records)
    found = source(model, photos)
    splits = {name: [text.split()[-1] for text in found.documents[name]] for name in SPLITS}
    assert sum(map(len, splits.values())) == 90
    assert min(map(len, splits.values())) >= 3
    assert not set(splits["train"]) & set(splits["heldout"])
    # Another order or more images move none.
    write(photos, *records[::-1], {"text": f"{MARK} x", "images": ["photos/b.jpg"]})
    again = [text.split()[-1] for text in source(model, photos).documents["heldout"]]
    assert set(splits["heldout"]) - set(again) == set()


def test_what_cannot_be_a_source_of_images_is_refused(photos, model):
    good = {"text": f"{MARK} x", "images": ["photos/a.png"]}
    write(photos, good)
    (photos / "all.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    for described, message in (
        ({"path": "all.jsonl.gz"}, "all.jsonl.gz: lines with images are .*: decompress it first"),
        ({"path": "none.jsonl"}, "source photos: path: .*none.jsonl does not exist"),
        ({"path": "photos"}, "source photos: path: no document below .*photos; looked for .jsonl"),
        ({"denoisers": ["prefix_75"]}, "source photos: denoisers: images with text have one task"),
        ({}, "none falls into the"),
    ):
        with pytest.raises(UserError, match=message):
            source(model, photos, **described)
    text = dataclasses.replace(model, vision=None)
    with pytest.raises(UserError, match=r"source photos: format: .*no vision tower: set model.vis"):
        source(text, photos)


def test_a_tokenizer_without_the_image_tokens_is_refused_by_name(
    photos, model, opened, tiny_tokenizer
):
    write(photos, {"text": f"{MARK} x", "images": ["photos/a.png"]})
    documents = opened(photos)[0].documents
    with pytest.raises(UserError, match=r"boi_id = \d+ is .* in the tokenizer .*tiny.model, not "):
        ImageTexts(documents, tiny_tokenizer)
    eoi_id, documents.model = model.eoi_id, dataclasses.replace(model, eoi_id=300)
    with pytest.raises(UserError, match=rf"model.eoi_id = 300 is the piece .*: set it to {eoi_id}"):
        ImageTexts(documents, opened(photos)[0].tokenizer)
