import pytest
from cache_parts import PLAN, contents, make_cache, small_parts

from t5g2.data.cache_writing import (
    CacheWriter,
    Part,
    begin_cache,
    begun_cache,
    cache_directory,
    write_cache,
)
from t5g2.errors import UserError

pytest.importorskip("apache_beam")

from t5g2.data.cache_beam import write_with_beam


def with_beam(directory, tokenizer, runner: str, options: list[str], parts=None) -> None:
    with cache_directory(directory):
        (directory / "tokenizer").mkdir(exist_ok=True)
        (directory / "tokenizer" / tokenizer.path.name).write_bytes(tokenizer.path.read_bytes())
        begin_cache(directory, PLAN, tokenizer)
        kept = begun_cache(directory, PLAN)
        writer = CacheWriter(directory=directory, parts=parts or small_parts(), tokenizer=kept)
        write_cache(writer, PLAN, lambda todo: write_with_beam(writer, todo, runner, options))


@pytest.mark.parametrize(
    "options", [[], ["direct_num_workers=2", "direct_running_mode=multi_processing"]]
)
def test_beam_writes_the_bytes_that_workers_write(tmp_path, tiny_tokenizer, options):
    with_beam(tmp_path / "beam", tiny_tokenizer, "DirectRunner", options)
    make_cache(tmp_path / "workers", tiny_tokenizer.path, workers=2)
    assert contents(tmp_path / "beam") == contents(tmp_path / "workers")


def test_a_runner_that_does_not_exist_is_one_line(tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match="--runner NoSuchRunner"):
        with_beam(tmp_path / "beam", tiny_tokenizer, "NoSuchRunner", [])


def test_a_document_that_cannot_be_read_is_one_line(tmp_path, tiny_tokenizer):
    prose, _, heldout = small_parts()
    broken = Part(split="train", source="code", texts=["good", "\ud800"])
    with pytest.raises(UserError, match="lone surrogate") as error:
        with_beam(tmp_path / "b", tiny_tokenizer, "DirectRunner", [], (prose, broken, heldout))
    assert "\n" not in str(error.value)
