"""Kills jobs at random moments, runs the same commands again, and compares what comes out.

    python tests/faults/campaign.py --kills 200 --seed 0 --dir DIR

Every job is a fork of this process, which has everything imported and nothing started: a kill costs
seconds. Prints a line a kill and, at the end, the counts as JSON. Exit code 1: something was not
mended; what is left lies in DIR.
"""

import argparse
import collections
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    # Before jax is imported: what one attempt has compiled, the next ones reuse.
    home = Path(sys.argv[sys.argv.index("--dir") + 1]).absolute()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    sys.path.insert(0, str(Path(__file__).parent.parent))

import orbax.checkpoint
from ports import free_port
from small_run import write_corpus, write_recipe

from t5g2 import cli
from t5g2.checkpoints.manifest import verify
from t5g2.reporting.metrics_log import read_metrics

assert orbax.checkpoint
_PR_SET_PDEATHSIG = 1
# A save, a prune and an average are never far.
_TRAIN = ("checkpoints.every=1", "checkpoints.keep=2", "finish.samples=0", "train.total_steps=10")
_SHARE = {"train": 0.3, "train by 2": 0.1, "cache": 0.2, "average": 0.2, "export": 0.2}

# What shows that something began, and the most times that it is waited for.
_MARKERS = {
    "train": [
        ("checkpoints/.*.partial*", 4),
        ("checkpoints/.*.pruned", 3),
        ("checkpoints/[0-9]*", 4),
        (".averaged.*", 1),
        (".export.*", 1),
    ],
    "cache": [("*", 5), ("**/*", 9)],
    "average": [(".*.partial", 1), (".*.partial/saved*/*", 2)],
    "export": [(".*.partial", 1), (".*.partial/*", 3)],
}


class Attempt:
    """The processes of one job, forked, each a session of its own."""

    def __init__(self, commands, log):
        self.log = log
        log.write_bytes(b"")
        self.pids = [self._fork(command) for command in commands]
        self.codes = {}

    def _fork(self, command):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = cli.main([str(word) for word in command])
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self):
        for pid in self.pids:
            if pid not in self.codes and os.waitpid(pid, os.WNOHANG)[0]:
                self.codes[pid] = True
        return len(self.codes) == len(self.pids)

    def wait(self):
        """Exit codes; 128 + the signal's number of a killed process."""
        codes = []
        for pid in self.pids:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            codes.append(code if code >= 0 else 128 - code)
        return codes

    def kill(self, pids, *, with_children):
        for pid in pids:
            (os.killpg if with_children else os.kill)(pid, signal.SIGKILL)


