"""Prompts with answers: what the encoder reads, what the decoder learns, and what is refused."""

import json

import numpy as np
import pytest

from t5g2.data.corpus import open_corpus, row_stream
from t5g2.data.mixture import DataConfig
from t5g2.data.sources import CorpusConfig
from t5g2.errors import UserError

RECORDS = [(f"What is {i} and {i}? It is", f" {2 * i}.") for i in range(200)]


def corpus_of(tmp_path, tokenizer, lines, more="", text=None, **settings):
    """A corpus of prompts, and of text beside them where `text` is given."""
    (tmp_path / "sums.jsonl").write_text("".join(f"{line}\n" for line in lines))
    mixture = tmp_path / "mixture.toml"
    tables = f'[[source]]\nname = "sums"\npath = "sums.jsonl"\nformat = "prompted"\n{more}\n'
    if text is not None:
        (tmp_path / "text").mkdir()
        for number, document in enumerate(text):
            (tmp_path / "text" / f"{number}.txt").write_text(document)
        tables += 'weight = 1\n[[source]]\nname = "text"\npath = "text"\nweight = 1\n'
    mixture.write_text(tables)
    config = CorpusConfig(mixture=str(mixture), heldout_share=0.1, **settings)
    return open_corpus(config, tokenizer)


def lines_of(records):
    return [json.dumps({"inputs": inputs, "targets": targets}) for inputs, targets in records]


def test_the_encoder_reads_the_prompt_and_the_decoder_learns_the_answer(tmp_path, tiny_tokenizer):
    corpus = corpus_of(tmp_path, tiny_tokenizer, lines_of(RECORDS))
    stream = row_stream(corpus, "train", DataConfig(inputs_length=128, targets_length=32), 2)
    assert [task.name for task in stream.tasks] == ["prefix"]
    seen, cursors = set(), stream.start()
    sentinel, whole = tiny_tokenizer.sentinel_ids[0], dict(RECORDS)
    for row in range(2):
        for _ in range(10):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            assert len(pieces) > 1
            for piece in pieces:
                inputs, targets = piece.example
                assert (inputs[0], inputs[-1]) == (tiny_tokenizer.bos_id, sentinel)
                assert (targets[0], targets[-1]) == (sentinel, tiny_tokenizer.eos_id)
                prompt = tiny_tokenizer.decode(inputs[1:-1])
                assert tiny_tokenizer.decode(targets[1:-1]) == whole[prompt]
                seen.add(prompt)
    assert len(seen) > 40


def test_prompts_share_rows_with_text(tmp_path, tiny_tokenizer, standard_library):
    text = standard_library(200_000)
    corpus = corpus_of(tmp_path, tiny_tokenizer, lines_of(RECORDS), text=text)
    stream = row_stream(corpus, "train", DataConfig(inputs_length=256, targets_length=256), 1)
    names = [task.name for task in stream.tasks]
    assert names[0] == "sums/prefix"
    assert len(names) == 6
    cursor, found = stream.start()[0], []
    for _ in range(60):
        pieces, cursor = stream.next_row(0, cursor)
        found += [piece.task for piece in pieces]
    share = np.mean(np.array(found) == 0)
    assert 0.4 < share < 0.6


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"inputs": "a"}', "no field 'targets'"),
        ('{"inputs": "a", "targets": ""}', "field 'targets' is empty"),
        ('{"inputs": 1, "targets": "b"}', "field 'inputs' is not a string"),
        (lines_of([("long " * 300, "b")])[0], "needs .* inputs, .* targets, more than a row"),
    ],
)
def test_a_bad_line_is_named_or_passed_over(line, problem, tmp_path, tiny_tokenizer):
    lines = [*lines_of(RECORDS[:30]), *[line] * 30]
    config = DataConfig(inputs_length=64, targets_length=32)
    for allowed in (0, 100):
        corpus = corpus_of(tmp_path, tiny_tokenizer, lines, max_bad_records=allowed)
        stream = row_stream(corpus, "train", config, 1)
        cursor = stream.start()[0]

        def read(stream=stream, cursor=cursor):
            for _ in range(30):
                _, cursor = stream.next_row(0, cursor)

        if allowed:
            read()
        else:
            with pytest.raises(UserError, match=rf"sums.jsonl, line \d+: .*{problem}"):
                read()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ('denoisers = "ul2"', "denoisers: prompts with answers have one task"),
        ('field = "text"', "field: prompted lines have inputs and targets"),
    ],
)
def test_settings_that_do_not_apply_are_refused(more, problem, tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match=problem):
        corpus_of(tmp_path, tiny_tokenizer, lines_of(RECORDS), more)
