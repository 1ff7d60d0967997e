"""Launching: what is rendered is valid where it goes, and scripts do as they say."""

import contextlib
import copy
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "launch" / "launch.py"
TRAIN = ("--", "train", "--run_dir", "/data/runs/one", "--gin_file", "r.gin")
ODD = "--gin.corpus.path=/a b/$(HOME)/'x'"
KUBERNETES = ("--name=one", "--image=r.io/i:1", "--claim=shared")
CASES = {
    "gke-tpu": (*KUBERNETES, "--topology=v5e:4x4", "--queue=q", "--spot"),
    "gke-gpu": (*KUBERNETES, "--nodes=2", "--queue=q", "--gpu=nvidia-h100-80gb"),
    "tpu-vm": (
        *("--name=one", "--topology=v5p-128", "--zone=us-east5-a", "--nfs=10.0.0.2:/share"),
        *(
            "--image=us-docker.pkg.dev/p/r/t5g2",
            "--spot",
            "--project=p",
            "--create_option=--network=n",
        ),
    ),
    "slurm": ("--nodes=2", "--sbatch_option=--partition=gpu", "--srun_option=--mpi=none"),
    "local": ("--processes=3",),
}


def launch(*arguments, **options):
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=60, **options
    )


def rendered(platform, *more, tmp_path=None):
    log = (f"--log={tmp_path}/log",) if platform == "slurm" else ()
    done = launch(platform, *CASES[platform], *log, *more, "--dry_run", *TRAIN, ODD)
    assert done.returncode == 0, done.stderr
    assert "@{" not in done.stdout
    return done.stdout


def job_of(jobset):
    """The Job that the JobSet makes, a resource of its own."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    metadata = {"name": f"{jobset['metadata']['name']}-{replicated['name']}-0"}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **replicated["template"]}


@pytest.mark.parametrize("platform", ["gke-tpu", "gke-gpu"])
def test_the_job_of_a_jobset_is_valid_kubernetes(platform):
    validate = pytest.importorskip("kubernetes_validate")
    job = job_of(yaml.safe_load(rendered(platform)))
    validate.validate(job, "1.33", strict=True)
    job["spec"]["parallelisms"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.33", strict=True)


def complaints(jobset):
    """What JobSet's own models refuse or do not know, as Kubeflow publishes them."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    jobset = copy.deepcopy(jobset)
    # Kubernetes's part is checked above; the models take no plain numbers for its quantities.
    for replicated in jobset["spec"]["replicatedJobs"]:
        replicated["template"] = {}
    try:
        known = models.JobsetV1alpha2JobSet.model_validate(jobset)
    except ValueError as error:
        return str(error)
    # Names that a model does not know get lost in it.
    kept = known.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return "" if kept == jobset else f"lost: {jobset} became {kept}"


@pytest.mark.parametrize("platform", ["gke-tpu", "gke-gpu"])
def test_a_jobset_is_valid_by_its_published_models(platform):
    jobset = yaml.safe_load(rendered(platform))
    assert complaints(jobset) == ""
    for path, misspelt in (
        (("spec",), "failurePolicys"),
        (("spec", "failurePolicy"), "maxRestart"),
        (("spec", "failurePolicy", "rules", 0), "onJobFailureReason"),
        (("spec", "replicatedJobs", 0), "replica"),
        (("metadata",), "label"),
    ):
        wrong = copy.deepcopy(jobset)
        functools.reduce(lambda part, key: part[key], path, wrong)[misspelt] = None
        assert misspelt in complaints(wrong)
    jobset["spec"]["failurePolicy"]["maxRestarts"] = "twenty"
    assert "maxRestarts" in complaints(jobset)


