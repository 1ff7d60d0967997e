"""Directories as they are on disk: round trips, spellings, and everything that can be wrong."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import reference
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from t5g2.errors import UserError
from t5g2.interop.hf import (
    export_hf,
    load_hf,
    load_hf_params,
    new_directory,
    open_hf,
    read_hf_config,
    write_hf,
)
from t5g2.interop.hf_config import from_hf_config
from t5g2.lazy_array import LazyArray
from t5g2.models.config import TINY
from t5g2.models.t5gemma2 import abstract_model, parameter_tree

CONFIG = dataclasses.replace(TINY, vocab_size=64, hidden_size=16, mlp_dim=24, head_dim=4)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    tree = parameter_tree(abstract_model(CONFIG))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


@pytest.fixture
def exported(params, tmp_path):
    export_hf(params, CONFIG, tmp_path / "out")
    return tmp_path / "out"


def rewrite(directory, change):
    """Applies `change` to the dict of tensors on disk."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def as_dtype(params, dtype):
    return jax.tree.map(lambda p: p.astype(jax.numpy.dtype(dtype)), params)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("to_array", [np.asarray, jax.numpy.asarray])
def test_every_tensor_survives_export_and_load_bit_for_bit(params, to_array, tmp_path):
    export_hf(jax.tree.map(to_array, params), CONFIG, tmp_path / "out")
    config, loaded = load_hf(tmp_path / "out")
    assert config == CONFIG
    assert_equal(loaded, params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))


def test_shards_hold_no_more_than_asked_and_load_the_same_here_and_in_transformers(
    params, tmp_path
):
    limit = 30_000
    export_hf(params, CONFIG, tmp_path / "out", max_shard_bytes=limit)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = 0
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit
        assert all(index["weight_map"].pop(name) == shard.name for name in tensors)
        total += sum(t.nbytes for t in tensors.values())
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == total
    assert_equal(load_hf(tmp_path / "out")[1], params)
    _, info = reference.load_model(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


def test_bfloat16_export_loads_as_the_rounded_values_in_half_the_bytes(params, exported, tmp_path):
    export_hf(params, CONFIG, tmp_path / "half", dtype="bfloat16")
    config, loaded = load_hf(tmp_path / "half")
    assert config == dataclasses.replace(CONFIG, dtype="bfloat16")
    assert_equal(loaded, as_dtype(params, "bfloat16"))
    sizes = [
        sum(t.nbytes for t in load_file(d / "model.safetensors").values())
        for d in (exported, tmp_path / "half")
    ]
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_keep_their_dtype_and_bits_in_memory_and_when_exported_again(
    dtype, params, tmp_path
):
    one, other = tmp_path / "one", tmp_path / "other"
    export_hf(as_dtype(params, dtype), CONFIG, one)
    _, loaded = load_hf(one)
    assert_equal(loaded, as_dtype(params, dtype))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(loaded))
    export_hf(open_hf(one)[1], CONFIG, other)
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_weights_of_several_dtypes_keep_each_its_own(params, exported, tmp_path):
    def halve(tensors):
        for name in tensors:
            if "mlp" in name:
                tensors[name] = tensors[name].astype(np.float16)

    rewrite(exported, halve)
    config, loaded = load_hf(exported)
    assert loaded["encoder"]["layers"]["mlp"]["gate"].dtype == np.float16
    assert loaded["embedder"]["table"].dtype == np.float32
    export_hf(loaded, config, tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (exported, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name])


def test_names_as_in_the_memory_of_torch_and_tied_tensors_are_read(params, exported):
    def respell(tensors):
        for name in list(tensors):
            if name.startswith(("model.encoder.layers", "model.encoder.embed", "model.encoder.no")):
                respelled = name.replace("model.encoder.", "model.encoder.text_model.")
                tensors[respelled] = tensors.pop(name)
        table = tensors["model.encoder.text_model.embed_tokens.weight"]
        tensors["lm_head.out_proj.weight"] = table.copy()

    rewrite(exported, respell)
    assert_equal(load_hf(exported)[1], params)


