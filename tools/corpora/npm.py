"""npm packages, by npm itself or from the registry that it is configured for."""

import base64
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

from common import CorpusError, Package, output_of


def download(name: str, version: str, cache: Path, registry: str | None) -> Path:
    """The tarball of a package, downloaded unless the cache has it.

    Args:
        name: of the package.
        version: exactly.
        cache: the directory that keeps it.
        registry: address of a registry; None: the one that npm is configured for.

    Raises:
        CorpusError: no network, no such package, or no registry known.
    """
    path = cache / f"{name}-{version}.tgz"
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {name} {version}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        fresh = Path(scratch) / path.name
        if shutil.which("npm"):
            command = ["npm", "pack", f"{name}@{version}", "--pack-destination", scratch]
            command += ["--registry", registry] if registry else []
            output_of(command, f"is there a network, and room in {cache}?")
        else:
            _fetch(registry or _configured_registry(), name, version, fresh)
        fresh.replace(path)
    return path


def _configured_registry() -> str:
    """What npm would use, from its environment variable or the user's file."""
    # npm reads them in either case.
    environment = {name.lower(): value for name, value in os.environ.items()}
    if environment.get("npm_config_registry"):
        return environment["npm_config_registry"]
    settings = Path("~/.npmrc").expanduser()
    if settings.is_file():
        found = re.search(r"^\s*registry\s*=\s*(\S+)", settings.read_text(), re.MULTILINE)
        if found:
            return found[1]
    raise CorpusError("npm is not installed and no registry is configured; give --registry URL")


def _fetch(registry: str, name: str, version: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(
            f"{registry.rstrip('/')}/{name}/{version}", timeout=60
        ) as answer:
            facts = json.load(answer)["dist"]
        with urllib.request.urlopen(facts["tarball"], timeout=60) as answer:
            data = answer.read()
        algorithm, _, expected = facts["integrity"].partition("-")
    except (urllib.error.URLError, ValueError, KeyError) as error:
        reason = getattr(error, "reason", error)
        raise CorpusError(
            f"{name} {version}: {registry} did not give it ({reason}); check --registry"
        ) from None
    if base64.b64encode(hashlib.new(algorithm, data).digest()).decode() != expected:
        raise CorpusError(f"{name} {version}: not the file that {registry} announced; try again")
    path.write_bytes(data)


def members(tarball: Path, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Files in a tarball whose whole path below `package/` matches, with what they hold.

    Raises:
        CorpusError: a damaged file.
    """
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                match = re.fullmatch(pattern, member.name.removeprefix("package/"))
                file = archive.extractfile(member) if match and member.isfile() else None
                if match and file is not None:
                    yield match, file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise CorpusError(f"{tarball}: damaged ({error}); delete it and start again") from None


def describe(tarball: Path) -> Package:
    """A package's version and licence; its README counts for a part of its licence file.

    Raises:
        CorpusError: a damaged file, or a package that names no licence.
    """
    texts = {
        match[0]: content.decode("utf-8", errors="replace")
        for match, content in members(tarball, r"package\.json|LICENSE|README\.md")
    }
    facts = json.loads(texts.pop("package.json", "{}"))
    if not {"name", "version", "license"} <= facts.keys():
        raise CorpusError(f"{tarball}: names no licence, so nobody knows how it may be used")
    return Package(
        name=facts["name"],
        version=facts["version"],
        licenses=(facts["license"],),
        copyright="\n\n".join(text for _, text in sorted(texts.items())),
    )
