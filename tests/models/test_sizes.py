"""The released sizes, evaluated abstractly: nothing of their weights is ever made."""

import dataclasses

import jax
import pytest

from t5g2.models.config import T5GEMMA2_1B, T5GEMMA2_4B, T5GEMMA2_270M
from t5g2.models.t5gemma2 import FROZEN, abstract_model, logical_axes, parameter_tree
from t5g2.settings import read_settings

# Total with the tower; embeddings, either stack without them, projector (arXiv:2512.14856 gives
# "~370M", "~1.7B" and "~7B" of text; the last digits are those of transformers' model).
SIZES = {
    "270m": (T5GEMMA2_270M, 786_029_296, 167_772_160, 100_326_016, 738_432),
    "1b": (T5GEMMA2_1B, 2_115_977_456, 301_989_888, 697_896_064, 1_328_256),
    "4b": (T5GEMMA2_4B, 7_508_928_880, 671_088_640, 3_209_010_688, 2_950_272),
}
NEEDED = ("train.rows=8", "train.total_steps=1", "data.inputs_length=8", "data.targets_length=8")


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_released_models_to_the_last_digit(size):
    config, total, embeddings, stack, projector = SIZES[size]
    tree = parameter_tree(abstract_model(config))
    assert {name: count(part) for name, part in tree.items()} == {
        "embedder": embeddings + config.hidden_size,  # the end-of-image embedding
        "encoder": stack,
        "decoder": stack,
        "projector": projector,
        "vision": 416_866_032,
    }
    assert count(tree) == total
    text = parameter_tree(abstract_model(dataclasses.replace(config, vision=None)))
    assert set(tree) - set(text) == {"vision", "projector"} > FROZEN


@pytest.mark.parametrize("size", SIZES)
def test_the_gin_file_of_a_size_is_its_config(size):
    settings = read_settings([f"configs/models/t5gemma2_{size}.gin"], NEEDED)
    assert settings.model == SIZES[size][0]


@pytest.mark.parametrize("size", SIZES)
def test_scanned_and_unrolled_models_have_one_parameter_tree(size):
    config = SIZES[size][0]
    assert config.num_layers % config.global_every == {"270m": 0, "1b": 2, "4b": 4}[size]
    scanned, unrolled = (
        dataclasses.replace(config, scan_layers=scan_layers) for scan_layers in (True, False)
    )
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameter_tree(abstract_model(c)))
        for c in (scanned, unrolled)
    ]
    assert shapes[0] == shapes[1]
    assert logical_axes(scanned) == logical_axes(unrolled)
