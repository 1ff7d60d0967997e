"""TFDS and seqio as sources: the one module here that imports TensorFlow, when it is used."""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from t5g2.data.sentencepiece_model import messages
from t5g2.data.sources.records import BadRecord, decoded, one_line
from t5g2.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

# Of a data set's own splits this one is read: what is held out is chosen as in all other sources.
_SPLIT = "train"


class TfdsRecords:
    """The examples of a TFDS data set whose files can be read in any order (ArrayRecord)."""

    def __init__(self, name: str, builder: Any, field: str) -> None:
        self.name = name
        self.field = field
        self._builder = builder
        self._examples = builder.as_data_source(split=_SPLIT)

    def __len__(self) -> int:
        return len(self._examples)

    def text(self, number: int) -> str:
        """The text of an example; raises `BadRecord` if it has none."""
        place = f"{self.name}, example {number}"
        try:
            value = self._examples[number][self.field]
        except RuntimeError as error:
            raise BadRecord(f"{place}: damaged: {one_line(error)}") from None
        return _text(value, place, self.field)

    def fingerprint(self) -> str:
        """Name, version and size."""
        return _builder_fingerprint(self._builder)


class TfdsStream:
    """The examples of a TFDS data set in its own order."""

    def __init__(self, name: str, builder: Any, field: str) -> None:
        self.name = name
        self.field = field
        self._builder = builder

    def records(self) -> Iterator[Callable[[], str]]:
        """For each example a function that gives its text; see `RecordStream`."""
        tfds = _tfds()
        dataset = self._builder.as_dataset(
            split=_SPLIT,
            shuffle_files=False,
            decoders=tfds.decode.PartialDecoding({self.field: True}),
            read_config=tfds.ReadConfig(try_autocache=False),
        )
        return _records(dataset, self.name, self.field)

    def fingerprint(self) -> str:
        """Name, version and size."""
        return _builder_fingerprint(self._builder)


class SeqioStream:
    """The raw examples of a seqio Task or DataSource, before any preprocessor."""

    def __init__(self, name: str, source: Any, field: str, where: str) -> None:
        """Checks that there is such a feature.

        Raises:
            UserError: no such feature, or no split "train".
        """
        self.name = name
        self.field = field
        self._source = source
        self._where = where
        if _SPLIT not in source.splits:
            raise UserError(
                f"{where}: {name} has no split {_SPLIT!r}; it has {sorted(source.splits)}"
            )
        features = self._dataset().element_spec
        if not isinstance(features, Mapping) or field not in features:
            there = sorted(features) if isinstance(features, Mapping) else features
            raise UserError(f"{where}: {name} has no feature {field!r}; it has {there}")

    def __reduce__(self) -> tuple[Callable[..., "SeqioStream"], tuple[str, str, str]]:
        # Processes import the module again: functions that a source holds need not be pickled.
        return open_seqio, (self.name, self.field, self._where)

    def _dataset(self) -> "tf.data.Dataset":
        return self._source.get_dataset(_SPLIT, shuffle=False)

    def records(self) -> Iterator[Callable[[], str]]:
        """For each example a function that gives its text; see `RecordStream`."""
        return _records(self._dataset(), self.name, self.field)

    def fingerprint(self) -> str:
        """Name and, where the source knows it, the number of examples."""
        return f"{self.name}:{self._source.num_input_examples(_SPLIT)}"


def open_tfds(name: str, base: Path, field: str, where: str) -> TfdsRecords | TfdsStream:
    """Opens a prepared data set; nothing is downloaded.

    Args:
        name: a name that TFDS knows, such as "wiki40b/en", or the directory of a version of one.
        base: what a directory is relative to.
        field: the feature that is the text.
        where: what said so, for messages.

    Raises:
        UserError: TFDS is not installed, there is no such data set, or it lacks the feature.
    """
    tfds = _tfds(where)
    directory = base / Path(name).expanduser()
    try:
        if directory.is_dir():
            builder = tfds.builder_from_directory(directory)
        else:
            builder = tfds.builder(name)
    except Exception as error:  # TFDS raises errors of many kinds, some its own
        raise UserError(f"{where}: TFDS has no data set {name}: {one_line(error)}") from None
    if _SPLIT not in (builder.info.splits or {}):
        raise UserError(
            f"{where}: {name} has no split {_SPLIT!r} in {builder.data_dir}: prepare it with TFDS "
            "(tfds build), or set TFDS_DATA_DIR to where it is"
        )
    features = builder.info.features
    if features is None or field not in features:
        raise UserError(
            f"{where}: {name} has no feature {field!r}; it has {sorted(features or ())}"
        )
    formats = {file_format.value for file_format in [builder.info.file_format] if file_format}
    if formats == {"array_record"}:
        return TfdsRecords(name, builder, field)
    return TfdsStream(name, builder, field)


def open_seqio(name: str, field: str, where: str) -> SeqioStream:
    """Opens what a Python module registers or holds.

    Args:
        name: "module:name", where the name is of a seqio Task that importing the module registers,
            or of a seqio DataSource in it.
        field: the feature of the raw examples that is the text.
        where: what said so, for messages.

    Raises:
        UserError: seqio is not installed, or there is no such module, Task or feature.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{where}: name a seqio source as 'module:name', not {name!r}")
    seqio = imported("seqio", where)
    hide_accelerators()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {one_line(error)}; set PYTHONPATH") from None
    found = getattr(module, attribute, None)
    if not isinstance(found, seqio.DataSource):
        if attribute not in seqio.TaskRegistry.names():
            raise UserError(
                f"{where}: importing {module_name} registers no seqio Task {attribute!r}, and it "
                "holds no DataSource of that name"
            )
        found = seqio.TaskRegistry.get(attribute).source
    return SeqioStream(name, found, field, where)


def _records(dataset: "tf.data.Dataset", name: str, field: str) -> Iterator[Callable[[], str]]:
    import tensorflow as tf

    examples = dataset.map(lambda example: example[field]).as_numpy_iterator()
    number = 0
    while True:
        place = f"{name}, example {number}"
        try:
            value = next(examples)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            yield partial(_raise, BadRecord(f"{place}: damaged: {one_line(error.message)}"))
            return
        yield partial(_text, value, place, field)
        number += 1


def _raise(error: Exception) -> str:
    raise error


def _text(value: Any, place: str, field: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise BadRecord(f"{place}: feature {field!r} is not a string but {type(value).__name__}")
    return decoded(value, place)


def _builder_fingerprint(builder: Any) -> str:
    split = builder.info.splits[_SPLIT]
    return f"{builder.info.full_name}:{split.num_examples}:{split.num_bytes}"


def _tfds(where: str = "tfds") -> ModuleType:
    tfds = imported("tensorflow_datasets", where)
    hide_accelerators()
    return tfds


def imported(module: str, where: str) -> ModuleType:
    """A package that not everybody has; raises `UserError` where it is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    messages()  # before seqio: beside Apache Beam's protobuf its own import would fail
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.replace("_", "-")
        raise UserError(f"{where}: this needs {package}: pip install {package}") from None


def hide_accelerators() -> None:
    """Keeps TensorFlow from taking the memory of the devices that train."""
    import tensorflow as tf

    # It refuses once it has used them, for somebody else in this process then.
    with contextlib.suppress(RuntimeError):
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
