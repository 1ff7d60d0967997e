"""The readable text of HTML and of Mallard pages (GNOME's help)."""

import types
from collections.abc import Mapping
from html.parser import HTMLParser
from xml.etree import ElementTree

from paragraphs import Paragraphs

# What surrounds the text, by element, by class and by id.
_SKIPPED_TAGS = frozenset({
    "head", "header", "footer", "nav", "aside", "script", "style", "noscript", "button", "select",
    "svg", "object", "info",
})  # fmt: skip
_SKIPPED_CLASSES = frozenset({"navheader", "navfooter", "docnav", "toc", "indexterm"})
_SKIPPED_IDS = frozenset({"banner", "SearchFrame", "DonationFrame"})
# Elements that stand in paragraphs of their own, and those that start a line.
_PARAGRAPHS = frozenset({
    "p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl",
    "table", "blockquote", "pre", "hr", "caption", "title", "subtitle", "desc", "list", "steps",
    "terms", "note", "figure", "listing", "example", "synopsis", "screen",
})  # fmt: skip
_LINES = frozenset({"br", "li", "item", "dt", "dd", "tr"})
_CELLS = frozenset({"td", "th"})
_MARKED = frozenset({"li", "item"})
_VERBATIM = frozenset({"pre", "screen"})
_VOID = frozenset({
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
    "track", "wbr",
})  # fmt: skip


class _Writer:
    """Collects the text of elements; what `ElementTree.XMLParser` calls a target."""

    def __init__(self) -> None:
        self._paragraphs = Paragraphs()
        # The element that is being skipped, and how many of its name are open.
        self._skipped: str | None = None
        self._depth = 0

    def start(self, tag: str, attributes: Mapping[str, str | None]) -> None:
        if self._skipped is not None:
            self._depth += tag == self._skipped
            return
        if tag not in _VOID and _is_skipped(tag, attributes):
            self._skipped, self._depth = tag, 1
            return
        self._break(tag)
        if tag in _VERBATIM:
            self._paragraphs.verbatim = True
        if tag in _MARKED:
            self._paragraphs.mark = "- "
        if tag in _CELLS and not self._paragraphs.is_empty:
            self._paragraphs.add(" | ")

    def end(self, tag: str) -> None:
        if self._skipped is not None:
            self._depth -= tag == self._skipped
            if self._depth == 0:
                self._skipped = None
            return
        self._break(tag)
        if tag in _VERBATIM:
            self._paragraphs.verbatim = False
        if tag in _MARKED:
            self._paragraphs.mark = ""

    def data(self, text: str) -> None:
        if self._skipped is None:
            self._paragraphs.add(text)

    def close(self) -> str:
        return self._paragraphs.text()

    def _break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._paragraphs.end_paragraph()
        elif tag in _LINES:
            self._paragraphs.end_line()


def _is_skipped(tag: str, attributes: Mapping[str, str | None]) -> bool:
    classes = (attributes.get("class") or "").split()
    return (
        tag in _SKIPPED_TAGS
        or not _SKIPPED_CLASSES.isdisjoint(classes)
        or attributes.get("id") in _SKIPPED_IDS
        # LibreOffice hides all variants of a text; the one without a class is the general one.
        or ("hidden" in attributes and bool(classes))
    )


class _HtmlParser(HTMLParser):
    """Hands what the parser finds to a writer."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.writer = _Writer()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.writer.start(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self.writer.end(tag)

    def handle_data(self, data: str) -> None:
        self.writer.data(data)


class _MallardWriter(_Writer):
    """Mallard's elements, without their name spaces."""

    # What stands between the parts of a menu path and of a key combination.
    _JOINTS = types.MappingProxyType({"guiseq": " ▸ ", "keyseq": "+"})

    def __init__(self) -> None:
        super().__init__()
        # Open elements and, for each, whether it has had a child.
        self._open: list[tuple[str, bool]] = []

    def start(self, tag: str, attributes: Mapping[str, str | None]) -> None:
        name = tag.rpartition("}")[2]
        super().start(self._html_name(name), attributes)
        if self._open:
            parent, has_child = self._open[-1]
            if has_child and parent in self._JOINTS:
                self.data(self._JOINTS[parent])
            self._open[-1] = parent, True
        self._open.append((name, False))

    def end(self, tag: str) -> None:
        name, _ = self._open.pop()
        super().end(self._html_name(name))

    def _html_name(self, name: str) -> str:
        # `code` is a block of its own, except within a paragraph.
        inline = any(parent in ("p", "title", "desc") for parent, _ in self._open)
        return "screen" if name == "code" and not inline else name


def html_to_text(source: str) -> str:
    """The text of an HTML page, a blank line between paragraphs, without navigation."""
    parser = _HtmlParser()
    parser.feed(source)
    parser.close()
    return parser.writer.close()


def mallard_to_text(source: str) -> str:
    """The text of a Mallard page.

    Raises:
        ValueError: it is no well-formed XML.
    """
    parser = ElementTree.XMLParser(target=_MallardWriter())
    try:
        parser.feed(source)
        return parser.close()
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from None
