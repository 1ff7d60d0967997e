import itertools
import subprocess
import sys

import numpy as np
import pytest

from t5g2.data import batches
from t5g2.data.loader import RowBatches
from t5g2.data.packing import RowStream
from t5g2.errors import UserError

LENGTHS = {"inputs": 256, "targets": 192}


def test_batches_are_those_that_a_run_is_fed(mixture):
    found = list(itertools.islice(batches(mixture, LENGTHS, batch_size=3, seed=5), 4))
    stream = RowStream(mixture, 3, 256, 192, 5)
    run = iter(RowBatches(stream, stream.start(), 0, 3))
    np.testing.assert_equal(found, [next(run).batch for _ in range(4)])
    assert found[0]["encoder_input_tokens"].shape == (3, 256)
    assert found[0]["decoder_target_tokens"].shape == (3, 192)
    assert set(found[0]["decoder_input_tokens"][:, 0]) == {mixture.special.bos_id}


def test_seeds_give_other_batches(mixture):
    one, other = (next(batches(mixture, LENGTHS, 2, seed=seed)) for seed in (0, 1))
    assert (one["row_digest"] != other["row_digest"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": "quickstart_ul2"}, "takes a t5g2.data.mixture.Mixture, .* 'quickstart_ul2'"),
        ({"feature_lengths": {"inputs": 256}}, r"'inputs' and 'targets', not of \['inputs'\]"),
        ({"feature_lengths": LENGTHS | {"images": 1}}, r"not of \['images', 'inputs', 'targets'\]"),
        ({"feature_lengths": {"inputs": 256, "targets": 0}}, "targets must be at least 1, not 0"),
        ({"feature_lengths": {"inputs": 64, "targets": 64}}, "too short for denoiser span32_15"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_mistakes_are_refused_at_the_call_in_one_line(mixture, arguments, message):
    right = {"mixture": mixture, "feature_lengths": LENGTHS, "batch_size": 2}
    with pytest.raises(UserError, match=message) as error:
        batches(**(right | arguments))
    assert "\n" not in str(error.value)


def test_importing_the_room_is_light():
    code = (
        "import sys, t5g2.data\n"
        "assert not {'numpy', 'grain', 'seqio', 'tensorflow', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
