"""JSON Lines, Parquet and ArrayRecord: every record once, at random, and every damage named."""

import json
import pickle
import random
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from source_files import (
    TEXTS,
    all_texts,
    json_lines,
    opened,
    write_array_record,
    write_jsonl,
    write_parquet,
)

from t5g2.data.sources import TextSource
from t5g2.data.sources.documents import encode
from t5g2.errors import UserError

WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "array_record": write_array_record}


def refusal(path: Path, source: dict | None = None, **config) -> str:
    """The error of opening a source or of reading all of it."""
    with pytest.raises(UserError) as error:
        all_texts(opened(path, source, **config))
    assert "\n" not in str(error.value)
    return str(error.value)


def skipped(path: Path, count: int, **config) -> list[str]:
    """All records of a source of which so many are bad; one more than allowed is an error."""
    source = opened(path, max_bad_records=count, **config)
    texts = all_texts(source)
    assert source.bad.count("mine") == count
    if count > 1:
        message = refusal(path, max_bad_records=count - 1)
        assert f"brings the bad records to {count}, and corpus.max_bad_records is" in message
    return texts


# ---- What is read


@pytest.mark.parametrize("kind", WRITERS)
def test_every_record_is_one_document_read_at_random_and_by_any_process(tmp_path, kind):
    for number in range(2):
        WRITERS[kind](tmp_path / f"{number}.{kind}", TEXTS[number * 100 :][:100])
    source = opened(tmp_path / "0", {"path": f"*.{kind}"})
    assert all_texts(source) == TEXTS
    assert not source.sequential
    train = source.documents["train"]
    there = pickle.loads(pickle.dumps(train))
    order = random.Random(0).sample(range(len(train)), len(train))
    expected = list(train)
    assert [there[i] for i in order] == [expected[i] for i in order]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_splits_share_nothing_and_do_not_move_when_records_are_added(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, TEXTS[:150])
    before = opened(path)
    fingerprint = before.records.fingerprint()
    WRITERS[kind](path, TEXTS)
    after = opened(path)
    assert after.records.fingerprint() != fingerprint
    heldout = set(after.documents["heldout"].numbers)
    assert {i for i in heldout if i < 150} == set(before.documents["heldout"].numbers)
    assert 8 <= len(heldout) <= 32
    assert len(after.documents["train"]) == 200 - len(heldout)


def test_the_source_s_name_decides_which_records_are_held_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    mine, other = (opened(path, {"name": name}).documents["heldout"] for name in ("a", "b"))
    assert list(mine.numbers) != list(other.numbers)


def test_codecs_row_groups_and_kinds_of_text_inside_parquet_make_no_difference(tmp_path):
    write_parquet(tmp_path / "0.parquet", TEXTS[:100], compression="zstd", row_group_size=7)
    columns = {
        "1.parquet": pyarrow.array(TEXTS[100:150], pyarrow.large_string()),
        "2.parquet": pyarrow.array(TEXTS[150:]).dictionary_encode(),
    }
    for name, column in columns.items():
        table = pyarrow.table({"text": column, "more": range(50)})
        pyarrow.parquet.write_table(table, tmp_path / name, compression="gzip")
    assert all_texts(opened(tmp_path / "x", {"path": "*.parquet"})) == TEXTS


def test_another_field_is_read_where_one_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", field="content")
    assert all_texts(opened(tmp_path / "a.jsonl", {"field": "content"})) == TEXTS
    write_array_record(tmp_path / "a.array_record", field="body")
    assert all_texts(opened(tmp_path / "a.array_record", {"field": "body"})) == TEXTS


def test_line_ends_of_windows_byte_order_marks_and_empty_lines_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = json_lines(TEXTS).splitlines()
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(lines[:100]) + b"\r\n\r\n\n" + b"\n".join(lines[100:])
    )
    assert all_texts(opened(path)) == TEXTS


def test_names_as_data_sets_are_sharded_tell_the_format(tmp_path):
    write_array_record(tmp_path / "x.array_record-00000-of-00001")
    assert all_texts(opened(tmp_path, {"path": str(tmp_path)})) == TEXTS


@pytest.mark.parametrize("kind", WRITERS)
def test_long_records_are_split_as_long_files_are(tmp_path, kind):
    texts = ["".join(f"line {i}\n" for i in range(n)) for n in range(60)]
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, texts)
    source = opened(path, split_bytes=50)
    for split, documents in source.documents.items():
        whole = [texts[number] for number in documents.numbers]
        parts = list(documents)
        assert "".join(parts) == "".join(whole), split
        assert all(len(part) <= 50 for part in parts)
        assert len(parts) > len(whole)
        assert [documents[i] for i in reversed(range(len(parts)))] == parts[::-1]


# ---- What is wrong


