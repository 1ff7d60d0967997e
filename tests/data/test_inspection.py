import itertools
import re
from collections import defaultdict

import numpy as np
import pytest

from t5g2.data.inspection import describe, visible
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.data.sources import TokenizedTexts
from t5g2.data.ul2 import T5GEMMA2_UL2, Denoiser, SpecialTokens
from t5g2.errors import UserError

TEXTS = [
    f"def function_{i}(argument):\n\treturn argument * {i}\n" + "# filler\n" * (i % 40)
    for i in range(200)
]
SETTINGS = {"rows": 4, "inputs_length": 256, "targets_length": 256, "seed": 1, "batches": 10}


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
    def decode(self, ids) -> str:
        return "x" * len(ids)


def test_a_task_without_examples_says_so(tiny_tokenizer, mixture):
    never = (*T5GEMMA2_UL2[:1], Denoiser(name="never", corruption_rate=0.5, mean_span=4, weight=0))
    (source,) = mixture.sources
    source = Source(name="text", documents=source.documents, denoisers=never)
    report = describe(
        Mixture(sources=(source,), special=mixture.special), tiny_tokenizer, **SETTINGS, examples=1
    )
    assert "(none in these batches)" in report
    assert table(report, r"[\d,]+ examples")["never"] == ["0", "0.0%", "0.0%", "-", "-", "-"]


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
