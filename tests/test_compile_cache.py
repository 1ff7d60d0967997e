"""Nothing is compiled twice: not by later steps, not by the next process."""

import os
import re
import subprocess
import sys

import jax
import pytest
from small_run import write_corpus, write_recipe

from t5g2 import cli

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(home / "corpus", standard_library(300_000))
    return write_recipe(home / "recipe.gin", corpus)


def arguments(recipe, run_dir, steps):
    flags = (f"total_steps={steps}", f"stop_at={steps - 2}")
    bindings = [f"--gin.train.{flag}" for flag in flags]
    bindings += ["--gin.evaluation.every=2", "--gin.checkpoints.every=2"]
    return ["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *bindings]


def test_later_steps_evaluations_and_saves_compile_nothing(recipe, tmp_path):
    compiled = []

    def listen(event, _, **__):
        if event == COMPILED:
            compiled[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for steps in (6, 16):
            jax.clear_caches()
            compiled.append(0)
            assert cli.main(arguments(recipe, tmp_path / str(steps), steps)) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled[0] > 0
    assert compiled[0] == compiled[1]


@pytest.mark.slow
def test_a_restarted_job_finds_what_the_first_compiled(recipe, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_")
    } | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_LOG_COMPILES": "1",
    }

    def step_is_found(run_dir):
        ran = subprocess.run(
            [sys.executable, "-m", "t5g2", *arguments(recipe, run_dir, 4)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return bool(re.search(r"cache hit for 'jit_step", ran.stderr, re.IGNORECASE))

    assert not step_is_found(tmp_path / "first")
    assert step_is_found(tmp_path / "second")
