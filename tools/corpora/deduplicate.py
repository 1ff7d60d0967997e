"""What is left out of a corpus: scraps, markup, and what was said before."""

import collections
import dataclasses
import hashlib
import re
import string
from collections.abc import Collection, Iterable

# All lengths are in bytes of UTF-8: they mean about as much text in every script.
_MIN_DOCUMENT = 300
# Shorter paragraphs, headings and option names recur in honest text.
_MIN_PARAGRAPH = 80
# Fewer words may be a name, the same in many languages.
_MIN_WORDS = 3
# A paragraph of more documents than this is boilerplate: a licence note, a translator's plea.
_BOILERPLATE = 10
# A document repeats others if this share of its longer paragraphs does.
_MAX_REPEATED = 0.5
_MAX_MARKUP = 0.4

_MARKUP = frozenset(string.punctuation + string.digits)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and where it is from: a package and a path in it."""

    package: str
    path: str
    text: str

    @property
    def source(self) -> str:
        """Package and path in one."""
        return f"{self.package}/{self.path}"


class Deduplicator:
    """Keeps what is new in a language, and what is no untranslated original.

    What it keeps of a language depends on that language and the original alone.

    Attributes:
        dropped: documents left out, by reason.
        cut: repeated or untranslated paragraphs taken out of documents that were kept.
    """

    def __init__(self) -> None:
        self.dropped: collections.Counter[str] = collections.Counter()
        self.cut = 0
        self._original: frozenset[bytes] = frozenset()

    def kept(self, documents: Iterable[Document], is_original: bool = False) -> list[Document]:
        """The documents of a language that are worth keeping, in the order of their sources.

        A paragraph that many of them have stays only in the first, one that follows itself stays
        once. Prose that stands in any
        document of the original is untranslated and goes. A document goes if it is too short or
        mostly punctuation and digits, if another has the same text, and if half of it stands in
        others.

        Args:
            documents: all of a language.
            is_original: they are what other languages translate; must come before those.
        """
        ordered = sorted(documents, key=lambda document: document.source)
        counts = collections.Counter(
            key
            for document in ordered
            for key in {key for text, key in _paragraphs(document.text) if _is_long(text)}
        )
        known: set[bytes] = set()
        boilerplate: set[bytes] = set()
        kept = []
        for document in ordered:
            paragraphs: list[str] = []
            for paragraph, key in _paragraphs(document.text):
                untranslated = key in self._original and _is_prose(paragraph)
                if untranslated or key in boilerplate or paragraphs[-1:] == [paragraph]:
                    self.cut += 1
                    continue
                if counts[key] > _BOILERPLATE:
                    boilerplate.add(key)
                paragraphs.append(paragraph)
            text = "\n\n".join(paragraphs)
            reason = _fault(text, known)
            if reason:
                self.dropped[reason] += 1
            else:
                kept.append(dataclasses.replace(document, text=text))
                known.update(key for text, key in _paragraphs(text) if _is_long(text))
                known.add(_hash(text))
        if is_original:
            self._original = frozenset(
                key for document in ordered for _, key in _paragraphs(document.text)
            )
        return kept


def _fault(text: str, known: Collection[bytes]) -> str | None:
    """Why a document is left out; None: it is not."""
    if len(text.encode()) < _MIN_DOCUMENT:
        return "too short"
    visible = "".join(text.split())
    if sum(character in _MARKUP for character in visible) > _MAX_MARKUP * len(visible):
        return "mostly markup"
    if _hash(text) in known:
        return "same text"
    sizes = [
        (key, len(paragraph.encode()))
        for paragraph, key in _paragraphs(text)
        if _is_long(paragraph)
    ]
    repeated = sum(size for key, size in sizes if key in known)
    if repeated > _MAX_REPEATED * sum(size for _, size in sizes):
        return "repeats others"
    return None


def _paragraphs(text: str) -> list[tuple[str, bytes]]:
    """Each paragraph with what it has in common with its likes."""
    return [(paragraph, _hash(paragraph)) for paragraph in re.split(r"\n\s*\n", text)]


def _is_long(paragraph: str) -> bool:
    return len(paragraph.encode()) >= _MIN_PARAGRAPH


def _hash(text: str) -> bytes:
    """Equal for texts that differ only in case, digits, punctuation and white space."""
    normal = "".join(character for character in text.casefold() if character.isalpha())
    return hashlib.blake2b(normal.encode(), digest_size=8).digest()


def _is_prose(paragraph: str) -> bool:
    """Whether it is words, not a name or a listing, which stay as they are in every language."""
    words = paragraph.split()
    return (
        len(words) >= _MIN_WORDS
        and "\n" not in paragraph
        and sum(word.isalpha() for word in words) > len(words) / 2
    )
