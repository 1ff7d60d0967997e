"""Rows: endless streams of examples, packed on both sides, whose whole state is a few integers."""

import threading
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from jaxtyping import Bool, Int

from t5g2.data.image_examples import NOTHING, ImageExample, ImageExamples, ImagePrefix, ImageSlot
from t5g2.data.mixture import Mixture, TokenSource, check_lengths
from t5g2.data.sampling import Draws, TaskChoice, key
from t5g2.data.ul2 import Denoiser, Example, Jobs, Philox, Sizes, Tokens, denoise
from t5g2.errors import UserError

# A row is closed when less than this share of it would fit as the next piece of a longer document.
SMALLEST_PIECE = 1 / 64
# Two neighbours share a row evenly if each keeps at least this share of the length it has alone.
SMALLEST_SHARE = 0.5
# Documents without a token are passed over; so many in a row mean that there are no others.
MOST_EMPTY_DOCUMENTS = 100_000
# Tasks of so many of a row's next examples are chosen in one go.
TURNS_AT_ONCE = 8
# In the place of a denoiser's number: examples of this task are never split.
WHOLE = -1

Cursor = Int[np.ndarray, " cursor"]
# A document's tokens, or an example of images and text.
Content: TypeAlias = Int[np.ndarray, " n"] | ImageExample


class Piece(NamedTuple):
    """An example and where it comes from.

    Attributes:
        task: number of the task in the mixture.
        document: number of the document in its source.
        start: first token of the piece in the document.
        length: tokens of the document that the piece takes.
        example: what they became.
        images: how many images the encoder sees with it.
    """

    task: int
    document: int
    start: int
    length: int
    example: Example
    images: int = 0


class Cuts(NamedTuple):
    """What the pieces of some rows are going to be: where they are cut, before they are denoised.

    Attributes:
        row: of each piece, counted from the first of these rows; ascending.
        number: j, of the row's example j.
        task: as a piece's.
        document: as a piece's.
        start: as a piece's.
        length: as a piece's.
        images: as a piece's.
        lengths: of the inputs and targets that it becomes.
        contents: the tokens to be denoised, or an example of images and text.
    """

    row: Int[np.ndarray, " pieces"]
    number: Int[np.ndarray, " pieces"]
    task: Int[np.ndarray, " pieces"]
    document: Int[np.ndarray, " pieces"]
    start: Int[np.ndarray, " pieces"]
    length: Int[np.ndarray, " pieces"]
    images: Int[np.ndarray, " pieces"]
    lengths: Int[np.ndarray, "pieces 2"]
    contents: list[Content]

    def of_rows(self, first: int, stop: int) -> "Cuts":
        """Those of rows from `first` on and before `stop`, counted from `first`."""
        begin, end = np.searchsorted(self.row, (first, stop)).tolist()
        some = Cuts(*(cast(Any, column)[begin:end] for column in self))
        return some._replace(row=some.row - first)


class ImageSlots(NamedTuple):
    """Room for images in each row of a batch."""

    per_row: int
    slot: ImageSlot


