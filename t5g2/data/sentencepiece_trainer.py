"""Documents to a SentencePiece model in the manner of Gemma's: lossless byte-pair encoding."""

import heapq
import io
import logging
import random
import re
import time
from collections.abc import Iterable, Iterator

from t5g2.errors import UserError

logger = logging.getLogger(__name__)

# Ids 0 to 3 are pad, eos, bos and unk.
FIRST_SENTINEL = 4
# The pieces of an image, in Gemma's order: its beginning, its end, and the place of a token.
START_OF_IMAGE = "<start_of_image>"
END_OF_IMAGE = "<end_of_image>"
IMAGE_TOKEN = "<image_soft_token>"
IMAGE_PIECES = (START_OF_IMAGE, END_OF_IMAGE, IMAGE_TOKEN)

# Training text is sampled in chunks of about this many characters, cut at line ends, so that one
# huge document neither fills the sample nor is left out of it whole.
CHUNK_CHARACTERS = 1 << 14


def train_model(
    documents: Iterable[str],
    *,
    vocab_size: int,
    sentinels: int,
    max_bytes: int,
    seed: int,
    images: bool,
) -> bytes:
    """Trains a model; see `t5g2.data.tokenizer.train_sentencepiece`, which writes it to a file.

    Returns:
        The serialized `ModelProto`: equal bytes for equal arguments.
    """
    import sentencepiece

    sample = sample_chunks(documents, max_bytes, seed)
    if not sample:
        raise UserError(f"no text to train a tokenizer on (within max_bytes={max_bytes})")
    model = io.BytesIO()
    started = time.monotonic()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            # Rarer characters are left to their bytes rather than crowding out words.
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Indentation: runs of spaces become pieces, and a newline is a character like others.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            control_symbols=[
                *(f"<sentinel_{k}>" for k in range(sentinels)),
                *(IMAGE_PIECES if images else ()),
            ],
            # In bytes; the default leaves out longer chunks without a word.
            max_sentence_length=4 * CHUNK_CHARACTERS + 1,
            # The model file records the number of threads, so a machine's own would change it.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from error
    logger.debug(
        "trained %d pieces on %d chunks in %.1f s",
        vocab_size,
        len(sample),
        time.monotonic() - started,
    )
    return model.getvalue()


def sample_chunks(documents: Iterable[str], max_bytes: int, seed: int = 0) -> list[str]:
    """A seeded random sample of the chunks, in their order, of at most `max_bytes` of UTF-8.

    One pass, holding no more than the sample: every chunk draws a number, and while there are too
    many bytes the chunk with the largest number goes.
    """
    draws = random.Random(seed)
    kept: list[tuple[float, int, str, int]] = []
    total = 0
    chunks = (chunk for document in documents for chunk in _chunks(document))
    for order, chunk in enumerate(chunks):
        size = len(chunk.encode())
        heapq.heappush(kept, (-draws.random(), order, chunk, size))
        total += size
        while total > max_bytes:
            total -= heapq.heappop(kept)[-1]
    # The trainer would take U+2581 for a space; a tab it takes for the edge of a piece.
    return [chunk.replace("▁", "\t") for _, _, chunk, _ in sorted(kept, key=lambda k: k[1])]


def _chunks(document: str) -> Iterator[str]:
    start = 0
    while start < len(document):
        stop = start + CHUNK_CHARACTERS
        if stop < len(document):
            stop = document.rfind("\n", start, stop) + 1 or stop
        yield document[start:stop]
        start = stop


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """The user's mistake behind the trainer's error, or the error itself."""
    message = str(error)
    if most := re.search(r"set it to a value <= (\d+)", message):
        return UserError(
            f"the corpus is too small for vocab_size={vocab_size}: "
            f"give more text, or at most {most.group(1)}"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size={vocab_size} has no room for the sentinels, the 256 bytes and the "
            f"characters of the corpus: give at least {least.group(1)}"
        )
    return error
