"""The folder of a run: its files, the options that may change on a resume, and the Saver that writes them.

config.json holds the options, best.pt the model of the best epoch, and history.csv one line per epoch. last.pt is a
checkpoint with the entries of config.json and "training": TrainState.state_dict(), the best epoch, the elapsed seconds.
Files of older versions are read by OLD_NAMES, Recipe.from_dict, TrainState.load_state_dict, train_vit._of_any_version.
"""

import csv
import io
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from vit_bridge.errors import InputError
from vit_bridge.system import write_whole
from vit_bridge.training.config import Callback
from vit_bridge.weights.checkpoints import read_checkpoint, save_model
from vit_bridge.weights.heads import first_difference


def on_cpu(entries):
    """Return nested dicts and lists with copies of their tensors on the CPU."""
    if isinstance(entries, torch.Tensor):
        return entries.detach().to("cpu", copy=True)
    if isinstance(entries, dict):
        return {key: on_cpu(value) for key, value in entries.items()}
    return [on_cpu(value) for value in entries] if isinstance(entries, list | tuple) else entries


CONFIG, LAST, BEST, HISTORY_TABLE, LOCK = "config.json", "last.pt", "best.pt", "history.csv", ".lock"
# Options that may change on a resume: device, memory use, location of the images, and skipping of unreadable ones.
CHANGEABLE = ("resume", "output_dir", "data_dir", "device", "num_workers", "skip_corrupt", "save_minutes", "compile",
              "grad_accum_steps", "grad_checkpointing")

# Names that older versions wrote in config.json and last.pt, and the current names.
OLD_NAMES = {
    "options": {"accumulate": "grad_accum_steps", "workers": "num_workers"},
    "recipe": {"options": "model_options", "low": "progressive_resize", "model_ema": "ema_decay"},
    "training": {"rate": "lr", "tally": "metrics"},
    "optimizer": {"rate_factor": "lr_scale", "parts": "n_splits"},
}


def renamed(entries, section):
    """Return nested dicts and lists with their keys renamed by OLD_NAMES[section]."""
    if isinstance(entries, dict):
        return {OLD_NAMES[section].get(key, key): renamed(value, section) for key, value in entries.items()}
    return [renamed(value, section) for value in entries] if isinstance(entries, list) else entries


def lock_folder(folder):
    """Lock a folder and return the open lock file; the lock lasts as long as the file is open.

    Raises
    ------
    InputError
        If another process holds the lock.
    """
    file = open(folder / LOCK, "w")  # noqa: SIM115 - it stays open
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # only for this process: its workers do not inherit it
    except OSError as error:
        file.close()
        raise InputError(f"another run is writing to {folder}; wait for it, or choose another --output-dir") from error
    return file


def folder_to_resume(resume, output_dir):
    """Return the folder of the run that --resume names.

    Parameters
    ----------
    resume : str or True
        The run's folder or its last.pt; True for --resume without a value, which uses --output-dir. That folder may
        not exist yet.
    output_dir : str, optional

    Raises
    ------
    InputError
        If there is no run, or the two options contradict each other.
    """
    if resume is True:
        if output_dir is None:
            raise InputError("--resume alone does not specify a run; name its folder, --resume runs/NAME, or add "
                             "the run's --output-dir")
        folder = Path(output_dir)
        if folder.is_dir() and not holds_run(folder) and any(
                entry.name[0] != "." and entry.suffix != ".part" for entry in folder.iterdir()):
            raise InputError(f"--output-dir {folder} holds files but no run to resume; choose a new folder")
        return folder
    path = Path(resume)
    folder = path.parent if path.name == LAST and not path.is_dir() else path
    if path.is_file() and path.name != LAST:
        raise InputError(f"--resume {resume} is neither a run's folder nor its {LAST}, which holds the state of the "
                         f"training; use one of these, or start a new run from these weights with --pretrained "
                         f"{resume}")
    if not holds_run(folder):
        raise InputError(f"--resume {resume}: there is no run there; expected a folder with {LAST} or {CONFIG}")
    if output_dir is not None and Path(output_dir).resolve() != folder.resolve():
        raise InputError(f"--output-dir {output_dir} is not the folder of --resume {resume}; leave it out, because "
                         f"a run resumes in its own folder")
    return folder


def holds_run(folder):
    """Return whether a folder has a last.pt or a config.json."""
    return any((folder / name).is_file() for name in (LAST, CONFIG))


def read_run(folder):
    """Return the entries of a folder's last.pt, or of its config.json before the first checkpoint, or None.

    Options and recipe are returned with the current names.

    Raises
    ------
    InputError
        If the file is damaged or does not belong to a training run.
    """
    entries = _read_config(folder)
    if (folder / LAST).is_file():
        entries = read_checkpoint(folder / LAST)
        if not {"options", "n_steps", "training"} <= entries.keys():
            raise InputError(f"{folder / LAST} holds no training state; expected a file that train_vit.py wrote. "
                             f"--pretrained {folder / LAST} starts a new run from its weights")
        training = entries["training"]
        if training.get("model", {}).keys() == {"weight", "bias"}:  # a head alone, before there were models with two
            entries["training"] = training | {name: {f"head.{key}": value for key, value in training[name].items()}
                                              for name in ("model", "average") if training[name] is not None}
    if entries is None:
        return None
    return entries | {section: renamed(entries[section], section) for section in ("options", "recipe")
                      if section in entries}


