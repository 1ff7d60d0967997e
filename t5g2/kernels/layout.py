"""Where arrays lie: logical axes, and what maps them to a mesh while a step is traced.

Models and kernels name the axes of what they compute. A step that runs on several devices installs
a `Layout`; without one, names mean nothing.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# The axes of tokens.
ROWS, LENGTH = "rows", "length"
# The axes of an embedding table.
TABLE_AXES = ("vocab", "embed")
Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the mesh axes that each logical axis is split over.

    Attributes:
        mesh: the devices, or their shape alone.
        rules: logical axis to mesh axes, the major one first; what is not named is not split.
    """

    mesh: Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]]

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of more than one device that a logical axis is split over."""
        found = () if name is None else self.rules.get(name, ())
        return tuple(axis for axis in found if self.mesh.shape[axis] > 1)

    def size(self, *names: str) -> int:
        """Into how many parts these logical axes are split together."""
        size = 1
        for name in names:
            for axis in self.axes(name):
                size *= self.mesh.shape[axis]
        return size

    def parameter_spec(self, names: Names) -> PartitionSpec:
        """How a parameter lies."""
        return PartitionSpec(*map(_entry, map(self.axes, names)))

    def spec(self, *names: str | None) -> PartitionSpec:
        """How an activation lies: a mesh axis splits the first axis that it may split.

        A weight may be stored in more parts (over those that split the rows, say) than the
        activations made of it.
        """
        used: set[str] = set()
        entries = []
        for name in names:
            axes = tuple(axis for axis in self.axes(name) if axis not in used)
            used.update(axes)
            entries.append(_entry(axes))
        return PartitionSpec(*entries)

    def sharding(self, *names: str | None) -> NamedSharding:
        """`spec`, on the mesh."""
        return NamedSharding(self.mesh, self.spec(*names))

    def tokens(self) -> tuple[str, ...]:
        """The mesh axes that tokens are split over."""
        return self.axes(ROWS) + self.axes(LENGTH)


def _entry(axes: tuple[str, ...]) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes


Watch = Callable[[str, Any, Names], None]
_installed: contextvars.ContextVar[tuple[Layout, Watch | None] | None] = contextvars.ContextVar(
    "layout", default=None
)


@contextlib.contextmanager
def installed(layout: Layout, watch: Watch | None = None) -> Iterator[None]:
    """Has what is traced within lie as `layout` says.

    Args:
        layout: the mesh and its rules.
        watch: is told of every activation that `place` is given: its name, it, and its axes.
    """
    token = _installed.set((layout, watch))
    known = isinstance(layout.mesh, Mesh)
    try:
        # Kernels ask for the platform of the devices, if there are devices.
        named = jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh) if known else None
        with named or contextlib.nullcontext():
            yield
    finally:
        _installed.reset(token)


def current() -> Layout | None:
    """The installed layout if it has more than one device."""
    found = _installed.get()
    return None if found is None or found[0].mesh.size == 1 else found[0]


def place(what: str, x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by the names of its axes.

    Args:
        what: a name for it.
        x: an activation.
        names: a logical axis for each of its axes; None: never split.
    """
    found = _installed.get()
    if found is None:
        return x
    layout, watch = found
    if watch is not None:
        watch(what, x, names)
        return x
    if layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(*names))


def on_shards(
    function: Callable[..., Any], layout: Layout, inputs: Any, outputs: Any, *, fused: bool = False
) -> Any:
    """`function` applied on each device to its parts of the arguments.

    Args:
        function: of arrays, or trees of them.
        layout: whose mesh.
        inputs: PartitionSpecs of its arguments.
        outputs: PartitionSpecs of its results.
        fused: whether it has a Pallas kernel: what that varies over is nothing that jax can know.
    """
    return jax.shard_map(
        function, mesh=layout.mesh, in_specs=inputs, out_specs=outputs, check_vma=not fused
    )
