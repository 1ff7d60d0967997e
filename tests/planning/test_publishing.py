"""The published plans: the page is what was recorded, and so are the recipes' headers."""

import json
from pathlib import Path

import pytest

from t5g2.planning.publishing import expected, headroom, in_turn, page, shortfalls
from t5g2.planning.topologies import find_topology
from t5g2.settings import read_settings

ROOT = Path(__file__).parents[2]
MACHINES = {
    "270m_v5e-16": "v5e-16",
    "270m_h100-8": "h100:8",
    "1b_v5e-256": "v5e-256",
    "1b_v6e-64": "v6e-64",
    "4b_v5p-512": "v5p-512",
    "4b_v5p-1024": "v5p-1024",
}
RECORDS = json.loads((ROOT / "docs/plans.json").read_text())


@pytest.fixture(scope="module")
def recipes():
    return {n: read_settings([str(ROOT / f"configs/recipes/{n}.gin")]) for n in MACHINES}


@pytest.fixture(scope="module")
def machines():
    return {name: find_topology(machine) for name, machine in MACHINES.items()}


def made(**changes):
    """A record of a step that takes 2 s and leaves a quarter of 16 GiB."""
    chip = {"hbm_bytes": 16 * 2**30, "link_bandwidth": 100, "flops": 10.0}
    good = {
        "topology": {"count": 4, "chip": chip},
        "fits": True,
        "memory_bytes": {"total": 12 * 2**30},
        "collectives": [{"bytes": 30}, {"bytes": 20}],
        "roofline_seconds": {"compute": 1.5, "memory": 1.0, "network": 0.5},
        "flops": {"model": 48},
        "checks": [{"what": "no such array", "holds": True, "found": "none"}],
    }
    return good | changes


def test_speed_and_memory_of_a_record():
    assert in_turn(made()) == (2.0, 0.6)
    assert headroom(made()) == 0.25
    assert shortfalls(made()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memory_bytes": {"total": 15.5 * 2**30}}, "3.1% of the memory left, not 5%"),
        ({"flops": {"model": 32}}, "MFU 40.0%, not 50%"),
        (
            {"checks": [{"what": "no such array", "holds": False, "found": "f32[7,7]"}]},
            "not so: no such array (f32[7,7])",
        ),
    ],
)
def test_what_a_plan_lacks_is_told(changes, told):
    assert shortfalls(made(**changes)) == [told]


def test_out_of_memory_is_what_it_lacks():
    record = made(fits=False, advice="take a larger slice")
    for key in ("memory_bytes", "collectives", "roofline_seconds"):
        del record[key]
    assert shortfalls(record) == ["does not fit: take a larger slice"]


def test_out_of_memory_is_told_on_the_page_and_in_the_header(recipes, machines):
    name = "270m_v5e-16"
    full = {"needed": 20 * 2**30, "available": round(15.75 * 2**30)}
    record = RECORDS[name] | {"fits": False, "advice": "less", "out_of_memory": full}
    for key in ("memory_bytes", "collectives", "roofline_seconds"):
        del record[key]
    line = expected(recipes[name], machines[name], record)
    assert line == "Expected: 20.00 GiB of 15.75 GiB: out of memory."
    assert "| 20.00 GiB: out of memory |" in page(recipes, machines, {name: record})


def test_the_page_and_the_headers_are_those_of_the_records(recipes, machines):
    assert (ROOT / "docs/plans.md").read_text() == page(recipes, machines, RECORDS)
    for name, settings in recipes.items():
        line = expected(settings, machines[name], RECORDS.get(name))
        assert f"\n# {line}\n" in (ROOT / f"configs/recipes/{name}.gin").read_text()


def test_records_are_of_the_recipes_as_they_are(recipes, machines):
    for name, record in RECORDS.items():
        settings, mesh = recipes[name], record["mesh"]
        assert record["topology"]["name"] == machines[name].name
        assert {axis: getattr(settings.mesh, axis) for axis in mesh} == mesh
        assert record["batch"]["rows"] == settings.rows
        assert record["batch"]["inputs"] == settings.data.inputs_length
        assert record["remat"] == settings.model.remat
        assert record["rows_per_device"] == settings.train.rows_per_device


def test_a_published_plan_has_passed_its_checks():
    for record in RECORDS.values():
        if record["fits"]:
            assert record["checks"]
            assert all(check["holds"] for check in record["checks"])
