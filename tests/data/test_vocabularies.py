import pickle
import subprocess
import sys

import numpy as np
import pytest

from t5g2.data.tokenizer import load_tokenizer, train_sentencepiece
from t5g2.data.vocabularies import seqio_vocabulary
from t5g2.errors import UserError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer):
    return seqio_vocabulary(tiny_tokenizer)


def test_it_is_a_seqio_vocabulary_without_extra_ids(vocabulary):
    assert isinstance(vocabulary, seqio.Vocabulary)
    ids = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id)
    assert ids == (0, 1, 2, 3)
    assert (vocabulary.vocab_size, vocabulary.extra_ids) == (1000, 0)


def test_encoding_in_python_and_tensorflow_is_the_tokenizers(
    vocabulary, tiny_tokenizer, standard_library
):
    for text in [*standard_library(100_000), "", "é▁\t\0"]:
        expected = tiny_tokenizer.encode(text)
        assert vocabulary.encode(text) == expected.tolist()
        ids = vocabulary.encode_tf(tf.constant(text))
        assert ids.dtype == tf.int32
        np.testing.assert_array_equal(ids, expected)


def test_decoding_stops_at_eos_and_shows_sentinels(vocabulary, tiny_tokenizer):
    words = tiny_tokenizer.encode("x = 1")
    sentinel = tiny_tokenizer.sentinel_ids[2]
    ids = [2, *words, sentinel, 1, *words, 0]
    assert vocabulary.decode(ids) == "x = 1<sentinel_2>"
    assert vocabulary.decode_tf(tf.constant(ids)).numpy() == b"x = 1<sentinel_2>"
    rows = np.zeros((2, 12), np.int32)
    rows[0, : len(words)] = words
    assert vocabulary.decode_tf(tf.constant(rows)).numpy().tolist() == [b"x = 1", b""]
    assert vocabulary.decode([*words, 4000]) == "x = 1<unk>"


def test_a_seqio_task_encodes_text_with_it(vocabulary, tiny_tokenizer, tmp_path):
    lines = ["def f(x):", "    return x  # é"]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    task = seqio.Task(
        "t5g2_vocabulary_test",
        source=seqio.TextLineDataSource({"train": str(tmp_path / "lines.txt")}),
        preprocessors=[
            lambda dataset: dataset.map(lambda line: {"targets": line}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary)},
    )
    examples = list(task.get_dataset(None, shuffle=False).as_numpy_iterator())
    assert [e["targets_pretokenized"].decode() for e in examples] == lines
    for example, line in zip(examples, lines, strict=True):
        assert example["targets"].tolist() == [*tiny_tokenizer.encode(line), 1]


def test_equality_is_that_of_the_file_and_survives_pickling(
    vocabulary, tiny_tokenizer, standard_library, tmp_path
):
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary
    assert seqio_vocabulary(load_tokenizer(tiny_tokenizer.path)) == vocabulary
    assert hash(seqio_vocabulary(tiny_tokenizer)) == hash(vocabulary)
    other = train_sentencepiece(
        standard_library(50_000), tmp_path / "o.model", vocab_size=500, sentinels=4, max_bytes=10**6
    )
    assert seqio_vocabulary(other) != vocabulary
    assert vocabulary != seqio.ByteVocabulary()
    fewer = load_tokenizer(tiny_tokenizer.path, (4, 10))
    assert seqio_vocabulary(fewer) != vocabulary


def test_a_pad_other_than_zero_is_refused(tmp_path, standard_library):
    import sentencepiece

    path = tmp_path / "pad.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(standard_library(50_000)),
        model_writer=path.open("wb"),
        model_type="bpe",
        vocab_size=400,
        add_dummy_prefix=False,
        pad_id=3,
        control_symbols=["<sentinel_0>"],
        minloglevel=2,
    )
    with pytest.raises(UserError, match="pad to be id 0"):
        seqio_vocabulary(load_tokenizer(path))


def test_importing_the_module_leaves_tensorflow_alone():
    code = (
        "import sys, t5g2.data.vocabularies, t5g2.interop.tokenizer\n"
        "print({'tensorflow', 'seqio', 'transformers', 'jax'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
