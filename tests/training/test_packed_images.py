"""Losses of rows with images: those of their examples alone, and the same from stored features."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from image_corpus import EOI_ID, VISION, write_image_mixture

from t5g2 import cache
from t5g2.checkpoints.store import write_parameters
from t5g2.data.batch import empty_batch, write_rows
from t5g2.data.corpus import TokenizerConfig, open_corpus, row_stream
from t5g2.data.loader import RowBatches
from t5g2.data.mixture import DataConfig
from t5g2.data.packing import Cuts
from t5g2.data.sources import CorpusConfig
from t5g2.data.tokenizer import load_tokenizer
from t5g2.errors import UserError
from t5g2.models.config import ModelConfig, VisionConfig
from t5g2.parallel.mesh import MeshConfig, make_mesh
from t5g2.parallel.rules import batch_shardings, make_layout
from t5g2.settings import model_to_json
from t5g2.training.optimizer import OptimizerConfig, make_optimizer
from t5g2.training.state import make_initial_state, state_shardings
from t5g2.training.step import compile_train_step, loss_sums
from t5g2.visual_tokens import check_tower, tower_fingerprint

CONFIG = ModelConfig(
    vocab_size=420,
    hidden_size=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    sliding_window=16,
    global_every=2,
    eoi_id=EOI_ID,
    initializer_range=0.25,
    vision=VisionConfig(**VISION),
)
DATA = DataConfig(inputs_length=224, targets_length=96, images_per_row=3)
TOKENIZER = TokenizerConfig(vocab_size=420, sentinels=32, train_bytes=100_000)
ROWS = 4
# What a stored visual token loses: bfloat16 has 8 bits of precision.
STORAGE_TOLERANCE = 2**-8


@pytest.fixture(scope="module")
def home(tmp_path_factory, standard_library):
    """A directory with a mixture of pictures and text, and a checkpoint over their tokenizer."""
    home = tmp_path_factory.mktemp("pictures")
    write_image_mixture(home, standard_library(300_000))
    return home


@pytest.fixture(scope="module")
def layout():
    return make_layout(make_mesh(MeshConfig()))


@pytest.fixture(scope="module")
def first_state(layout):
    """Makes the state, which a step consumes."""
    optimizer = make_optimizer(OptimizerConfig(), lambda step: 1e-2)
    shapes, shardings = state_shardings(CONFIG, optimizer, layout)
    return optimizer, shapes, shardings, lambda: make_initial_state(CONFIG, optimizer, shardings, 0)


@pytest.fixture(scope="module")
def caches(home, first_state):
    """Caches of the images, and of what the state's tower makes of them."""
    mixture = CorpusConfig(mixture=str(home / "mixture.toml"), heldout_share=0.1)
    made = functools.partial(cache.make_cache, mixture, TOKENIZER, tasks=[], workers=1)
    made(home / "images", model=CONFIG)
    checkpoint = home / "checkpoint"
    checkpoint.mkdir()
    meta = {"step": 0, "model": model_to_json(CONFIG), "tokenizer": "../images/tokenizer"}
    params = jax.tree.map(np.asarray, first_state[-1]().params)
    write_parameters(checkpoint, params, meta)
    made(home / "features", model=CONFIG, vision=checkpoint)
    return {name: CorpusConfig(cache=str(home / name)) for name in ("images", "features")}


def stream_of(config, home, split="train"):
    corpus = open_corpus(config, load_tokenizer(home / "images" / "tokenizer"), CONFIG)
    return corpus, row_stream(corpus, split, DATA, ROWS)


def test_an_example_has_the_loss_in_a_packed_row_that_it_has_alone(home, caches, first_state):
    _, stream = stream_of(caches["images"], home)
    params = first_state[-1]().params
    cursors = stream.start()
    batch = empty_batch(2 * ROWS, *stream.room, stream.images)
    alone = empty_batch(48, *stream.room, stream.images)
    examples = images = packed = 0
    for row in range(2 * ROWS):
        own_stream = row % ROWS
        here = slice(own_stream, own_stream + 1)
        cuts, cursors[here] = stream.cut_rows(own_stream, cursors[here])
        packed += len({stream.tasks[task].source for task in cuts.task}) == 2
        slot = 0
        write_rows({n: a[row : row + 1] for n, a in batch.items()}, stream, own_stream, cuts)
        for number in range(1, len(cuts.row) + 1):
            only = slice(examples, examples + 1)
            piece = Cuts(*(column[number - 1 : number] for column in cuts))
            write_rows({n: a[only] for n, a in alone.items()}, stream, own_stream, piece)
            if piece.images[0]:
                pixels = stream.piece_images(piece.task[0], piece.document[0])
                batch["images"][row, slot : slot + len(pixels)] = pixels
                alone["images"][examples, : len(pixels)] = pixels
                slot += len(pixels)
            # The loss of each example is told apart as that of a task of its own.
            own = batch["decoder_segment_ids"][row] == number
            batch["decoder_task_ids"][row, own] = examples
            alone["decoder_task_ids"][examples] = examples
            examples += 1
        images += slot
    assert packed >= 2
    assert images >= 6
    loss = jax.jit(functools.partial(loss_sums, CONFIG, num_tasks=48))
    in_rows, by_itself = (loss(params, batch=found)[1] for found in (batch, alone))
    np.testing.assert_array_equal(in_rows.targets, by_itself.targets)
    np.testing.assert_allclose(in_rows.nll, by_itself.nll, rtol=2e-5)
    # The images matter, each in its own place.
    batch["images"] = batch["images"][:, ::-1].copy()
    turned = loss(params, batch=batch)[1]
    assert np.abs(turned.nll - in_rows.nll).max() > 1e-2


