"""The seqio path. One file, so that TensorFlow is imported once."""

import contextlib
import itertools
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from reconstruction import reconstruct
from source_files import write_jsonl, write_mixture

from t5g2.data import tasks
from t5g2.data.corpus import Corpus, TokenizerConfig, prepare_corpus
from t5g2.data.mixture import DataConfig
from t5g2.data.sources import CorpusConfig
from t5g2.data.ul2 import T5GEMMA2_UL2, philox
from t5g2.errors import UserError

seqio = pytest.importorskip("seqio")
LENGTHS = {"inputs": 256, "targets": 192}
CONFIG = DataConfig(inputs_length=512, targets_length=512)
NAMES = [f"demo_{d.name}" for d in T5GEMMA2_UL2]


def write_documents(root: Path) -> Path:
    """40 modules of the standard library, from an empty one to 10 kB."""
    root.mkdir()
    modules = sorted(Path(contextlib.__file__).parent.glob("*.py"))[:40]
    for number, module in enumerate(modules):
        text = module.read_text(encoding="utf-8")[: number * 250]
        (root / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_tokenizer) -> Corpus:
    home = tmp_path_factory.mktemp("tasks")
    config = CorpusConfig(path=str(write_documents(home / "texts")), heldout_share=0.2)
    given = TokenizerConfig(path=str(tiny_tokenizer.path))
    return prepare_corpus(config, given, home / "run", lambda _: contextlib.nullcontext())


@pytest.fixture
def registered(corpus) -> str:
    return tasks.register("demo", corpus, CONFIG)


@pytest.fixture(autouse=True)
def clean_registries():
    yield
    seqio.test_utils.clear_tasks()
    seqio.test_utils.clear_mixtures()


def examples(name: str, count: int | None = None, **options) -> list[dict[str, np.ndarray]]:
    options = {"sequence_length": LENGTHS, "split": "train", "seed": 0, "shuffle": False} | options
    dataset = seqio.get_mixture_or_task(name).get_dataset(**options)
    return list(itertools.islice(dataset.as_numpy_iterator(), count))


def special_of(corpus: Corpus):
    return corpus.mixture("train", CONFIG).special


def documents_of(corpus: Corpus, found: list[dict]) -> list[list[int]]:
    """The tokens of each piece, undone by hand."""
    return [reconstruct(e["inputs"], e["targets"], special_of(corpus))[0] for e in found]


# ---- What is registered


def test_a_task_for_each_denoiser_and_their_mixture_are_registered(registered):
    assert registered == "demo_ul2"
    assert sorted(seqio.TaskRegistry.names()) == sorted(NAMES)
    mixture = seqio.get_mixture_or_task("demo_ul2")
    rates = np.array([mixture.get_rate(seqio.get_mixture_or_task(name)) for name in NAMES])
    np.testing.assert_allclose(rates / rates[0], [1, 1, 1, 1, 4])
    assert set(mixture.splits) == {"train", "validation"}


