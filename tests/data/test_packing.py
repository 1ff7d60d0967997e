from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reconstruction import SPECIAL, numbered_documents, reconstruct

from t5g2.data.batch import empty_batch, fill_rows
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import Piece, RowStream
from t5g2.data.ul2 import T5GEMMA2_UL2, Denoiser
from t5g2.errors import UserError

SHORT = Denoiser(name="short", corruption_rate=0.3, mean_span=2.0)
PREFIX = Denoiser(name="prefix", corruption_rate=0.6, mean_span=None)


def one_source(documents, denoisers=T5GEMMA2_UL2) -> Mixture:
    source = Source(name="text", documents=documents, denoisers=denoisers)
    return Mixture(sources=(source,), special=SPECIAL)


def rows_of(stream: RowStream, count: int) -> dict[int, list[list[Piece]]]:
    """The first `count` rows of each of the stream's rows."""
    cursors = stream.start()
    rows = defaultdict(list)
    for _ in range(count):
        for row in range(stream.rows):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            rows[row].append(pieces)
    return rows


def pieces_of(rows: dict[int, list[list[Piece]]]) -> list[Piece]:
    return [piece for stream in rows.values() for pieces in stream for piece in pieces]


@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=30).filter(any),
    rows=st.integers(1, 6),
    room=st.tuples(st.integers(16, 80), st.integers(16, 80)),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_holds_every_token_once_in_the_order_of_its_document(lengths, rows, room, seed):
    documents = numbered_documents(lengths)
    stream = RowStream(one_source(documents, (SHORT, PREFIX)), rows, *room, seed)
    epoch = defaultdict(list)
    for row in range(rows):
        cursor = stream.start()[row]
        # The draws of this row that belong to the first epoch: d * rows + row < documents.
        while cursor[1] * rows + row < len(documents):
            pieces, after = stream.next_row(row, cursor)
            draw = int(cursor[1])
            for piece in pieces:
                while not lengths[stream.document_number(0, row, draw)]:
                    draw += 1
                assert piece.document == stream.document_number(0, row, draw)
                if draw * rows + row < len(documents):
                    epoch[piece.document] += reconstruct(*piece.example, SPECIAL)[0]
                draw += piece.start + piece.length == lengths[piece.document]
            cursor = after
    full = {number: tokens.tolist() for number, tokens in enumerate(documents) if len(tokens)}
    assert epoch == full


@pytest.mark.parametrize("room", [(512, 512), (2048, 2048), (1024, 256), (184, 512), (2048, 40)])
def test_rows_never_exceed_their_room_nor_stay_empty(mixture, room):
    for pieces in (
        row for rows in rows_of(RowStream(mixture, 4, *room, 0), 60).values() for row in rows
    ):
        assert pieces
        assert sum(len(piece.example.inputs) for piece in pieces) <= room[0]
        assert sum(len(piece.example.targets) for piece in pieces) <= room[1]


def test_no_example_holds_tokens_of_two_documents(mixture, documents):
    for piece in pieces_of(rows_of(RowStream(mixture, 4, 512, 512, 0), 60)):
        expected = documents[piece.document][piece.start : piece.start + piece.length]
        assert reconstruct(*piece.example, SPECIAL)[0] == expected.tolist()


def test_a_row_goes_on_identically_from_any_cursor(mixture):
    stream = RowStream(mixture, 3, 256, 256, 7)
    cursors, rows = [stream.start()[1]], []
    for _ in range(40):
        pieces, cursor = stream.next_row(1, cursors[-1])
        cursors.append(cursor)
        rows.append(pieces)
    for start in (39, 0, 17, 31, 5):  # against the cache of the current document, too
        for resumed in (stream, RowStream(mixture, 3, 256, 256, 7)):
            pieces, cursor = resumed.next_row(1, cursors[start])
            np.testing.assert_equal(cursor, cursors[start + 1])
            np.testing.assert_equal(pieces, rows[start])


def test_a_cursor_is_left_as_it_was(mixture):
    stream = RowStream(mixture, 2, 256, 256, 0)
    cursor = stream.start()[0]
    stream.next_row(0, cursor)
    assert not cursor.any()


