"""Builds a corpus of small pictures with captions in many languages.

    python tools/corpora/captioned_images.py --out corpora/images --languages de,ja,ar

Pictures and captions are Tux Paint's stamps (a Debian package) and emoji with their names in
Unicode's CLDR (two npm packages). Writes images/, captions.jsonl and LICENSES.md; needs Pillow, apt
and dpkg, and npm or a registry's address. What is downloaded is kept.
"""

import argparse
import collections
import dataclasses
import hashlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import debian
import npm
from common import (
    CorpusError,
    Package,
    language_tag,
    parse_languages,
    run_builder,
    write_jsonl,
    write_licenses,
)

CAPTIONS_FILE = "captions.jsonl"
IMAGE_MARKER = "<start_of_image>"
# Those that both sets of pictures have in good measure.
DEFAULT_LANGUAGES = (
    "ar,bg,ca,cs,da,de,el,en,es,et,eu,fa,fi,fr,ga,gl,gu,he,hi,hr,hu,hy,id,is,it,ja,ka,ko,lv,ml,nb,"
    "nl,nn,pl,pt,pt-BR,ro,ru,sk,sl,sq,sr,sv,th,tr,uk,vi,zh-CN,zh-TW"
)
_STAMPS = "tuxpaint-stamps-default"
# Exact versions, so that the corpus is the same tomorrow.
_EMOJI = ("emoji-datasource-google", "16.0.0")
_NAMES = ("cldr-annotations-full", "48.2.0")
# CLDR's Portuguese is Brazil's.
_CLDR_LANGUAGES = {"pt": "pt-BR", "pt-PT": "pt"}
_IMAGES_OF_EMOJI = r"img/google/64/([0-9a-f-]+)\.png"


class Caption(NamedTuple):
    """A picture's file in its package, the picture, and what one language calls it."""

    source: str
    png: bytes
    language: str
    text: str
    packages: tuple[Package, ...]


def main() -> None:
    """Builds the corpus that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the corpus")
    parser.add_argument(
        "--languages",
        default=DEFAULT_LANGUAGES,
        help=f"at most these; default: {DEFAULT_LANGUAGES.count(',') + 1} common ones",
    )
    parser.add_argument("--cache", type=Path, help="keeps the downloads; default: OUT/packages")
    parser.add_argument("--registry", help="address of an npm registry; default: npm's own setting")
    args = parser.parse_args()
    wanted = parse_languages(args.languages)
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise CorpusError("Pillow is not installed; `pip install pillow`") from None
    cache = args.cache or args.out / "packages"
    stamps = debian.download([_STAMPS], cache)[_STAMPS]
    emoji, names = (npm.download(*package, cache, args.registry) for package in (_EMOJI, _NAMES))
    with tempfile.TemporaryDirectory(prefix="corpus-") as scratch:
        debian.unpack(stamps, Path(scratch))
        package = debian.describe(stamps, Path(scratch), {})
        captions = list(stamp_captions(Path(scratch), package, wanted))
    captions += emoji_captions(emoji, names, wanted)
    build(captions, args.out)


def stamp_captions(root: Path, package: Package, wanted: Collection[str]) -> Iterator[Caption]:
    """The captions of the stamps in an unpacked package, drawn ones (SVG) left out."""
    for path in sorted(root.rglob("*.txt")):
        picture = path.with_suffix(".png")
        if picture.is_file():
            png = picture.read_bytes()
            source = f"{_STAMPS}/{picture.relative_to(root).as_posix()}"
            for language, text in parse_stamp(path.read_text(encoding="utf-8", errors="replace")):
                if language in wanted:
                    yield Caption(source, png, language, text, (package,))


def parse_stamp(content: str) -> Iterator[tuple[str, str]]:
    """Languages and captions of a stamp: English in the first line, then lines of `xx.utf8=...`."""
    first, *rest = content.splitlines() or [""]
    found = {"en": first.strip()}
    for line in rest:
        match = re.fullmatch(r"([\w@]+)\.utf8=(.*)", line)
        language = language_tag(match[1]) if match else None
        # Of several countries' captions (en_GB, en_AU) the first one, the most general, stays.
        if match and language:
            found.setdefault(language, match[2].strip())
    yield from (
        (language, text) for language, text in found.items() if text and "\ufffd" not in text
    )


def emoji_captions(emoji: Path, names: Path, wanted: Collection[str]) -> Iterator[Caption]:
    """The names of emoji in the languages of CLDR.

    Raises:
        CorpusError: a damaged package.
    """
    pictures = {match[1]: png for match, png in npm.members(emoji, _IMAGES_OF_EMOJI)}
    # The package is MIT; the pictures in it, its README says, are Noto's.
    packages = (
        dataclasses.replace(npm.describe(emoji), licenses=("Apache-2.0", "MIT")),
        npm.describe(names),
    )
    pattern = r"annotations/([^/]+)/annotations\.json"
    for match, content in sorted(npm.members(names, pattern), key=lambda member: member[0][1]):
        language = _CLDR_LANGUAGES.get(match[1], language_tag(match[1]))
        # A country's file holds only what differs from its language's.
        is_country = re.search(r"-[A-Z]{2}$", match[1]) and match[1] not in _CLDR_LANGUAGES
        if language not in wanted or is_country:
            continue
        annotations = json.loads(content)["annotations"]["annotations"]
        for name, png in sorted(pictures.items()):
            text = emoji_name(name, annotations)
            if text:
                yield Caption(f"{_EMOJI[0]}/{name}.png", png, language, text, packages)


def emoji_name(file: str, annotations: Mapping[str, Mapping[str, list[str]]]) -> str | None:
    """The name of the emoji in a picture's file, such as "1f600" or "0023-fe0f-20e3"."""
    # CLDR leaves out the code that asks for a coloured picture.
    character = "".join(chr(int(code, 16)) for code in file.split("-")).replace("\ufe0f", "")
    spoken = annotations.get(character, {}).get("tts", [])
    return spoken[0].strip() if spoken else None


