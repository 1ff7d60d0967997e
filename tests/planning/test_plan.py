"""`t5g2 plan`: the step that training runs, and what a person is told of it."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jax.experimental import topologies
from on_eight_devices import TURNS
from small_run import write_corpus, write_recipe

from t5g2 import cli
from t5g2.errors import UserError
from t5g2.planning import plan as planning
from t5g2.planning.compile import OutOfMemory, compile_step, out_of_memory, trace_step
from t5g2.planning.devices import planning_devices, target_config
from t5g2.planning.plan import make_plan
from t5g2.planning.rate import chip_of
from t5g2.planning.table import as_text
from t5g2.planning.topologies import find_topology
from t5g2.settings import overridden, read_settings


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("recipe")
    path = write_recipe(
        home / "recipe.gin", write_corpus(home / "corpus", standard_library(200_000))
    )
    with path.open("a") as file:
        file.write("train.rows = 16\ntrain.accumulation = 2\nmodel.remat = 'full'\n")
        file.write("mesh.fsdp = 4\n")
    return path


@pytest.fixture(scope="module")
def told(recipe, tmp_path_factory):
    """What `on_eight_devices` prints."""
    program = Path(__file__).with_name("on_eight_devices.py")
    run_dir = tmp_path_factory.mktemp("run") / "run"
    done = subprocess.run(
        [sys.executable, program, recipe, run_dir],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def planned(recipe):
    """A plan of a step that does not fit an H100, as if its compiler had said so."""
    settings = overridden(read_settings([str(recipe)]), ["mesh.fsdp=1"])
    full = OutOfMemory(needed=99 * 2**30, available=80 * 2**30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "compile_step", lambda step, topology: full)
        plan = make_plan(settings, find_topology("cpu:1"), lambda _: contextlib.nullcontext())
    return dataclasses.replace(plan, topology=find_topology("h100:1"))


def test_the_planned_step_is_the_one_that_training_compiles(told):
    assert told["devices"] == 8
    assert told["same_program"]


def test_memory_is_that_of_the_compiled_step_and_of_real_arrays(told):
    plan = told["plan"]
    assert plan["memory_bytes"]["arguments"] == told["arguments"]
    assert plan["memory_bytes"]["temporaries"] == told["temporaries"]
    assert plan["given_bytes"]["parameters"] == told["parameters"]
    assert plan["given_bytes"]["optimizer"] == told["optimizer"]
    # A CPU lays arrays out without tiles: what is given is all there is, but for the step's number
    # and the limits of what is a bad step: a flag and two numbers.
    assert sum(plan["given_bytes"].values()) + 4 + 9 == told["arguments"]


def test_collectives_in_a_loop_count_as_often_as_it_turns(told):
    assert told["loop"] == [
        {
            "kind": "all-gather",
            "axes": "fsdp",
            "number": TURNS,
            "bytes": TURNS * 64 * 64 * 4 * 3 // 4,
        }
    ]


def test_products_that_every_device_repeats_count_for_each(told, recipe):
    traced, on_each = told["repeated"]
    assert traced == on_each == TURNS * 2 * 2 * 64 * 64 * 32
    # A device of eight has its share of the step, in which XLA finds the logits of attention in the
    # forward pass that remat makes again: of all pairs of queries and keys, in two layers.
    pairs = 16 * 2 * (192 * 192 + 96 * (96 + 192))
    model = read_settings([str(recipe)], []).model
    logits = 2 * model.num_heads * model.head_dim * pairs
    assert told["plan"]["flops"]["repeated_by_devices"] == -logits


def test_executed_flops_are_model_flops_and_what_is_told_apart(told):
    flops = told["plan"]["flops"]
    extras = ("teacher", "recomputed_by_remat", "masked_attention_and_padding")
    assert flops["executed"] == flops["model"] + sum(flops[name] for name in extras)
    layers = sum(flops["forward"].values()) - flops["forward"]["vocabulary head"]
    # What is recomputed is the layers' forward pass, and of attention also what masks hide.
    assert layers < flops["recomputed_by_remat"] < 1.5 * layers


def test_the_mesh_and_the_batch_are_the_recipes(told):
    plan = told["plan"]
    assert plan["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    assert plan["batch"]["tokens"] == 16 * (192 + 96)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"remat": "dots"}, "set model.remat = 'attention'"),
        ({"remat": "attention"}, "set model.remat = 'full'"),
        ({"remat": "full", "rows_per_device": 8}, "set train.rows_per_device = 4"),
        ({"remat": "full", "rows_per_device": 1}, "shorten data.inputs_length"),
    ],
)
def test_a_step_that_does_not_fit_is_an_answer(planned, changes, advice):
    settings = planned.settings
    model = dataclasses.replace(settings.model, remat=changes["remat"])
    parts = planned.parts._replace(rows_per_device=changes.get("rows_per_device", 8))
    full = dataclasses.replace(
        planned,
        settings=dataclasses.replace(settings, model=model),
        parts=parts,
        result=OutOfMemory(needed=19 * 2**30, available=round(15.75 * 2**30)),
    )
    assert full.fits is False
    assert "19.00 GiB of 15.75 GiB: 3.25 GiB too much" in as_text(full)
    assert advice in as_text(full)
    assert full.to_json()["advice"] == full.advice()


def test_parameters_that_fill_a_device_are_to_be_split(planned):
    state = planned.state._replace(optimizer=200 * 2**30)
    assert "take a larger slice" in dataclasses.replace(planned, state=state).advice()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            OutOfMemory(round(20.5 * 2**30), round(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (360.00G) exceeds available HBM (95.74G).",
            OutOfMemory(360 * 2**30, round(95.74 * 2**30)),
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_messages_of_the_compiler_are_read(message, expected):
    assert out_of_memory(message) == expected


@pytest.mark.parametrize(
    ("topology", "extra", "error"),
    [
        (
            "v5e:4x4",
            "tpu",
            RuntimeError("JAX TPU support not installed; cannot generate TPU topology."),
        ),
        ("h100:8", "cuda", NotImplementedError("topology not implemented for cuda")),
    ],
)
def test_without_a_compiler_its_extra_is_named(topology, extra, error, recipe, monkeypatch):
    def missing(**_):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=rf"^--topology {topology} needs .*'t5g2\[{extra}\]'$"):
        planning_devices(find_topology(topology), read_settings([str(recipe)]))


@pytest.mark.parametrize("name", ["a100:1", "h100:1", "h200:1"])
def test_gpus_are_described_as_their_maker_does(name):
    chip = find_topology(name).chip
    described = target_config(chip)
    hopper = name != "a100:1"
    assert f"cuda_compute_capability {{ major: {9 if hopper else 8} minor: 0" in described
    assert ("ACCELERATED_FEATURES" in described) is hopper
    numbers = dict(re.findall(r"(\w+): ([\d.]+)", described))
    assert chip_of(re.search('description_str: "(.*?)"', described)[1]) == chip
    assert int(numbers["device_memory_size"]) == chip.hbm_bytes
    assert int(numbers["memory_bandwidth"]) == chip.hbm_bandwidth


def test_what_a_compiler_lets_pass_and_no_device_holds_is_out_of_memory(recipe):
    settings = overridden(read_settings([str(recipe)]), ["mesh.fsdp=1"])
    devices = planning_devices(find_topology("cpu:1"), settings)
    chip = dataclasses.replace(find_topology("h100:1").chip, hbm_bytes=2**20)
    small = dataclasses.replace(find_topology("cpu:1"), chip=chip)
    found = compile_step(trace_step(settings, devices), small)
    assert isinstance(found, OutOfMemory)
    assert found.needed > found.available == 2**20


def test_cpu_devices_of_the_recipe_must_be_the_topologys(recipe):
    settings = overridden(read_settings([str(recipe)]), ["mesh.cpu_devices=8"])
    with pytest.raises(UserError, match=r"mesh.cpu_devices = 8 contradicts --topology v5e:4x4"):
        planning_devices(find_topology("v5e-16"), settings)


def test_mistakes_are_told_in_one_line(recipe, capsys):
    command = ["plan", "--gin_file", str(recipe)]
    assert cli.main([*command, "--topology", "v5e:16x16x2"]) == 2
    assert "did you mean 'v5e:16x16'" in capsys.readouterr().err
    assert cli.main([*command, "--topology", "cpu:1"]) == 2
    assert "mesh (data=-1, fsdp=4, tensor=1, context=1) does not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_compiles_for_gpus_that_are_not_there(recipe, tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="the extra t5g2[cuda] is not installed")
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "t5g2", "plan", "--topology", "h100:4", "--json", out]
    subprocess.run([*command, "--gin_file", recipe], check=True)
    plan = json.loads(out.read_text())
    assert plan["fits"]
    assert plan["headroom"] > 0.9
    assert {exchange["axes"] for exchange in plan["collectives"]} == {"fsdp"}
    # Every device computes its share, and no more.
    assert abs(plan["flops"]["repeated_by_devices"]) < 0.01 * plan["flops"]["executed"]
    # Kernels read and write at least what the products need.
    assert plan["roofline_seconds"]["memory"] > plan["roofline_seconds"]["compute"]


@pytest.mark.slow
def test_a_step_compiles_for_a_tpu_that_is_not_there(recipe, tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "t5g2", "plan", "--topology", "v5e-4", "--json", out]
    subprocess.run([*command, "--gin_file", recipe], check=True)
    plan = json.loads(out.read_text())
    assert plan["fits"]
    assert plan["headroom"] > 0.9
    assert {exchange["axes"] for exchange in plan["collectives"]} == {"fsdp"}
