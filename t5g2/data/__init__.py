"""From documents to global batches: sources, tokenizers, denoisers, sampling, packing, loading."""
