"""Settings: the shipped files, and which settings may change in a run."""

from pathlib import Path

import pytest

from t5g2 import config, settings
from t5g2.errors import UserError
from t5g2.models import config as models
from t5g2.train import train

ROOT = Path(__file__).parent.parent
RECIPE = "configs/recipes/quickstart.gin"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tiny", models.TINY),
        ("t5gemma2_270m", models.T5GEMMA2_270M),
        ("t5gemma2_1b", models.T5GEMMA2_1B),
        ("t5gemma2_4b", models.T5GEMMA2_4B),
    ],
)
def test_the_shipped_sizes_are_those_of_the_code(name, size):
    sections = {"model": models.ModelConfig}
    assert config.parse(sections, [f"configs/models/{name}.gin"])["model"] == size


@pytest.mark.parametrize("path", sorted((ROOT / "configs/recipes").glob("*.gin")), ids=str)
def test_every_recipe_is_complete_and_survives_being_written_down(path, tmp_path):
    read = settings.read_settings([str(path)])
    (tmp_path / "config.gin").write_text(read.to_gin())
    again = settings.run_settings(tmp_path)
    assert again == read
    assert again.hash() == read.hash()
    assert settings.from_json(read.to_json()) == read


def test_where_and_how_often_may_change_but_not_what(tmp_path):
    first = settings.read_settings([RECIPE])
    (tmp_path / "config.gin").write_text(first.to_gin())
    harmless = ["mesh.fsdp=2", "checkpoints.every=7", "train.stop_at=9", "model.remat=full"]
    settings.check_same_run(tmp_path, settings.overridden(first, harmless))
    with pytest.raises(UserError, match=r"optimizer.b2: 0.95 -> 0.99"):
        settings.check_same_run(tmp_path, settings.overridden(first, ["optimizer.b2=0.99"]))


def test_every_exempt_setting_exists():
    known = {
        f"{name}.{field}"
        for name, part in settings.SECTIONS.items()
        for field in part.__dataclass_fields__
    }
    assert known >= settings.MAY_CHANGE


def test_changes_of_data_are_accepted_by_an_explicit_setting_alone(tmp_path):
    first = settings.read_settings([RECIPE])
    (tmp_path / "config.gin").write_text(first.to_gin())
    changes = ["train.rows=16", "data.denoisers=ul2", "corpus.split_bytes=4000"]
    with pytest.raises(UserError, match=r"train.rows: 8 -> 16.*by train.accept_changes = True$"):
        settings.check_same_run(tmp_path, settings.overridden(first, changes))
    accepting = settings.overridden(first, [*changes, "train.accept_changes=True"])
    assert settings.check_same_run(tmp_path, accepting) == [
        "corpus.split_bytes: 2000 -> 4000",
        "data.denoisers: 't5gemma2' -> 'ul2'",
        "train.rows: 8 -> 16",
    ]
    other_model = settings.overridden(accepting, ["optimizer.b2=0.99"])
    with pytest.raises(UserError, match=r"optimizer.b2: 0.95 -> 0.99.*started with$"):
        settings.check_same_run(tmp_path, other_model)


def test_a_bucket_is_refused_and_no_directory_of_its_name_made():
    with pytest.raises(UserError, match=r"gs:/bucket/run: pathlib took a slash"):
        train(settings.read_settings([RECIPE]), Path("gs://bucket/run"))
