"""SIGKILL at random moments: the same command mends whatever it left, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "campaign.py"


def campaign(directory, kills, jobs, minutes):
    seed = os.environ.get("T5G2_FAULTS_SEED", "0")
    command = [sys.executable, CAMPAIGN, "--kills", kills, "--seed", seed, "--dir", directory]
    done = subprocess.run(
        [str(word) for word in (*command, "--jobs", *jobs, "--minutes", minutes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-3000:]}"
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_cache_survives_kills(tmp_path):
    result = campaign(tmp_path, 4, ["cache"], 5)
    assert result["kills"] == 4
    assert not result["failures"]


@pytest.mark.slow
def test_two_hundred_kills_are_mended(tmp_path):
    jobs = ["train", "train by 2", "cache", "average", "export"]
    result = campaign(tmp_path, 200, jobs, 240)
    assert result["kills"] >= 200
    met = {hit.partition(": ")[2] for hit in result["hits"]}
    assert met >= {"step", "save", "average", "export", "cache"}, result["hits"]
