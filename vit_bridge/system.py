"""The operating system: writing files safely, several processes, interruptions, and the machine itself.

    write_whole, write_json                            write a file completely or not at all
    n_processes, broadcast_object, all_gather_object   several processes, as torchrun starts them
    Interrupts                                         delay Ctrl-C and SIGTERM until it is safe to stop
    machine, commit                                    describe where a result was measured
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
    """Write a file so that it appears completely or not at all. An older file stays until the new one is complete.

    Parameters
    ----------
    path : path-like
        The file to write. Its folder must exist.
    write : callable
        Called with a file opened for writing bytes.

    Raises
    ------
    InputError
        If the file cannot be written.
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
        # if the disk is full, torch.save raises its own error, with the disk's error as its context
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {path} ({getattr(reason, 'strerror', None) or first_line(reason)}); choose a "
                         f"folder that exists, is writable and has free space") from error
    finally:
        with suppress(OSError):  # after a success, it no longer exists
            part.unlink()


def _sync_folder(folder):
    """Make the names in a folder durable on disk. Windows does this by itself and refuses the call."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- Several processes ------------------------------------------------------------------------------------


def n_processes():
    """Return how many processes torchrun or another launcher started for this command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def process_number():
    """Return the number of this process, from 0."""
    return int(os.environ["RANK"]) if n_processes() > 1 else 0


def broadcast_object(value):
    """Return the first process's value on every process. All processes wait here for each other."""
    if n_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather_object(value):
    """Return a list of the values of all processes, on every process."""
    if n_processes() == 1:
        return [value]
    values = [None] * n_processes()
    dist.all_gather_object(values, value)
    return values


# ---- Interruptions ----------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """A request, sent as a signal, to stop. Its text says what to do next."""

    def __init__(self, number, text=""):
        super().__init__(text)
        self.number = number


class Interrupts:
    """A context in which Ctrl-C (SIGINT) and SIGTERM stop the work at a safe moment.

    The first signal raises Interrupted with the text `advice`. While `held` is true it is only recorded in `caught`. A
    second signal ends the process at once.

    When a launcher runs several processes, one Ctrl-C arrives twice: from the terminal and from the launcher. A signal
    within a second of the first therefore counts as the same one.
    """

    def __init__(self):
        self.caught, self.held, self.advice, self.time, self.before = None, False, "", 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
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
    """Create the folder of a run and return its path.

    Raises InputError if it cannot be created or written, or if it already holds files.
    """
    folder = Path(wanted or "runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if wanted is None:
            folder = _first_new_folder(folder / f"{model_name}-{dataset_name}")
        elif any(entry.name[0] != "." for entry in folder.iterdir()):
            raise InputError(f"--output-dir {folder} already holds files; choose a new folder, so that no run is "
                             f"overwritten")
        (folder / ".write-test").touch()
        (folder / ".write-test").unlink()
    except FileExistsError as error:
        raise InputError(f"{folder} is a file; choose a folder with --output-dir") from error
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {folder} ({error.strerror}); choose a folder that is "
                         f"writable") from error
    return folder


@contextmanager
def unless_empty(folder):
    """Yield a folder, and remove it again if an error ends the block before anything was written to it."""
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # rmdir fails if the folder holds anything, and should
            folder.rmdir()
        raise


def _first_new_folder(stem):
    """Create <stem>-1, <stem>-2, ..., whichever does not exist yet, and return its path."""
    for n in itertools.count(1):
        folder = stem.with_name(f"{stem.name}-{n}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def write_json(entries, path):
    """Write entries as an indented JSON file."""
    write_whole(path, lambda file: file.write((json.dumps(entries, indent=2) + "\n").encode()))


# ---- What a result was measured on ------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent  # the checkout's root, if this is a checkout
INSTRUCTIONS = dict(amx_bf16="AMX", avx512_bf16="AVX512-BF16", avx512f="AVX512", avx2="AVX2")  # fastest first


def machine(device="cpu"):
    """Describe the computer in words: CPU, cores and system, and with device="cuda" also the GPU."""
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
    """Return the short hash of the checked-out commit, or "unknown" outside a git checkout.

    It ends in -dirty if a tracked file differs from the commit. Measured results and figures are ignored.
    """
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
