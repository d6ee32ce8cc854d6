"""A run's folder: its files, the options that may change when a run goes on, and the Saver that writes the files.

config.json holds the options, last.pt the state of the training, best.pt the best model, history.csv a line an epoch.

last.pt is a checkpoint (vit_bridge.weights.checkpoints.save_model) of the trained weights, with these entries more:

    options, recipe, n_steps, ...   as in config.json
    training                        train_vit.TrainState.state_dict(), the best epoch and the seconds so far

Files of older versions are understood in four places: OLD_NAMES here, Recipe.from_dict, TrainState.load_state_dict
and, for runs older than recipes, train_vit._before_recipes.
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


def on_cpu(entries):
    """The same nested dicts and lists, with copies of their tensors on the CPU: the training goes on in its own."""
    if isinstance(entries, torch.Tensor):
        return entries.detach().to("cpu", copy=True)
    if isinstance(entries, dict):
        return {key: on_cpu(value) for key, value in entries.items()}
    return [on_cpu(value) for value in entries] if isinstance(entries, list | tuple) else entries


CONFIG, LAST, BEST, HISTORY_TABLE, LOCK = "config.json", "last.pt", "best.pt", "history.csv", ".lock"
# What may be another when a run goes on: where it computes and in how many parts, where its images lie, what it skips.
CHANGEABLE = ("resume", "output_dir", "data_dir", "device", "num_workers", "skip_corrupt", "save_minutes", "compile",
              "grad_accum_steps", "grad_checkpointing")

# What older versions wrote in config.json and last.pt, and what it is called now.
OLD_NAMES = {
    "options": {"accumulate": "grad_accum_steps", "workers": "num_workers"},
    "recipe": {"options": "model_options", "low": "progressive_resize", "model_ema": "ema_decay"},
    "training": {"rate": "lr", "tally": "metrics"},
    "optimizer": {"rate_factor": "lr_scale", "parts": "n_splits"},
}


def renamed(entries, section):
    """The entries, nested dicts and lists, with their keys renamed by OLD_NAMES[section]."""
    if isinstance(entries, dict):
        return {OLD_NAMES[section].get(key, key): renamed(value, section) for key, value in entries.items()}
    return [renamed(value, section) for value in entries] if isinstance(entries, list) else entries


def lock_folder(folder):
    """The open lock file of a folder: as long as it is open, no other process can lock it.

    Raises InputError where another process has locked it.
    """
    file = open(folder / LOCK, "w")  # noqa: SIM115 - it stays open
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process alone: its workers do not inherit it
    except OSError as error:
        file.close()
        raise InputError(f"another run is writing to {folder}; wait for it, or choose another --output-dir") from error
    return file


def folder_to_resume(resume, output_dir):
    """The folder of the run that --resume means; it may not be there yet where --output-dir alone names it.

    resume: True where --resume stands alone, else the run's folder or its last.pt. Raises InputError where there is
    no such run.
    """
    if resume is True:
        if output_dir is None:
            raise InputError("--resume alone does not say which run; expected its folder, --resume runs/NAME, or "
                             "beside it the run's own --output-dir")
        folder = Path(output_dir)
        if folder.is_dir() and not holds_run(folder) and any(
                entry.name[0] != "." and entry.suffix != ".part" for entry in folder.iterdir()):
            raise InputError(f"--output-dir {folder} holds files, and no run to go on with; choose a new folder")
        return folder
    path = Path(resume)
    folder = path.parent if path.name == LAST and not path.is_dir() else path
    if path.is_file() and path.name != LAST:
        raise InputError(f"--resume {resume} is no run's folder and no {LAST}, which holds the state of the training; "
                         f"give one of them, or start a new run from these weights: --pretrained {resume}")
    if not holds_run(folder):
        raise InputError(f"--resume {resume}: there is no run; expected a folder with {LAST} or {CONFIG}")
    if output_dir is not None and Path(output_dir).resolve() != folder.resolve():
        raise InputError(f"--output-dir {output_dir} is not the folder of --resume {resume}; leave it out, as a run "
                         f"goes on in its own folder")
    return folder


def holds_run(folder):
    return any((folder / name).is_file() for name in (LAST, CONFIG))


def read_run(folder):
    """The entries of last.pt in a folder; before there is one, those of config.json; None where there is neither.
    Options and recipe have today's names."""
    entries = _read_config(folder)
    if (folder / LAST).is_file():
        entries = read_checkpoint(folder / LAST)
        if not {"options", "n_steps", "training"} <= entries.keys():
            raise InputError(f"{folder / LAST} holds no state of a training; expected one that train_vit.py wrote. "
                             f"--pretrained {folder / LAST} starts a new run from its weights")
    if entries is None:
        return None
    return entries | {section: renamed(entries[section], section) for section in ("options", "recipe")
                      if section in entries}