@pytest.mark.skipif("JOBSET_CRD" not in os.environ, reason="JOBSET_CRD names no file")
@pytest.mark.parametrize("platform", ["gke-tpu", "gke-gpu"])
def test_a_jobset_is_valid_by_its_published_definition(platform):
    """Of a release of kubernetes-sigs/jobset: config/components/crd/bases/*jobsets.yaml."""
    jsonschema = pytest.importorskip("jsonschema")
    definition = yaml.load(Path(os.environ["JOBSET_CRD"]).read_text(), yaml.CSafeLoader)
    (version,) = definition["spec"]["versions"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(yaml.safe_load(rendered(platform)), schema)


def closed(schema):
    """A schema in which an object has no properties but those that are named."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(item) for name, item in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        schema = {"type": ["integer", "string"]}
    return {"type": "object"} if schema.get("properties") == {} else schema


def test_a_tpu_jobset_asks_for_the_hosts_of_its_slice():
    jobset = yaml.safe_load(rendered("gke-tpu"))
    assert jobset["kind"] == "JobSet"
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    spec = job_of(jobset)["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    literal = ODD.replace("$(", "$$(")  # what Kubernetes makes the given text of
    assert container["command"] == ["t5g2", *TRAIN[1:], literal]


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"),
    [
        ("v5e:1x1", 1, 1),
        ("2xv5e-16", 4, 4),
        ("v5e-8", 1, 8),
        ("v6e:16x16", 64, 4),
        ("v5p-8", 1, 4),
        ("v5p-512", 64, 4),
    ],
)
def test_slices_have_the_hosts_that_they_have(topology, hosts, chips):
    job = job_of(yaml.safe_load(rendered("gke-tpu", f"--topology={topology}")))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert job["spec"]["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_of_several_slices_each_is_a_job():
    (one,) = yaml.safe_load(rendered("gke-tpu"))["spec"]["replicatedJobs"]
    (two,) = yaml.safe_load(rendered("gke-tpu", "--topology=2xv5e:4x4"))["spec"]["replicatedJobs"]
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert one["template"] == two["template"]


def test_gpu_pods_learn_who_they_are():
    jobset = yaml.safe_load(rendered("gke-gpu"))
    assert jobset["spec"]["coordinator"]["replicatedJob"] == "train"
    (container,) = job_of(jobset)["spec"]["template"]["spec"]["containers"]
    assert container["command"][-3:] == [
        "--gin.hosts.coordinator=$(COORDINATOR):8476",
        "--gin.hosts.count=2",
        "--gin.hosts.index=$(JOB_COMPLETION_INDEX)",
    ]
    coordinator, driver = container["env"]
    assert driver == {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}
    path = coordinator["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"


@pytest.mark.parametrize("platform", ["gke-tpu", "gke-gpu"])
def test_mistakes_stop_a_jobset_and_preemptions_do_not_count(platform):
    jobset = yaml.safe_load(rendered(platform))
    policy = jobset["spec"]["failurePolicy"]
    mistake, preempted, crashed = policy["rules"]
    assert (mistake["action"], preempted["action"], crashed["action"]) == (
        "FailJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJobSet",
    )
    assert policy["maxRestarts"] == 20
    codes = [
        rule["onExitCodes"]["values"]
        for rule in job_of(jobset)["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    ]
    assert codes == [[2, 3], [130, 143]]
    # As Kubernetes words what a Job failed of.
    (pattern,) = mistake["onJobFailureMessagePatterns"]
    message = (
        "Container t5g2 for pod one/p failed with exit code {} matching FailJob rule at index 0"
    )
    assert [
        code for code in (1, 2, 3, 20, 130, 143) if re.search(pattern, message.format(code))
    ] == [
        2,
        3,
    ]


@pytest.mark.parametrize("platform", ["tpu-vm", "slurm", "local"])
def test_scripts_pass_shellcheck(platform, tmp_path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    script = rendered(platform, tmp_path=tmp_path)
    command = [shellcheck, "--exclude=SC2016", "-"]  # the odd argument's dollar stays a dollar
    checked = subprocess.run(command, input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("slurm", "--nodes=1", "--", "train", "--run_dir=gs://bucket/run", "--gin_file=r"),
            "--run_dir gs://bucket/run is in a bucket, where Slurm cannot write: give --log",
        ),
        (("local", "--", "evaluate"), "after -- there must be"),
        (("local",), "after -- there must be"),
        (("gke-tpu", *KUBERNETES, "--topology=h100:8", *TRAIN), "--topology h100:8 is no TPU"),
        (("tpu-vm", *CASES["tpu-vm"], "--topology=2xv5e-16", *TRAIN), "are for gke-tpu"),
        (("gke-tpu", *KUBERNETES, "--topology=v5e:3x3", *TRAIN), "no such machine as 'v5e:3x3'"),
        (
            (
                *("gke-gpu", *KUBERNETES, "--nodes=1"),
                *("--", "train", "--run_dir=/tmp/run", "--gin_file=r.gin"),
            ),
            "--run_dir /tmp/run would be lost with its host: put it below /data",
        ),
        (("gke-gpu", "--name=One_"), "One_"),
        (("local", "--dryrun", *TRAIN), "'--dryrun'; did you mean '--dry_run'?"),
        (("local", "--", "train", "--run_dri=/run"), "'--run_dri'; did you mean '--run_dir'?"),
        (
            ("local", *TRAIN[:-1], "configs/recipes/quickstart.gin", "--gin.train.rwos=8"),
            "train has no setting 'rwos'; did you mean 'rows'?",
        ),
    ],
)
def test_mistakes_are_refused_in_a_line(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Puts programs in front of the real ones; each writes its arguments to a log."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def fake(name, script="exit 0"):
        path = directory / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{script}\n')
        path.chmod(0o755)

    fake.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return fake


@pytest.mark.parametrize("platform", ["gke-tpu", "slurm"])
def test_what_is_printed_is_what_is_handed_over(platform, fakes, tmp_path):
    for engine in ("kubectl", "sbatch"):
        fakes(engine, f"cat > {tmp_path}/given; exit 3")
    log = (f"--log={tmp_path}/log",) if platform == "slurm" else ()
    done = launch(platform, *CASES[platform], *log, *TRAIN, ODD)
    assert done.returncode == 3
    assert (tmp_path / "given").read_text().strip() == rendered(platform, tmp_path=tmp_path).strip()


def slurm_job(tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(rendered("slurm", tmp_path=tmp_path))
    return subprocess.Popen(
        ["bash", script], env={**os.environ, "SLURM_JOB_ID": "7"}, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize(
    ("code", "state", "before", "requeued"),
    [
        (143, "RUNNING", 50, True),
        (143, "COMPLETING", 0, False),
        (75, "RUNNING", 0, True),
        (75, "RUNNING", 20, False),
        (2, "RUNNING", 0, False),
        (0, "", 0, False),
    ],
)
def test_a_slurm_job_is_requeued_if_it_was_stopped_or_hung_and_not_cancelled(
    fakes, tmp_path, monkeypatch, code, state, before, requeued
):
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(before))
    fakes("srun", f"exit {code}")
    fakes("squeue", f"echo {state}")
    fakes("scontrol")
    job = slurm_job(tmp_path)
    assert job.wait(30) == code
    assert ("scontrol requeue 7" in fakes.calls()) == requeued
    assert any(call.startswith("srun --mpi=none t5g2 train") for call in fakes.calls())


def test_a_slurm_job_whose_time_is_up_lets_its_tasks_save_first(fakes, tmp_path):
    running = tmp_path / "running"
    fakes(
        "srun", f"trap 'sleep 1; exit 143' TERM; echo $$ > {running}; while :; do sleep 0.1; done"
    )
    fakes("scancel", f'kill -TERM "$(cat {running})"')
    fakes("squeue", "echo RUNNING")
    fakes("scontrol")
    job = slurm_job(tmp_path)
    while not running.exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # Slurm's own: the tasks hear of it themselves
    time.sleep(0.3)
    assert not any(call.startswith("scancel") for call in fakes.calls())
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143
    assert fakes.calls()[-3:] == [
        "scancel --signal=TERM 7",
        "squeue --noheader --jobs=7 --format=%T",
        "scontrol requeue 7",
    ]


def test_a_preempted_tpu_slice_is_asked_for_again(fakes, tmp_path):
    """The slice is preempted in its first training, and done in the second."""
    state = tmp_path / "state"
    fakes(
        "gcloud",
        f"""
        case "$*" in
          *queued-resources\\ create*) echo ACTIVE > {state} ;;
          *queued-resources\\ list*) cat {state} 2> /dev/null; exit 0 ;;
          *queued-resources\\ delete*) rm {state} ;;
          *t5g2\\ train*)
            [[ -e {state}.once ]] && exit 0
            touch {state}.once; echo SUSPENDED > {state}; exit 1 ;;
        esac""",
    )
    done = launch("tpu-vm", *CASES["tpu-vm"], "--poll_seconds=1", *TRAIN)
    assert done.returncode == 0, done.stderr
    verbs = [call.split()[4] for call in fakes.calls() if " list " not in call]
    assert verbs == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh"]
    (create, _) = (call for call in fakes.calls() if " create " in call)
    assert "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --spot" in create
    assert "--zone=us-east5-a --project=p" in create


def test_a_mistake_on_a_tpu_slice_is_not_repeated(fakes):
    fakes("gcloud", 'case "$*" in *list*) echo ACTIVE ;; *t5g2\\ train*) exit 2 ;; esac')
    done = launch("tpu-vm", *CASES["tpu-vm"], "--poll_seconds=1", *TRAIN)
    assert done.returncode == 2
    assert "not preempted, but t5g2 ended with 2" in done.stdout
    assert sum(" ssh " in call for call in fakes.calls()) == 2


def test_the_container_has_an_extra_for_each_accelerator():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"tpu", "cuda", "seqio"} <= project["optional-dependencies"].keys()
    copied = {
        name
        for line in (ROOT / "launch/Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
        for name in line.split()[1:-1]
    }
    assert all((ROOT / name).exists() for name in copied)


def steps(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in lines if record["kind"] == "train"]


@pytest.mark.slow
def test_two_local_processes_one_killed_the_same_command_goes_on(tmp_path, standard_library):
    sys.path.insert(0, str(ROOT / "tests"))
    from small_run import write_corpus, write_recipe

    corpus = write_corpus(tmp_path / "corpus", standard_library(200_000))
    recipe = write_recipe(tmp_path / "recipe.gin", corpus)
    run_dir = tmp_path / "run"
    command = [
        *(sys.executable, PROGRAM, "local", "--processes=2", "--", "train"),
        *("--run_dir", run_dir, "--gin_file", recipe, "--gin.train.total_steps=400"),
        *("--gin.hosts.heartbeat_seconds=10", "--gin.evaluation.every=400"),
        *("--gin.checkpoints.every=10", "--gin.finish.export=False", "--gin.finish.samples=0"),
    ]

    @contextlib.contextmanager
    def running():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, **pipes)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=120)

    def wait_for(process, done):
        for _ in range(4000):
            if done():
                return
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        raise AssertionError("no step in time")

    with running() as first:
        wait_for(first, lambda: (run_dir / "checkpoints" / "10").exists())
        children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
        first.communicate(timeout=120)
        assert first.returncode not in (0, 143)
    reached = max(steps(run_dir))
    with running() as second:
        wait_for(second, lambda: max(steps(run_dir)) > reached)
        second.send_signal(signal.SIGTERM)
        told, _ = second.communicate(timeout=120)
        assert second.returncode == 143, told
    again = steps(run_dir)
    resumed = again[again.index(reached) + 1]
    assert 10 < resumed <= reached + 1