def test_importing_the_module_registers_and_imports_nothing():
    code = (
        "import sys, t5g2.data.tasks\n"
        "assert not {'seqio', 'tensorflow', 'orbax', 'jax'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes_are_numbers_of_documents(registered, corpus):
    task = seqio.get_mixture_or_task("demo_prefix_75")
    assert task.num_input_examples("train") == len(corpus.sources[0].documents["train"])
    assert task.num_input_examples("validation") == len(corpus.sources[0].documents["heldout"])


def test_features_are_the_run_s_vocabulary_without_a_second_eos(registered, corpus):
    for feature in seqio.get_mixture_or_task("demo_ul2").output_features.values():
        assert feature.vocabulary.vocab_size == corpus.tokenizer.vocab_size
        assert feature.vocabulary.eos_id == corpus.tokenizer.eos_id
        assert not feature.add_eos


def test_registering_again_is_no_mistake_unless_the_definition_differs(registered, corpus):
    task = seqio.get_mixture_or_task("demo_span3_15")
    assert tasks.register("demo", corpus, CONFIG) == registered
    assert seqio.get_mixture_or_task("demo_span3_15") is task
    shorter = DataConfig(inputs_length=256, targets_length=512)
    with pytest.raises(UserError, match="another Mixture demo_ul2: register under another name"):
        tasks.register("demo", corpus, shorter)
    assert tasks.register("other", corpus, shorter) == "other_ul2"
    tasks.register("demo", corpus, CONFIG)
    assert len(seqio.TaskRegistry.names()) == 10


def test_a_name_that_is_someone_else_s_is_refused_before_anything_is_registered(corpus):
    given = seqio.Task("demo_span32_50", seqio.DataSource, {}, [])
    seqio.TaskRegistry.add_provider("demo_span32_50", given)
    with pytest.raises(UserError, match="another Task demo_span32_50"):
        tasks.register("demo", corpus, CONFIG)
    assert list(seqio.TaskRegistry.names()) == ["demo_span32_50"]


def test_names_that_seqio_does_not_allow_are_refused(corpus):
    with pytest.raises(UserError, match=r"seqio names may hold letters.*not 'my run'"):
        tasks.register("my run", corpus, CONFIG)


def test_every_source_of_a_mixture_has_tasks_of_its_own(tmp_path, tiny_tokenizer):
    texts = {"plain": [f"plain {i} " * 9 for i in range(40)], "x.packed-1": ["packed " * 90] * 40}
    write_jsonl(tmp_path / "a.jsonl", texts["plain"])
    write_jsonl(tmp_path / "b.jsonl.gz", texts["x.packed-1"])
    file = write_mixture(
        tmp_path / "mixture.toml",
        {"name": "plain", "path": "a.jsonl", "weight": 3, "denoisers": ["prefix_75"]},
        {"name": "x.packed-1", "path": "b.jsonl.gz", "weight": 1},
    )
    mixed = prepare_corpus(
        CorpusConfig(mixture=str(file), heldout_share=0.2),
        TokenizerConfig(path=str(tiny_tokenizer.path)),
        tmp_path / "run",
        lambda _: contextlib.nullcontext(),
    )
    mixture = seqio.get_mixture_or_task(tasks.register("mixed", mixed, CONFIG))
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates.pop("mixed_plain_prefix_75") == pytest.approx(0.75)
    assert set(rates) == {f"mixed_x.packed_1_{d.name}" for d in T5GEMMA2_UL2}
    assert sum(rates.values()) == pytest.approx(0.25)
    for name, source in (("plain_prefix_75", "plain"), ("x.packed_1_span3_15", "x.packed-1")):
        found = documents_of(mixed, examples(f"mixed_{name}", num_epochs=1))
        assert len(found) >= 30
        assert all(any(tiny_tokenizer.decode(f) in text for text in texts[source]) for f in found)


# ---- What the examples hold


@pytest.mark.parametrize(
    ("name", "split"), [*((name, "train") for name in NAMES), (NAMES[0], "validation")]
)
def test_every_document_comes_back_whole_from_the_examples_of_every_task(
    registered, corpus, name, split
):
    found = documents_of(corpus, examples(name, split=split, num_epochs=1))
    own = tasks.SPLITS[split]
    expected = [corpus.tokenizer.encode(text).tolist() for text in corpus.sources[0].documents[own]]
    pieces = iter(found)
    for document in filter(None, expected):
        joined: list[int] = []
        while len(joined) < len(document):
            joined += next(pieces)
        assert joined == document
    assert next(pieces, None) is None


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_as_long_as_fits_and_nothing_is_trimmed(registered, corpus, name):
    denoiser = next(d for d in T5GEMMA2_UL2 if name.endswith(d.name))
    found = examples(name)
    untrimmed = examples(name, trim_output_features=False)
    np.testing.assert_equal(found, untrimmed)
    longest = denoiser.longest(*LENGTHS.values(), special_of(corpus))
    lengths = {len(piece) for piece in documents_of(corpus, found)}
    assert max(lengths) == longest
    for example in found:
        assert all(len(example[side]) <= LENGTHS[side] for side in LENGTHS)
        assert all(example[side].dtype == np.int32 for side in LENGTHS)


@pytest.mark.parametrize("missing", [{}, {"inputs": None, "targets": 512}])
def test_lengths_that_are_not_given_are_the_configuration_s(registered, missing):
    expected = examples("demo_span12_50", sequence_length={"inputs": 512, "targets": 512})
    np.testing.assert_equal(examples("demo_span12_50", sequence_length=missing or None), expected)


def test_lengths_that_do_not_suit_are_refused(registered):
    with pytest.raises(UserError, match=r"too short for denoiser span32_15"):
        examples("demo_span32_15", sequence_length={"inputs": 64, "targets": 64})


def test_seqio_s_own_checks_find_the_examples_expected(registered, corpus):
    # The noise is drawn here from tf.data's random numbers by the rule that the module states.
    import tensorflow as tf

    name, denoiser, special = "demo_span3_15", T5GEMMA2_UL2[0], special_of(corpus)
    text = corpus.sources[0].documents["train"][-1][:600]
    seeds = zip(
        *(tf.data.Dataset.random(s).take(1).as_numpy_iterator() for s in (5, 6)), strict=True
    )
    tokens = corpus.tokenizer.encode(text)
    expected = [
        denoiser(tokens, philox(tasks.key("noise", name), *map(int, seed)), special)._asdict()
        for seed in seeds
    ]
    with seqio.test_utils.DataInjector(name, {"train": {"text": [text]}}):
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            LENGTHS, split="train", shuffle=False, seed=5
        )
        seqio.test_utils.assert_dataset(
            dataset, expected, expected_dtypes={"inputs": tf.int32, "targets": tf.int32}
        )


