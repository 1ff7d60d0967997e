"""Gin files and command-line bindings, claims made with small dataclasses of the test's own."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5g2 import config
from t5g2.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    hidden_size: int = 64
    dropout: float = 0.0
    kind: Literal["tiny", "small"] = "tiny"
    softcap: float | None = None
    name: str = "model"

    def __post_init__(self):
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size}\nmust be even")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    total_steps: int
    seed: int = 0
    resume: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    layers: Sequence[int] = ()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    period: int | float | None = None
    data: Any = None


SECTIONS = {"model": Model, "train": Train}


def parse(tmp_path, text, *bindings, sections=SECTIONS, search_paths=()):
    (tmp_path / "x.gin").write_text(text)
    return config.parse(sections, [str(tmp_path / "x.gin")], bindings, search_paths)


def error(tmp_path, text, *bindings, **options):
    """The one line that a mistake gets, `tmp_path` cut off."""
    with pytest.raises(UserError) as raised:
        parse(tmp_path, text, *bindings, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


# ---- What is read --------------------------------------------------------------------------------


def test_every_section_is_built_and_unbound_settings_take_their_defaults(tmp_path):
    built = parse(tmp_path, "train.total_steps = 6\nmodel.kind = 'small'")
    assert built == {"model": Model(kind="small"), "train": Train(total_steps=6)}


def test_gin_blocks_comments_and_multiline_values_are_read(tmp_path):
    text = "train:  # a block\n  total_steps = 6\n  betas = (\n    0.1,  # first\n    0.2,\n  )\n"
    assert parse(tmp_path, text)["train"] == Train(total_steps=6, betas=(0.1, 0.2))


def test_values_take_the_type_of_their_annotation(tmp_path):
    text = "train.total_steps = 6\ntrain.layers = [1, 2]\ntrain.weights = {'a': 1}\n"
    train = parse(tmp_path, text + "train.data = ([{'rate': 1}],)\ntrain.betas = [0, 1]")["train"]
    assert train.layers == (1, 2)
    assert train.data == (({"rate": 1},),)
    assert list(map(type, [*train.betas, train.weights["a"]])) == [float] * 3


def test_in_a_union_the_very_type_of_the_value_wins(tmp_path):
    for text, kind in (("3", int), ("3.0", float), ("None", type(None))):
        period = parse(tmp_path, f"train.total_steps = 6\ntrain.period = {text}")["train"].period
        assert type(period) is kind


def test_a_macro_takes_its_last_value_and_may_stand_inside_a_value_or_another_macro(tmp_path):
    text = "train.total_steps = %STEPS\ntrain.layers = (%A, 2)\nA = %STEPS\nSTEPS = 5\n"
    train = parse(tmp_path, text, "STEPS=7")["train"]
    assert (train.total_steps, train.layers) == (7, (7, 2))


def test_later_files_override_earlier_ones_and_the_command_line_all_of_them(tmp_path):
    for name, seed in (("a.gin", 1), ("b.gin", 2)):
        (tmp_path / name).write_text(f"train.seed = {seed}\ntrain.total_steps = {seed}")
    files = [str(tmp_path / "a.gin"), str(tmp_path / "b.gin")]
    built = config.parse(SECTIONS, files, ["train.seed=3", "train.seed=4"])
    assert built["train"] == Train(total_steps=2, seed=4)


def test_two_parses_do_not_mix(tmp_path):
    parse(tmp_path, "train.total_steps = %N\nN = 1\nmodel.hidden_size = 2")
    assert parse(tmp_path, "train.total_steps = 5")["model"] == Model()
    assert "'%N' has no value" in error(tmp_path, "train.total_steps = %N")


@pytest.mark.parametrize("text", ["/my/text", "'/my/text'", '"/my/text"'])
def test_text_on_the_command_line_needs_no_quotes(tmp_path, text):
    assert (
        parse(tmp_path, "train.total_steps = 6", f"model.name={text}")["model"].name == "/my/text"
    )


def test_unquoted_text_reaches_a_setting_through_a_macro(tmp_path):
    text = "train.total_steps = 6\nmodel.name = %NAME"
    assert parse(tmp_path, text, "NAME=a b=c")["model"].name == "a b=c"


# ---- Where files are found -----------------------------------------------------------------------


def test_includes_are_found_in_the_working_directory_then_in_the_search_paths(
    tmp_path, monkeypatch
):
    for directory, steps in (("here", 1), ("there", 2)):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "base.gin").write_text(f"train.total_steps = {steps}")
    text, there = "include 'base.gin'", [str(tmp_path / "there")]
    assert parse(tmp_path, text, search_paths=there)["train"].total_steps == 2
    monkeypatch.chdir(tmp_path / "here")
    assert parse(tmp_path, text, search_paths=there)["train"].total_steps == 1


@pytest.mark.parametrize("layout", ["checkout", "wheel"])
def test_shipped_configs_are_found_from_any_directory(tmp_path, monkeypatch, layout):
    shipped = tmp_path / ("configs" if layout == "checkout" else "t5g2/_configs")
    (shipped / "recipes").mkdir(parents=True)
    (shipped / "recipes/r.gin").write_text("include 'configs/base.gin'")
    (shipped / "base.gin").write_text("train.total_steps = 3")
    monkeypatch.setattr(config, "_PACKAGE", tmp_path / "t5g2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.parse(SECTIONS, ["configs/recipes/r.gin"])["train"].total_steps == 3
    with pytest.raises(UserError, match=r"did you mean 'configs/recipes/r\.gin'\?$"):
        config.parse(SECTIONS, ["configs/recipe/r.gin"])


def test_a_missing_file_names_the_searched_directories_and_the_nearest_file(tmp_path):
    (tmp_path / "quickstart.gin").touch()
    with pytest.raises(UserError) as raised:
        config.parse(SECTIONS, ["quikstart.gin"], (), [str(tmp_path)])
    message = str(raised.value)
    assert message.startswith(f"no gin file 'quikstart.gin' in {Path.cwd()}, {tmp_path}, ")
    assert message.endswith("; did you mean 'quickstart.gin'?")


def test_a_missing_include_names_the_line_that_includes_it(tmp_path):
    assert error(tmp_path, "\ninclude 'no.gin'").startswith("x.gin:2: no gin file 'no.gin' in ")


def test_an_include_cycle_is_named(tmp_path):
    (tmp_path / "y.gin").write_text("\n\ninclude 'x.gin'")
    message = error(tmp_path, "include 'y.gin'", search_paths=[str(tmp_path)])
    assert message == "y.gin:3: 'x.gin' includes itself"


def test_a_search_path_that_is_no_directory_is_named(tmp_path):
    message = error(tmp_path, "", search_paths=["/no/where"])
    assert message == "gin search path '/no/where' is not a directory"


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "bad.gin").write_bytes(b"model.name = '\xff'")
    with pytest.raises(UserError, match=r"bad\.gin: cannot be read as UTF-8 text"):
        config.parse(SECTIONS, [str(tmp_path / "bad.gin")])


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian.seed = 1", "no section 'trian'; did you mean 'train'?"),
        ("xyz.seed = 1", "no section 'xyz'; there are model, train"),
        ("train.total_step = 1", "train has no setting 'total_step'; did you mean 'total_steps'?"),
        ("train.dropout = 1", "train has no setting 'dropout'; did you mean 'model.dropout'?"),
        ("train.zzz = 1", "train has no setting 'zzz'"),
        ("train.total_steps = '6'", "train.total_steps must be int, not '6'"),
        ("train.total_steps = 6.0", "train.total_steps must be int, not 6.0"),
        ("train.total_steps = True", "train.total_steps must be int, not True"),
        ("train.resume = 1", "train.resume must be bool, not 1"),
        ("model.dropout = False", "model.dropout must be float, not False"),
        ("model.softcap = 'a'", "model.softcap must be float or None, not 'a'"),
        ("model.kind = 'huge'", "model.kind must be one of 'tiny', 'small', not 'huge'"),
        ("model.name = None", "model.name must be str, not None"),
        ("train.betas = (1, 2, 3)", "train.betas must be tuple[float, float], not (1, 2, 3)"),
        ("train.layers = (1, 'a')", "train.layers must be Sequence[int], not (1, 'a')"),
        ("train.layers = 'ab'", "train.layers must be Sequence[int], not 'ab'"),
        ("train.weights = {1: 2}", "train.weights must be Mapping[str, float], not {1: 2}"),
        ("train.data = b'x'", "train.data must be Any, not b'x'"),
        (
            "train.seed = %SED\ntrain.data = %SEED\nSEED = 1",
            "the macro '%SED' has no value; did you mean 'SEED'?",
        ),
        ("B = %A\nA = %B\ntrain.seed = %A", "the macro 'A' refers to itself"),
        ("STEP = 1", "no setting uses the macro 'STEP'"),
        ("sead = 1", "no setting uses the macro 'sead'; did you mean 'train.seed'?"),
        ("a/train.seed = 1", "scope 'a/' is not supported"),
        ("train.data = [@f]", "'@f': references are not supported"),
        ("import os.path", "'import os.path': imports are not supported in gin files"),
        ("train.resume = true", "'true' is no value; did you mean 'True'?"),
        ("model.name = tiny", "'tiny' is no value (text needs quotes)"),
        ("model.name = /a", "syntax error: no value that gin can read (text needs quotes)"),
        ("train.seed 1", "syntax error: Couldn't parse statement, expected ':' or '='."),
        ("train.seed = 1 2", "syntax error: Expected newline."),
        ("train.data = {[]: 1}", "syntax error: unhashable type: 'list'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_file_line_and_nearest_name(tmp_path, text, message):
    assert error(tmp_path, f"# A comment\n\n{text}\n") == f"x.gin:3: {message}"


@pytest.mark.parametrize("text", ["train.layers = (1,\n", "train:\n  seed = 1\n seed = 2\n", "'"])
def test_text_that_cannot_be_tokenized_is_a_syntax_error_with_a_line(tmp_path, text):
    assert error(tmp_path, text).startswith(("x.gin:1: syn", "x.gin:2: syn", "x.gin:3: syn"))


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.sed=1", "--gin.train.sed: train has no setting 'sed'; did you mean 'seed'?"),
        ("train.seed=one", "--gin.train.seed: train.seed must be int, not 'one'"),
        ("train.seed", "--gin.train.seed has no value; write --gin.train.seed=VALUE"),
        ("train.seed=", "--gin.train.seed: train.seed must be int, not ''"),
        ("a/train.seed=1", "--gin.'a/train.seed': no name of a setting"),
        ("STEP=1", "--gin.STEP: no setting uses the macro 'STEP'; did you mean 'STEPS'?"),
        ("total_steps=1", "--gin.total_steps: no setting uses the macro 'total_steps'; did you"),
        ("train.data=(1, 2", "--gin.train.data: cannot read '(1, 2': syntax error"),
        ("train.data=@f", "--gin.train.data: '@f': references are not supported"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_flag(tmp_path, binding, message):
    text = "STEPS = 6\ntrain.total_steps = %STEPS"
    assert error(tmp_path, text, binding).startswith(f"command line: {message}")


def test_a_value_of_the_wrong_type_from_a_macro_names_both_places(tmp_path):
    message = error(tmp_path, "train.total_steps = %N\nN = 1", "N=many")
    assert message == (
        "x.gin:1: train.total_steps must be int, not 'many' (the macro N, command line: --gin.N)"
    )


def test_a_required_setting_without_value_is_named(tmp_path):
    assert error(tmp_path, "").startswith("train.total_steps must be given: ")


def test_what_a_dataclass_refuses_is_one_line_with_its_section(tmp_path):
    message = error(tmp_path, "train.total_steps = 6\nmodel.hidden_size = 3")
    assert message == "model: hidden_size 3 must be even"


FRAGMENTS = r"""train.data= train.seed= model.name= model: N= = 1 -2.5 1e5 'a' ''' True tiny ( ) [ ]
    { } : , %N @f a/ # include 'any.gin' import from as $ \ ; * é 0777 1_0 1j"""
gin_like = st.lists(st.sampled_from([*FRAGMENTS.split(), "\n", "\n  ", "\t", "\0"])).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | gin_like)
@example(text="'''\n\0'''")  # gin quotes the whole of it in its message
def test_whatever_is_written_is_read_or_refused_in_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.gin"
    path.write_text(text, encoding="utf-8", errors="replace")
    for files, bindings in (([str(path)], []), ([], [f"train.data={text}"]), ([], [text])):
        try:
            config.parse(SECTIONS, files, ["train.total_steps=1", *bindings])
        except UserError as refused:
            assert "\n" not in str(refused)  # noqa: PT017  (most texts are refused, not all)


# ---- Writing and comparing -----------------------------------------------------------------------

texts = st.text()
numbers = st.floats(allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner).map(tuple) | st.dictionaries(texts, inner),
    max_leaves=8,
)
configurations = st.fixed_dictionaries(
    {
        "model": st.builds(
            Model,
            hidden_size=st.integers().map(lambda half: 2 * half),
            dropout=numbers,
            kind=st.sampled_from(["tiny", "small"]),
            softcap=st.none() | numbers,
            name=texts,
        ),
        "train": st.builds(
            Train,
            total_steps=st.integers(),
            resume=st.booleans(),
            betas=st.tuples(numbers, numbers),
            layers=st.lists(st.integers()).map(tuple),
            weights=st.dictionaries(texts, numbers),
            period=st.none() | st.integers() | numbers,
            data=plain,
        ),
    }
)


few = settings(max_examples=50, deadline=None)


def typed(values):
    """Tells 1 from 1.0 and True, 0.0 from -0.0, and the order of dicts, which `==` does not."""
    return {section: repr(value) for section, value in values.items()}


@few
@given(values=configurations)
def test_the_operative_config_parses_back_to_equal_values(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "operative.gin"
    path.write_text(config.operative_config(values), encoding="utf-8")
    assert typed(config.parse(SECTIONS, [str(path)])) == typed(values)


@pytest.fixture(scope="module")
def gin():
    import gin

    for section, cls in SECTIONS.items():
        gin.external_configurable(cls, name=section)
    yield gin
    gin.clear_config()


@few
@given(values=configurations)
def test_gin_itself_reads_the_operative_config_to_the_same_values(gin, values):
    gin.clear_config()
    gin.parse_config(config.operative_config(values))
    for section, value in values.items():
        read = {f.name: gin.query_parameter(f"{section}.{f.name}") for f in fields(value)}
        assert repr(type(value)(**read)) == repr(value)


@few
@given(values=configurations)
def test_the_json_form_survives_a_file_and_keeps_the_hash(values):
    saved = json.loads(json.dumps(config.to_json_dict(values)))
    loaded = config.from_json_dict(SECTIONS, saved)
    assert typed(loaded) == typed(values)
    assert config.config_hash(loaded) == config.config_hash(values)
    assert config.differences(saved, config.to_json_dict(loaded)) == []


def test_the_hash_is_16_hex_digits_and_changes_with_any_setting():
    base = {"model": Model(), "train": Train(total_steps=6)}
    hashes = {config.config_hash(base)} | {
        config.config_hash(base | {"train": dataclasses.replace(base["train"], **change)})
        for change in ({"seed": 1}, {"resume": False}, {"layers": (0,)}, {"data": "x"})
    }
    assert len(hashes) == 5
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


def test_the_hash_does_not_depend_on_int_or_float_spelling_or_on_order():
    one = {"model": Model(dropout=1), "train": Train(total_steps=6, weights={"a": 1, "b": 2})}
    two = {"train": Train(total_steps=6, weights={"b": 2.0, "a": 1.0}), "model": Model(dropout=1.0)}
    assert config.config_hash(one) == config.config_hash(two)


def test_a_default_that_does_not_fit_its_annotation_is_the_programmers_error():
    with pytest.raises(TypeError, match=r"Model\.softcap = 'x' is not float or None"):
        config.operative_config({"model": Model(softcap="x")})


def test_differences_name_each_setting_with_both_values():
    old = {"train": {"seed": 0, "steps": 5, "layers": [1]}, "gone": {"a": "x"}}
    new = {"train": {"seed": 1, "steps": 6, "layers": (1,)}, "model": {"b": None}}
    assert config.differences(old, new, ignore={"train.steps"}) == [
        "gone.a: 'x' -> (none)",
        "model.b: (none) -> None",
        "train.seed: 0 -> 1",
    ]


def test_a_saved_configuration_takes_defaults_for_new_settings_and_refuses_unknown_ones():
    saved = {"train": {"total_steps": 6}}
    assert config.from_json_dict(SECTIONS, saved)["train"] == Train(total_steps=6)
    with pytest.raises(UserError, match=r"^saved configuration: train has no setting 'old'"):
        config.from_json_dict(SECTIONS, {"train": {"old": 1}})
