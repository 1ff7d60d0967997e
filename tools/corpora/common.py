"""What both corpus builders share: errors, languages, processes and the files they write.

The builders run with any Python from 3.11 on, with nothing installed, t5g2 included.
"""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


class CorpusError(Exception):
    """Something that the user can mend: one line that names the thing and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """A package that gave something to a corpus.

    Attributes:
        name: as its archive calls it.
        version: which one.
        licenses: short names of the licences it comes under, the main one first.
        copyright: the full text of its copyright or licence file.
    """

    name: str
    version: str
    licenses: tuple[str, ...]
    copyright: str

    @property
    def license(self) -> str:
        """The main licence, and whether there are others."""
        return self.licenses[0] + (" and others" if len(self.licenses) > 1 else "")


def run_builder(build: Callable[[], None]) -> int:
    """Runs a builder and turns what may go wrong into one line and an exit code."""
    try:
        build()
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was downloaded is kept, so start again at will", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def output_of(command: Sequence[str], fix: str, cwd: Path | None = None) -> str:
    """What a program prints.

    Args:
        command: the program and its arguments.
        fix: what the user can do if it fails; closes the error's line.
        cwd: where it runs.

    Raises:
        CorpusError: it is not installed, or it failed.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CorpusError(
            f"{command[0]} is not installed; this needs a Debian or Ubuntu machine (apt, dpkg)"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        # apt warns of many things before it says what is wrong.
        errors = [line for line in lines if re.match(r"E:|npm error", line)]
        reason = (errors or lines or [f"exit code {done.returncode}"])[0].strip()
        raise CorpusError(f"{command[0]} failed ({reason}); {fix}")
    return done.stdout


# Variants that are written differently stay apart; every other region is its language.
_KEPT_REGIONS = {("pt", "BR"), ("zh", "CN"), ("zh", "TW")}
_SCRIPTS = {"latin": "Latn", "cyrillic": "Cyrl"}
_ALIASES = {"C": "en", "no": "nb", "iw": "he", "zh": "zh-CN", "zh-Hans": "zh-CN"} | {
    "zh-Hant": "zh-TW",
    "zh-HK": "zh-TW",
}
_TAG = re.compile(r"([A-Za-z]{2,3})(?:[-_]([A-Z][a-z]{3}))?(?:[-_]([A-Za-z]{2}))?(?:[@-]([a-z]+))?")


def language_tag(name: str) -> str | None:
    """The corpus's name of a language: "pt-BR" for pt_BR, pt-br and pt_BR.UTF-8, "de" for de-DE.

    None: this is no name of a language.
    """
    name = name.split(".")[0]
    if name in _ALIASES:
        return _ALIASES[name]
    match = _TAG.fullmatch(name)
    if match is None:
        return None
    language, script, region, variant = match.groups()
    tag = language.lower()
    if (tag, (region or "").upper()) in _KEPT_REGIONS:
        return f"{tag}-{region.upper()}"
    if script or variant:
        tag += f"-{script or _SCRIPTS.get(variant, variant)}"
    return _ALIASES.get(tag, tag)


def parse_languages(names: str) -> frozenset[str]:
    """The languages in a comma-separated list.

    Raises:
        CorpusError: a name that is no language's.
    """
    tags = {name: language_tag(name.strip()) for name in names.split(",")}
    for name, tag in tags.items():
        if tag is None:
            raise CorpusError(f"--languages: {name!r} is no language; write them like de,pt-BR,ja")
    return frozenset(tag for tag in tags.values() if tag is not None)


def write_atomically(path: Path, content: Iterable[str]) -> None:
    """Writes lines to a file beside `path`, which takes its place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Writes one record a line."""
    write_atomically(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_licenses(out: Path, packages: Iterable[Package]) -> None:
    """Writes `LICENSES.md`, and each package's copyright file whole to `licenses/`."""
    lines = [
        "# Licences\n\n",
        "Every package that is in this corpus, and the licences that its copyright file names;\n",
        "the files themselves are in `licenses/`. Some concern files that hold no text: what\n",
        "counts for a document, its package's file says.\n\n",
        "| package | version | licences |\n|---|---|---|\n",
    ]
    for package in sorted(packages, key=lambda package: package.name):
        write_atomically(out / "licenses" / f"{package.name}.txt", [package.copyright])
        lines.append(f"| {package.name} | {package.version} | {', '.join(package.licenses)} |\n")
    write_atomically(out / "LICENSES.md", lines)
