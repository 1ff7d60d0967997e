"""t5g2: pretrain T5Gemma-2-style encoder-decoders with the UL2 objective, in JAX."""