def test_both_forms_of_images_train_alike(home, caches, layout, first_state):
    optimizer, shapes, shardings, make = first_state
    metrics, params = {}, {}
    for form, config in caches.items():
        corpus, stream = stream_of(config, home)
        state = make()
        check_tower(corpus, state.params)
        step = compile_train_step(
            layout,
            shapes,
            shardings,
            rows=ROWS,
            room=stream.room,
            images=stream.images,
            config=CONFIG,
            optimizer=optimizer,
            num_tasks=len(stream.tasks),
            accumulation=1,
        )
        rows = iter(RowBatches(stream, stream.start(), 0, ROWS))
        metrics[form] = []
        for _ in range(4):
            batch = next(rows).batch
            batch = jax.device_put(batch, batch_shardings(layout, batch))
            assert ("images" in batch) == (form == "images")
            state, found = step(state, batch)
            metrics[form].append(found)
        params[form] = state.params["vision"]
    task = [task.name for task in stream.tasks].index("pictures/prefix")
    for images, features in zip(*metrics.values(), strict=True):
        np.testing.assert_array_equal(features.sums.targets, images.sums.targets)
        assert images.sums.targets[task] > 0
        np.testing.assert_allclose(features.sums.nll, images.sums.nll, rtol=STORAGE_TOLERANCE)
        np.testing.assert_allclose(features.grad_norm, images.grad_norm, rtol=4 * STORAGE_TOLERANCE)
    jax.tree.map(np.testing.assert_array_equal, params["images"], params["features"])


def test_visual_tokens_of_another_tower_are_refused(home, caches, first_state):
    params = jax.tree.map(np.asarray, first_state[-1]().params)
    corpus, _ = stream_of(caches["features"], home)
    check_tower(corpus, params)
    assert corpus.tower == tower_fingerprint(params["vision"])
    for change in (1e-7, -1.0):
        other = jax.tree.map(np.copy, params)
        other["vision"]["layers"]["up"]["weight"][1, 2, 3] += change
        with pytest.raises(UserError, match=r"visual tokens were made by another vision tower"):
            check_tower(corpus, other)
    other["vision"]["layers"]["up"]["weight"] = params["vision"]["layers"]["up"]["weight"][::-1]
    assert tower_fingerprint(other["vision"]) != corpus.tower
    check_tower(stream_of(caches["images"], home)[0], other)


@pytest.mark.parametrize("form", ["images", "features"])
def test_a_model_that_reads_images_otherwise_is_refused(home, caches, form):
    tokenizer = load_tokenizer(home / "images" / "tokenizer")

    def refusal(**changes):
        vision = dataclasses.replace(CONFIG.vision, **changes)
        with pytest.raises(UserError) as error:
            open_corpus(caches[form], tokenizer, dataclasses.replace(CONFIG, vision=vision))
        assert "reads images otherwise" in str(error.value)
        return str(error.value)

    assert "images.image_id: 38 -> 39" in refusal(image_id=39)
    assert "images.per_image: 4 -> 1" in refusal(tokens_per_image=1)
    text = dataclasses.replace(CONFIG, vision=None)
    with pytest.raises(UserError, match=r"source pictures: format: .* no vision tower"):
        open_corpus(caches[form], tokenizer, text)
    if form == "features":
        assert "vision.num_heads: 2 -> 4" in refusal(num_heads=4)
    else:
        larger = dataclasses.replace(CONFIG.vision, image_size=56, hidden_size=48)
        corpus = open_corpus(caches[form], tokenizer, dataclasses.replace(CONFIG, vision=larger))
        stream = row_stream(corpus, "train", DATA, ROWS)
        assert stream.images.slot.shape == (56, 56, 3)
