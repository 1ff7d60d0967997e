"""Several processes that train one model: how they meet, and which rows each of them feeds."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5g2.errors import UserError
from t5g2.parallel.environment import own_gpus, several_processes

_SAYS_EVERY_SECONDS = 15.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """The processes of a run. On Slurm, Cloud TPU, GKE and under MPI nothing needs to be set.

    Attributes:
        coordinator: address "host:port" of process 0; None: the environment tells.
        count: number of processes; None: the environment tells, or there is one.
        index: number of this process, from 0; None: the environment tells.
        wait_seconds: how long to wait for the other processes at the start.
        heartbeat_seconds: a process that is silent for so long is taken for dead, and the others
            stop.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    wait_seconds: int = 300
    heartbeat_seconds: int = 30

    def __post_init__(self) -> None:
        given = [self.coordinator is not None, self.count is not None, self.index is not None]
        if any(given) and not all(given):
            raise ValueError("coordinator, count and index must be given together")
        if self.count is not None and self.index is not None:
            if self.count < 1:
                raise ValueError(f"count must be at least 1, not {self.count}")
            if not 0 <= self.index < self.count:
                raise ValueError(f"index must be below count ({self.count}), not {self.index}")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"coordinator must be host:port, not {self.coordinator!r}")
        if self.wait_seconds < 1 or self.heartbeat_seconds < 1:
            raise ValueError("wait_seconds and heartbeat_seconds must be at least 1")


def start(config: HostsConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Meets the other processes, if there are any; before anything of jax's back end is used.

    A process that does not come, or dies later, ends the others, with a message that names it.

    Raises:
        UserError: the coordinator cannot be reached in time, or the environment tells too little.
    """
    if jax.distributed.is_initialized():
        return
    if not (config.count or several_processes(environment)):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if config.coordinator is not None and config.index:
        _wait_for(config.coordinator, config.wait_seconds)
    with _Deadline(config):
        jax.distributed.initialize(
            config.coordinator,
            config.count,
            config.index,
            local_device_ids=None if config.count else own_gpus(environment),
            # Later than our own deadline, which explains itself.
            initialization_timeout=config.wait_seconds + 60,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )


def _wait_for(coordinator: str, seconds: float) -> None:
    """Waits until something listens at an address."""
    host, _, port = coordinator.rpartition(":")
    begin = said = time.monotonic()
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
            return
        except OSError as error:
            now = time.monotonic()
            if now - begin > seconds:
                raise UserError(
                    f"hosts.coordinator: no process 0 at {coordinator} after {seconds:.0f} s "
                    f"({error}): start it, mend the address, or raise hosts.wait_seconds"
                ) from None
            if now - said > _SAYS_EVERY_SECONDS:
                print(f"waiting for process 0 at {coordinator} ({error})", file=sys.stderr)
                said = now
            time.sleep(0.5)


class _Deadline:
    """Ends the process with a line that says why if the others do not come while it is active."""

    def __init__(self, config: HostsConfig) -> None:
        self._config = config
        self._timer = threading.Timer(config.wait_seconds, self._give_up)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _give_up(self) -> None:
        config = self._config
        count = "all processes" if config.count is None else f"all {config.count} processes"
        print(
            f"t5g2: error: hosts: {count} were not there after {config.wait_seconds} s: start the "
            "missing ones, or raise hosts.wait_seconds",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


def is_first() -> bool:
    """Whether this process is the one that writes logs and results."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_goes_first(name: str) -> Iterator[None]:
    """Lets process 0 do what is within before the others do: they find it done."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


class Agreement:
    """Lets all processes act on what one of them knows, at the same step and without waiting.

    What a process says at one call is what every process hears at the next: a value's way through
    the devices overlaps with a step.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._heard: jax.Array | None = None

    def __call__(self, value: int) -> int:
        """Says `value`; returns the largest that any process said at the last call, at first 0."""
        if jax.process_count() == 1:
            return value
        count = len(self._sharding.addressable_devices)
        said = to_devices(self._sharding, np.full(count, value, np.int32), jax.device_count())
        heard, self._heard = self._heard, self._largest(said)
        return 0 if heard is None else int(heard)


class Survey:
    """As `Agreement`, but tells what each process said."""

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._everywhere = jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._processes = [device.process_index for device in mesh.devices.flat]
        self._heard: jax.Array | None = None

    def __call__(self, value: float) -> list[float]:
        """Says `value`; returns what each process said at the last call; at first []."""
        if jax.process_count() == 1:
            return [value]
        count = len(self._sharding.addressable_devices)
        said = to_devices(self._sharding, np.full(count, value, np.float32), jax.device_count())
        heard, self._heard = self._heard, self._everywhere(said)
        if heard is None:
            return []
        by_process = dict(zip(self._processes, np.asarray(heard).tolist(), strict=True))
        return [by_process[process] for process in range(jax.process_count())]


def own_rows(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """First row and number of rows of a global batch that this process feeds.

    Processes whose devices share rows (a tensor axis across hosts) each feed the same ones.

    Args:
        sharding: of the batch.
        rows: rows of the global batch.

    Raises:
        UserError: the rows of this process's devices do not follow one another.
    """
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    spans = by_row.addressable_devices_indices_map((rows,)).values()
    bounds = {span[0].indices(rows)[:2] for span in spans if span is not None}
    first, last = min(bounds)[0], max(end for _, end in bounds)
    if sum(end - begin for begin, end in bounds) != last - first:
        raise UserError(
            f"mesh: the rows of process {jax.process_index()} do not follow one another; order the "
            "mesh axes so that data and fsdp come before those that share rows"
        )
    return first, last - first


def to_devices(shardings: Any, tree: Any, rows: int) -> Any:
    """Global arrays of `rows` rows, of which every process gives its own (see `own_rows`).

    Args:
        shardings: of each array of `tree`, or one of them all. They split rows alike; a process
            has whole rows, and its devices take from them what is theirs.
        tree: this process's rows of each array.
        rows: of the global arrays.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def place(sharding: NamedSharding, array: np.ndarray) -> jax.Array:
        shape = (rows, *array.shape[1:])
        first, _ = own_rows(sharding, rows)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            begin, end, _ = index[0].indices(rows)
            return array[(slice(begin - first, end - first), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, shardings, tree)
