import pytest

from envs.run.errors import DivergenceError, RankLost, UsageError, check


def test_check():
    check(True, "never said")
    with pytest.raises(UsageError, match=r"^--seed is -1 \(at least 0\)$"):
        check(False, "--seed is -1 (at least 0)")


def test_bad_input_is_a_value_error_and_the_others_are_not():
    assert issubclass(UsageError, ValueError)
    assert issubclass(DivergenceError, RuntimeError)
    assert not issubclass(RankLost, (ValueError, RuntimeError))


def test_a_message_is_one_line_whatever_it_quotes():
    assert str(UsageError("a\nb\x1b[0m\ud800: Black–Scholes σ")) == "a\\nb\\x1b[0m\\ud800: Black–Scholes σ"
    long = str(UsageError(f"--seed is {'9' * 5000} (at most 999999)"))
    assert len(long) < 700
    assert long.startswith("--seed is 999")
    assert long.endswith("999 (at most 999999)")
    assert "\n" not in str(DivergenceError("runs/a\nb"))