def bad_line(path: Path, line: bytes) -> Path:
    """200 good lines, with a bad one as line 43."""
    lines = json_lines(TEXTS).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:42], line + b"\n", *lines[42:]]))
    return path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut o', "not JSON: Unterminated string"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 13)"),
        (b'{"id": 1, "body": "a"}', "no field 'text'; there are 'id', 'body'"),
        (b'{"text": null}', "field 'text' is not a string but null"),
        (b'{"text": ["a"]}', "field 'text' is not a string but a list"),
        (b'["text"]', "not a JSON object but a list"),
        (b'{"text": "\\ud800"}', "field 'text' holds a lone surrogate at character 0"),
        (b"[" * 100_000, "not JSON"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named_or_an_empty_document(tmp_path, line, problem, suffix):
    plain = bad_line(tmp_path / "plain", line).read_bytes()
    path = tmp_path / f"a.{suffix}"
    if suffix.endswith("gz"):
        import gzip

        plain = gzip.compress(plain)
    path.write_bytes(plain)
    config = {"heldout_share": 0.1}
    source = opened(path, **config)
    with pytest.raises(UserError) as error:
        [list(documents) for documents in source.documents.values()]
    assert f"{path}, line 43: {problem}" in str(error.value)
    assert "corpus.max_bad_records (source mine)" in str(error.value)
    assert "\n" not in str(error.value)
    lenient = opened(path, max_bad_records=1, **config)
    texts = [text for documents in lenient.documents.values() for text in documents]
    assert sorted(texts) == sorted([*TEXTS, ""])
    assert lenient.bad.count("mine") == 1


def test_the_line_is_counted_with_the_empty_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n" + json_lines(TEXTS) + b"\n" + b"oops\n")
    assert f"{path}, line 204: not JSON" in refusal(path)


def test_more_bad_records_than_allowed_are_an_error(tmp_path):
    lines = json_lines(TEXTS).splitlines(keepends=True)
    for number in (3, 50, 120):
        lines[number] = b"oops\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    texts = skipped(path, 3)
    assert [i for i, text in enumerate(texts) if not text] == [3, 50, 120]


def test_a_column_that_is_missing_or_no_text_is_named_at_once(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    message = refusal(path, {"field": "txt"}, max_bad_records=9)
    assert "mixture.toml: source mine: field: " in message
    assert "has no column 'txt'; it has 'id', 'text'" in message
    assert "column 'id'" in refusal(path, {"field": "id"})
    assert "is not text but int64" in refusal(path, {"field": "id"})


def test_a_null_in_parquet_is_a_bad_record(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [*TEXTS[:10], None, *TEXTS[10:]])
    assert "row 10 of row group 0: column 'text' is null" in refusal(path)
    assert skipped(path, 1) == [*TEXTS[:10], "", *TEXTS[10:]]


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
@pytest.mark.parametrize("left", [0, 10, 0.5, 0.99])
def test_a_truncated_file_with_its_index_at_the_end_is_one_bad_record(tmp_path, kind, left):
    for number in range(2):
        WRITERS[kind](tmp_path / f"{number}.{kind}", TEXTS)
    damaged = tmp_path / f"0.{kind}"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(left * len(content)) if left < 1 else left])
    whole = opened(tmp_path / "x", {"path": f"*.{kind}"}, max_bad_records=1)
    assert all_texts(whole) == ["", *TEXTS]
    message = refusal(tmp_path / "x", {"path": f"*.{kind}"})
    assert str(damaged) in message
    assert "not a whole" in message


def test_a_flipped_bit_in_an_array_record_is_named(tmp_path):
    path = write_array_record(tmp_path / "a.array_record")
    content = bytearray(path.read_bytes())
    content[content.index(b"Document 77:") + 3] ^= 4
    path.write_bytes(content)
    assert f"{path}, record 77: damaged: " in refusal(path)
    assert skipped(path, 1) == [*TEXTS[:77], "", *TEXTS[78:]]


def test_a_damaged_row_group_spoils_its_own_rows_only(tmp_path):
    options = {"row_group_size": 50, "compression": "zstd", "use_dictionary": False}
    path = write_parquet(tmp_path / "a.parquet", **options)
    column = pyarrow.parquet.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start + 5 : start + column.total_compressed_size] = b"\xff" * (
        column.total_compressed_size - 5
    )
    path.write_bytes(content)
    assert f"{path}: row group 1 is damaged: " in refusal(path)
    assert skipped(path, 50) == [*TEXTS[:50], *[""] * 50, *TEXTS[100:]]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_vanished_is_named(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path)
    source = opened(path)
    path.unlink()
    train = pickle.loads(pickle.dumps(source.documents["train"]))
    with pytest.raises(UserError, match=rf"a\.{kind}: cannot be read: No such file") as error:
        train[0]
    assert "\n" not in str(error.value)


def test_a_source_too_small_for_both_splits_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    message = refusal(path, heldout_share=0.0001)
    assert "mixture.toml: source mine: path: of 3 documents in a.jsonl none falls into" in message
    assert "heldout split; change corpus.heldout_share (0.0001) or add documents" in message


# ---- What is large


def test_a_document_of_many_megabytes_in_one_line_is_read_and_tokenised(tmp_path, tiny_tokenizer):
    text = "words without any line end, " * 300_000
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([*TEXTS[:50], text, *TEXTS[50:]]))
    started = time.monotonic()
    source = opened(path, split_bytes=1000)
    (at,) = (i for i, found in enumerate(source.documents["train"]) if len(found) > 1000)
    assert source.documents["train"][at] == text
    tokens = encode(text[:3_000_000], tiny_tokenizer)
    assert tiny_tokenizer.decode(tokens) == text[:3_000_000]
    assert time.monotonic() - started < 20


def test_the_parts_of_a_large_record_do_not_each_read_all_of_it(tmp_path):
    large = "".join(f"{i} is a line\n" for i in range(600_000))
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, large])
    documents = opened(path, split_bytes=200).documents["train"]
    count = len(documents)
    assert count > 50_000
    started = time.monotonic()
    order = random.Random(0).sample(range(count - 50_000, count), 20_000)
    assert sum(len(documents[i]) for i in order) > 20_000 * 100
    assert time.monotonic() - started < 5


def test_opening_holds_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for i in range(2000):
            file.write(json.dumps({"text": f"{i} " * 20_000}).encode() + b"\n")
    import tracemalloc

    tracemalloc.start()
    source: TextSource = opened(path)
    total = sum(len(text) for text in source.documents["train"].iterate())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 150e6
    assert peak < 20e6
