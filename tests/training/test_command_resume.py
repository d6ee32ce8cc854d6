"""The training command: resuming after interruptions of all kinds."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from command_runs import ROOT, PowerCut, at_step, cut, make_folder, run, tensors_in, train

import train_vit
from vit_bridge.data.loaders import get_test_loader
from vit_bridge.training.config import RECIPES
from vit_bridge.training.objectives import CrossEntropy
from vit_bridge.weights.checkpoints import read_checkpoint


def outcome(folder):
    """Return the results of a run except its times: the tensors of both checkpoints, and the history."""
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


# ---- A run that is cut


# Seven steps in epochs of three batches, so the last epoch is cut short; with every option that draws or keeps state.
SEVEN = ["--steps", 7, "--batch-size", 8, "--drop-path", 0.3, "--model-ema", 0.9, "--class-weights",
         "--layer-decay", 0.7, "--seed", 4]


@pytest.fixture(scope="module")
def uncut(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vit, "finish", lambda run, history, seconds: None)
        train(folder, "--data-dir", photos, *SEVEN)
    return folder


@pytest.mark.parametrize(("number", "code", "step"), [
    (signal.SIGINT, 130, 0), (signal.SIGINT, 130, 4), (signal.SIGTERM, 143, 5)])
def test_train_vit_saves_on_a_signal_and_resumes_exactly(
        number, code, step, photos, uncut, untested, tmp_path, capsys, monkeypatch):
    folder, before = tmp_path / "a run", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    words = ["--data-dir", photos, *SEVEN, "--device", "cpu", "--amp", "off", "--output-dir", folder]
    ended, error = run(words, capsys)
    assert (ended, error.count("\n")) == (code, 1)
    assert f"saved at step {step + 1} of 7; resume with: " in error
    assert read_checkpoint(folder / "last.pt")["training"]["step"] == step + 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    command = shlex.split(error.split("resume with: ")[1])
    assert command == ["python", "train_vit.py", "--resume", str(folder)]
    train_vit.main(command[2:])
    assert f"Resuming {folder}." in capsys.readouterr().out
    assert_same_run(folder, uncut)


def test_resume_keeps_the_recipe_the_run_began_with(photos, uncut, untested, tmp_path, monkeypatch):
    at_step(monkeypatch, 4, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", "--data-dir", photos, *SEVEN, "--save-minutes", "0.00001")
    for name, recipe in RECIPES.items():
        changed = replace(recipe.train, learning_rate=0.5, schedule="linear")
        monkeypatch.setitem(RECIPES, name, replace(recipe, train=changed))
    train_vit.main(["--resume", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", uncut)


def test_train_vit_saves_on_a_signal_during_evaluation(photos, uncut, untested, tmp_path, capsys, monkeypatch):
    evaluate = train_vit.Trainer.evaluate

    def interrupted(self, loader, model=None, state=None):
        if state is not None and state.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, loader, model, state)

    monkeypatch.setattr(train_vit.Trainer, "evaluate", interrupted)
    words = ["--data-dir", photos, *SEVEN, "--device", "cpu", "--amp", "off", "--output-dir", tmp_path / "run"]
    code, error = run(words, capsys)
    assert (code, error.count("\n")) == (130, 1)
    assert "saved at step 6 of 7" in error
    monkeypatch.setattr(train_vit.Trainer, "evaluate", evaluate)
    train_vit.main(["--resume", str(tmp_path / "run" / "last.pt")])
    assert_same_run(tmp_path / "run", uncut)


def test_train_vit_exits_at_once_on_a_second_signal(photos, untested, tmp_path, monkeypatch):
    codes = []

    def end(code):
        codes.append(code)
        raise PowerCut

    monkeypatch.setattr(os, "_exit", end)
    at_step(monkeypatch, 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(PowerCut):
        train(tmp_path / "run", "--data-dir", photos, *SEVEN)
    assert codes == [130]


def test_train_vit_leaves_no_folder_on_an_early_signal(photos, tmp_path, capsys, monkeypatch):
    def interrupted(**_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_vit, "get_data_loaders", interrupted)
    code, error = run(["--data-dir", photos, "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (143, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_vit_process_saves_on_a_real_sigint(photos, tmp_path):
    """Once more from outside: another process, a real signal, the state saved."""
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
    assert f"stopped by SIGINT; saved at step {step} of 100000; resume with: python train_vit.py --resume" in error


@pytest.mark.parametrize("form", ["folder", "last.pt", "output-dir"])
def test_resume_after_a_power_cut_continues_from_last_checkpoint(form, photos, uncut, untested, tmp_path, monkeypatch,
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


def test_resume_with_output_dir_starts_or_continues_a_run(photos, uncut, untested, tmp_path, monkeypatch, capsys):
    words = ["--data-dir", photos, *SEVEN, "--resume"]
    at_step(monkeypatch, 1, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", *words)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}
    assert "Resuming" not in capsys.readouterr().out
    train(tmp_path / "run", *words)
    assert "Resuming" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", uncut)


def test_resume_keeps_the_step_count_of_a_timed_run(photos, untested, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vit, "steps_within", lambda *args, **settings: 4)
    at_step(monkeypatch, 2, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", "--data-dir", photos, "--minutes", "3", "--batch-size", "8")
    monkeypatch.setattr(train_vit, "steps_within", lambda *args, **settings: pytest.fail("measured again"))
    train_vit.main(["--resume", str(tmp_path / "run"), "--minutes", "3"])
    entries = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (entries["n_steps"], entries["training"]["step"]) == (4, 4)


def test_resume_refuses_changed_options_classes_and_wrong_paths(photos, uncut, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_vit.Trainer, "step", lambda *_: pytest.fail("a step was taken"))
    folder = shutil.copytree(uncut, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = make_folder(tmp_path / "others", 24, classes=("red", "pink"))
    for words, expected in (
            (["--resume", folder, "--batch-size", 4], "--batch-size 4 differs from the run's 8"),
            (["--resume", folder, "--epochs", 2], "--epochs 2 differs from the run, which was started without"),
            (["--resume", folder, "--model-ema"], "--model-ema 0.999 differs from the run's 0.9"),
            (["--resume", folder, "--lr", "2e-3"], "--lr 0.002 differs from the run, which was started without --lr"),
            (["--resume", folder, "--data-dir", others], "first at position 1: 'pink' instead of 'blue'"),
            (["--resume", folder / "best.pt"], "--pretrained"),
            (["--resume", photos], "there is no run"),
            (["--output-dir", folder], "already holds files")):
        code, error = run(words, capsys)
        assert (code, error.count("\n")) == (2, 1), error
        assert expected in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resume_of_a_frozen_run_of_an_older_version(photos, untested, tmp_path, monkeypatch):
    """Its state holds the weights of the head alone, without the name of the head."""
    words = ["--data-dir", photos, "--pretrained", "vit_nano_shapes", "--freeze-backbone", "--steps", 7,
             "--batch-size", 8, "--model-ema", 0.9]
    train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        at_step(patch, 4, cut)
        with pytest.raises(PowerCut):
            train(tmp_path / "cut", *words, "--save-minutes", "0.00001")
    entries = read_checkpoint(tmp_path / "cut" / "last.pt")
    for name in ("model", "average"):
        entries["training"][name] = {key.removeprefix("head."): value
                                     for key, value in entries["training"][name].items()}
    torch.save(entries, tmp_path / "cut" / "last.pt")
    train_vit.main(["--resume", str(tmp_path / "cut")])
    whole, resumed = (tensors_in(read_checkpoint(tmp_path / name / "last.pt")) for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_resume_warns_about_another_number_of_images(photos, untested, tmp_path, capsys, monkeypatch):
    at_step(monkeypatch, 2, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "run", "--data-dir", photos, "--steps", 4, "--batch-size", 8, "--save-minutes", "0.00001")
    moved = make_folder(tmp_path / "moved", 24, n=11)
    train_vit.main(["--resume", str(tmp_path / "run"), "--data-dir", str(moved)])
    assert "Warning: there are 20 training images, but the run started with 22" in capsys.readouterr().out
    entries = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (entries["training"]["step"], entries["options"]["data_dir"]) == (4, str(moved))


def test_resume_finishes_the_test_and_leaves_complete_runs(photos, tmp_path, capsys, monkeypatch):
    folder, test_loader = tmp_path / "run", get_test_loader
    monkeypatch.setattr(train_vit, "get_test_loader", lambda **_: os.kill(os.getpid(), signal.SIGINT))
    code, error = run(["--data-dir", photos, "--steps", 2, "--batch-size", 8, "--output-dir", folder], capsys)
    assert (code, error.count("\n")) == (130, 1)
    assert "val_n" not in json.loads((folder / "result.json").read_text())
    monkeypatch.setattr(train_vit, "get_test_loader", test_loader)
    monkeypatch.setattr(train_vit.Trainer, "step", lambda *_: pytest.fail("a step was taken"))
    train_vit.main(["--resume", str(folder)])
    result = (folder / "result.json").read_bytes()
    assert json.loads(result)["val_n"] == 2
    for name in ("get_data_loaders", "get_test_loader"):
        monkeypatch.setattr(train_vit, name, lambda **_: pytest.fail("images were read"))
    capsys.readouterr()
    train_vit.main(["--resume", str(folder)])
    assert f"The run is complete; its results are in {folder}/result.json." in capsys.readouterr().out
    assert (folder / "result.json").read_bytes() == result


def test_resume_refuses_a_folder_another_run_writes_to(photos, uncut, tmp_path, capsys):
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


def test_train_vit_reports_a_full_disk_and_resumes_exactly(
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
    assert f"The last good checkpoint is {folder}/last.pt, step 4 of 7; resume with: python train_vit.py --" in error
    assert not list(folder.glob("*.part"))
    assert read_checkpoint(folder / "last.pt")["training"]["step"] == 4
    full.clear()
    train_vit.main(["--resume", str(folder)])
    assert_same_run(folder, uncut)


def test_train_vit_names_step_and_rate_when_training_diverges(photos, tmp_path, capsys):
    code, error = run(["--data-dir", photos, "--lr", "1e30", "--batch-size", 8, "--epochs", 2, "--device", "cpu",
                       "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "NaN or infinite in step 2 of 6, at learning rate 1e+30" in error
    assert "Nothing was saved yet" in error
    assert not (tmp_path / "run" / "last.pt").exists()


def test_train_vit_names_a_finite_checkpoint_after_nan(photos, untested, tmp_path, capsys, monkeypatch):
    forward, calls = CrossEntropy.forward, []

    def failing(self, logits, labels):
        calls.append(torch.is_grad_enabled())
        return forward(self, logits, labels) * (torch.nan if sum(calls) == 5 else 1)

    monkeypatch.setattr(CrossEntropy, "forward", failing)
    code, error = run(["--data-dir", photos, "--batch-size", 8, "--epochs", 3, "--lr", "0.001", "--device", "cpu",
                       "--save-minutes", "0.00001", "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "NaN or infinite in step 5 of 9, at learning rate 0.0" in error
    assert f"The last good checkpoint is {tmp_path}/run/last.pt, step 4" in error
    entries = read_checkpoint(tmp_path / "run" / "last.pt")
    assert entries["training"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in tensors_in(entries).values())
