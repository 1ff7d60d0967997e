"""Batches whose loss is not finite, or enormous, in the very step that is compiled."""

import os
import signal
import sys

import jax.numpy as jnp
import numpy as np

from t5g2.training import step


def poison(digests, factor=float("nan")):
    """From now on the loss of batches with these digests is multiplied; returns what undoes it."""
    loss_sums = step.loss_sums
    wanted = np.array(digests, np.uint32)  # of numpy: jax may not have started yet

    def poisoned(config, params, batch, *args):
        total, sums = loss_sums(config, params, batch, *args)
        hit = jnp.isin(jnp.sum(batch["row_digest"], dtype=jnp.uint32), wanted)
        by = jnp.where(hit, factor, 1.0)
        return total * by, sums._replace(nll=sums.nll * by)

    step.loss_sums = poisoned
    return lambda: setattr(step, "loss_sums", loss_sums)


def _killed_at(where, when):
    """This process is killed after the `when`-th return of a function, named module:function."""
    module, name = where.split(":")
    module = __import__(module, fromlist=["x"])
    function, calls = getattr(module, name), []

    def then_die(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, then_die)


if __name__ == "__main__":  # python poison.py DIGESTS WHERE WHEN train ...
    from t5g2 import cli

    poison([int(digest, 16) for digest in sys.argv[1].split(",")])
    if sys.argv[2]:
        _killed_at(sys.argv[2], int(sys.argv[3]))
    sys.exit(cli.main(sys.argv[4:]))
