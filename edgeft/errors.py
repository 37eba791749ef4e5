"""Every way edgeft tells a user that something went wrong.

* EdgeftError        1
  - RecipeError      2   a recipe or target file says something we cannot accept
  - SetupError       3   this machine lacks an extra, a tool, the right version, memory or disk
  - StageError       4   a stage ran and failed
    · ToolError      7   an external command failed
  - ParityError      5   the built model strayed too far from its reference
  - UndecidedError   6   the measurements do not tell yet whether it did
  - DataError        8   a data file is missing, malformed, or empty after the filters
  - FitError         9   the model, its context and its KV cache do not fit the target
  - BusyError       10   another build holds what this one needs

The number is the exit code; 130 is Ctrl-C.
Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations


class EdgeftError(Exception):
    """A sentence with the offending value, and a hint that says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(EdgeftError):
    exit_code = 2


class SetupError(EdgeftError):
    exit_code = 3


class StageError(EdgeftError):
    exit_code = 4


class ParityError(EdgeftError):
    exit_code = 5


class UndecidedError(EdgeftError):
    exit_code = 6


class ToolError(StageError):
    exit_code = 7


class DataError(EdgeftError):
    exit_code = 8


class FitError(EdgeftError):
    exit_code = 9


class BusyError(EdgeftError):
    exit_code = 10
