"""The sections of a configuration: what a gin file can bind."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from t5g2 import config
from t5g2.checkpoints.keeping import CheckpointConfig
from t5g2.data.corpus import TokenizerConfig
from t5g2.data.mixture import DataConfig
from t5g2.data.sources import CorpusConfig
from t5g2.errors import UserError
from t5g2.models.config import EXECUTION_FIELDS, ModelConfig
from t5g2.parallel.batch import BatchParts, rows_for, split_batch
from t5g2.parallel.hosts import HostsConfig
from t5g2.parallel.mesh import MeshConfig
from t5g2.reporting.wandb_log import WandbConfig
from t5g2.training.bad_steps import BadStepsConfig
from t5g2.training.optimizer import OptimizerConfig
from t5g2.training.schedule import ScheduleConfig
from t5g2.watchdog import WatchdogConfig

CONFIG_FILE = "config.gin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run.

    Attributes:
        total_steps: length of the run; the learning rate decays over it.
        stop_at: stop after this step, as if interrupted; None: at the end.
        rows: rows of a global batch; None: as many as `tokens_per_batch` makes.
        tokens_per_batch: inputs and targets of a global batch, padding included, instead of `rows`:
            the number of rows that comes within 2% of it and that most meshes can share.
        accumulation: microbatches that a batch is split into, one after the other; more if
            `rows_per_device` asks for more.
        rows_per_device: the most rows of a microbatch that a device takes; None: any number.
        log_every: steps between two records in the metrics log.
        seed: of the initial parameters.
        accept_changes: whether a run may go on with other data than it began with: other values of
            `data`, `corpus` and `train.rows`, or other documents. Each source goes on about where
            it was.
        init_from: checkpoint, or Hugging Face directory of T5Gemma 2, whose parameters the run
            starts from, and whose tokenizer it takes if `tokenizer.path` is None; None: random.
        teacher: checkpoint, or Hugging Face directory of T5Gemma 2, whose distribution over the
            vocabulary the model learns wherever the target is no sentinel; None: the target alone.
        z_loss: weight of the squared logarithm of the softmax's normaliser in what is trained on,
            not in the losses that are reported; PaLM's is 1e-4.
    """

    total_steps: int
    rows: int | None = None
    tokens_per_batch: int | None = None
    stop_at: int | None = None
    accumulation: int = 1
    rows_per_device: int | None = None
    log_every: int = 10
    seed: int = 0
    accept_changes: bool = False
    init_from: str | None = None
    teacher: str | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        counts = ("rows", "tokens_per_batch", "rows_per_device", "accumulation")
        for name in ("total_steps", "log_every", *counts):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative, not {self.z_loss}")
        if self.rows is None and self.tokens_per_batch is None:
            raise ValueError("rows or tokens_per_batch must be given")
        if self.rows is not None and self.tokens_per_batch is not None:
            raise ValueError(
                f"rows = {self.rows} and tokens_per_batch = {self.tokens_per_batch} say the same "
                "thing twice: set one of them to None"
            )
        if self.rows is not None and self.rows % self.accumulation:
            raise ValueError(f"accumulation ({self.accumulation}) must divide rows ({self.rows})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss.

    Attributes:
        every: steps between two evaluations in a run.
        average_every: steps between two evaluations of the mean of the last `finish.average_last`
            checkpoints; None: at the end alone.
        batches: batches of held-out rows, always the same ones.
        samples: number of held-out passages to fill in greedily at each evaluation; needs a run of
            one process.
    """

    every: int = 500
    average_every: int | None = None
    batches: int = 8
    samples: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "average_every", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.samples < 0:
            raise ValueError(f"samples must be at least 0, not {self.samples}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishConfig:
    """What a run does once its last step is done.

    Attributes:
        average_last: number of checkpoints whose mean is the result; 0 keeps the last weights.
        export: whether the result is written as a Hugging Face directory.
        samples: number of held-out passages to fill in greedily.
        sample_tokens: length of the passages, in tokens.
    """

    average_last: int = 5
    export: bool = True
    samples: int = 6
    sample_tokens: int = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole configuration, a section an attribute.

    `train.tokens_per_batch` has become `train.rows` in it: they are part of what makes a run.
    """

    model: ModelConfig
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    mesh: MeshConfig
    hosts: HostsConfig
    checkpoints: CheckpointConfig
    bad_steps: BadStepsConfig
    watchdog: WatchdogConfig
    wandb: WandbConfig
    evaluation: EvaluationConfig
    finish: FinishConfig

    def __post_init__(self) -> None:
        tokens = self.train.tokens_per_batch
        if tokens is None:
            return
        try:
            rows = rows_for(tokens, self.data.inputs_length + self.data.targets_length)
            train = dataclasses.replace(self.train, rows=rows, tokens_per_batch=None)
        except ValueError as error:
            raise UserError(f"train: {error}") from error
        object.__setattr__(self, "train", train)

    @property
    def rows(self) -> int:
        """Rows of a global batch."""
        assert self.train.rows is not None
        return self.train.rows

    def batch_parts(self, mesh: Mesh | AbstractMesh) -> BatchParts:
        """The global batch on a mesh.

        Raises:
            UserError: see `split_batch`.
        """
        return split_batch(
            mesh,
            self.rows,
            (self.data.inputs_length, self.data.targets_length),
            accumulation=self.train.accumulation,
            rows_per_device=self.train.rows_per_device,
        )

    def sections(self) -> dict[str, Any]:
        """Section name to its dataclass."""
        return {name: getattr(self, name) for name in SECTIONS}

    def to_json(self) -> dict[str, Any]:
        """As nested JSON values; `from_json` reads it back."""
        return config.to_json_dict(self.sections())

    def hash(self) -> str:
        """16 hex digits that any change of a setting changes."""
        return config.config_hash(self.sections())

    def to_gin(self) -> str:
        """As gin text, defaults included."""
        return config.operative_config(self.sections())


SECTIONS: dict[str, type] = {
    field.name: field.type for field in dataclasses.fields(Settings) if isinstance(field.type, type)
}

# A run may be resumed with other values of these: they change where and how often, not what.
MAY_CHANGE = frozenset(
    {
        "train.stop_at",
        "train.log_every",
        "train.accumulation",
        "train.rows_per_device",
        "train.accept_changes",
        "data.workers",
        *(f"model.{name}" for name in EXECUTION_FIELDS),
        *(
            f"{section}.{field.name}"
            for section in (
                "mesh",
                "hosts",
                "checkpoints",
                "bad_steps",
                "watchdog",
                "wandb",
                "evaluation",
                "finish",
            )
            for field in dataclasses.fields(SECTIONS[section])
        ),
    }
)


def read_settings(
    gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Settings:
    """Settings from gin files and command-line bindings.

    Raises:
        UserError: the first mistake, with its file and line.
    """
    return Settings(**config.parse(SECTIONS, gin_files, bindings, search_paths))


def from_json(saved: dict[str, Any]) -> Settings:
    """Settings from what `Settings.to_json` wrote."""
    return Settings(**config.from_json_dict(SECTIONS, saved))


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    """A model's hyperparameters as a checkpoint's metadata hold them."""
    return config.to_json_dict({"model": model})["model"]


def model_of(meta: Mapping[str, Any]) -> ModelConfig:
    """The model that a checkpoint's metadata name."""
    return config.from_json_dict({"model": ModelConfig}, {"model": meta["model"]})["model"]


def overridden(settings: Settings, bindings: Sequence[str]) -> Settings:
    """Settings with some of them bound anew."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / CONFIG_FILE
        path.write_text(settings.to_gin())
        return read_settings([str(path)], bindings)


def run_settings(run_dir: Path) -> Settings:
    """The operative settings of a run directory.

    Raises:
        UserError: it is none.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    return read_settings([str(path)])


def check_same_run(run_dir: Path, settings: Settings) -> list[str]:
    """Refuses to continue a run under settings that make it another one.

    Returns:
        The changes of its data, `setting: old -> new`, which `train.accept_changes` allowed.

    Raises:
        UserError: naming each setting that differs.
    """
    if not (run_dir / CONFIG_FILE).exists():
        return []
    changed = config.differences(
        run_settings(run_dir).to_json(), settings.to_json(), ignore=MAY_CHANGE
    )
    of_data = [c for c in changed if c.startswith(("data.", "corpus.", "train.rows:"))]
    if of_data == changed and settings.train.accept_changes:
        return changed
    if changed:
        accept = ", or accept it by train.accept_changes = True" if of_data == changed else ""
        raise UserError(
            f"{run_dir} belongs to another configuration: {'; '.join(changed)}. Use another "
            f"--run_dir, or the settings it was started with{accept}"
        )
    return []
