"""The vision tower at the size that all released models have, against transformers."""

import jax
import numpy as np
import pytest
import reference
import torch
from test_transformers_parity import ours_of
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from t5g2.interop.hf_vision import to_hf_vision
from t5g2.models.config import VisionConfig


@pytest.mark.slow
def test_image_features_of_siglip_at_896_pixels_equal_transformers(tmp_path):
    config = reference.hf_config(layers=1).to_dict()
    config["encoder"] |= {**to_hf_vision(VisionConfig(boi_id=10, image_id=12))}
    config["image_token_index"] = reference.IMAGE
    torch.manual_seed(0)
    model = T5Gemma2ForConditionalGeneration(T5Gemma2Config(**config)).eval()
    with torch.no_grad():
        for parameter in model.model.encoder.multi_modal_projector.parameters():
            parameter.normal_(0, 0.1)  # transformers starts them at zero
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 896, 896)).astype(np.float32)
    with torch.no_grad():
        theirs = model.model.encoder.get_image_features(torch.tensor(pixels)).pooler_output
    model.save_pretrained(tmp_path)
    del model
    ours = ours_of(tmp_path)

    @jax.jit
    def features(model, images):
        return model.projector(model.visual_tokens(images))

    got = features(ours, np.moveaxis(pixels, 1, -1)[None])
    assert got.shape == (1, 256, 64)
    error = np.abs(np.asarray(got) - theirs.numpy()).max() / theirs.numpy().std()
    assert error < 5e-5, f"off by {error:.1e} of the standard deviation"
