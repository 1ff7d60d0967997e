"""Time per token of a local attention layer, forward and backward, at several lengths.

    python tools/bench/local_layer.py

One row, the heads of the 270M model, window 512, float32. All lengths in turn, round by round; the
ratio is that of a round's times per token to the first length's. A layer whose cost is its window's
has 1; one that makes a matrix of queries by keys grows with the length.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5g2.kernels.attention import KeyValues, attention
from t5g2.models.attention import decoder_window, encoder_window
from t5g2.models.config import T5GEMMA2_270M


def layer(side: str, length: int) -> Callable[[], None]:
    """Runs a layer's attention of one row, and its gradient."""
    config = T5GEMMA2_270M
    window = (encoder_window if side == "encoder" else decoder_window)(config, False)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, (1, length, heads, config.head_dim))
        for k, heads in zip(
            keys, (config.num_heads, config.num_kv_heads, config.num_kv_heads), strict=True
        )
    )
    segments = jnp.ones((1, length), jnp.int32)
    positions = jnp.arange(length)[None]

    @jax.jit
    @jax.grad
    def gradient(inputs: tuple[jax.Array, ...]) -> jax.Array:
        seen = KeyValues(*inputs[1:], segments, positions)
        mixed = attention(inputs[0], segments, positions, seen, None, window=window, scale=1 / 16)
        return jnp.sum(mixed**2)

    return lambda: jax.block_until_ready(gradient((query, key, value)))


def main() -> None:
    """Prints a line for each length, and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    report = {}
    for side in ("encoder", "decoder"):
        layers = {length: layer(side, length) for length in args.lengths}
        seconds: dict[int, list[float]] = {length: [] for length in layers}
        for run in layers.values():
            run()
        for _ in range(args.rounds):
            for length, run in layers.items():
                began = time.perf_counter()
                run()
                seconds[length].append((time.perf_counter() - began) / length)
        first = seconds[args.lengths[0]]
        for length, times in seconds.items():
            ratio = statistics.median(b / a for a, b in zip(first, times, strict=True))
            median = statistics.median(times) * 1e6
            print(f"{side} {length:6}: {median:8.2f} us a token, {ratio:5.2f} x", flush=True)
            report[f"{side} {length}"] = {"seconds_per_token": times, "ratio": ratio}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
