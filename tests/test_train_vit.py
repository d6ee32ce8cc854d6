"""The training command: what it is given, what it leaves, and how it goes on after whatever cut it."""

import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vit
import trainer
from checkpoints import read_checkpoint, save_model
from cnn_model import ConvNet
from command_line import Interrupts
from drawn_shapes import SHAPES
from model_zoo import OURS_FOLDER, load_model
from run_folder import CHANGEABLE
from train_vit import fit_head, parse, unevenness
from vit_data import make_shapes
from vit_model import VisionTransformer

ROOT = Path(__file__).parent.parent


def run(words, capsys):
    """Exit code, and what was printed as errors, of train_vit.py with these words."""
    with pytest.raises(SystemExit) as stop:
        train_vit.script(lambda: train_vit.main(list(map(str, words))))
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("words", "expected"), [
    (["--epochs", 0], "--epochs: 0 is out of range"),
    (["--lr", "nan"], "--lr: nan is out of range"),
    (["--minutes", -1], "--minutes: -1 is out of range"),
    (["--batch-size", "many"], "--batch-size: many is out of range"),
    (["--epochs", 1, "--minutes", 1], "not allowed with"),
    (["--data-dir", "nowhere"], "nowhere"),
    (["--dataset", "imagenet"], "imagenet"),
    (["--device", "abacus"], "abacus"),
    (["--val-fraction", 2], "2.0"),
    (["--model", "vgg"], "vgg"),
    (["--patch-size", 5, "--img-size", 32], "not divisible by patch_size 5x5"),
    (["--drop-path", 1], "drop_path 1.0"),
    (["--layer-decay", 0], "--layer-decay: 0 is out of range"),
    (["--model-ema", 2], "--model-ema: 2 is out of range"),
    (["--accumulate", 0], "--accumulate: 0 is out of range"),
    (["--save-minutes", 0], "--save-minutes: 0 is out of range"),
    (["--pretrained", "vit_giant"], "vit_giant"),
    (["--pretrained", "nowhere.pt"], "there is no file nowhere.pt"),
    (["--pretrained", "vit_nano_shapes", "--model", "vit_tiny"], "--model vit_tiny has no place beside --pretrained"),
    (["--pretrained", "vit_nano_shapes", "--patch-size", 8], "--patch-size 8 has no place beside --pretrained"),
    (["--freeze-backbone"], "give --pretrained"),
    (["--resume"], "--resume alone does not say which run"),
    (["--resume", "nowhere"], "--resume nowhere: there is no run"),
    (["evaluate"], "--checkpoint")])
