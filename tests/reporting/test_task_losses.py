"""Losses put together by denoiser, source and language: exact means over target tokens."""

import re

import pytest
from synthetic_run import train_row, write_lines
from test_report import Page

from t5g2.reporting.metrics_log import RunHistory, read_metrics
from t5g2.reporting.report import write_report
from t5g2.reporting.task_losses import TaskNames, averaged, mean_of, regrouped, targets_of

NAMES = TaskNames({"docs.de": "de", "docs.fr": "fr", "wiki.de": "de"})
ROW = {
    "step": 1,
    "by_task": {"docs.de/span": 2.0, "docs.de/prefix": 5.0, "wiki.de/span": 4.0},
    "targets_by_task": {"docs.de/span": 30, "docs.de/prefix": 10, "wiki.de/span": 10},
}


@pytest.mark.parametrize(
    ("by", "losses", "targets"),
    [
        ("denoiser", {"span": 2.5, "prefix": 5.0}, {"span": 40, "prefix": 10}),
        ("source", {"docs.de": 2.75, "wiki.de": 4.0}, {"docs.de": 40, "wiki.de": 10}),
        ("language", {"de": 3.0}, {"de": 50}),
    ],
)
def test_a_group_has_the_mean_loss_of_its_target_tokens(by, losses, targets):
    (row,) = regrouped([ROW], NAMES, by)
    assert row["by_task"] == losses
    assert row["targets_by_task"] == targets
    assert row["step"] == 1


def test_groups_weighed_by_their_tokens_make_the_loss_of_the_record():
    total = sum(ROW["by_task"][task] * n for task, n in ROW["targets_by_task"].items())
    for by in ("denoiser", "source"):
        (row,) = regrouped([ROW], NAMES, by)
        again = sum(row["by_task"][group] * n for group, n in row["targets_by_task"].items())
        assert again == pytest.approx(total)


def test_without_token_counts_only_groups_of_one_task_have_a_loss():
    (row,) = regrouped([{"step": 1, "by_task": ROW["by_task"]}], NAMES, "denoiser")
    assert row["by_task"] == {"prefix": 5.0}


def test_a_loss_that_is_not_finite_is_not_hidden_by_the_others():
    spoilt = {**ROW, "by_task": {**ROW["by_task"], "wiki.de/span": float("nan")}}
    (row,) = regrouped([spoilt], NAMES, "language")
    assert row["by_task"]["de"] != row["by_task"]["de"]


def test_means_over_records_weigh_tokens_not_records():
    rows = [
        {"step": step, "by_task": {"a": loss}, "targets_by_task": {"a": targets}}
        for step, loss, targets in ((1, 6.0, 10), (2, 3.0, 20), (3, 1.0, 5), (4, 2.0, 5))
    ]
    assert mean_of(rows[:2], "a") == 4.0
    assert averaged(rows, "a", 2) == [(2.0, 4.0), (4.0, 1.5)]
    assert targets_of(rows) == {"a": 40}
    assert mean_of(rows, "b") is None


def test_a_lone_source_leaves_only_denoisers_to_be_told_apart():
    alone = TaskNames({"text": "en"})
    assert alone.kinds() == ["denoiser"]
    assert [alone.group("span", by) for by in ("denoiser", "source", "language")] == [
        "span",
        "text",
        "en",
    ]


def test_languages_are_told_apart_where_they_are_not_just_the_sources():
    assert NAMES.kinds() == ["denoiser", "source", "language"]
    assert TaskNames({"a": "de", "b": "fr"}).kinds() == ["denoiser", "source"]
    assert TaskNames({"a": None, "b": None}).kinds() == ["denoiser", "source"]
    assert TaskNames.of(RunHistory()).kinds() == ["denoiser"]


def many_sources(run_dir, count):
    """A run on many languages; the loss of source i is 3 + i / 100, with all denoisers."""
    sources = [f"docs-{i:02}" for i in range(count)]
    denoisers = ("span3_15", "span12_50", "prefix_75")
    losses = {f"{name}/{d}": 3 + i / 100 for i, name in enumerate(sources) for d in denoisers}
    tokens = dict.fromkeys(losses, 50)
    facts = {
        "total_steps": 40,
        "source_languages": {name: f"l{i // 2}" for i, name in enumerate(sources)},
        "source_tokens": {name: 1000 * (i + 1) for i, name in enumerate(sources)},
        "source_bad_records": {name: 7 * (i == 3) for i, name in enumerate(sources)},
        "data_shares": {
            task: (1 + i) / 100 if count < 10 else 1 / len(losses) + i / 1e6
            for i, task in enumerate(losses)
        },
    }
    by_task = {"by_task": losses, "targets_by_task": tokens}
    write_lines(
        run_dir,
        [
            {"kind": "start", "step": 0, **facts},
            *({"kind": "train", "step": s, **train_row(s, **by_task)} for s in range(1, 41)),
            {"kind": "eval", "step": 40, "weights": "last", "loss": 3.0, **by_task},
        ],
    )
    return sources


def test_a_report_of_many_sources_shows_all_of_them_and_draws_few(tmp_path):
    sources = many_sources(tmp_path, 50)
    found = Page(write_report(tmp_path).read_text())
    assert all(name in found.text for name in sources)
    assert found.text.count("3.250") >= 4  # training and held-out of docs-25, three tasks of it
    titles = re.findall(r"Loss by (\w+)", found.text)
    assert titles == ["denoiser", "source", "language"]
    charts = [{s["name"] for s in chart["series"]} for chart in found.data]
    drawn = {name for chart in charts for name in chart if name.startswith("docs-")}
    assert len(drawn) == 12  # a held-out and a training curve of each
    assert "docs-49" in drawn  # the largest
    assert "The chart shows the 6 largest of 50" in found.text
    assert ("class", "number") in found.attributes
    assert sum(value.startswith("loss of docs-") for _, value in found.attributes if value) == 50


def test_the_report_says_the_size_and_the_bad_records_of_each_source(tmp_path):
    many_sources(tmp_path, 6)
    text = write_report(tmp_path).read_text()
    (row,) = re.findall(r"<tr><td>docs-03</td>(.*?)</tr>", text)[:1]
    cells = re.findall(r"<td[^>]*>([^<]*)", row)
    assert cells[:3] == ["3.030", "3.030", "–"]  # training, held-out last and averaged
    # Behind the small curve: share, target tokens, language, tokens of the source, bad records.
    assert cells[4:] == ["33.0 %", "6.00k", "l1", "4.00k", "7"]


def test_names_of_a_mixture_that_a_run_left_behind_are_still_understood(tmp_path):
    write_lines(
        tmp_path,
        [
            {"kind": "start", "step": 0, "source_languages": {"old": None, "kept": None}},
            {"kind": "train", "step": 1, **train_row(1, by_task={"old/span": 3.0})},
            {"kind": "start", "step": 1, "source_languages": {"kept": None, "new": None}},
            {"kind": "train", "step": 2, **train_row(2, by_task={"new/span": 2.0})},
        ],
    )
    history = read_metrics(tmp_path)
    rows = regrouped(history.train, TaskNames.of(history), "source")
    assert [row["by_task"] for row in rows] == [{"old": 3.0}, {"new": 2.0}]
