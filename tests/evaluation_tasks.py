"""seqio Tasks as a user's module registers them: importing it does.

`EVALUATION_TOKENIZER` names the tokenizer.
"""

import os
from pathlib import Path

import seqio
import tensorflow as tf

from t5g2.data.tokenizer import load_tokenizer
from t5g2.data.vocabularies import seqio_vocabulary

TEXTS = ["import os", "def f(x):", "return self", "class A:", "for i in range(10):"]
tokenizer = load_tokenizer(Path(os.environ["EVALUATION_TOKENIZER"]))
feature = seqio.Feature(seqio_vocabulary(tokenizer), add_eos=True)
bytes_feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)


def examples(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": [f"{text} <" for text in TEXTS], "targets": [text[::-1] for text in TEXTS]}
    )


def exact_match(targets, predictions):
    return {"exact_match": sum(t == p for t, p in zip(targets, predictions, strict=True))}


def text_of_predictions(targets, predictions):
    return {"said": seqio.metrics.Text("|".join(predictions)), "count": len(predictions)}


def mean_score(targets, scores):
    assert len(targets) == len(scores)
    return {"mean_score": sum(scores) / len(scores)}


def mean_sure(targets, predictions, aux_values):
    return {"mean_sure": sum(aux_values["scores"]) / len(predictions)}


def add(name, metric_fns, feature=feature):
    # The inputs end without eos, as those of the model's own training.
    inputs = seqio.Feature(feature.vocabulary, add_eos=False)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(examples, splits=("validation", "test")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": inputs, "targets": feature},
        metric_fns=metric_fns,
    )


add("reversed", [exact_match, text_of_predictions, mean_score, mean_sure])
add("scored", [mean_score])
add("unmeasured", [])
add("bytes", [exact_match], bytes_feature)
seqio.MixtureRegistry.add("both", ["reversed", "scored"], default_rate=1.0)
