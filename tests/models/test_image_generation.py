"""Generation from images: against transformers, and against its own contract."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from test_generation import CONFIG, NEVER, randomised

from t5g2.errors import UserError
from t5g2.interop.hf import export_hf
from t5g2.models.config import VisionConfig
from t5g2.models.generation import generate, stream
from t5g2.models.t5gemma2 import parameter_tree

VISION = VisionConfig(
    hidden_size=24,
    mlp_dim=40,
    num_layers=2,
    num_heads=2,
    image_size=28,
    patch_size=7,
    tokens_per_image=4,
    boi_id=296,
    image_id=297,
)
IMAGE = [VISION.boi_id, *[VISION.image_id] * VISION.tokens_per_image, CONFIG.eoi_id]
STARTS = ([2], [], [0, 7, 13])  # of each row's images


@pytest.fixture(scope="module")
def model():
    return randomised(dataclasses.replace(CONFIG, vision=VISION))


def prompts():
    """Ids, mask and images of three rows with one, no and three images."""
    rng = np.random.default_rng(2)
    ids = rng.integers(3, 290, (len(STARTS), 21))
    mask = np.ones_like(ids)
    mask[0, 15:] = 0
    ids[mask == 0] = 0
    for row, starts in enumerate(STARTS):
        for start in starts:
            ids[row, start : start + len(IMAGE)] = IMAGE
    images = rng.uniform(-1, 1, (4, 28, 28, 3)).astype(np.float32)
    return ids, mask, images


def test_greedy_is_transformers_token_for_token_far_past_the_window(model, tmp_path):
    export_hf(parameter_tree(model), model.config, tmp_path / "hf")
    reference = transformers.T5Gemma2ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    ids, mask, images = prompts()
    reference.generation_config.eos_token_id = list(NEVER)
    theirs = reference.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        pixel_values=torch.tensor(np.moveaxis(images, -1, 1)),
        max_new_tokens=200,
        do_sample=False,
    )[:, 1:].numpy()
    ours = generate(model, ids, mask, max_new_tokens=200, eos_ids=NEVER, images=images)
    np.testing.assert_array_equal(ours, theirs)
    other = generate(model, ids, mask, max_new_tokens=200, eos_ids=NEVER, images=images[::-1])
    assert [np.array_equal(a, b) for a, b in zip(ours, other, strict=True)] == [False, True, False]


def test_streaming_and_rows_alone_give_the_same(model):
    ids, mask, images = prompts()
    whole = generate(model, ids, mask, max_new_tokens=9, eos_ids=NEVER, images=images)
    columns = stream(model, ids, mask, max_new_tokens=9, eos_ids=NEVER, images=images)
    np.testing.assert_array_equal(np.stack(list(columns), axis=1), whole)
    alone = generate(model, ids[2:], max_new_tokens=9, eos_ids=NEVER, images=images[1:])
    np.testing.assert_array_equal(alone[0], whole[2])


def test_images_that_do_not_fit_their_places_are_refused(model):
    ids, _, images = prompts()
    for given, message in (
        (images[:3], r"3 images need 4 tokens 297 each, but the rows .* have \[4, 0, 12\]"),
        (images[..., :20, :], r"images must be \[images, 28, 28, 3\], not \[4, 28, 20, 3\]"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, ids, max_new_tokens=2, eos_ids=NEVER, images=given)
    with pytest.raises(UserError, match="no vision tower"):
        generate(randomised(CONFIG), ids, max_new_tokens=2, eos_ids=NEVER, images=images)
