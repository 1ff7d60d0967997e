import json
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from t5g2.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from t5g2.errors import UserError

# Text as people have it: any Unicode scalar value, leaning to what tokenizers trip over.
unicode_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \t\n\r▁\u2047\u2585\ufffd\x00\u00a0\u200d0a<>"),
    )
)
SPELLED_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<sentinel_0>", "<0x41>", "<unused100>"]


@pytest.fixture(scope="module")
def gemma_like(tiny_tokenizer, tmp_path_factory):
    """A tokenizer.json with Gemma 3's ids: byte fallback and unused pieces up to id 262143."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "a", "b", "n", "d", "an", "and", "▁and", "▁▁", "\n"]
    pieces += [f"<filler{i}>" for i in range(len(pieces), 256_002)]
    unused = [f"<unused{100 + k}>" for k in range(262_144 - 256_002)]
    model = tokenizers.models.BPE(
        vocab={piece: i for i, piece in enumerate([*pieces, *unused])},
        merges=[("▁", "▁"), ("a", "n"), ("an", "d"), ("▁", "and")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    backend.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Fuse()])
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    backend.add_tokens([tokenizers.AddedToken(u, normalized=False) for u in unused])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    backend.enable_truncation(4)
    path = tmp_path_factory.mktemp("gemma") / "tokenizer.json"
    backend.save(str(path))
    return HuggingFaceTokenizer(path)


def test_trained_ids_are_gemmas_with_the_sentinels_as_one_block(tiny_tokenizer):
    t = tiny_tokenizer
    assert (t.pad_id, t.eos_id, t.bos_id, t.unk_id, t.vocab_size) == (0, 1, 2, 3, 1000)
    assert [t.id_to_piece(i) for i in range(4)] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert [t.id_to_piece(i) for i in t.sentinel_ids] == [f"<sentinel_{k}>" for k in range(64)]


@given(text=unicode_text)
def test_any_unicode_text_survives_encoding_and_decoding(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer.decode(ids, skip_special=True) == text
    assert not set(ids.tolist()) & {0, 1, 2, 3, *tiny_tokenizer.sentinel_ids}


@pytest.mark.parametrize(
    "text", ["", " ", "  a  ", "\tif x:\r\n\t\ty\n", "a\0b", "▁", "a▁ b▁▁", "𝔘é̀", *SPELLED_SPECIALS]
)
def test_whitespace_marks_and_spelled_out_specials_are_plain_text(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids, skip_special=True) == text
    assert not set(ids.tolist()) & {0, 1, 2, 3, *tiny_tokenizer.sentinel_ids}


def test_real_files_survive_and_a_batch_equals_its_texts(tiny_tokenizer, standard_library):
    texts = [*standard_library(600_000, skip=40), "", "▁ x"]
    batch = tiny_tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        np.testing.assert_array_equal(ids, tiny_tokenizer.encode(text))
        assert ids.dtype == np.int32
        assert tiny_tokenizer.decode(ids) == text


def test_ids_are_sentencepieces_own(tiny_tokenizer, standard_library):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer.path))
    for text in standard_library(100_000, skip=60):
        assert tiny_tokenizer.encode(text).tolist() == reference.encode(text)


def test_indentation_of_python_is_one_piece_a_line(tiny_tokenizer):
    for depth in (4, 8, 12, 16):
        pieces = [tiny_tokenizer.id_to_piece(i) for i in tiny_tokenizer.encode("\n" + " " * depth)]
        assert pieces == ["\n", "▁" * depth]


def test_newlines_are_learnt_inside_pieces(tiny_tokenizer):
    pieces = [tiny_tokenizer.id_to_piece(i) for i in range(tiny_tokenizer.vocab_size)]
    assert {":\n", "\n\n"} <= set(pieces)


def test_digits_stand_alone(tiny_tokenizer):
    assert len(tiny_tokenizer.encode("2026")) == 4


def test_special_ids_show_as_pieces_or_are_dropped(tiny_tokenizer):
    t = tiny_tokenizer
    words = [t.encode(w).tolist() for w in ("def ", " self", "é")]
    ids = [t.bos_id, *words[0], t.sentinel_ids[3], *words[1], t.eos_id, t.pad_id, *words[2]]
    assert t.decode(ids) == "<bos>def <sentinel_3> self<eos><pad>é"
    assert t.decode(np.array(ids), skip_special=True) == "def  selfé"


def test_ids_beyond_the_vocabulary_read_as_unknown_and_negative_ones_are_refused(tiny_tokenizer):
    assert tiny_tokenizer.decode([1000, 5000]) == "<unk><unk>"
    with pytest.raises(ValueError, match=">= 0"):
        tiny_tokenizer.decode([-1])
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        tiny_tokenizer.decode([[4, 5]])


def test_broken_utf8_reads_as_replacement_characters(tiny_tokenizer):
    first, second = tiny_tokenizer.encode("ʞ")
    assert tiny_tokenizer.decode([first]) == "\ufffd"
    assert tiny_tokenizer.decode([first, tiny_tokenizer.eos_id, second]) == "\ufffd<eos>\ufffd"


def test_a_lone_surrogate_is_named(tiny_tokenizer, gemma_like):
    for tokenizer in (tiny_tokenizer, gemma_like):
        with pytest.raises(UserError, match=r"U\+D800 at character 2"):
            tokenizer.encode("ab\ud800")
        with pytest.raises(UserError, match=r"U\+D800"):
            tokenizer.encode_batch(["ok", "\ud800"])


def test_a_pickled_tokenizer_encodes_alike(tiny_tokenizer, gemma_like):
    for tokenizer in (tiny_tokenizer, gemma_like):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.sentinel_ids == tokenizer.sentinel_ids
        assert copy.encode(" and").tolist() == tokenizer.encode(" and").tolist()


def test_a_file_that_changed_since_pickling_is_refused(tiny_tokenizer, tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(tiny_tokenizer.path.read_bytes())
    pickled = pickle.dumps(SentencePieceTokenizer(path))
    path.write_bytes(path.read_bytes() + b"\n\0")
    with pytest.raises(UserError, match="changed while it was in use"):
        pickle.loads(pickled)


def test_the_same_documents_make_the_same_file(tiny_tokenizer, tmp_path, standard_library):
    def train(seed, documents):
        return train_sentencepiece(
            documents,
            tmp_path / "again.model",
            vocab_size=600,
            sentinels=8,
            max_bytes=60_000,
            seed=seed,
        ).fingerprint

    documents = standard_library(200_000)
    assert train(0, documents) == train(0, iter(documents))
    assert train(0, documents) != train(1, documents)


def test_a_document_longer_than_the_sample_is_still_learnt_from(tmp_path, standard_library):
    document = "".join(standard_library(200_000))
    tokenizer = train_sentencepiece(
        [document], tmp_path / "one.model", vocab_size=500, sentinels=8, max_bytes=50_000
    )
    assert len(tokenizer.encode("return self")) < 5


def test_a_corpus_too_small_for_the_vocabulary_says_how_large_it_may_be(tmp_path, standard_library):
    documents = standard_library(1)
    out = tmp_path / "small.model"
    with pytest.raises(UserError, match=r"too small for vocab_size=90000: .* at most \d+") as error:
        train_sentencepiece(documents, out, vocab_size=90_000, sentinels=8, max_bytes=10**6)
    assert not list(tmp_path.iterdir())
    most = int(str(error.value).split()[-1])
    tokenizer = train_sentencepiece(documents, out, vocab_size=most, sentinels=8, max_bytes=10**6)
    assert tokenizer.vocab_size == most


def test_a_vocabulary_without_room_for_its_fixed_pieces_says_the_least(tmp_path, standard_library):
    documents = standard_library(1)
    with pytest.raises(UserError, match=r"vocab_size=100 has no room .* at least (\d+)") as error:
        train_sentencepiece(
            documents, tmp_path / "a.model", vocab_size=100, sentinels=8, max_bytes=10**6
        )
    least = int(str(error.value).split()[-1])
    train_sentencepiece(
        documents, tmp_path / "a.model", vocab_size=least, sentinels=8, max_bytes=10**6
    )


@pytest.mark.parametrize("documents", [[], [""], ["more than ten bytes"]])
def test_no_text_is_an_error(tmp_path, documents):
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(
            documents, tmp_path / "a.model", vocab_size=500, sentinels=8, max_bytes=10
        )


def test_an_output_that_is_no_model_file_is_refused(tmp_path, standard_library):
    with pytest.raises(UserError, match="name the tokenizer file"):
        train_sentencepiece(["x"], tmp_path / "a.txt", vocab_size=9, sentinels=1, max_bytes=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        train_sentencepiece(
            standard_library(1),
            tmp_path / "file" / "a.model",
            vocab_size=500,
            sentinels=1,
            max_bytes=10**6,
        )


def test_training_prints_nothing(tmp_path, capfd, standard_library):
    train_sentencepiece(
        standard_library(1), tmp_path / "a.model", vocab_size=500, sentinels=1,
        max_bytes=10**6,
    )  # fmt: skip
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_gemmas_unused_block_is_the_sentinels(gemma_like):
    assert gemma_like.sentinel_ids == range(256_002, 262_144)
    assert gemma_like.vocab_size == 262_144
    assert gemma_like.decode([256_002, 262_143]) == "<unused100><unused6241>"
    assert gemma_like.decode([256_002], skip_special=True) == ""


@pytest.mark.parametrize("text", SPELLED_SPECIALS)
def test_gemma_like_files_neither_add_nor_parse_specials(gemma_like, text):
    ids = gemma_like.encode(text).tolist()
    assert not set(ids) & {0, 1, 2, 3, *gemma_like.sentinel_ids}
    assert gemma_like.decode(ids) == text


def test_a_files_own_truncation_is_ignored(gemma_like):
    assert gemma_like.decode(gemma_like.encode("and " * 100)) == "and " * 100
    assert gemma_like.encode(" and and").tolist() == [gemma_like.encode(" and")[0]] * 2


@given(text=unicode_text)
def test_gemma_like_files_lose_nothing_but_the_space_mark(gemma_like, text):
    assert gemma_like.decode(gemma_like.encode(text)) == text.replace("▁", " ")


def test_a_model_without_named_sentinels_takes_explicit_ones(tmp_path, standard_library):
    path = tmp_path / "plain.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(standard_library(50_000)),
        model_writer=path.open("wb"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        user_defined_symbols=["<free0>", "<free1>"],
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="names no sentinels"):
        SentencePieceTokenizer(path)
    with pytest.raises(UserError, match="do not fit the 500 ids"):
        SentencePieceTokenizer(path, sentinels=(490, 20))
    with pytest.raises(UserError, match="ordinary piece"):
        SentencePieceTokenizer(path, sentinels=(4, 4))
    tokenizer = load_tokenizer(path, sentinels=(4, 2))
    assert tokenizer.sentinel_ids == range(4, 6)
    # The file would match these pieces in text; as sentinels they must not be.
    assert not set(tokenizer.encode("a <free0>").tolist()) & {4, 5}


def test_explicit_sentinels_of_a_tokenizer_json_must_be_reserved_pieces(gemma_like):
    assert load_tokenizer(gemma_like.path, (256_010, 5)).sentinel_ids == range(256_010, 256_015)
    with pytest.raises(UserError, match="ordinary piece 'a'"):
        load_tokenizer(gemma_like.path, (262, 1))


def test_load_finds_a_tokenizer_by_file_or_directory(tiny_tokenizer, gemma_like, tmp_path):
    assert load_tokenizer(tiny_tokenizer.path).fingerprint == tiny_tokenizer.fingerprint
    directory = load_tokenizer(str(tiny_tokenizer.path.parent))
    assert directory.path == tiny_tokenizer.path
    assert load_tokenizer(gemma_like.path.parent).fingerprint == gemma_like.fingerprint
    with pytest.raises(UserError, match=r"holds 0 \*.model files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.model", None, "cannot read tokenizer"),
        ("gone.json", None, "cannot read tokenizer"),
        ("gone", None, "no tokenizer at"),
        ("notes.txt", b"x", "neither"),
        ("empty.model", b"", "not a SentencePiece model"),
        ("text.model", b"hello there", "not a SentencePiece model"),
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"[]", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_damaged_model_is_refused(tiny_tokenizer, tmp_path):
    content = tiny_tokenizer.path.read_bytes()
    for damaged in (content[:5000], content + b"\n\0"):
        (tmp_path / "bad.model").write_bytes(damaged)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")


def test_a_tokenizer_json_without_gemmas_specials_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(path))
    assert json.loads(path.read_text())["model"]["vocab"] == {"a": 0}
    with pytest.raises(UserError, match="lacks one of <pad>"):
        load_tokenizer(path)


def test_a_model_that_adds_a_dummy_prefix_is_refused(tmp_path, standard_library):
    path = tmp_path / "prefix.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(standard_library(50_000)),
        model_writer=path.open("wb"),
        model_type="bpe",
        vocab_size=500,
        pad_id=3,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="dummy prefix"):
        load_tokenizer(path)
