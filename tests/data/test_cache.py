import hashlib
import itertools
import json
import pickle
import re
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from cache_parts import contents, make_cache, opened, paragraphs, small_parts

from t5g2.data import cache_writing
from t5g2.data.cache import read_token_counts, verify_cache
from t5g2.data.cache_format import (
    MOST_SHARDS,
    from_record,
    read_manifest,
    shard_count,
    shard_range,
    to_record,
    token_dtype,
)
from t5g2.data.cache_writing import Part
from t5g2.errors import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_tokenizer) -> Path:
    """A cache; tests that change it work on a copy."""
    directory = tmp_path_factory.mktemp("cache") / "cache"
    make_cache(directory, tiny_tokenizer.path)
    return directory


@pytest.fixture
def copied(cache, tmp_path) -> Path:
    return shutil.copytree(cache, tmp_path / "copied")


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def some_shard(directory: Path) -> Path:
    return directory / "train" / "code-00001-of-00003.array_record"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_cache_holds_every_document_in_its_order(cache, tiny_tokenizer):
    for part in small_parts():
        documents = opened(cache, part.split, part.source)
        assert len(documents) == len(part.texts)
        for tokens, text in zip(documents, part.texts, strict=True):
            assert tokens.dtype == np.int32
            np.testing.assert_array_equal(tokens, tiny_tokenizer.encode(text))


