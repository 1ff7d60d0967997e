import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reconstruction import SPECIAL, hidden_spans, reconstruct

from t5g2.data.mixture import Mixture, Source, check_lengths
from t5g2.data.ul2 import (
    T5GEMMA2_UL2,
    Denoiser,
    Philox,
    Sizes,
    SpecialTokens,
    denoisers_from,
    philox,
    with_mode_ids,
)
from t5g2.errors import UserError

FIRST_TOKEN = 2000

denoisers = st.builds(
    Denoiser,
    name=st.just("any"),
    corruption_rate=st.floats(0.01, 0.99),
    mean_span=st.one_of(st.none(), st.floats(1, 64)),
    mode_ids=st.sampled_from([(), (5,), (5, 6, 7)]),
)
released = st.sampled_from(T5GEMMA2_UL2)
specials = st.builds(SPECIAL._replace, bos_on_inputs=st.booleans())


def piece_of(length: int) -> np.ndarray:
    return np.arange(FIRST_TOKEN, FIRST_TOKEN + length, dtype=np.int32)


def runs_of(flags: list[bool]) -> list[tuple[bool, int]]:
    return [(hidden, len(list(run))) for hidden, run in itertools.groupby(flags)]


@given(st.one_of(released, denoisers), st.integers(1, 900), st.integers(0, 2**63), specials)
def test_an_example_holds_its_piece_with_exactly_the_announced_noise(
    denoiser, length, seed, special
):
    tokens = piece_of(length)
    inputs, targets = denoiser(tokens, philox(seed, 1, 2), special)
    assert inputs.dtype == targets.dtype == np.int32
    assert (len(inputs), len(targets)) == denoiser.lengths(length, special)
    head = [*[special.bos_id] * special.bos_on_inputs, *denoiser.mode_ids]
    assert inputs[: len(head)].tolist() == head
    body = inputs[len(head) :]
    piece, hidden = reconstruct(body, targets, special._replace(bos_on_inputs=False))
    assert piece == tokens.tolist()
    # Each span stays one: none is empty, and none touches the next, which would make them one.
    spans = [size for is_hidden, size in runs_of(hidden) if is_hidden]
    assert (sum(hidden), len(spans)) == denoiser.counts(length)
    assert [len(span) for span in hidden_spans(targets, special)] == spans


@given(st.one_of(released, denoisers), st.integers(2, 2000))
def test_share_and_spans_are_the_denoiser_s_to_within_rounding(denoiser, length):
    hidden, spans = denoiser.counts(length)
    kept = length - hidden
    assert hidden >= 1
    assert kept >= 1
    assert abs(hidden - length * denoiser.corruption_rate) <= 1
    if denoiser.mean_span is None:
        assert spans == 1
    else:
        wanted = hidden / denoiser.mean_span
        assert abs(spans - wanted) <= 0.5 or spans in (1, hidden, kept + 1)


@given(st.one_of(released, denoisers), specials)
def test_longer_pieces_never_need_less_room(denoiser, special):
    lengths = [denoiser.lengths(n, special) for n in range(1, 300)]
    for (inputs, targets), (more_inputs, more_targets) in itertools.pairwise(lengths):
        assert inputs <= more_inputs
        assert targets <= more_targets


@given(st.one_of(released, denoisers), st.integers(0, 90), st.integers(0, 90), specials)
def test_longest_is_the_longest_that_fits(denoiser, inputs, targets, special):
    fitting = [
        n for n in range(1, 300) if all(np.array(denoiser.lengths(n, special)) <= (inputs, targets))
    ]
    assert denoiser.longest(inputs, targets, special) == max(fitting, default=0)


