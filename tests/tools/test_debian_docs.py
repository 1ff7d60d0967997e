"""The documentation corpus, from small packages made here."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import debian
import debian_docs
import pytest
from common import CorpusError, Package
from test_deduplicate import prose, text

from t5g2.data.sources.config import CorpusConfig
from t5g2.data.sources.opening import open_sources

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: extra/*
Copyright: someone
License: MIT

Files: *
Copyright: someone else
 and another
License: GPL-3+
"""


def page(content: str) -> bytes:
    return f"<html><body><nav>menu</nav><p>{content}</p></body></html>".encode()


def paragraphs(*seeds: int) -> bytes:
    return page("</p><p>".join(prose(seed) for seed in seeds))


def make_packages(root: Path) -> dict[str, Path]:
    """Unpacked packages: directories in the place of files; see `unpacked`."""
    manual = f".TH A 1\n.SH NAME\na \\- {prose(30)}\n.PP\n{prose(31)}\n.PP\n{prose(32)}\n"
    files: dict[str, dict[str, bytes]] = {
        "debian-handbook": {
            "usr/share/doc/debian-handbook/html/en-US/a.html": paragraphs(1, 2, 3),
            "usr/share/doc/debian-handbook/html/de-DE/a.html": paragraphs(11, 12, 13),
            "usr/share/doc/debian-handbook/html/de-DE/untranslated.html": paragraphs(1, 2, 3),
            "usr/share/doc/debian-handbook/html/pt-BR/a.html": paragraphs(21, 22, 23),
            "usr/share/doc/debian-handbook/html/pt-BR/picture.svg": b"<svg/>",
        },
        "manpages-de": {
            "usr/share/man/de/man1/a.1.gz": gzip.compress(manual.encode(), mtime=0),
            "usr/share/man/de/man1/latin1.1.gz": gzip.compress(b"\xe4" + manual.encode(), mtime=0),
            "usr/share/man/de/man1/cut.1.gz": gzip.compress(manual.encode(), mtime=0)[:40],
        },
        "linux-doc-6.1": {
            "usr/share/doc/linux-doc-6.1/Documentation/x/y.rst": text(41, 42, 43).encode(),
            "usr/share/doc/linux-doc-6.1/Documentation/translations/zh_CN/y.rst.gz": gzip.compress(
                ("中文文档。" * 40).encode(), mtime=0
            ),
        },
    }
    result = {}
    for package, members in files.items():
        result[package] = root / f"{package}_1%3a2-1_all.deb"
        members[f"usr/share/doc/{package}/copyright"] = COPYRIGHT.encode()
        for name, content in members.items():
            path = result[package] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (result["manpages-de"] / "usr/share/man/de/man1/b.1.gz").symlink_to("a.1.gz")
    return result


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dpkg -x` copies a directory; a language needs but one document."""

    def copy(file: Path, directory: Path) -> None:
        shutil.copytree(file, directory, symlinks=True, dirs_exist_ok=True)

    monkeypatch.setattr(debian, "unpack", copy)
    monkeypatch.setattr(debian_docs, "_MIN_DOCUMENTS", 1)


def build(root: Path, out: Path, languages: set[str] | None = None, reverse: bool = False) -> None:
    files = make_packages(root / "packages")
    if reverse:
        files = dict(reversed(files.items()))
    families = {
        name: next(family for family in debian_docs.FAMILIES if re.fullmatch(family.names, name))
        for name in files
    }
    scratch = root / "scratch"
    scratch.mkdir()
    debian_docs.build(files, families, languages, out, scratch)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("unpacked")
def test_a_corpus_has_a_file_for_each_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.jsonl")} == {
        "de.jsonl",
        "en.jsonl",
        "pt-BR.jsonl",
        "zh-CN.jsonl",
    }
    german = read(out / "de.jsonl")
    assert [record["source"] for record in german] == [
        "debian-handbook/usr/share/doc/debian-handbook/html/de-DE/a.html",
        "manpages-de/usr/share/man/de/man1/a.1.gz",
    ]
    assert german[0]["text"] == text(11, 12, 13)
    assert german[0]["license"] == "GPL-3+ and others"
    assert len({record["id"] for path in out.glob("*.jsonl") for record in read(path)}) == 6
    assert "| manpages-de | 1:2-1 | GPL-3+, MIT |" in (out / "LICENSES.md").read_text()
    printed = capsys.readouterr().out
    assert "left out 1 files: not UTF-8" in printed
    assert "left out 1 files: Compressed file ended" in printed


@pytest.mark.usefixtures("unpacked")
def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    for name, reverse in (("one", False), ("two", True)):
        (tmp_path / name).mkdir()
        build(tmp_path / name, tmp_path / name / "out", reverse=reverse)
    files = sorted(
        path.relative_to(tmp_path / "one") for path in (tmp_path / "one/out").rglob("*.*")
    )
    assert len(files) == 9
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.usefixtures("unpacked")
def test_a_language_is_the_same_whichever_others_are_built(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    build(tmp_path, tmp_path / "all")
    build(tmp_path / "few", tmp_path / "some", {"de"})
    assert [path.name for path in (tmp_path / "some").glob("*.jsonl")] == ["de.jsonl"]
    assert (tmp_path / "some/de.jsonl").read_bytes() == (tmp_path / "all/de.jsonl").read_bytes()


@pytest.mark.usefixtures("unpacked")
def test_the_mixture_file_opens_as_sources(tmp_path: Path) -> None:
    build(tmp_path, tmp_path / "out")
    for language in ("de", "en", "pt-BR", "zh-CN"):
        path = tmp_path / "out" / f"{language}.jsonl"
        # Enough for both splits.
        path.write_text(path.read_text() * 100)
    mixture = str(tmp_path / "out" / debian_docs.MIXTURE_FILE)
    sources = open_sources(CorpusConfig(mixture=mixture, heldout_share=0.1))
    assert [(source.spec.name, source.spec.language) for source in sources] == [
        (language, language) for language in ("de", "en", "pt-BR", "zh-CN")
    ]
    assert sources[3].documents["train"][0] == "中文文档。" * 40


@pytest.mark.usefixtures("unpacked")
def test_languages_without_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no document in these languages"):
        build(tmp_path, tmp_path / "out", {"ja"})


def test_packages_are_found_by_language_and_missing_ones_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = [
        "libreoffice-help-common",
        "libreoffice-help-de",
        "libreoffice-help-en-us",
        "libreoffice-help-pt-br",
        "manpages",
        "manpages-de-dev",
        "manpages-dev",
        "manpages-fr",
        "gnome-user-docs",
        "linux-doc-6.12",
    ]
    monkeypatch.setattr(
        debian, "packages_of", lambda prefix: [name for name in archive if name.startswith(prefix)]
    )
    assert set(debian_docs.find_packages({"de"})) == {
        "libreoffice-help-de",
        "libreoffice-help-en-us",
        "manpages",
        "manpages-de-dev",
        "manpages-dev",
        "gnome-user-docs",
    }
    assert "linux-doc-6.1: this archive has no such package" in capsys.readouterr().out
    assert "libreoffice-help-common" not in debian_docs.find_packages(None)


def fake_apt(directory: Path, content: bytes, network: bool = True) -> None:
    """An `apt-get` that knows the package p, and counts its downloads in `log`."""
    digest = hashlib.sha256(content).hexdigest()
    (directory / "archive.deb").write_bytes(content)
    download = (
        f'echo x >> {directory}/log; cp {directory}/archive.deb "$PWD/p_1_all.deb"'
        if network
        else "echo 'W: slow' >&2; echo 'E: Could not resolve host' >&2; exit 100"
    )
    script = directory / "apt-get"
    script.write_text(
        "#!/bin/sh\n"
        f"if [ $2 = --print-uris ]; then echo \"'http://x/p.deb' p_1_all.deb 9 SHA256:{digest}\"\n"
        f"else {download}; fi\n"
    )
    script.chmod(0o755)


def test_downloads_are_kept_and_damaged_ones_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake_apt(tmp_path, b"a package")
    cache = tmp_path / "cache"
    for _ in range(2):
        assert debian.download(["p"], cache) == {"p": cache / "p_1_all.deb"}
    assert (tmp_path / "log").read_text().count("x") == 1
    (cache / "p_1_all.deb").write_bytes(b"a pack")  # an interrupted download
    debian.download(["p"], cache)
    assert (cache / "p_1_all.deb").read_bytes() == b"a package"
    assert (tmp_path / "log").read_text().count("x") == 2


def test_without_a_network_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake_apt(tmp_path, b"a package", network=False)
    with pytest.raises(CorpusError, match=r"Could not resolve host.*is there a network"):
        debian.download(["p"], tmp_path / "cache")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg is not installed")
def test_a_package_is_unpacked_and_its_licences_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "DEBIAN/control").write_text(
        "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    )
    (source / "usr/share/doc/p").mkdir(parents=True)
    (source / "usr/share/doc/p/copyright").write_text("Under the GNU General Public License.")
    (source / "usr/share/doc/p-dev").symlink_to("p")
    file = tmp_path / "p_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", source, file], check=True, capture_output=True)
    debian.unpack(file, tmp_path / "root")
    package = debian.describe(file, tmp_path / "root", {})
    assert package == Package(
        name="p", version="1", licenses=("GPL",), copyright="Under the GNU General Public License."
    )
    # A package that shares the documentation directory of another.
    other = debian.describe(tmp_path / "p-dev_1_all.deb", tmp_path / "root", {"p": package})
    assert other.licenses == ("GPL",)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorpusError, match=r"dpkg failed .*delete .*p_1_all\.deb"):
        debian.unpack(file, tmp_path / "other")


@pytest.mark.parametrize(
    ("prose_of_licence", "name"),
    [
        ("GNU Free Documentation\n License, Version 1.2", "GFDL"),
        ("the GNU Lesser General Public License", "LGPL"),
        ("licensed under the terms of the GNU GPL, version 2.", "GPL"),
        ("do what you like", "see the copyright file"),
    ],
)
def test_licences_in_prose_are_recognised(prose_of_licence: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "usr/share/doc/p").mkdir(parents=True)
    (tmp_path / "usr/share/doc/p/copyright").write_text(prose_of_licence)
    assert debian.describe(Path("p_1_all.deb"), tmp_path, {}).licenses == (name,)


def test_text_is_tidied() -> None:
    assert debian_docs.tidy("\n a \r\nb\t\n\n\n\n\fc\u00a0\n") == "a\nb\n\nc"
