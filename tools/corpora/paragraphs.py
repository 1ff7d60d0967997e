"""Text put together from pieces: wrapped lines joined, one blank line between paragraphs."""

import re

# Between these no space is written where a line is wrapped: kana, Chinese characters and the wide
# punctuation that goes with them. Korean separates its words.
_WIDE = "\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_WIDE_WRAP = re.compile(f"(?<=[{_WIDE}])[ \t]*\n[ \t]*(?=[{_WIDE}])")
# White space that wraps; no-break spaces become ordinary ones.
_SPACE = re.compile(r"[ \t\n\r\f\v\u00a0\u202f]+")


def unwrap(text: str) -> str:
    """Joins wrapped lines, with a space where the script writes any."""
    return _SPACE.sub(" ", _WIDE_WRAP.sub("", text)).strip()


class Paragraphs:
    """Pieces of text become paragraphs, at the breaks between them.

    Attributes:
        mark: stands before the next paragraph, once.
        verbatim: keep the lines as they are until the next break.
    """

    def __init__(self) -> None:
        self.mark = ""
        self.verbatim = False
        self._blocks: list[str] = []
        self._pending: list[str] = []
        self._separator = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is no text since the last break."""
        return not any(piece.strip() for piece in self._pending)

    def add(self, piece: str) -> None:
        """Adds text as it is; line ends in it are wraps, unless verbatim."""
        self._pending.append(piece)

    def end_line(self) -> None:
        """What follows begins a line."""
        self._break("\n")

    def end_paragraph(self) -> None:
        """What follows begins a paragraph."""
        self._break("\n\n")

    def text(self) -> str:
        """All of it."""
        self._break("")
        return "".join(self._blocks).strip()

    def _break(self, separator: str) -> None:
        raw = "".join(self._pending)
        self._pending.clear()
        text = raw.strip("\n").rstrip() if self.verbatim else unwrap(raw)
        if text.strip():
            self._blocks.append(self._separator + self.mark + text)
            self._separator, self.mark = separator, ""
        elif len(separator) > len(self._separator):
            self._separator = separator
