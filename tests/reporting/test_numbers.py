import pytest

from t5g2.reporting.numbers import clock, compact, duration, scientific, tick


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (compact, 0, "0"),
        (compact, 999, "999"),
        (compact, 999_600, "1.00M"),
        (compact, 1_234_567, "1.23M"),
        (compact, 23_456.7, "23.5k"),
        (compact, 0.12345, "0.123"),
        (compact, float("nan"), "nan"),
        (scientific, 0.001, "1.0e-3"),
        (scientific, 0, "0"),
        (scientific, float("inf"), "inf"),
        (tick, 0.000105, "1.05e-4"),
        (tick, 2000, "2,000"),
        (tick, 125_000, "125k"),
        (tick, 1_002_000, "1.002M"),
        (tick, 0.30000000000000004, "0.3"),
        (duration, 4.26, "4.3 s"),
        (duration, 59.96, "1 min 0 s"),
        (duration, 372, "6 min 12 s"),
        (duration, 90_061, "25 h 1 min"),
        (clock, 4.26, "0:04"),
        (clock, 59.7, "1:00"),
        (clock, 90_061, "25:01:01"),
    ],
)
def test_numbers_read_as_people_write_them(function, value, text):
    assert function(value) == text
