"""The one error that user input can raise."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one line that says what is wrong and what to do about it.

    Raised before any long work starts. The experiment launcher prints it as one line on standard error and
    exits with status 2, without a traceback.

    Example:
        >>> raise InputError("k=9 is over the rank 4: ask for k <= 4")
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: k=9 is over the rank 4: ask for k <= 4
    """
