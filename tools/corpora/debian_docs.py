"""Builds a multilingual corpus from the documentation that Debian packages.

    python tools/corpora/debian_docs.py --out corpora/docs --languages de,fr,ja

Writes LANGUAGE.jsonl for each language, debian.toml, a mixture of them all, and LICENSES.md. Needs
apt and dpkg, no root; what is downloaded is kept, so that another run takes up from there. The
same packages give the same bytes.
"""

import argparse
import collections
import dataclasses
import gzip
import hashlib
import json
import lzma
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import debian
from common import (
    CorpusError,
    Package,
    language_tag,
    parse_languages,
    run_builder,
    write_atomically,
    write_jsonl,
    write_licenses,
)
from deduplicate import Deduplicator, Document
from markup import html_to_text, mallard_to_text
from roff import roff_to_text

MIXTURE_FILE = "debian.toml"
# Always read, and first: what is untranslated in another language stands there.
ORIGINAL = "en"
_TEMPERATURE = 3.0
# Fewer might leave a split of the language without any.
_MIN_DOCUMENTS = 100
_LANG = r"(?P<language>[^/]+?)"


@dataclasses.dataclass(frozen=True)
class Family:
    """Packages of one make.

    Attributes:
        prefix: what the names of the packages begin with.
        names: a pattern for the whole name; its group `language`, if it has one, says that the
            package is all in that language.
        paths: a pattern for the path of a document below the package's root; without a group
            `language` the document is in the package's language, or else in English.
        to_text: makes text of a document.
    """

    prefix: str
    names: str
    paths: str
    to_text: Callable[[str], str]

    def language(self, match: re.Match[str]) -> str | None:
        """The language that a matched name or path tells."""
        name = match.groupdict().get("language")
        return language_tag(name) if name else None


_HANDBOOK = r"usr/share/doc/debian-handbook/html/"
_KERNEL = r"usr/share/doc/linux-doc-6\.1/Documentation/"
FAMILIES = (
    Family(
        "libreoffice-help-",
        r"libreoffice-help-(?P<language>..(-..)?)",
        rf"usr/share/libreoffice/help/{_LANG}/text/.*\.html",
        html_to_text,
    ),
    Family(
        "manpages",
        r"manpages(-(?P<language>..(-..)?))?(-dev)?",
        rf"usr/share/man/({_LANG}/)?man\d[^/]*/[^/]+\.gz",
        roff_to_text,
    ),
    Family("debian-handbook", "debian-handbook", rf"{_HANDBOOK}{_LANG}/[^/]+\.html", html_to_text),
    Family(
        "debian-reference-",
        r"debian-reference-(?P<language>..(-..)?)",
        r"usr/share/debian-reference/[^/]+\.html",
        html_to_text,
    ),
    Family(
        "gnome-user-docs",
        "gnome-user-docs",
        rf"usr/share/help/{_LANG}/.*\.page",
        mallard_to_text,
    ),
    Family(
        "linux-doc-6.1",
        r"linux-doc-6\.1",
        rf"{_KERNEL}(translations/{_LANG}/)?.*\.(rst|txt)(\.gz)?",
        str,
    ),
    Family(
        "installation-guide-amd64",
        "installation-guide-amd64",
        rf"usr/share/doc/installation-guide-amd64/{_LANG}/[^/]+\.html",
        html_to_text,
    ),
)