def test_documents_are_read_at_random_and_from_other_processes_and_threads(cache):
    documents = opened(cache, "train", "code")
    everything = list(documents)
    order = np.random.default_rng(0).permutation(len(documents)).tolist()
    copied = pickle.loads(pickle.dumps(documents))
    wrong: list[int] = []

    def read():
        wrong.extend(i for i in order if not np.array_equal(copied[i], everything[i]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for index in (-1, len(documents)):
        with pytest.raises(IndexError):
            documents[index]


def test_the_manifest_counts_what_the_shards_hold(cache, tiny_tokenizer):
    manifest = read_manifest(cache)
    assert list(manifest.shards["train"]) == ["prose", "code"]  # as given, not by name
    counts = read_token_counts(cache, manifest)
    for part in small_parts():
        shards = manifest.shards[part.split][part.source]
        tokens = [tiny_tokenizer.encode(text) for text in part.texts]
        assert sum(shard.documents for shard in shards) == len(part.texts)
        assert sum(shard.characters for shard in shards) == sum(map(len, part.texts))
        assert sum(shard.tokens for shard in shards) == sum(map(len, tokens))
        if part.split == "train":
            expected = np.bincount(np.concatenate(tokens), minlength=1000)
            np.testing.assert_array_equal(counts[part.source], expected)
    for shard in manifest.all_shards():
        content = (cache / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert ArrayRecordReader(str(cache / shard.file)).num_records() == shard.documents
    assert manifest.tokenizer["fingerprint"] == tiny_tokenizer.fingerprint
    assert manifest.tokenizer["dtype"] == "<u2"


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(cache, tmp_path, tiny_tokenizer, workers):
    make_cache(tmp_path / "other", tiny_tokenizer.path, workers=workers)
    assert contents(tmp_path / "other") == contents(cache)


@pytest.mark.parametrize("documents", [0, 1, 255, 256, 257, 10_000, 10**6, 10**9])
def test_shards_are_contiguous_and_depend_on_the_number_of_documents_alone(documents):
    count = shard_count(documents)
    ranges = [shard_range(documents, number) for number in range(count)]
    assert 1 <= count <= MOST_SHARDS
    assert ranges[0].start == 0
    assert ranges[-1].stop == documents
    assert all(one.stop == next_.start for one, next_ in itertools.pairwise(ranges))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(("vocabulary", "kind"), [(65_536, "<u2"), (65_537, "<u4")])
def test_a_record_holds_every_id_of_its_vocabulary(vocabulary, kind):
    dtype = token_dtype(vocabulary)
    assert dtype.str == kind
    tokens = np.array([0, 1, vocabulary - 1], np.int32)
    record = to_record(tokens, dtype)
    assert len(record) == 4 + 3 * dtype.itemsize
    np.testing.assert_array_equal(from_record(record, dtype), tokens)
    for cut in range(len(record)):
        with pytest.raises(ValueError, match="checksum"):
            from_record(record[:cut], dtype)
    for place in range(len(record)):
        with pytest.raises(ValueError, match="checksum"):
            from_record(record[:place] + bytes([record[place] ^ 4]) + record[place + 1 :], dtype)


def test_a_flipped_bit_is_found_and_named_and_the_other_documents_are_served(copied, cache):
    path, record = some_shard(copied), 100
    reader = ArrayRecordReader(str(path))
    content = path.read_bytes()
    place = content.index(reader.read(record, record + 1)[0][:40]) + 20
    flip(path, place)
    documents, good = opened(copied, "train", "code"), opened(cache, "train", "code")
    message = refusal(documents.__getitem__, 233 + record)
    assert str(path) in message
    assert "document 100 in it" in message
    for index in (*range(233 + record), *range(233 + record + 1, len(good))):
        np.testing.assert_array_equal(documents[index], good[index])
    message = refusal(verify_cache, copied, 2)
    assert "1 of 5 shards are bad" in message
    assert "train/code-00001-of-00003.array_record (checksum mismatch)" in message


def test_a_truncated_or_missing_shard_is_named_when_the_cache_is_opened(copied):
    path = some_shard(copied)
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    message = refusal(opened, copied, "train", "code")
    assert str(path) in message
    assert "bytes instead of" in message
    path.unlink()
    assert f"{path} is missing" in refusal(opened, copied, "train", "code")
    assert "(missing)" in refusal(verify_cache, copied, 1)


def test_a_shard_cut_to_nothing_behind_the_reader_s_back_is_one_line(copied):
    documents = opened(copied, "train", "code")
    some_shard(copied).write_bytes(b"\0" * some_shard(copied).stat().st_size)
    assert str(some_shard(copied)) in refusal(documents.__getitem__, 300)


def test_what_is_missing_of_a_complete_cache_is_made_again(copied, cache, tiny_tokenizer):
    some_shard(copied).unlink()
    make_cache(copied, tiny_tokenizer.path)
    assert contents(copied) == contents(cache)
    verify_cache(copied, 2)


def test_documents_that_changed_do_not_mend_a_cache(copied, tiny_tokenizer):
    some_shard(copied).unlink()
    prose, code, heldout = small_parts()
    changed = Part(split="train", source="code", texts=[text + "." for text in code.texts])
    message = refusal(make_cache, copied, tiny_tokenizer.path, (prose, changed, heldout))
    assert "is not what the manifest says" in message
    assert some_shard(copied).name in message


def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(
    cache, tmp_path, tiny_tokenizer, monkeypatch
):
    out = tmp_path / "cache"
    texts = paragraphs(700)

    class Failing(list):
        def __getitem__(self, index):
            if index == 500:
                raise UserError("the disk with the text is gone")
            return super().__getitem__(index)

    prose, _, heldout = small_parts()
    broken = Part(split="train", source="code", texts=Failing(texts))
    refusal(make_cache, out, tiny_tokenizer.path, (prose, broken, heldout))
    assert "unfinished: run the same t5g2 cache again" in refusal(read_manifest, out)
    assert not list(out.rglob("*.tmp"))
    standing = {path: path.stat().st_mtime_ns for path in out.rglob("*.array_record")}
    assert len(standing) == 3
    make_cache(out, tiny_tokenizer.path)
    assert contents(out) == contents(cache)
    assert {path: path.stat().st_mtime_ns for path in standing} == standing


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(cache, tmp_path, tiny_tokenizer):
    out = tmp_path / "cache"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        message = refusal(make_cache, out, tiny_tokenizer.path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"cannot write .*code-0000\d-of-00003.array_record: .*too large", message)
    assert not list(out.rglob("*.tmp"))
    make_cache(out, tiny_tokenizer.path)
    assert contents(out) == contents(cache)


def test_a_shard_that_does_not_read_as_written_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(cache_writing, "_read_back", lambda *_: 0)
    assert "does not read as it was written" in refusal(
        make_cache, tmp_path / "cache", tiny_tokenizer.path
    )
    assert not list((tmp_path / "cache").rglob("*.array_record"))


def test_two_writers_of_one_cache_do_not_meet(tmp_path, tiny_tokenizer):
    with cache_writing.cache_directory(tmp_path / "cache"):
        assert "another t5g2 cache is writing" in refusal(
            make_cache, tmp_path / "cache", tiny_tokenizer.path
        )


def test_a_directory_of_other_things_is_left_alone(tmp_path, tiny_tokenizer):
    (tmp_path / "thesis.tex").write_text("Chapter 1")
    assert "holds no cache" in refusal(make_cache, tmp_path, tiny_tokenizer.path)
    assert "is a file" in refusal(make_cache, tmp_path / "thesis.tex", tiny_tokenizer.path)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_of_other_settings_is_refused_with_the_difference(
    copied, tiny_tokenizer, monkeypatch, finished
):
    if not finished:
        cache_writing.begin_cache(copied, {"cache": {"format": 1}}, tiny_tokenizer)
        (copied / "manifest.json").unlink()
    plan = {"cache": {"format": 1}, "corpus": {"heldout_share": 0.5}}
    message = refusal(cache_writing.begun_cache, copied, plan)
    assert "corpus.heldout_share: (none) -> 0.5" in message


def test_a_cache_of_another_format_is_refused(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["plan"]["cache"]["format"] = 99
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert "format 99, this t5g2 reads 1" in refusal(read_manifest, copied)
    (copied / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in refusal(read_manifest, copied)


def test_damaged_token_counts_and_another_tokenizer_are_found(copied, tiny_tokenizer):
    flip(copied / "token_counts.npz", 200)
    assert "token_counts.npz: checksum mismatch" in refusal(verify_cache, copied, 1)
    (tokenizer,) = (copied / "tokenizer").iterdir()
    other = tiny_tokenizer.model_proto()
    other.pieces[-1].piece = "qqqqqqq"
    tokenizer.write_bytes(other.SerializeToString())
    assert "is not what the cache was tokenised with" in refusal(verify_cache, copied, 1)
