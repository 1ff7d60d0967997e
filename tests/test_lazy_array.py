"""Arrays are read in turn, one ahead, and none is kept."""

import gc
import threading
import weakref

import numpy as np
import pytest

from t5g2.lazy_array import LazyArray, read_in_turn


def test_the_next_array_is_read_while_one_is_worked_on_and_no_other():
    read = [threading.Event() for _ in range(4)]

    def lazy(i):
        def now():
            read[i].set()
            return np.full(3, i)

        return LazyArray((3,), np.dtype(int), now)

    for i, array in enumerate(read_in_turn([lazy(i) for i in range(4)])):
        assert array.tolist() == [i] * 3
        if i + 1 < 4:
            assert read[i + 1].wait(10)
        assert not any(event.is_set() for event in read[i + 2 :])


def test_an_array_is_let_go_with_the_one_after_it():
    seen = []
    arrays = [LazyArray((3,), np.dtype(float), lambda: np.zeros(3)) for _ in range(4)]
    for array in read_in_turn(arrays):
        gc.collect()
        assert all(reference() is None for reference in seen)
        seen.append(weakref.ref(array))
        del array


def test_large_arrays_are_not_read_ahead(monkeypatch):
    monkeypatch.setattr("t5g2.lazy_array._AHEAD_BYTES", 8)
    made = []

    def lazy(i):
        return LazyArray((3,), np.dtype(float), lambda: made.append(i) or np.zeros(3))

    for i, _ in enumerate(read_in_turn([lazy(0), lazy(1)])):
        assert made == list(range(i + 1))


def test_an_array_that_cannot_be_read_ends_the_turn():
    def fail():
        raise OSError("gone")

    arrays = read_in_turn([np.zeros(3), LazyArray((3,), np.dtype(float), fail)])
    assert next(arrays).tolist() == [0] * 3
    with pytest.raises(OSError, match="gone"):
        next(arrays)
