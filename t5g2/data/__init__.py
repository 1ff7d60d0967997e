"""From documents to global batches: sources, tokenizers, denoisers, sampling, packing, loading."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t5g2.data.batch import Batch
    from t5g2.data.mixture import Mixture


def batches(
    mixture: "Mixture", feature_lengths: Mapping[str, int], batch_size: int, seed: int = 0
) -> "Iterator[Batch]":
    """Endless packed batches of a mixture, as a run on one host with this data seed is fed.

    Args:
        mixture: sources, denoisers and their rates: a `t5g2.data.mixture.Mixture`.
        feature_lengths: encoder tokens in a row as "inputs", decoder tokens as "targets".
        batch_size: rows of a batch.
        seed: of the order of documents, the choice of denoisers and the noise.

    Returns:
        An iterator of dictionaries of numpy arrays; `t5g2.data.batch.empty_batch` has their names,
        shapes and dtypes.

    Raises:
        UserError: something else than a mixture, lengths of other features, a size below 1, or
            lengths that do not suit a denoiser or the sentinels.
    """
    from t5g2.data.loader import RowBatches
    from t5g2.data.mixture import Mixture
    from t5g2.data.packing import RowStream
    from t5g2.errors import UserError

    if not isinstance(mixture, Mixture):
        raise UserError(
            f"batches takes a t5g2.data.mixture.Mixture, such as Corpus.mixture makes, not "
            f"{mixture!r}; data that seqio knows by a name comes from seqio's own get_dataset"
        )
    if set(feature_lengths) != {"inputs", "targets"}:
        raise UserError(
            "feature_lengths must give the lengths of 'inputs' and 'targets', not of "
            f"{sorted(feature_lengths)}"
        )
    sizes = {"batch_size": batch_size, **feature_lengths}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} must be at least 1, not {size}")
    stream = RowStream(
        mixture, batch_size, feature_lengths["inputs"], feature_lengths["targets"], seed
    )
    rows = RowBatches(stream, stream.start(), 0, batch_size)
    return (step.batch for step in rows.prefetched())
