"""Checkpoints of parameters alone: whatever comes in comes out, one array in memory at a time."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoints import store
from t5g2.checkpoints.store import open_arrays, read_arrays, read_meta, write_parameters
from t5g2.lazy_array import LazyArray

META = {"step": 3, "model": {}, "tokenizer": "tokenizer"}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "a": {"b": rng.normal(size=(3, 50, 7)).astype(jnp.bfloat16)},
        "c": rng.normal(size=(11,)).astype(np.float16),
        "d": rng.normal(size=(129, 5)).astype(np.float32),
    }


def lazy(array):
    return LazyArray(array.shape, array.dtype, array.copy)


def assert_same(restored, params):
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, params)


@pytest.mark.parametrize("make", [lambda array: array, lazy])
@pytest.mark.parametrize("chunk_bytes", [64 << 20, 100])
def test_arrays_come_back_as_they_were(make, chunk_bytes, params, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK_BYTES", chunk_bytes)
    write_parameters(tmp_path, jax.tree.map(make, params), META)
    assert read_meta(tmp_path)["step"] == 3
    assert_same(read_arrays(tmp_path / "params"), params)
    opened = open_arrays(tmp_path / "params")
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), opened) == shapes
    assert_same(jax.tree.map(np.asarray, opened), params)


def test_of_lazy_arrays_no_more_than_one_is_there_when_the_next_is_read(tmp_path):
    made = []

    def read():
        assert sum(array() is not None for array in made) <= 1
        array = np.ones((256, 256), np.float32)
        made.append(weakref.ref(array))
        return array

    params = {f"p{i}": LazyArray((256, 256), np.dtype("f4"), read) for i in range(6)}
    write_parameters(tmp_path, params, META)
    assert len(made) == 6


def test_a_failure_to_read_ends_the_writing_and_says_why(params, tmp_path):
    def fail():
        raise OSError(5, "no disk any more")

    broken = {**params, "c": LazyArray((11,), np.dtype("f2"), fail)}
    with pytest.raises(OSError, match="no disk any more"):
        write_parameters(tmp_path, broken, META)
