"""Problems of long context, solved by reading them; the definitions are those of RULER and MRCR."""

import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from t5g2.data.tokenizer import HuggingFaceTokenizer
from t5g2.errors import UserError
from t5g2.longcontext.draws import Draws
from t5g2.longcontext.families import FAMILIES, make_example
from t5g2.longcontext.haystack import NOISE, Haystack, read_haystack, sentences
from t5g2.longcontext.material import Material, Question, read_questions
from t5g2.longcontext.needles import DEPTHS
from t5g2.longcontext.problems import SENTINEL
from t5g2.longcontext.tracking import VariableTracking
from t5g2.longcontext.words import SHORT

TOWNS = {"Avery": "Kent", "Brill": "Essex", "Corby": "Devon", "Delph": "Surrey", "Egham": "Wales"}
QUESTIONS = tuple(
    Question(f"Where does {town} lie?", (county,), f"{town} is a small town. It lies in {county}.")
    for town, county in TOWNS.items()
)
# Families whose filler is measured in characters: they hit any length to the token.
EXACT = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
)


@pytest.fixture(scope="module")
def material(standard_library) -> Material:
    text = "\n".join(standard_library(200_000))
    return Material(haystack=Haystack("library", text), questions=QUESTIONS)


@pytest.fixture
def made(tiny_tokenizer, material):
    """`made(family, length, index)`: an example."""

    def make(family: str, length: int, index: int = 0, **options):
        return make_example(family, index, length, tiny_tokenizer, material, **options)

    return make


