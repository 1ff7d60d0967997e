"""The command ``t5g2 <job>``: a table of jobs, each imported only when it is called.

A job is a module with ``run(args) -> int``; `t5g2.arguments` declares what it takes. Exit codes:
0 done; 2 the user's mistake, in one line on stderr; 3 stopped by `bad_steps`; 75 hung, to be
started again; 130 (SIGINT) or 143 (SIGTERM) stopped on
request; 141 the reader of stdout is gone; 1 anything else, with its traceback.
"""

import argparse
import gc
import importlib
import io
import itertools
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from t5g2 import arguments
from t5g2.arguments import GIN_PREFIX
from t5g2.errors import UserError


class Job(NamedTuple):
    """Where a job lives, what it does in one line, and what declares its arguments."""

    module: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


JOBS = {
    "train": Job(
        "t5g2.train", "pretrain a model, or resume the run of a run directory", arguments.train
    ),
    "cache": Job(
        "t5g2.cache", "tokenise a run's documents once, as shards to train from", arguments.cache
    ),
    "import": Job(
        "t5g2.import_weights",
        "turn a Hugging Face directory of T5Gemma 2 or Gemma 3 into a checkpoint",
        arguments.import_weights,
    ),
    "evaluate": Job(
        "t5g2.evaluate", "held-out loss of a checkpoint, or seqio Tasks", arguments.evaluate
    ),
    "long_context": Job(
        "t5g2.long_context",
        "needles, chains, words and rounds in contexts of any length",
        arguments.long_context,
    ),
    "generate": Job(
        "t5g2.generate", "continue or infill text with a checkpoint", arguments.generate
    ),
    "average": Job("t5g2.average", "average the last checkpoints of a run", arguments.average),
    "export": Job(
        "t5g2.export", "write a checkpoint as a Hugging Face directory", arguments.export
    ),
    "plan": Job("t5g2.plan", "what a recipe needs on a machine that is not there", arguments.plan),
    "inspect": Job(
        "t5g2.inspect", "look at data, a configuration, a checkpoint or a run", arguments.inspect
    ),
}

# Optional packages a job may import, and the extra of t5g2 that installs each.
EXTRAS = {
    "apache_beam": "beam",
    "seqio": "seqio",
    "tensorflow": "seqio",
    "tensorflow_datasets": "seqio",
    "tensorflow_text": "seqio",
    "torch": "test",
    "transformers": "test",
    "wandb": "wandb",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job.

    Args:
        argv: Arguments after the program's name; the process's own by default.

    Returns:
        The exit code. Exceptions that are no mistake of the user leave this function.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _prepare_process()
    name = f"t5g2 {argv[0]}" if argv and argv[0] in JOBS else "t5g2"
    try:
        try:
            code = _dispatch(argv)
        except SystemExit as stop:  # argparse, after --help or an error
            if not isinstance(stop.code, int):
                raise
            code = stop.code
        sys.stdout.flush()  # Here, where a broken pipe is caught, not while the interpreter ends.
        return code
    except UserError as error:
        return _fail(name, str(error))
    except ModuleNotFoundError as error:
        package = error.name or ""
        if not package or "." in package or package == "t5g2":
            raise
        command = f"pip install 't5g2[{EXTRAS[package]}]'" if package in EXTRAS else None
        return _fail(name, f"the package '{package}' is not installed; {command or 'install it'}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        return 141


class Parser(argparse.ArgumentParser):
    """Reports each mistake in one line, an unknown option with the nearest known one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(self.prog, message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Before argparse complains of a missing --run_dir when the user wrote --rundir. A parser
        # with subcommands leaves this to them.
        if self._subparsers is None:
            for token in itertools.takewhile(lambda token: token != "--", args):
                option = token.partition("=")[0]
                is_option = option.startswith("--") and " " not in option  # argparse's own rule
                if is_option and option not in self._option_string_actions:
                    self._unknown_option(option)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._unknown_option(unknown[0])
        return parsed

    def _unknown_option(self, option: str) -> NoReturn:
        from t5g2.config import did_you_mean

        self.error(
            f"unknown argument '{option}'{did_you_mean(option, self._option_string_actions)}"
        )


def _prepare_process() -> None:
    """Sets what libraries read when a job imports them."""
    # A second start of the same program compiles nothing.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "t5g2", "xla"))
    # Orbax warns that one item of a checkpoint, read alone, is no whole checkpoint.
    logging.getLogger("absl").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "Metadata file does not exist" not in str(record.msg)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] not in JOBS:
        return _without_job(argv)
    began = time.time()
    args = parse_job(argv)
    args.began = began
    return _import(JOBS[argv[0]].module).run(args)


def _import(module: str) -> ModuleType:
    """Imports a job's module without looking for garbage in it, now or at the end.

    What modules hold lasts as long as the process; going through it again and again is a quarter of
    the time that a job takes to start and end.
    """
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        imported = importlib.import_module(module)
    finally:
        gc.enable()
    gc.freeze()
    return imported


def parse_job(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a job, whose name comes first; mistakes end the program with a line."""
    name, job = argv[0], JOBS[argv[0]]
    parser = Parser(prog=f"t5g2 {name}", description=f"{job.summary[0].upper()}{job.summary[1:]}.")
    job.add_arguments(parser)
    rest, bindings = _take_gin_bindings(argv[1:])
    args = parser.parse_args(rest)
    if "gin_bindings" in args:
        args.gin_bindings = bindings
    elif bindings:
        raise UserError(f"takes no gin settings: {GIN_PREFIX}{bindings[0]}")
    return args


def _without_job(argv: list[str]) -> int:
    width = max(map(len, JOBS))
    parser = Parser(
        prog="t5g2",
        usage="t5g2 JOB [options]",
        description="Pretrain T5Gemma-2-style encoder-decoders with the UL2 objective, in JAX.",
        epilog="\n".join(
            ["jobs:"]
            + [f"  {name:{width}}  {job.summary}" for name, job in JOBS.items()]
            + ["", "`t5g2 JOB --help` tells a job's options."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if argv and not argv[0].startswith("-"):
        from t5g2.config import did_you_mean

        parser.error(f"no job '{argv[0]}'{did_you_mean(argv[0], JOBS) or _known_jobs()}")
    if parser.parse_args(argv).version:
        from importlib.metadata import version

        print(f"t5g2 {version('t5g2')}")
        return 0
    parser.error(f"no job given{_known_jobs()}")


def _known_jobs() -> str:
    return f"; the jobs are {', '.join(JOBS)}"


def _take_gin_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits off ``--gin.NAME=VALUE`` and ``--gin.NAME VALUE``, which argparse cannot declare.

    Returns:
        The other tokens, and the bindings as ``NAME=VALUE``.

    Raises:
        UserError: A binding has no value.
    """
    rest: list[str] = []
    bindings: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--":
            return [*rest, token, *tokens], bindings
        if not token.startswith(GIN_PREFIX):
            rest.append(token)
            continue
        binding = token.removeprefix(GIN_PREFIX)
        if "=" not in binding:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise UserError(f"{token} has no value; write {token}=VALUE")
            binding = f"{binding}={value}"
        bindings.append(binding)
    return rest, bindings


def _fail(name: str, message: str) -> int:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _stdout_is_broken() -> bool:
    """Whether stdout is the pipe that broke; if so, silences the interpreter's last flush of it."""
    try:
        stdout = sys.stdout.fileno()
    except io.UnsupportedOperation:  # Not a file: a notebook's, or a test's.
        return False
    poll = select.poll()
    poll.register(stdout, 0)  # Errors and hang-ups are always reported.
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