class Campaign:
    def __init__(self, directory, seed):
        self.home = directory
        self.rng = random.Random(seed)
        self.log = directory / "log"
        self.hits = collections.Counter()
        self.kills = collections.Counter()
        self.chains = collections.Counter()
        self.failures = []
        texts = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:25]
        documents = [path.read_text(encoding="utf-8", errors="replace") for path in texts]
        corpus = write_corpus(directory / "corpus", documents)
        self.recipe = write_recipe(directory / "recipe.gin", corpus)

    # ---- Jobs: commands, and what a finished one has made

    def train(self, out, processes=1):
        flags = [f"--gin.{binding}" for binding in _TRAIN]
        command = ["train", "--run_dir", out, "--gin_file", self.recipe, *flags]
        if processes == 1:
            return [command]
        hosts = [f"hosts.coordinator=localhost:{free_port()}", f"hosts.count={processes}"]
        hosts += ["hosts.heartbeat_seconds=10"]
        return [
            [*command, *(f"--gin.{binding}" for binding in (*hosts, f"hosts.index={index}"))]
            for index in range(processes)
        ]

    def commands(self, job, out):
        if job.startswith("train"):
            return self.train(out, 2 if job == "train by 2" else 1)
        if job == "cache":
            flags = ["--gin_file", self.recipe, "--workers", 2]
            return [["cache", "--out", out, *flags]]
        run = self.home / "undisturbed train"
        if job == "average":
            return [["average", "--run_dir", run, "--last", 2, "--out", out]]
        return [["export", "--checkpoint", run / "averaged", "--out", out]]

    @staticmethod
    def made(job, out):
        """What must be the same bits however often the job was killed."""
        files = sorted(path for path in out.rglob("*") if path.is_file())
        if job.startswith("train"):
            history = read_metrics(out / "metrics.jsonl")
            exact = ("loss", "grad_norm", "learning_rate", "tokens", "data_digest")
            for checkpoint in [*(out / "checkpoints").iterdir(), out / "averaged"]:
                assert verify(checkpoint) is not None
            weights = out / "export" / "model.safetensors"
            return {
                "losses": {row["step"]: [row[name] for name in exact] for row in history.train},
                "held-out": sorted((r["step"], r["weights"], r["loss"]) for r in history.eval),
                "averaged": history.summary["checkpoints_averaged"],
                "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
                "checkpoints": sorted(path.name for path in (out / "checkpoints").iterdir()),
                "names": sorted(path.name for path in out.iterdir()),
            }
        names = [path.relative_to(out).as_posix() for path in files]
        if job == "average":  # Orbax's files bear random names
            assert verify(out) is not None
            arrays = json.loads((out / "manifest.json").read_text())["arrays"]
            return {"arrays": arrays, "names": sorted(path.name for path in out.iterdir())}
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return dict(zip(names, digests, strict=True))

    # ---- Killing

    def undisturbed(self, job):
        """Runs a job to its end; what it made, and the seconds it took."""
        out = self.home / f"undisturbed {job}"
        begin = time.monotonic()
        codes = Attempt(self.commands(job, out), self.log).wait()
        assert not any(codes), self.log.read_text()
        return self.made(job, out), time.monotonic() - begin

    def moment(self, attempt, job, out, seconds):
        """Waits for a random moment of an attempt: any, or soon after something began."""
        begin, after = time.monotonic(), self.rng.expovariate(1 / 0.03)
        where = out.parent if job in ("average", "export") else out
        until, marker, nth = self.rng.uniform(0, seconds), None, 1
        if self.rng.random() < 0.7:
            until = 10 * seconds
            marker, most = self.rng.choice(_MARKERS[job.split()[0]])
            nth = self.rng.randint(1, most)
        known = set(where.glob(marker)) if marker else set()
        while not attempt.ended() and time.monotonic() - begin < until:
            if marker:
                seen = set(where.glob(marker))
                nth -= bool(seen - known)
                known = seen
                if nth <= 0:
                    time.sleep(after)
                    return
            time.sleep(0.002)

    def doing(self, job, out):
        """What was under way, by what lies there."""
        if job.startswith("train"):
            for path in out.glob("**/.*"):
                for name in ("pruned", "averaged", "export"):
                    if name in path.name:
                        return {"pruned": "prune", "averaged": "average"}.get(name, name)
                if "partial" in path.name:
                    return "save"
            lines = [line for line in self.log.read_text().splitlines() if not line.startswith("W")]
            stage = re.search(r"^(step \d+/|[a-z -]+)", lines[-1] if lines else "start")
            text = stage[1] if stage else "start"
            return (
                "step"
                if text.startswith(("step", "initialising", "warm", "restoring"))
                else ("start" if text != "held-out loss" else "end")
            )
        return job

    def chain(self, job, wanted, seconds, at_most):
        """Kills a job up to `at_most` times, then lets it end; whether it made what is wanted."""
        number = self.chains[job]
        self.chains[job] += 1
        out = self.home / f"{job} {number}"
        for _ in range(at_most):
            attempt = Attempt(self.commands(job, out), self.log)
            self.moment(attempt, job, out, seconds)
            if attempt.ended():
                break
            one = job == "train by 2" and self.rng.random() < 0.1
            victims = [self.rng.choice(attempt.pids)] if one else attempt.pids
            alive = [pid for pid in victims if pid not in attempt.codes]
            attempt.kill(alive, with_children=self.rng.random() < 0.5)
            doing = self.doing(job, out)
            self.hits[f"{job}: {doing}"] += 1
            self.kills[job] += 1
            print(f"{sum(self.kills.values())} {job} {number}: {doing}{' (one)' * one}", flush=True)
            self.reap(attempt)
        attempt = Attempt(self.commands(job, out), self.log)
        codes = attempt.wait()
        try:
            # What had been made already is refused: there is nothing to mend.
            assert not any(codes) or (job in ("average", "export") and out.exists()), codes
            made = self.made(job, out)
            different = [name for name in wanted if made.get(name) != wanted[name]]
            assert not different, different
            assert made.keys() == wanted.keys()
            left = [path.name for path in self.home.glob(f".{out.name}.*")]
            assert not left, left
        except Exception as error:
            self.failures.append(f"{job} {number}: {error!r}\n{self.log.read_text()[-3000:]}")
            print("NOT MENDED", self.failures[-1], flush=True)
        else:
            shutil.rmtree(out)

    def reap(self, attempt):
        end = time.monotonic() + 90
        while not attempt.ended():
            if time.monotonic() > end:
                self.failures.append(f"survivor did not end: {self.log.read_text()[-2000:]}")
                attempt.kill(
                    [p for p in attempt.pids if p not in attempt.codes], with_children=True
                )
            time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new chain after these")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", default=list(_SHARE), choices=list(_SHARE))
    args = parser.parse_args()
    home = args.dir.absolute()
    home.mkdir(parents=True, exist_ok=True)
    campaign, begin = Campaign(home, args.seed), time.monotonic()
    shares = sum(_SHARE[job] for job in args.jobs)
    base = campaign.undisturbed("train")  # which is averaged and exported, too
    for job in args.jobs:
        wanted, seconds = base if job == "train" else campaign.undisturbed(job)
        share = round(args.kills * _SHARE[job] / shares)
        while campaign.kills[job] < share and time.monotonic() - begin < 60 * args.minutes:
            campaign.chain(job, wanted, seconds, min(8, share - campaign.kills[job]))
    result = {
        "seed": args.seed,
        "kills": sum(campaign.kills.values()),
        "by_job": dict(campaign.kills),
        "hits": dict(campaign.hits),
        "compared": dict(campaign.chains),
        "seconds": round(time.monotonic() - begin),
        "failures": campaign.failures,
    }
    print(json.dumps(result))
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
