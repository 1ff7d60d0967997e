"""Caches with images: the same rows as from the files, each image once, and what is refused."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_corpus import EOI_ID, VISION, write_image_mixture
from PIL import Image

from t5g2 import cache
from t5g2.data.cache import CachedRecords, verify_cache
from t5g2.data.cache_format import body_of, read_manifest
from t5g2.data.corpus import TokenizerConfig, prepare_corpus, reopen_corpus, row_stream
from t5g2.data.loader import RowBatches
from t5g2.data.mixture import DataConfig
from t5g2.data.sources import CorpusConfig
from t5g2.errors import UserError
from t5g2.models.config import TINY, VisionConfig

MODEL = dataclasses.replace(TINY, vision=VisionConfig(**VISION), eoi_id=EOI_ID, vocab_size=512)
DATA = DataConfig(inputs_length=224, targets_length=96, images_per_row=3)
TOKENIZER = TokenizerConfig(vocab_size=420, sentinels=32, train_bytes=100_000)
ROWS = 4


@pytest.fixture
def mixture(tmp_path, standard_library) -> Path:
    return write_image_mixture(tmp_path / "data", standard_library(200_000))


def config_of(mixture: Path, **more) -> CorpusConfig:
    return CorpusConfig(mixture=str(mixture), heldout_share=0.1, **more)


def cached(mixture: Path, out: Path, workers: int = 1, **more) -> CorpusConfig:
    cache.make_cache(
        config_of(mixture, **more), TOKENIZER, out, tasks=[], workers=workers, model=MODEL
    )
    return CorpusConfig(cache=str(out))


def prepared(config: CorpusConfig, run_dir: Path):
    stage = lambda _: contextlib.nullcontext()  # noqa: E731
    return prepare_corpus(config, TOKENIZER, run_dir, stage, model=MODEL)


def steps(corpus, split="train", count=8, workers=0) -> list:
    rows = row_stream(corpus, split, DATA, ROWS)
    iterator = iter(RowBatches(rows, rows.start(), 0, ROWS, workers))
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def stored_records(directory: Path, split: str) -> list[bytes]:
    """What the records of the pictures in one split, or of their images, hold."""
    records = CachedRecords(directory, read_manifest(directory).shards[split]["pictures"])
    return [bytes(records.read(i, body_of)) for i in range(len(records))]


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_rows_from_a_cache_are_those_of_the_files_which_are_not_needed(mixture, tmp_path):
    from_files = prepared(config_of(mixture), tmp_path / "run")
    expected = {split: steps(from_files, split) for split in ("train", "heldout")}
    config = cached(mixture, tmp_path / "cache")
    shutil.rmtree(mixture.parent)
    from_cache = prepared(config, tmp_path / "cached")
    for split in expected:
        assert any(step.batch["images"].any() for step in expected[split])
        np.testing.assert_equal(steps(from_cache, split), expected[split])
    np.testing.assert_equal(steps(from_cache, count=3, workers=2), expected["train"][:3])
    own = {"made_for", "fingerprint"}
    assert {k: v for k, v in from_cache.facts.items() if k not in own} == {
        k: v for k, v in from_files.facts.items() if k not in own
    }
    assert reopen_corpus(config, tmp_path / "cached", MODEL).facts == from_cache.facts


def test_tokens_are_counted_with_the_places_of_images_but_these_are_no_text(mixture, tmp_path):
    corpus = prepared(config_of(mixture), tmp_path / "run")
    examples = corpus.mixture("train", DATA).sources[0].documents
    found = [examples.example(i) for i in range(len(examples))]
    pictures = corpus.facts["sources"]["pictures"]["train"]
    assert pictures["tokens"] == sum(len(example.ids) for example in found)
    assert pictures["tokens"] > 6 * sum(example.images for example in found)
    # All captions are a few words: with the places of images their entropy would be lower.
    ids = np.concatenate([example.ids for example in found])
    text = corpus.sources[1].tokens("train", corpus.tokenizer)
    shares = np.zeros(corpus.tokenizer.vocab_size)
    for tokens in (ids[ids != VISION["image_id"]], np.concatenate(list(text))):
        shares += np.bincount(tokens, minlength=len(shares)) / len(tokens) / 2
    shares = shares[shares > 0]
    assert corpus.facts["unigram_entropy"] == pytest.approx(-np.sum(shares * np.log(shares)))


def test_an_image_is_stored_once_as_the_file_it_is(mixture, tmp_path):
    cached(mixture, tmp_path / "cache")
    records = mixture.parent / "pictures"
    lines = (records / "captions.jsonl").read_text().splitlines()
    named = {name for line in lines for name in json.loads(line)["images"]}
    stored = stored_records(tmp_path / "cache", "images")
    assert len(stored) == len(named) < len(lines)
    assert set(stored) == {(records / name).read_bytes() for name in named}


def test_the_bytes_are_the_same_for_any_number_of_workers_and_after_a_kill(mixture, tmp_path):
    cached(mixture, tmp_path / "one")
    cached(mixture, tmp_path / "two", workers=2)
    expected = files(tmp_path / "one")
    assert files(tmp_path / "two") == expected
    for name in ("images", "train"):
        (shard, *_) = sorted((tmp_path / "two" / name).glob("pictures*"))
        shard.unlink()
    cached(mixture, tmp_path / "two")
    assert files(tmp_path / "two") == expected
    assert verify_cache(tmp_path / "two", 1) == 5


@pytest.mark.parametrize("kind", ["train", "images"])
def test_a_flipped_bit_is_found_and_its_shard_named(mixture, tmp_path, kind):
    config = cached(mixture, tmp_path / "cache")
    (shard,) = (tmp_path / "cache" / kind).glob("pictures*")
    content = bytearray(shard.read_bytes())
    content[content.index(stored_records(tmp_path / "cache", kind)[0]) + 9] ^= 4
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{shard.name} \(checksum mismatch\)"):
        verify_cache(tmp_path / "cache", 1)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged \(document 0 in it: "):
        steps(prepared(config, tmp_path / "run"), count=200)


def test_an_image_that_cannot_be_read_is_named_or_counted(mixture, tmp_path):
    pictures = mixture.parent / "pictures"
    lines = (pictures / "captions.jsonl").read_text().splitlines()
    victim = json.loads(lines[0])["images"][0]
    whole = (pictures / victim).read_bytes()
    (pictures / victim).write_bytes(whole[: len(whole) // 2])
    bad = sum(victim in json.loads(line)["images"] for line in lines)
    told = rf"captions\.jsonl, line \d+: .*{victim}: cannot be decoded.*max_bad_records"
    with pytest.raises(UserError, match=told):
        prepared(config_of(mixture), tmp_path / "refused")
    with pytest.raises(UserError, match=told):
        cached(mixture, tmp_path / "refused-cache")
    lenient = config_of(mixture, max_bad_records=bad)
    from_files = prepared(lenient, tmp_path / "run")
    from_cache = prepared(cached(mixture, tmp_path / "cache", max_bad_records=bad), tmp_path / "c")
    assert from_files.facts["bad_records"] == from_cache.facts["bad_records"] == bad
    np.testing.assert_equal(steps(from_cache), steps(from_files))
    with pytest.raises(UserError, match=rf"bring.*the bad records to {bad}|{bad} records of all"):
        cached(mixture, tmp_path / "fewer", max_bad_records=bad - 1)


def test_an_example_too_long_for_rows_is_named_from_either(mixture, tmp_path):
    pictures = mixture.parent / "pictures"
    Image.new("RGB", (9, 9)).save(pictures / "long.png")
    line = {"text": "<start_of_image>" + "a very long caption " * 60, "images": ["long.png"]}
    with (pictures / "captions.jsonl").open("a") as manifest:
        manifest.write(json.dumps(line) + "\n")
    from_files = prepared(config_of(mixture), tmp_path / "run")
    with pytest.raises(UserError, match=r"captions.jsonl, line 201: the example needs 12 inputs"):
        steps(from_files, count=200)
    config = cached(mixture, tmp_path / "cache")
    told = r"source pictures, document \d+: the example needs 12 inputs, \d+ targets and 1 images"
    with pytest.raises(UserError, match=told):
        steps(prepared(config, tmp_path / "cached"), count=200)


def test_the_visual_tokens_of_what_has_none_are_refused(mixture, tmp_path):
    arguments = {"tasks": ["text"], "workers": 1, "model": MODEL, "vision": tmp_path}
    with pytest.raises(UserError, match="--vision: no source has images"):
        cache.make_cache(config_of(mixture), TOKENIZER, tmp_path / "cache", **arguments)
    arguments = {"tasks": [], "workers": 1, "model": MODEL, "vision": tmp_path}
    with pytest.raises(UserError, match="is not a t5g2 checkpoint"):
        cache.make_cache(config_of(mixture), TOKENIZER, tmp_path / "cache", **arguments)


def test_a_trained_tokenizer_has_the_image_tokens_where_the_model_must_look(mixture, tmp_path):
    corpus = prepared(config_of(mixture), tmp_path / "run")
    pieces = [corpus.tokenizer.id_to_piece(token) for token in (36, EOI_ID, 38)]
    assert pieces == ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    other = TokenizerConfig(vocab_size=420, sentinels=64)
    told = r"set 'boi_id': 68 and 'image_id': 70 in model.vision, not 36 and 38, and model.eoi_id"
    with pytest.raises(UserError, match=told):
        prepare_corpus(
            config_of(mixture),
            other,
            tmp_path / "other",
            lambda _: contextlib.nullcontext(),
            model=MODEL,
        )
