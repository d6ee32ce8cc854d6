"""Bad input: the error, and the checks that raise it. Those that vit_model.py needs itself are defined there."""

import numpy as np

from vit_model import InputError, check_choice, check_int, pair

__all__ = ["InputError", "check_choice", "check_index", "check_int", "first_line", "pair"]


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
