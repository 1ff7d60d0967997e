import itertools
import re
from collections import defaultdict

import numpy as np
import pytest

from t5g2.data.image_examples import ImageExample, ImagePrefix, ImageSlot
from t5g2.data.inspection import SourceFacts, histogram, summarise
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.data.sources import TokenizedTexts
from t5g2.data.ul2 import T5GEMMA2_UL2, Denoiser, SpecialTokens
from t5g2.errors import UserError
from t5g2.reporting.data_text import as_text, visible

TEXTS = [
    f"def function_{i}(argument):\n\treturn argument * {i}\n" + "# filler\n" * (i % 40)
    for i in range(200)
]
SETTINGS = {"rows": 4, "inputs_length": 256, "targets_length": 256, "seed": 1, "batches": 10}


def describe(mixture, tokenizer, **settings) -> str:
    return as_text(summarise(mixture, tokenizer, **settings))


@pytest.fixture(scope="module")
def mixture(tiny_tokenizer) -> Mixture:
    special = SpecialTokens(
        tiny_tokenizer.bos_id, tiny_tokenizer.eos_id, tiny_tokenizer.sentinel_ids
    )
    source = Source(name="text", documents=TokenizedTexts(TEXTS, tiny_tokenizer))
    return Mixture(sources=(source,), special=special)


@pytest.fixture(scope="module")
def rows(mixture) -> list[list]:
    """The rows that the report speaks of, read again."""
    stream = RowStream(mixture, 4, 256, 256, 1)
    cursors, found = stream.start(), []
    for _ in range(SETTINGS["batches"]):
        for row in range(4):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            found.append(pieces)
    return found


@pytest.fixture(scope="module")
def report(mixture, tiny_tokenizer) -> str:
    return describe(mixture, tiny_tokenizer, **SETTINGS, examples=2)


