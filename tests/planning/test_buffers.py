"""What a compiled step should never hold: found where it is, and not in the step for TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.kernels.attention import KeyValues, Window, attention
from t5g2.kernels.vocabulary_loss import logits, summed_losses
from t5g2.models.config import T5GEMMA2_270M, TINY
from t5g2.planning.buffers import attention_kernels, checks, score_matrices, whole_logits
from t5g2.planning.compile import trace_step
from t5g2.planning.devices import planning_devices
from t5g2.planning.topologies import find_topology
from t5g2.settings import read_settings

MESH = {"data": 1, "fsdp": 1, "tensor": 1}


def text_of(function, *arrays):
    return jax.jit(function).lower(*arrays).compile().as_text()


def test_attention_in_one_piece_shows_and_by_blocks_does_not():
    length = 1100
    states = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    tokens = np.ones((1, length), np.int32), np.arange(length)[None]

    def attend(backend):
        def run(x):
            keys = KeyValues(x, x, *tokens)
            return attention(
                x, *tokens, keys, None, window=Window(None, 0), scale=1.0, backend=backend
            )

        return score_matrices(text_of(run, states), TINY, (length, length))

    assert any("1100,1100" in shape for shape in attend("reference"))
    assert attend("blockwise") == []


def test_lengths_filled_up_to_blocks_show_too():
    # 2176 are five blocks of 512, and 2560 + 1536 are eight.
    for shape, found in (("2560,4096", True), ("2560,640", False), ("512,4096", False)):
        line = (
            f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %s = f32[4,{shape}]{{2,1,0}} dot(%a, %b)\n}}"
        )
        assert bool(score_matrices(line, T5GEMMA2_270M, (1536, 2176))) is found


def test_a_step_is_checked_for_what_it_lacks_and_for_what_it_sends():
    table = f"bf16[{T5GEMMA2_270M.vocab_size},640]"
    gather = f"  %g = {table}{{1,0}} all-gather(%x), channel_id=ID, replica_groups=[1,4]<=[4]"
    kernels = "\n".join(
        f"  %splash_mha_{name}_x.1 = bf16[8]{{0}} custom-call(%x), "
        'custom_call_target="tpu_custom_call"'
        for name in ("fwd", "dq", "dkv")
    )
    scatter = (
        f"  %s = bf16[{T5GEMMA2_270M.vocab_size},160]{{1,0}} reduce-scatter(%x), channel_id=9, "
        "replica_groups=[1,4]<=[4]"
    )

    def checked(*lines, remat="none"):
        text = "\n".join(["ENTRY %main (x: f32[8]) -> f32[8] {", *lines, "}"])
        mesh = {"data": 1, "fsdp": 4, "tensor": 1}
        model = dataclasses.replace(T5GEMMA2_270M, remat=remat)
        return [check.holds for check in checks(text, model, (1536, 2176), mesh, 1)]

    twice = [gather.replace("ID", "1"), gather.replace("ID", "2")]
    assert checked(kernels, *twice, scatter) == [True] * 5
    assert checked(*twice, scatter) == [False, True, True, True, True]
    assert checked(kernels, *twice, gather.replace("ID", "3"), scatter) == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert checked(kernels, scatter, scatter.replace("_id=9", "_id=8"))[-1] is False
    # What copies of the model sum of their parts is no table.
    part = (
        f"  %r = f32[{T5GEMMA2_270M.vocab_size},160]{{1,0}} all-reduce(%x), channel_id=11, "
        "replica_groups=[1,4]<=[4]"
    )
    assert checked(kernels, *twice, scatter, part, part.replace("_id=11", "_id=12"))[-1]
    assert not checked(kernels, scatter, part.replace(",160]", ",640]"))[-1]
    again = kernels.splitlines()[0].replace("_x.1", "_x.2")
    for remat in ("dots", "attention", "full"):
        held = checked(kernels, again, *twice, scatter, remat=remat)
        assert held == [True, remat == "full", True, True, True]


@pytest.mark.parametrize("target", ["__gpu$xla.gpu.triton", "triton_kernel_call_ffi"])
def test_kernels_of_a_gpu_are_found_by_their_names(target):
    calls = [
        f'  %pallas_call.{i} = bf16[8]{{0}} custom-call(%x), custom_call_target="{target}", '
        f'backend_config={{grid_x = 4 : i32, name = "{name}", num_warps = 8 : i32}}'
        for i, name in enumerate(
            ["attention_fwd", "attention_dq", "attention_dkv", "attention_dkv"]
        )
    ]
    others = [calls[0].replace("attention_fwd", "other"), calls[0].replace(target, "other")]
    assert attention_kernels("\n".join(calls + others)) == {"fwd": 1, "dq": 1, "dkv": 2}


def test_a_length_that_is_a_size_of_the_model_counts_in_attention_alone():
    def found(operation):
        line = (
            "ENTRY %main (x: f32[8]) -> f32[8] {\n  %s = f32[8,2048,2048]{2,1,0} dot(%a, %b), "
            f'metadata={{op_name="jit(step)/{operation}/dot_general"}}\n}}'
        )
        return score_matrices(line, T5GEMMA2_270M, (2048, 2048))

    assert T5GEMMA2_270M.mlp_dim == 2048
    assert found("jvp(attend)/while/body") == ["f32[8,2048,2048]"]
    assert found("transpose(jvp())/while/body/checkpoint/attend") == ["f32[8,2048,2048]"]
    assert found("jvp()/while/body") == found("jvp()/attendant") == []


def test_operations_of_attention_say_so_in_loops_and_gradients():
    length = 1100
    states = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    tokens = np.ones((1, length), np.int32), np.arange(length)[None]
    # As if the length were a size of the model.
    model = dataclasses.replace(TINY, mlp_dim=length)

    def layer(x, _):
        keys = KeyValues(x, x, *tokens)
        window = Window(None, 0)
        return attention(
            x, *tokens, keys, None, window=window, scale=1.0, backend="reference"
        ), None

    def run(x):
        return jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0].sum()

    for function in (run, jax.grad(run)):
        assert score_matrices(text_of(function, states), model, (length, length))


def test_logits_of_all_tokens_show_and_those_of_a_tile_do_not():
    hidden = jax.ShapeDtypeStruct((2, 600, TINY.hidden_size), jnp.float32)
    table = jax.ShapeDtypeStruct((TINY.vocab_size, TINY.hidden_size), jnp.float32)
    targets = np.zeros((2, 600), np.int32)
    whole = text_of(lambda h, t: jax.nn.softmax(logits(h, t, None)), hidden, table)
    assert whole_logits(whole, TINY, MESH)
    weights = jnp.ones(targets.shape)
    total = lambda h, t: summed_losses(h, t, targets, weights)[0]  # noqa: E731
    tiled = text_of(jax.grad(total, argnums=(0, 1)), hidden, table)
    assert whole_logits(tiled, TINY, MESH) == []


# In a decoder's layer the gradients of the encoder's keys are a kernel of their own for GPU.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "machine", "gradients"),
    [("libtpu", "v5e:2x2", 4), ("jax_cuda13_plugin", "h100:4", 6)],
)
@pytest.mark.parametrize(("remat", "forward"), [("attention", 1), ("full", 2)])
def test_the_step_for_accelerators_has_the_kernels_and_nothing_large(
    tmp_path, compiler, machine, gradients, remat, forward
):
    pytest.importorskip(compiler)
    # Layers are alike: one local and one global of either side stand for all. The lengths are about
    # 2K, and no size of the model.
    model = dataclasses.replace(T5GEMMA2_270M, vision=None, remat=remat, num_layers=2)
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(
        "train.rows = 8\ntrain.total_steps = 1000\nschedule.peak_learning_rate = 0.001\n"
        "data.inputs_length = 2176\ndata.targets_length = 1536\nmesh.data = 1\nmesh.fsdp = -1\n"
        + "".join(
            f"model.{field.name} = {getattr(model, field.name)!r}\n"
            for field in dataclasses.fields(model)
        ).replace("model.global_every = 6", "model.global_every = 2")
    )
    settings = read_settings([str(recipe)])
    step = trace_step(settings, planning_devices(find_topology(machine), settings))
    text = step.traced.lower().compile().as_text()
    mesh = dict(step.mesh.shape)
    made = checks(text, settings.model, (2176, 1536), mesh, step.parts.accumulation)
    assert [check for check in made if not check.holds] == []
    # The lookup leaves the table where it is; the loss gathers it, and sums its gradient, once.
    assert made[-1].found == "1 gathers and 1 sums in 1 microbatches"
    # Each of the four layers attends once, and again in the backward pass if nothing is kept.
    assert attention_kernels(text) == {"fwd": 4 * forward, "dq": 4, "dkv": gradients}
