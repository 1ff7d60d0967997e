r"""The readable text of a manual page: man macros, strings, tables; no layout.

What is understood is what pages use: see man(7), groff_man(7) and tbl(1). Pages in BSD's mdoc
macros, two in a hundred of those that Debian translates, are refused.
"""

import itertools
import re
from collections.abc import Iterator

from paragraphs import Paragraphs

# Glyphs that occur in running text; see groff_char(7).
_GLYPHS = {
    "em": "—", "en": "–", "hy": "-", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "aq": "'",
    "dq": '"', "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›", "bu": "•", "co": "©", "rg": "®",
    "tm": "™", "de": "°", "mu": "×", "pl": "+", "mi": "−", "+-": "±", "<=": "≤", ">=": "≥",
    "!=": "≠", "->": "→", "<-": "←", "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "aa": "´",
    "sl": "/", "at": "@", "sh": "#", "Do": "$", "ba": "|", "or": "|", "bv": "|", "br": "|",
    "ul": "_", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "⟨", "ra": "⟩", "Bq": "„",
    "bq": "‚", "ss": "ß", ":a": "ä", ":o": "ö", ":u": "ü", ":A": "Ä", ":O": "Ö", ":U": "Ü",
    "'e": "é", "'a": "á", "'o": "ó", "'i": "í", "'u": "ú", "'E": "É", "`e": "è", "`a": "à",
    "^e": "ê", "^o": "ô", "^a": "â", "^i": "î", "^u": "û", ",c": "ç", "~n": "ñ", "oa": "å",
    "/o": "ø", "ae": "æ", "mc": "µ", "*m": "μ", "*p": "π", "12": "½", "14": "¼", "34": "¾",
    "S2": "²", "S3": "³", "sc": "§", "ps": "¶", "dg": "†", "dd": "‡", "Eu": "€", "ct": "¢",
    "Po": "£", "Ye": "¥", "r!": "¡", "r?": "¿", "if": "∞", "no": "¬", "lh": "☜", "rh": "☞",
    "ci": "○", "sq": "□", "OK": "✓", "..": "…",
}  # fmt: skip
_STRINGS = {"lq": "“", "rq": "”", "R": "®", "Tm": "™", "S": ""}
_ESCAPE = re.compile(
    r"\\(?:"
    r"[\"#].*"  # a comment
    r"|\[(?P<long>[^\]]*)\]|\((?P<two>..)|C'(?P<named>[^']*)'"
    r"|\*(?:\[(?P<long_string>[^\] ]*)[^\]]*\]|\((?P<two_string>..)|(?P<string>.))"
    # Fonts, colours, registers, sizes and motions print nothing.
    r"|[fFmMnkgVY](?:\[[^\]]*\]|[+-]?\(..|[+-]?.)"
    r"|s(?:[+-]?\[[^\]]*\]|[+-]?\(..|[+-]?'[^']*'|[+-]?[0-3][0-9]|[+-]?[0-9])"
    r"|[hvwxNobDlLHSRXZA]'[^']*'"
    r"|(?P<other>.|$))"
)
_COMMENT = re.compile(r'\\".*')
_OTHER = {"e": "\\", "E": "\\", "~": " ", "0": " ", "t": "\t"} | dict.fromkeys("&|^%:/,){}!", "")
_FONTS = frozenset({"B", "I", "SM", "SB", "CW", "R", "C"})
_ALTERNATING = frozenset({"BR", "RB", "BI", "IB", "IR", "RI"})
_ADDRESSES = frozenset({"UR", "MT", "URL", "MTO"})
_PARAGRAPH_BREAKS = frozenset({"PP", "P", "LP", "Pp", "sp", "Sp", "HP", "bp"})
_LINE_BREAKS = frozenset({"br", "RS", "RE", "in", "ti", "TQ", "ce"})
_VERBATIM_STARTS = frozenset({"nf", "EX", "Vb", "CS"})
_VERBATIM_ENDS = frozenset({"fi", "EE", "Ve", "CE"})
_BULLETS = frozenset({"•", "*", "-", "o", "+", "·", "–", "—"})


def roff_to_text(source: str) -> str:
    """The text of a manual page; empty for a page that only includes another.

    Raises:
        ValueError: it is written in mdoc macros.
    """
    if re.search(r"^\.\s*Dt ", source, re.MULTILINE):
        raise ValueError("mdoc macros")
    return _Page(source).text()


