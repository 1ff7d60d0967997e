"""Documents to denoise, and what undoes it by the definition of the format alone."""

import threading
from collections.abc import Sequence

import numpy as np

from t5g2.data.ul2 import SpecialTokens

SPECIAL = SpecialTokens(2, 1, range(10, 1010))


def numbered_documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which every token occurs once in the whole corpus, so that none can hide."""
    tokens = np.arange(2000, 2000 + sum(lengths), dtype=np.int32)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def hidden_spans(targets: Sequence[int] | np.ndarray, special: SpecialTokens) -> list[list[int]]:
    """The spans in the targets; checks that sentinels 0, 1, .. open them and eos ends the last."""
    *spans, end = np.asarray(targets).tolist()
    assert end == special.eos_id
    found: list[list[int]] = []
    for token in spans:
        if token in special.sentinel_ids:
            assert token == special.sentinel_ids[len(found)]
            found.append([])
        else:
            assert token not in (special.bos_id, special.eos_id)
            found[-1].append(token)
    return found


def reconstruct(
    inputs: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, special: SpecialTokens
) -> tuple[list[int], list[bool]]:
    """The piece that was denoised, and which of its tokens were hidden."""
    spans = iter(hidden_spans(targets, special))
    rest = np.asarray(inputs).tolist()
    if special.bos_on_inputs:
        assert rest.pop(0) == special.bos_id
    piece: list[int] = []
    hidden: list[bool] = []
    used = []
    for token in rest:
        if token in special.sentinel_ids:
            used.append(token)
            span = next(spans)
            piece += span
            hidden += [True] * len(span)
        else:
            assert token not in (special.bos_id, special.eos_id)
            piece.append(int(token))
            hidden.append(False)
    assert next(spans, None) is None, "a span of the targets has no sentinel in the inputs"
    assert used == list(special.sentinel_ids[: len(used)])
    return piece, hidden


class NotSendableError(Exception):
    """An exception that no pickle brings back."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class Faulty:
    """A source that cannot be read, in a module that other processes import fast."""

    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> np.ndarray:
        raise self.kind(f"document 0 of {len(self)}")
