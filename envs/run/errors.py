"""Errors that end a run with one line."""


class UsageError(ValueError):
    """Bad input. Its message is one line that names the flag or file, the value and what is allowed."""


class DivergenceError(RuntimeError):
    """A loss, reward or parameter that is NaN or infinite. Its message names it, the step and the last checkpoint."""


class RankLost(Exception):
    """Another process of this torchrun has died, or all are being stopped: training cannot go on."""


def check(condition: bool, message: str) -> None:
    """Raises `UsageError(message)` unless `condition`."""
    if not condition:
        raise UsageError(message)
