"""Debian packages without root: which there are, downloading, unpacking, licences."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common import CorpusError, Package, output_of

_APT_FIX = "`apt-get update` (as root) renews a list of packages that is missing or too old"
_HASHES = {"MD5Sum": "md5", "SHA1": "sha1", "SHA256": "sha256", "SHA512": "sha512"}
# Licence names in copyright files that are plain prose, most telling first.
_PROSE = (
    (r"free documentation licen[cs]e", "GFDL"),
    (r"mozilla public licen[cs]e", "MPL"),
    (r"creative commons", "CC"),
    (r"(lesser|library) general public licen[cs]e|\blgpl", "LGPL"),
    (r"(?<!lesser )(?<!library )general public licen[cs]e|\bgpl", "GPL"),
    (r"\bbsd\b|berkeley|redistribution and use in source", "BSD"),
    (r"permission is granted to make and distribute verbatim", "Linux-man-pages-copyleft"),
    (r"public domain", "public-domain"),
)


@dataclasses.dataclass(frozen=True)
class Download:
    """A package file: its package's name, its own name, and the checksum it must have."""

    package: str
    file: str
    algorithm: str
    digest: str


def packages_of(prefix: str) -> list[str]:
    """Names of the archive's packages that begin so.

    Raises:
        CorpusError: no apt.
    """
    return sorted(output_of(["apt-cache", "pkgnames", prefix], _APT_FIX).split())


def download(names: Sequence[str], cache: Path) -> dict[str, Path]:
    """Package files, downloaded where the cache does not have them whole yet.

    Returns:
        The file of each package.

    Raises:
        CorpusError: no apt, no such package, or no network.
    """
    cache.mkdir(parents=True, exist_ok=True)
    # Asks no server: the local lists say which file a package is.
    plan = output_of(["apt-get", "download", "--print-uris", *names], _APT_FIX)
    files = {}
    downloads = [_parse_download(line) for line in plan.splitlines()]
    missing = [wanted for wanted in downloads if not _is_whole(cache / wanted.file, wanted)]
    for i, wanted in enumerate(missing):
        print(f"downloading {wanted.package} ({i + 1} of {len(missing)})", flush=True)
        # A partial file would be taken for a whole one of another version.
        (cache / wanted.file).unlink(missing_ok=True)
        output_of(
            ["apt-get", "download", "--quiet", wanted.package],
            f"is there a network, and room in {cache}? {_APT_FIX}",
            cwd=cache,
        )
        if not _is_whole(cache / wanted.file, wanted):
            raise CorpusError(f"{cache / wanted.file}: not the file that apt announced; {_APT_FIX}")
    for wanted in downloads:
        files[wanted.package] = cache / wanted.file
    return files


def _parse_download(line: str) -> Download:
    _uri, file, _size, checksum = line.split()
    algorithm, digest = checksum.split(":")
    return Download(file.split("_")[0], file, _HASHES[algorithm], digest)


def _is_whole(path: Path, wanted: Download) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, wanted.algorithm).hexdigest() == wanted.digest


def unpack(file: Path, directory: Path) -> None:
    """Unpacks a package file; needs no root, and runs none of its scripts.

    Raises:
        CorpusError: no dpkg, or a broken file.
    """
    output_of(["dpkg", "-x", str(file), str(directory)], f"delete {file} if it is damaged")


def describe(file: Path, unpacked: Path, described: Mapping[str, Package]) -> Package:
    """A package's version and licences.

    Args:
        file: the package.
        unpacked: where it is unpacked.
        described: packages that came before; packages of one source may share a copyright file.

    Raises:
        CorpusError: it has no copyright file.
    """
    name, version = file.name.split("_")[:2]
    documentation = unpacked / "usr/share/doc" / name
    if documentation.is_symlink() and documentation.readlink().name in described:
        text = described[documentation.readlink().name].copyright
    elif (documentation / "copyright").is_file():
        text = (documentation / "copyright").read_text(encoding="utf-8", errors="replace")
    else:
        raise CorpusError(f"{file}: has no copyright file, so nobody knows how it may be used")
    return Package(
        name=name,
        version=version.replace("%3a", ":"),
        licenses=tuple(_licenses(text)),
        copyright=text,
    )


def _licenses(text: str) -> Iterator[str]:
    """Short names of the licences in a copyright file: that of most files, then by frequency."""
    names = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    if names:
        names = [" ".join(name.split()) for name in names]
        main = re.search(r"^Files:[ \t]*\*[ \t]*\n(?:.+\n)*?License:[ \t]*(\S.*)$", text, re.M)
        first = " ".join(main[1].split()) if main else names[0]
        yield from sorted(set(names), key=lambda name: (name != first, -names.count(name), name))
        return
    prose = " ".join(text.lower().split())
    found = [name for pattern, name in _PROSE if re.search(pattern, prose)]
    yield from found or ["see the copyright file"]
