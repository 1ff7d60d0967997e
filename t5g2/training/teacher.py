"""Knowledge distillation: a frozen model whose distribution the trained one is to match.

The UL2 + KD recipe of arXiv:2512.14856 (ablations): the teacher's distribution on real tokens, the
token itself where the target is a sentinel. The teacher reads what the student reads.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

from t5g2.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen teacher.

    Attributes:
        params: its parameters, structured as by `parameter_tree`.
        config: its hyperparameters; V is the student's.
        sentinel_ids: targets that are learnt as they are.
    """

    params: Any
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    sentinel_ids: range = dataclasses.field(metadata={"static": True})

    def teaches(self, targets: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """Which targets the teacher's distribution replaces: all but sentinels."""
        return (targets < self.sentinel_ids.start) | (targets >= self.sentinel_ids.stop)
