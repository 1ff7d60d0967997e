"""Rows: endless streams of examples, packed on both sides, whose whole state is a few integers."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

from t5g2.data.image_examples import NOTHING, ImageExample, ImageExamples, ImagePrefix, ImageSlot
from t5g2.data.mixture import Mixture, TokenSource, check_lengths
from t5g2.data.sampling import TaskChoice, key, permute
from t5g2.data.ul2 import Denoiser, Example, Job, Philox, Sizes, denoise
from t5g2.errors import UserError

# A row is closed when less than this share of it would fit as the next piece of a longer document.
SMALLEST_PIECE = 1 / 64
# Two neighbours share a row evenly if each keeps at least this share of the length it has alone.
SMALLEST_SHARE = 0.5
# Documents without a token are passed over; so many in a row mean that there are no others.
MOST_EMPTY_DOCUMENTS = 100_000

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


class Cut(NamedTuple):
    """What a `Piece` is going to be: where it is cut, before it is denoised.

    Attributes:
        task: as a piece's.
        document: as a piece's.
        start: as a piece's.
        length: as a piece's.
        lengths: of the inputs and targets that it becomes.
        content: what is to be denoised, or an example of images and text.
    """

    task: int
    document: int
    start: int
    length: int
    lengths: tuple[int, int]
    content: Job | ImageExample

    @property
    def images(self) -> int:
        """How many images the encoder sees with it."""
        return self.content.images if isinstance(self.content, ImageExample) else 0


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
        self._order_seeds = [key("order", seed, source.name) for source in mixture.sources]
        self._noise = Philox(key("noise", seed))
        self._smallest_piece = max(int((inputs_length + targets_length) * SMALLEST_PIECE), 2)
        sizes = {
            denoiser: Sizes(denoiser, self.room, mixture.special)
            for denoiser in {task.denoiser for task in self.tasks}
            if isinstance(denoiser, Denoiser)
        }
        # None: its examples are never split.
        self._sizes = [
            sizes[task.denoiser] if isinstance(task.denoiser, Denoiser) else None
            for task in self.tasks
        ]
        self._image_examples = [source.image_examples for source in mixture.sources]
        # The draw and number of each (row, source)'s current document, and the document: a cache,
        # no state.
        self._current: dict[tuple[int, int], tuple[int, int, Content]] = {}

    def start(self) -> Int[np.ndarray, "rows cursor"]:
        """Cursors of all rows before the first example."""
        return np.zeros((self.rows, self.cursor_length), np.int32)

    def document_number(self, source: int, row: int, draw: int) -> int:
        """Which document the `draw`-th of a source in a row is: each once per epoch."""
        documents = self.mixture.sources[source].documents
        size = len(documents)
        epoch, index = divmod(draw * self.rows + row, size)
        if is_sequential(documents):
            return index
        return permute(index, size, key(self._order_seeds[source], epoch))

    def next_row(self, row: int, cursor: Cursor) -> tuple[list[Piece], Cursor]:
        """Fills one row of the next batch.

        Args:
            row: number of the row in the global batch.
            cursor: its cursor; not changed.

        Returns:
            The examples that stand in the row and the cursor after them.
        """
        cuts, following = self.cut_row(row, cursor)
        ends = np.cumsum([cut.lengths for cut in cuts], axis=0)
        inputs, targets = (np.empty(length, np.int32) for length in ends[-1])
        begins = ends - [cut.lengths for cut in cuts]
        self.write_examples(cuts, begins, inputs, targets)
        examples = [
            Example(inputs[s:s_end], targets[t:t_end])
            for (s, t), (s_end, t_end) in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        pieces = [
            Piece(*cut[:4], example, cut.images)
            for cut, example in zip(cuts, examples, strict=True)
        ]
        return pieces, following

    def cut_row(self, row: int, cursor: Cursor) -> tuple[list[Cut], Cursor]:
        """As `next_row`, but only what its pieces will be."""
        places: list[int] = cursor.tolist()
        inputs_left, targets_left = self.room
        slots_left = 0 if self.images is None else self.images.per_row
        cuts: list[Cut] = []
        number, following = self._choose(row, places[0]), self._choose(row, places[0] + 1)
        while True:
            task, sizes = self.tasks[number], self._sizes[number]
            place = 1 + 2 * task.source
            document, content = self._document(task.source, row, places, place)
            what: Job | ImageExample
            start = places[place + 1]
            if isinstance(content, ImageExample):
                assert isinstance(task.denoiser, ImagePrefix)
                inputs, targets = task.denoiser.lengths(content, self.mixture.special)
                # Alone it fits: `_read` has seen to that.
                if inputs > inputs_left or targets > targets_left or content.images > slots_left:
                    break
                what, lengths = content, (inputs, targets)
                length = remaining = len(content.ids)
                slots_left -= content.images
            else:
                assert sizes is not None
                assert isinstance(task.denoiser, Denoiser)
                remaining = len(content) - start
                most, fair = fair_length(sizes, self._sizes[following], inputs_left, targets_left)
                # In very unequal room even the longest piece is small: a row is never left empty.
                if cuts and most < min(remaining, self._smallest_piece):
                    break
                length = min(remaining, fair)
                lengths = inputs, targets = sizes.lengths(length)
                tokens, bits = content[start : start + length], self._noise(row, places[0])
                what = Job(task.denoiser, tokens, bits, lengths)
            cuts.append(Cut(number, document, start, length, lengths, what))
            inputs_left -= inputs
            targets_left -= targets
            if length == remaining:
                places[place] += 1
                places[place + 1] = 0
            else:
                places[place + 1] = start + length
            places[0] += 1
            number, following = following, self._choose(row, places[0] + 1)
        return cuts, np.array(places, cursor.dtype)

    def write_examples(
        self,
        cuts: Sequence[Cut],
        begins: Int[np.ndarray, "cuts 2"],
        inputs: Int[np.ndarray, " inputs"],
        targets: Int[np.ndarray, " targets"],
    ) -> None:
        """Writes the examples that cuts become.

        Args:
            cuts: in the order of their places.
            begins: where the inputs and the targets of each begin.
            inputs: int32 memory, of which nothing but the places of examples is touched.
            targets: the same of the other side.
        """
        jobs, of_jobs = [], []
        for i, cut in enumerate(cuts):
            if isinstance(cut.content, Job):
                jobs.append(cut.content)
                of_jobs.append(i)
                continue
            prefix = self.tasks[cut.task].denoiser
            assert isinstance(prefix, ImagePrefix)
            example = prefix(cut.content, self.mixture.special)
            for out, at, ids in zip((inputs, targets), begins[i], example, strict=True):
                out[at : at + len(ids)] = ids
        denoise(jobs, begins[of_jobs], self.mixture.special, inputs, targets)

    def piece_images(self, piece: Piece | Cut) -> np.ndarray:
        """The images of a piece that has some, each as `images.slot` says."""
        examples = self._image_examples[self.tasks[piece.task].source]
        assert examples is not None
        return examples.images(piece.document)

    def _document(
        self, source: int, row: int, places: list[int], place: int
    ) -> tuple[int, Content]:
        """Number and content of the current document; steps past used-up ones.

        Args:
            source: number of the source.
            row: number of the row.
            places: the row's cursor, changed where documents are passed over.
            place: where the draw and the offset of the source stand in it.
        """
        for _ in range(MOST_EMPTY_DOCUMENTS):
            draw = places[place]
            cached = self._current.get((row, source))
            if cached is None or cached[0] != draw:
                number = self.document_number(source, row, draw)
                cached = draw, number, self._read(source, number)
                self._current[row, source] = cached
            _, number, content = cached
            if places[place + 1] < len(
                content.ids if isinstance(content, ImageExample) else content
            ):
                return number, content
            places[place] = draw + 1
            places[place + 1] = 0
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
        prefix = self.mixture.sources[source].denoisers[0]
        assert isinstance(prefix, ImagePrefix)
        inputs, targets = prefix.lengths(example, self.mixture.special)
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


def is_sequential(documents: TokenSource | ImageExamples) -> bool:
    """Whether a source can only be read forward."""
    return getattr(documents, "sequential", False)


def fair_length(own: Sizes, following: Sizes | None, inputs: int, targets: int) -> tuple[int, int]:
    """How long a piece may be in the room that is left, and how long it should be.

    Denoisers fill the two sides unequally: prefix language modelling three times as many targets as
    inputs, 15% corruption the reverse. Where this example and the following one complement each
    other, both sides are filled by shortening each a little: with (a, b) and (c, d) the shares of
    inputs and targets that each fills at its longest, p and q solve p (a, b) + q (c, d) = (1, 1).

    Args:
        own: of this example's denoiser.
        following: of the next example's; None: it does not shorten itself for others either.
        inputs: encoder tokens that the row has room for.
        targets: decoder tokens.

    Returns:
        The longest piece that fits, and the length that leaves the following example its share.
    """
    most = own.longest(inputs, targets)
    other = 0 if following is None else following.longest(inputs, targets)
    if following is None or not most or not other:
        return most, most
    own_inputs, own_targets = own.lengths(most)
    next_inputs, next_targets = following.lengths(other)
    a, b = own_inputs / inputs, own_targets / targets
    c, d = next_inputs / inputs, next_targets / targets
    determinant = a * d - b * c
    if abs(determinant) < 1e-6:
        return most, most
    p, q = (d - c) / determinant, (a - b) / determinant
    if not (SMALLEST_SHARE <= p < 1 and SMALLEST_SHARE <= q < 1):
        return most, most
    return most, max(int(p * most), 1)
