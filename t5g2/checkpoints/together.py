"""How the processes of a run learn that one of them could not write its part of a checkpoint."""

import contextlib
import errno
from typing import Any

import jax
from jax._src import distributed  # jax itself offers its key-value store nowhere else

_WELL = "-"
_TIMEOUT_MS = 600_000
# Of a save: each process has written, the first has made one directory of it, and a checkpoint.
_ROUNDS = 3


class SaveBarrier:
    """What Orbax waits at in the background of a save, in place of a barrier that knows no errors.

    Everywhere a save fails, or nowhere: a process that failed says why where the others wait, and
    they raise what it said. It goes through the coordinator's key-value store, as the devices are
    at work on steps. The first process decides once it has heard all, so none still writes then.
    """

    def __init__(self) -> None:
        """Begins before the first save."""
        self._save, self._round = 0, _ROUNDS

    def begin(self) -> None:
        """Begins a save; each process does so for each save."""
        self._save, self._round = self._save + 1, 0
        if jax.process_index() == 0 and self._save > 2:
            # Of the last one, another process may not have heard the end.
            self._client().key_value_delete(f"t5g2/save/{self._save - 2}/")

    def __call__(self, *, key: str, timeout_ms: int = _TIMEOUT_MS) -> None:
        """Waits until every process is here, as Orbax's `barrier_sync_fn`.

        Args:
            key: the barrier's name, for Orbax's sake: they are counted.
            timeout_ms: milliseconds to wait for the others.

        Raises:
            OSError: another process failed; its text says which and why.
            jax.errors.JaxRuntimeError: one did not come in time.
        """
        self._meet(_WELL, timeout_ms)

    def fail(self, why: str) -> None:
        """Tells the others that this process failed, unless the save is over for them, too."""
        if self._round < _ROUNDS:
            with contextlib.suppress(OSError, jax.errors.JaxRuntimeError):
                self._meet(f"{why} (process {jax.process_index()})", _TIMEOUT_MS)

    def _meet(self, said: str, timeout_ms: int) -> None:
        client, where = self._client(), f"t5g2/save/{self._save}/{self._round}"
        self._round += 1
        client.key_value_set(f"{where}/{jax.process_index()}", said)
        if jax.process_index() == 0:
            heard = [
                client.blocking_key_value_get(f"{where}/{index}", timeout_ms)
                for index in range(jax.process_count())
            ]
            client.key_value_set(
                f"{where}/all", next((text for text in heard if text != _WELL), _WELL)
            )
        together = client.blocking_key_value_get(f"{where}/all", timeout_ms)
        if together != _WELL:
            self._round = _ROUNDS
            raise OSError(errno.EIO, together)

    @staticmethod
    def _client() -> Any:
        return distributed.global_state.client
