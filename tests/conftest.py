"""Fixtures that several rooms share."""

import errno
import os
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_run import write_corpus, write_recipe

from t5g2.data.tokenizer import SentencePieceTokenizer, train_sentencepiece

# Compiling is most of what the tests do; what one has compiled, others, and later runs, reuse.
# jax reads this when it is imported, by tests and by the processes that they start.
_CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# On programs as small as these, LLVM's optimizations take longer than they save.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def _standard_library(max_bytes: int, skip: int = 0) -> list[str]:
    """Python's own modules, in the order of their names: real text that is on every machine."""
    documents: list[str] = []
    total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[skip:]:
        text = path.read_bytes().decode("utf-8", errors="replace")
        documents.append(text)
        total += len(text.encode())
        if total >= max_bytes:
            break
    return documents


@pytest.fixture(scope="session")
def standard_library() -> Callable[..., list[str]]:
    """`standard_library(max_bytes, skip=0)`: that many bytes of whole modules, as documents."""
    return _standard_library


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """1000 ids, 64 sentinels, trained on 300 kB of the standard library."""
    return train_sentencepiece(
        _standard_library(300_000),
        tmp_path_factory.mktemp("tokenizer") / "tiny.model",
        vocab_size=1000,
        sentinels=64,
        max_bytes=300_000,
    )


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gin file of the small run."""
    home = tmp_path_factory.mktemp("recipe")
    return write_recipe(
        home / "recipe.gin", write_corpus(home / "corpus", _standard_library(300_000))
    )


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the small run, to which nothing happened."""
    from recovery import train

    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(recipe, run_dir) == 0
    return run_dir


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`full_disk(n, m, ...)`: the n-th, m-th, ... checkpoint from now finds no room."""
    from t5g2.checkpoints import keeping

    write, count = keeping.write_manifest, 0

    def fill(*numbers: int) -> None:
        def write_or_fail(checkpoint: Path, facts: Mapping[str, Any]) -> None:
            nonlocal count
            count += 1
            if count in numbers:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(checkpoint))
            write(checkpoint, facts)

        monkeypatch.setattr(keeping, "write_manifest", write_or_fail)

    monkeypatch.setattr(keeping, "_DELAYS_AT_THE_END", (0.0, 0.0))
    return fill
