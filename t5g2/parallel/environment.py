"""What a scheduler's environment tells of a run's processes, in ways that jax understands."""

import os
import urllib.error
import urllib.request
from collections.abc import Mapping

from t5g2.errors import UserError

_ADVICE = "or set hosts.coordinator, hosts.count and hosts.index"
# What jax's cluster detection needs of each scheduler, beside the count of processes.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
# Without its number, each of several TPU slices would take itself for the first.
_MEGASCALE = ("MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
_METADATA = "http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints"


def several_processes(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment tells of more than one process; jax then finds the others.

    Slurm and Open MPI count processes in variables; on GKE the workers of a TPU slice are listed in
    one; a Cloud TPU VM asks its metadata server.

    Raises:
        UserError: there are others, but the environment does not say who is who.
    """
    if _number(environment, "SLURM_NTASKS") > 1:
        _demand(environment, "SLURM_NTASKS", _SLURM, f"start t5g2 with srun, {_ADVICE}")
        return True
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        _demand(environment, "OMPI_COMM_WORLD_SIZE", _OPEN_MPI, f"use Open MPI 4, {_ADVICE}")
        return True
    slices = "MEGASCALE_NUM_SLICES"
    if _number(environment, slices) > 1:
        _demand(environment, slices, _MEGASCALE, _ADVICE.removeprefix("or "))
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in environment.get(name, ""):
            _demand(environment, name, ("TPU_WORKER_ID",), _ADVICE.removeprefix("or "))
            return True
    return _number(environment, slices) > 1 or _workers_of_tpu_vm(environment) > 1


def own_gpus(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """The GPUs of a Slurm task, by their numbers among those it sees: its share of its node's.

    jax itself takes one for each task, and would leave the others of a node idle.

    Returns:
        None: not on Slurm, or without GPUs.

    Raises:
        UserError: a node's tasks cannot share its GPUs evenly.
    """
    gpus, seen = (
        _number(environment, "SLURM_GPUS_ON_NODE", 0),
        environment.get("CUDA_VISIBLE_DEVICES"),
    )
    if not gpus or "SLURM_LOCALID" not in environment:
        return None
    # "4(x2),1": four tasks on two nodes, one on a third.
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").replace("(", ",").split(",")
    tasks = int(counts[0])
    if any(c.isdigit() and int(c) != tasks for c in counts) or gpus % tasks:
        raise UserError(
            f"Slurm: {environment.get('SLURM_STEP_TASKS_PER_NODE')} tasks a node cannot share "
            f"{gpus} GPUs evenly: set --ntasks-per-node to a divisor of --gpus-per-node"
        )
    share, local = gpus // tasks, int(environment["SLURM_LOCALID"])
    if seen is not None and len(seen.split(",")) == share:
        local = 0  # Slurm has bound them: the task sees no others.
    return list(range(local * share, (local + 1) * share))


def _number(environment: Mapping[str, str], name: str, default: int = 1) -> int:
    return int(environment.get(name) or default)


def _demand(
    environment: Mapping[str, str], count: str, needed: tuple[str, ...], advice: str
) -> None:
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UserError(
            f"hosts: {count} = {environment[count]} tells of several processes, but there is no "
            f"{', '.join(missing)}: {advice}"
        )


def _workers_of_tpu_vm(environment: Mapping[str, str]) -> int:
    """Hosts of the slice that a Cloud TPU VM belongs to; 1 anywhere else.

    jax marks the environment when it is imported: TPU_ML_PLATFORM where libtpu can drive TPU chips,
    TPU_SKIP_MDS_QUERY where there are none. Schedulers that tell by variables set the latter, too.
    """
    marked = environment.get("TPU_ML_PLATFORM") == "JAX"
    if not marked or "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment:
        return 1
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        _METADATA.format(host=host), headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return len(answer.read().decode().split(","))
    except urllib.error.HTTPError:  # A machine of Google's without such an attribute: no slice.
        return 1
    except OSError as error:
        raise UserError(
            f"hosts: this machine has TPU chips, but its metadata server {host} does not answer "
            f"({error}): set TPU_SKIP_MDS_QUERY=1 if it stands alone, {_ADVICE}"
        ) from None
