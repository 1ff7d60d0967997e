"""The scalars of a run at Weights & Biases, beside `metrics.jsonl`; off unless a project is named.

Whatever fails there, the run goes on: the first failure is told, and nothing more is sent.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from t5g2.files import is_remote, write_atomically

ID_FILE = "wandb_id"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases.

    Attributes:
        project: where the run is logged; None: not at all. Needs the extra `t5g2[wandb]`.
        entity: user or team; None: the account's own.
        name: what the run is called there; None: as its directory.
        mode: "offline" writes to the run directory, for `wandb sync`.
    """

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class WandbLog:
    """One run there, the same one after a resume."""

    def __init__(
        self, config: WandbConfig, run_dir: Path, tell: Callable[[str], None] = print
    ) -> None:
        """Does not connect yet; does nothing at all if no project is named.

        Args:
            config: what to log where.
            run_dir: the run's, which keeps the number that the run has there.
            tell: is told of a failure.

        Raises:
            ModuleNotFoundError: a project is named, and the package is not installed.
        """
        self._config, self._run_dir, self._tell = config, run_dir, tell
        self._run: Any = None
        self._wandb: Any = None
        if config.project is not None:
            import wandb

            self._wandb = wandb

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        """Begins the run, or goes on with it; `facts` become its configuration."""
        if self._run is None:
            self._trying(self._begin)
        if self._run is not None:
            self._trying(lambda: self._run.config.update(dict(facts), allow_val_change=True))

    def write(self, step: int, scalars: Sequence[tuple[str, float]]) -> None:
        """Sends the scalars of a step, by their names in TensorBoard."""
        if self._run is not None:
            # A step of its own: after a resume steps come again, which wandb's own may not.
            self._trying(lambda: self._run.log({"step": step, **dict(scalars)}))

    def close(self) -> None:
        """Waits until all is sent; a second call does nothing."""
        run, self._run = self._run, None
        if run is not None:
            self._trying(run.finish)

    def _begin(self) -> None:
        path = self._run_dir / ID_FILE
        if not path.exists():
            write_atomically(path, secrets.token_hex(8))
        self._run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name or self._run_dir.resolve().name,
            id=path.read_text().strip(),
            resume="allow",
            mode=self._config.mode,
            dir=None if is_remote(self._run_dir) else str(self._run_dir),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _trying(self, action: Callable[[], Any]) -> None:
        if self._wandb is None:
            return
        try:
            action()
        except Exception as error:
            self._run = self._wandb = None
            self._tell(f"wandb failed, and is left out from here on: {error}")