# ---- Randomness


def test_a_seed_decides_everything_and_seeds_differ(registered):
    one, again, other = (examples("demo_ul2", 40, seed=s) for s in (3, 3, 4))
    np.testing.assert_equal(one, again)
    differing = [
        x["targets"].tolist() != y["targets"].tolist() for x, y in zip(one, other, strict=True)
    ]
    assert sum(differing) > 35
    one, again = (examples("demo_prefix_75", seed=3, shuffle=True) for _ in range(2))
    np.testing.assert_equal(one, again)


def test_tasks_of_a_mixture_hide_different_tokens(corpus):
    same = {"corruption_rate": 0.3, "mean_span": 3.0}
    config = DataConfig(
        inputs_length=512,
        targets_length=512,
        denoisers=({"name": "a", **same}, {"name": "b", **same}),
    )
    tasks.register("twin", corpus, config)
    a, b = (examples(f"twin_{name}") for name in "ab")
    assert documents_of(corpus, a) == documents_of(corpus, b)
    long = [i for i, example in enumerate(a) if len(example["inputs"]) > 50]
    assert len(long) > 20
    assert all(a[i]["inputs"].tolist() != b[i]["inputs"].tolist() for i in long)


def test_another_epoch_draws_other_noise(registered, corpus):
    found = examples("demo_span3_15", num_epochs=2)
    half = len(found) // 2
    first, second = found[:half], found[half:]
    assert documents_of(corpus, first) == documents_of(corpus, second)
    assert (
        sum(
            a["inputs"].tolist() == b["inputs"].tolist() for a, b in zip(first, second, strict=True)
        )
        < half / 4
    )


def test_shuffling_changes_the_order_and_nothing_else(registered, corpus):
    plain = documents_of(corpus, examples("demo_prefix_75", seed=0))
    shuffled = documents_of(corpus, examples("demo_prefix_75", seed=0, shuffle=True))
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)


def test_shards_divide_the_documents(registered, corpus):
    whole = documents_of(corpus, examples("demo_prefix_75"))
    shards = [
        documents_of(corpus, examples("demo_prefix_75", shard_info=seqio.ShardInfo(i, 2)))
        for i in range(2)
    ]
    assert all(shards)
    assert sorted(itertools.chain(*shards)) == sorted(whole)


