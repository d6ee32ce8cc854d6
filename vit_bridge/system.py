"""The machine: files written whole, folders of runs, processes, signals, and what a result was measured on.

    write_whole, write_json     a file appears whole or not at all
    n_processes, broadcast_object, all_gather_object   several processes, started by torchrun
    Interrupts                  Ctrl-C and SIGTERM, held back until it is safe to stop
    machine, commit             what a result was measured on
"""

import itertools
import json
import os
import platform
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from vit_bridge.errors import InputError, first_line

# ---- Files ------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """Writes a file that appears whole or not at all, whatever happens meanwhile; an older one stays until then.

    write: called with the open file, which takes bytes. Raises InputError where it cannot be written.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(part.parent)
    except (OSError, RuntimeError) as error:
        # what torch.save raises for a full disk hides the disk's own error behind it
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {path} ({getattr(reason, 'strerror', None) or first_line(reason)}); choose a "
                         f"folder that exists, is writable and has room") from error
    finally:
        with suppress(OSError):  # there is none where all went well
            part.unlink()


def _sync_folder(folder):
    """Has the disk keep the names in a folder; Windows does so by itself, and refuses."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- Several processes ------------------------------------------------------------------------------------


def n_processes():
    """How many processes torchrun, or another launcher, started for this command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def process_number():
    """This process's number among them, from 0."""
    return int(os.environ["RANK"]) if n_processes() > 1 else 0


def broadcast_object(value):
    """The first process's value, on every process; they wait here for each other."""
    if n_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather_object(value):
    """The values of all processes, in a list, on each of them."""
    if n_processes() == 1:
        return [value]
    values = [None] * n_processes()
    dist.all_gather_object(values, value)
    return values


# ---- Interruptions ----------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; its text says what to do next."""

    def __init__(self, number, text=""):
        super().__init__(text)
        self.number = number


class Interrupts:
    """Ctrl-C (SIGINT) and SIGTERM while this is entered: the first raises Interrupted, or, while `held`, is only noted
    in `caught`; a second one ends the process at once. `advice` is the text of Interrupted.

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


# ---- Folders of runs, and JSON ----------------------------------------------------------------------------


def new_output_dir(wanted, model_name, dataset_name):
    """Makes the folder of a run. Raises InputError where it cannot, or where it already holds something."""
    folder = Path(wanted or "runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if wanted is None:
            folder = _first_new_folder(folder / f"{model_name}-{dataset_name}")
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


def _first_new_folder(stem):
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


# ---- What a result was measured on ------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent  # of the checkout, where this is one
INSTRUCTIONS = dict(amx_bf16="AMX", avx512_bf16="AVX512-BF16", avx512f="AVX512", avx2="AVX2")  # the fastest first


def machine(device="cpu"):
    """What a result was measured on, in words; with device="cuda" the GPU too."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in
                                                                  info.read_text().splitlines())}
        cpu = facts.get("model name", cpu)
        widest = [words for flag, words in INSTRUCTIONS.items() if flag in facts.get("flags", "").split()][:1]
        cpu = " with ".join([cpu, *widest])
    words = f"{cpu}, {os.cpu_count()} cores, {platform.system()}"
    if device == "cuda":
        words = f"{torch.cuda.get_device_name()}, {words}"
    return words


def commit():
    """The short hash of the checkout's commit, with -dirty where a tracked file other than a result differs from it; or
    "unknown"."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    try:
        done = git("rev-parse", "--short", "HEAD")
    except OSError:  # no git
        return "unknown"
    if done.returncode:
        return "unknown"
    results = (":!benchmarks/results", ":!benchmarks/figures", ":!benchmarks/RESULTS.md")
    return done.stdout.strip() + "-dirty" * bool(git("diff", "--quiet", "HEAD", "--", ".", *results).returncode)
