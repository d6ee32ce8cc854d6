"""What the command lines share: arguments that are checked, errors and interruptions in one line.

    script(main)                         runs a script's main()
    OneLineParser, int_at_least(1), ...  argparse with checked numbers
"""

import argparse
import math
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

from vit_bridge.errors import Assumption, InputError, pair
from vit_bridge.preprocessing import one_side
from vit_bridge.system import Interrupted, n_processes, process_number


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage text, and exit code 2; no abbreviations."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def int_at_least(least):
    """An argparse type: a whole number of at least `least`."""
    return Bounded(int, least, math.inf, f"a whole number of at least {least}")


def seed():
    """An argparse type: a seed for torch's generators."""
    return Bounded(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")


def positive():
    """An argparse type: a number above 0."""
    return Bounded(float, math.ulp(0.0), sys.float_info.max, "a positive number")


class Size(argparse.Action):
    """An argparse action for nargs="+": a side, or height and width, as a number or a pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} {' '.join(map(str, values))} are {len(values)} numbers; expected a side, or "
                         f"height and width")
        setattr(namespace, self.dest, one_side(pair(values[0] if len(values) == 1 else values)))


class Names(argparse.Action):
    """An argparse action for nargs="+": names, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def add_class_names(parser):
    """Adds the option that names the classes of a file."""
    parser.add_argument("--class-names", nargs="+", action=Names, metavar="NAME", help="the classes of the head, "
                        "in the order of its outputs, where nothing records them")


def add_n_heads(parser, name="--n-heads", of="the file"):
    """Adds the option that says how many heads the model of a file has."""
    parser.add_argument(name, type=int_at_least(1), metavar="N", help=f"attention heads of {of}, where neither it "
                        f"nor a config.json beside it records them")


class Bounded:
    """An argparse type: a number between two bounds. expected: the range in words, for the error."""

    def __init__(self, kind, low, high, expected):
        self.kind, self.low, self.high, self.expected = kind, low, high, expected

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {self.expected}")
        return value


def script(run):
    """Runs a script's main part. An InputError or an error of the disk ends in one line and exit code 2; an
    interruption in one line and 128 + the signal's number, 130 for Ctrl-C and 143 for SIGTERM; output that nobody
    reads any more in 141, silently. An Assumption is one line on stderr, from the first process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for consoles that cannot show a letter of a folder's name
    name = Path(sys.argv[0]).name
    if n_processes() > 1:
        name = f"[process {process_number()}] {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", Assumption)
            warnings.showwarning = partial(_show_warning, warnings.showwarning, name, set())
            run()
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (InputError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        if process_number() == 0:
            print(f"{name}: stopped by {signal.Signals(number).name}{f'; {error}' if str(error) else ''}",
                  file=sys.stderr)
        sys.exit(128 + number)


def _show_warning(show_other, name, shown, message, category, *where, **more):
    """warnings.showwarning of a script: an Assumption in one line, and once, other warnings by show_other. shown: the
    Assumptions so far; Python forgets them whenever anything changes its filters."""
    if not issubclass(category, Assumption):
        show_other(message, category, *where, **more)
    elif process_number() == 0 and str(message) not in shown:
        shown.add(str(message))
        print(f"{name}: {message}", file=sys.stderr)