@given(st.one_of(released, denoisers), st.integers(0, 90), st.integers(0, 90), specials)
def test_looked_up_sizes_are_those_that_are_computed(denoiser, inputs, targets, special):
    others = T5GEMMA2_UL2[:2]  # whose tables are of other lengths
    sizes = Sizes([*others, denoiser], (inputs, targets), special)
    rooms = [(inputs, targets), (inputs // 2, targets), (inputs, targets // 3), (0, 0)]
    number = np.full(len(rooms), len(others))
    longest = sizes.longest(number, np.array(rooms)).tolist()
    assert longest == [denoiser.longest(*room, special) for room in rooms]
    lengths = range(1, longest[0] + 1)
    found = sizes.lengths(np.full(len(lengths), len(others)), np.array(lengths, int))
    assert list(map(tuple, found.tolist())) == [denoiser.lengths(n, special) for n in lengths]


def test_16384_tokens_take_more_than_800_sentinels_each_once_in_order_from_the_block():
    special = SPECIAL._replace(sentinel_ids=range(256_002, 256_002 + 1300))
    for denoiser in T5GEMMA2_UL2[:2]:
        longest = denoiser.longest(16384, 16384, special)
        inputs, targets = denoiser(piece_of(longest), philox(1), special)
        spans = denoiser.counts(longest)[1]
        assert spans > 800
        for side in (inputs, targets):
            used = side[side >= special.sentinel_ids.start].tolist()
            assert used == list(special.sentinel_ids[:spans])


@pytest.mark.parametrize(
    ("name", "raw", "inputs", "targets", "spans"),
    [  # What the published T5 helper gives at 16,384 on both sides (it puts eos where we put bos).
        ("span3_15", 18204, 16384, 3642, 910),
        ("span12_50", 30246, 16384, 16384, 1260),
        ("span32_15", 19168, 16384, 2966, 90),
        ("span32_50", 31774, 16384, 16384, 496),
        ("prefix_75", 21843, 5463, 16384, 1),
    ],
)
def test_lengths_at_16384_are_the_published_ones(name, raw, inputs, targets, spans):
    (denoiser,) = (d for d in T5GEMMA2_UL2 if d.name == name)
    assert denoiser.longest(16384, 16384, SPECIAL) == raw
    assert denoiser.lengths(raw, SPECIAL) == (inputs, targets)
    assert denoiser.counts(raw)[1] == spans


def test_the_mixture_is_the_published_one():
    settings = [(d.mean_span, d.corruption_rate, d.weight) for d in T5GEMMA2_UL2]
    assert settings == [(3, 0.15, 1), (12, 0.5, 1), (32, 0.15, 1), (32, 0.5, 1), (None, 0.75, 4)]


def test_the_original_mixture_is_the_published_one():
    settings = [(d.mean_span, d.corruption_rate) for d in denoisers_from("ul2")]
    r, s = [(3, 0.15), (8, 0.15)], [(None, 0.25)]
    assert settings == [*r, *s, (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]
    assert {d.weight for d in denoisers_from("ul2")} == {1}
    assert {(d.mode, d.mode_ids) for d in denoisers_from("ul2")} == {(None, ())}
    modes = [d.mode for d in denoisers_from("ul2_with_modes")]
    assert modes == ["[R]", "[R]", "[S]", "[X]", "[X]", "[X]", "[X]"]
    assert denoisers_from("t5gemma2") == T5GEMMA2_UL2


def test_a_mode_is_the_first_text_that_the_encoder_reads(tiny_tokenizer):
    special = SpecialTokens(2, 1, tiny_tokenizer.sentinel_ids)
    tokens = tiny_tokenizer.encode("import itertools\nfrom collections import Counter\n" * 3)
    for denoiser in with_mode_ids(denoisers_from("ul2_with_modes"), tiny_tokenizer.encode):
        inputs, _ = denoiser(tokens, philox(0), special)
        assert inputs[0] == special.bos_id
        head = 1 + len(denoiser.mode_ids)
        assert tiny_tokenizer.decode(inputs[1:head]).strip() == denoiser.mode
    plain = with_mode_ids(T5GEMMA2_UL2, tiny_tokenizer.encode)
    assert plain == T5GEMMA2_UL2


def test_a_mode_without_tokens_is_refused():
    mode = Denoiser(name="r", corruption_rate=0.15, mean_span=3.0, mode="[R]")
    source = Source(name="text", documents=[piece_of(9)], denoisers=(mode,))
    with pytest.raises(UserError, match=r"denoiser r: the tokens of mode '\[R\]' are not known"):
        check_lengths(Mixture(sources=(source,), special=SPECIAL), 512, 512)
    with pytest.raises(UserError, match=r"denoiser r: mode '\[R\]' is no text"):
        with_mode_ids([mode], lambda _: np.zeros(0, np.int32))


@pytest.mark.parametrize("denoiser", T5GEMMA2_UL2[:4], ids=lambda d: d.name)
def test_either_end_of_a_piece_is_sometimes_hidden_and_sometimes_kept(denoiser):
    ends = Counter()
    for seed in range(600):
        example = denoiser(piece_of(100), philox(seed), SPECIAL)
        _, hidden = reconstruct(*example, SPECIAL)
        ends.update({"first": hidden[0], "last": hidden[-1]})
    for end in ("first", "last"):
        assert 0 < ends[end] < 600
    # Neither end is preferred: the difference of two equal binomials of 600.
    assert abs(ends["first"] - ends["last"]) < 4 * (2 * 600 * 0.25) ** 0.5


def test_prefix_language_modelling_hides_the_end_whole():
    inputs, targets = T5GEMMA2_UL2[-1](piece_of(8), philox(0), SPECIAL)
    assert inputs.tolist() == [2, 2000, 2001, 10]
    assert targets.tolist() == [10, 2002, 2003, 2004, 2005, 2006, 2007, 1]


@pytest.mark.parametrize("denoiser", T5GEMMA2_UL2, ids=lambda d: d.name)
def test_random_numbers_that_are_equal_change_no_count(denoiser):
    inputs, targets = denoiser(piece_of(200), lambda n: np.full(n, 7, np.uint64), SPECIAL)
    assert (len(inputs), len(targets)) == denoiser.lengths(200, SPECIAL)
    assert reconstruct(inputs, targets, SPECIAL)[0] == piece_of(200).tolist()


def test_every_mask_is_equally_likely():
    # 3 of 8 tokens in 2 spans: 2 ways to cut 3 into spans, (8 - 3 + 1 choose 2) = 15 ways to place
    # them, none touching. Nothing but the enumeration of all 2**8 masks says so here.
    denoiser = Denoiser(name="d", corruption_rate=3 / 8, mean_span=1.5)
    masks = [
        mask
        for mask in itertools.product([False, True], repeat=8)
        if sum(mask) == 3 and sum(hidden for hidden, _ in runs_of(list(mask))) == 2
    ]
    assert len(masks) == 30
    draws = 6000
    seen = Counter()
    for seed in range(draws):
        example = denoiser(piece_of(8), philox(7, seed, 3), SPECIAL)
        seen[tuple(reconstruct(*example, SPECIAL)[1])] += 1
    assert set(seen) == set(masks)
    expected = draws / 30
    chi_square = sum((seen[mask] - expected) ** 2 / expected for mask in masks)
    assert chi_square < 58.30  # 99.9% quantile, 29 degrees of freedom


def test_random_bits_depend_on_seed_and_every_counter_and_nothing_else():
    assert philox(1, 2, 3)(64).tolist() == philox(1, 2, 3)(64).tolist()
    streams = [philox(seed, row, j)(64) for seed in (0, 1) for row in (0, 1, 2) for j in (0, 1, 2)]
    values = np.concatenate(streams)
    assert len(np.unique(values)) == len(values)
    bits = np.unpackbits(np.stack(streams).view(np.uint8), axis=1).astype(float)
    # 4096 bits a stream: equal streams correlate at 1, independent ones at 0 ± 1/64.
    correlations = np.corrcoef(bits)[np.triu_indices(len(streams), 1)]
    assert np.abs(correlations).max() < 5 / 64


def test_one_generator_gives_what_generators_of_their_own_give():
    bits = Philox(9)
    for counter in ((1, 2), (1, 3), (0,), (1, 2), (5, 6, 7)):
        for count in (1, 5, 64):
            assert bits(*counter)(count).tolist() == philox(9, *counter)(count).tolist()


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 by its definition (Salmon et al., SC 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high, low = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        other_high, other_low = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [other_high ^ c[1] ^ k[0], other_low, high ^ c[3] ^ k[1], low]
        k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
    return c


def test_random_bits_are_philox_as_published():
    # Known answer from the authors' Random123 1.14 (kat_vectors), for zero counter and key.
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    expected = [philox4x64([block, 3, 5, 0], [2**63 + 9, 0]) for block in (1, 2)]
    assert philox(2**63 + 9, 3, 5)(8).tolist() == expected[0] + expected[1]


def test_too_many_spans_for_the_sentinels_is_refused_by_name():
    with pytest.raises(UserError, match=r"span3_15 needs 10 sentinels .* vocabulary has 5"):
        T5GEMMA2_UL2[0](piece_of(200), philox(0), SPECIAL._replace(sentinel_ids=range(10, 15)))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("t5", "no denoisers called 't5'; presets are t5gemma2, ul2, ul2_with_modes"),
        ([{"name": "a", "mode_ids": (1,)}], "has no setting 'mode_ids'; settings are"),
        ([{"name": "a", "corruption_rate": 0.5}], "lacks 'mean_span'"),
        (
            [{"name": "a", "corruption_rate": 0.5, "mean_span": 3.0, "rate": 1}],
            "has no setting 'rate'; settings are",
        ),
        ([{"name": "a", "corruption_rate": 1.5, "mean_span": 3.0}], "between 0 and 1, not 1.5"),
        ([{"name": "a", "corruption_rate": 0.5, "mean_span": 0.5}], "at least 1 token"),
        ([{"name": "a", "corruption_rate": 0.5, "mean_span": 3.0, "weight": -1}], "negative"),
        ([{"name": "a", "corruption_rate": 0.5, "mean_span": 3.0, "weight": 0}], "weight above 0"),
        ([{"name": "a", "corruption_rate": 0.5, "mean_span": None}] * 2, "names of their own"),
    ],
)
def test_settings_that_make_no_denoisers_are_refused(specs, message):
    with pytest.raises(UserError, match=message) as error:
        denoisers_from(specs)
    assert "\n" not in str(error.value)
