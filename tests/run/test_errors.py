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
