"""Runs that go on with other rows or other sources, against a count of every token."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reconstruction import SPECIAL, numbered_documents

from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.data.resume import continued, describe_cursors
from t5g2.data.ul2 import Denoiser
from t5g2.errors import UserError

SHORT = Denoiser(name="short", corruption_rate=0.3, mean_span=2.0)


def stream_of(rows: int, seed: int = 0, **documents) -> RowStream:
    sources = tuple(
        Source(name=name, documents=tokens, denoisers=(SHORT,))
        for name, tokens in documents.items()
    )
    return RowStream(Mixture(sources=sources, special=SPECIAL), rows, 64, 48, seed)


def run(stream: RowStream, cursors: np.ndarray, steps: int, seen: Counter) -> np.ndarray:
    """Goes on for some steps; counts in `seen` the tokens of the sources' first epochs."""
    cursors = cursors.copy()
    for _ in range(steps):
        for row in range(stream.rows):
            draws = cursors[row, 1::2].tolist()
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            for piece in pieces:
                source = stream.tasks[piece.task].source
                documents = stream.mixture.sources[source].documents
                while stream.document_number(source, row, draws[source]) != piece.document:
                    draws[source] += 1
                if draws[source] * stream.rows + row < len(documents):
                    first = int(documents[piece.document][piece.start])
                    seen.update(range(first, first + piece.length))
                draws[source] += piece.start + piece.length == len(documents[piece.document])
    return cursors


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 6),
    st.lists(st.integers(1, 150), min_size=8, max_size=40),
)
def test_only_unfinished_documents_come_again_with_another_number_of_rows(old, new, steps, lengths):
    text = numbered_documents(lengths)
    seen = Counter()
    one, other = stream_of(old, text=text), stream_of(new, text=text)
    cursors = run(one, one.start(), steps, seen)
    moved = continued(cursors, describe_cursors(one), other)
    while (moved[:, 1] * new < len(text)).any():
        moved = run(other, moved, 10, seen)
    unfinished = {
        token
        for row, (_, draw, offset) in enumerate(cursors.tolist())
        if offset
        for token in text[one.document_number(0, row, draw)].tolist()
    }
    again = {token for token, times in seen.items() if times > 1}
    assert again <= unfinished
    if new % old == 0:
        assert not again
        assert len(seen) == sum(lengths), "nothing is left out"


def test_the_same_stream_goes_on_where_it_was():
    stream = stream_of(3, a=numbered_documents([90] * 9), b=numbered_documents([500] * 4))
    cursors = run(stream, stream.start(), 5, Counter())
    assert cursors[:, 2::2].any(), "some document is begun"
    np.testing.assert_array_equal(continued(cursors, describe_cursors(stream), stream), cursors)


def test_sources_are_known_by_name_and_new_ones_begin():
    a, b = numbered_documents([90] * 9), numbered_documents([500] * 4)
    stream = stream_of(2, a=a, b=b)
    cursors = run(stream, stream.start(), 5, Counter())
    other = stream_of(2, new=a, b=b)
    moved = continued(cursors, describe_cursors(stream), other)
    np.testing.assert_array_equal(moved[:, 0], cursors[:, 0])
    np.testing.assert_array_equal(moved[:, 3:], cursors[:, 3:])
    assert not moved[:, 1:3].any()


def test_no_noise_comes_again_with_another_number_of_rows():
    stream, other = (stream_of(rows, text=numbered_documents([70] * 30)) for rows in (4, 6))
    cursors = run(stream, stream.start(), 5, Counter())
    assert (continued(cursors, describe_cursors(stream), other)[:, 0] >= cursors[:, 0].max()).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"text": numbered_documents([10] * 7)}])
def test_other_documents_are_begun_at_their_beginning(change):
    stream = stream_of(2, text=numbered_documents([300] * 20))
    cursors = run(stream, stream.start(), 4, Counter())
    arguments = {"text": numbered_documents([300] * 20), **change}
    other = stream_of(2, **arguments)
    moved = continued(cursors, describe_cursors(stream), other)
    np.testing.assert_array_equal(moved[:, 1], cursors[:, 1])
    assert not moved[:, 2].any()
    run(other, moved, 3, Counter())


def test_a_document_that_has_become_shorter_than_its_offset_is_passed_over():
    stream = stream_of(1, text=numbered_documents([3000] * 5))
    cursors = run(stream, stream.start(), 4, Counter())
    assert cursors[0, 2] > 100
    shorter = stream_of(1, text=numbered_documents([100] * 5))
    run(shorter, continued(cursors, describe_cursors(stream), shorter), 3, Counter())


def test_cursors_of_unknown_origin_go_on_only_if_they_fit():
    stream = stream_of(2, text=numbered_documents([300] * 20))
    cursors = run(stream, stream.start(), 4, Counter())
    np.testing.assert_array_equal(continued(cursors, None, stream), cursors)
    with pytest.raises(UserError, match="does not say which sources"):
        continued(cursors, None, stream_of(4, text=numbered_documents([300] * 20)))
