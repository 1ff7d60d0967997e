"""Writes a Hugging Face directory of T5Gemma 2 with random weights, of a released size or smaller.

    python tools/random_hf_model.py --size 1b --out DIR

One parameter at a time is in memory. There is no tokenizer in it.
"""

import argparse
import dataclasses
import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5g2.interop.hf import export_hf
from t5g2.interop.hf_config import WeightDtype
from t5g2.lazy_array import LazyArray
from t5g2.models.config import T5GEMMA2_1B, T5GEMMA2_4B, T5GEMMA2_270M, ModelConfig
from t5g2.models.t5gemma2 import abstract_model, parameter_tree

SIZES = {"270m": T5GEMMA2_270M, "1b": T5GEMMA2_1B, "4b": T5GEMMA2_4B}


def write_random_model(config: ModelConfig, out: Path, dtype: WeightDtype = "bfloat16") -> int:
    """Writes the directory and returns the number of parameters; N(0, initializer_range²)."""
    tree = parameter_tree(abstract_model(config))

    def lazy(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.ShapeDtypeStruct) -> LazyArray:
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        read = functools.partial(_random, leaf.shape, dtype, config.initializer_range, seed)
        return LazyArray(leaf.shape, jnp.dtype(dtype), read)

    export_hf(jax.tree_util.tree_map_with_path(lazy, tree), config, out)
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _random(shape: tuple[int, ...], dtype: str, std: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = np.empty(shape, jnp.dtype(dtype))
    flat = array.reshape(-1)
    for part in np.array_split(flat, 1 + flat.size // 2**24):
        part[...] = rng.standard_normal(part.size, np.float32) * np.float32(std)
    return array


def main() -> None:
    """Runs the tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--layers", type=int, metavar="N", help="default: the size's own")
    parser.add_argument("--text_only", action="store_true", help="without a vision tower")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    config = SIZES[args.size]
    config = dataclasses.replace(
        config,
        num_layers=args.layers or config.num_layers,
        vision=None if args.text_only else config.vision,
    )
    print(f"{args.out}: {write_random_model(config, args.out, args.dtype):,} parameters")


if __name__ == "__main__":
    main()
