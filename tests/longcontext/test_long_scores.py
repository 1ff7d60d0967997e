"""Scores of answers, worked by hand from the definitions of RULER and MRCR."""

import pytest

from t5g2.longcontext.scores import match_all, match_part, ratio_after_mark


@pytest.mark.parametrize(
    ("answer", "references", "every", "some"),
    [
        (" 1234567", ["1234567"], 1.0, 1.0),
        ("It is 1234567, I think", ["1234567"], 1.0, 1.0),
        ("123456", ["1234567"], 0.0, 0.0),
        ("", ["1234567"], 0.0, 0.0),
        ("1111111, 2222222", ["1111111", "2222222", "3333333", "4444444"], 0.5, 1.0),
        ("kent", ["Kent"], 1.0, 1.0),
        ("in the county of KENT", ["Devon", "Kent"], 0.5, 1.0),
        # A reference counts once, and inside of a word as well, as RULER has it.
        ("aaa aaa", ["a", "b"], 0.5, 1.0),
    ],
)
def test_string_matches_as_ruler_has_them(answer, references, every, some):
    assert match_all(answer, references) == every
    assert match_part(answer, references) == some


@pytest.mark.parametrize(
    ("answer", "ratio"),
    [
        ("m4rkabcd", 1.0),
        (" m4rkabcd\n", 1.0),
        # Without the mark, or with it elsewhere, nothing.
        ("abcd", 0.0),
        ("x m4rkabcd", 0.0),
        # 2 M / T: "bcd" is the match of "bcde" with "abcd", 2 * 3 / (4 + 4).
        ("m4rkbcde", 0.75),
        # "ab" and "cd", 2 * 4 / (4 + 6).
        ("m4rkabxxcd", 0.8),
        ("m4rk", 0.0),
        ("m4rkwxyz", 0.0),
    ],
)
def test_multi_round_ratio_is_twice_the_matches_by_both_lengths(answer, ratio):
    assert ratio_after_mark(answer, ("m4rkabcd", "m4rk")) == pytest.approx(ratio)
