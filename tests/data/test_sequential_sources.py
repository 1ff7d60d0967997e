"""Sources that come in their own order only: compressed JSON Lines."""

import dataclasses
import gzip
import logging
import pickle
import random

import pytest
import zstandard
from source_files import TEXTS, json_lines, opened, write_jsonl

from t5g2.data.packing import RowStream
from t5g2.data.sources import documents as module
from t5g2.data.sources.documents import SequentialDocuments
from t5g2.errors import UserError

CODECS = ["gz", "zst"]


def read(source) -> dict[str, list[str]]:
    return {split: list(documents) for split, documents in source.documents.items()}


@pytest.fixture
def packed(tmp_path) -> SequentialDocuments:
    found = opened(write_jsonl(tmp_path / "a.jsonl.gz")).documents["train"]
    assert isinstance(found, SequentialDocuments)
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_they_have_the_same_documents_and_splits_as_plain_files(tmp_path, codec, caplog):
    plain = read(opened(write_jsonl(tmp_path / "a.jsonl")))
    path = write_jsonl(tmp_path / f"a.jsonl.{codec}")
    caplog.clear()
    source = opened(path)
    assert read(source) == plain
    assert source.sequential
    assert {split: len(found) for split, found in source.documents.items()} == {
        split: len(found) for split, found in plain.items()
    }
    (line,) = caplog.messages
    assert line.startswith("source mine can only be read in its own order")


@pytest.mark.parametrize("codec", CODECS)
def test_files_of_several_members_and_several_files_are_one_after_the_other(tmp_path, codec):
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[codec]
    parts = [json_lines(TEXTS[:70]), json_lines(TEXTS[70:90])]
    (tmp_path / f"0.jsonl.{codec}").write_bytes(b"".join(map(compress, parts)))
    write_jsonl(tmp_path / "1.jsonl", TEXTS[90:])  # plain ones among them are read along
    source = opened(tmp_path / "x", {"path": "*.jsonl*"})
    assert sorted(t for texts in read(source).values() for t in texts) == sorted(TEXTS)


def test_long_records_are_split(tmp_path):
    texts = ["".join(f"line {i}\n" for i in range(n)) for n in range(60)]
    config = {"split_bytes": 50}
    plain = read(opened(write_jsonl(tmp_path / "a.jsonl", texts), **config))
    packed = opened(write_jsonl(tmp_path / "a.jsonl.gz", texts), **config)
    assert read(packed) == plain
    train = packed.documents["train"]
    assert [train[i] for i in range(len(train))] == plain["train"]
    assert list(train.iterate(77)) == plain["train"][77:]


def test_documents_can_be_asked_for_by_number_as_rows_do(packed, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 20_000)  # some 100 documents
    expected = list(packed)
    assert len(packed) == len(expected)
    opens = []
    records = type(packed.stream).records
    monkeypatch.setattr(
        type(packed.stream), "records", lambda self: opens.append(1) or records(self)
    )
    draws = random.Random(0)
    order = sorted(range(2 * len(expected)), key=lambda i: i + draws.uniform(-20, 20))
    for i in order:  # two epochs, the end of one mixed with the beginning of the other
        assert packed[i % len(expected)] == expected[i % len(expected)]
    assert len(opens) == 2
    there = pickle.loads(pickle.dumps(packed))
    assert there[7] == expected[7]


def test_documents_long_past_are_read_from_the_beginning_again_and_that_is_said(
    packed, monkeypatch, caplog
):
    monkeypatch.setattr(module, "KEPT_BYTES", 500)
    expected = list(packed)
    for i in (100, 150, 99, 20):
        assert packed[i] == expected[i]
    assert any("document 20 is asked for again" in message for message in caplog.messages)


def test_a_count_that_is_known_spares_reading(packed, monkeypatch):
    count = len(list(packed))
    packed.know_count(count)
    monkeypatch.setattr(type(packed.stream), "records", lambda self: pytest.fail("read"))
    assert len(packed) == count


def test_a_source_that_got_shorter_says_so(packed):
    packed.know_count(10_000)
    with pytest.raises(UserError, match=r"source mine ended after \d+ documents: it has become"):
        packed[9_999]


def test_rows_take_them_in_their_own_order(tmp_path, tiny_tokenizer, mixture):
    texts = [f"{i} " * 60 for i in range(80)]
    source = opened(write_jsonl(tmp_path / "a.jsonl.zst", texts))
    tokens = source.tokens("train", tiny_tokenizer)
    assert tokens.sequential
    own = dataclasses.replace(mixture.sources[0], documents=tokens)
    stream = RowStream(dataclasses.replace(mixture, sources=(own,)), 4, 256, 256, 0)
    cursors = stream.start()
    taken = []
    for row in range(4):
        pieces, _ = stream.next_row(row, cursors[row])
        taken.append(pieces[0].document)
    assert taken == [0, 1, 2, 3]


# ---- What is wrong


@pytest.mark.parametrize("codec", CODECS)
def test_what_stands_before_a_damage_is_used_and_the_rest_is_one_bad_record(tmp_path, codec):
    draws = random.Random(0)
    texts = [draws.randbytes(1000).hex() for _ in range(2000)]
    path = write_jsonl(tmp_path / f"a.jsonl.{codec}", texts)
    write_jsonl(tmp_path / f"b.jsonl.{codec}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    globbed = {"path": f"*.jsonl.{codec}"}
    with pytest.raises(UserError) as error:
        read(opened(tmp_path / "x", globbed))
    assert f"{path}: damaged or cut off after line" in str(error.value)
    assert "\n" not in str(error.value)
    source = opened(tmp_path / "x", globbed, max_bad_records=1)
    found = [text for split in read(source).values() for text in split]
    assert source.bad.count("mine") == 1
    assert found.count("") == 1
    assert set(TEXTS) <= set(found)
    before = len(found) - 1 - len(TEXTS)
    assert set(found) == {*texts[:before], *TEXTS, ""}
    # Up to the block of the codec in which the damage is.
    assert 800 < before <= 1000


def test_a_wrong_checksum_is_a_damage(tmp_path):
    compressed = {
        "gz": gzip.compress(json_lines(TEXTS)),
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress(json_lines(TEXTS)),
    }
    for codec, content in compressed.items():
        path = tmp_path / f"a.jsonl.{codec}"
        # gzip ends in the checksum and the length, zstandard in the checksum.
        at = -8 if codec == "gz" else -1
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[len(content) + at + 1 :])
        with pytest.raises(UserError, match=rf"a\.jsonl\.{codec}: damaged or cut off after line"):
            read(opened(path))


def test_what_is_no_compressed_file_is_named(tmp_path):
    for codec in CODECS:
        path = tmp_path / f"a.jsonl.{codec}"
        path.write_bytes(json_lines(TEXTS))
        with pytest.raises(UserError, match=rf"a\.jsonl\.{codec}: damaged or cut off after line 0"):
            read(opened(path))


def test_a_source_too_small_for_both_splits_is_named_once_it_is_counted(tmp_path):
    source = opened(write_jsonl(tmp_path / "a.jsonl.gz", TEXTS[:3]), heldout_share=0.0001)
    counts = {split: len(documents) for split, documents in source.documents.items()}
    with pytest.raises(UserError, match=r"source mine: path: of 3 documents in a.jsonl.gz none"):
        source.check_splits(counts, 0.0001)


def test_the_notice_is_shown_without_any_logging_set_up(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        opened(write_jsonl(tmp_path / "a.jsonl.gz"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
