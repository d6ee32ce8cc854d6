"""What the scripts share: arguments that are checked, errors and interruptions in one line, folders of results.

    script(main)                 runs a script's main(): what a person gave wrong ends in one line and exit code 2
    processes, of_first, of_all  several processes, started by torchrun
    Interrupts                   Ctrl-C and SIGTERM, held back where work is to be brought to a safe place first
    OneLineParser, whole, ...    argparse with checked numbers
    new_output_dir, write_json   a run's folder, which no other run has
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints import write_whole
from measurements import choose_device, wilson_interval
from vit_model import InputError

# ---- Arguments and errors ---------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage text, and exit code 2; no abbreviations."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole(least):
    """An argparse type: a whole number of at least `least`."""
    return Bounded(int, least, math.inf, f"a whole number of at least {least}")


def seed():
    """An argparse type: a seed for torch's generators."""
    return Bounded(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")


def positive():
    """An argparse type: a number above 0."""
    return Bounded(float, math.ulp(0.0), sys.float_info.max, "a positive number")


class Bounded:
    """An argparse type: a number between two bounds, with its own words for what is expected."""

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
    """Runs a script's main part. What a person gave wrong, or a disk, ends in one line and exit code 2; an
    interruption in one line and 128 + the signal's number, 130 for Ctrl-C and 143 for SIGTERM; output that nobody
    reads any more without a word, in 141."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # consoles that lack a letter of a folder's name
    name = Path(sys.argv[0]).name
    if n_processes() > 1:
        name = f"[process {process_number()}] {name}"
    try:
        run()
    except BrokenPipeError:  # who reads the output, head for one, has seen enough
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


# ---- Several processes ------------------------------------------------------------------------------------


def n_processes():
    """How many processes torchrun, or another launcher, started for this command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def process_number():
    """This process's number among them, from 0."""
    return int(os.environ["RANK"]) if n_processes() > 1 else 0


@contextmanager
def processes(device="auto"):
    """Gives the device to compute on; of several processes each its own, and they are joined as long as this is
    entered. Only the first one prints.

    Raises InputError for a device that is not there, and where another process ended before its time.
    """
    device = choose_device(device)
    if n_processes() == 1:
        yield device
        return
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if process_number() else nullcontext():
        try:
            yield device
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, dist.DistError):
                raise
            raise InputError(f"another process ended before its time ({str(error).splitlines()[0][:150]}); what ended "
                             f"it stands beside this, and a training goes on with --resume and its folder") from None
    dist.destroy_process_group()


def of_first(value):
    """The first process's value, on every process; they wait here for each other."""
    if n_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def of_all(value):
    """The values of all processes, in a list, on each of them."""
    if n_processes() == 1:
        return [value]
    values = [None] * n_processes()
    dist.all_gather_object(values, value)
    return values


# ---- Interruptions ----------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; as text, what there is to know."""

    def __init__(self, number, text=""):
        super().__init__(text)
        self.number = number


class Interrupts:
    """Ctrl-C (SIGINT) and SIGTERM while this is entered: the first raises Interrupted, or, while `held`, is only noted
    in `caught`; a second one ends the process at once. `advice` is what the person is then told.

    Under a launcher of several processes the terminal and the launcher both pass on one Ctrl-C: what comes within a
    second of the first is then the same one.
    """

    def __init__(self):
        self.caught, self.held, self.advice, self.time, self.before = None, False, "", 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, _frame):
        if self.caught is None:
            self.caught, self.time = number, time.monotonic()
            if not self.held:
                raise Interrupted(number, self.advice)
        elif n_processes() == 1 or time.monotonic() - self.time > 1:
            os._exit(128 + number)


# ---- Folders and text -------------------------------------------------------------------------------------


def new_output_dir(wanted, model_name, dataset_name):
    """Makes the folder of a run. Raises InputError where it cannot, or where it already holds something."""
    folder = Path(wanted or "runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if wanted is None:
            folder = first_new_folder(folder / f"{model_name}-{dataset_name}")
        elif any(entry.name[0] != "." for entry in folder.iterdir()):
            raise InputError(f"--output-dir {folder} already holds files; choose a new folder, so that no run is lost")
        (folder / ".write-test").touch()
        (folder / ".write-test").unlink()
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {folder} ({error.strerror}); choose a folder that is "
                         f"writable") from error
    return folder


@contextmanager
def unless_empty(folder):
    """The folder as long as this is entered; where an error ends that before anything was written, it goes away."""
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # what holds something cannot be removed so
            folder.rmdir()
        raise


def first_new_folder(stem):
    """Makes <stem>-1, or -2, ...: the first that nobody else has made."""
    for n in itertools.count(1):
        folder = stem.with_name(f"{stem.name}-{n}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def write_json(entries, path):
    write_whole(path, lambda file: file.write((json.dumps(entries, indent=2) + "\n").encode()))


def percent(correct, n):
    """'87.5% (86.9 to 88.1)': an accuracy with its 95% Wilson interval."""
    low, high = wilson_interval(correct, n)
    return f"{correct / n:.1%} ({100 * low:.1f} to {100 * high:.1f})"
