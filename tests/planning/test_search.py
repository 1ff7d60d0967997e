"""`t5g2 plan --search`: what is tried, what seems to fit, and what comes first."""

import contextlib
import dataclasses
import json
import math

import pytest
from small_run import write_corpus, write_recipe

from t5g2 import cli
from t5g2.errors import UserError
from t5g2.planning import plan as planning
from t5g2.planning import search as searching
from t5g2.planning.compile import CompiledStep, Memory, OutOfMemory
from t5g2.planning.devices import planning_devices
from t5g2.planning.plan import make_plan
from t5g2.planning.products import Products
from t5g2.planning.roofline import Roofline
from t5g2.planning.search import candidates, search
from t5g2.planning.table import ranking
from t5g2.planning.topologies import find_topology
from t5g2.settings import overridden, read_settings

RECIPE = "configs/recipes/270m_v5e-16.gin"


@pytest.fixture(scope="module")
def settings():
    """270M-270M, 128 rows of 16K + 16K tokens."""
    return read_settings([RECIPE])


@pytest.fixture(scope="module")
def small(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(home / "corpus", standard_library(100_000))
    path = write_recipe(home / "recipe.gin", corpus)
    with path.open("a") as file:
        file.write("train.rows = 16\n")
    return path


def test_every_candidate_is_one_that_training_would_run(settings):
    found = candidates(settings, find_topology("v5e-16"))
    assert len({tuple(c.bindings) for c in found}) == len(found)
    for candidate in found:
        mesh, train = candidate.settings.mesh, candidate.settings.train
        assert math.prod((mesh.data, mesh.fsdp, mesh.tensor, mesh.context)) == 16
        assert candidate.settings.rows % (mesh.data * mesh.fsdp * train.rows_per_device) == 0
        assert dataclasses.replace(settings, mesh=mesh, train=train).rows == 128


def test_only_the_data_axis_crosses_slices(settings):
    found = candidates(settings, find_topology("2xv5e-16"))
    assert found
    assert all(candidate.settings.mesh.data % 2 == 0 for candidate in found)


def test_bindings_make_the_candidate_of_the_recipe(settings):
    for candidate in candidates(settings, find_topology("v5e-16"))[::7]:
        assert overridden(settings, candidate.bindings) == candidate.settings


def test_what_seems_to_fit_comes_first_and_by_its_time(settings):
    topology = find_topology("v5e-16")
    found = candidates(settings, topology)
    fits = [c.bytes <= 0.95 * topology.chip.hbm_bytes for c in found]
    count = sum(fits)
    assert 0 < count < len(found)
    assert fits == [True] * count + [False] * (len(found) - count)
    assert [c.seconds for c in found[:count]] == sorted(c.seconds for c in found[:count])


def test_memory_falls_with_sharding_and_recomputation_and_grows_with_rows(settings):
    def size(fsdp, rows, remat):
        (one,) = (
            c.bytes
            for c in candidates(settings, find_topology("v5e-16"))
            if (c.settings.mesh.fsdp, c.settings.train.rows_per_device) == (fsdp, rows)
            and c.settings.model.remat == remat
        )
        return one

    assert size(16, 1, "full") < size(8, 1, "full") < size(16, 8, "full")
    kept = [size(16, 1, remat) for remat in ("full", "attention", "dots", "none")]
    assert kept == sorted(set(kept))


def test_a_machine_without_figures_and_one_that_shares_no_rows_are_refused(settings):
    with pytest.raises(UserError, match="nothing is known of the speed of cpu:8"):
        candidates(settings, find_topology("cpu:8"))
    with pytest.raises(UserError, match="no mesh of 256 devices shares 128 rows evenly"):
        candidates(settings, find_topology("v5e-256"))


def test_out_of_memory_comes_last_and_is_told(settings, small, monkeypatch):
    topology = find_topology("v5e-1")
    model = read_settings([str(small)])
    plan = make_plan(model, find_topology("cpu:1"), lambda _: contextlib.nullcontext())
    results = iter(
        [
            OutOfMemory(needed=19 * 2**30, available=round(15.75 * 2**30)),
            CompiledStep(
                Memory(15 * 2**30, 0, 2**29, 0), [], Products(1, 0), None, ""
            ),  # Less than 5% left.
            CompiledStep(Memory(2**30, 0, 2**30, 0), [], Products(1, 0), None, ""),
        ]
    )

    def planned(settings, topology, stage):
        result = next(results)
        fits = isinstance(result, CompiledStep)
        return dataclasses.replace(
            plan,
            topology=topology,
            settings=settings,
            result=result,
            roofline=Roofline(1.0, 0.5, 0.25) if fits else None,
        )

    monkeypatch.setattr(searching, "make_plan", planned)
    found = search(model, topology, 3, lambda _: contextlib.nullcontext())
    assert [f.plan.fits for f in found] == [True, True, False]
    assert found[0].plan.headroom > 0.8
    text = ranking(candidates(model, topology), found, topology)
    assert "19.00 GiB out of memory: 3.25 GiB too much" in text
    assert text.splitlines()[-1].startswith("The first: --gin.mesh.data=")
    alone = ranking(candidates(model, topology), found[2:], topology)
    assert "None of them fits; the nearest: --gin." in alone


def test_the_best_is_planned_as_ever(small, tmp_path, capsys, monkeypatch):
    def devices(topology, settings):
        return planning_devices(find_topology("cpu:1"), settings)

    monkeypatch.setattr(planning, "planning_devices", devices)
    out = tmp_path / "plan.json"
    command = ["plan", "--gin_file", str(small), "--topology", "h100:1", "--json", str(out)]
    assert cli.main([*command, "--search", "1"]) == 0
    text = capsys.readouterr().out
    assert "compiled, best first" in text
    mesh = json.loads(out.read_text())["mesh"]
    assert f"--gin.mesh.data={mesh['data']} --gin.mesh.fsdp={mesh['fsdp']}" in text
    assert cli.main([*command, "--search", "0"]) == 2
