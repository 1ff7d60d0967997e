import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GemmaTokenizer, T5Gemma2Config

from t5g2.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from t5g2.errors import UserError
from t5g2.interop.tokenizer import export_tokenizer

unicode_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \t\n\r▁\u2047\u2585\ufffd\x00\u00a0\u200d0a.,():_\"'="),
    )
)


@pytest.fixture(scope="module")
def exported(tiny_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    export_tokenizer(tiny_tokenizer, directory)
    return AutoTokenizer.from_pretrained(directory)


def assert_same(ours, theirs, text):
    ids = ours.encode(text).tolist()
    assert theirs(text).input_ids == [ours.bos_id, *ids]
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == ours.decode(ids) == text


@settings(max_examples=300)
@given(text=unicode_text)
def test_autotokenizer_equals_ours_on_any_unicode(tiny_tokenizer, exported, text):
    assert_same(tiny_tokenizer, exported, text)


def test_autotokenizer_equals_ours_on_whole_modules(tiny_tokenizer, exported, standard_library):
    for text in standard_library(1_500_000, skip=20):
        assert_same(tiny_tokenizer, exported, text)


@settings(max_examples=300)
@given(data=st.data())
def test_autotokenizer_equals_ours_on_text_made_of_pieces(tiny_tokenizer, exported, data):
    pieces = [
        tiny_tokenizer.id_to_piece(i).replace("▁", " ")
        for i in range(tiny_tokenizer.sentinel_ids.stop + 256, tiny_tokenizer.vocab_size)
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=40)))
    assert_same(tiny_tokenizer, exported, text)


@pytest.mark.parametrize("alphabet", ["ab", " a", "abc"])
def test_periodic_text_is_merged_in_sentencepieces_order(tmp_path, alphabet):
    # Overlapping pairs that make the same piece are where the two libraries could differ.
    words = st.text(alphabet, min_size=1, max_size=60)
    seeds = [f"{i:b}{i * 7919:b}".translate(str.maketrans("01", alphabet[:2])) for i in range(3000)]
    documents = [seed + alphabet + seed[::-1] for seed in seeds]
    ours = train_sentencepiece(
        documents, tmp_path / "p.model", vocab_size=300, sentinels=4, max_bytes=10**6
    )
    export_tokenizer(ours, tmp_path / "hf")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))

    @settings(max_examples=500)
    @given(text=words)
    def check(text):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids

    check()


def test_special_pieces_and_sentinels_are_known_by_name_and_role(tiny_tokenizer, exported):
    ours = tiny_tokenizer
    assert len(exported) == ours.vocab_size
    assert exported.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    roles = (exported.pad_token_id, exported.eos_token_id, exported.bos_token_id)
    assert (*roles, exported.unk_token_id) == (0, 1, 2, 3)
    ids = [ours.bos_id, 500, ours.sentinel_ids[5], 501, ours.eos_id, ours.pad_id]
    assert exported.decode(ids) == ours.decode(ids)
    assert exported.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)
    # Spelled out in a text they are special, as in Gemma's own tokenizer, unless asked otherwise.
    spelled = "x <sentinel_5><eos>"
    assert exported(spelled).input_ids[-2:] == [ours.sentinel_ids[5], ours.eos_id]
    plain = exported(spelled, split_special_tokens=True, add_special_tokens=False).input_ids
    assert plain == ours.encode(spelled).tolist()


def test_padding_goes_to_the_right(exported):
    batch = exported(["a b c d e", "a"], padding=True)
    assert batch.attention_mask[1][0] == 1
    assert batch.input_ids[1][-1] == exported.pad_token_id


