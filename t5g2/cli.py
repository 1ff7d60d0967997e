"""The command ``t5g2 <job>``: a table of jobs, each imported only when it is called.

A job is a module with ``add_arguments(parser)`` and ``run(args) -> int``; its top level imports
nothing heavy, so that ``--help`` is immediate. Exit codes: 0 done; 2 the user's mistake, in one
line on stderr; 130 interrupted; 141 the reader of stdout is gone; 1 anything else, with its
traceback.
"""

import argparse
import importlib
import io
import itertools
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from t5g2.errors import UserError


class Job(NamedTuple):
    """Where a job lives, and what it does in one line."""

    module: str
    summary: str


JOBS = {
    "train": Job("t5g2.train", "pretrain a model, or resume the run of a run directory"),
    "evaluate": Job("t5g2.evaluate", "held-out loss of a checkpoint, per denoiser"),
    "generate": Job("t5g2.generate", "continue or infill text with a checkpoint"),
    "average": Job("t5g2.average", "average the last checkpoints of a run"),
    "export": Job("t5g2.export", "write a checkpoint as a Hugging Face directory"),
    "inspect": Job("t5g2.inspect", "look at data, a configuration, a checkpoint or a run"),
}

# Optional packages a job may import, and the extra of t5g2 that installs each.
EXTRAS = {
    "seqio": "seqio",
    "tensorflow": "seqio",
    "tensorflow_datasets": "seqio",
    "tensorflow_text": "seqio",
    "torch": "test",
    "transformers": "test",
}

_GIN_PREFIX = "--gin."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job.

    Args:
        argv: Arguments after the program's name; the process's own by default.

    Returns:
        The exit code. Exceptions that are no mistake of the user leave this function.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
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


def add_gin_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the gin flags: ``gin_file``, ``gin_bindings``, ``gin_search_paths``, all list[str].

    They are the arguments of `t5g2.config.parse`.
    """
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file; may be repeated, later ones win. configs/... names the shipped ones too",
    )
    # Only for --help and as the default: `_take_gin_bindings` removes these flags before argparse.
    group.add_argument(
        f"{_GIN_PREFIX}NAME",
        dest="gin_bindings",
        action="append",
        default=[],
        metavar="VALUE",
        help="set a setting (--gin.train.seed=1) or macro (--gin.STEPS=10); text needs no quotes",
    )
    group.add_argument(
        "--gin_search_paths",
        action="extend",
        type=lambda text: [path for path in text.split(",") if path],
        default=[],
        metavar="DIR[,DIR]",
        help="further directories to look for gin files in",
    )


class _Parser(argparse.ArgumentParser):
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


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] not in JOBS:
        return _without_job(argv)
    name, job = argv[0], JOBS[argv[0]]
    module = importlib.import_module(job.module)
    parser = _Parser(prog=f"t5g2 {name}", description=f"{job.summary[0].upper()}{job.summary[1:]}.")
    module.add_arguments(parser)
    rest, bindings = _take_gin_bindings(argv[1:])
    args = parser.parse_args(rest)
    if "gin_bindings" in args:
        args.gin_bindings = bindings
    elif bindings:
        raise UserError(f"takes no gin settings: {_GIN_PREFIX}{bindings[0]}")
    return module.run(args)


def _without_job(argv: list[str]) -> int:
    width = max(map(len, JOBS))
    parser = _Parser(
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
        if not token.startswith(_GIN_PREFIX):
            rest.append(token)
            continue
        binding = token.removeprefix(_GIN_PREFIX)
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
