"""What a run does about bad steps: it tells of them, and goes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.checkpoints.rollback import left_out, read_rollbacks, roll_back
from t5g2.data.feed import documents_between, of_all_processes
from t5g2.data.packing import RowStream
from t5g2.training.bad_steps import BadStepsConfig, Guard


class Recovery:
    """Carries out, in all processes of a run alike, what its `Guard`s decide."""

    def __init__(
        self,
        config: BadStepsConfig,
        run_dir: Path,
        store: CheckpointStore,
        rows: RowStream,
        first: int,
        warn: Callable[..., None],
    ) -> None:
        """Takes what it acts on.

        Args:
            config: the policies.
            run_dir: of the run.
            store: its checkpoints.
            rows: of the global batch.
            first: number of this process's first row.
            warn: takes a message, the step, and what else to record.
        """
        self._config, self._run_dir, self._store = config, run_dir, store
        self._rows, self._first, self._warn = rows, first, warn
        self._rollbacks = read_rollbacks(run_dir)

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """First and last numbers of the batches that the run is never trained on."""
        return left_out(self._rollbacks)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint must say, for `remove_abandoned`."""
        return {"rollbacks": len(self._rollbacks)}

    def tell(self, guard: Guard) -> None:
        """Tells of the bad steps that were found since the last call, and what they were fed."""
        for bad in guard.found():
            number, before, after = bad.drawn.number, bad.drawn.before, bad.drawn.after
            own = documents_between(self._rows, self._first, before, after)
            documents = of_all_processes(self._rows, own)
            self._warn(
                f"{bad}. Its batch: t5g2 inspect data --run_dir {self._run_dir} --batch {number}",
                at=bad.drawn.step,
                bad_step=bad.kind,
                policy=bad.policy,
                skipped=bad.skipped,
                loss=bad.loss,
                grad_norm=bad.grad_norm,
                batch=number,
                batch_digest=f"{bad.digest:08x}",
                documents={name: " ".join(map(str, ids)) for name, ids in documents.items()},
            )

    def rolls_back(self, guard: Guard) -> bool:
        """Rolls back, if that is to be done; the state is then that of the newest checkpoint.

        Sets `guard.stop` instead if the run has come back to the same checkpoint too often.
        """
        if guard.stop or guard.stretch is None:
            return False
        first, last = guard.stretch
        config = self._config
        rollback = roll_back(
            self._run_dir,
            self._store,
            first.number,
            last.number,
            bad_step=first.step,
            checkpoints=config.checkpoints_back,
            most=config.most_in_a_row,
        )
        if rollback is None:
            guard.stop = (
                f"bad_steps: step {first.step} is bad after {config.most_in_a_row} rollbacks to "
                "the same checkpoint"
            )
            return False
        self._rollbacks.append(rollback)
        self._warn(
            f"bad_steps: back from step {last.step} to step {rollback.back_to}, and on without "
            f"batches {rollback.first} to {rollback.last}",
            at=last.step,
        )
        return True