def test_the_mixture_honours_its_rates(registered, corpus):
    # The one task with a single sentinel that leaves the end hidden; the others by their counts.
    special = special_of(corpus)
    found = examples("demo_ul2", 1200)
    prefix = 0
    for example in found:
        hidden = reconstruct(example["inputs"], example["targets"], special)[1]
        changes = Counter(itertools.pairwise(hidden))
        whole = changes[False, True] <= 1 and not changes[True, False]
        prefix += whole and sum(hidden) == int(0.75 * len(hidden) + 0.5)
    # Four standard deviations of a binomial of 1200.
    assert abs(prefix / len(found) - 0.5) < 4 * (0.25 / len(found)) ** 0.5


# ---- In the hands of T5X users


@pytest.mark.parametrize("pack", [False, True])
def test_seqio_s_converter_makes_model_features_of_them(registered, corpus, pack):
    converter = seqio.EncDecFeatureConverter(pack=pack, bos_id=corpus.tokenizer.bos_id)
    dataset = seqio.get_dataset(
        "demo_ul2",
        LENGTHS,
        dataset_split="train",
        shuffle=False,
        num_epochs=1,
        feature_converter=converter,
        seed=0,
    )
    rows = list(itertools.islice(dataset.as_numpy_iterator(), 40))
    assert len(rows) == 40
    special, pieces = special_of(corpus), []
    for row in rows:
        assert row["encoder_input_tokens"].shape == (LENGTHS["inputs"],)
        assert row["decoder_target_tokens"].shape == (LENGTHS["targets"],)
        encoder = row["encoder_segment_ids"] if pack else row["encoder_input_tokens"] > 0
        decoder = row["decoder_segment_ids"] if pack else row["decoder_target_tokens"] > 0
        np.testing.assert_array_equal(row["decoder_loss_weights"], decoder > 0)
        for segment in range(1, int(encoder.max()) + 1):
            inputs = row["encoder_input_tokens"][encoder == segment]
            targets = row["decoder_target_tokens"][decoder == segment]
            shifted = row["decoder_input_tokens"][decoder == segment]
            assert shifted.tolist() == [special.bos_id, *targets[:-1]]
            pieces.append(reconstruct(inputs, targets, special)[0])
    texts = [corpus.tokenizer.decode(piece) for piece in pieces]
    documents = "\0".join(corpus.sources[0].documents["train"])
    assert all(text.strip("\ufffd") in documents for text in texts)
    assert (len(pieces) > 40) is pack


# ---- From a run directory


@pytest.fixture
def run(corpus, tmp_path) -> Path:
    """What `t5g2 train` leaves before its first step."""
    from t5g2.settings import read_settings

    run_dir = tmp_path / "my-run.1"
    shutil.copytree(corpus.tokenizer.path.parent.parent, run_dir)
    root = corpus.sources[0].records.root
    bindings = [f"corpus.path={root}", "corpus.heldout_share=0.2", "data.inputs_length=300"]
    bindings += ["corpus.split_bytes=None"]
    settings = read_settings(["configs/recipes/quickstart.gin"], bindings)
    (run_dir / "config.gin").write_text(settings.to_gin())
    return run_dir


def test_a_run_directory_is_registered_as_the_run_sees_it(run, corpus):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert tasks.register_run(run) == "my_run.1_ul2"
    assert tasks.register_run(str(run)) == "my_run.1_ul2"
    assert tasks.register_run(run, "mine") == "mine_ul2"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    found = documents_of(corpus, examples("mine_prefix_75", sequence_length=None))
    expected = [
        corpus.tokenizer.encode(text).tolist() for text in corpus.sources[0].documents["train"]
    ]
    assert list(itertools.chain(*found)) == list(itertools.chain(*expected))


def test_what_is_no_run_directory_or_has_changed_is_refused_in_one_line(run, corpus, tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as error:
            tasks.register_run(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a run directory" in refusal(tmp_path / "gone")
    (run / "corpus.json").rename(run / "kept")
    assert "has no corpus.json yet" in refusal(run)
    text = (run / "kept").read_text()
    (run / "corpus.json").write_text(text.replace(corpus.facts["fingerprint"]["source text"], "0"))
    assert "my-run.1: source text changed since this run began" in refusal(run)
    assert not seqio.TaskRegistry.names()
