"""What the tests of this room share."""

import hypothesis
import numpy as np
import pytest
from reconstruction import SPECIAL, numbered_documents

from t5g2.data.mixture import Mixture, Source

# A busy machine is no failure; the examples are the same in every run.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def documents() -> list[np.ndarray]:
    """2000 documents, log-normally long as those of web text are: median 600 tokens, mean 1300."""
    draws = np.random.default_rng(0).lognormal(np.log(600), 1.25, 2000)
    return numbered_documents([int(n) for n in draws])


@pytest.fixture(scope="session")
def mixture(documents) -> Mixture:
    """T5Gemma 2's UL2 over `documents`."""
    return Mixture(sources=(Source(name="text", documents=documents),), special=SPECIAL)