def test_rows_and_seeds_differ(mixture):
    def first(seed: int, row: int) -> list[int]:
        stream = RowStream(mixture, 2, 256, 256, seed)
        return stream.next_row(row, stream.start()[row])[0][0].example.inputs.tolist()

    assert len({tuple(first(seed, row)) for seed in (0, 1) for row in (0, 1)}) == 4


def test_the_same_document_gets_other_noise_in_the_next_epoch():
    (tokens,) = numbered_documents([50])
    stream = RowStream(one_source([tokens], (SHORT,)), 1, 64, 64, 0)
    pieces = pieces_of(rows_of(stream, 8))
    assert len({tuple(piece.example.inputs.tolist()) for piece in pieces}) == len(pieces)


@pytest.mark.parametrize("length", [512, 2048])
def test_rows_are_full(mixture, length):
    rows = [
        row
        for stream in rows_of(RowStream(mixture, 8, length, length, 0), 40).values()
        for row in stream
    ]
    inputs, targets = (
        np.array([sum(len(piece.example[side]) for piece in row) for row in rows]) / length
        for side in (0, 1)
    )
    assert np.maximum(inputs, targets).mean() > 0.99
    assert (inputs.mean() + targets.mean()) / 2 > 0.85
    assert min(inputs.mean(), targets.mean()) > 0.75


def test_examples_follow_the_rates(mixture):
    pieces = pieces_of(rows_of(RowStream(mixture, 8, 512, 512, 0), 60))
    shares = np.bincount([piece.task for piece in pieces], minlength=5) / len(pieces)
    np.testing.assert_allclose(shares, [0.125] * 4 + [0.5], atol=0.01)


def test_sources_are_mixed_by_weight_each_with_its_own_place():
    tokens = numbered_documents([300] * 40)
    mixture = Mixture(
        sources=(
            Source(name="a", documents=tokens[:30], denoisers=(SHORT,), weight=3.0),
            Source(name="b", documents=tokens[30:], denoisers=(SHORT, PREFIX)),
        ),
        special=SPECIAL,
    )
    assert [task.name for task in mixture.tasks] == ["a/short", "b/short", "b/prefix"]
    pieces = pieces_of(rows_of(RowStream(mixture, 2, 64, 64, 0), 200))
    shares = np.bincount([piece.task for piece in pieces]) / len(pieces)
    np.testing.assert_allclose(shares, [0.75, 0.125, 0.125], atol=0.01)
    for piece in pieces:
        document = tokens[(0 if piece.task == 0 else 30) + piece.document]
        expected = document[piece.start : piece.start + piece.length]
        assert reconstruct(*piece.example, SPECIAL)[0] == expected.tolist()


def test_packed_arrays_are_what_their_examples_say(mixture):
    stream = RowStream(mixture, 1, 256, 256, 0)
    cursor = stream.start()[0]
    for _ in range(20):
        pieces, after = stream.next_row(0, cursor)
        batch = empty_batch(2, 256, 256)
        second = {name: array[1:] for name, array in batch.items()}
        (cursor,) = fill_rows(second, stream, 0, cursor[None])
        np.testing.assert_array_equal(cursor, after)
        assert not any(array[0].any() for array in batch.values())
        row = {name: array[1] for name, array in batch.items()}
        for segment, piece in enumerate(pieces, start=1):
            inputs, targets = piece.example
            encoder = row["encoder_segment_ids"] == segment
            decoder = row["decoder_segment_ids"] == segment
            np.testing.assert_array_equal(row["encoder_input_tokens"][encoder], inputs)
            np.testing.assert_array_equal(row["encoder_positions"][encoder], range(len(inputs)))
            np.testing.assert_array_equal(row["decoder_target_tokens"][decoder], targets)
            np.testing.assert_array_equal(row["decoder_positions"][decoder], range(len(targets)))
            shifted = [SPECIAL.bos_id, *targets[:-1]]
            np.testing.assert_array_equal(row["decoder_input_tokens"][decoder], shifted)
            assert set(row["decoder_task_ids"][decoder]) == {piece.task}
        for side, name in (("encoder", "input_tokens"), ("decoder", "target_tokens")):
            segments = row[f"{side}_segment_ids"]
            used = np.count_nonzero(segments)
            assert np.all(np.diff(segments[:used]) >= 0), "examples stand side by side"
            assert not segments[used:].any(), "padding comes last"
            assert not row[f"{side}_{name}"][used:].any()
            assert set(segments[:used]) == set(range(1, len(pieces) + 1))
        np.testing.assert_array_equal(
            row["decoder_loss_weights"], (row["decoder_segment_ids"] > 0).astype(np.float32)
        )