class RowStream:
    """The rows of a global batch, each its own stream of examples.

    Example j of row r has the task, and the noise, that (seed, r, j) determine. It takes as much of
    its source's current document in this row as there is room for on both sides; the next example
    of that source goes on from there. The d-th document of source s in row r is document number
    `d * rows + r` of the endless sequence of keyed permutations of the source, one per epoch.

    A source that is sequential has no permutation: `d * rows + r` counts its documents in its own
    order. As rows use up theirs at their own pace, a little behind or ahead of one another, such a
    source is asked for documents within a window that moves forward.

    An example of images and text is a document of its own, which is never split: if it does not fit
    in what is left of a row, or has more images than there are slots left, the row is closed.

    The cursor of a row is an int32 array [1 + 2 * sources]: the number of its next example, then
    for each source the number of the current document's draw and the offset in it.

    Raises:
        UserError: an empty source, lengths that do not suit a denoiser or the sentinels, or no room
            for images.
    """

    def __init__(
        self,
        mixture: Mixture,
        rows: int,
        inputs_length: int,
        targets_length: int,
        seed: int,
        images_per_row: int = 0,
    ) -> None:
        for source in mixture.sources:
            if not len(source.documents):
                raise UserError(f"source {source.name} has no documents")
        check_lengths(mixture, inputs_length, targets_length)
        slot = mixture.image_slot
        if slot is not None and images_per_row < 1:
            raise UserError(
                "data.images_per_row is 0 but the mixture has images: set it to the number of "
                "images that a row has room for"
            )
        self.mixture = mixture
        self.tasks = mixture.tasks
        self.rows = rows
        self.seed = seed
        self.room = (inputs_length, targets_length)
        self.images = None if slot is None else ImageSlots(images_per_row, slot)
        self.cursor_length = 1 + 2 * len(mixture.sources)
        self._choose = TaskChoice(mixture.rates, seed)
        self._draws = [
            Draws(
                key("order", seed, source.name),
                len(source.documents),
                rows,
                shuffled=not is_sequential(source.documents),
            )
            for source in mixture.sources
        ]
        self._noise = Philox(key("noise", seed))
        self._smallest_piece = max(int((inputs_length + targets_length) * SMALLEST_PIECE), 2)
        denoisers = dict.fromkeys(
            task.denoiser for task in self.tasks if isinstance(task.denoiser, Denoiser)
        )
        numbers = {denoiser: number for number, denoiser in enumerate(denoisers)}
        self._distinct = list(denoisers)
        self._sizes = Sizes(self._distinct, self.room, mixture.special)
        # Of each task its source and its denoiser's number in `_distinct`; WHOLE: its examples are
        # never split.
        self._sources = np.array([task.source for task in self.tasks])
        self._denoisers = np.array(
            [
                numbers[task.denoiser] if isinstance(task.denoiser, Denoiser) else WHOLE
                for task in self.tasks
            ]
        )
        self._has_whole = bool((self._denoisers == WHOLE).any())
        self._image_examples = [source.image_examples for source in mixture.sources]
        self._current = Current(rows * len(mixture.sources))

    def start(self) -> Int[np.ndarray, "rows cursor"]:
        """Cursors of all rows before the first example."""
        return np.zeros((self.rows, self.cursor_length), np.int32)

    def document_number(self, source: int, row: int, draw: int) -> int:
        """Which document the `draw`-th of a source in a row is: each once per epoch."""
        return self._draws[source](row, draw)

    def next_row(self, row: int, cursor: Cursor) -> tuple[list[Piece], Cursor]:
        """Fills one row of the next batch.

        Args:
            row: number of the row in the global batch.
            cursor: its cursor; not changed.

        Returns:
            The examples that stand in the row and the cursor after them.
        """
        cuts, following = self.cut_rows(row, cursor[None])
        ends = np.cumsum(cuts.lengths, axis=0)
        inputs, targets = (np.empty(length, np.int32) for length in ends[-1])
        begins = ends - cuts.lengths
        self.write_examples(cuts, begins, inputs, targets, row)
        examples = [
            Example(inputs[s:s_end], targets[t:t_end])
            for (s, t), (s_end, t_end) in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        columns = (cuts.task, cuts.document, cuts.start, cuts.length)
        origins = zip(*(column.tolist() for column in columns), strict=True)
        pieces = [
            Piece(task, document, start, length, example, images)
            for (task, document, start, length), example, images in zip(
                origins, examples, cuts.images.tolist(), strict=True
            )
        ]
        return pieces, following[0]

    def cut_rows(
        self, first: int, cursors: Int[np.ndarray, "rows cursor"]
    ) -> tuple[Cuts, Int[np.ndarray, "rows cursor"]]:
        """As `next_row` of some rows, side by side, but only what their pieces will be.

        Args:
            first: number of the first of them in the global batch.
            cursors: theirs; not changed.

        Returns:
            Their pieces and the cursors after them.
        """
        with self._current.lock:
            return self._cut_rows(first, cursors)

    def _cut_rows(
        self, first: int, cursors: Int[np.ndarray, "rows cursor"]
    ) -> tuple[Cuts, Int[np.ndarray, "rows cursor"]]:
        current, places = self._current, cursors.astype(np.int64)
        flat, sources = places.reshape(-1), len(self.mixture.sources)
        # Of the rows that are still open: their numbers, and the room and the slots that are left.
        rows = np.arange(len(places))
        left = np.tile(self.room, (len(places), 1))
        slots = np.full(len(places), 0 if self.images is None else self.images.per_row)
        found: list[tuple[np.ndarray, ...]] = []
        contents: list[Content] = []
        while len(rows):
            turn = len(found) % TURNS_AT_ONCE
            if not turn:
                tasks = self._choose(
                    first + np.arange(len(places))[:, None],
                    places[:, :1] + np.arange(TURNS_AT_ONCE + 1),
                )
            task, following = tasks[rows, turn], tasks[rows, turn + 1]
            source, denoiser = self._sources[task], self._denoisers[task]
            place = rows * self.cursor_length + 1 + 2 * source
            key = (first + rows) * sources + source
            draw, start = flat[place], flat[place + 1]
            for i in current.used_up(key, draw, start).nonzero()[0].tolist():
                found_at = self._find_document(int(source[i]), first, int(rows[i]), places)
                flat[place[i] : place[i] + 2] = found_at
                start[i] = found_at[1]
            remaining = current.length[key] - start
            most, fair = fair_length(self._sizes, denoiser, self._denoisers[following], left)
            length = np.minimum(remaining, fair)
            lengths = self._sizes.lengths(denoiser, length)
            # In very unequal room even the longest piece is small: a row is never left empty.
            fits = most >= np.minimum(remaining, self._smallest_piece) if found else most > 0
            images = np.zeros(len(rows), np.int64)
            if self._has_whole:
                whole = denoiser == WHOLE
                needs = current.needs[key]
                # Alone it fits: `_read` has seen to that.
                room = np.column_stack([left, slots])
                fits = np.where(whole, (needs <= room).all(1), fits)
                length = np.where(whole, remaining, length)
                lengths = np.where(whole[:, None], needs[:, :2], lengths)
                images = np.where(whole, needs[:, 2], 0)
            if not fits.all():
                rows, left, slots, task, key, place, start, remaining, length, lengths, images = (
                    column[fits]
                    for column in (
                        rows,
                        left,
                        slots,
                        task,
                        key,
                        place,
                        start,
                        remaining,
                        length,
                        lengths,
                        images,
                    )
                )
            number, document = places[rows, 0], current.number[key]
            found.append((rows, number, task, document, start, length, images, lengths))
            contents += [current.content[k] for k in key.tolist()]
            left, slots = left - lengths, slots - images
            is_done = length == remaining
            flat[place] += is_done
            flat[place + 1] = (start + length) * ~is_done
            places[rows, 0] = number + 1
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        # Row by row; they were found example by example.
        order = np.argsort(columns[0], kind="stable")
        row, number, task, document, start, length, images, lengths = (
            column[order] for column in columns
        )
        pieces = [
            content if isinstance(content, ImageExample) else content[start : start + length]
            for content, start, length in zip(
                (contents[i] for i in order.tolist()),
                start.tolist(),
                length.tolist(),
                strict=True,
            )
        ]
        after = places.astype(cursors.dtype)
        if (after != places).any():
            raise OverflowError("a row's cursor has come to the end of its dtype")
        cuts = Cuts(row, number, task, document, start, length, images, lengths, pieces)
        return cuts, after

    def write_examples(
        self,
        cuts: Cuts,
        begins: Int[np.ndarray, "pieces 2"],
        inputs: Int[np.ndarray, " inputs"],
        targets: Int[np.ndarray, " targets"],
        first: int,
    ) -> None:
        """Writes the examples that cuts become.

        Args:
            cuts: in the order of their places.
            begins: where the inputs and the targets of each begin.
            inputs: int32 memory; what lies between examples is set to 0.
            targets: the same of the other side.
            first: number in the global batch of the row that cuts count theirs from.
        """
        is_whole = self._denoisers[cuts.task] == WHOLE
        split = (~is_whole).nonzero()[0]
        counters = np.stack([first + cuts.row[split], cuts.number[split]], 1)
        jobs = Jobs(
            self._distinct,
            self._denoisers[cuts.task[split]],
            cast(list[Tokens], [cuts.contents[i] for i in split.tolist()]),
            lambda jobs, counts: self._noise.bits(counters[jobs].tolist(), counts),
            cuts.lengths[split],
        )
        denoise(jobs, begins[split], self.mixture.special, inputs, targets)
        for i in is_whole.nonzero()[0].tolist():
            prefix, content = self.tasks[cuts.task[i]].denoiser, cuts.contents[i]
            assert isinstance(prefix, ImagePrefix)
            assert isinstance(content, ImageExample)
            example = prefix(content, self.mixture.special)
            for out, at, ids in zip((inputs, targets), begins[i], example, strict=True):
                out[at : at + len(ids)] = ids

    def piece_images(self, task: int, document: int) -> np.ndarray:
        """The images of a piece that has some, each as `images.slot` says."""
        examples = self._image_examples[self.tasks[task].source]
        assert examples is not None
        return examples.images(document)

    def _find_document(
        self, source: int, first: int, row: int, places: Int[np.ndarray, "rows cursor"]
    ) -> tuple[int, int]:
        """Makes a row's document of a source the current one; steps past used-up ones.

        Args:
            source: number of the source.
            first: number of the first of the rows that are cut.
            row: number of the row among these.
            places: their cursors.

        Returns:
            The draw and the offset of the one that is the current one now.
        """
        row_number, draws = first + row, places[:, 1 + 2 * source]
        key = row_number * len(self.mixture.sources) + source
        draw, offset = places[row, 1 + 2 * source : 3 + 2 * source].tolist()
        for _ in range(MOST_EMPTY_DOCUMENTS):
            if self._current.draw[key] != draw:
                rows = range(first, first + len(places))
                number = self._draws[source].among(rows, draws, row_number, draw)
                content = self._read(source, number)
                needs = (0, 0, 0)
                if isinstance(content, ImageExample):
                    needs = (*self._prefix_lengths(source, content), content.images)
                self._current.put(key, draw, number, content, needs)
            if offset < self._current.length[key]:
                return draw, offset
            draw, offset = draw + 1, 0
        raise UserError(
            f"source {self.mixture.sources[source].name}: {MOST_EMPTY_DOCUMENTS:,} documents in a "
            "row hold no text"
        )

    def _read(self, source: int, number: int) -> Content:
        """A document; nothing of an example that no row has room for and that may be passed over.

        Raises:
            UserError: there is such an example too many.
        """
        examples = self._image_examples[source]
        if examples is None:
            return self.mixture.sources[source].documents[number]
        example = examples.example(number)
        inputs, targets = self._prefix_lengths(source, example)
        slots = 0 if self.images is None else self.images.per_row
        if inputs <= self.room[0] and targets <= self.room[1] and example.images <= slots:
            return example
        images = f" and {example.images} images" if example.images else ""
        examples.refuse(
            number,
            f"the example needs {inputs} inputs, {targets} targets{images}, "
            f"more than a row has room for (data.inputs_length = {self.room[0]}, "
            f"data.targets_length = {self.room[1]}, data.images_per_row = {slots})",
        )
        return NOTHING

    def _prefix_lengths(self, source: int, example: ImageExample) -> tuple[int, int]:
        prefix = self.mixture.sources[source].denoisers[0]
        assert isinstance(prefix, ImagePrefix)
        return prefix.lengths(example, self.mixture.special)


class Current:
    """The document that each pair of a row and a source stands in: a cache, no state.

    Attributes:
        lock: of whoever cuts rows.
        draw: of each pair's document; -1: there is none yet.
        number: of the document in its source.
        length: its tokens.
        needs: inputs, targets and images of an example that is never split.
        content: the documents.
    """

    def __init__(self, pairs: int) -> None:
        self.lock = threading.Lock()
        self.draw = np.full(pairs, -1)
        self.number, self.length = np.zeros((2, pairs), np.int64)
        self.needs = np.zeros((pairs, 3), np.int64)
        self.content: dict[int, Content] = {}

    def __reduce__(self) -> Any:
        return Current, (len(self.draw),)

    def used_up(
        self,
        pair: Int[np.ndarray, " n"],
        draw: Int[np.ndarray, " n"],
        offset: Int[np.ndarray, " n"],
    ) -> Bool[np.ndarray, " n"]:
        """Whether another document must be read than the one that is here."""
        return (self.draw[pair] != draw) | (self.length[pair] <= offset)

    def put(
        self, pair: int, draw: int, number: int, content: Content, needs: tuple[int, int, int]
    ) -> None:
        """Puts a document in the place of the one that was there."""
        self.draw[pair], self.number[pair], self.content[pair] = draw, number, content
        self.length[pair] = len(content.ids if isinstance(content, ImageExample) else content)
        self.needs[pair] = needs


def is_sequential(documents: TokenSource | ImageExamples) -> bool:
    """Whether a source can only be read forward."""
    return getattr(documents, "sequential", False)


def fair_length(
    sizes: Sizes,
    own: Int[np.ndarray, " n"],
    following: Int[np.ndarray, " n"],
    room: Int[np.ndarray, "n 2"],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """How long pieces may be in the room that is left, and how long they should be.

    Denoisers fill the two sides unequally: prefix language modelling three times as many targets as
    inputs, 15% corruption the reverse. Where an example and the following one complement each
    other, both sides are filled by shortening each a little: with (a, b) and (c, d) the shares of
    inputs and targets that each fills at its longest, p and q solve p (a, b) + q (c, d) = (1, 1).

    Args:
        sizes: of all denoisers.
        own: number of each example's denoiser; 0 comes of WHOLE.
        following: of the next example's; WHOLE: it does not shorten itself for others either.
        room: encoder and decoder tokens that each row has room for.

    Returns:
        The longest pieces that fit, and the lengths that leave the following examples their share.
    """
    both = np.array([own, following])
    longest = sizes.longest(both, room)
    shares = sizes.lengths(both, longest) / np.maximum(room, 1)
    (a, b), (c, d) = shares.transpose(0, 2, 1)
    determinant = a * d - b * c
    most = longest[0]
    is_shared = (np.minimum(most, longest[1]) > 0) & (np.abs(determinant) >= 1e-6)
    determinant[~is_shared] = 1
    p, q = (d - c) / determinant, (a - b) / determinant
    is_shared &= (np.minimum(p, q) >= SMALLEST_SHARE) & (np.maximum(p, q) < 1)
    return most, np.where(is_shared, np.maximum((p * most).astype(np.int64), 1), most)