def numbers_of(text: str) -> dict[str, list[str]]:
    """The values of each key, as the needles of a text say."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(
        r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", text
    ):
        found.setdefault(key, []).append(value)
    return found


def asked_keys(text: str) -> list[str]:
    """The keys that the question, which is the end of the text, names."""
    question = text.rpartition("\nWhat ")[2]
    named = re.search(r"special magic \w+ for ([^?]+) in the text above\?", question)
    assert named is not None
    return re.findall(r"[\w-]+-[\w-]+", named.group(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1500, 6000])
def test_examples_fill_their_length_and_one_more_unit_would_be_too_long(
    family, length, tiny_tokenizer, material
):
    example = make_example(family, 3, length, tiny_tokenizer, material)
    prompt, end, after = example.inputs.partition(SENTINEL)
    # bos, the text, the sentinel.
    assert example.tokens == 1 + len(tiny_tokenizer.encode(prompt)) + 1 <= length
    assert (end, after) == (SENTINEL, "")
    problem = FAMILIES[family].make((0, family, 3, length), material, length)
    assert problem.prompt(example.size) == prompt
    longer = next(
        text for n in itertools.count(example.size) if (text := problem.prompt(n)) != prompt
    )
    assert len(tiny_tokenizer.encode(longer)) + 2 > example.tokens
    assert family in EXACT or len(tiny_tokenizer.encode(longer)) + 2 > length
    # Characters add a token at most, but for rare ones that add two.
    assert family not in EXACT or example.tokens >= length - 1


def test_a_needle_in_text_hits_nearly_every_length_exactly(made):
    missed = [length - made("niah_single_2", length).tokens for length in range(1000, 1030)]
    assert sum(missed) <= 3


def test_infilling_goes_on_behind_the_sentinel(made, tiny_tokenizer):
    for family in FAMILIES:
        example = made(family, 2000, form="infill")
        prompt, _, after = example.inputs.partition(SENTINEL)
        assert after in (".\n", "\n")
        parts = [len(tiny_tokenizer.encode(part)) for part in (prompt, after)]
        assert example.tokens == 1 + sum(parts) + 1 <= 2000


def test_lengths_are_in_tokens_of_any_tokenizer(made, material, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<sentinel_0>", *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(pieces[:5])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    by_character = HuggingFaceTokenizer(path)
    example = make_example("niah_single_2", 0, 2000, by_character, material)
    # A token a character, but for the sentinel, and bos.
    assert len(example.inputs.removesuffix(SENTINEL)) + 2 == example.tokens == 2000


def test_128k_tokens_are_hit_as_well(made, material, tiny_tokenizer):
    assert made("niah_multikey_1", 131_072).tokens == 131_072
    example = made("cwe", 131_072)
    problem = FAMILIES["cwe"].make((0, "cwe", 0, 131_072), material, 131_072)
    one_more = len(tiny_tokenizer.encode(problem.prompt(example.size + 1))) + 2
    assert example.tokens <= 131_072 < one_more


@pytest.mark.parametrize(
    ("family", "keys", "values", "asked", "value"),
    [
        ("niah_single_1", 1, 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 1, 1, r"\d{7}"),
        ("niah_multivalue", 1, 4, 1, r"\d{7}"),
        ("niah_multiquery", 4, 1, 4, r"\d{7}"),
    ],
)
def test_needles_hold_the_answer_as_ruler_counts_them(made, family, keys, values, asked, value):
    for index in range(5):
        example = made(family, 2000, index)
        found = numbers_of(example.inputs)
        assert [len(own) for own in found.values()] == [values] * keys
        named = asked_keys(example.inputs)
        assert len(named) == asked
        assert sorted(example.references) == sorted(v for key in named for v in found[key])
        assert all(re.fullmatch(value, reference) for reference in example.references)
        assert all(reference in example.answer for reference in example.references)


@pytest.mark.parametrize(("family", "key"), [("niah_multikey_2", r"[a-z]+-[a-z]+"),
                                             ("niah_multikey_3", r"[0-9a-f-]{36}")])  # fmt: skip
def test_where_needles_are_the_haystack_all_lines_are_needles(made, family, key):
    example = made(family, 3000)
    _, *lines, _ = example.inputs.split("\n")
    found = numbers_of(example.inputs)
    assert len(lines) == sum(map(len, found.values())) > 20
    assert all(re.fullmatch(key, name) for name in found)
    (asked,) = asked_keys(example.inputs)
    assert tuple(found[asked]) == example.references


def test_noise_is_rulers_five_sentences_and_the_needle_stands_between_two_lines(made):
    places = set()
    for index in range(40):
        _, *lines, _ = made("niah_single_1", 1024, index).inputs.split("\n")
        (place,) = [i for i, line in enumerate(lines) if line.startswith("One of")]
        places.add(place)
        noise = [*lines[:place], *lines[place + 1 :]]
        assert set(noise[:-1]) == {NOISE.strip()}
        assert NOISE.startswith(noise[-1])
    # Anywhere: 40 draws from about 20 places.
    assert min(places) <= 2
    assert max(places) >= len(noise) - 3
    assert len(places) > 10


def test_needles_in_text_stand_at_rulers_depths(made, material):
    """Of n sentences, int(n * depth / 100) stand before a needle; there are 40 depths."""
    assert len(set(DEPTHS)) == 40
    assert (DEPTHS[0], DEPTHS[1], DEPTHS[20], DEPTHS[-1]) == (0, 3, 51, 100)
    seen = set()
    for index in range(60):
        example = made("niah_single_2", 1500, index)
        context = example.inputs.split("\n", 1)[1].rsplit("\nWhat is", 1)[0]
        before, needle, after = re.split(r"(One of the special magic .*? is: \d+\.)", context)
        count = len(sentences(f"{before}{after.lstrip()}"))
        place = len(sentences(before.rstrip()))
        fitting = [depth for depth in DEPTHS if int(count * depth / 100) == place]
        assert fitting, (count, place)
        seen.update(fitting[:1])
        assert needle
    assert len(seen) > 15


def test_keys_are_an_adjective_and_a_noun_and_differ_between_examples(made):
    keys = [asked_keys(made("niah_single_1", 600, index).inputs)[0] for index in range(30)]
    assert len(set(keys)) > 25
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", key) for key in keys)


def solved_variables(text: str, value: str) -> list[str]:
    """The variables that hold a value, by carrying out the assignments in order."""
    held: dict[str, str] = {}
    for name, what in re.findall(r"VAR ([A-Z]+) = (VAR [A-Z]+|\d+)", text):
        held[name] = what if what.isdigit() else held[what.removeprefix("VAR ")]
    return [name for name, own in held.items() if own == value]


def test_variables_are_found_by_carrying_out_the_assignments(made):
    for index in range(5):
        example = made("vt", 2000, index)
        demonstration, problem = example.inputs.split("\n\n")
        value = re.findall(r"assigned the value (\d{5})", problem)[0]
        assert solved_variables(problem, value) == list(example.references)
        # One chain of four hops; a name has five letters.
        assert len(example.references) == 5
        assert all(re.fullmatch("[A-Z]{5}", name) for name in example.references)
        shown = re.findall(r"assigned the value (\d{5})", demonstration)[0]
        assert demonstration.endswith(" ".join(solved_variables(demonstration, shown)))
        assert solved_variables(demonstration + problem, value) == list(example.references)


def test_several_chains_are_told_apart_by_their_values(material):
    problem = VariableTracking(chains=3, hops=2)(("a", 1), material, 0)
    asked = problem.prompt(5000).split("\n\n")[1]
    value = re.findall(r"assigned the value (\d{5})", asked)[0]
    assert solved_variables(asked, value) == list(problem.references)
    assert len(re.findall("VAR [A-Z]+ =", asked)) == 9
    assert len(problem.references) == 3


@pytest.mark.parametrize(
    ("length", "often", "seldom", "shown"), [(SHORT - 1, 6, 1, (3, 1)), (6000, 30, 3, (10, 3))]
)
def test_common_words_are_repeated_as_ruler_has_them(made, length, often, seldom, shown):
    example = made("cwe", length)
    demonstration, problem = example.inputs.split("\n\n")
    listed = re.findall(r"(\d+)\. ([a-z-]+)", problem)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert sorted(example.references) == sorted(w for w, c in counts.items() if c == often)
    assert len(example.references) == 10
    assert set(counts.values()) == {often, seldom}
    first, answer = demonstration.split("list above are:")
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", first))
    assert set(re.findall(r"\d+\. ([a-z-]+)", answer)) == {
        word for word, count in counts.items() if count == shown[0]
    }
    assert set(counts.values()) == set(shown)


def test_frequent_words_follow_the_zeta_distribution(made):
    example = made("fwe", 4096)
    words = example.inputs.split("\n")[1].split()
    ranked = Counter(words).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == example.references
    assert all(re.fullmatch("[a-z]{6}", word) for word in example.references)
    # The k-th is there floor(n k^-2 / zeta(2)) times; of n words in all, dots are 6 / pi^2.
    n = ranked[0][1] * math.pi**2 / 6
    for rank, (_, count) in enumerate(ranked[:8], 1):
        assert abs(count - n * 6 / math.pi**2 / rank**2) < 1.5
    assert ranked[3][1] > ranked[4][1]
    assert len(ranked) <= 4096 // 50


def test_the_shortest_text_of_frequent_words_has_one_answer(material):
    for index in range(20):
        problem = FAMILIES["fwe"].make((index,), material, 1000)
        for size in range(problem.least, problem.least + 60):
            counts = Counter(problem.prompt(size).split("\n")[1].split()).most_common()
            assert tuple(word for word, _ in counts[1:4]) == problem.references
            assert len(counts) == 4 or counts[3][1] > counts[4][1]


def test_questions_have_their_paragraph_among_others(made):
    numbers = set()
    for index in range(12):
        example = made("qa", 1500, index)
        town = re.findall(r"Question: Where does (\w+) lie\?\nAnswer:", example.inputs)[0]
        assert example.references == (TOWNS[town],)
        assert example.answer == f" {TOWNS[town]}"
        documents = re.findall(r"Document (\d+):\n(.*)", example.inputs)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        (place,) = [i for i, (_, text) in enumerate(documents) if text.startswith(town)]
        numbers.add(place)
        others = Counter(text for i, (_, text) in enumerate(documents) if i != place)
        # All others are there, none twice more often than another.
        assert len(others) == 4
        assert max(others.values()) - min(others.values()) <= 1
    assert len(numbers) > 4


@pytest.mark.parametrize("needles", [2, 4, 8])
def test_multi_round_reference_is_found_by_counting_rounds(made, needles):
    for index in range(4):
        example = made(f"mrcr_{needles}", 2500, index)
        rounds = re.findall(
            r"User: Write a (\w+) about (\w+)\.\nAssistant: (.*?)\n\n(?=User:)",
            example.inputs,
            re.DOTALL,
        )
        mark, ordinal, kind, topic = re.findall(
            r"User: Put (\w{10}) before the (\w+) (\w+) about (\w+), and", example.inputs
        )[-1]
        replies = [reply for *asked, reply in rounds if asked == [kind, topic]]
        assert len(replies) == len(set(replies)) == needles
        ordinals = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
        assert example.references == (mark + replies[ordinals.index(ordinal)], mark)
        assert len(rounds) > needles
        assert example.inputs.endswith("\nAssistant:" + SENTINEL)


def test_other_seeds_and_indices_are_other_examples(made):
    for family in FAMILIES:
        texts = {
            made(family, 1500, index, seed=seed).inputs for index, seed in ((0, 0), (1, 0), (0, 1))
        }
        assert len(texts) == 3, family


_PRINT = """
import hashlib, sys
from pathlib import Path
from t5g2.data.tokenizer import load_tokenizer
from t5g2.longcontext.families import FAMILIES, make_example
from t5g2.longcontext.haystack import read_haystack
from t5g2.longcontext.material import Material, read_questions
material = Material(
    haystack=read_haystack(Path(sys.argv[2])), questions=read_questions(Path(sys.argv[3]))
)
tokenizer = load_tokenizer(sys.argv[1])
for family in FAMILIES:
    text = repr(make_example(family, 5, 1500, tokenizer, material, seed=7))
    print(family, hashlib.sha256(text.encode()).hexdigest())