def build(captions: Iterable[Caption], out: Path) -> None:
    """Writes the corpus.

    Raises:
        CorpusError: no caption, or a picture that cannot be read.
    """
    images: dict[bytes, str] = {}
    records: dict[str, dict[str, object]] = {}
    counts: collections.Counter[str] = collections.Counter()
    packages = {}
    for caption in captions:
        if caption.png not in images:
            images[caption.png] = _write_image(caption, out / "images")
        name = images[caption.png]
        text = f"{IMAGE_MARKER}{caption.text}"
        key = hashlib.sha256("\0".join((name, caption.language, text)).encode()).hexdigest()[:16]
        if key in records:
            continue
        records[key] = {
            "id": key,
            "images": [f"images/{name}"],
            "text": text,
            "language": caption.language,
            "source": caption.source,
            "license": "; ".join(package.license for package in caption.packages),
        }
        counts[caption.language] += 1
        packages.update({package.name: package for package in caption.packages})
    if not records:
        raise CorpusError("--languages: no picture has a caption in any of them")
    write_jsonl(out / CAPTIONS_FILE, records.values())
    write_licenses(out, packages.values())
    print(", ".join(f"{language} {count}" for language, count in sorted(counts.items())))
    print(f"{out / CAPTIONS_FILE}: {len(set(images.values()))} pictures, {len(records)} captions")


def _write_image(caption: Caption, directory: Path) -> str:
    """Writes a picture, laid on white: who reads RGB sees any colour where it is transparent.

    Returns:
        Its file's name, which its pixels determine: pictures that look the same are one.
    """
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(caption.png)).convert("RGBA")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{caption.source}: no readable picture ({error})") from None
    flat = Image.new("RGBA", picture.size, "white")
    flat.alpha_composite(picture)
    flat = flat.convert("RGB")
    shape = "x".join(map(str, flat.size)).encode()
    name = f"{hashlib.sha256(shape + flat.tobytes()).hexdigest()[:16]}.png"
    if not (directory / name).exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{name}.partial"
        flat.save(partial, format="PNG")
        partial.replace(directory / name)
    return name


if __name__ == "__main__":
    sys.exit(run_builder(main))