def _read_config(folder):
    """The entries of config.json, or None where there is none. Raises InputError where it is not that of a run."""
    try:
        entries = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} is damaged ({error}); choose another --output-dir") from error
    if not isinstance(entries, dict) or not {"options", "n_steps", "n_images", "class_names"} <= entries.keys():
        raise InputError(f"{folder / CONFIG} is not that of a training run; choose another --output-dir")
    for name, value in entries["options"].items():
        entries["options"][name] = tuple(value) if isinstance(value, list) else value  # JSON has no pairs
    return entries


def device_to_resume(options):
    """The device that the options ask for; if they resume a run and name none, the run's."""
    if options.resume and "device" not in options.given:
        config = _read_config(folder_to_resume(options.resume, options.output_dir))
        return config["options"]["device"] if config else options.device
    return options.device


def options_to_resume(given, saved):
    """The options of a resumed run: the saved ones, except those that may change and were given.

    given: {name: value} of those on the command line. Raises InputError for one that would make another run of it.
    """
    for name, value in given.items():
        if name not in CHANGEABLE and value != saved.get(name):  # tuples both, if there are several
            flag = f"--{name.replace('_', '-')}"
            own = "which had none" if saved.get(name) is None else f"{saved[name]}"
            raise InputError(f"{flag} {value} is not that of the run, {own}; leave {flag} out to go on "
                             f"with it, or start a new run, from its weights with --pretrained")
    return {**saved, **{name: value for name, value in given.items() if name in CHANGEABLE}}


def changes_since(saved, class_names, n_images, n_processes, **files):
    """A list of warnings about what has changed since a resumed run began. Raises InputError where the classes differ.

    files: fingerprints of the files of each set, by the name under which the run keeps them.
    """
    if saved["class_names"] != class_names:
        raise InputError(f"the classes of the images, {', '.join(class_names)}, are not those of the run, "
                         f"{', '.join(saved['class_names'])}; give the --data-dir that it had")
    changes = []
    for name, now in (("training images", n_images), ("processes", n_processes)):
        before = saved.get(f"n_{name.split()[-1]}", now)
        if before != now:
            changes.append(f"there are {now:,} {name}, and the run had {before:,}: it goes on, but does not end as it "
                           f"would have ended without the change")
    for name, now in files.items():
        if saved.get(name, now) != now and not changes:
            changes.append(f"the {name.replace('_', ' ')} or their classes are others than when the run began: it goes "
                           f"on, but does not end as it would have ended without the change")
    return changes


class Saver(Callback):
    """Writes the files of a run, and prints epochs, at most one a second.

    folder, model   where, and the whole model as it is to be saved
    preprocessing   of the checkpoints
    config          further entries of last.pt; best.pt gets the options among them, and validation_files
    objective       says which epoch is the best one, and how its values are printed
    head_only       whether model.head alone is trained
    resumed         the training entries of last.pt of a resumed run, or None

    Writing takes at most about a tenth of the time: short epochs are written together.
    """

    def __init__(self, folder, model, preprocessing, config, objective, head_only=False, resumed=None):
        self.folder, self.model, self.preprocessing, self.config = folder, model, preprocessing, config
        self.objective, self.head_only, resumed = objective, head_only, resumed or {}
        self.best_weights = None  # not yet written
        self.saved_step, self.elapsed_before = resumed.get("step", 0), resumed.get("elapsed", 0.0)
        self.started = self.saved_at = time.monotonic()
        self.cost = self.printed_at = 0.0

    @property
    def elapsed(self):
        """Seconds of the run, all its parts together."""
        return self.elapsed_before + time.monotonic() - self.started

    def on_epoch(self, state):
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
        """best.pt where there is a better one, last.pt and history.csv."""
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
        """A checkpoint of the whole model with these weights of what was trained in it."""
        if self.head_only:
            weights = self.model.state_dict() | {f"head.{key}": value for key, value in weights.items()}
        save_model(self.model, self.folder / name, self.preprocessing, state_dict=weights, **more)


def _write_history(history, path):
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("epoch", *history))
    rows.writerows((i + 1, *values) for i, values in enumerate(zip(*history.values(), strict=True)))
    write_whole(path, lambda file: file.write(text.getvalue().encode()))
