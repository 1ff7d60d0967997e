"""Text out of HTML, Mallard and manual pages."""

import re
import shutil
import subprocess
from collections import Counter

import pytest
from markup import html_to_text, mallard_to_text
from paragraphs import unwrap
from roff import roff_to_text


@pytest.mark.parametrize(
    ("wrapped", "joined"),
    [
        ("two\n  words", "two words"),
        ("日本語の\n文章。\n次", "日本語の文章。次"),
        ("한국어는\n띄어", "한국어는 띄어"),
        ("日本語 and\nEnglish", "日本語 and English"),
        ("שלום\nעולם", "שלום עולם"),
        (" no\u00a0break ", "no break"),
    ],
)
def test_wrapped_lines_are_joined_as_the_script_writes_them(wrapped: str, joined: str) -> None:
    assert unwrap(wrapped) == joined


def test_html_gives_its_text_and_nothing_of_what_surrounds_it() -> None:
    page = """<!DOCTYPE html><html lang="de"><head><title>Titel</title><style>p {}</style></head>
      <body><div class="navheader"><table><tr><td>Zurück</td></tr></table></div>
      <nav>Menü</nav><script>if (a < b) { document.write("<p>nein</p>"); }</script>
      <h1>Größe &amp; Form</h1><div><p>Ein <b>fettes</b>
      Wort<br>und eine Zeile.</div>
      <ul><li>eins</li><li>zwei</li></ul>
      <table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td></td><td>2</td></tr></table>
      <pre>  x = 1

  y = 2</pre><p>Ende</p><div class="toc"><div>Inhalt</div>mehr Inhalt</div>
      <footer>Fuß</footer></body></html>"""
    assert html_to_text(page) == (
        "Größe & Form\n\nEin fettes Wort\nund eine Zeile.\n\n- eins\n- zwei\n\n"
        "a | b\n1 | | 2\n\n  x = 1\n\n  y = 2\n\nEnde"
    )


def test_of_variants_for_several_systems_html_gives_the_general_one() -> None:
    page = (
        '<p>Wählen Sie <span><span hidden="true" class="MAC">Einstellungen</span>'
        '<span hidden="true" id="default1">Extras - Optionen</span></span>.</p>'
    )
    assert html_to_text(page) == "Wählen Sie Extras - Optionen."


def test_html_in_arabic_keeps_its_order() -> None:
    assert html_to_text('<p dir="rtl">مرحبا <b>بكم</b> في دبيان.</p>') == "مرحبا بكم في دبيان."


def test_mallard_gives_menus_keys_and_listings() -> None:
    page = """<page xmlns="http://projectmallard.org/1.0/" xml:lang="de">
      <info><credit><name>Wer</name></credit><desc>Kurz</desc></info>
      <title>Das <em>Menü</em></title>
      <p>Wählen Sie <guiseq><gui>Datei</gui><gui>Neu</gui></guiseq> oder
      <keyseq><key>Strg</key><key>N</key></keyseq>, nicht <code>neu</code>.</p>
      <steps><item><p>Erst dies.</p></item><item><p>Dann das.</p></item></steps>
      <code>a
  b</code></page>"""
    assert mallard_to_text(page) == (
        "Das Menü\n\nWählen Sie Datei ▸ Neu oder Strg+N, nicht neu.\n\n"
        "- Erst dies.\n\n- Dann das.\n\na\n  b"
    )


def test_a_page_that_is_no_xml_is_refused() -> None:
    with pytest.raises(ValueError, match="mismatched tag"):
        mallard_to_text("<page><p>one</page>")


MAN_PAGE = r""".\" a comment
'\" t
.TH FROB 1 "May 2020" "frob 1.0" "User Commands"
.ie \n(.g .ds Aq \(aq
.el       .ds Aq '
.de Hidden
not text
..
.SH NAME
frob \- turn \fIknobs\fR, na\[u00EF]vely
.SH "SEE WHAT"
.PP
Use
.BR frob (1) ,
with \*(lqcare\*(rq,
since 50\ \(mu 2 is 100.
.B "two words"
.TP
.BR \-v ", " \-\-verbose =\fILEVEL\fP
Says more.
.IP \(bu 2
A point.
.EX
if (a) {
    b\\n;
}
.EE
.ie n .IP "for terminals" 4
.el .IP "for paper" 4
That was it.
.TS
tab(;);
l l
l l.
Name;Value
_
T{
a long
cell
T};7
.TE
.if t \{\
on paper
only
.\}
.UR https://example.org/
.UE .
"""


def test_a_manual_page_gives_what_a_terminal_shows() -> None:
    assert roff_to_text(MAN_PAGE) == (
        "NAME\n\nfrob - turn knobs, naïvely\n\nSEE WHAT\n\n"
        "Use frob(1), with “care”, since 50 × 2 is 100. two words\n\n"
        "-v, --verbose=LEVEL\nSays more.\n\n- A point.\nif (a) {\n    b\\n;\n}\n\n"
        "for terminals\nThat was it.\n\nName | Value\na long cell | 7\n\nhttps://example.org/ ."
    )


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_a_manual_page_has_the_words_that_groff_prints() -> None:
    done = subprocess.run(
        ["groff", "-t", "-man", "-K", "utf8", "-Tutf8", "-P-cbou", "-rLL=500n", "-rHY=0"],
        input=MAN_PAGE.encode(),
        capture_output=True,
        check=True,
    )
    # Without the page's header and footer.
    lines = [line for line in done.stdout.decode().splitlines() if "FROB(1)" not in line]
    printed = Counter(re.findall(r"\w+", "\n".join(lines)))
    assert Counter(re.findall(r"\w+", roff_to_text(MAN_PAGE))) == printed


def test_a_page_that_only_includes_another_is_empty_and_mdoc_is_refused() -> None:
    assert roff_to_text(".so man3/printf.3\n") == ""
    with pytest.raises(ValueError, match="mdoc"):
        roff_to_text(".Dd May 1, 2020\n.Dt FROB 1\n.Os\n.Sh NAME\n.Nm frob\n")


@pytest.mark.parametrize(
    "broken", ["\\", ".TS\nl", ".de X", '.SH "open', ".if n \\{\n", "\\f", ".IP"]
)
def test_broken_manual_pages_end(broken: str) -> None:
    assert isinstance(roff_to_text(broken), str)
