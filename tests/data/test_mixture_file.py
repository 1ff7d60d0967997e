"""The mixture file: what it says, and that every mistake in it names file, source and key."""

import dataclasses
import math

import pytest
from source_files import TEXTS, write_jsonl, write_mixture, write_parquet

from t5g2.data.corpus import check_mixture
from t5g2.data.mixture import DataConfig
from t5g2.data.sources import CorpusConfig, open_sources
from t5g2.data.sources.mixture_file import MixtureSpec, SourceSpec, read_mixture
from t5g2.errors import UserError

DATA = DataConfig(inputs_length=64, targets_length=64)


@pytest.fixture
def file(tmp_path):
    """Two sources that are there."""
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b").mkdir()
    write_parquet(tmp_path / "b" / "b.parquet")
    return tmp_path / "mixture.toml"


A = {"name": "a", "path": "a.jsonl"}
B = {"name": "b", "path": "b"}


def refusal(file, *sources, **settings) -> str:
    write_mixture(file, *sources, **settings)
    config = CorpusConfig(mixture=str(file))
    with pytest.raises(UserError) as error:
        check_mixture(config, DATA) or open_sources(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_mixture_file_lists_sources(file, monkeypatch):
    described = {**B, "language": "fr", "weight": 2, "denoisers": ["span3_15", "prefix_75"]}
    write_mixture(file, A, described, temperature=3.5)
    mixture = read_mixture(CorpusConfig(mixture=str(file)))
    assert mixture.temperature == 3.5
    assert [dataclasses.asdict(source) for source in mixture.sources] == [
        {
            **dict.fromkeys(["format", "field", "language", "weight", "denoisers"]),
            **A,
            "file": file,
        },
        {
            **dict.fromkeys(["format", "field"]),
            **described,
            "denoisers": ("span3_15", "prefix_75"),
            "file": file,
        },
    ]
    check_mixture(CorpusConfig(mixture=str(file)), DATA)
    # Paths are relative to the file, not to where the program runs.
    monkeypatch.chdir("/")
    sources = open_sources(CorpusConfig(mixture=str(file), heldout_share=0.1))
    assert [len(source.records) for source in sources] == [len(TEXTS)] * 2
    assert sources[1].tokens("train", None).sequential is False


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"wieght": 2}, "a: unknown key 'wieght'; did you mean 'weight'?"),
        ({"file": "x"}, "a: unknown key 'file'"),
        ({"path": "gone.jsonl"}, "a: path: {home}/gone.jsonl does not exist"),
        ({"path": "*.json"}, "a: path: {home}/*.json does not exist"),
        ({"path": 7}, "a: path: must be a text, not 7"),
        ({"name": "a b"}, "a b: name: may hold letters, digits and _ . - only"),
        ({"name": "b/c"}, "b/c: name: may hold"),
        ({"name": "b"}, "b: name: 2 sources have it"),
        ({"format": "parket"}, "a: format: no format 'parket'; did you mean 'parquet'?"),
        ({"format": "text", "field": "text"}, "a: field: text files have none"),
        ({"path": "mixture.toml"}, "a: format: missing, and the names of the files (mixture.toml)"),
        ({"path": "."}, "a: format: missing, and {home} holds files of several: jsonl, parquet"),
        ({"path": "b", "format": "text"}, "a: path: no document below {home}/b; looked for .py"),
        ({"weight": 0}, "a: weight: must be a number above 0, not 0"),
        ({"weight": True}, "a: weight: must be a number above 0, not True"),
        ({"weight": "2"}, "a: weight: must be a number above 0, not '2'"),
        ({"denoisers": []}, "a: denoisers: must be a list of names or the name of a preset"),
        ({"denoisers": ["prefix_75"] * 2}, "a: denoisers: ['prefix_75', 'prefix_75'] names one"),
        ({"denoisers": ["prefix_57"]}, "a: denoisers: data.denoisers has no 'prefix_57'; did you"),
        ({"denoisers": "ul3"}, "a: denoisers: there are no denoisers called 'ul3'; presets are"),
        ({"language": ""}, "a: language: must be a text, not ''"),
    ],
)
def test_a_mistake_names_file_source_and_key(file, source, problem):
    message = refusal(file, {**A, **source}, B)
    assert message.startswith(f"{file}: source {problem.format(home=file.parent)}")


@pytest.mark.parametrize("temperature", [0, -1, math.inf, "high"])
def test_a_temperature_is_a_number_above_0(file, temperature):
    file.write_text(f"temperature = {'inf' if temperature == math.inf else repr(temperature)}")
    with pytest.raises(UserError, match=r"mixture.toml: temperature: must be a number above 0"):
        read_mixture(CorpusConfig(mixture=str(file)))


def test_mistakes_outside_of_sources_name_the_file(file):
    assert refusal(file, A, tempreature=2).startswith(
        f"{file}: unknown key 'tempreature'; did you mean 'temperature'?"
    )
    assert f"{file}: no [[source]] table" in refusal(file, temperature=2)
    assert f"{file}: source 2: name: missing" in refusal(file, A, {"path": "b"})
    assert f"{file}: source b: path: missing" in refusal(file, A, {"name": "b"})
    config = CorpusConfig(mixture=str(file))
    file.write_text("temperature = = 2")
    with pytest.raises(UserError, match=r"mixture.toml: not TOML: .*line 1"):
        read_mixture(config)
    file.unlink()
    with pytest.raises(UserError, match=r"corpus.mixture: .*mixture.toml cannot be read: No such"):
        read_mixture(config)


def test_a_path_beside_a_mixture_is_refused(file):
    with pytest.raises(ValueError, match="exclude each other"):
        CorpusConfig(path="texts", mixture=str(file))


# ---- Rates


def weights(temperature: float, sizes: list[int], given: list[float | None]) -> list[float]:
    sources = tuple(
        SourceSpec(name=str(i), path="x", weight=weight) for i, weight in enumerate(given)
    )
    found = MixtureSpec(sources=sources, temperature=temperature).weights(
        {str(i): size for i, size in enumerate(sizes)}
    )
    return list(found.values())


def test_rates_are_proportional_to_tokens_to_the_power_of_one_over_the_temperature():
    sizes = [10**12, 10**9, 10**3]
    for temperature in (1.0, 2.0, 100 / 30):
        found = weights(temperature, sizes, [None] * 3)
        expected = [size ** (1 / temperature) for size in sizes]
        assert found == pytest.approx([3 * e / sum(expected) for e in expected])
    assert weights(0.01, sizes, [None] * 3) == pytest.approx([3, 0, 0])
    assert weights(1e9, sizes, [None] * 3) == pytest.approx([1, 1, 1], rel=1e-6)


def test_a_weight_stands_beside_a_mean_of_one():
    assert weights(1.0, [100, 300, 999], [None, None, 4.0]) == pytest.approx([0.5, 1.5, 4.0])
    assert weights(2.0, [1, 2, 3], [1.0, 0.25, 7.0]) == [1.0, 0.25, 7.0]
    assert weights(1.0, [5, 0], [None, 3.0]) == [1.0, 3.0]
