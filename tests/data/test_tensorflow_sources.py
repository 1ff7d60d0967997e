"""TFDS and seqio as sources. One file, so that TensorFlow is imported once."""

import pickle
import subprocess
import sys

import pytest
from source_files import TEXTS, all_texts, opened, write_jsonl

from t5g2.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")
tfds = pytest.importorskip("tensorflow_datasets")

MODULE = """
import seqio
import tensorflow as tf

TEXTS = {texts!r}

def examples(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({{"text": TEXTS, "id": list(range(len(TEXTS)))}})

source = seqio.FunctionDataSource(examples, splits=["train"])
seqio.TaskRegistry.add("a_task", source=source, preprocessors=[], output_features={{}})
elsewhere = seqio.FunctionDataSource(examples, splits=["test"])
unpicklable = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: examples(split, shuffle_files), splits=["train"]
)
"""


class Plain(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """200 texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tf.int64}),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, text in enumerate(TEXTS):
            yield number, {"text": text, "n": number}


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """A module of the user's own that registers a Task."""
    (tmp_path / "own_tasks.py").write_text(MODULE.format(texts=TEXTS))
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_tasks"
    sys.modules.pop("own_tasks", None)
    seqio.TaskRegistry.reset()


@pytest.fixture(scope="module", params=["array_record", "tfrecord"])
def dataset(request, tmp_path_factory):
    """A data set that TFDS has prepared, in each of its formats; its directory."""

    home = tmp_path_factory.mktemp(request.param)
    builder = Plain(data_dir=home, file_format=request.param)
    builder.download_and_prepare()
    return builder.data_path


def refusal(tmp_path, source: dict) -> str:
    with pytest.raises(UserError) as error:
        opened(tmp_path / "x", source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_tfds_data_set_is_read_at_random_where_its_files_allow_it(dataset, tmp_path):
    source = opened(tmp_path / "x", {"path": str(dataset), "format": "tfds"})
    found = sorted(text for documents in source.documents.values() for text in documents)
    assert found == sorted(TEXTS)
    train = source.documents["train"]
    assert source.sequential == ("tfrecord" in str(dataset))
    expected = list(train)
    assert train[17] == expected[17]
    assert pickle.loads(pickle.dumps(train))[17] == expected[17]
    assert list(train.iterate(100)) == expected[100:]
    assert ":200:" in source.records.fingerprint()


def test_what_tfds_does_not_have_is_named(dataset, tmp_path):
    message = refusal(tmp_path, {"path": str(dataset), "format": "tfds", "field": "body"})
    assert "source mine: path: " in message
    assert "has no feature 'body'; it has ['n', 'text']" in message
    assert "TFDS has no data set no_such_data_set" in refusal(
        tmp_path, {"path": "no_such_data_set", "format": "tfds"}
    )


@pytest.mark.parametrize("name", ["a_task", "source"])
def test_a_seqio_task_or_source_gives_its_raw_text(module, tmp_path, name):
    source = opened(tmp_path / "x", {"path": f"{module}:{name}", "format": "seqio"})
    assert source.sequential
    plain = opened(write_jsonl(tmp_path / "a.jsonl"))
    for split, documents in source.documents.items():
        assert list(documents) == list(plain.documents[split])
    assert source.documents["train"][5] == plain.documents["train"][5]
    assert all_texts(plain) == TEXTS


@pytest.mark.parametrize("name", ["a_task", "unpicklable"])
def test_a_seqio_source_passes_to_another_process(module, tmp_path, name):
    source = opened(tmp_path / "x", {"path": f"{module}:{name}", "format": "seqio"})
    there = pickle.loads(pickle.dumps(source.documents["train"]))
    assert list(there) == list(source.documents["train"])


def test_seqio_is_imported_beside_the_protobuf_that_beam_wants():
    code = """
from unittest import mock
from google.protobuf import runtime_version as runtime
validate = runtime.ValidateProtobufRuntimeVersion

def validate_as_6(*versions_and_file):
    # Not for protobuf's own files: those are of its own version, whichever that is.
    of_sentencepiece = "sentencepiece" in versions_and_file[-1]
    with mock.patch.object(runtime, "MAJOR", 6 if of_sentencepiece else runtime.MAJOR):
        validate(*versions_and_file)

runtime.ValidateProtobufRuntimeVersion = validate_as_6
try:
    from sentencepiece import sentencepiece_model_pb2
    raise SystemExit("nothing to overcome")
except runtime.VersionError:
    pass
from t5g2.data.sources.with_tensorflow import imported
imported("seqio", "here").Task
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"path": "own_tasks"}, "name a seqio source as 'module:name', not 'own_tasks'"),
        ({"path": "no_such_tasks:a"}, "No module named 'no_such_tasks'; set PYTHONPATH"),
        ({"path": "own_tasks:b"}, "importing own_tasks registers no seqio Task 'b'"),
        ({"path": "own_tasks:elsewhere"}, "has no split 'train'; it has ['test']"),
        ({"path": "own_tasks:source", "field": "t"}, "has no feature 't'; it has ['id', 'text']"),
    ],
)
def test_a_mistake_in_naming_a_seqio_source_is_told(module, tmp_path, source, problem):
    message = refusal(tmp_path, {**source, "format": "seqio"})
    assert "mixture.toml: source mine: path: " in message
    assert problem in message


def test_a_feature_that_is_no_text_is_a_bad_record(module, tmp_path):
    described = {"path": f"{module}:source", "format": "seqio", "field": "id"}
    source = opened(tmp_path / "x", described)
    with pytest.raises(UserError, match=r"own_tasks:source, example \d+: feature 'id' is not a"):
        source.documents["train"][0]


def test_sources_of_files_import_neither_seqio_nor_tensorflow(tmp_path):
    code = f"""
import sys
from t5g2.data.sources import CorpusConfig, open_sources
(source,) = open_sources(CorpusConfig(mixture={str(tmp_path / "mixture.toml")!r}))
assert source.documents["train"][0]
assert not {{"seqio", "tensorflow", "jax", "pyarrow", "torch"}} & set(sys.modules), "imported"
"""
    opened(write_jsonl(tmp_path / "a.jsonl"))
    subprocess.run([sys.executable, "-c", code], check=True)
