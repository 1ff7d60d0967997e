"""The infillings of a report: what the model wrote into the gaps, beside what stood there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

FILE_NAME = "samples.json"
IN_TRAINING_FILE = "samples.jsonl"

_SHOWN = 50
_CHARACTERS = 6000
_STEPS = 8  # of what was filled in over the run
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")
# The sentinels of our own tokenizers, of Gemma's and of T5's.
_SENTINEL = re.compile(r"(<(?:sentinel_|unused|extra_id_)\d+>)")


def samples_html(run_dir: Path) -> str:
    """The samples of a run directory as HTML; a line in their place if there are none."""
    try:
        samples = json.loads((run_dir / FILE_NAME).read_bytes())
    except FileNotFoundError:
        return '<p class="soft">No infillings were made.</p>'
    except ValueError as error:
        return f'<p class="warning">{FILE_NAME} cannot be read: {escape(str(error))}</p>'
    if not isinstance(samples, list) or not all(isinstance(item, Mapping) for item in samples):
        return f'<p class="warning">{FILE_NAME} holds no list of samples.</p>'
    parts = [_sample(sample) for sample in samples[:_SHOWN]]
    if len(samples) > _SHOWN:
        parts.append(
            f'<p class="note">The first {_SHOWN} of {len(samples):,}; all are in {FILE_NAME}.</p>'
        )
    return "".join(parts)


def over_time_html(run_dir: Path) -> str:
    """What was filled in at evaluations, step by step; "" if nothing was."""
    passages, predictions = _in_training(run_dir / IN_TRAINING_FILE)
    # The first, the last and some between.
    steps = sorted(predictions)
    count = min(_STEPS, len(steps))
    shown = sorted({steps[i * (len(steps) - 1) // max(count - 1, 1)] for i in range(count)})
    parts = []
    for i, passage in enumerate(passages):
        task, given, target = (str(passage.get(name, "")) for name in ("task", "input", "target"))
        said = [(f"step {step:,}", predictions[step][i]) for step in shown]
        rows = "".join(
            f'<div class="soft">{label}</div><div class="code">{_marked(text)}</div>'
            for label, text in [*said, ("original", target)]
        )
        parts.append(
            f'<div class="card sample"><b>{escape(task)}</b>{_pictures(passage)}'
            f'<pre>{_marked(given)}</pre><div class="course">{rows}</div></div>'
        )
    return "".join(parts) if shown else ""


def _in_training(path: Path) -> tuple[list[Mapping[str, Any]], dict[int, list[str]]]:
    """The passages of the newest process, and what was filled into them, by step."""
    passages: list[Mapping[str, Any]] = []
    predictions: dict[int, list[str]] = {}
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # torn by a power cut
            continue
        step = record.get("step") if isinstance(record, Mapping) else None
        if not isinstance(step, int):
            continue
        if isinstance(drawn := record.get("passages"), list):
            same = drawn == passages
            passages = drawn
            # A resumed run goes back to where it was saved.
            predictions = {s: made for s, made in predictions.items() if same and s <= step}
        elif isinstance(made := record.get("predictions"), list) and len(made) == len(passages):
            predictions[step] = list(map(str, made))
    return passages, predictions


def _pictures(sample: Mapping[str, Any]) -> str:
    urls = sample.get("images") or []
    found = [url for url in urls if isinstance(url, str) and _PICTURE.fullmatch(url)]
    shown = "".join(f'<img alt="" src="{url}">' for url in found)
    return f'<div class="pictures">{shown}</div>' if shown else ""


def gaps(text: str) -> list[tuple[str, str]]:
    """Splits a target or prediction into (sentinel, what follows it), in order.

    Text before the first sentinel, or all of a text that has none, goes under the sentinel "".
    """
    before, *rest = _SENTINEL.split(text)
    found = list(zip(rest[::2], rest[1::2], strict=True))
    return [("", before), *found] if before or not found else found


def _sample(sample: Mapping[str, Any]) -> str:
    task, given, target, predicted = (
        str(sample.get(name, "")) for name in ("task", "input", "target", "prediction")
    )
    truth, guess = gaps(target), dict(reversed(gaps(predicted)))
    if len(truth) == 1:  # a continuation: one text each, whatever the prediction strays into
        guess = {truth[0][0]: "".join(text for _, text in gaps(predicted))}
    rows = []
    right = 0
    for sentinel, text in truth:
        made = guess.pop(sentinel, None)
        same = made is not None and made.strip() == text.strip()
        right += same
        rows.append(_gap(sentinel, made, text, same))
    rows += [_gap(sentinel, made, None, False) for sentinel, made in guess.items() if made.strip()]
    count = f"{right} of {len(truth)} {'gap' if len(truth) == 1 else 'gaps'} as in the original"
    return (
        f'<div class="card sample"><b>{escape(task)}</b> <span class="soft">{count}</span>'
        f"{_pictures(sample)}<pre>{_marked(given)}</pre>"
        '<div class="sides"><div class="head">prediction</div>'
        f'<div class="head">original</div>{"".join(rows)}</div></div>'
    )


def _gap(sentinel: str, made: str | None, text: str | None, same: bool) -> str:
    chip = _marked(sentinel) + " " if sentinel else ""
    sides = []
    for kind, label, words in (("made", "prediction", made), ("truth", "original", text)):
        shown = '<span class="soft">(nothing)</span>' if words is None else _marked(words)
        tick = ' <span class="same" title="as in the original">✓</span>' if same else ""
        sides.append(
            f'<div class="code {kind}" data-label="{label}">{chip}{shown}'
            f"{tick if kind == 'made' else ''}</div>"
        )
    return "".join(sides)


def _number(sentinel: str) -> str:
    return "".join(filter(str.isdigit, sentinel))


def _marked(text: str) -> str:
    """Escapes a text and makes its sentinels small numbered chips; says what it leaves out."""
    left_out = len(text) - _CHARACTERS
    shown = "".join(
        f"<mark>{_number(part)}</mark>" if index % 2 else escape(part)
        for index, part in enumerate(_SENTINEL.split(text[:_CHARACTERS]))
    )
    more = f" … {left_out:,} more characters in {FILE_NAME}"
    return shown + (f'<span class="soft">{more}</span>' if left_out > 0 else "")