def _read_config(folder):
    """Return the entries of config.json, or None without one; raise InputError if it is damaged."""
    try:
        entries = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} is damaged ({error}); choose another --output-dir") from error
    if not isinstance(entries, dict) or not {"options", "n_steps", "n_images", "class_names"} <= entries.keys():
        raise InputError(f"{folder / CONFIG} is not the config of a training run; choose another --output-dir")
    for name, value in entries["options"].items():
        entries["options"][name] = tuple(value) if isinstance(value, list) else value  # JSON has no pairs
    return entries


def device_to_resume(options):
    """Return the device in the options, or the resumed run's device if --device was not set."""
    if options.resume and "device" not in options.given:
        config = _read_config(folder_to_resume(options.resume, options.output_dir))
        return config["options"]["device"] if config else options.device
    return options.device


def options_to_resume(given, saved):
    """Return the options of a resumed run: the saved options, updated by those that were set and may change.

    `given` is {name: value} of the options on the command line.

    Raises
    ------
    InputError
        If a given option differs from the run's and is not one of CHANGEABLE.
    """
    for name, value in given.items():
        if name not in CHANGEABLE and value != saved.get(name):  # both are tuples if there are several
            flag = f"--{name.replace('_', '-')}"
            before = saved.get(name)
            own = f"the run, which was started without {flag}" if before is None else f"the run's {before}"
            raise InputError(f"{flag} {value} differs from {own}; leave {flag} out to resume the run, or start a new "
                             f"run from its weights with --pretrained")
    return {**saved, **{name: value for name, value in given.items() if name in CHANGEABLE}}


def changes_since(saved, class_names, n_images, n_processes, **files):
    """Return warnings about what has changed since a resumed run started.

    `files` are fingerprints of the files of each set, by the name under which the run stores them.

    Raises
    ------
    InputError
        If the classes differ.
    """
    if saved["class_names"] != class_names:
        raise InputError(f"the classes of the images differ from the run's, "
                         f"{first_difference(class_names, saved['class_names'])}; use the run's own --data-dir")
    changes = []
    for name, now in (("training images", n_images), ("processes", n_processes)):
        before = saved.get(f"n_{name.split()[-1]}", now)
        if before != now:
            changes.append(f"there are {now:,} {name}, but the run started with {before:,}; it continues, but its "
                           f"result will differ from the result of an unchanged run")
    for name, now in files.items():
        if saved.get(name, now) != now and not changes:
            changes.append(f"the {name.replace('_', ' ')} or their classes have changed since the run started; it "
                           f"continues, but its result will differ from the result of an unchanged run")
    return changes


class Saver(Callback):
    """A Callback that writes the files of a run and prints the epochs, at most one per second.

    Writing takes at most about a tenth of the time: several short epochs share one checkpoint.

    Parameters
    ----------
    folder : Path
    model : Module
        The whole model, as it is to be saved.
    preprocessing : Preprocessing
        Preprocessing that the checkpoints record.
    config : dict
        Further entries of last.pt; `options` and `validation_files` are also saved in best.pt.
    objective : Objective
        Chooses the best epoch and formats the values to print.
    resumed : dict, optional
        The "training" entry of the last.pt of a resumed run.
    """

    def __init__(self, folder, model, preprocessing, config, objective, resumed=None):
        self.folder, self.model, self.preprocessing, self.config = folder, model, preprocessing, config
        self.objective, resumed = objective, resumed or {}
        self.best_weights = None  # not yet written
        self.saved_step, self.elapsed_before = resumed.get("step", 0), resumed.get("elapsed", 0.0)
        self.started = self.saved_at = time.monotonic()
        self.cost = self.printed_at = 0.0

    @property
    def elapsed(self):
        """The seconds that the run has taken, interruptions excluded."""
        return self.elapsed_before + time.monotonic() - self.started

    def on_epoch(self, state):
        """Keep the weights of the best epoch, save if enough time has passed, and print the epoch."""
        epoch = len(state.history["lr"])
        if self.objective.best_epoch(state.history) == epoch:
            self.best_weights = on_cpu(state.trained.state_dict())
        is_last, now = state.step >= self.config["n_steps"], time.monotonic()
        if is_last or now - self.saved_at >= 9 * self.cost:
            self.on_save(state)
        if is_last or now - self.printed_at >= 1:
            self.printed_at = now
            values = {name: column[-1] for name, column in state.history.items()}
            tqdm.write(f"epoch {epoch:>3}  {self.objective.describe(values)}   {values['images_per_second']:.0f} "
                       f"images/s")

    def on_save(self, state):
        """Write last.pt, history.csv and, if the best epoch is new, best.pt."""
        started = time.monotonic()
        best = self.objective.best_epoch(state.history)
        values = {name: column[best - 1] for name, column in state.history.items() if best}
        if self.best_weights is not None:
            self.write(BEST, self.best_weights, epoch=best, options=self.config["options"],
                       validation_files=self.config["validation_files"],
                       **{name: value for name, value in values.items() if name.startswith("val_")})
            self.best_weights = None
        self.write(LAST, state.trained.state_dict(), epoch=len(state.history["lr"]),
                   training=dict(state.state_dict(), best=dict(epoch=best, value=values.get(self.objective.criterion)),
                                 elapsed=self.elapsed), **self.config)
        _write_history(state.history, self.folder / HISTORY_TABLE)
        self.saved_at, self.saved_step = time.monotonic(), state.step
        self.cost = self.saved_at - started

    def write(self, name, weights, **more):
        """Write a checkpoint of the whole model; `weights` are the weights of the trained part."""
        weights = self.model.state_dict() | weights
        save_model(self.model, self.folder / name, self.preprocessing, state_dict=weights, **more)


def _write_history(history, path):
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("epoch", *history))
    rows.writerows((i + 1, *values) for i, values in enumerate(zip(*history.values(), strict=True)))
    write_whole(path, lambda file: file.write(text.getvalue().encode()))
