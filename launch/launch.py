"""Starts `t5g2 train` somewhere: renders a template of this directory and hands it to its engine.

    python launch/launch.py PLATFORM [options] [--dry_run] -- train --run_dir R --gin_file F ...

What follows `--` is t5g2's own command line. `--dry_run` prints what would be handed over. The same
command again goes on with the run. A page for each platform: docs/launch/.
"""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from t5g2.cli import Parser, parse_job
from t5g2.errors import UserError
from t5g2.planning.topologies import Topology, find_topology

HERE = Path(__file__).parent
# Where a claim or a share is mounted: what a run is to keep lies there.
DATA = "/data"
BUCKETS = "gs://"
# What Google calls the kinds of t5g2's topologies: GKE's label, Cloud TPU's accelerator type and
# how it counts a chip, and the software of TPU VMs.
TPUS = {
    "v5e": ("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
}


class Launch(NamedTuple):
    """What is handed to an engine.

    Attributes:
        text: a script or a manifest.
        engine: command that takes it on its standard input; empty: bash runs it.
    """

    text: str
    engine: Sequence[str] = ()


def render(template: str, /, **values: object) -> str:
    """A template of this directory with every `@{name}` filled in.

    Shell and Kubernetes have uses of their own for the dollar.

    Raises:
        KeyError: a value is missing.
    """
    text = (HERE / template).read_text()
    return re.sub(r"@\{(\w+)\}", lambda match: str(values[match[1]]), text)


def local(args: argparse.Namespace) -> Launch:
    """Several processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = shlex.join([sys.executable, "-m", "t5g2", *args.command])
    return Launch(render("local.sh", command=command, port=port, processes=args.processes))


def slurm(args: argparse.Namespace) -> Launch:
    """A job of a Slurm cluster."""
    run_dir = args.run_dir
    if args.log is None and run_dir.startswith(BUCKETS):
        raise UserError(f"--run_dir {run_dir} is in a bucket, where Slurm cannot write: give --log")
    log = Path(args.log or f"{run_dir}.log").absolute()
    log.parent.mkdir(parents=True, exist_ok=True)  # Slurm makes none, and would write nothing
    text = render(
        "slurm.sh",
        name=args.name,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        log=log,
        more_options="\n".join(f"#SBATCH {option}" for option in args.sbatch_option),
        srun_options="".join(f"{shlex.quote(option)} " for option in args.srun_option),
        directory=shlex.quote(str(Path.cwd())),
        command=shlex.join(args.command_prefix + args.command),
    )
    return Launch(text, ("sbatch",))


def gke_tpu(args: argparse.Namespace) -> Launch:
    """A JobSet on one TPU slice of GKE, or several."""
    topology = _tpu(args.topology)
    kind, _, shape = topology.one_slice.partition(":")
    selector = {"cloud.google.com/gke-tpu-accelerator": TPUS[kind][0]}
    selector["cloud.google.com/gke-tpu-topology"] = shape
    # Slices of more than eight chips have hosts of four; v5e and v6e of up to eight have one.
    chips = topology.count // topology.slices
    per_host = 4 if chips > 8 or kind == "v5p" else chips
    text = render(
        "gke_tpu.yaml",
        **_kubernetes(args, selector),
        slices=topology.slices,
        hosts=chips // per_host,
        chips_per_host=per_host,
        command=_literal(["t5g2", *map(_unexpanded, args.command)]),
    )
    return Launch(text, _kubectl(args))


def gke_gpu(args: argparse.Namespace) -> Launch:
    """A JobSet on GPU nodes."""
    selector = {"cloud.google.com/gke-accelerator": args.gpu} if args.gpu else {}
    own = [
        f"--gin.hosts.coordinator=$(COORDINATOR):{args.port}",
        f"--gin.hosts.count={args.nodes}",
        "--gin.hosts.index=$(JOB_COMPLETION_INDEX)",
    ]
    text = render(
        "gke_gpu.yaml",
        **_kubernetes(args, selector),
        hosts=args.nodes,
        gpus_per_node=args.gpus_per_node,
        port=args.port,
        command=_literal(["t5g2", *map(_unexpanded, args.command), *own]),
    )
    return Launch(text, _kubectl(args))


def tpu_vm(args: argparse.Namespace) -> Launch:
    """A queued resource of Cloud TPU."""
    topology = _tpu(args.topology)
    if topology.slices > 1:
        raise UserError(f"--topology {args.topology}: several slices are for gke-tpu")
    _, accelerator, per_chip, software = TPUS[topology.name.partition(":")[0]]
    _run_dir_below_data(args)
    registry, image = args.image.partition("/")[0], shlex.quote(args.image)
    prepare = [
        "mountpoint -q /data || (sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common"
        f" && sudo mkdir -p /data && sudo mount -t nfs {shlex.quote(args.nfs)} /data)",
        f"sudo docker pull -q {image}",
    ]
    if registry.endswith((".pkg.dev", "gcr.io")):
        prepare.insert(1, f"sudo gcloud auth configure-docker --quiet {shlex.quote(registry)}")
    # What an interrupted call of the script left running goes on.
    run = f"docker run --rm --init --name=t5g2 --privileged --network=host --volume={DATA}:{DATA}"
    train = (
        "if sudo docker inspect t5g2 > /dev/null 2>&1; then sudo docker attach --no-stdin t5g2;"
        f" else sudo {run} {image} t5g2 {shlex.join(args.command)}; fi"
    )
    options = [*(["--spot"] if args.spot else []), *args.create_option]
    place = [f"--zone={args.zone}"] + ([f"--project={args.project}"] if args.project else [])
    text = render(
        "tpu_vm.sh",
        name=shlex.quote(args.name),
        place=shlex.join(place),
        accelerator_type=f"{accelerator}-{topology.count * per_chip}",
        runtime_version=shlex.quote(args.runtime_version or software),
        create_options="".join(f" {shlex.quote(option)}" for option in options),
        prepare=shlex.quote(" && ".join(prepare)),
        train=shlex.quote(train),
        poll_seconds=args.poll_seconds,
    )
    return Launch(text)


def _kubernetes(args: argparse.Namespace, selector: dict[str, str]) -> dict[str, object]:
    """What both JobSets have."""
    _run_dir_below_data(args)
    if args.spot:
        selector |= {"cloud.google.com/gke-spot": "true"}
    labels = {"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}
    return {
        "name": _literal(args.name),
        "labels": _literal(labels),
        "image": _literal(args.image),
        "claim": _literal(args.claim),
        "node_selector": _literal(selector),
        "max_restarts": args.max_restarts,
        "grace_seconds": args.grace_seconds,
    }


def _literal(value: object) -> str:
    return json.dumps(value)  # JSON is YAML


def _unexpanded(argument: str) -> str:
    return argument.replace("$(", "$$(")  # Kubernetes would look for a variable


def _kubectl(args: argparse.Namespace) -> list[str]:
    # Create, not apply: a second job on the same run directory is refused while the first exists.
    space = [f"--namespace={args.namespace}"] if args.namespace else []
    return ["kubectl", "create", *space, "--filename=-"]


def _tpu(name: str) -> Topology:
    topology = find_topology(name)
    if topology.platform != "tpu":
        raise UserError(f"--topology {name} is no TPU slice")
    return topology


def _check(command: Sequence[str]) -> str:
    """Refuses what t5g2 itself would refuse, before anything is asked for; returns the run_dir."""
    if command[:1] != ["train"]:
        raise UserError("after -- there must be t5g2's command line: train --run_dir R ...")
    given = parse_job(command)
    # What is not here lies where the run will be.
    files = all(name.startswith("configs/") or Path(name).is_file() for name in given.gin_file)
    if files and all(Path(directory).is_dir() for directory in given.gin_search_paths):
        from t5g2.settings import read_settings

        read_settings(given.gin_file, given.gin_bindings, given.gin_search_paths)
    return str(given.run_dir)


def _run_dir_below_data(args: argparse.Namespace) -> None:
    run_dir = args.run_dir
    if not run_dir.startswith(BUCKETS) and not Path(run_dir).is_relative_to(DATA):
        raise UserError(
            f"--run_dir {run_dir} would be lost with its host: put it below {DATA}, or into a "
            f"bucket ({BUCKETS}...)"
        )


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="launch.py",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    platforms = parser.add_subparsers(dest="platform", required=True)

    def platform(
        name: str, launch: Callable[[argparse.Namespace], Launch]
    ) -> argparse.ArgumentParser:
        added = platforms.add_parser(name, help=launch.__doc__)
        added.set_defaults(launch=launch)
        added.add_argument("--dry_run", action="store_true", help="print it, hand nothing over")
        return added

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
        return int(text)

    def dns_label(text: str) -> str:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
            raise argparse.ArgumentTypeError(
                f"{text!r}: up to 40 lower-case letters, digits and dashes, a letter first"
            )
        return text

    here = platform("local", local)
    here.add_argument("--processes", type=number, default=2)

    job = platform("slurm", slurm)
    job.add_argument("--name", type=dns_label, default="t5g2")
    job.add_argument("--nodes", type=number, required=True)
    job.add_argument("--gpus_per_node", type=number, default=8)
    job.add_argument("--time", default="24:00:00", help="it is requeued when that is over")
    job.add_argument("--log", help="default: the run directory's name with .log")
    job.add_argument("--sbatch_option", action="append", default=[], metavar="--partition=P")
    job.add_argument("--srun_option", action="append", default=[], metavar="--container-image=I")
    job.add_argument("--t5g2", dest="command_prefix", type=shlex.split, default=["t5g2"])

    for name, launch in (("gke-tpu", gke_tpu), ("gke-gpu", gke_gpu)):
        jobset = platform(name, launch)
        jobset.add_argument("--name", type=dns_label, required=True)
        jobset.add_argument("--image", required=True, help="made by launch/Dockerfile")
        jobset.add_argument("--claim", required=True, help=f"volume claim, mounted at {DATA}")
        jobset.add_argument("--queue", help="Kueue's local queue; without one, at once")
        jobset.add_argument("--namespace", help="default: kubectl's")
        jobset.add_argument("--spot", action="store_true", help="on spot nodes")
        jobset.add_argument("--max_restarts", type=number, default=20, help="after crashes")
        jobset.add_argument("--grace_seconds", type=number, default=600, help="to save in")
        if launch is gke_tpu:
            jobset.add_argument("--topology", required=True, help="v5e:4x4, v5p-128, ...")
        else:
            jobset.add_argument("--nodes", type=number, required=True)
            jobset.add_argument("--gpus_per_node", type=number, default=8)
            jobset.add_argument("--gpu", help="GKE's name, such as nvidia-h100-80gb")
            jobset.add_argument("--port", type=number, default=8476)

    slice_ = platform("tpu-vm", tpu_vm)
    slice_.add_argument("--name", type=dns_label, required=True)
    slice_.add_argument("--topology", required=True, help="v5e:4x4, v5p-128, ...")
    slice_.add_argument("--zone", required=True)
    slice_.add_argument("--project", help="default: gcloud's")
    slice_.add_argument("--nfs", required=True, help=f"HOST:/SHARE, mounted at {DATA}")
    slice_.add_argument("--image", required=True, help="made by launch/Dockerfile")
    slice_.add_argument("--spot", action="store_true", help="cheaper, and preempted")
    slice_.add_argument("--create_option", action="append", default=[], metavar="--reserved")
    slice_.add_argument("--runtime_version", help="default: the kind's usual one")
    slice_.add_argument("--poll_seconds", type=number, default=60)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Prints or hands over; returns the exit code of what ran."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = _parser().parse_args(arguments[:end])
    args.command = arguments[end + 1 :]
    try:
        args.run_dir = _check(args.command)
        text, engine = args.launch(args)
    except UserError as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        print(text)
        return 0
    try:
        if engine:
            return subprocess.run(engine, input=text, text=True).returncode
        # bash takes this process's place, so that signals reach the script.
        os.execvp("bash", ["bash", "-c", text])
    except FileNotFoundError as error:
        print(
            f"launch.py: error: {error.filename or 'bash'} is not installed here", file=sys.stderr
        )
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
