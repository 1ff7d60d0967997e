"""Batches in tokens: the rows that follow from them, and how a mesh shares those."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as search
from hypothesis import strategies as st

from t5g2 import settings
from t5g2.errors import UserError
from t5g2.parallel.batch import rows_for, split_batch

RECIPE = "configs/recipes/quickstart.gin"


def mesh(data=1, fsdp=1, tensor=1, processes=1):
    """What `split_batch` reads of a mesh, for more devices than a test has."""
    count = data * fsdp * tensor
    devices = [SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    return SimpleNamespace(
        shape={"data": data, "fsdp": fsdp, "tensor": tensor, "context": 1},
        size=count,
        devices=np.array(devices).reshape(data, fsdp, tensor),
    )


@pytest.mark.parametrize(
    ("lengths", "rows"),
    # The 4.2M tokens of arXiv:2512.14856 at its 16K/16K, and at shorter rows.
    [((16384, 16384), 128), ((512, 512), 4096), ((2048, 512), 1664), ((114, 512), 6656)],
)
def test_the_papers_batch_has_rows_that_pods_can_share(lengths, rows):
    assert rows_for(4_200_000, sum(lengths)) == rows
    assert abs(rows * sum(lengths) / 4_200_000 - 1) <= 0.02


@search(deadline=None)
@given(st.integers(1, 10**6), st.integers(20, 40_000))
def test_rows_are_near_and_no_nearby_number_is_more_even(tokens, row):
    if tokens < row:
        with pytest.raises(ValueError, match="is less than a row"):
            rows_for(tokens, row)
        return
    rows, exact = rows_for(tokens, row), tokens / row

    def evenness(number):
        return number & -number

    near = [n for n in range(int(exact), int(exact) + 2) if n >= 1]
    near += range(max(1, int(exact * 0.98) - 1), int(exact * 1.02) + 2)
    within = [n for n in near if 0.98 * exact <= n <= 1.02 * exact]
    if not within:
        assert rows == round(exact)
    else:
        assert rows in within
        assert evenness(rows) == max(map(evenness, within))
        assert abs(rows - exact) == min(
            abs(n - exact) for n in within if evenness(n) == evenness(rows)
        )


def test_microbatches_are_as_few_as_the_limit_allows_and_equal():
    split = split_batch(mesh(data=4, fsdp=2), 96, (64, 32), rows_per_device=5)
    assert (split.accumulation, split.rows_per_device) == (3, 4)  # 12 rows a device; 5 do not fit
    assert split_batch(mesh(data=8), 96, (64, 32), accumulation=4).rows_per_device == 3
    assert split_batch(mesh(data=8), 96, (64, 32), accumulation=4, rows_per_device=8)[2] == 4
    assert split_batch(mesh(fsdp=8), 96, (64, 32), rows_per_device=1).accumulation == 12
    alone = split_batch(mesh(), 7, (64, 32), rows_per_device=6)
    assert (alone.accumulation, alone.rows_per_device) == (7, 1)
    # Tensor parallel devices work on the same rows.
    assert split_batch(mesh(data=2, tensor=4), 96, (64, 32)).rows_per_device == 48


def test_a_batch_says_itself_in_a_line():
    split = split_batch(mesh(data=4, fsdp=2, processes=2), 4096, (512, 512), rows_per_device=64)
    assert str(split) == (
        "4,096 rows of 512 + 512 tokens, 4,194,304 in all; 8 microbatches of 64 rows on each of "
        "8 devices; 2 processes"
    )
    assert split.to_json() == {
        "rows": 4096,
        "inputs": 512,
        "targets": 512,
        "tokens": 4_194_304,
        "accumulation": 8,
        "rows_per_device": 64,
        "devices": 8,
        "processes": 2,
    }


def test_rows_that_devices_cannot_share_are_refused_with_some_that_they_can():
    with pytest.raises(UserError, match=r"multiple of 24 .*train.rows = 4080 or 4104 would do"):
        split_batch(mesh(data=24), 4096, (512, 512))
    with pytest.raises(UserError, match=r"train.rows = 8 would do"):
        split_batch(mesh(data=8), 6, (512, 512))


def test_a_run_is_its_rows_however_they_were_said(tmp_path):
    rows = settings.read_settings([RECIPE])
    in_tokens = ("train.rows=None", f"train.tokens_per_batch={8 * 384 + 20}")
    tokens = settings.read_settings([RECIPE], in_tokens)
    assert tokens.rows == rows.rows == 8
    assert tokens == rows
    assert tokens.hash() == rows.hash()
    (tmp_path / "config.gin").write_text(tokens.to_gin())
    assert settings.run_settings(tmp_path) == rows
    elsewhere = settings.read_settings([RECIPE], (*in_tokens, "mesh.fsdp=4"))
    assert settings.check_same_run(tmp_path, elsewhere) == []
    more = settings.read_settings([RECIPE], ("train.rows=None", "train.tokens_per_batch=6144"))
    with pytest.raises(UserError, match=r"train.rows: 8 -> 16"):
        settings.check_same_run(tmp_path, more)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (("train.tokens_per_batch=4096",), "rows = 8 and tokens_per_batch = 4096 say the same"),
        (("train.rows=None",), "rows or tokens_per_batch must be given"),
        (("train.rows=None", "train.tokens_per_batch=383"), "less than a row of 384 tokens"),
        (("train.rows=None", "train.tokens_per_batch=0"), "tokens_per_batch must be at least 1"),
        (("train.rows_per_device=0",), "rows_per_device must be at least 1"),
        (
            ("train.rows=None", "train.tokens_per_batch=3072", "train.accumulation=3"),
            r"accumulation \(3\) must divide rows \(8\)",
        ),
    ],
)
def test_impossible_batches_are_refused(bindings, message):
    with pytest.raises(UserError, match=message) as refused:
        settings.read_settings([RECIPE], bindings)
    assert "\n" not in str(refused.value)
