import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic_run import train_row, write_lines

from t5g2.errors import UserError
from t5g2.reporting.metrics_log import read_metrics
from t5g2.reporting.pictures import data_url
from t5g2.reporting.report import headline, is_complete, write_report

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\"'"


class Page(HTMLParser):
    """Checks that the tags nest, and collects the text, the scripts and every attribute."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "path"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.data, self.attributes = [], [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data.append(json.loads(data))
        elif tag not in ("script", "style"):
            self.text += data


def page(run_dir):
    return Page(write_report(run_dir).read_text())


def test_the_report_of_a_finished_run_says_what_was_reached(finished_run):
    (finished_run / "samples.json").write_text(
        json.dumps(
            [
                {
                    "task": "span3_15",
                    "input": "def <sentinel_0>(self, <sentinel_1>):",
                    "target": "<sentinel_0>close<sentinel_1>force",
                    "prediction": "<sentinel_0>close<sentinel_1>name",
                }
            ]
        )
    )
    found = page(finished_run)
    for words in (
        "Complete: 200 steps on 800k real tokens",
        "2.400 nats per target token",
        "4.02 below the corpus's unigram entropy 6.42",
        "20.0k real tokens a second",
        "prefix_75",
        "50.0 %",
        "9,812,345",
        "stopped by SIGTERM",
        "train.total_steps = 200",
        "1 of 2 gaps as in the original",
    ):
        assert words in found.text
    assert len(found.data) == 6  # charts
    assert found.tags.count("mark") == 6  # two gaps in input, prediction and original


def test_the_report_needs_nothing_from_outside(finished_run):
    text = write_report(finished_run).read_text()
    assert not re.search(r"https?://|url\(|@import|<link|\bsrc=", text)


@pytest.mark.parametrize(
    "records",
    [
        None,
        [],
        [{"kind": "start", "step": 0, "total_steps": 10}],
        [{"kind": "train", "step": 1, "loss": 3.0}],
        [{"kind": "start", "step": 0}, {"kind": "train", "step": 1, **train_row(1, loss="NaN")}],
        [{"kind": "eval", "step": 0, "weights": "last", "loss": 9.0, "by_task": {"a": "NaN"}}],
        [{"kind": "train", "step": 1, **train_row(1, grad_norm=0.0, learning_rate=0.0)}],
        [{"kind": "summary", "step": 3}],
    ],
)
def test_an_unfinished_or_nearly_empty_run_has_a_valid_page(tmp_path, records):
    if records is not None:
        write_lines(tmp_path, records)
    found = page(tmp_path)
    assert "html" in found.tags
    assert "nan" not in " ".join(str(value) for _, value in found.attributes).lower()


def test_an_interrupted_run_is_not_called_complete(tmp_path):
    write_lines(
        tmp_path,
        [
            {"kind": "start", "step": 0, "total_steps": 400},
            {"kind": "train", "step": 100, **train_row(100)},
        ],
    )
    history = read_metrics(tmp_path)
    assert not is_complete(history)
    assert headline(history).startswith("Not complete: 100 of 400 steps (25 %)")


def test_a_loss_that_is_not_finite_and_a_torn_line_are_pointed_out(tmp_path):
    path = write_lines(tmp_path, [{"kind": "train", "step": 7, **train_row(7, loss="NaN")}])
    path.write_bytes(path.read_bytes() + b'{"kind": "tr')
    text = page(tmp_path).text
    assert "a loss that is not finite; the first at step 7" in text
    assert "1 line of metrics.jsonl could not be read and is left out: 2" in text


def test_nothing_from_the_run_becomes_markup(tmp_path):
    run_dir = tmp_path / "a<b>&"
    write_lines(
        run_dir,
        [
            {"kind": "start", "step": 0, "devices": EVIL, "versions": {EVIL: EVIL}},
            {"kind": "train", "step": 1, **train_row(1, by_task={EVIL: 2.0})},
            {"kind": "train", "step": 2, **train_row(2, by_task={EVIL: 2.0})},
            {"kind": "eval", "step": 2, "weights": "last", "loss": 2.0, "by_task": {EVIL: 2.0}},
            {"kind": "event", "step": 2, "level": EVIL, "message": EVIL},
            {"kind": "summary", "step": 2, "corpus": {EVIL: EVIL}, "export": EVIL},
        ],
    )
    (run_dir / "config.gin").write_text(EVIL)
    sample = dict.fromkeys(("task", "input", "target", "prediction"), f"<sentinel_0>{EVIL}")
    (run_dir / "samples.json").write_text(json.dumps([sample]))
    found = page(run_dir)
    assert "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.tags.count("script") == 1 + len(found.data)
    assert found.text.count(EVIL) >= 8
    names = {series["name"] for chart in found.data for series in chart["series"]}
    assert EVIL in names


def test_a_long_run_stays_small_and_keeps_its_extremes(tmp_path):
    rows = [{"kind": "train", "step": step, **train_row(step)} for step in range(1, 100_001)]
    rows[54_321]["loss"] = 7.654
    rows[77_777]["grad_norm"] = 1234.0
    events = [{"kind": "event", "step": 1, "level": "info", "message": f"e{i}"} for i in range(999)]
    write_lines(tmp_path, [*rows, *events])
    path = write_report(tmp_path)
    assert path.stat().st_size < 1_000_000
    found = Page(path.read_text())
    drawn = {
        (x, y)
        for chart in found.data
        for series in chart["series"]
        for x, y in zip(series["x"], series["y"], strict=True)
    }
    assert (54_322, 7.654) in drawn
    assert (77_778, 1234.0) in drawn
    assert "100,000 records, drawn as the lowest and the highest of each of" in found.text
    assert "The last 300 of 999" in found.text


@pytest.mark.parametrize("content", ["{", "3", '["a"]', '[{"task": 1}]', "[]", "\xff"])
def test_samples_of_another_form_do_not_spoil_the_report(finished_run, content):
    (finished_run / "samples.json").write_bytes(content.encode("latin-1"))
    assert "Infillings" in page(finished_run).text


def in_training(run_dir, *lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "samples.jsonl").write_text(text + '{"step": 9, "predic')


PASSAGE = {"task": "span", "input": "a <sentinel_0>", "target": "<sentinel_0>truth"}


def test_infillings_over_the_run_are_those_of_the_steps_that_count(finished_run):
    in_training(
        finished_run,
        {"step": 0, "passages": [PASSAGE]},
        *({"step": step, "predictions": [f"said{step}"]} for step in range(10, 130, 10)),
        {"step": 100, "passages": [PASSAGE]},
        {"step": 200, "predictions": ["at the end"]},
    )
    text = page(finished_run).text
    assert "step 10said10" in text
    assert "said110" not in text  # done again from step 100 on
    assert "step 200at the end" in text
    assert text.count("said") == 7  # of 10, and the last
    # Other passages: what was filled into the old ones is no answer to them.
    in_training(
        finished_run,
        {"step": 0, "passages": [PASSAGE]},
        {"step": 10, "predictions": ["old"]},
        {"step": 100, "passages": [PASSAGE | {"input": "b"}]},
        {"step": 200, "predictions": ["new"]},
    )
    text = page(finished_run).text
    assert "new" in text
    assert "step 10old" not in text


def test_images_of_samples_are_on_the_page_and_nothing_else_as_an_image(finished_run):
    picture = data_url(np.zeros((300, 400, 3), np.uint8))
    sample = dict.fromkeys(("task", "input", "target", "prediction"), "caption")
    images = [picture, 'x" onerror="alert(1)', "https://example.org/a.png", 3]
    (finished_run / "samples.json").write_text(json.dumps([sample | {"images": images}]))
    found = page(finished_run)
    sources = [value for name, value in found.attributes if name == "src"]
    assert sources == [picture]
    assert not [name for name, _ in found.attributes if name.startswith("on")]


def test_speed_norms_and_mesh_are_shown_where_they_were_recorded(tmp_path):
    facts = {"mesh": {"data": 2, "fsdp": 4}, "model_flops": 2e12, "peak_flops": 4e13}
    row = train_row(1, param_norm=12.5, update_norm=0.01, mfu=0.25, model_flops_per_second=1e13)
    more = [{"kind": "train", "step": step, **row} for step in (1, 2)]
    write_lines(tmp_path, [{"kind": "start", "step": 0, **facts}, *more])
    text = page(tmp_path).text
    for words in ("Parameter norm", "Update norm", "MFU", "25.0%", "data 2, fsdp 4"):
        assert words in text
    rows = [{name: value for name, value in one.items() if name != "mfu"} for one in more]
    write_lines(tmp_path, [{"kind": "start", "step": 0, **facts, "peak_flops": None}, *rows])
    text = page(tmp_path).text
    assert "no peak of these devices is known" in text
    assert "MFU (median)" not in text


def test_long_context_curves_of_the_run_are_drawn(finished_run):
    def point(length, score):
        interval = {"low": score - 0.1, "high": score + 0.05}
        values = {"score": score, **interval, "log_likelihood": -0.25, "examples": 40}
        return {"family": "niah_single_1", "length": length, "tokens": length - 3.5, **values}

    out = finished_run / "long_context"
    out.mkdir()
    curves = [point(4096, 0.4), point(1024, 0.9)]
    (out / "long_context.json").write_text(
        json.dumps({"checkpoint": "run/averaged", "form": "answer", "curves": curves})
    )
    found = page(finished_run)
    assert "Score by length (long_context)" in found.text
    assert "80.0%95.0%-0.250" in found.text
    (chart,) = [chart for chart in found.data if chart["axis"] == "tokens of the prompt"]
    assert chart["series"][0]["x"] == [1024, 4096]
    assert chart["series"][0]["y"] == [0.9, 0.4]
    (out / "long_context.json").write_text("{")
    assert "long_context: Expecting" in page(finished_run).text


def test_what_looks_wrong_stands_at_the_top(tmp_path):
    row = train_row(1, fill_targets=0.5)
    write_lines(tmp_path, [{"kind": "train", "step": 1, **row}])
    text = page(tmp_path).text
    assert "padding: only 50% of the places for targets" in text
    assert "silent" not in text


def test_a_missing_gap_and_an_invented_one_are_shown(finished_run):
    sample = {
        "task": "span",
        "input": "a <extra_id_0> b <extra_id_1>",
        "target": "<extra_id_0>one<extra_id_1>two",
        "prediction": "<extra_id_0>one<extra_id_7>three",
    }
    (finished_run / "samples.json").write_text(json.dumps([sample]))
    text = page(finished_run).text
    assert "three" in text
    assert text.count("(nothing)") == 2


def test_a_report_is_replaced_whole_and_leaves_no_temporary_file(finished_run):
    before = {path.name for path in finished_run.iterdir()}
    write_report(finished_run, finished_run / "other.html")
    write_report(finished_run, finished_run / "other.html")
    assert {path.name for path in finished_run.iterdir()} == before | {"other.html"}


def test_a_run_directory_that_is_not_there_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "nothing")
