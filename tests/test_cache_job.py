import importlib.util
from pathlib import Path

import pytest
from small_run import write_corpus, write_recipe

from t5g2.cli import main


@pytest.fixture
def recipe(tmp_path, standard_library) -> Path:
    modules = standard_library(400_000)
    texts = [module[start : start + 2000] for module in modules for start in range(0, 20_000, 2000)]
    return write_recipe(tmp_path / "small.gin", write_corpus(tmp_path / "texts", texts))


def test_the_job_makes_a_cache_goes_on_and_verifies_it(recipe, tmp_path, capsys):
    command = ["cache", "--gin_file", str(recipe), "--out", str(tmp_path / "cache")]
    assert main([*command, "--workers", "2"]) == 0
    said = capsys.readouterr()
    assert "--gin.corpus.cache=" in said.out
    assert "document" in said.err
    assert main(["cache", "--verify", str(tmp_path / "cache")]) == 0
    assert "all 2 shards are as the manifest says" in capsys.readouterr().out
    shard = next((tmp_path / "cache" / "train").iterdir())
    content = bytearray(shard.read_bytes())
    content[100_000] ^= 1
    shard.write_bytes(content)
    assert main(["cache", "--verify", str(tmp_path / "cache")]) == 2
    assert f"train/{shard.name} (checksum mismatch)" in capsys.readouterr().err
    shard.unlink()
    left = [tmp_path / "cache" / ".manifest.json.7.tmp", tmp_path / "cache/tokenizer/t.model.7.tmp"]
    for path in left:  # of processes killed earlier
        path.touch()
    assert main(command) == 0
    assert "going on: 1 of 2 shards stand" in capsys.readouterr().err
    assert not any(path.exists() for path in left)
    assert main(["cache", "--verify", str(tmp_path / "cache")]) == 0
    assert main([*command, "--gin.tokenizer.vocab_size=430"]) == 2
    assert "tokenizer.vocab_size: 420 -> 430" in capsys.readouterr().err


def test_a_cache_can_be_looked_at_before_any_run(recipe, tmp_path, capsys):
    assert main(["cache", "--gin_file", str(recipe), "--out", str(tmp_path / "cache")]) == 0
    capsys.readouterr()
    binding = f"--gin.corpus.cache={tmp_path / 'cache'}"
    assert main(["inspect", "data", "--gin_file", str(recipe), "--batches", "2", binding]) == 0
    assert "prefix_75" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --out --verify is required"),
        (["--out", "a", "--verify", "b"], "not allowed with argument"),
        (["--out", "a", "--workers", "0"], "--workers must be at least 1"),
        (["--out", "a", "--runner_option", "x=1"], "--runner_option is for --runner"),
        (["--verify", "nowhere"], "nowhere is no cache"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["cache", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is there")
def test_a_runner_without_beam_says_what_to_install(recipe, tmp_path, capsys):
    command = ["cache", "--gin_file", str(recipe), "--out", str(tmp_path / "cache")]
    assert main([*command, "--runner", "DirectRunner"]) == 2
    assert "pip install 't5g2[beam]'" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