class _Page:
    """A page while it is read: requests change the state, text goes into paragraphs."""

    def __init__(self, source: str) -> None:
        self._lines = iter(source.replace("\r\n", "\n").replace("\\\n", "").split("\n"))
        self._paragraphs = Paragraphs()
        self._strings = dict(_STRINGS)
        # What the next line of text is: the tag of an item, or a heading.
        self._is_tag = False
        self._is_heading = False
        # Whether the other branch of the last condition holds.
        self._else = False

    def text(self) -> str:
        for line in self._lines:
            self._read(line)
        return self._paragraphs.text()

    def _read(self, line: str) -> None:
        request = re.match(r"[.'][ \t]*([^\s\\\"]*)[ \t]*(.*)", line)
        if request:
            self._request(request[1], request[2])
        else:
            self._write(self._plain(line))

    def _write(self, line: str) -> None:
        if self._is_heading:
            self._is_heading = False
            self._heading(line)
        elif line.strip() or self._paragraphs.verbatim:
            self._paragraphs.add(line + "\n")
        else:
            self._paragraphs.end_paragraph()
        if self._is_tag:
            self._is_tag = False
            self._paragraphs.end_line()

    def _heading(self, text: str) -> None:
        self._paragraphs.end_paragraph()
        self._paragraphs.add(text)
        self._paragraphs.end_paragraph()

    def _request(self, name: str, rest: str) -> None:
        if name in ("if", "ie", "el"):
            self._condition(name, rest)
        elif name in ("de", "am", "de1", "am1", "ig"):
            # The first argument of `ig`, the second of the others, may name another end.
            end = rest.split()[0 if name == "ig" else 1 :][:1]
            self._skip_to("." + (end[0] if end else "."))
        elif name == "EQ":
            self._skip_to(".EN")
        elif name == "ds":
            key, _, value = rest.partition(" ")
            self._strings[key] = self._plain(value.lstrip().removeprefix('"'))
        elif name == "TS":
            self._paragraphs.end_paragraph()
            for row in _table_rows(self._lines):
                self._paragraphs.add(self._plain(row))
                self._paragraphs.end_line()
            self._paragraphs.end_paragraph()
        elif name in ("SH", "SS"):
            self._set_verbatim(False)
            self._is_heading = not rest
            self._heading(" ".join(self._arguments(rest)))
        elif name in _VERBATIM_STARTS | _VERBATIM_ENDS:
            self._set_verbatim(name in _VERBATIM_STARTS)
        elif name == "IP":
            self._item(self._arguments(rest)[:1])
        elif name == "TP":
            self._paragraphs.end_paragraph()
            self._is_tag = True
        elif name in _PARAGRAPH_BREAKS:
            self._paragraphs.end_paragraph()
        elif name in _LINE_BREAKS:
            self._paragraphs.end_line()
        elif name in _FONTS | _ADDRESSES | _ALTERNATING:
            arguments = self._arguments(rest)
            if arguments:
                self._write(("" if name in _ALTERNATING else " ").join(arguments))
        elif name in ("UE", "ME"):
            # The punctuation after an address.
            self._paragraphs.add("".join(self._arguments(rest)[:1]) + "\n")

    def _set_verbatim(self, verbatim: bool) -> None:
        self._paragraphs.end_line()
        self._paragraphs.verbatim = verbatim

    def _item(self, tag: list[str]) -> None:
        self._paragraphs.end_paragraph()
        if tag and tag[0].strip() in _BULLETS:
            self._paragraphs.mark = "- "
        elif tag:
            self._paragraphs.add(tag[0])
            self._paragraphs.end_line()

    def _condition(self, name: str, rest: str) -> None:
        """Reads the branch that a terminal would show."""
        if name == "el":
            holds = self._else
        else:
            # `n`: on a terminal, `t`: not. All else prepares layout, not text.
            match = re.match(r"(!?)([nt])\s+(.*)|.*", rest)
            holds = match is not None and match[2] == ("t" if match[1] else "n")
            self._else = not holds
            rest = rest if match is None or match[3] is None else match[3]
        opened, branch = 0, []
        for line in itertools.chain([rest], self._lines):
            opened += line.count(r"\{") - line.count(r"\}")
            branch.append(line.replace(r"\{", "").replace(r"\}", ""))
            if opened <= 0:
                break
        if holds:
            for line in filter(str.strip, branch):
                self._read(line)

    def _skip_to(self, end: str) -> None:
        for line in self._lines:
            if line.replace(" ", "").startswith(end):
                return

    def _arguments(self, rest: str) -> list[str]:
        """A macro's arguments: words, or what stands between double quotes."""
        words = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^ \t\\])+)', _COMMENT.sub("", rest))
        return [self._plain(quoted.replace('""', '"') or word) for quoted, word in words]

    def _plain(self, text: str) -> str:
        return _ESCAPE.sub(self._escaped, text)

    def _escaped(self, match: re.Match[str]) -> str:
        glyph = match["long"] or match["two"] or match["named"]
        if glyph:
            code = re.fullmatch(r"u([0-9A-F]{4,6})", glyph)
            return chr(int(code[1], 16)) if code else _GLYPHS.get(glyph, "")
        string = match["long_string"] or match["two_string"] or match["string"]
        if string:
            return self._strings.get(string, "")
        other = match["other"] or ""
        # A letter would be a request that prints nothing, any other character stands for itself.
        return _OTHER.get(other, "" if other.isalnum() else other)


def _table_rows(lines: Iterator[str]) -> Iterator[str]:
    """The rows of a table, up to its end, their cells between bars."""
    separator, in_format, cell = "\t", True, None
    row = ""
    for line in lines:
        if re.match(r"\.\s*TE", line):
            return
        if in_format:
            tab = re.search(r"tab\s*\((.)\)", line)
            separator = tab[1] if tab else separator
            in_format = not line.rstrip().endswith(".")
            continue
        if line.strip() == ".T&":
            in_format = True
            continue
        # A cell between T{ and T} runs over several lines; requests in it are layout.
        if cell is not None and not line.startswith("T}"):
            cell += "" if line.startswith(".") else line + " "
            continue
        if cell is not None:
            row, line, cell = row + cell.strip(), line[2:], None
        if line.endswith("T{"):
            row, cell = row + line[:-2], ""
            continue
        row += line
        if not row.startswith(".") and row.strip("_= -" + separator):
            yield " | ".join(part.strip() for part in row.split(separator) if part.strip())
        row = ""