def test_a_tower_left_out_is_logged_with_the_number_of_its_tensors(tmp_path, caplog):
    reference.save_model(tmp_path, 0)
    config = from_hf_config(read_hf_config(tmp_path), text_only=True)
    loaded = load_hf_params(tmp_path, config)
    assert "23 tensors of the image side are left out" in caplog.text
    tensors = load_file(tmp_path / "model.safetensors")
    towers = [n for n in tensors if "vision_tower" in n or "projector" in n]
    assert len(towers) == 23
    assert "vision" not in loaded
    np.testing.assert_array_equal(
        loaded["embedder"]["table"], tensors["model.encoder.embed_tokens.weight"]
    )


def test_our_own_placeholder_tower_is_not_worth_a_line(exported, caplog):
    load_hf(exported)
    assert not caplog.text


def test_all_tensors_that_are_wrong_are_named_in_one_line(exported):
    def spoil(tensors):
        del tensors["model.decoder.layers.3.mlp.up_proj.weight"]
        tensors["model.decoder.norm.weight"] = np.zeros(17, np.float32)
        tensors["model.encoder.norm.weight"] = np.zeros(16, np.int32)
        tensors["model.decoder.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        tensors["lm_head.out_proj.weight"] = np.zeros((64, 16), np.float32)

    rewrite(exported, spoil)
    with pytest.raises(UserError) as caught:
        load_hf(exported)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "missing: model.decoder.layers.3.mlp.up_proj.weight;",
        "unexpected: model.decoder.layers.9.mlp.up_proj.weight;",
        "wrong shape: model.decoder.norm.weight [17] instead of [16];",
        "not float32, bfloat16, float16: model.encoder.norm.weight int32;",
        "tied to: lm_head.out_proj.weight",
    ):
        assert part in message


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_an_error_that_names_it(exported, keep):
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_hf(exported)


def test_a_missing_shard_is_an_error_that_names_it(params, tmp_path):
    export_hf(params, CONFIG, tmp_path / "out", max_shard_bytes=30_000)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        load_hf(tmp_path / "out")


def test_a_damaged_index_is_an_error_that_names_it(params, tmp_path):
    export_hf(params, CONFIG, tmp_path / "out", max_shard_bytes=30_000)
    (tmp_path / "out/model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_hf(tmp_path / "out")


def test_what_is_no_model_directory_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_hf(tmp_path / "nowhere")
    (exported / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_hf(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_hf(exported)
    (exported / "config.json").write_text("3")
    with pytest.raises(UserError, match="not a JSON object"):
        load_hf(exported)


def test_an_output_directory_that_holds_something_is_left_alone(params, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="exists and is not empty"):
            export_hf(params, CONFIG, taken)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_output_directory_and_missing_parents_are_fine(params, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a/b/c"):
        export_hf(params, CONFIG, out)
        assert_equal(load_hf(out)[1], params)


def test_parameters_of_another_model_are_not_exported(params, tmp_path):
    with pytest.raises(UserError, match="embedder/table"):
        export_hf(params, dataclasses.replace(CONFIG, vocab_size=65), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(params, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    scale = LazyArray(params["decoder"]["final_norm"]["scale"].shape, np.dtype("f4"), interrupt)
    broken = {**params, "decoder": {**params["decoder"], "final_norm": {"scale": scale}}}
    with pytest.raises(KeyboardInterrupt):
        export_hf(broken, CONFIG, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_others_may_add_their_files_before_the_directory_appears(params, tmp_path):
    with new_directory(tmp_path / "out") as partial:
        write_hf(params, CONFIG, partial)
        (partial / "tokenizer.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_tensors_on_disk_are_aligned_and_marked_for_torch(exported):
    with safe_open(exported / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((exported / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0
