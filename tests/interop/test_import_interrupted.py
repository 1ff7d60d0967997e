"""Import and export that do not come to an end leave nothing: no room, signals, damaged files."""

import os
import shutil
import signal
import subprocess
import sys
import time

import gemma3_reference
import pytest
from safetensors.torch import load_file

from t5g2 import cli
from t5g2.interop.tokenizer import export_tokenizer

ROWS = 4096


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_tokenizer):
    """A multimodal Gemma 3 of about 5 MB."""
    directory = tmp_path_factory.mktemp("source")
    model = gemma3_reference.random_multimodal_model(
        0, vision=True, vocabulary=ROWS, width=256, layers=2
    )
    model.save_pretrained(directory)
    export_tokenizer(tiny_tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    assert cli.main(["import", str(source), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module", params=["import", "export"])
def command(request):
    """The job, and its arguments but for `--out`."""
    if request.param == "import":
        return ["import", str(request.getfixturevalue("source"))]
    return ["export", "--checkpoint", str(request.getfixturevalue("checkpoint"))]


# An ignored Ctrl-C, which tests in the background have, would be inherited.
PROGRAM = """
import resource, signal, sys
from t5g2.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
if int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def start(command, out, largest_file=0):
    """Starts the job in a process that cannot write larger files (0: any)."""
    arguments = [str(largest_file), *command, "--out", str(out)]
    program = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("room", [300, 1_000_000, 3_000_000])
def test_without_room_nothing_is_left_and_one_line_says_why(command, room, tmp_path):
    process = start(command, tmp_path / "out", room)
    _, message = process.communicate()
    assert process.returncode == 2
    assert message.splitlines()[-1] == (
        f"t5g2 {command[0]}: error: {tmp_path / 'out'} was not written: File too large; make "
        "room, or name another place"
    )
    assert "Traceback" not in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_nothing(command, number, tmp_path):
    process = start(command, tmp_path / "out")
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_source_is_named_before_anything_is_written(source, keep, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    assert cli.main(["import", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_source_is_as_large_as_these_tests_take_it_to_be(source, checkpoint):
    size = sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    assert 4_000_000 < size < 8_000_000
    assert max(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) > 3_000_000