def main() -> None:
    """Builds the corpus that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the corpus")
    parser.add_argument("--languages", help="only these, such as de,pt-BR,ja; default: all")
    parser.add_argument("--cache", type=Path, help="keeps the downloads; default: OUT/packages")
    args = parser.parse_args()
    wanted = parse_languages(args.languages) if args.languages else None
    packages = find_packages(wanted)
    files = debian.download(list(packages), args.cache or args.out / "packages")
    with tempfile.TemporaryDirectory(prefix="corpus-") as scratch:
        build(files, packages, wanted, args.out, Path(scratch))


def find_packages(wanted: Collection[str] | None) -> dict[str, Family]:
    """The archive's packages that may have documents in the wanted languages.

    Raises:
        CorpusError: no apt, or no package at all.
    """
    packages = {}
    for family in FAMILIES:
        matches = [re.fullmatch(family.names, name) for name in debian.packages_of(family.prefix)]
        found = [match for match in matches if match]
        if not found:
            print(f"{family.prefix}: this archive has no such package; going on without it")
        for match in found:
            language = family.language(match)
            if wanted is None or language is None or language in {*wanted, ORIGINAL}:
                packages[match[0]] = family
    if not packages:
        raise CorpusError("apt knows none of the packages; `apt-get update` (as root) may help")
    return packages


def build(
    files: dict[str, Path],
    packages: dict[str, Family],
    wanted: Collection[str] | None,
    out: Path,
    scratch: Path,
) -> None:
    """Builds the corpus from downloaded packages.

    Args:
        files: the file of each package.
        packages: what each package is.
        wanted: languages; None: all there are.
        out: the corpus.
        scratch: an empty directory.

    Raises:
        CorpusError: no document, or a package that cannot be unpacked.
    """
    facts: dict[str, Package] = {}
    unreadable: collections.Counter[str] = collections.Counter()
    for i, name in enumerate(sorted(files)):
        print(f"reading {name} ({i + 1} of {len(files)})", flush=True)
        with tempfile.TemporaryDirectory(dir=scratch) as root:
            debian.unpack(files[name], Path(root))
            facts[name] = debian.describe(files[name], Path(root), facts)
            documents = read_documents(name, packages[name], Path(root), wanted, unreadable)
            if not _spool(documents, scratch):
                print(f"{name}: no document in it")
    for reason, count in sorted(unreadable.items()):
        print(f"left out {count} files: {reason}")
    spools = sorted(scratch.glob("*.spool"), key=lambda path: (path.stem != ORIGINAL, path.stem))
    deduplicator = Deduplicator()
    used: set[str] = set()
    languages = []
    print(f"{'language':12} {'documents':>9} {'of':>7} {'MB':>7}")
    for spool in spools:
        with spool.open(encoding="utf-8") as lines:
            documents = [Document(*json.loads(line)) for line in lines]
        kept = list(deduplicator.kept(documents, is_original=spool.stem == ORIGINAL))
        if wanted is not None and spool.stem not in wanted:
            continue  # the original, read for what is untranslated
        if len(kept) < _MIN_DOCUMENTS:
            print(f"{spool.stem:12} {len(kept):9} {len(documents):7}  too few: left out")
            continue
        write_jsonl(out / f"{spool.stem}.jsonl", (_record(d, facts[d.package]) for d in kept))
        used.update(document.package for document in kept)
        languages.append(spool.stem)
        size = (out / f"{spool.stem}.jsonl").stat().st_size
        print(f"{spool.stem:12} {len(kept):9} {len(documents):7} {size / 1e6:7.1f}", flush=True)
    if not languages:
        raise CorpusError("no document in these languages; leave --languages out to see all")
    dropped = ", ".join(f"{count} {why}" for why, count in sorted(deduplicator.dropped.items()))
    print(f"left out documents: {dropped}; cut {deduplicator.cut} repeated paragraphs")
    write_licenses(out, [facts[name] for name in used])
    write_atomically(out / MIXTURE_FILE, mixture(sorted(languages)))
    print(f"{out / MIXTURE_FILE}: {len(languages)} languages")


def read_documents(
    package: str,
    family: Family,
    root: Path,
    wanted: Collection[str] | None,
    unreadable: collections.Counter[str],
) -> Iterator[tuple[str, Document]]:
    """The documents of an unpacked package, each with its language, before deduplication.

    What cannot be read is counted in `unreadable`, by reason.
    """
    whole = re.fullmatch(family.names, package)
    default = (family.language(whole) if whole else None) or ORIGINAL
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        match = re.fullmatch(family.paths, relative)
        # A link is another name of a document that is there.
        if match is None or path.is_symlink() or not path.is_file():
            continue
        language = family.language(match) or default
        if wanted is not None and language not in {*wanted, ORIGINAL}:
            continue
        try:
            text = family.to_text(_decompressed(path).decode("utf-8"))
        except UnicodeDecodeError:
            unreadable["not UTF-8"] += 1
        except (ValueError, EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
            unreadable[str(error)] += 1
        else:
            yield language, Document(package, relative, tidy(text))


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return lzma.decompress(data) if path.suffix == ".xz" else data


def tidy(text: str) -> str:
    """Text with one kind of line end, no blanks at line ends, and single blank lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    text = re.sub(r"[ \t\u00a0]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def mixture(languages: Collection[str]) -> Iterator[str]:
    """A mixture file that names the corpus's files, in the lines of its text."""
    yield "# Debian's documentation, a source for each language; licences: LICENSES.md.\n"
    yield f"temperature = {_TEMPERATURE}\n"
    for language in languages:
        yield f'\n[[source]]\nname = "{language}"\npath = "{language}.jsonl"\n'
        yield f'format = "jsonl"\nfield = "text"\nlanguage = "{language}"\n'


def _spool(documents: Iterable[tuple[str, Document]], scratch: Path) -> int:
    """Sets documents down by language, before any deduplication, and counts them."""
    lines = collections.defaultdict(list)
    for language, document in documents:
        lines[language].append(json.dumps(dataclasses.astuple(document)) + "\n")
    for language, added in lines.items():
        with (scratch / f"{language}.spool").open("a", encoding="utf-8") as file:
            file.writelines(added)
    return sum(map(len, lines.values()))


def _record(document: Document, package: Package) -> dict[str, str]:
    return {
        "id": hashlib.sha256(document.source.encode()).hexdigest()[:16],
        "text": document.text,
        "source": document.source,
        "license": package.license,
    }


if __name__ == "__main__":
    sys.exit(run_builder(main))