def test_bad_words_end_in_one_line_and_exit_code_2(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = make_shapes(40, 32)
    monkeypatch.setattr("vit_data.make_shapes", lambda *args, **kwargs: drawn)
    code, error = run(words, capsys)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_holds_files_is_left_alone(capsys, tmp_path):
    (tmp_path / "best.pt").write_text("of an earlier run")
    code, error = run(["--output-dir", tmp_path, "--dry-run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "already holds files" in error
    assert (tmp_path / "best.pt").read_text() == "of an earlier run"


def test_an_output_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, error = run(["--output-dir", tmp_path / "file" / "run", "--dry-run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "cannot write to --output-dir" in error


def test_a_run_leaves_its_files_and_they_agree(tmp_path, capsys):
    torch.manual_seed(0)
    train_vit.main(["--dry-run", "--output-dir", str(tmp_path / "run"), "--seed", "3", "--device", "cpu"])
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.json", "history.csv", "result.json", "best.pt", "last.pt", "curves.png", "attention.png"}
    result = json.loads((folder / "result.json").read_text())
    assert result["seed"] == 3
    assert result["test_acc"] == result["test_correct"] / result["test_n"]
    low, high = result["test_interval"]
    assert low <= result["test_acc"] <= high
    assert {"seconds", "images_per_second", "data_share", "linear_test_acc"} <= set(result)
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    assert float(rows[0]["val_acc"]) == result["val_acc"]
    model = load_model(folder / "best.pt")
    assert len(model.class_names) == 10
    assert not model.training
    assert "--seed 3 --device cpu --steps 2" in capsys.readouterr().out


def make_folder(root, side, parts=("",), classes=("red", "blue"), n=12):
    """Two classes of twelve JPEG images each, red and blue, in every part; or other classes."""
    generator = np.random.default_rng(0)
    for part in parts:
        for channel, name in zip((0, 2) * len(classes), classes, strict=False):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 60, (side, side, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.mark.parametrize("side", [24, 72])
@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_a_folder_of_images_from_nothing_to_a_result(side, parts, tmp_path, capsys):
    data = make_folder(tmp_path / "photos", side, parts)
    words = ["--dry-run", "--data-dir", data, "--output-dir", tmp_path / "run", "--device", "cpu",
             "--model", "vit_nano", "--img-size", side, "--batch-size", 4]
    train_vit.main(list(map(str, words)))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    split = "val" if parts == ("",) else "test"
    assert result[f"{split}_n"] == {"val": 2, "test": 8}[split]
    assert ("There are no test images" in capsys.readouterr().out) == (split == "val")
    assert load_model(tmp_path / "run" / "best.pt").class_names == ["blue", "red"]


def test_a_corrupt_test_image_is_named_and_the_run_is_kept(tmp_path, capsys):
    data = make_folder(tmp_path / "photos", 24, ("train", "test"))
    (data / "test" / "red" / "5.jpg").write_bytes(b"no image")
    code, error = run(["--dry-run", "--data-dir", data, "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "5.jpg" in error
    assert {"best.pt", "result.json", "curves.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images of 24 pixels, which no test may change: 22 train, 2 validate."""
    return make_folder(tmp_path_factory.mktemp("data") / "my photos", 24)


@pytest.fixture
def untested(monkeypatch):
    """Trainings end with their last step: no test, no pictures, no result.json."""
    monkeypatch.setattr(train_vit.TrainingRun, "finish", lambda self: None)


def train(folder, *words):
    train_vit.main([*map(str, words), "--device", "cpu", "--amp", "off", "--output-dir", str(folder)])


def prepared(*words):
    """A TrainingRun that stands before its first step."""
    options = parse([*map(str, words), "--device", "cpu", "--steps", "1"])
    with train_vit.processes(options.device) as device, Interrupts() as interrupts:
        made = train_vit.TrainingRun(options, device, interrupts)
        made.prepare()
    return made


def tensors_in(entries, path=""):
    """The tensors in nested dicts and lists, by their place."""
    if isinstance(entries, torch.Tensor):
        return {path: entries}
    items = entries.items() if isinstance(entries, dict) else enumerate(entries) if isinstance(entries, list) else ()
    return {place: tensor for key, value in items for place, tensor in tensors_in(value, f"{path}/{key}").items()}


def outcome(folder):
    """All that a run becomes but its times: the tensors of both checkpoints, and the history."""
    last, best = (read_checkpoint(folder / name) for name in ("last.pt", "best.pt"))
    history = {name: values for name, values in last["training"]["history"].items()
               if name not in ("seconds", "images_per_second")}
    with open(folder / "history.csv") as file:
        rows = [{name: row[name] for name in history} for row in csv.DictReader(file)]
    facts = history, rows, last["training"]["step"], last["training"]["best"], best["epoch"], last["epoch"]
    return tensors_in(dict(last=last, best=best)), facts


def assert_same_run(folder, other):
    (tensors, facts), (others, other_facts) = outcome(folder), outcome(other)
    assert facts == other_facts
    assert tensors.keys() == others.keys()
    assert len(tensors) > 100
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def at_step(monkeypatch, number, act):
    """Has act() called in the middle of the training step of this number, once."""
    step, done = trainer.Trainer.step, []

    def acting(self, images, labels, n_all, state, run):
        if state.step == number and not done:
            done.append(True)
            act()
        step(self, images, labels, n_all, state, run)

    monkeypatch.setattr(trainer.Trainer, "step", acting)


class PowerCut(BaseException):
    """Ends the process, as it were: nothing catches it."""


def cut():
    raise PowerCut


# ---- A run that is cut

# Seven steps in three epochs of three batches, the last epoch a part, with all that chance and state go into.
SEVEN = ["--steps", 7, "--batch-size", 8, "--drop-path", 0.3, "--model-ema", 0.9, "--class-weights",
         "--layer-decay", 0.7, "--seed", 4]


@pytest.fixture(scope="module")
def uncut(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vit.TrainingRun, "finish", lambda self: None)
        train(folder, "--data-dir", photos, *SEVEN)
    return folder


@pytest.mark.parametrize(("number", "code", "step"), [
    (signal.SIGINT, 130, 0), (signal.SIGINT, 130, 4), (signal.SIGTERM, 143, 5)])
def test_a_signal_in_training_saves_says_the_command_and_the_run_ends_as_if_uncut(
        number, code, step, photos, uncut, untested, tmp_path, capsys, monkeypatch):
    folder, before = tmp_path / "a run", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    words = ["--data-dir", photos, *SEVEN, "--device", "cpu", "--amp", "off", "--output-dir", folder]
    ended, error = run(words, capsys)
    assert (ended, error.count("\n")) == (code, 1)
    assert f"kept at step {step + 1} of 7; go on with: " in error
    assert read_checkpoint(folder / "last.pt")["training"]["step"] == step + 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    command = shlex.split(error.split("go on with: ")[1])
    assert command == ["python", "train_vit.py", "--resume", str(folder)]
    train_vit.main(command[2:])
    assert f"Going on with {folder}." in capsys.readouterr().out
    assert_same_run(folder, uncut)


def test_a_signal_in_an_evaluation_is_kept_too(photos, uncut, untested, tmp_path, capsys, monkeypatch):
    evaluate = trainer.Trainer.evaluate

    def interrupted(self, loader, model=None, state=None, run=None):
        if state is not None and state.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, loader, model, state, run)

    monkeypatch.setattr(trainer.Trainer, "evaluate", interrupted)
    words = ["--data-dir", photos, *SEVEN, "--device", "cpu", "--amp", "off", "--output-dir", tmp_path / "run"]
    code, error = run(words, capsys)
    assert (code, error.count("\n")) == (130, 1)
    assert "kept at step 6 of 7" in error
    monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)
    train_vit.main(["--resume", str(tmp_path / "run" / "last.pt")])
    assert_same_run(tmp_path / "run", uncut)


def test_a_second_signal_ends_the_training_at_once(photos, untested, tmp_path, monkeypatch):
    codes = []

    def end(code):
        codes.append(code)
        raise PowerCut

    monkeypatch.setattr(os, "_exit", end)
    at_step(monkeypatch, 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(PowerCut):
        train(tmp_path / "run", "--data-dir", photos, *SEVEN)
    assert codes == [130]


def test_a_signal_before_the_training_leaves_no_folder(photos, tmp_path, capsys, monkeypatch):
    def interrupted(**_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_vit, "get_data_loaders", interrupted)
    code, error = run(["--data-dir", photos, "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (143, 1)
    assert not list(tmp_path.iterdir())


def test_a_real_ctrl_c_in_a_terminal(photos, tmp_path):
    """The same from outside, once: another process, a real signal, the state kept."""
    folder = tmp_path / "run"
    words = ["--data-dir", photos, "--steps", "100000", "--batch-size", "8", "--device", "cpu", "--output-dir", folder]
    process = subprocess.Popen([sys.executable, ROOT / "train_vit.py", *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    step = read_checkpoint(folder / "last.pt")["training"]["step"]
    assert f"stopped by SIGINT; kept at step {step} of 100000; go on with: python train_vit.py --resume" in error


@pytest.mark.parametrize("form", ["folder", "last.pt", "output-dir"])
def test_a_power_cut_costs_what_was_done_since_the_last_checkpoint(form, photos, uncut, untested, tmp_path, monkeypatch,
                                                                   capsys):
    folder = tmp_path / "run"
    at_step(monkeypatch, 4, cut)
    with pytest.raises(PowerCut):
        train(folder, "--data-dir", photos, *SEVEN, "--save-minutes", "0.00001")
    assert read_checkpoint(folder / "last.pt")["training"]["step"] == 4
    again = {"folder": ["--resume", folder], "last.pt": ["--resume", folder / "last.pt"],
             "output-dir": ["--resume", "--output-dir", folder, "--data-dir", photos, *SEVEN]}[form]
    train_vit.main(list(map(str, again)))
    assert_same_run(folder, uncut)


def test_with_output_dir_the_same_command_begins_and_goes_on(photos, uncut, untested, tmp_path, monkeypatch, capsys):
    words = ["--data-dir", photos, *SEVEN, "--resume"]
    at_step(monkeypatch, 1, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", *words)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}
    assert "Going on" not in capsys.readouterr().out
    train(tmp_path / "run", *words)
    assert "Going on" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", uncut)


def test_a_run_by_the_clock_goes_on_with_its_number_of_steps(photos, untested, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vit, "steps_within", lambda *args, **settings: 4)
    at_step(monkeypatch, 2, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", "--data-dir", photos, "--minutes", "3", "--batch-size", "8")
    monkeypatch.setattr(train_vit, "steps_within", lambda *args, **settings: pytest.fail("measured again"))
    train_vit.main(["--resume", str(tmp_path / "run"), "--minutes", "3"])
    entries = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (entries["n_steps"], entries["training"]["step"]) == (4, 4)


def test_what_a_run_may_not_go_on_with(photos, uncut, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "step", lambda *_: pytest.fail("a step was taken"))
    folder = shutil.copytree(uncut, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = make_folder(tmp_path / "others", 24, classes=("red", "pink"))
    for words, expected in (
            (["--resume", folder, "--batch-size", 4], "--batch-size 4 is not that of the run, 8"),
            (["--resume", folder, "--epochs", 2], "--epochs 2 is not that of the run, which had none"),
            (["--resume", folder, "--model-ema"], "--model-ema 0.999 is not that of the run, 0.9"),
            (["--resume", folder, "--lr", "2e-3"], "--lr 0.002 is not that of the run, which had none"),
            (["--resume", folder, "--data-dir", others], "are not those of the run, blue, red"),
            (["--resume", folder / "best.pt"], "--pretrained"),
            (["--resume", photos], "there is no run"),
            (["--output-dir", folder], "already holds files")):
        code, error = run(words, capsys)
        assert (code, error.count("\n")) == (2, 1), error
        assert expected in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_images_of_the_same_classes_are_a_warning(photos, untested, tmp_path, capsys, monkeypatch):
    at_step(monkeypatch, 2, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", "--data-dir", photos, "--steps", 4, "--batch-size", 8, "--save-minutes", "0.00001")
    moved = make_folder(tmp_path / "moved", 24, n=11)
    train_vit.main(["--resume", str(tmp_path / "run"), "--data-dir", str(moved)])
    assert "Warning: there are 20 training images, and the run had 22" in capsys.readouterr().out
    entries = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (entries["training"]["step"], entries["options"]["data_dir"]) == (4, str(moved))


def test_a_run_cut_in_its_test_is_tested_and_a_complete_one_is_left_as_it_is(photos, tmp_path, capsys, monkeypatch):
    folder, test_loader = tmp_path / "run", train_vit.get_test_loader
    monkeypatch.setattr(train_vit, "get_test_loader", lambda **_: os.kill(os.getpid(), signal.SIGINT))
    code, error = run(["--data-dir", photos, "--steps", 2, "--batch-size", 8, "--output-dir", folder], capsys)
    assert (code, error.count("\n")) == (130, 1)
    assert "val_n" not in json.loads((folder / "result.json").read_text())
    monkeypatch.setattr(train_vit, "get_test_loader", test_loader)
    monkeypatch.setattr(trainer.Trainer, "step", lambda *_: pytest.fail("a step was taken"))
    train_vit.main(["--resume", str(folder)])
    result = (folder / "result.json").read_bytes()
    assert json.loads(result)["val_n"] == 2
    for name in ("get_data_loaders", "get_test_loader"):
        monkeypatch.setattr(train_vit, name, lambda **_: pytest.fail("images were read"))
    capsys.readouterr()
    train_vit.main(["--resume", str(folder)])
    assert f"The run is complete; its results are in {folder}/result.json." in capsys.readouterr().out
    assert (folder / "result.json").read_bytes() == result


def test_a_folder_that_another_run_writes_to_is_refused(photos, uncut, tmp_path, capsys):
    folder = shutil.copytree(uncut, tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, 2); "
         "print('held', flush=True); input()", folder / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        code, error = run(["--resume", folder], capsys)
    finally:
        holder.kill()
        holder.communicate()
    assert (code, error.count("\n")) == (2, 1)
    assert "another run is writing to" in error


# ---- What goes wrong in a training


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_from_the_file_before(
        photos, uncut, untested, tmp_path, capsys, monkeypatch):
    folder, full, fsync = tmp_path / "run", [], os.fsync

    def sync(handle):
        if full:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    at_step(monkeypatch, 4, lambda: full.append(True))
    code, error = run(["--data-dir", photos, *SEVEN, "--device", "cpu", "--amp", "off", "--save-minutes", "0.00001",
                       "--output-dir", folder], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "No space left on device" in error
    assert f"The last good checkpoint is {folder}/last.pt, step 4 of 7; go on with: python train_vit.py --" in error
    assert not list(folder.glob("*.part"))
    assert read_checkpoint(folder / "last.pt")["training"]["step"] == 4
    full.clear()
    train_vit.main(["--resume", str(folder)])
    assert_same_run(folder, uncut)


def test_a_rate_that_is_too_high_is_named_with_the_step(photos, tmp_path, capsys):
    code, error = run(["--data-dir", photos, "--lr", "1e30", "--batch-size", 8, "--epochs", 2, "--device", "cpu",
                       "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "not finite since step 2 of 6, learning rate 1e+30" in error
    assert "Nothing was kept yet" in error
    assert not (tmp_path / "run" / "last.pt").exists()


def test_after_nan_the_last_good_checkpoint_is_named_and_good(photos, untested, tmp_path, capsys, monkeypatch):
    forward, calls = trainer.CrossEntropy.forward, []

    def failing(self, logits, labels):
        calls.append(torch.is_grad_enabled())
        return forward(self, logits, labels) * (torch.nan if sum(calls) == 5 else 1)

    monkeypatch.setattr(trainer.CrossEntropy, "forward", failing)
    code, error = run(["--data-dir", photos, "--batch-size", 8, "--epochs", 3, "--lr", "0.001", "--device", "cpu",
                       "--save-minutes", "0.00001", "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "not finite since step 5 of 9, learning rate 0.0" in error
    assert f"The last good checkpoint is {tmp_path}/run/last.pt, step 4" in error
    entries = read_checkpoint(tmp_path / "run" / "last.pt")
    assert entries["training"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in tensors_in(entries).values())


# ---- Classes and images


def test_uneven_classes_are_said_and_weights_are_offered(tmp_path, untested, capsys):
    data = make_folder(tmp_path / "photos", 24)
    for i in range(3, 12):
        (data / "blue" / f"{i}.jpg").unlink()
    even = prepared("--data-dir", data, "--output-dir", tmp_path / "a")
    assert "Classes differ in size: red 11, blue 2: look at the balanced accuracy; --class-weights" in \
        capsys.readouterr().out
    assert even.settings["loss_fn"].class_weights is None
    weighted = prepared("--data-dir", data, "--output-dir", tmp_path / "b", "--class-weights")
    assert "red 11, blue 2: --class-weights lets them count alike." in capsys.readouterr().out
    torch.testing.assert_close(weighted.settings["loss_fn"].class_weights, torch.tensor([13 / 4, 13 / 22]))


def test_classes_are_uneven_from_twice_as_many_and_ten_are_shown():
    assert unevenness(["a", "b"], [19, 10]) == ""
    assert unevenness(["a", "b"], [10, 2000]) == "Classes differ in size: b 2,000, a 10"
    many = unevenness([f"c{i}" for i in range(12)], [100 + i for i in range(11)] + [1])
    assert many == ("Classes differ in size: c10 110, c9 109, c8 108, c7 107, c6 106, c3 103, c2 102, c1 101, c0 100, "
                    "c11 1 (the largest and smallest of 12)")


@pytest.mark.parametrize(("words", "criterion"), [([], "val_acc"), (["--class-weights"], "val_balanced_acc")])
def test_with_class_weights_the_best_epoch_is_that_of_the_balanced_accuracy(
        words, criterion, photos, untested, tmp_path, monkeypatch):
    made = []

    class Seen(train_vit.Saver):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(train_vit, "Saver", Seen)
    train(tmp_path / "run", "--data-dir", photos, "--steps", 1, *words)
    assert made[0].criterion == criterion


@pytest.mark.parametrize("side", [24, 72])
def test_a_corrupt_image_is_named_with_what_to_do_about_it(side, tmp_path, capsys):
    data = make_folder(tmp_path / "photos", side, n=3)
    (data / "red" / "1.jpg").write_bytes(b"no image")
    code, error = run(["--data-dir", data, "--output-dir", tmp_path / "run", "--model", "vit_nano", "--img-size", side,
                       "--epochs", 1, "--device", "cpu"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert str(data / "red" / "1.jpg") in error
    assert "--skip-corrupt" in error


@pytest.mark.parametrize("side", [24, 72])
@pytest.mark.parametrize("frozen", [False, True])
def test_corrupt_images_are_skipped_counted_and_named(side, frozen, tmp_path, capsys):
    data = make_folder(tmp_path / "photos", side, n=12)
    bad = [data / "red" / f"{i}.jpg" for i in range(7)]
    for path in bad:
        path.write_bytes(b"no image")
    start = ["--model", "vit_nano", "--img-size", side]
    if frozen:
        save_model(ConvNet(side, 3, 2, (4,), (1,), 1), tmp_path / "start.pt", mean=[0.5] * 3, std=[0.5] * 3)
        start = ["--pretrained", tmp_path / "start.pt", "--freeze-backbone"]
    train(tmp_path / "run", "--data-dir", data, *start, "--epochs", 1, "--skip-corrupt", "--batch-size", 8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "eft out" in line or "more" in line]
    named = [line.removeprefix("Left out, as it cannot be read: ") for line in lines[:5]]
    assert set(named) < set(map(str, bad))
    assert lines[5:] == ["... and 2 more, 7 in all."]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped"] == 7


# ---- Pretrained weights


def shapes_model():
    return load_model(OURS_FOLDER / "vit_nano_shapes.pt")


def test_a_pretrained_model_keeps_its_size_its_normalisation_and_gets_a_head_of_zeros(photos, tmp_path, capsys):
    made, source = prepared("--data-dir", photos, "--output-dir", tmp_path / "run", "--pretrained",
                            "vit_nano_shapes"), shapes_model()
    for loader in (made.train_loader, made.val_loader):
        assert (loader.img_size, tuple(loader.mean), tuple(loader.std), loader.interpolation) == (
            32, tuple(source.mean), tuple(source.std), source.interpolation)
    assert made.data["mean"] == source.mean  # the test images' too
    state, expected = made.model.state_dict(), source.state_dict()
    assert [key for key in expected if key not in ("head.weight", "head.bias")
            and not torch.equal(state[key], expected[key])] == []
    assert state["head.weight"].shape == (2, 96)
    assert not state["head.weight"].any()
    assert not state["head.bias"].any()
    assert "vit_nano_shapes: " in capsys.readouterr().out


def test_another_image_size_resamples_the_positions(photos, tmp_path):
    made = prepared("--data-dir", photos, "--output-dir", tmp_path / "run", "--pretrained", "vit_nano_shapes",
                    "--img-size", 24)
    assert made.train_loader.img_size == made.model.config.img_size == 24
    assert made.model.pos_embed.shape[1] == 1 + 6 * 6


def test_the_head_is_kept_where_the_classes_are_the_same(tmp_path):
    data = make_folder(tmp_path / "photos", 24, classes=sorted(SHAPES), n=2)
    source = shapes_model()
    renamed = tmp_path / "sorted.pt"  # folders come by the alphabet
    save_model(source, renamed, class_names=sorted(SHAPES))
    made = prepared("--data-dir", data, "--output-dir", tmp_path / "run", "--pretrained", renamed)
    assert torch.equal(made.model.head.weight, source.head.weight)
    assert torch.equal(made.model.head.bias, source.head.bias)


def test_a_head_of_zeros_has_the_width_of_its_model_also_where_there_was_none():
    for n_classes in (0, 3):
        for model in (VisionTransformer(8, 4, 3, n_classes, 12, 1, 3), ConvNet(8, 3, n_classes, (4, 6), (1, 1), 1)):
            model.class_names = None
            width = 12 if isinstance(model, VisionTransformer) else 6
            assert fit_head(model, ["a", "b"]).head.weight.shape == (2, width)
            assert model.class_names == ["a", "b"]
            assert model.eval()(torch.zeros(1, 3, 8, 8)).tolist() == [[0, 0]]


@pytest.mark.parametrize("source", ["vit_nano_shapes", "hybrid_shapes", "convnet_shapes", "raw"])
def test_fine_tuning_starts_from_a_file_of_any_kind(source, photos, untested, tmp_path):
    """One step at a rate of 1e-12 leaves the weights where they were."""
    path = OURS_FOLDER / f"{source}.pt"
    if source == "raw":
        torch.manual_seed(0)
        path, model = tmp_path / "raw.pth", VisionTransformer(24, 8, 3, 5, 64, 2, 1)
        torch.save(model.state_dict(), path)
    expected = torch.load(path, weights_only=True)
    expected = expected if source == "raw" else expected["state_dict"]
    train(tmp_path / "run", "--data-dir", photos, "--pretrained", path, "--steps", 1, "--lr", "1e-12")
    model = load_model(tmp_path / "run" / "best.pt")
    assert model.class_names == ["blue", "red"]
    for name, p in model.named_parameters():
        if not name.startswith("head."):
            torch.testing.assert_close(p.detach(), expected[name].float(), rtol=0, atol=1e-6)


def test_the_peak_of_the_rate_is_lower_for_pretrained_weights_unless_the_head_alone_learns(photos, untested, tmp_path):
    rates = {}
    for name, words in (("new", []), ("fine", ["--pretrained", "vit_nano_shapes"]),
                        ("head", ["--pretrained", "vit_nano_shapes", "--freeze-backbone"]), ("own", ["--lr", "0.125"])):
        train(tmp_path / name, "--data-dir", photos, "--steps", 1, *words)
        rates[name] = read_checkpoint(tmp_path / name / "last.pt")["training"]["rate"]
    assert rates == dict(new=2e-3, fine=5e-4, head=2e-3, own=0.125)


@pytest.mark.parametrize("source", ["vit_nano_shapes", "convnet_shapes"])
def test_a_frozen_backbone_is_computed_once_and_exactly_the_head_changes(
        source, photos, untested, tmp_path, monkeypatch, capsys):
    expected = load_model(OURS_FOLDER / f"{source}.pt")
    seen, forward = [], type(expected).forward_features

    def counted(self, images, *args, **kwargs):
        seen.append(len(images))
        return forward(self, images, *args, **kwargs)

    monkeypatch.setattr(type(expected), "forward_features", counted)
    folder = tmp_path / "run"
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    words = ["--data-dir", photos, "--pretrained", source, "--freeze-backbone", "--epochs", 3, "--batch-size", 8]
    code, _ = run([*words, "--output-dir", folder, "--device", "cpu"], capsys)
    assert (code, sum(seen)) == (130, 24)
    train_vit.main(["--resume", str(folder)])
    train(tmp_path / "uncut", *words)
    for name in ("best.pt", "last.pt"):
        saved, other = (load_model(tmp_path / run / name).state_dict() for run in ("run", "uncut"))
        changed = {key for key, value in expected.state_dict().items()
                   if value.shape != saved[key].shape or not torch.equal(value, saved[key])}
        assert changed == {"head.weight", "head.bias"}
        assert saved["head.weight"].any()
        assert torch.equal(saved["head.weight"], other["head.weight"])
    assert sum(seen) == 3 * 24


# ---- The words of a command


@pytest.mark.parametrize(("words", "expected"), [
    (["--resume", "x", "--dry-run"], "--dry-run is a run of its own"),
    (["--pretrained", "x", "--freeze-backbone", "--layer-decay", "0.7"], "--layer-decay has no place")])
def test_words_that_contradict_each_other_are_refused_before_anything_is_read(words, expected):
    with pytest.raises(ValueError, match=expected):
        parse(words)


def test_given_are_exactly_the_words_on_the_command_line():
    assert parse([]).given == {}
    assert parse(["--seed", "0", "--lr", "1e-3"]).given == dict(seed=0, lr=1e-3)  # 0 is the default
    assert parse(["--model-ema", "--class-weights"]).given == dict(model_ema=0.999, class_weights=True)
    assert parse(["--data-dir=./data", "--resume", "x"]).given == dict(data_dir="./data", resume="x")
    assert parse(["--resume"]).given == dict(resume=True)


@pytest.mark.parametrize("words", [
    [], ["--data-dir", "my photos/it's \"here\"", "--seed", "9", "--lr", "3e-05"],
    ["--model-ema", "--class-weights", "--skip-corrupt", "--compile"], ["--model-ema", "0.99", "--accumulate", "4"],
    ["--model-ema", "1"], ["--model-ema", "0"], ["--drop-path", "0"], ["--warmup-epochs", "0", "--weight-decay", "0"],
    ["--pretrained", "/tmp/a b/best.pt", "--freeze-backbone"], ["--pretrained", "x", "--layer-decay", "0.75"],
    ["--img-size", "48", "--patch-size", "6", "--model", "vit_nano", "--dataset", "shapes", "--workers", "0"],
    ["--val-fraction", "0.3", "--label-smoothing", "0", "--amp", "bf16", "--device", "cuda:1", "--batch-size", "3"],
    ["--minutes", "4", "--output-dir", "x y", "--save-minutes", "9"], ["--epochs", "4", "--resume", "--output-dir",
                                                                       "z"]])
def test_the_command_of_a_run_means_the_run(words):
    options = {name: value for name, value in vars(parse(words)).items() if name != "given"}
    command = shlex.split(train_vit.command_of(options, 7))
    assert command[:2] == ["python", "train_vit.py"]
    again = parse(command[2:])
    changed = dict(steps=7, minutes=None, epochs=None, output_dir=None, resume=None, save_minutes=3, dry_run=False)
    assert {name: value for name, value in vars(again).items() if name != "given"} == options | changed


def test_every_option_is_of_a_kind_that_can_be_written_again():
    """A new option of a kind that as_words() cannot write would be noticed here."""
    kinds = {action.dest: type(action) for action in train_vit.make_parser()._actions if action.dest != "help"}
    assert set(kinds.values()) <= {argparse._StoreAction, argparse._StoreTrueAction}
    assert set(CHANGEABLE) <= set(kinds)


def test_several_processes_are_part_of_the_command(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train_vit.command("--resume", "a b") == "torchrun --nproc-per-node=4 train_vit.py --resume 'a b'"


# ---- Several processes


def test_two_processes_train_as_one(photos, tmp_path):
    """The slowest test here: torchrun starts two processes, which share every batch."""
    words = ["--data-dir", photos, "--steps", 3, "--batch-size", 9, "--class-weights", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", ROOT / "train_vit.py",
         *map(str, words), "--output-dir", tmp_path / "two"],
        capture_output=True, text=True, timeout=200, check=False, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps, ") == done.stdout.count("val accuracy ") == 1  # the first process alone prints
    assert "torchrun --nproc-per-node=2 train_vit.py" in done.stdout
    folder = tmp_path / "two"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.json", "history.csv", "result.json", "best.pt", "last.pt", "curves.png", "attention.png"}
    train(tmp_path / "one", *words)
    one, two = (read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name, values in one["training"]["history"].items():
        if name not in ("seconds", "images_per_second"):
            assert two["training"]["history"][name] == pytest.approx(values, abs=1e-4), name
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=2e-3)
    scores = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert scores[0]["val_correct"] == scores[1]["val_correct"]


# ---- The command repeats the run


def test_the_printed_command_repeats_the_run(untested, tmp_path, monkeypatch):
    """Measuring the speed draws random numbers; the run after it must not notice."""
    monkeypatch.setattr(train_vit, "steps_within", lambda *args, **settings: int(torch.rand(3).numel()))
    data = make_folder(tmp_path / "photos", 24)
    common = ["--data-dir", str(data), "--drop-path", "0.5", "--batch-size", "4", "--device", "cpu", "--seed", "5"]
    weights = []
    for name, length in (("a", ["--minutes", "1"]), ("b", ["--steps", "3"])):
        train_vit.main([*common, *length, "--output-dir", str(tmp_path / name)])
        weights.append(load_model(tmp_path / name / "last.pt").state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_convnet_has_no_attention_picture(photos, tmp_path):
    train(tmp_path / "run", "--data-dir", photos, "--model", "convnet", "--steps", 1)
    assert (tmp_path / "run" / "curves.png").exists()
    assert not (tmp_path / "run" / "attention.png").exists()