@pytest.mark.parametrize("room", [(256, 256), (600, 250)])
def test_rows_made_together_are_those_made_one_by_one(mixture, room, monkeypatch):
    stream = RowStream(mixture, 7, *room, 0)
    cursors = stream.start()
    for at_once in (1, 3, 100):
        monkeypatch.setattr("t5g2.data.batch.PLACES_AT_ONCE", at_once * sum(room))
        batch, alone = empty_batch(7, *room), empty_batch(7, *room)
        following = fill_rows(batch, stream, 0, cursors)
        for row in range(7):
            own = {name: array[row : row + 1] for name, array in alone.items()}
            after = fill_rows(own, stream, row, cursors[row : row + 1])
            np.testing.assert_array_equal(after[0], following[row])
        np.testing.assert_equal(batch, alone)
        cursors = following


def test_the_digest_tells_rows_apart(mixture):
    stream = RowStream(mixture, 1, 256, 256, 0)
    cursors = [stream.start()]
    digests = []
    for i in range(31):
        batch = empty_batch(1, 256, 256)
        cursors.append(fill_rows(batch, stream, 0, cursors[i if i < 30 else 3]))
        digests += batch["row_digest"].tolist()
    assert digests[30] == digests[3]
    assert len(set(digests)) == 30


def test_very_unequal_room_still_gives_rows():
    (tokens,) = numbered_documents([5000])
    stream = RowStream(one_source([tokens], (PREFIX,)), 1, 8192, 64, 0)
    assert all(len(row) == 1 and row[0].length > 90 for row in rows_of(stream, 5)[0])


def test_documents_of_one_token_are_examples():
    stream = RowStream(one_source(numbered_documents([1] * 5), (SHORT,)), 1, 64, 64, 0)
    pieces = pieces_of(rows_of(stream, 1))
    assert len(pieces) > 10
    assert all(piece.example.inputs.tolist() == [2, 10] for piece in pieces)


def test_a_source_without_a_token_is_refused(monkeypatch):
    monkeypatch.setattr("t5g2.data.packing.MOST_EMPTY_DOCUMENTS", 50)
    empty = [np.zeros(0, np.int32)] * 3
    stream = RowStream(one_source(empty), 1, 512, 512, 0)
    with pytest.raises(UserError, match="source text: 50 documents in a row hold no text"):
        stream.next_row(0, stream.start()[0])
    with pytest.raises(UserError, match="source text has no documents"):
        RowStream(one_source([]), 1, 512, 512, 0)


@pytest.mark.parametrize(
    ("room", "message"),
    [
        ((64, 64), r"too short for denoiser span32_15, one span .* at least 183 inputs and 34 t"),
        ((512, 32), "targets_length = 32: too short for denoiser span32_15"),
        ((16384, 16384), "span12_50 needs 1260 sentinels .* but the vocabulary has 1000"),
    ],
)
def test_lengths_that_do_not_suit_are_refused_in_one_line(mixture, room, message):
    with pytest.raises(UserError, match=message) as error:
        RowStream(mixture, 1, *room, 0)
    assert "\n" not in str(error.value)


def test_every_length_that_is_accepted_gives_examples(mixture):
    accepted = 0
    for inputs in range(8, 400, 56):
        for targets in range(8, 400, 56):
            try:
                stream = RowStream(mixture, 1, inputs, targets, 0)
            except UserError:
                continue
            accepted += 1
            assert all(rows_of(stream, 3)[0])
    assert accepted


def test_specials_without_bos_on_inputs_start_with_text(documents):
    special = SPECIAL._replace(bos_on_inputs=False)
    source = Source(name="text", documents=documents)
    stream = RowStream(Mixture(sources=(source,), special=special), 1, 512, 512, 0)
    for piece in pieces_of(rows_of(stream, 10)):
        assert piece.example.inputs[0] != special.bos_id
        tokens = documents[piece.document][piece.start : piece.start + piece.length]
        assert reconstruct(*piece.example, special)[0] == tokens.tolist()
