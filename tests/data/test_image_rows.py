"""Rows with images: examples whole, in order, beside text; the same rows however they are made."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from pictures import BOI, EOI, IMAGE, PER_IMAGE, Pictures, pictures_and_text
from reconstruction import SPECIAL

from t5g2.data.batch import empty_batch, fill_rows
from t5g2.data.image_examples import ImagePrefix
from t5g2.data.loader import RowBatches
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.data.resume import continued, describe_cursors
from t5g2.data.ul2 import Denoiser, philox
from t5g2.errors import UserError

ROWS, ROOM, SLOTS = 8, (224, 160), 4


def stream_of(mixture: Mixture, slots: int = SLOTS, room=ROOM, rows: int = ROWS) -> RowStream:
    return RowStream(mixture, rows, *room, 0, slots)


def alone(*images_and_captions: tuple[int, int], max_bad: int = 0) -> Mixture:
    images, captions = map(list, zip(*images_and_captions, strict=True))
    source = Source(
        name="pictures", documents=Pictures(images, captions, max_bad), denoisers=(ImagePrefix(),)
    )
    return Mixture(sources=(source,), special=SPECIAL)


@pytest.fixture(scope="module")
def stream() -> RowStream:
    return stream_of(pictures_and_text())


def batches(stream: RowStream, count: int, first=0, rows=ROWS, workers=0, cursors=None) -> list:
    start = stream.start() if cursors is None else cursors
    iterator = iter(RowBatches(stream, start, first, rows, workers))
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def test_the_format_is_that_of_prefix_language_modelling():
    example = Pictures([2], [9]).example(0)
    hidden = len(example.ids) - example.prefix
    # A rate that divides this very document where its last image ends.
    denoiser = Denoiser(
        name="prefix", mean_span=None, corruption_rate=hidden / len(example.ids), mode="[S]"
    )
    for bos in (True, False):
        special = SPECIAL._replace(bos_on_inputs=bos)
        for mode in ((), (30, 31)):
            reference = dataclasses.replace(denoiser, mode_ids=mode)
            expected = reference(example.ids, philox(0), special)
            prefix = ImagePrefix(mode="[S]", mode_ids=mode)
            made = prefix(example, special)
            np.testing.assert_equal(tuple(made), tuple(expected))
            assert prefix.lengths(example, special) == tuple(map(len, expected))
            assert made.inputs.dtype == made.targets.dtype == np.int32


def test_rows_are_written_over_whatever_stood_in_memory(stream):
    batch, used = (empty_batch(ROWS, *ROOM, stream.images) for _ in range(2))
    for array in used.values():
        array.view(np.uint8)[:] = 0x5A
    for made in (batch, used):
        fill_rows(made, stream, 0, stream.start())
    np.testing.assert_equal(used, batch)


def test_examples_are_whole_and_their_images_stand_in_the_order_of_their_places(stream):
    pictures = stream.mixture.sources[0].documents
    cursors, seen, packed = stream.start(), Counter(), 0
    for _ in range(40):
        batch = empty_batch(ROWS, *ROOM, stream.images)
        after = fill_rows(batch, stream, 0, cursors)
        for row in range(ROWS):
            pieces, _ = stream.next_row(row, cursors[row])
            drawn = [piece for piece in pieces if stream.tasks[piece.task].source == 0]
            packed += 0 < len(drawn) < len(pieces)
            seen.update(piece.document for piece in drawn)
            expected = [pictures.images(piece.document) for piece in drawn]
            slots = np.concatenate([*expected, np.zeros((SLOTS, 2, 2, 3), np.uint8)])[:SLOTS]
            np.testing.assert_array_equal(batch["images"][row], slots)
            inputs, segments = batch["encoder_input_tokens"][row], batch["encoder_segment_ids"][row]
            assert np.sum(inputs == IMAGE) == PER_IMAGE * sum(map(len, expected))
            for number, piece in enumerate(pieces, 1):
                if stream.tasks[piece.task].source:
                    continue
                example = pictures.example(piece.document)
                assert (piece.start, piece.length) == (0, len(example.ids))
                own = inputs[segments == number].tolist()
                assert own == [2, *example.ids[: example.prefix].tolist(), 10]
                targets = batch["decoder_target_tokens"][row]
                targets = targets[batch["decoder_segment_ids"][row] == number].tolist()
                assert targets == [10, *example.ids[example.prefix :].tolist(), 1]
        cursors = after
    assert len(seen) == len(pictures)
    assert max(seen.values()) - min(seen.values()) <= 2
    assert packed > 100
    assert BOI not in stream.mixture.sources[1].documents[0]
    assert EOI not in stream.mixture.sources[1].documents[0]


def test_a_row_is_closed_when_the_next_example_needs_more_tokens_or_slots():
    # 1 + prefix + 1 inputs: an image and 20 tokens are 28, three images and one are 21.
    by_tokens = stream_of(alone((1, 20), (1, 20)), room=(3 * 28 - 1, 96), slots=9, rows=1)
    assert [len(by_tokens.next_row(0, by_tokens.start()[0])[0]) for _ in range(2)] == [2, 2]
    exactly = stream_of(alone((1, 20), (1, 20)), room=(3 * 28, 96), slots=9, rows=1)
    assert len(exactly.next_row(0, exactly.start()[0])[0]) == 3
    by_targets = stream_of(alone((1, 20), (1, 20)), room=(200, 2 * 22), slots=9, rows=1)
    assert len(by_targets.next_row(0, by_targets.start()[0])[0]) == 2
    for slots, examples in ((3, 1), (5, 1), (6, 2)):
        by_slots = stream_of(alone((3, 1), (3, 1)), room=(200, 96), slots=slots, rows=1)
        pieces, cursor = by_slots.next_row(0, by_slots.start()[0])
        assert len(pieces) == examples
        assert cursor.tolist() == [examples, examples, 0]


@pytest.mark.parametrize(
    ("images", "caption", "needs"),
    [(1, 100, (108, 102, 1)), (4, 1, (27, 3, 4)), (3, 120, (140, 122, 3))],
)
def test_an_example_that_never_fits_is_named_or_passed_over(images, caption, needs):
    mixture, room = alone((1, 5), (images, caption), (2, 5)), (128, 96)
    stream = stream_of(mixture, slots=3, rows=1, room=room)
    with pytest.raises(UserError) as error:
        batches(stream, 10, rows=1)
    message = "picture 1: the example needs {:} inputs, {:} targets and {:} images".format(*needs)
    for part in (message, "inputs_length = 128", "targets_length = 96", "images_per_row = 3"):
        assert part in str(error.value)
    mixture = alone((1, 5), (images, caption), (2, 5), max_bad=1)
    stream = stream_of(mixture, slots=3, rows=1, room=room)
    cursor, seen = stream.start()[0], set()
    for _ in range(10):
        pieces, cursor = stream.next_row(0, cursor)
        seen |= {piece.document for piece in pieces}
    assert seen == {0, 2}
    assert mixture.sources[0].documents.bad.count("pictures") == 1


def test_images_need_room_and_text_alone_has_no_slots():
    with pytest.raises(UserError, match=r"data\.images_per_row is 0 but the mixture has images"):
        stream_of(pictures_and_text(), slots=0)
    text = Mixture(sources=pictures_and_text().sources[1:], special=SPECIAL)
    (step,) = batches(stream_of(text), 1)
    assert "images" not in step.batch


@pytest.mark.parametrize("hosts", [2, 4])
def test_rows_are_the_same_on_any_number_of_hosts(stream, hosts):
    expected, share = batches(stream, 6), ROWS // hosts
    parts = [batches(stream, 6, first, share) for first in range(0, ROWS, share)]
    for number, step in enumerate(expected):
        for name, array in step.batch.items():
            own = [part[number].batch[name] for part in parts]
            np.testing.assert_array_equal(np.concatenate(own), array)


def test_processes_make_the_same_rows(stream):
    for ours, theirs in zip(batches(stream, 5), batches(stream, 5, workers=2), strict=True):
        np.testing.assert_equal(theirs, ours)


def test_rows_go_on_exactly_from_any_cursors(stream):
    steps = batches(stream, 9)
    fresh = stream_of(pictures_and_text())
    cursors = continued(steps[3].cursors, describe_cursors(stream), fresh)
    np.testing.assert_equal(batches(fresh, 5, cursors=cursors), steps[4:])


def test_with_other_rows_no_example_comes_again_in_its_epoch():
    mixture = pictures_and_text(count=400)
    stream, more = stream_of(mixture), stream_of(mixture, rows=2 * ROWS)
    cursors, seen = stream.start(), []

    def drawn(stream, cursors):
        for row in range(len(cursors)):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            yield from (p.document for p in pieces if stream.tasks[p.task].source == 0)

    for _ in range(6):
        seen += drawn(stream, cursors)
    moved = continued(cursors, describe_cursors(stream), more)
    for _ in range(3):
        seen += drawn(more, moved)
    assert len(seen) == len(set(seen)) > 60


def test_the_checksum_of_a_row_speaks_of_its_images(stream):
    class Recoloured(Pictures):
        def images(self, index):
            return super().images(index) + (index == 3)

    mixture = pictures_and_text()
    pictures = mixture.sources[0]
    recoloured = Recoloured(pictures.documents.counts, pictures.documents.captions)
    other = dataclasses.replace(
        mixture,
        sources=(dataclasses.replace(pictures, documents=recoloured), mixture.sources[1]),
    )
    changed = unchanged = 0
    for a, b in zip(batches(stream, 12), batches(stream_of(other), 12), strict=True):
        same = (a.batch["images"] == b.batch["images"]).all(axis=(1, 2, 3, 4))
        np.testing.assert_array_equal(a.batch["row_digest"] == b.batch["row_digest"], same)
        changed, unchanged = changed + (~same).sum(), unchanged + same.sum()
    assert changed
    assert unchanged
