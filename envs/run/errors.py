"""Errors that end a run with one line."""

LONGEST = 600  # characters of a message


def one_line(text: str) -> str:
    """`text` with line breaks and whatever else does not print as escapes, and without its middle if it is long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}"


class OneLineError(Exception):
    """An error whose message is one line, whatever is quoted in it."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class UsageError(OneLineError, ValueError):
    """Bad input. Its message names the flag or file, the value and what is allowed."""


class DivergenceError(OneLineError, RuntimeError):
    """A loss, reward or parameter that is NaN or infinite. Its message names it, the step and the last checkpoint."""


class RankLost(Exception):
    """Another process of this torchrun has died, or all are being stopped: training cannot go on."""


def check(condition: bool, message: str) -> None:
    """Raises `UsageError(message)` unless `condition`."""
    if not condition:
        raise UsageError(message)
