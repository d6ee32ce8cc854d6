"""Bad input: the error, and the checks that raise it. Those that vit_model.py needs itself are defined there."""

import sys
import warnings

import numpy as np

from vit_model import InputError, check_choice, check_int, pair

__all__ = ["Assumption", "InputError", "assume", "check_choice", "check_index", "check_int", "first_line", "pair"]


class Assumption(UserWarning):
    """Something that a file does not record was assumed. The message is one line: what, why, and how to set it."""


def assume(message):
    """Warns with an Assumption, at the line outside this package that led to it. The commands show it as one line on
    stderr."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("vit_bridge."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, Assumption, stacklevel=level)


def first_line(error):
    """Type and first sentence of an error, for quoting inside another message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}".rstrip(": ")


def check_index(name, index, length):
    """index, counted from 0. Raises InputError where it is out of range."""
    if not isinstance(index, (int, np.integer)) or not -length <= index < length:
        raise InputError(f"{name} {index} is out of range; expected 0 to {length - 1}, or {-length} to -1 from "
                         f"the end")
    return int(index) % length