def test_a_model_config_beside_it_changes_nothing(tiny_tokenizer, exported, tmp_path):
    export_tokenizer(tiny_tokenizer, tmp_path)
    T5Gemma2Config().save_pretrained(tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return x▁\t# é 12\n"
    assert_same(tiny_tokenizer, beside, text)
    beside.save_pretrained(tmp_path / "again")
    assert_same(tiny_tokenizer, AutoTokenizer.from_pretrained(tmp_path / "again"), text)


def test_our_own_loader_reads_the_export_alike(tiny_tokenizer, tmp_path, standard_library):
    export_tokenizer(tiny_tokenizer, tmp_path)
    for back in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.model")):
        assert back.sentinel_ids == tiny_tokenizer.sentinel_ids
        for text in [*standard_library(200_000, skip=80), "<eos><sentinel_0>▁"]:
            assert back.encode(text).tolist() == tiny_tokenizer.encode(text).tolist()
    assert load_tokenizer(tmp_path / "tokenizer.model").fingerprint == tiny_tokenizer.fingerprint


def test_user_defined_pieces_are_found_first_as_in_sentencepiece(tmp_path, standard_library):
    path = tmp_path / "user.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(standard_library(100_000)),
        model_writer=path.open("wb"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        control_symbols=["<image>", "<sentinel_0>", "<sentinel_1>"],
        user_defined_symbols=["\n", "\n\n", "\t", "▁▁", "▁▁▁", "<td>", "self", "selfish", "é"],
        minloglevel=2,
    )  # fmt: skip
    ours = SentencePieceTokenizer(path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    export_tokenizer(ours, tmp_path / "hf", image_tokens={"image_token": "<image>"})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = ["a\n\n\nb", "     x", "selfis selfish <td></td>", "\t\té", "oneself\n   self"]
    for text in [*texts, *standard_library(200_000, skip=30)]:
        assert ours.encode(text).tolist() == reference.encode(text)
        assert_same(ours, theirs, text)


def test_image_tokens_are_attributes_and_must_be_pieces(tiny_tokenizer, tmp_path):
    # A sentinel stands in for the image token: what matters is the way from name to id.
    export_tokenizer(tiny_tokenizer, tmp_path, {"image_token": "<sentinel_9>"})
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.image_token == "<sentinel_9>"
    assert loaded.image_token_id == tiny_tokenizer.sentinel_ids[9]
    with pytest.raises(UserError, match="boi_token='<start_of_image>' is no piece"):
        export_tokenizer(tiny_tokenizer, tmp_path, {"boi_token": "<start_of_image>"})


@pytest.fixture(scope="module")
def gemma_directory(tiny_tokenizer, tmp_path_factory):
    """What transformers' own GemmaTokenizer saves, with our pieces and merges in it."""
    directory = tmp_path_factory.mktemp("gemma")
    export_tokenizer(tiny_tokenizer, directory / "ours")
    model = json.loads((directory / "ours" / "tokenizer.json").read_text())["model"]
    vocab = {piece.replace(" ", "▁"): i for piece, i in model["vocab"].items()}
    merges = [(left.replace(" ", "▁"), right.replace(" ", "▁")) for left, right in model["merges"]]
    gemma = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    sentinels = [f"<sentinel_{k}>" for k in range(64)]
    gemma.add_tokens([tokenizers.AddedToken(s, normalized=False) for s in sentinels])
    gemma.save_pretrained(directory / "gemma")
    return directory / "gemma"


def test_a_gemma_directory_is_passed_on_as_it_is(gemma_directory, tmp_path, standard_library):
    ours = load_tokenizer(gemma_directory)
    export_tokenizer(ours, tmp_path, image_tokens={"image_token": "<mask>"})
    copied, source = (p / "tokenizer.json" for p in (tmp_path, gemma_directory))
    assert copied.read_bytes() == source.read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, GemmaTokenizer)
    assert theirs.image_token_id == ours.vocab_size - 1
    for text in standard_library(300_000, skip=50):
        assert_same(ours, theirs, text)


def test_a_lone_tokenizer_json_is_exported_with_a_config(
    gemma_directory, tmp_path, standard_library
):
    (tmp_path / "tokenizer.json").write_bytes((gemma_directory / "tokenizer.json").read_bytes())
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    export_tokenizer(ours, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in standard_library(300_000, skip=50):
        assert_same(ours, theirs, text)
    assert theirs.eos_token_id == ours.eos_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "no BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
        ({"user_defined_symbols": ["a b"]}, "piece 'a b' with a real space"),
    ],
)
def test_a_model_without_an_equal_is_refused(tmp_path, standard_library, options, message):
    path = tmp_path / "other.model"
    defaults = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(standard_library(50_000)),
        model_writer=path.open("wb"),
        vocab_size=400,
        add_dummy_prefix=False,
        pad_id=3,
        control_symbols=["<sentinel_0>"],
        minloglevel=2,
        **{**defaults, **options},
    )
    with pytest.raises(UserError, match=message):
        export_tokenizer(SentencePieceTokenizer(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
