"""A t5g2 tokenizer as a seqio vocabulary. seqio, hence TensorFlow, is imported on first use."""

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError

if TYPE_CHECKING:
    import seqio


def seqio_vocabulary(tokenizer: Tokenizer) -> "seqio.Vocabulary":
    """Wraps a tokenizer for `seqio.Feature`, Tasks and Mixtures.

    The vocabulary encodes without bos and eos, has no extra ids (the sentinels are ids of the
    tokenizer's own), decodes through the first eos with pad, bos and eos left out and sentinels
    shown, and can be pickled. Two of them are equal when their tokenizer files and sentinels are.

    Raises:
        UserError: seqio is not installed, or the tokenizer pads with an id other than 0, which
            seqio takes for padding throughout.
    """
    if tokenizer.pad_id != 0:
        raise UserError(f"seqio needs pad to be id 0, but {tokenizer.path} has {tokenizer.pad_id}")
    return _vocabulary_class()(tokenizer)


@functools.cache
def _vocabulary_class() -> Any:
    try:
        import seqio
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"seqio Tasks need seqio and TensorFlow ({error}): pip install 't5g2[seqio]'"
        ) from None

    class TokenizerVocabulary(seqio.Vocabulary):
        """A `Tokenizer` behind seqio's interface."""

        def __init__(self, tokenizer: Tokenizer) -> None:
            super().__init__(extra_ids=0)
            self.tokenizer = tokenizer

        @property
        def bos_id(self) -> int:
            return self.tokenizer.bos_id

        @property
        def eos_id(self) -> int:
            return self.tokenizer.eos_id

        @property
        def pad_id(self) -> int:
            return self.tokenizer.pad_id

        @property
        def unk_id(self) -> int:
            return self.tokenizer.unk_id

        @property
        def _base_vocab_size(self) -> int:
            return self.tokenizer.vocab_size

        def _encode(self, s: str) -> Sequence[int]:
            return self.tokenizer.encode(s).tolist()

        def _decode(self, ids: Iterable[int]) -> str:
            unseen = {self.pad_id, self.bos_id, self.eos_id}
            return self.tokenizer.decode([token for token in ids if token not in unseen])

        def _encode_tf(self, s: Any) -> Any:
            def encode(text: np.ndarray | bytes) -> np.ndarray:
                return self.tokenizer.encode(np.asarray(text).item().decode())

            ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
            return tf.ensure_shape(ids, [None])

        def _decode_tf(self, ids: Any) -> Any:
            def decode(rows: np.ndarray) -> np.ndarray:
                texts = np.empty(rows.shape[:-1], object)
                for place in np.ndindex(texts.shape):
                    texts[place] = self.decode(rows[place].tolist()).encode()
                return texts

            texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
            return tf.ensure_shape(texts, ids.shape[:-1])

        def __eq__(self, other: object) -> bool:
            return isinstance(other, TokenizerVocabulary) and self._key() == other._key()

        def __hash__(self) -> int:
            return hash(self._key())

        def _key(self) -> tuple[str, range]:
            return self.tokenizer.fingerprint, self.tokenizer.sentinel_ids

        def __reduce__(self) -> tuple[Any, ...]:
            return seqio_vocabulary, (self.tokenizer,)

        def __repr__(self) -> str:
            return f"seqio_vocabulary({self.tokenizer!r})"

    return TokenizerVocabulary
