"""The page on a run's data: the same figures as the text, nothing from outside, no markup in."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image
from small_run import write_corpus, write_recipe
from test_report import EVIL, Page

from t5g2 import cli
from t5g2.data.inspection import Lengths, Part, Shown, SourceFacts, summarise
from t5g2.data.mixture import Mixture, Source
from t5g2.data.sources import TokenizedTexts
from t5g2.data.ul2 import SpecialTokens
from t5g2.reporting.data_page import as_page
from t5g2.reporting.data_text import as_text

TEXTS = [f"def function_{i}(argument):\n\treturn [argument,\n\n    {i}]\n" * 3 for i in range(60)]


def summary_of(tokenizer, texts=TEXTS, names=("code",), **changes):
    special = SpecialTokens(tokenizer.bos_id, tokenizer.eos_id, tokenizer.sentinel_ids)
    documents = TokenizedTexts(texts, tokenizer)
    mixture = Mixture(
        sources=tuple(Source(name=name, documents=documents) for name in names), special=special
    )
    settings = {"rows": 4, "inputs_length": 256, "targets_length": 256, "seed": 0, "batches": 8}
    return summarise(mixture, tokenizer, **settings, examples=2, **changes)


@pytest.fixture(scope="module")
def summary(tiny_tokenizer):
    facts = {"code": SourceFacts("python", 5000), "more": SourceFacts("python", 5000, 3)}
    return summary_of(
        tiny_tokenizer, names=("code", "more"), total_steps=80, about=facts.__getitem__
    )


def test_the_page_holds_the_figures_of_the_text(summary):
    page, text = Page(as_page(summary, "a run")).text, as_text(summary)
    for kind in ("source  ", "language  ", "  +packed", r"\d+ examples"):
        (block,) = (b for b in text.split("\n\n") if re.search(rf"^{kind}", b, re.MULTILINE))
        for cell in re.findall(r"\d[\d.,]*%|[\d.]+ / [\d.]+ / [\d.]+", block):
            assert cell in page
    for oddity in summary.oddities:
        assert oddity.what in page
        assert oddity.found in page


def test_the_page_needs_nothing_from_outside(summary):
    text = as_page(summary, "a run")
    assert not re.search(r"https?://|url\(|@import|<link", text)
    assert not re.search(r'\bsrc="(?!data:)', text)


def test_sentinels_hidden_spans_and_white_space_can_be_seen(summary):
    text = as_page(summary, "a run")
    page = Page(text)
    shown = [part for example in summary.shown for part in (*example.inputs, *example.targets)]
    assert page.tags.count("mark") == sum(part.kind == "sentinel" for part in shown)
    hidden = [part for example in summary.shown for part in example.targets if part.kind == "text"]
    assert text.count('class="gap"') == len(hidden) > 0
    assert '<span class="blank">⏎</span>\n' in text
    assert '<span class="blank">⇥</span>' in text


def test_nothing_from_the_documents_becomes_markup(tiny_tokenizer):
    summary = summary_of(tiny_tokenizer, [EVIL * 5] * 40)
    page = Page(as_page(summary, "<b>run</b>"))
    assert "img" not in page.tags
    assert "b" not in page.open
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert" in page.text


def test_a_long_example_says_how_much_was_cut(tiny_tokenizer, summary):
    example = Shown(
        source="code",
        denoiser=summary.denoisers[0].name,
        document=0,
        start=0,
        length=9,
        tokens=Lengths(5, 5),
        inputs=(Part("text", "x" * 5000), Part("text", "y" * 70)),
        targets=(Part("text", "z"),),
        images=None,
    )
    page = Page(as_page(dataclasses.replace(summary, shown=(example,)), "run")).text
    assert page.count("x" * 4000) == 1
    assert "x" * 4001 not in page
    assert "1,000 more characters" in page
    assert "70 more characters" in page


def test_images_are_pictures_in_the_page_and_features_are_said(summary):
    pixels = np.zeros((2, 896, 896, 3), np.uint8)
    pixels[1] = 200
    first = dataclasses.replace(summary.shown[0], images=pixels)
    features = dataclasses.replace(summary.shown[0], images=np.zeros((1, 256, 4), np.float32))
    text = as_page(dataclasses.replace(summary, shown=(first, features)), "run")
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    assert [image.size for image in images] == [(160, 160)] * 2
    assert [image.getpixel((80, 80))[0] // 100 for image in images] == [0, 2]
    assert "1 images, stored as features" in text


def test_the_job_writes_the_page_and_says_where(tiny_tokenizer, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", [text * 20 for text in TEXTS])
    recipe = write_recipe(tmp_path / "recipe.gin", corpus)
    out = tmp_path / "pages" / "data.html"
    arguments = ["inspect", "data", "--gin_file", str(recipe), "--html", str(out)]
    given = f"--gin.tokenizer.path={tiny_tokenizer.path}"
    assert cli.main([*arguments, given, "--gin.data.inputs_length=256"]) == 0
    assert capsys.readouterr().out == f"{out}: open it in a browser\n"
    page = Page(out.read_text(encoding="utf-8"))
    assert "The first 16 batches: 64 rows of 256 inputs and 96 targets" in page.text
    below_a_file = f"{recipe}/data.html"
    arguments[-1] = below_a_file
    assert cli.main([*arguments, given, "--gin.data.inputs_length=256"]) == 2
    assert f"--html {below_a_file} cannot be written" in capsys.readouterr().err
