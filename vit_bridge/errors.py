"""Errors for bad input, and the checks that raise them.

InputError and the checks that vit_model.py needs are defined in that file, so that it works alone. This module
re-exports them.
"""

import sys
import warnings

import numpy as np

from vit_model import InputError, check_choice, check_int, closest_names, pair

__all__ = ["Assumption", "InputError", "assume", "check_choice", "check_index", "check_int", "closest_names",
           "first_line", "join_words", "pair"]


class Assumption(UserWarning):
    """A warning that states what was assumed because a file does not record it, and how to set it."""


def assume(message):
    """Warn with an Assumption at the line outside this package that caused it.

    The commands print the message as one line on stderr.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("vit_bridge."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, Assumption, stacklevel=level)


def first_line(error):
    """Return the type and the first sentence of an error, to quote in a message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}".rstrip(": ")


def check_index(name, index, length):
    """Return the index counted from 0; negative ones count from the end.

    Raises InputError if it is not a whole number or is out of range.
    """
    if not isinstance(index, (int, np.integer)) or not -length <= index < length:
        raise InputError(f"{name} {index} is out of range; expected 0 to {length - 1}, or {-length} to -1 from "
                         f"the end")
    return int(index) % length


def join_words(words):
    """Return "a", "a and b" or "a, b and c"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
