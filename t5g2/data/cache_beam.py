"""Writing the shards of a cache with Apache Beam: one element is one shard."""

from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from t5g2.data.cache_writing import CacheWriter, Todo
from t5g2.errors import UserError


def write_with_beam(
    writer: CacheWriter, todo: Sequence[Todo], runner: str, options: Sequence[str]
) -> None:
    """Writes shards wherever a Beam runner has them written.

    The cache's directory, and the sources' files, must be the same on all its machines.

    Args:
        writer: of the cache.
        todo: the shards.
        runner: a runner's name, such as "DirectRunner" or "FlinkRunner".
        options: Beam's pipeline options, as NAME=VALUE.

    Raises:
        UserError: no such runner, or a shard cannot be written.
    """
    if not todo:
        return
    flags = [f"--{option}" for option in options]
    try:
        pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(flags))
    except ValueError as error:
        raise UserError(f"--runner {runner}: {error}") from None
    shards = pipeline | "shards" >> beam.Create(list(todo)) | "spread" >> beam.Reshuffle()
    _ = shards | "write" >> beam.Map(_write, writer)
    pipeline.run().wait_until_finish()


def _write(todo: Todo, writer: CacheWriter) -> None:
    writer.write(todo, lambda documents, tokens: None)
