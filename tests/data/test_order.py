"""The order of examples: against an oracle that shuffles and cuts everything for real."""

import itertools
import time
import zlib

import numpy as np
import pytest
from reconstruction import SPECIAL, numbered_documents

from t5g2.data.loader import RowBatches
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import Piece, RowStream
from t5g2.data.ul2 import Denoiser

LENGTHS = [37, 900, 0, 250, 1, 410, 77, 1300, 5, 640, 33]
ROWS = 8
DENOISERS = (
    Denoiser(name="short", corruption_rate=0.3, mean_span=2.0, weight=3.0),
    Denoiser(name="prefix", corruption_rate=0.6, mean_span=None),
)
LAST_INT32 = 2**31 - 1


class Forward(list):
    """Documents that come in their own order."""

    sequential = True


def stream_of(documents, rows: int = ROWS) -> RowStream:
    other = numbered_documents([60] * 13)
    sources = (
        Source(name="text", documents=documents, denoisers=DENOISERS, weight=2.0),
        Source(name="other", documents=other, denoisers=DENOISERS[1:]),
    )
    return RowStream(Mixture(sources=sources, special=SPECIAL), rows, 128, 96, 3)


def sequences(stream: RowStream, epochs: int) -> list[list[list[int]]]:
    """For each source and row its documents, from whole shuffled epochs laid end to end."""
    dealt = []
    for number, source in enumerate(stream.mixture.sources):
        size = len(source.documents)
        draws = range(-(-epochs * size // stream.rows))
        everything = [
            [stream.document_number(number, row, d) for row in range(stream.rows)] for d in draws
        ]
        flat = list(itertools.chain(*everything))
        for epoch in range(epochs):
            assert sorted(flat[epoch * size : (epoch + 1) * size]) == list(range(size))
        dealt.append([[drawn[row] for drawn in everything] for row in range(stream.rows)])
    return dealt


def test_every_row_reads_its_documents_one_after_the_other_whatever_the_denoisers_take():
    documents = numbered_documents(LENGTHS)
    stream = stream_of(documents)
    dealt = sequences(stream, 12)
    for row in range(ROWS):
        cursor = stream.start()[row]
        read: list[list[Piece]] = [[], []]
        for _ in range(15):
            pieces, cursor = stream.next_row(row, cursor)
            for piece in pieces:
                read[stream.tasks[piece.task].source].append(piece)
        for source, pieces in enumerate(read):
            own = stream.mixture.sources[source].documents
            expected = np.concatenate([own[number] for number in dealt[source][row]])
            found = [own[p.document][p.start : p.start + p.length] for p in pieces]
            np.testing.assert_array_equal(np.concatenate(found), expected[: sum(map(len, found))])


@pytest.mark.parametrize(
    "documents", [numbered_documents, lambda n: Forward(numbered_documents(n))]
)
def test_batches_are_the_same_on_1_2_4_and_8_hosts_also_after_going_on_on_others(documents):
    stream = stream_of(documents(LENGTHS))
    whole = iter(RowBatches(stream, stream.start(), 0, ROWS))
    steps = [next(whole) for _ in range(9)]
    cursors = stream.start()
    for at, hosts in enumerate([1, 2, 4, 8, 2, 8, 1, 4, 8]):
        share = ROWS // hosts
        parts = [
            next(iter(RowBatches(stream_of(documents(LENGTHS)), cursors, h * share, share)))
            for h in range(hosts)
        ]
        cursors = np.concatenate([part.cursors for part in parts])
        for name, array in steps[at].batch.items():
            joined = np.concatenate([part.batch[name] for part in parts])
            assert joined.tobytes() == array.tobytes(), (at, hosts, name)
        np.testing.assert_array_equal(cursors, steps[at].cursors)


def test_a_sequential_source_is_read_forward_in_its_own_order():
    documents = Forward(numbered_documents([40] * 50))
    stream = stream_of(documents)
    cursors = stream.start()
    for row in range(ROWS):
        drawn = []
        while len(drawn) < 10:
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            own = [p for p in pieces if stream.tasks[p.task].source == 0]
            drawn += [p.document for p in own if p.start == 0]
        assert drawn[:10] == [(row + d * ROWS) % 50 for d in range(10)]


def test_a_run_goes_on_at_once_and_exactly_however_far_it_is():
    documents = numbered_documents(LENGTHS)
    far = stream_of(documents).start()
    far[:, 0] = 23_000_000  # a million steps of rows of 23 examples
    far[:, 1::2] = [1_999_999_999, LAST_INT32 - 40]  # far beyond: draws * rows exceeds an int32
    began = time.perf_counter()
    stream = stream_of(documents)
    step = next(iter(RowBatches(stream, far, 0, ROWS)))
    assert time.perf_counter() - began < 1
    assert (step.cursors[:, 0] > far[:, 0]).all()
    assert (step.cursors >= 0).all()
    entry = 1_999_999_999 * ROWS + 5
    order = [
        stream.document_number(0, e % ROWS, e // ROWS)
        for e in range(entry - entry % 11, entry - entry % 11 + 11)
    ]
    assert sorted(order) == list(range(11)), "also the epochs of then hold each document once"
    np.testing.assert_equal(next(iter(RowBatches(stream_of(documents), far, 0, ROWS))), step)


def test_each_source_and_denoiser_has_its_share_of_many_examples():
    stream = stream_of(numbered_documents(LENGTHS))
    cursors, counts = stream.start(), np.zeros(len(stream.tasks))
    for _ in range(1400):
        for row in range(ROWS):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            counts += np.bincount([piece.task for piece in pieces], minlength=len(counts))
    assert counts.sum() > 20_000
    np.testing.assert_allclose(stream.mixture.rates, [0.5, 1 / 6, 1 / 3])
    np.testing.assert_allclose(counts / counts.sum(), stream.mixture.rates, atol=0.001)


def test_the_digest_is_of_the_examples_and_of_their_tokens():
    stream = stream_of(numbered_documents(LENGTHS))
    step = next(iter(RowBatches(stream, stream.start(), 0, ROWS)))
    for row in range(ROWS):
        pieces, _ = stream.next_row(row, stream.start()[row])
        ids = [[p.task, p.document, p.start, p.length] for p in pieces]
        digest = zlib.crc32(np.array(ids, "<i8").tobytes())
        for name in ("encoder_input_tokens", "decoder_target_tokens"):
            digest = zlib.crc32(step.batch[name][row].astype("<i4").tobytes(), digest)
        assert step.batch["row_digest"][row] == digest


def test_two_documents_of_the_same_text_have_different_digests():
    text = numbered_documents([400])[0]
    one, other = (
        next(iter(RowBatches(s, s.start(), 0, 1))).batch
        for s in (
            stream_of([text, np.zeros(0, np.int32)], 1),
            stream_of([np.zeros(0, np.int32), text], 1),
        )
    )
    np.testing.assert_array_equal(one["encoder_input_tokens"], other["encoder_input_tokens"])
    assert one["row_digest"] != other["row_digest"]
