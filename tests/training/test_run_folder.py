"""A run's folder: complete files, one run at a time, and options that may change on a resume."""

import argparse
import builtins
import copy
import csv
import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vit_bridge import system
from vit_bridge.models.convnet import ConvNet
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.system import write_whole
from vit_bridge.training import run_folder
from vit_bridge.training.linear_probe import Heads
from vit_bridge.training.objectives import Classification
from vit_bridge.training.run_folder import (
    CHANGEABLE,
    Saver,
    changes_since,
    device_to_resume,
    folder_to_resume,
    lock_folder,
    options_to_resume,
    read_run,
)
from vit_bridge.weights.checkpoints import load, read_checkpoint, save_model
from vit_model import InputError

NAMES = ["cat", "dog", "eel"]
PREPROCESSING = Preprocessing(8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", NAMES)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def small_model(seed=0):
    torch.manual_seed(seed)
    return ConvNet(8, 3, 3, (4,), (1,), 1)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- Files that appear whole


def full_disk(*_):
    raise FULL


@pytest.mark.parametrize("write", [
    pytest.param(lambda path: write_whole(path, lambda file: file.write(b"new")), id="bytes"),
    pytest.param(lambda path: save_model(small_model(), path), id="checkpoint")])
def test_write_whole_keeps_the_old_file_on_a_full_disk(write, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"\Acannot write [^\n]*last\.pt \(No space left on device\)[^\n]*\Z"):
        write(path)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["last.pt"]


def test_save_model_reports_the_disk_error_hidden_by_torch(tmp_path):
    """torch.save hides the disk's error behind its own; a limit on file sizes imitates a full disk."""
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"\Acannot write [^\n]*\(File too large\)[^\n]*\Z"):
            save_model(small_model(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["last.pt"]


def test_save_model_keeps_the_old_file_after_a_partial_write(tmp_path, monkeypatch):
    class Filling:
        """A file with room for only 100 bytes."""

        def __init__(self, file):
            self.file, self.room = file, 100

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise FULL
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "best.pt"
    path.write_bytes(b"old")
    opened = builtins.open
    monkeypatch.setattr("vit_bridge.system.open", lambda *args: Filling(opened(*args)), raising=False)
    with pytest.raises(InputError, match=r"\A[^\n]*No space left on device[^\n]*\Z"):
        save_model(small_model(), path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["best.pt"]


def test_write_whole_syncs_before_renaming(tmp_path, monkeypatch):
    """The order is write, flush, sync, rename, so that no name ever belongs to half a file."""
    path, order = tmp_path / "last.pt", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        size = os.fstat(handle).st_size
        order.append(("sync", size if os.path.isfile(f"/proc/self/fd/{handle}") else "folder", path.read_bytes()))
        fsync(handle)

    def replaced(part, to):
        order.append(("rename", os.path.basename(part), path.read_bytes()))
        replace(part, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_whole(path, lambda file: file.write(b"newer"))
    assert order[:2] == [("sync", 5, b"old"), ("rename", "last.pt.part", b"old")]
    assert order[2][1:] == ("folder", b"newer")


def test_write_whole_keeps_the_old_file_when_interrupted(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", interrupted)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a"]


def test_write_whole_overwrites_a_leftover_part_file(tmp_path):
    (tmp_path / "a.part").write_bytes(b"half of an earlier write")
    write_whole(tmp_path / "a", lambda file: file.write(b"whole"))
    assert names_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


# ---- One run at a time

HOLDER = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, 2); print('held', flush=True); input()"


def test_lock_folder_refuses_a_folder_another_run_holds(tmp_path):
    holder = subprocess.Popen([sys.executable, "-S", "-c", HOLDER, tmp_path / ".lock"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"\Aanother run is writing to [^\n]*; wait for it, or choose another"):
            lock_folder(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    lock_folder(tmp_path).close()  # the system released it when the process ended


def test_lock_folder_blocks_other_processes_until_closed(tmp_path):
    attempt = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    file = lock_folder(tmp_path)
    codes = []
    for _ in range(2):
        codes.append(subprocess.run([sys.executable, "-S", "-c", attempt, tmp_path / ".lock"], capture_output=True,
                                    check=False).returncode)
        file.close()
    assert codes == [1, 0]


# ---- Which run


@pytest.fixture
def run_at(tmp_path):
    """Return the folder of a run that was cut before its first checkpoint."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(options={}, n_steps=3, n_images=4, class_names=NAMES)))
    return folder


def test_folder_to_resume_accepts_folder_checkpoint_or_output_dir(run_at, tmp_path):
    assert folder_to_resume(str(run_at), None) == run_at
    assert folder_to_resume(True, str(run_at)) == run_at
    assert folder_to_resume(str(run_at), str(run_at.parent / ".." / "runs" / "a")) == run_at
    (run_at / "last.pt").touch()
    assert folder_to_resume(str(run_at / "last.pt"), None) == run_at
    assert folder_to_resume(True, str(tmp_path / "new")) == tmp_path / "new"  # a new run


def test_folder_to_resume_starts_only_in_an_empty_folder(run_at):
    empty = run_at.parent / "b"
    empty.mkdir()
    for name in (".lock", "config.json.part"):  # left by a run killed in its first second
        (empty / name).touch()
        assert folder_to_resume(True, str(empty)) == empty
    (empty / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds files but no run to resume"):
        folder_to_resume(True, str(empty))


@pytest.mark.parametrize(("name", "words"), [
    ("nowhere", "there is no run"), ("a/nowhere.pt", "there is no run"), ("a/best.pt", "--pretrained"),
    ("a/config.json", "neither a run's folder"), (".", "there is no run"), ("a/pictures", "there is no run")])
def test_folder_to_resume_refuses_what_is_not_a_run(name, words, run_at):
    (run_at / "best.pt").touch()
    (run_at / "pictures").mkdir()
    path = run_at.parent / name
    with pytest.raises(InputError, match=rf"\A--resume {path}[^\n]*{words}[^\n]*\Z"):
        folder_to_resume(str(path), None)


def test_folder_to_resume_refuses_a_second_or_missing_folder(run_at, tmp_path):
    with pytest.raises(InputError, match="leave it out, because a run resumes in its own folder"):
        folder_to_resume(str(run_at), str(tmp_path / "other"))
    with pytest.raises(InputError, match="--resume alone does not specify a run"):
        folder_to_resume(True, None)


def test_read_run_prefers_last_pt_to_config_json(run_at, tmp_path):
    assert read_run(tmp_path) is None
    assert read_run(run_at)["n_steps"] == 3
    save_model(small_model(), run_at / "last.pt", PREPROCESSING, options={}, n_steps=5, n_images=4, training={})
    assert read_run(run_at)["n_steps"] == 5
    assert read_run(run_at)["class_names"] == NAMES


@pytest.mark.parametrize("text", ["", "{", "[]", "{\"model_type\": \"vit\"}", "{\"options\": {}}", "\x00"])
def test_read_run_refuses_a_bad_config(text, run_at):
    (run_at / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"\A[^\n]*config\.json is [^\n]*\Z"):
        read_run(run_at)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_read_run_refuses_a_bad_last_checkpoint(content, run_at):
    if content is None:
        save_model(small_model(), run_at / "last.pt", PREPROCESSING)
    else:
        (run_at / "last.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"\A[^\n]*last\.pt [^\n]*\Z"):
        read_run(run_at)


# ---- What may change


def test_options_to_resume_names_both_values_of_a_changed_option():
    saved = dict(lr=1e-3, seed=0, label_smoothing=0.1, minutes=2.0, epochs=None, class_weights=False, data_dir="x")
    for given, words in ((dict(lr=2e-3), "--lr 0.002 differs from the run's 0.001; leave --lr out"),
                         (dict(label_smoothing=0.0), "--label-smoothing 0.0 differs from the run's 0.1;"),
                         (dict(epochs=3), "--epochs 3 differs from the run, which was started without --epochs;"),
                         (dict(class_weights=True), "--class-weights True differs from the run's False;")):
        with pytest.raises(InputError) as error:
            options_to_resume(given, saved)
        assert str(error.value).startswith(words)
        assert "\n" not in str(error.value)
    assert options_to_resume(dict(lr=1e-3, minutes=2.0), saved) == saved


def test_options_to_resume_takes_changeable_options_as_given():
    saved = {name: "old" for name in CHANGEABLE} | dict(lr=1.0)
    for name in CHANGEABLE:
        assert options_to_resume({name: "new"}, saved) == {**saved, name: "new"}
    assert set(CHANGEABLE) == {"resume", "output_dir", "data_dir", "device", "num_workers", "skip_corrupt",
                               "save_minutes", "compile", "grad_accum_steps", "grad_checkpointing"}


def test_changes_since_refuses_classes_and_warns_about_counts():
    saved = dict(class_names=NAMES, n_images=1200, n_processes=1)
    assert changes_since(saved, list(NAMES), 1200, 1) == []
    images, processes = changes_since(saved, list(NAMES), 1100, 2)
    assert "1,100 training images, but the run started with 1,200" in images
    assert "2 processes, but the run started with 1" in processes
    for other, words in ((["cat", "dog"], "3: no name instead of 'eel' [(]2"), (["dog", "cat", "eel"], "1: 'dog'")):
        with pytest.raises(InputError, match=f"differ from the run's, first at position {words}"):
            changes_since(saved, other, 1200, 1)


def test_device_to_resume_is_the_old_one_unless_given(tmp_path):
    config = dict(options=dict(device="cuda:1"), n_steps=3, n_images=5, class_names=NAMES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = dict(resume=str(tmp_path), output_dir=None, device="auto")
    assert device_to_resume(argparse.Namespace(**asked, given={})) == "cuda:1"
    assert device_to_resume(argparse.Namespace(**asked | dict(device="cpu"), given=dict(device="cpu"))) == "cpu"
    assert device_to_resume(argparse.Namespace(**asked | dict(resume=None), given={})) == "auto"
    new = dict(resume=True, output_dir=str(tmp_path / "new"), device="auto")
    assert device_to_resume(argparse.Namespace(**new, given={})) == "auto"


# ---- Writing

HISTORY = ("train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "lr", "seconds", "images_per_second")


class State:
    """A TrainState for a Saver; its weights hold the number of the epoch."""

    def __init__(self, model, average=False):
        self.model, self.step, self.history = model, 0, {name: [] for name in HISTORY}
        self.average, self.sound = copy.deepcopy(model) if average else None, True

    @property
    def trained(self):
        return self.model if self.average is None else self.average

    def state_dict(self):
        return dict(step=self.step)

    def is_finite(self):
        return self.sound

    def epoch(self, val_acc, balanced=0.0):
        self.step += 1
        for name in HISTORY:
            self.history[name].append(float(self.step))
        self.history["val_acc"][-1], self.history["val_balanced_acc"][-1] = val_acc, balanced
        fill(self.model, self.step)
        if self.average is not None:
            fill(self.average, 100 + self.step)
        return self


def fill(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def value_in(path):
    return read_checkpoint(path)["state_dict"]["head.bias"][0].item()


@pytest.fixture
def clock(monkeypatch):
    """Return run_folder's clock, which shows clock[0]; writing a checkpoint takes clock[1] seconds."""
    now = [1000.0, 0.0]
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(*args, **kwargs):
        now[0] += now[1]
        save_model(*args, **kwargs)

    monkeypatch.setattr(run_folder, "save_model", slow)
    return now


def saver_of(folder, model, n_steps=100, **more):
    config = dict(options=dict(seed=3, data_dir="photos"), n_steps=n_steps, validation_files="a1b2")
    return Saver(folder, model, PREPROCESSING, config, **dict(objective=Classification()) | more)


@pytest.mark.parametrize(("criterion", "best"), [("val_acc", 4), ("val_balanced_acc", 3)])
def test_saver_keeps_the_last_epoch_with_the_best_criterion(criterion, best, tmp_path, clock):
    state = State(small_model())
    weights = [1, 1, 1] if criterion == "val_balanced_acc" else None
    saver = saver_of(tmp_path, state.model, objective=Classification(class_weights=weights))
    for val_acc, balanced in ((0.5, 0.1), (0.9, 0.2), (0.7, 0.6), (0.9, 0.5), (0.3, 0.1)):
        saver.on_epoch(state.epoch(val_acc, balanced))
    entries = read_checkpoint(tmp_path / "best.pt")
    assert (entries["epoch"], value_in(tmp_path / "best.pt")) == (best, best)
    assert entries["val_acc"] == (0.9 if criterion == "val_acc" else 0.7)
    assert entries["options"] == dict(seed=3, data_dir="photos")
    assert entries["validation_files"] == "a1b2"
    assert value_in(tmp_path / "last.pt") == 5
    value = 0.9 if criterion == "val_acc" else 0.6
    assert read_checkpoint(tmp_path / "last.pt")["training"]["best"] == dict(epoch=best, value=value)


def test_saver_keeps_a_first_epoch_with_zero_accuracy(tmp_path, clock):
    state = State(small_model())
    saver_of(tmp_path, state.model).on_epoch(state.epoch(0.0))
    assert value_in(tmp_path / "best.pt") == 1


def test_saver_writes_best_before_last(tmp_path, monkeypatch):
    state, written = State(small_model()), []
    monkeypatch.setattr(run_folder, "save_model", lambda model, path, *_, **more: written.append(path.name))
    saver_of(tmp_path, state.model).on_epoch(state.epoch(0.5))
    assert written == ["best.pt", "last.pt"]
    assert names_in(tmp_path) == ["history.csv"]


def test_saver_groups_short_epochs_and_always_writes_the_last(tmp_path, clock):
    """Saving takes 2 s (best.pt and last.pt) or 1 s (last.pt alone), and an epoch 3 s.

    The next save comes after 9 times as long as the last one took.
    """
    state, kept = State(small_model()), []
    saver = saver_of(tmp_path, state.model, n_steps=20)
    clock[0], clock[1] = clock[0] + 1, 1.0
    for epoch in range(1, 21):
        clock[0] += 3
        saver.on_epoch(state.epoch(0.9 if epoch == 5 else 0.5))
        kept.append(int(value_in(tmp_path / "last.pt")))
    assert sorted(set(kept)) == [1, 7, 13, 16, 19, 20]
    assert value_in(tmp_path / "best.pt") == 5  # although it was written at the end of epoch 7
    assert read_checkpoint(tmp_path / "best.pt")["epoch"] == 5
    assert saver.saved_step == 20


def test_saver_writes_the_averaged_weights_to_both_files(tmp_path, clock):
    state = State(small_model(), average=True)
    saver_of(tmp_path, state.model).on_epoch(state.epoch(0.5))
    assert value_in(tmp_path / "best.pt") == value_in(tmp_path / "last.pt") == 101
    assert state.model.head.bias[0] == 1  # the training continues with its own weights


@pytest.mark.parametrize("average", [False, True])
def test_saver_writes_a_trained_head_in_its_whole_model(average, tmp_path, clock):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    state = State(Heads(model), average)
    saver_of(tmp_path, model).on_epoch(state.epoch(0.5))
    for name in ("best.pt", "last.pt"):
        saved = load(tmp_path / name).state_dict()
        assert {key for key in before if not torch.equal(saved[key], before[key])} == {"head.weight", "head.bias"}
        assert value_in(tmp_path / name) == (101 if average else 1)


def test_saver_copies_best_weights_that_wait_to_be_written(tmp_path, clock):
    state = State(small_model())
    saver = saver_of(tmp_path, state.model)
    saver.cost = 1e9
    saver.on_epoch(state.epoch(0.9))
    saver.on_epoch(state.epoch(0.1))
    assert names_in(tmp_path) == []
    saver.on_save(state)
    assert value_in(tmp_path / "best.pt") == 1
    assert value_in(tmp_path / "last.pt") == 2


def test_saver_remembers_the_best_epoch_of_a_resumed_run(tmp_path, clock):
    state = State(small_model()).epoch(0.8)  # epoch 1, before the run was cut
    saver = saver_of(tmp_path, state.model, resumed=dict(step=4, elapsed=60.0))
    assert (saver.saved_step, saver.elapsed) == (4, 60.0)
    saver.on_epoch(state.epoch(0.7))
    assert names_in(tmp_path) == ["history.csv", "last.pt"]
    saver.on_epoch(state.epoch(0.85))
    assert value_in(tmp_path / "best.pt") == 3


def test_read_run_translates_names_of_older_versions(run_at):
    old = dict(options=dict(accumulate=3, workers=2, lr=None), n_steps=3, n_images=4, class_names=NAMES,
               recipe=dict(options=dict(pool="mean"), low=[0.75, 0.6], model_ema=None))
    (run_at / "config.json").write_text(json.dumps(old))
    entries = read_run(run_at)
    assert entries["options"] == dict(grad_accum_steps=3, num_workers=2, lr=None)
    assert entries["recipe"] == dict(model_options=dict(pool="mean"), progressive_resize=[0.75, 0.6], ema_decay=None)


def test_saver_writes_a_last_checkpoint_usable_alone(tmp_path, clock):
    state = State(small_model())
    saver_of(tmp_path, state.model).on_epoch(state.epoch(0.5))
    moved = (tmp_path / "last.pt").rename(tmp_path.parent / "elsewhere.pt")
    model = load(moved)
    assert model.preprocessing == PREPROCESSING
    assert not model.training


def test_saver_writes_one_history_row_per_epoch(tmp_path, clock):
    state = State(small_model())
    saver = saver_of(tmp_path, state.model)
    for value in (0.25, 1 / 3):
        saver.on_epoch(state.epoch(value))
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert tuple(rows[0])[1:] == HISTORY
    assert [float(row["val_acc"]) for row in rows] == [0.25, 1 / 3]


def test_saver_prints_once_a_second_and_the_last_epoch(tmp_path, clock, capsys):
    state = State(small_model())
    saver = saver_of(tmp_path, state.model, n_steps=9)
    for _ in range(9):
        clock[0] += 0.3
        saver.on_epoch(state.epoch(0.5))
    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["1", "5", "9"]


# ---- What a result was measured on ------------------------------------------------------------------------


def test_machine_names_the_widest_cpu_instructions(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Chip 9\nflags\t\t: fpu avx2 avx512f avx512_bf16\n")
    monkeypatch.setattr(system, "Path", lambda name: info)
    assert system.machine() == f"Chip 9 with AVX512-BF16, {os.cpu_count()} cores, {platform.system()}"
    info.write_text("model name\t: Chip 1\nflags\t\t: fpu\n")
    assert system.machine().startswith("Chip 1, ")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_marks_changed_code_as_dirty(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)

    monkeypatch.setattr(system, "ROOT", tmp_path)
    assert system.commit() == "unknown"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/a.json"):
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    assert re.fullmatch(r"[0-9a-f]{7,}", system.commit())
    (tmp_path / "benchmarks" / "results" / "a.json").write_text("2")
    assert "dirty" not in system.commit()
    (tmp_path / "code.py").write_text("2")
    assert system.commit().endswith("-dirty")


def test_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert system.commit() == "unknown"


def test_changes_since_warns_of_other_files_where_the_counts_agree():
    saved = dict(class_names=list(NAMES), n_images=1200, n_processes=1, validation_files="a1", test_files="b2")
    same = dict(validation_files="a1", test_files="b2")
    assert changes_since(saved, list(NAMES), 1200, 1, **same, training_files="unknown then") == []
    change, = changes_since(saved, list(NAMES), 1200, 1, **same | dict(validation_files="c3"))
    assert change.startswith("the validation files or their classes have changed since the run started")
