"""Tools shared by all commands: checked arguments, help texts, and one-line errors and interruptions.

    script(main)                         runs a script's main()
    OneLineParser, int_at_least(1), ...  argparse with checked numbers
"""

import argparse
import math
import os
import signal
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

from vit_bridge.errors import Assumption, InputError, closest_names, pair
from vit_bridge.preprocessing import one_side
from vit_bridge.system import Interrupted, n_processes, process_number


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations, whose errors are one line and exit with code 2."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        """Print the error in one line and exit with code 2."""
        kind, _, words = message.partition("unrecognized arguments: ")
        if words and not kind:
            message = self._unknown(words.split())
        self.exit(2, f"{self.prog}: {message}\n")

    def _unknown(self, words):
        """Return a message that names the first unknown option, or word, and the option closest to it."""
        option = next((word.partition("=")[0] for word in words if word.startswith("--")), None)
        if option is None:
            return f"unexpected {words[0]!r}; --help lists the options"
        known = [name for action in self._actions for name in action.option_strings]
        initials = "--" + "".join(part[:1] for part in option[2:].split("-"))  # --learning-rate: --lr
        close = [initials] if initials in known else closest_names(option, known, 1)
        return f"unknown option {option}; " + (f"did you mean {close[0]}?" if close else "--help lists the options")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """An argparse formatter that keeps the lines of the description and breaks no option at its hyphens."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def int_at_least(least):
    """Return an argparse type: a whole number of at least `least`."""
    return Bounded(int, least, math.inf, f"a whole number of at least {least}")


def seed():
    """Return an argparse type: a seed for torch's generators."""
    return Bounded(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")


def positive():
    """Return an argparse type: a number above 0."""
    return Bounded(float, math.ulp(0.0), sys.float_info.max, "a positive number")


class Size(argparse.Action):
    """An argparse action for nargs="+": a side, or height and width, as a number or a pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} {' '.join(map(str, values))} has {len(values)} numbers; expected one side, "
                         f"or height and width")
        setattr(namespace, self.dest, one_side(pair(values[0] if len(values) == 1 else values)))


class Names(argparse.Action):
    """An argparse action for nargs="+": names, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def add_class_names(parser):
    """Add the option --class-names, the class names of a file."""
    parser.add_argument("--class-names", nargs="+", action=Names, metavar="NAME", help="class names in output order, "
                        "if the file does not contain them")


def add_n_heads(parser, name="--n-heads", of="the file"):
    """Add the option --n-heads, the number of attention heads of a file's model."""
    parser.add_argument(name, type=int_at_least(1), metavar="N", help=f"number of attention heads, if neither {of} "
                        f"nor a config.json in its folder records it")


def counted(n, noun):
    """Return a number and a noun as text: "1 step", "2,000 steps", "0.5 minutes"."""
    return f"{f'{n:,}' if isinstance(n, int) else f'{n:g}'} {noun}{'s' * (n != 1)}"


class Bounded:
    """An argparse type: a number between two bounds. `expected` is the range in words, for the error."""

    def __init__(self, kind, low, high, expected):
        self.kind, self.low, self.high, self.expected = kind, low, high, expected

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            kind = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}; expected {self.expected}") from None
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {self.expected}")
        return value


def script(run):
    """Run a script's main part and turn its errors into one line on stderr and an exit code.

    An InputError or an error of the operating system ends with exit code 2. An interruption ends with 128 plus the
    signal's number: 130 for Ctrl-C, 143 for SIGTERM. A closed output pipe ends silently with 141. Each Assumption is
    printed in one line on stderr, by the first process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for consoles that cannot show every character
    name = Path(sys.argv[0]).name
    if n_processes() > 1:
        name = f"[process {process_number()}] {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", Assumption)
            warnings.showwarning = partial(_show_warning, warnings.showwarning, name, set())
            run()
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
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
    """Show an Assumption once, in one line, and any other warning with show_other.

    `shown` holds the Assumptions so far, because Python forgets them whenever a warning filter changes.
    """
    if not issubclass(category, Assumption):
        show_other(message, category, *where, **more)
    elif process_number() == 0 and str(message) not in shown:
        shown.add(str(message))
        print(f"{name}: {message}", file=sys.stderr)
