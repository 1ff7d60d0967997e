"""Model FLOPs a second and MFU of a run, while it runs."""

import re
from typing import Any, NamedTuple

from jax.sharding import Mesh

from t5g2.data.packing import RowStream
from t5g2.models.config import ModelConfig
from t5g2.planning.flops import Load, model_flops
from t5g2.planning.topologies import CHIPS, Chip

# What jax calls the chips that we have figures of. Boards of the same name with another power or
# connector (H100 PCIe, say) have other peaks and are left out.
_KINDS = {
    r"TPU v5( lite|e|litepod)": "TPU v5e",
    r"TPU v5p?": "TPU v5p",
    r"TPU v6( lite|e)": "TPU v6e",
    r"NVIDIA A100-SXM4-\d+GB": "NVIDIA A100 80GB",
    r"NVIDIA H100( 80GB HBM3)?": "NVIDIA H100 SXM",
    r"NVIDIA H200": "NVIDIA H200 SXM",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None: we have no figures of it."""
    for pattern, name in _KINDS.items():
        if re.fullmatch(pattern, device_kind):
            return CHIPS[name]
    return None


class FlopRate(NamedTuple):
    """What a step needs and what the devices can do.

    Attributes:
        step: model FLOPs of a step on the whole batch.
        peak: bfloat16 FLOPs a second of all devices together; None: not known, as of a CPU.
    """

    step: int
    peak: float | None

    @classmethod
    def of_run(cls, config: ModelConfig, rows: RowStream, mesh: Mesh) -> "FlopRate":
        """Steps on such rows on a mesh of devices of one kind; a teacher does not count."""
        images = rows.images
        load = Load(
            rows=rows.rows,
            inputs=rows.room[0],
            targets=rows.room[1],
            images=0 if images is None else images.per_row,
            image_features=images is not None and images.slot.name == "image_features",
        )
        chip = chip_of(mesh.devices.flat[0].device_kind)
        peak = None if chip is None else chip.flops * mesh.devices.size
        return cls(model_flops(config, load).total, peak)

    def facts(self) -> dict[str, Any]:
        """For the record of a start."""
        return {"model_flops": self.step, "peak_flops": self.peak}

    def of(self, seconds: float) -> dict[str, float]:
        """For the record of a step that took so many seconds; MFU where the peak is known."""
        rate = self.step / seconds
        found = {"model_flops_per_second": rate}
        return found if self.peak is None else found | {"mfu": rate / self.peak}
