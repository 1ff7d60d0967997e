"""The command `t5g2`: what jobs are given, and what comes out when they fail."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from t5g2 import cli

HEAVY = {"jax", "flax", "tensorflow", "seqio", "gin", "rich", "matplotlib", "numpy", "orbax"}

FAKE_JOB = """
from t5g2.arguments import add_gin_arguments
from t5g2.errors import UserError

def add_arguments(parser):
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--text")
    add_gin_arguments(parser)

def run(args):
    if args.text == "user error":
        raise UserError("the corpus is empty;\\nadd text")
    if args.text == "interrupt":
        raise KeyboardInterrupt
    if args.text == "pipe":
        raise BrokenPipeError("a worker died")
    if args.text == "lines":
        for number in range(100_000):
            print(number)
    if (args.text or "").startswith("import "):
        exec(args.text)
    print(args.run_dir, args.text, args.gin_file, args.gin_bindings, args.gin_search_paths)
    return 0
"""

SUBCOMMAND_JOB = """
from t5g2.arguments import add_gin_arguments

def add_arguments(parser):
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    add_gin_arguments(parts.add_parser("config"))
    parts.add_parser("run").add_argument("--run_dir", required=True)

def run(args):
    print(args)
    return 0
"""


@pytest.fixture(autouse=True)
def fake_jobs(tmp_path, monkeypatch):
    (tmp_path / "fake_job.py").write_text(FAKE_JOB)
    (tmp_path / "fake_parts.py").write_text(SUBCOMMAND_JOB)
    monkeypatch.syspath_prepend(tmp_path)
    for name, module in (("fake", "fake_job"), ("parts", "fake_parts")):
        sys.modules.pop(module, None)
        declare = importlib.import_module(module).add_arguments
        monkeypatch.setitem(cli.JOBS, name, cli.Job(module, "a job for tests", declare))


def python(code, *, cwd, **options):
    """Runs code that has `main` with the fake job, in a process of its own."""
    prelude = (
        "import sys; from t5g2 import cli; from t5g2.cli import main\n"
        "import fake_job\n"
        "cli.JOBS['fake'] = cli.Job('fake_job', 'a job for tests', fake_job.add_arguments)\n"
    )
    path = os.pathsep.join([str(cwd), str(Path(cli.__file__).parent.parent)])
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        stderr=subprocess.PIPE,
        check=False,
        **options,
    )


# ---- What a job is given -------------------------------------------------------------------------


def test_gin_flags_reach_the_job_in_every_spelling(capsys):
    command = (
        "fake --gin_file a.gin --gin.train.seed=1 --run_dir R --gin.STEPS -5 --gin_file=b.gin "
        "--gin.corpus.path=/my=text --gin_search_paths x,y --gin_search_paths z"
    )
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == (
        "R None ['a.gin', 'b.gin'] ['train.seed=1', 'STEPS=-5', 'corpus.path=/my=text'] "
        "['x', 'y', 'z']\n"
    )


def test_without_gin_flags_the_lists_are_empty_each_time(capsys):
    cli.main(["fake", "--run_dir", "R", "--gin_file", "a", "--gin_search_paths", "b", "--gin.c=1"])
    capsys.readouterr()
    cli.main(["fake", "--run_dir", "R"])
    assert capsys.readouterr().out == "R None [] [] []\n"


def test_subcommands_take_gin_flags(capsys):
    assert cli.main(["parts", "config", "--gin.train.seed=1"]) == 0
    assert "gin_bindings=['train.seed=1']" in capsys.readouterr().out


def test_a_value_may_look_like_an_option_when_it_has_spaces(capsys):
    assert cli.main(["fake", "--run_dir", "R", "--text", "--no option"]) == 0
    assert capsys.readouterr().out.startswith("R --no option ")


def test_help_of_a_job_shows_its_flags_and_those_of_gin(capsys):
    assert cli.main(["fake", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--run_dir", "--gin_file", "--gin.NAME", "A job for"))


def test_help_lists_every_job(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and job.summary in shown for name, job in cli.JOBS.items())


def test_version_is_the_installed_one(capsys):
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"t5g2 {version('t5g2')}\n"


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "t5g2: error: no job 'trian'; did you mean 'train'?"),
        ("xyzzy", "t5g2: error: no job 'xyzzy'; the jobs are train, "),
        ("", "t5g2: error: no job given; the jobs are train, "),
        ("--versio", "t5g2: error: unknown argument '--versio'; did you mean '--version'?"),
        ("fake --rundir R", "t5g2 fake: error: unknown argument '--rundir'; did you mean '--run_d"),
        ("fake --run R", "t5g2 fake: error: unknown argument '--run'; did you mean '--run_dir'?"),
        ("fake --run_dir R more", "t5g2 fake: error: unknown argument 'more'"),
        ("fake --run_dir R -x", "t5g2 fake: error: unknown argument '-x'"),
        ("fake", "t5g2 fake: error: the following arguments are required: --run_dir"),
        ("fake --run_dir", "t5g2 fake: error: argument --run_dir: expected one argument"),
        ("fake --run_dir R --gin.a", "t5g2 fake: error: --gin.a has no value; write --gin.a=VALUE"),
        ("fake --gin.a --run_dir R", "t5g2 fake: error: --gin.a has no value; write --gin.a=VALUE"),
        ("parts run --run_dir R --gin.a=1", "t5g2 parts: error: takes no gin settings: --gin.a=1"),
        ("parts run --rundir R", "t5g2 parts run: error: unknown argument '--rundir'; did you"),
        ("parts rum", "t5g2 parts: error: argument PART: invalid choice: 'rum'"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(capsys, command, message):
    assert cli.main(command.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1


def test_a_user_error_of_the_job_is_one_line_and_exit_code_2(capsys):
    assert cli.main(["fake", "--run_dir", "R", "--text", "user error"]) == 2
    assert capsys.readouterr().err == "t5g2 fake: error: the corpus is empty; add text\n"


@pytest.mark.parametrize(
    ("package", "hint"), [("seqio", "pip install 't5g2[seqio]'"), ("no_such_package", "install it")]
)
def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch, package, hint):
    monkeypatch.setitem(sys.modules, package, None)  # Makes `import` say that there is none.
    assert cli.main(["fake", "--run_dir", "R", "--text", f"import {package}"]) == 2
    expected = f"t5g2 fake: error: the package '{package}' is not installed; {hint}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("module", ["t5g2.no_such_room", "json.no_such_part"])
def test_a_missing_module_of_an_installed_package_is_a_bug_and_keeps_its_traceback(module):
    with pytest.raises(ModuleNotFoundError):
        cli.main(["fake", "--run_dir", "R", "--text", f"import {module}"])


def test_another_exception_keeps_its_traceback_and_exits_1(tmp_path):
    code = "sys.exit(main(['fake', '--run_dir', 'R', '--text', 'import 1']))"
    done = python(code, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "SyntaxError" in done.stderr


def test_an_interrupt_is_one_line_and_exit_code_130(capsys):
    assert cli.main(["fake", "--run_dir", "R", "--text", "interrupt"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "t5g2 fake: interrupted\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_stdout_that_goes_away_is_no_error_message(tmp_path, monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    code = "sys.exit(main(['fake', '--run_dir', 'R', '--text', 'lines']))"
    done = python(code, cwd=tmp_path, stdout=writer)
    helped = python("main(['--help'])", cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    assert helped.stderr == ""


def test_another_broken_pipe_than_stdout_keeps_its_traceback():
    with pytest.raises(BrokenPipeError, match="a worker died"):
        cli.main(["fake", "--run_dir", "R", "--text", "pipe"])


# ---- The cost of --help --------------------------------------------------------------------------


JOBS = {name: job.module for name, job in cli.JOBS.items()}


@pytest.mark.parametrize("job", [None, *JOBS])
def test_help_imports_nothing_heavy(tmp_path, job):
    code = f"""
        code = main({[*([job] if job else []), "--help"]})
        heavy = {HEAVY} & set(sys.modules)
        sys.exit(f"imports {{sorted(heavy)}}" if heavy else code)
    """
    done = python(code, cwd=tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: t5g2")


def test_python_dash_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "t5g2", "trian"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("t5g2: error: no job 'trian'")
