"""seqio Tasks and Mixtures, with their own metric functions, on a model.

seqio's Evaluator reads the data and computes the metrics; generations and log-likelihoods are ours.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from t5g2.config import did_you_mean
from t5g2.data.sources.records import one_line
from t5g2.data.sources.with_tensorflow import hide_accelerators, imported
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError
from t5g2.pretrained import Pretrained, Prompt
from t5g2.scoring import Scorer

# Two tokenizers that agree on all of this are taken for the same.
_PROBES = (
    'The quick brown fox, 1984: "don\'t" = 3.14 (e-mail) <tag>',
    "  def f(x):\n\treturn x[::-1]\n\n",
    "Größe, naïve, señor, Việt, İstanbul",
    "Русский язык · ελληνικά · العربية · हिन्दी · 日本語 · 한국어 🙂",
)


class TaskEvaluator:
    """A seqio Task or Mixture, read once, to evaluate any number of checkpoints on.

    Attributes:
        name: of the Task or Mixture.
        examples: number of examples of each of its Tasks.
    """

    def __init__(
        self,
        named: str,
        model: Pretrained,
        lengths: Mapping[str, int],
        *,
        split: str,
        examples: int | None,
        bos_on_inputs: bool,
    ) -> None:
        """Reads the data.

        Args:
            named: "module:name", where importing the module registers the Task or Mixture.
            model: of the kind that is to be evaluated.
            lengths: tokens that "inputs" and "targets" may have at most; as many are generated as
                targets may have.
            split: of the data.
            examples: the first so many of each Task; None: all.
            bos_on_inputs: whether the encoder's input starts with bos, which is then added where
                the Task has not.

        Raises:
            UserError: there is no such module, Task, split or example, or the Task has no metric
                functions, other features or another tokenizer than the model, or too long examples.
        """
        seqio = imported("seqio", "--task")
        hide_accelerators()
        self.name = named.partition(":")[2]
        self._lengths = dict(lengths)
        self._bos = [model.config.bos_id] if bos_on_inputs else []
        provider = _registered(named)
        tasks = seqio.get_subtasks(provider)
        for task in tasks:
            _check_task(task, split, model)
        # Where no preprocessor asks for lengths nothing is cut, and what is too long is found.
        adapts = any(
            "sequence_length" in inspect.signature(preprocessor).parameters
            for task in tasks
            for preprocessor in task.preprocessors
        )
        self._evaluator = seqio.Evaluator(
            self.name,
            seqio.EncDecFeatureConverter(pack=False),
            eval_split=split,
            sequence_length=self._lengths if adapts else None,
            num_examples=examples,
            async_compute_metrics=False,
        )
        counts = {
            name: int(data.cardinality())
            for name, data in self._evaluator.cached_task_datasets.items()
        }
        for name, count in counts.items():
            if not count:
                raise UserError(f"seqio Task {name} has no examples in its split {split!r}")
        self.examples = counts
        shapes = self._evaluator.model_feature_shapes
        for side, feature in (("inputs", "encoder_input"), ("targets", "decoder_target")):
            longest = shapes[f"{feature}_tokens"][0]
            if longest > lengths[side]:
                raise UserError(
                    f"{self.name} has {side} of {longest} tokens, more than the checkpoint's "
                    f"{lengths[side]}: shorten them in the Task, or evaluate beyond its length "
                    f"with --{side}_length {longest}"
                )

    def __call__(self, scorer: Scorer) -> dict[str, dict[str, float | str]]:
        """The metrics of each Task, by name.

        Raises:
            UserError: a metric function failed, or wants what a model cannot give.
        """
        import seqio

        outputs = seqio.metrics.ModelOutputType
        functions = {
            outputs.PREDICTION: lambda data: self._predict(scorer, data),
            outputs.PREDICTION_WITH_AUX: lambda data: self._predict_with_scores(scorer, data),
            outputs.SCORE: lambda data: self._score(scorer, data),
        }
        try:
            future, _ = self._evaluator.evaluate(compute_metrics=True, model_fns=functions)
        except ValueError as error:
            raise UserError(one_line(error)) from error
        return {
            task: {name: _plain(value) for name, value in metrics.items()}
            for task, metrics in future.result().items()
        }

    def _predict(self, scorer: Scorer, data: Any) -> list[tuple[int, list[int]]]:
        numbers, _, made = self._generated(scorer, data)
        return self._ended(scorer, numbers, made)

    def _predict_with_scores(
        self, scorer: Scorer, data: Any
    ) -> tuple[list[tuple[int, list[int]]], dict[str, list[float]]]:
        """Predictions, and as "scores" their log-likelihoods, eos included where it was reached."""
        numbers, prompts, made = self._generated(scorer, data)
        eos = scorer.model.tokenizer.eos_id
        whole = [
            np.append(ids, eos) if len(ids) < self._lengths["targets"] else ids for ids in made
        ]
        scores = scorer.score(list(zip(prompts, whole, strict=True)))
        return self._ended(scorer, numbers, made), {
            "scores": [score.log_likelihood for score in scores]
        }

    def _score(self, scorer: Scorer, data: Any) -> list[tuple[int, float]]:
        numbers, prompts, targets = self._read(data)
        scores = scorer.score(list(zip(prompts, targets, strict=True)))
        return [
            (number, score.log_likelihood) for number, score in zip(numbers, scores, strict=True)
        ]

    def _generated(
        self, scorer: Scorer, data: Any
    ) -> tuple[list[int], list[Prompt], list[Int[np.ndarray, " n"]]]:
        numbers, prompts, _ = self._read(data)
        return numbers, prompts, scorer.generate(prompts, self._lengths["targets"])

    def _ended(
        self,
        scorer: Scorer,
        numbers: Sequence[int],
        made: Sequence[Int[np.ndarray, " n"]],
    ) -> list[tuple[int, list[int]]]:
        """Generations as the Evaluator stacks them: with eos, at which it stops, and of one length.

        Args:
            scorer: made them.
            numbers: of the examples.
            made: what was generated.
        """
        tokenizer, length = scorer.model.tokenizer, self._lengths["targets"] + 1
        return [
            (
                number,
                [*ids.tolist(), tokenizer.eos_id, *[tokenizer.pad_id] * (length - len(ids) - 1)],
            )
            for number, ids in zip(numbers, made, strict=True)
        ]

    def _read(self, data: Any) -> tuple[list[int], list[Prompt], list[Int[np.ndarray, " n"]]]:
        """Numbers, prompts and targets of the examples of an enumerated `tf.data.Dataset`."""
        numbers, prompts, targets = [], [], []
        for number, example in data.as_numpy_iterator():
            ids = np.trim_zeros(example["encoder_input_tokens"], "b")
            begun = self._bos and len(ids) and ids[0] == self._bos[0]
            if not begun:
                ids = np.concatenate([np.array(self._bos, np.int32), ids])
            numbers.append(int(number))
            prompts.append(Prompt(ids.astype(np.int32)))
            targets.append(np.trim_zeros(example["decoder_target_tokens"], "b"))
        return numbers, prompts, targets


def _registered(named: str) -> Any:
    """The Task or Mixture that a module registers."""
    import seqio

    module, _, name = named.partition(":")
    if not module or not name:
        raise UserError(f"--task: name a Task as 'module:name', not {named!r}")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"--task {named}: {one_line(error)}; set PYTHONPATH") from None
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise UserError(
            f"--task: importing {module} registers no seqio Task or Mixture {name!r}"
            f"{did_you_mean(name, known)}"
        )
    return seqio.get_mixture_or_task(name)


def _check_task(task: Any, split: str, model: Pretrained) -> None:
    """Refuses a Task that the model cannot be evaluated on."""
    where = f"seqio Task {task.name}"
    if not task.metric_objs:
        raise UserError(f"{where} has no metric functions: register it with metric_fns=[...]")
    if split not in task.splits:
        raise UserError(
            f"{where} has no split {split!r}{did_you_mean(split, task.splits)}; it has "
            f"{', '.join(sorted(task.splits))}: choose by --split"
        )
    features = task.output_features
    if missing := {"inputs", "targets"} - set(features):
        raise UserError(f"{where} has no feature {' and '.join(sorted(missing))}")
    if "images" in features and model.config.vision is None:
        raise UserError(f"{where} has images, but this checkpoint reads text alone")
    if others := set(features) - {"inputs", "targets"}:
        raise UserError(
            f"{where} has features {', '.join(sorted(others))}, which are not read here: a Task "
            "has inputs and targets; images are evaluated by held-out loss, from a mixture file"
        )
    for name, feature in features.items():
        _check_vocabulary(f"{where}, {name}", feature.vocabulary, model.tokenizer)


def _check_vocabulary(where: str, vocabulary: Any, tokenizer: Tokenizer) -> None:
    """Refuses a Task that was tokenised with another tokenizer than the checkpoint's."""
    differs = vocabulary.eos_id != tokenizer.eos_id or any(
        list(vocabulary.encode(text)) != tokenizer.encode(text).tolist() for text in _PROBES
    )
    if differs:
        raise UserError(
            f"{where}: its tokenizer is another than the checkpoint's, {tokenizer.path}: give the "
            "feature seqio_vocabulary(load_tokenizer(...)) of it (t5g2.data)"
        )


def _plain(value: Any) -> float | str:
    """A metric's value as JSON holds it."""
    import seqio

    if isinstance(value, seqio.metrics.Scalar):
        value = value.value
    if isinstance(value, int | float | np.number):
        return float(value)
    if isinstance(value, seqio.metrics.Text):
        text = value.textdata
        return text.decode() if isinstance(text, bytes) else text
    return f"({type(value).__name__}: not recorded)"