"""


def test_examples_are_the_same_in_every_process(tiny_tokenizer, standard_library, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number, document in enumerate(standard_library(50_000)):
        (text / f"{number}.txt").write_text(document)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            f'{{"question": "{q.question}", "answers": ["{q.answers[0]}"], '
            f'"paragraph": "{q.paragraph}"}}\n'
            for q in QUESTIONS
        )
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _PRINT, tiny_tokenizer.path, text, questions],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == len(FAMILIES)


def test_draws_are_those_of_the_key():
    """Numbers that a later Python must give as well."""
    draws = Draws("key", 1)
    assert [draws.below(1000) for _ in range(4)] == [364, 597, 805, 271]
    assert sorted(Draws("a").shuffled(range(50))) == list(range(50))
    counts = Counter(tuple(Draws("s", i).sample("abc", 2)) for i in range(3000))
    # Six ordered pairs, 500 of each on average; five standard deviations are about 100.
    assert len(counts) == 6
    assert all(400 < count < 600 for count in counts.values())


def test_what_is_missing_or_too_short_is_told(made, tiny_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"niah_single_2: needs text .* --haystack"):
        make_example("niah_single_2", 0, 1000, tiny_tokenizer, Material())
    with pytest.raises(UserError, match=r"qa: needs questions .* --questions"):
        make_example("qa", 0, 1000, tiny_tokenizer, Material())
    with pytest.raises(UserError, match=r"cwe: needs at least \d+ tokens, more than .* 100"):
        made("cwe", 100)
    with pytest.raises(UserError, match=r"haystack .*nothing"):
        read_haystack(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no .txt or .md file"):
        read_haystack(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="no text"):
        read_haystack(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"question": "a?", "answers": ["b"]}', "line 2: field 'paragraph'"),
        ('{"question": "a?", "answers": [], "paragraph": "c"}', "line 2: field 'answers'"),
        ("", "fewer than two paragraphs"),
    ],
)
def test_questions_that_cannot_be_used_are_named(line, problem, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a?", "answers": ["b"], "paragraph": "c"}\n' + line)
    with pytest.raises(UserError, match=problem):
        read_questions(path)


def test_sentences_joined_are_the_text(material):
    text = material.text().text(1000, 30_000)
    assert " ".join(sentences(text)) == text
    assert max(map(len, sentences(text))) <= 400 or " " not in max(sentences(text), key=len)


def test_a_haystack_repeats_itself_without_end():
    hay = Haystack("short", "one  two\nthree.")
    assert hay.text(0, 31) == "one two three. one two three. o"
    assert hay.text(5, 3) == "two"
    assert Path(hay.name).name == "short"