def table(report: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose title starts so, by their first column."""
    (block,) = (block for block in report.split("\n\n") if re.match(first, block))
    split = (re.split(r"\s{2,}", line.strip()) for line in block.splitlines()[1:])
    return {cells[0]: cells[1:] for cells in split}


def test_every_task_shows_its_examples_as_text(report, mixture):
    for task in mixture.tasks:
        (block,) = (b for b in report.split("\n\n") if b.startswith(f"{task.name}: "))
        shown = re.findall(r"    (inputs|targets) +([\d,]+)  (.*)", block)
        assert [side for side, _, _ in shown] == ["inputs", "targets"] * 2
        for side, _, text in shown:
            assert text.startswith("<bos>" if side == "inputs" else "<sentinel_0>")


def test_examples_are_those_of_the_rows_with_their_true_lengths(report, rows, tiny_tokenizer):
    pieces = list(itertools.chain(*rows))
    for task in range(5):
        piece = next(piece for piece in pieces if piece.task == task)
        for side, ids in piece.example._asdict().items():
            text = tiny_tokenizer.decode(ids).replace("\n", "⏎").replace("\t", "⇥")
            assert f"    {side:7} {len(ids):6,}  {text[:100]}" in report


def test_the_table_of_tasks_holds_shares_and_lengths(report, rows, mixture):
    pieces = list(itertools.chain(*rows))
    own = defaultdict(list)
    for piece in pieces:
        own[mixture.tasks[piece.task].name].append(piece)
    found = table(report, rf"{len(pieces):,} examples")
    for task, rate in zip(mixture.tasks, mixture.rates, strict=True):
        count, share, shown_rate, inputs, targets, sentinels = found[task.name]
        assert count == str(len(own[task.name]))
        assert share == f"{len(own[task.name]) / len(pieces):.1%}"
        assert shown_rate == f"{rate:.1%}"
        for shown, side in ((inputs, "inputs"), (targets, "targets")):
            lengths = [len(getattr(piece.example, side)) for piece in own[task.name]]
            expected = f"{np.mean(lengths):.1f} / {np.median(lengths):g} / {max(lengths)}"
            assert shown == expected
        spans = [
            sum(token in mixture.special.sentinel_ids for token in piece.example.targets.tolist())
            for piece in own[task.name]
        ]
        assert sentinels == f"{np.mean(spans):.1f}"


def test_the_table_of_rows_says_how_full_they_are(report, rows):
    used = np.array([[sum(len(p.example[side]) for p in row) for side in (0, 1)] for row in rows])
    shares = used / 256
    found = table(report, "40 rows of 256 inputs and 256 targets")
    packed = {name: cells[0] for name, cells in found.items()}
    assert packed["inputs filled"] == f"{shares[:, 0].mean():.1%}"
    assert packed["targets filled"] == f"{shares[:, 1].mean():.1%}"
    assert packed["both sides filled"] == f"{shares.mean():.1%}"
    assert packed["fuller side filled"] == f"{shares.max(1).mean():.1%}"
    assert packed["padding in both"] == f"{1 - shares.mean():.1%}"
    assert packed["examples in a row"] == f"{np.mean([len(row) for row in rows]):.2f}"


def test_one_example_a_row_is_what_rows_are_compared_with():
    # Documents of 40 tokens, every example one document: 20 hidden, so 22 and 22 of 64 tokens.
    documents = [np.full(40, 500, np.int32)] * 9
    half = Denoiser(name="half", corruption_rate=0.5, mean_span=20.0)
    source = Source(name="text", documents=documents, denoisers=(half,))
    mixture = Mixture(sources=(source,), special=SpecialTokens(2, 1, range(4, 68)))
    settings = SETTINGS | {"inputs_length": 64, "targets_length": 64}
    report = describe(mixture, FakeTokenizer(), **settings, examples=0)
    found = table(report, "40 rows of 64 inputs and 64 targets")
    assert found["inputs filled"][1] == f"{22 / 64:.1%}"
    assert found["targets filled"][1] == f"{22 / 64:.1%}"
    assert found["padding in both"][1] == f"{1 - 22 / 64:.1%}"
    assert found["examples in a row"][1] == "1.00"


class FakeTokenizer:
    """A letter of each id: 80 to 89 stand for bytes, 90 for an image, 99 for U+FFFD."""

    vocab_size = 600

    def decode(self, ids) -> str:
        return "".join({90: "i", 99: "\ufffd"}.get(id, "x") for id in np.asarray(ids).tolist())

    def id_to_piece(self, token_id) -> str:
        return f"<0x{token_id:02X}>" if 80 <= token_id < 90 else f"piece{token_id}"


def test_a_task_without_examples_says_so(tiny_tokenizer, mixture):
    never = (*T5GEMMA2_UL2[:1], Denoiser(name="never", corruption_rate=0.5, mean_span=4, weight=0))
    (source,) = mixture.sources
    source = Source(name="text", documents=source.documents, denoisers=never)
    report = describe(
        Mixture(sources=(source,), special=mixture.special), tiny_tokenizer, **SETTINGS, examples=1
    )
    assert "(none in these batches)" in report
    assert table(report, r"[\d,]+ examples")["never"] == ["0", "0.0%", "0.0%", "-", "-", "-"]
    assert "tasks that did not occur: 0 of 1 tasks" in report  # it was not to occur


def test_reports_are_the_same_every_time(report, mixture, tiny_tokenizer):
    assert describe(mixture, tiny_tokenizer, **SETTINGS, examples=2) == report


def test_a_long_line_says_how_much_was_cut():
    assert visible("a\tb\r\nc\n", 80) == "a⇥b␍⏎c⏎"
    assert visible("x" * 100, 100) == "x" * 100
    assert visible("x" * 1234, 100) == "x" * 100 + " … (+1,134 characters)"


@pytest.mark.parametrize("setting", ["rows", "batches"])
def test_nothing_to_look_at_is_refused(mixture, tiny_tokenizer, setting):
    with pytest.raises(UserError, match=f"{setting} must be at least 1, not 0"):
        describe(mixture, tiny_tokenizer, **(SETTINGS | {setting: 0}), examples=1)


SPECIAL = SpecialTokens(2, 1, range(4, 68))


def numbers(*lengths, token=500):
    """Documents of one token each, of these lengths."""
    return [np.full(n, token, np.int32) for n in lengths]


def mixture_of(**sources):
    half = Denoiser(name="half", corruption_rate=0.5, mean_span=3.0)
    prefix = Denoiser(name="prefix", corruption_rate=0.5, mean_span=None, weight=3.0)
    made = tuple(
        Source(name=name, documents=documents, denoisers=(half, prefix))
        for name, documents in sources.items()
    )
    return Mixture(sources=made, special=SPECIAL)


def summary_of(mixture, **changes):
    settings = {"inputs_length": 64, "targets_length": 64, "examples": 1}
    return summarise(mixture, FakeTokenizer(), **(SETTINGS | settings | changes))


def odd(summary, start):
    (found,) = (oddity for oddity in summary.oddities if oddity.what.startswith(start))
    return found


def test_sources_and_languages_have_the_shares_sizes_and_epochs_of_their_examples():
    mixture = mixture_of(a=numbers(*[40] * 30), b=numbers(*[40] * 90), c=numbers(40))
    facts = {"a": SourceFacts("de", 1200), "b": SourceFacts("de", 3600), "c": SourceFacts()}
    summary = summary_of(mixture, batches=30, total_steps=300, about=facts.__getitem__)
    for source in summary.sources:
        group = source.group
        assert group.rate == pytest.approx(1 / 3)
        assert group.share == pytest.approx(1 / 3, abs=0.05)
        # All but bos, eos and sentinels, which stand on both sides, is from documents.
        added = 2 * group.examples + 2 * group.sentinels.sum()
        assert group.tokens == group.lengths.sum() - added
        if source.facts.tokens:
            # 30 of 300 steps have shown so much of it.
            assert source.epochs == pytest.approx(10 * group.tokens / source.facts.tokens)
    assert summary.sources[2].epochs is None
    assert [s.documents for s in summary.sources] == [30, 90, 1]
    (german,) = summary.languages
    assert (german.name, german.rate) == ("de", pytest.approx(2 / 3))
    assert german.examples == sum(s.group.examples for s in summary.sources[:2])
    text = as_text(summary)
    assert table(text, "source ")["a"][0] == "de"
    assert summary.examples == sum(group.examples for group in summary.denoisers)


def test_every_source_and_every_denoiser_shows_as_many_examples_as_asked_for():
    summary = summary_of(mixture_of(**{f"s{i}": numbers(*[40] * 9) for i in range(5)}), examples=2)
    for kind, names in (("source", [f"s{i}" for i in range(5)]), ("denoiser", ["half", "prefix"])):
        counts = [sum(getattr(shown, kind) == name for shown in summary.shown) for name in names]
        assert min(counts) >= 2
    assert len(summary.shown) <= 2 * (5 + 2)


def test_the_parts_of_an_example_are_its_ids_whatever_the_text_spells(tiny_tokenizer):
    text = "<sentinel_0> is how a document may spell it <eos> and go on " * 4
    special = SpecialTokens(
        tiny_tokenizer.bos_id, tiny_tokenizer.eos_id, tiny_tokenizer.sentinel_ids
    )
    source = Source(name="text", documents=TokenizedTexts([text], tiny_tokenizer))
    summary = summarise(
        Mixture(sources=(source,), special=special), tiny_tokenizer, **SETTINGS, examples=1
    )
    for shown in summary.shown:
        sentinels = [part.number for part in shown.inputs if part.kind == "sentinel"]
        assert sentinels == list(range(len(sentinels)))
        assert [p.number for p in shown.targets if p.kind == "sentinel"] == sentinels
        assert [p.text for p in shown.inputs if p.kind == "special"] == ["<bos>"]
        assert [p.text for p in shown.targets if p.kind == "special"] == ["<eos>"]
        # Each gap filled with what the targets hold for it, the document is whole again.
        gaps = dict.fromkeys(sentinels, "")
        for mark, part in itertools.pairwise(shown.targets):
            if mark.kind == "sentinel" and part.kind == "text":
                gaps[mark.number] = part.text
        parts = (gaps[p.number] if p.kind == "sentinel" else p.text for p in shown.inputs[1:])
        whole = "".join(parts)
        assert whole in text


def test_what_is_odd_is_found_and_its_documents_are_named():
    documents = numbers(30, 0, 30, 30, 900) + numbers(5, 1500, token=81)
    documents[2][3] = 99
    summary = summary_of(
        mixture_of(text=documents),
        batches=60,
        about=lambda name: SourceFacts(bad_records=2),
    )
    read = "of 7 documents read"
    assert odd(summary, "empty")[1:] == (f"1 {read}", "text: 1", True)
    assert odd(summary, "bad records")[1:] == ("2", "text: 2", True)
    assert odd(summary, "documents with replacement")[1:] == (f"1 {read}", "text: 2", True)
    assert odd(summary, "very repetitive").where == "text: 6"  # 1500 times the same
    longer = odd(summary, "documents longer")
    # Of half the tokens on either side a row of 64 and 64 holds 105 or so.
    assert longer.found.startswith(f"2 {read}; the longest, 1,500 tokens, is split into at least 1")
    assert longer.where == "text: 4, 6"
    assert not longer.odd
    total = sum(map(len, documents))
    assert odd(summary, "tokens that stand for single bytes").found.startswith(
        f"{1505 / total:.2%} of {total:,} tokens"
    )


def test_nothing_odd_is_said_of_ordinary_documents():
    summary = summary_of(mixture_of(text=numbers(*[40] * 20)), batches=30)
    assert not [oddity for oddity in summary.oddities if oddity.odd]


def test_how_often_long_documents_were_split_is_counted():
    summary = summary_of(mixture_of(text=numbers(*[400] * 9)), batches=50)
    stream = RowStream(mixture_of(text=numbers(*[400] * 9)), 4, 64, 64, 1)
    cursors, pieces, finished = stream.start(), [0] * 4, []
    for _ in range(50):
        for row in range(4):
            made, cursors[row] = stream.next_row(row, cursors[row])
            for piece in made:
                pieces[row] += 1
                if piece.start + piece.length == 400:
                    finished.append(pieces[row])
                    pieces[row] = 0
    expected = f"{np.mean(finished):.1f} on average of the {len(finished):,} finished"
    assert expected in odd(summary, "documents longer").found


def test_sentinels_used_are_counted_against_those_there_are():
    summary = summary_of(mixture_of(text=numbers(*[60] * 20)))
    most = max(group.sentinels.max() for group in summary.denoisers)
    assert odd(summary, "sentinels").found == f"at most {most} of 64"


def test_a_task_that_should_have_occurred_is_missed():
    half = Denoiser(name="half", corruption_rate=0.5, mean_span=3.0)
    rare = Denoiser(name="rare", corruption_rate=0.5, mean_span=3.0, weight=0.01)
    source = Source(name="text", documents=numbers(*[40] * 9), denoisers=(half, rare))
    mixture = Mixture(sources=(source,), special=SPECIAL)
    missing = odd(summary_of(mixture, batches=1), "tasks that")
    assert missing[1:] == ("1 of 2 tasks", "rare", False)  # of so few examples it may be


def test_histograms_count_every_length_once():
    counts, edges = histogram(np.array([0, 1, 49, 50, 99, 100]), 100, 4)
    assert counts == [2, 1, 1, 2]
    assert edges == [0, 25, 50, 75, 100]


class Pictures:
    """Examples of one image each, as `ImageExamples`: document i is one shade."""

    slot = ImageSlot("images", (8, 8, 3), np.dtype(np.uint8))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.example(index).ids

    def example(self, index):
        ids = np.array([91, *[90] * 16, 92, 500, 501, 502], np.int32)
        return ImageExample(ids, 18, 1)

    def images(self, index):
        return np.full((1, 8, 8, 3), 40 * index, np.uint8)

    def refuse(self, index, problem):
        raise AssertionError(problem)


def test_examples_with_images_show_them_at_their_place():
    source = Source(name="pictures", documents=Pictures(), denoisers=(ImagePrefix(),))
    (text,) = mixture_of(text=numbers(*[40] * 9)).sources
    mixture = Mixture(sources=(source, text), special=SPECIAL)
    summary = summary_of(mixture, images_per_row=2, examples=2)
    shown = [s for s in summary.shown if s.source == "pictures"]
    assert len(shown) >= 2
    for one in shown:
        assert one.images is not None
        assert np.all(one.images == 40 * one.document)
        (place,) = (part for part in one.inputs if part.kind == "image")
        assert place.text == "i × 16"
    assert all(s.images is None for s in summary.shown if s.source == "text")
    assert "images: 1" in as_text(summary)
    assert 0 < summary.unpacked["inputs filled"] < summary.packed["inputs filled"] <= 1
