"""The errors a user can meet. Each says what is wrong, how to fix it, and has its exit code."""

from __future__ import annotations


class HcfError(Exception):
    """`message` names the value and its limit; `fix` is the one thing to do about it."""

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\nfix: {self.fix}" if self.fix else self.message


class RecipeError(HcfError):
    """Usage: a recipe, option or prompt that cannot be meant."""

    exit_code = 2


class GateFailed(HcfError):
    """The candidate is worse than the thresholds of the recipe allow."""

    exit_code = 3


class MissingDependency(HcfError):
    """A package or a piece of hardware that was asked for is not here."""

    exit_code = 4


class InvalidArtifact(HcfError):
    """A model file is missing, truncated, of the wrong shape, not finite, or edited."""

    exit_code = 5


class UnsafeFile(HcfError):
    """A pickle. It could run code when read, so it is not read."""

    exit_code = 6


class StorageError(HcfError):
    """The disk is full or cannot be written."""

    exit_code = 7


class EngineMismatch(HcfError):
    """An engine was built by another version or for another machine."""

    exit_code = 8


class Regression(HcfError):
    """A measurement is worse than the one it was compared with."""

    exit_code = 9


class Undecided(HcfError):
    """A comparison ended without a verdict: the budget was too small for the noise."""

    exit_code = 10


class InvalidComparison(HcfError):
    """Two sides that cannot be compared: wrong outputs, unequal threads or environments."""

    exit_code = 11


class RowsFailed(HcfError):
    """Some rows of a suite failed, were killed or are invalid; the others were delivered."""

    exit_code = 12
