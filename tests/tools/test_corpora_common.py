"""Names of languages, errors, files."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import common
import pytest
from common import CorpusError, Package, language_tag, parse_languages

TOOLS = Path(__file__).parents[2] / "tools" / "corpora"


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("de", "de"),
        ("de-DE", "de"),
        ("de_DE.UTF-8", "de"),
        ("C", "en"),
        ("en-us", "en"),
        ("en_GB", "en"),
        ("pt", "pt"),
        ("pt_BR", "pt-BR"),
        ("pt-br", "pt-BR"),
        ("pt-PT", "pt"),
        ("zh_CN", "zh-CN"),
        ("zh-tw", "zh-TW"),
        ("zh", "zh-CN"),
        ("zh-Hant", "zh-TW"),
        ("sr@latin", "sr-Latn"),
        ("sr-Latn", "sr-Latn"),
        ("ca@valencia", "ca-valencia"),
        ("ca-valencia", "ca-valencia"),
        ("nb-NO", "nb"),
        ("no", "nb"),
        ("ast", "ast"),
        ("common", None),
        ("man1", None),
        ("en-001", None),
    ],
)
def test_languages_have_one_name_however_they_are_written(name: str, tag: str | None) -> None:
    assert language_tag(name) == tag


def test_a_list_of_languages_with_a_wrong_name_is_refused() -> None:
    assert parse_languages("de, pt_BR,ja") == {"de", "pt-BR", "ja"}
    with pytest.raises(CorpusError, match=r"--languages: 'german' is no language"):
        parse_languages("de,german")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CorpusError("apt is missing; install it"), 2, "error: apt is missing; install it\n"),
        (OSError(errno.ENOSPC, "No space left", "f"), 2, "error: f: No space left\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was downloaded is kept"),
    ],
)
def test_what_goes_wrong_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def build() -> None:
        raise error

    assert common.run_builder(build) == code
    captured = capsys.readouterr().err
    assert captured.startswith(line)
    assert captured.count("\n") == 1


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def records():
        yield {"text": "one"}
        raise ValueError("spoilt")

    (tmp_path / "x.jsonl").write_text("before")
    with pytest.raises(ValueError, match="spoilt"):
        common.write_jsonl(tmp_path / "x.jsonl", records())
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert (tmp_path / "x.jsonl").read_text() == "before"


def test_licences_are_listed_and_their_texts_kept(tmp_path: Path) -> None:
    package = Package(name="p", version="1:2", licenses=("MIT", "GPL-2"), copyright="whole text")
    common.write_licenses(tmp_path, [package])
    assert "| p | 1:2 | MIT, GPL-2 |" in (tmp_path / "LICENSES.md").read_text()
    assert (tmp_path / "licenses" / "p.txt").read_text() == "whole text"


@pytest.mark.parametrize("script", ["debian_docs.py", "captioned_images.py"])
def test_without_apt_a_builder_says_what_it_needs(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / script, "--out", tmp_path / "out"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(r"^error: apt-\w+ is not installed; .*Debian", done.stderr)
