"""Scalars for TensorBoard.

Written at once and by the thread that has them: of a writer with a queue and a thread of its own,
the thread ends at a disk that is full, and then the queue fills and holds the run up for ever.
"""

import socket
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5g2.reporting.appending import open_appended

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event


class ScalarsFile:
    """A new event file of a directory."""

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        """Makes the file.

        Args:
            directory: what `tensorboard --logdir` is given; made if it is missing.
            purge_step: TensorBoard hides what other files have of this step and later; None:
                nothing.
        """
        _import_tensorboardx()
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._file = open_appended(directory / name)
        self._append(file_version="brain.Event:2")
        if purge_step is not None:
            from tensorboardX.proto.event_pb2 import SessionLog

            log = SessionLog(status=SessionLog.START)
            self._append(step=purge_step, session_log=log)

    def add(self, step: int, seconds: float, scalars: Iterable[tuple[str, float]]) -> None:
        """Appends values of one step, by name; `seconds` are those of the clock."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars]
        self._append(step=step, wall_time=seconds, summary=Summary(value=values))

    def close(self) -> None:
        """Closes the file.

        Raises:
            UserError: there was no room for the last of it.
        """
        self._file.close()

    def _append(self, *, wall_time: float | None = None, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(wall_time=time.time() if wall_time is None else wall_time, **fields)
        self._file.append(_framed(event))


def _import_tensorboardx() -> None:
    """Imports it without torch: where that is installed, it would be imported too, for 2 s."""
    blocked = "torch" not in sys.modules
    if blocked:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX  # noqa: F401
    finally:
        if blocked:
            del sys.modules["torch"]


def _framed(event: "Event") -> bytes:
    """An event as a TFRecord: its length, the length's checksum, itself, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]
