"""Schedulers' environments: we read in them what jax's own cluster detection makes of them."""

import http.server
import os
import threading

import pytest
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster, ompi_cluster, slurm_cluster

from t5g2.errors import UserError
from t5g2.parallel.environment import own_gpus, several_processes

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[017-018]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_GPUS_ON_NODE": "8",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "w-0.run,w-1.run,w-2.run,w-3.run", "TPU_WORKER_ID": "2"}
GKE_SLICES = GKE_TPU | {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "one-train-0-0.one",
}


@pytest.fixture
def machine(monkeypatch):
    """Gives the process an environment, as jax's detection reads that of the process."""

    def give(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return environment

    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # jax set it: there is no TPU here
    return give


@pytest.mark.parametrize(
    ("environment", "cluster", "count", "index"),
    [
        (SLURM, slurm_cluster.SlurmCluster, 16, 9),
        (OPEN_MPI, ompi_cluster.OmpiCluster, 4, 3),
        (GKE_TPU, cloud_tpu_cluster.GkeTpuCluster, 4, 2),
        (GKE_SLICES, cloud_tpu_cluster.GkeTpuCluster, 12, 6),
    ],
)
def test_jax_finds_the_processes_that_we_say_are_there(
    machine, monkeypatch, metadata, environment, cluster, count, index
):
    monkeypatch.setenv("GCE_METADATA_IP", metadata(None))  # jax asks for several slices, too
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    assert several_processes(machine(environment))
    assert cluster.is_env_present()
    assert (cluster.get_process_count(), cluster.get_process_id()) == (count, index)


def test_slurms_coordinator_is_the_first_node(machine):
    machine(SLURM)
    address = slurm_cluster.SlurmCluster.get_coordinator_address(None, "1234")
    assert address == "node017:1234"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_NTASKS": "1"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ML_PLATFORM": "JAX"},
        {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"},
    ],
)
def test_one_process_is_one(environment):
    assert not several_processes(environment)


@pytest.mark.parametrize(
    ("environment", "missing", "message"),
    [
        (SLURM, "SLURM_STEP_NODELIST", "SLURM_NTASKS = 16 .*start t5g2 with srun"),
        (OPEN_MPI, "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE = 4 .*Open MPI 4"),
        (GKE_TPU, "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES = .*: set hosts.coordinator"),
        (GKE_SLICES, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES = 3 .*: set hosts.coordinator"),
    ],
)
def test_half_an_environment_is_refused_by_what_is_missing(environment, missing, message):
    half = {name: value for name, value in environment.items() if name != missing}
    with pytest.raises(UserError, match=message) as refused:
        several_processes(half)
    assert f"there is no {missing}" in str(refused.value)


@pytest.fixture
def metadata():
    """A metadata server of Cloud TPU on loopback: `metadata(endpoints)` gives its address."""
    servers = []

    def serve(endpoints):
        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                known = {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}
                google = self.headers["Metadata-Flavor"] == "Google" and endpoints is not None
                self.send_response(200 if google else 404)
                self.end_headers()
                self.wfile.write(known[name].encode() if google else b"")

            def log_message(self, *_):
                pass

        servers.append(http.server.HTTPServer(("localhost", 0), Answers))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"localhost:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("endpoints", ["a:0:10.0.0.2,b:1:10.0.0.3", "worker-0,worker-1"])
def test_a_tpu_vm_asks_its_metadata_server_as_jax_does(machine, monkeypatch, metadata, endpoints):
    pytest.importorskip("requests")  # jax asks by it
    environment = machine({"TPU_ML_PLATFORM": "JAX", "GCE_METADATA_IP": metadata(endpoints)})
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    cluster = cloud_tpu_cluster.GceTpuCluster
    assert cluster.is_env_present()
    assert several_processes(environment)
    assert len(cluster._get_worker_list_in_slice()) == 2
    assert cluster._get_process_id_in_slice() == 1


@pytest.mark.parametrize("endpoints", ["10.0.0.2", None])
def test_a_tpu_vm_of_its_own_is_alone(metadata, endpoints):
    environment = {"TPU_ML_PLATFORM": "JAX", "GCE_METADATA_IP": metadata(endpoints)}
    assert not several_processes(environment)


def test_a_silent_metadata_server_is_an_error_and_no_lonely_run():
    with pytest.raises(UserError, match=r"metadata server localhost:1 does not answer"):
        several_processes({"TPU_ML_PLATFORM": "JAX", "GCE_METADATA_IP": "localhost:1"})


def test_jax_marks_a_tpu_vm_as_we_expect(monkeypatch):
    for name in ("TPU_ML_PLATFORM", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GRPC_VERBOSITY", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "")
    chips = (4, cloud_tpu_init.hardware_utils.TpuVersion.v4)
    monkeypatch.setattr(
        cloud_tpu_init.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: chips
    )
    monkeypatch.setattr(cloud_tpu_init, "get_tpu_library_path", lambda: "libtpu.so")
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)
    monkeypatch.setattr(cloud_tpu_init.config, "update", lambda *_: None)
    cloud_tpu_init.cloud_tpu_init()
    assert os.environ["TPU_ML_PLATFORM"] == "JAX"
    assert "TPU_SKIP_MDS_QUERY" not in os.environ


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, [1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, list(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, [4, 5, 6, 7]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "5"}, [0]),
        ({"SLURM_GPUS_ON_NODE": ""}, None),
    ],
)
def test_slurm_tasks_share_all_gpus_of_their_node(changes, gpus):
    assert own_gpus({**SLURM, **changes}) == gpus


@pytest.mark.parametrize("tasks", ["3(x2)", "8(x2),4"])
def test_gpus_that_tasks_cannot_share_evenly_are_refused(tasks):
    with pytest.raises(UserError, match="cannot share 8 GPUs evenly"):
        own_gpus({**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks})
