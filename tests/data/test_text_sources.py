import sysconfig
from pathlib import Path

import numpy as np
import pytest

from t5g2.data.sources import CorpusConfig, TextSource, TokenizedTexts, open_sources
from t5g2.data.sources.documents import Documents
from t5g2.data.sources.records import BadRecords
from t5g2.data.sources.text import TextFiles
from t5g2.errors import UserError


def write_documents(root: Path, count: int, folder: str = "") -> Path:
    for i in range(count):
        path = root / folder / f"{i:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {i}.\n")
    return root


def opened(root: Path, **settings) -> TextSource:
    (source,) = open_sources(CorpusConfig(path=str(root), **settings))
    return source


def names(source: TextSource, split: str) -> list[str]:
    """The files that are a split's documents."""
    return [source.records.names[number] for number in source.documents[split].numbers]


def read(root: Path, files: list[str], split_bytes: int | None = None) -> Documents:
    """All files as the documents of one split."""
    records = TextFiles(root, files)
    return Documents("text", records, range(len(files)), split_bytes, BadRecords(0))


def refusal(root: Path, **settings) -> str:
    with pytest.raises(UserError) as error:
        opened(root, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_documents_are_split_without_loss_or_overlap(tmp_path):
    texts = opened(write_documents(tmp_path, 500), heldout_share=0.1)
    train, heldout = (set(names(texts, split)) for split in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == {f"{i:04d}.txt" for i in range(500)}
    assert 30 <= len(heldout) <= 70


def test_new_documents_do_not_move_others_to_the_other_side(tmp_path):
    before = opened(write_documents(tmp_path, 200), heldout_share=0.1)
    after = opened(write_documents(tmp_path, 300, folder="more"), heldout_share=0.1)
    for split in ("train", "heldout"):
        kept = [name for name in names(after, split) if not name.startswith("more/")]
        assert kept == names(before, split)


def test_documents_come_in_the_order_of_their_names_as_they_are(tmp_path):
    write_documents(tmp_path, 50)
    text = "\ufeffTabs\t, CRLF\r\nand no-break\u00a0space\n\n"
    for name in ("0000.txt", "0001.txt"):
        (tmp_path / name).write_bytes(text.encode())
    source = opened(tmp_path, heldout_share=0.1)
    files = names(source, "train")
    assert files == sorted(files)
    assert source.documents["train"][files.index("0001.txt")] == text


def test_only_the_named_suffixes_are_documents(tmp_path):
    write_documents(tmp_path, 50)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "folder.txt").mkdir()
    found = opened(tmp_path, heldout_share=0.1).records.names
    assert found == [f"{i:04d}.txt" for i in range(50)]


def test_the_standard_library_is_a_corpus():
    (source,) = open_sources(CorpusConfig())
    assert source.records.root == Path(sysconfig.get_path("stdlib"))
    found = set(source.records.names)
    assert {"argparse.py", "json/decoder.py"} <= found
    folders = {folder for name in found for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__"}
    heldout = source.documents["heldout"]
    assert 0.01 < len(heldout) / len(found) < 0.03
    assert sum(len(text) for text in heldout) > 10_000


def test_a_missing_directory_is_named(tmp_path):
    assert refusal(tmp_path / "gone") == f"corpus.path: {tmp_path / 'gone'} is not a directory"


def test_a_directory_without_documents_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    message = refusal(tmp_path)
    assert f"no document below {tmp_path}" in message
    assert ".py, .txt, .rst, .md" in message


def test_too_few_documents_for_both_splits_names_the_setting(tmp_path):
    message = refusal(write_documents(tmp_path, 2), heldout_share=0.001)
    assert "of 2 documents" in message
    assert "none falls into the heldout split" in message
    assert "corpus.heldout_share (0.001)" in message
    assert "the train split" in refusal(tmp_path, heldout_share=0.999)


@pytest.mark.parametrize("share", [0, 1, -0.5, 2])
def test_shares_outside_of_zero_to_one_are_refused(share):
    with pytest.raises(ValueError, match="heldout_share must lie between 0 and 1"):
        CorpusConfig(heldout_share=share)


def test_what_is_not_utf_8_names_file_and_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 \(byte 3\); mend it") as error:
        read(tmp_path, ["latin.txt"])[0]
    assert "\n" not in str(error.value)


def test_a_document_that_vanished_is_named(tmp_path):
    files = TextFiles(tmp_path, ["gone.txt"])
    for use in (lambda: files.text(0), files.fingerprint):
        with pytest.raises(UserError, match=r"gone\.txt: cannot be read: No such file"):
            use()


def test_file_names_that_are_not_utf_8_are_documents_too(tmp_path):
    write_documents(tmp_path, 50)
    try:
        (tmp_path / "caf\udce9.txt").write_text("Coffee.")
    except OSError:
        pytest.skip("this file system only takes UTF-8 names")
    source = opened(tmp_path, heldout_share=0.1)
    assert sum(len(documents) for documents in source.documents.values()) == 51
    assert source.records.fingerprint()


def test_the_fingerprint_changes_with_the_files(tmp_path):
    write_documents(tmp_path, 3)
    files = [f"{i:04d}.txt" for i in range(3)]
    before = TextFiles(tmp_path, files).fingerprint()
    assert before == TextFiles(tmp_path, files).fingerprint()
    assert before != TextFiles(tmp_path, files[:2]).fingerprint()
    (tmp_path / files[0]).write_text("Longer than it was.\n")
    assert before != TextFiles(tmp_path, files).fingerprint()


def test_tokenised_texts_are_the_tokenizer_s_tokens(tiny_tokenizer):
    texts = ["def f():\n\treturn 1\n", "", "▁ naïve"]
    tokenized = TokenizedTexts(texts, tiny_tokenizer)
    assert len(tokenized) == 3
    assert [tiny_tokenizer.decode(tokens) for tokens in tokenized] == texts
    assert all(tokens.dtype == np.int32 for tokens in tokenized)


def test_long_files_are_split_at_line_ends_without_loss(tmp_path):
    long_line = "ä" * 40 + "\n"
    contents = {
        "a.txt": "one\ntwo\n" + long_line + "three\r\nfour",
        "b.txt": "short\n",
        "c.txt": "",
        "d.txt": "no line end at all, " * 5,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode())
    texts = read(tmp_path, list(contents), split_bytes=16)
    assert "".join(texts) == "".join(contents.values())
    for text in texts:
        assert len(text.encode()) <= 16 or text.count("\n") <= 1
    assert list(texts)[:4] == ["one\ntwo\n", long_line, "three\r\nfour", "short\n"]


def test_the_place_of_a_bad_byte_is_told_also_where_a_file_is_split(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine line\nbad \xff line\n")
    texts = read(tmp_path, ["a.txt"], split_bytes=10)
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 \(byte 14\)"):
        len(texts)
