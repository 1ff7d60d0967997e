"""The captioned images, from packages made here."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import captioned_images
import npm
import pytest
from captioned_images import Caption, emoji_captions, parse_stamp
from common import CorpusError, Package
from PIL import Image

PACKAGE = Package(name="stamps", version="1", licenses=("GPL-2",), copyright="text")


def png(color: tuple[int, int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", size, color).save(file, format="PNG")
    return file.getvalue()


RED, CLEAR = png((255, 0, 0, 255)), png((0, 0, 0, 0))


def make_tarball(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_stamp_has_english_first_and_other_languages_by_line() -> None:
    content = (
        "A horse.\nde.utf8=Ein Pferd.\nhe.utf8=סוס\nen_AU.utf8=A horse, mate.\n"
        "pt_BR.utf8=Um cavalo.\nsr@latin.utf8=Konj.\nzh_CN.utf8=马。\nfa.utf8=\nnonsense\n"
    )
    assert dict(parse_stamp(content)) == {
        "en": "A horse.",
        "de": "Ein Pferd.",
        "he": "סוס",
        "pt-BR": "Um cavalo.",
        "sr-Latn": "Konj.",
        "zh-CN": "马。",
    }
    assert not dict(parse_stamp(""))


@pytest.fixture
def emoji(tmp_path: Path) -> tuple[Path, Path]:
    """Two emoji, one of several code points, in three languages and a country."""

    def names(grin: str) -> bytes:
        annotations = {"😀": {"default": ["x"], "tts": [grin]}, "#⃣": {"tts": [f"{grin} #"]}}
        return json.dumps({"annotations": {"annotations": annotations}}).encode()

    facts = {"name": "emoji-datasource-google", "version": "1", "license": "MIT"}
    pictures = make_tarball(
        tmp_path / "emoji.tgz",
        {
            "package.json": json.dumps(facts).encode(),
            "README.md": b"Noto",
            "img/google/64/1f600.png": RED,
            "img/google/64/0023-fe0f-20e3.png": CLEAR,
            "img/google/64/1f601.png": CLEAR,
        },
    )
    cldr = make_tarball(
        tmp_path / "cldr.tgz",
        {
            "package.json": json.dumps(facts | {"name": "cldr", "license": "Unicode"}).encode(),
            "annotations/de/annotations.json": names("Grinsen"),
            "annotations/de-CH/annotations.json": names("Grinsen (CH)"),
            "annotations/pt/annotations.json": names("sorriso"),
            "annotations/pt-PT/annotations.json": names("riso"),
            "annotations/fr/annotations.json": names("sourire"),
        },
    )
    return pictures, cldr


def test_emoji_have_their_names_in_the_wanted_languages(emoji: tuple[Path, Path]) -> None:
    captions = list(emoji_captions(*emoji, {"de", "pt", "pt-BR"}))
    # Brazilian Portuguese is CLDR's `pt`. The picture without a name is left out.
    assert [(caption.source, caption.language, caption.text) for caption in captions] == [
        (f"emoji-datasource-google/{file}.png", language, text)
        for language, name in (("de", "Grinsen"), ("pt-BR", "sorriso"), ("pt", "riso"))
        for file, text in (("0023-fe0f-20e3", f"{name} #"), ("1f600", name))
    ]


def test_a_corpus_of_images_is_marked_deduplicated_and_laid_on_white(
    tmp_path: Path, emoji: tuple[Path, Path]
) -> None:
    captions = [
        Caption("s/horse.png", png((0, 0, 0, 0), (2, 3)), "de", "Ein Pferd.", (PACKAGE,)),
        *emoji_captions(*emoji, {"de"}),
        Caption("s/red.png", RED, "de", "Grinsen", (PACKAGE,)),
        Caption("s/red.png", RED, "fr", "rouge", (PACKAGE,)),
    ]
    captioned_images.build(captions, tmp_path / "out")
    lines = (tmp_path / "out/captions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["language"], record["text"]) for record in records] == [
        ("de", "<start_of_image>Ein Pferd."),
        ("de", "<start_of_image>Grinsen #"),
        ("de", "<start_of_image>Grinsen"),
        ("fr", "<start_of_image>rouge"),
    ]
    assert records[2]["images"] == records[3]["images"]
    assert records[0]["license"] == "GPL-2"
    assert records[1]["license"] == "Apache-2.0 and others; Unicode"
    with Image.open(tmp_path / "out" / records[0]["images"][0]) as image:
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (2, 3), (255,) * 3)
    assert len(list((tmp_path / "out/images").iterdir())) == 3
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    captioned_images.build(captions, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="--languages: no picture"):
        captioned_images.build([], tmp_path)
    with pytest.raises(CorpusError, match=r"s/x\.png: no readable picture"):
        captioned_images.build([Caption("s/x.png", b"x", "de", "x", (PACKAGE,))], tmp_path)
    (tmp_path / "x.tgz").write_bytes(b"no tarball")
    with pytest.raises(CorpusError, match=r"x\.tgz: damaged .* delete it"):
        npm.describe(tmp_path / "x.tgz")


def test_without_npm_packages_come_from_a_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda program: None)
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = tmp_path / "cache"
    with pytest.raises(CorpusError, match="give --registry"):
        npm.download("p", "1.0", cache, None)

    tarball = make_tarball(tmp_path / "p.tgz", {"package.json": b"{}"})
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    (tmp_path / "registry/p").mkdir(parents=True)
    entry = tmp_path / "registry/p/1.0"
    facts = {"tarball": tarball.as_uri(), "integrity": f"sha512-{digest}"}
    entry.write_text(json.dumps({"dist": facts}))
    (tmp_path / ".npmrc").write_text(f"registry={(tmp_path / 'registry').as_uri()}/\n")
    path = npm.download("p", "1.0", cache, None)
    assert path.read_bytes() == tarball.read_bytes()
    entry.unlink()
    assert npm.download("p", "1.0", cache, None) == path  # kept

    with pytest.raises(CorpusError, match=r"p 2\.0: file:.* did not give it"):
        npm.download("p", "2.0", cache, None)
    entry.write_text(json.dumps({"dist": facts | {"integrity": "sha512-x"}}))
    path.unlink()
    with pytest.raises(CorpusError, match="not the file that"):
        npm.download("p", "1.0", cache, None)
    assert not list(cache.iterdir())
