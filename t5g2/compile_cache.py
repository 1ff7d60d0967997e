"""What XLA has compiled is kept on disk, so that a restarted job begins at once."""

import os
from pathlib import Path

import jax

# Inside a run directory: the next machine, after a preemption, finds it there.
CACHE_DIR = "xla_cache"


def use_compile_cache(run_dir: Path) -> None:
    """Keeps programs that take over a second to compile, unless the user has said where or not to.

    Those for accelerators stay with the run. Those for a CPU suit only CPUs like it: they stay on
    the machine, in the user's cache directory. jax reads `JAX_COMPILATION_CACHE_DIR` itself and
    leaves its cache alone if `JAX_ENABLE_COMPILATION_CACHE` is false.

    Args:
        run_dir: the run's directory.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    if jax.default_backend() == "cpu":
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(home) / "t5g2" / "xla"
    else:
        directory = run_dir.absolute() / CACHE_DIR
    jax.config.update("jax_compilation_cache_dir", str(directory))
