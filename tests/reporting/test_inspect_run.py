"""`t5g2 inspect run`: quick, without jax, and the same in a text and on a page."""

import json
import subprocess
import sys
import time

from synthetic_run import train_row, write_lines
from test_report import Page

from t5g2 import cli
from t5g2.reporting.metrics_log import read_metrics
from t5g2.reporting.run_text import common_tokens, loss_at
from t5g2.reporting.thinning import LAST_KEPT


def inspect(capsys, *args):
    assert cli.main(["inspect", "run", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_a_finished_run_in_a_few_lines(finished_run, capsys):
    said = inspect(capsys, finished_run)
    assert f"{finished_run}: complete, 200 steps" in said
    assert "2.400" not in said  # the summary's; the records say:
    assert "2.500 (averaged weights, step 200); unigram entropy 6.420" in said
    assert "20.0k real tokens/s" in said
    assert "step 120: stopped by SIGTERM" in said
    assert "nothing looks wrong" in said
    assert len(said.splitlines()) < 20


def test_what_looks_wrong_is_said(tmp_path, capsys):
    rows = [{"kind": "train", "step": i, **train_row(i, fill_inputs=0.5)} for i in range(1, 50)]
    write_lines(tmp_path, [{"kind": "start", "step": 0}, *rows])
    said = inspect(capsys, tmp_path)
    assert "! padding: only 50% of the places for inputs hold tokens" in said
    assert "! silent: no record for" in said
    assert "nothing looks wrong" not in said


def test_speed_comes_with_mfu_where_a_peak_is_known(tmp_path, capsys):
    begin = {"kind": "start", "step": 0, "model_flops": 4e12, "peak_flops": 1e14}
    train = {"kind": "train", "step": 1, **train_row(1)}  # in 0.2 s
    write_lines(tmp_path, [begin, train])
    assert "20.0TFLOP/s of the model, MFU 20.0%" in inspect(capsys, tmp_path)
    write_lines(tmp_path, [begin | {"peak_flops": None}, train])
    assert "20.0TFLOP/s of the model, no MFU: no peak is known" in inspect(capsys, tmp_path)


def test_runs_are_compared_where_both_have_been(finished_run, tmp_path, capsys):
    other = tmp_path / "other"
    rows = [{"kind": "train", "step": i, **train_row(i, loss=5.0)} for i in range(1, 101)]
    write_lines(other, [{"kind": "start", "step": 0}, *rows])
    lines = inspect(capsys, finished_run, other).splitlines()
    assert lines[0].split() == ["finished", "other"]
    histories = [read_metrics(path) for path in (finished_run, other)]
    assert common_tokens(histories) == 400_000
    expected = loss_at(histories[0], 400_000)
    (common,) = [line for line in lines if line.startswith("... at 400k tokens")]
    assert common.split()[-2:] == [f"{expected:.3f}", "5.000"]

    page = tmp_path / "runs.html"
    assert "open it in a browser" in inspect(capsys, finished_run, other, "--html", page)
    found = Page(page.read_text())
    loss = found.data[0]
    assert loss["axis"] == "real tokens"
    by_name = {series["name"]: series for series in loss["series"]}
    assert by_name["other"]["x"][-1] == 400_000
    assert by_name["finished"]["x"][-1] == 800_000
    assert by_name["finished, held-out"]["x"] == [400_000, 800_000]


def test_settings_that_differ_are_on_the_page(finished_run, tmp_path, capsys):
    other = tmp_path / "other"
    write_lines(other, [{"kind": "train", "step": 1, **train_row(1)}])
    (other / "config.gin").write_text("train.total_steps = 300\ntrain.seed = 0\n")
    (finished_run / "config.gin").write_text("train.total_steps = 200\ntrain.seed = 0\n")
    page = tmp_path / "runs.html"
    inspect(capsys, finished_run, other, "--html", page)
    text = Page(page.read_text()).text
    assert "train.total_steps200300" in text
    assert "train.seed" not in text


def test_one_run_as_a_page_is_its_report(finished_run, tmp_path, capsys):
    inspect(capsys, finished_run, "--html", tmp_path / "one.html")
    assert "Complete: 200 steps" in Page((tmp_path / "one.html").read_text()).text


def test_a_directory_without_metrics_is_the_users_mistake(tmp_path, capsys):
    assert cli.main(["inspect", "run", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_that_cannot_be_written_is_the_users_mistake(finished_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    page = tmp_path / "file" / "page.html"
    assert cli.main(["inspect", "run", str(finished_run), "--html", str(page)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def write_long_run(run_dir, steps):
    """Every step recorded; the process dies once."""
    rows = [{"kind": "train", "step": i, **train_row(i)} for i in range(1, steps + 1)]
    begin = {"kind": "start", "step": 0, "total_steps": 200_000}
    write_lines(run_dir, [begin, *rows[:1234], begin | {"step": 1000}, *rows[1000:]])
    return run_dir


def test_a_thinned_reading_knows_where_processes_died_and_how_the_run_ends(tmp_path):
    long_run = write_long_run(tmp_path, 5000)
    whole, thin = read_metrics(long_run), read_metrics(long_run, most=500)
    assert len(thin.train) < 500 + LAST_KEPT + 10 < len(whole.train)
    assert [s.last_step for s in thin.segments] == [s.last_step for s in whole.segments]
    assert thin.last_step == whole.last_step == 5000
    assert thin.train[-LAST_KEPT:] == whole.train[-LAST_KEPT:]
    assert {row["step"] for row in thin.train} <= {row["step"] for row in whole.train}


def test_a_look_at_a_long_run_takes_a_moment_and_no_jax(tmp_path):
    long_run = write_long_run(tmp_path, 100_000)
    program = (
        "import sys; from t5g2 import cli; code = cli.main(['inspect', 'run', sys.argv[1]]);"
        "import resource, json; used = resource.getrusage(resource.RUSAGE_SELF);"
        "print(json.dumps([used.ru_utime + used.ru_stime, 'jax' in sys.modules, code]))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    taken = []
    for _ in range(2):  # the first reads its modules from the disk
        done = subprocess.run(
            [sys.executable, "-c", program, str(long_run)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        seconds, jax, code = json.loads(done.stdout.splitlines()[-1])
        assert (jax, code) == (False, 0)
        taken.append(seconds)
    assert min(taken) < 1.0  # of processor time: other work on the machine does not count


def test_a_run_that_is_written_to_can_be_looked_at(tmp_path, capsys):
    train = {"kind": "train", "step": 1, **train_row(1), "time": time.time()}
    path = write_lines(tmp_path, [{"kind": "start", "step": 0, "total_steps": 10}, train])
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "st')
    said = inspect(capsys, tmp_path)
    assert "at step 1 of 10 (10%), last record 0." in said
