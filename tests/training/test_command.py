"""The training command: its options, and the files it writes."""

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from command_runs import ROOT, at_step, make_folder, prepared, run, train

import train_vit
from train_vit import _unevenness, parse
from vit_bridge.cli import Names, Size
from vit_bridge.data.shapes import SHAPES, make_shapes
from vit_bridge.errors import Assumption
from vit_bridge.models.convnet import ConvNet
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.objectives import Classification
from vit_bridge.training.run_folder import CHANGEABLE, Saver
from vit_bridge.weights.checkpoints import load, read_checkpoint, save_model
from vit_bridge.weights.heads import fit_head
from vit_bridge.weights.pretrained import OURS_FOLDER
from vit_model import InputError, VisionTransformer


@pytest.mark.parametrize(("words", "expected"), [
    (["--epochs", 0], "--epochs: 0 is out of range"),
    (["--lr", "nan"], "--lr: nan is out of range"),
    (["--minutes", -1], "--minutes: -1 is out of range"),
    (["--batch-size", "many"], "--batch-size: 'many' is not a whole number"),
    (["--learning-rate", 1], "did you mean --lr?"),
    (["evaluat"], "did you mean evaluate?"),
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
    (["--grad-accum-steps", 0], "--grad-accum-steps/--accumulate: 0 is out of range"),
    (["--save-minutes", 0], "--save-minutes: 0 is out of range"),
    (["--pretrained", "vit_giant"], "vit_giant"),
    (["--pretrained", "nowhere.pt"], "there is no file nowhere.pt"),
    (["--pretrained", "vit_nano_shapes", "--model", "vit_tiny"], "--model vit_tiny cannot be combined with"),
    (["--pretrained", "vit_nano_shapes", "--patch-size", 8], "--patch-size 8 cannot be combined with --pretrained"),
    (["--freeze-backbone"], "add --pretrained"),
    (["--teacher", "vit_nano_shapes", "--freeze-backbone", "--pretrained", "vit_nano_shapes"],
     "--teacher cannot be combined with --freeze-backbone"),
    (["--distillation", "soft"], "--distillation soft needs a teacher"),
    (["--teacher", "vit_nano_shapes", "--distillation", "warm"], "'warm'"),
    (["--teacher", "nowhere.pt"], "--teacher: there is no file nowhere.pt"),
    (["--teacher", "vit_nano_cifar10"], "the teacher does not know"),
    (["--teacher", "vit_nano_shapes", "--in-channels", 1],
     "the teacher's images have 3 channels, but those of the training have 1"),
    (["--resume"], "--resume alone does not specify a run"),
    (["--resume", "nowhere"], "--resume nowhere: there is no run"),
    (["evaluate"], "--checkpoint")])
def test_train_vit_reports_bad_options_in_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = make_shapes(40, 32)
    monkeypatch.setattr("vit_bridge.data.datasets.make_shapes", lambda *args, **kwargs: drawn)
    code, error = run(words, capsys)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_train_vit_suggests_data_dir_for_a_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    code, error = run(["photos"], capsys)
    assert (code, error.partition(": ")[2]) == (2, "command 'photos' is unknown; did you mean --data-dir photos?\n")
    code, error = run(["words"], capsys)
    assert (code, "expected evaluate, predict, export, inspect, or training options" in error) == (2, True)


@pytest.mark.parametrize(("accuracies", "expected"), [
    ([0.5, 1.0, 0.5, 1.0], "Best validation accuracy 100.0% in epoch 4 of 4 (the last of 2 equally good epochs)."),
    ([0.5, 1.0, 0.75], "Best validation accuracy 100.0% in epoch 2 of 3.")])
def test_training_result_names_the_best_epoch(accuracies, expected, capsys):
    n = len(accuracies)
    history = dict(val_acc=accuracies, val_loss=accuracies, lr=[0.1] * n, seconds=[1.0] * n,
                   images_per_second=[2.0] * n)
    model = torch.nn.Linear(2, 2)
    blank = SimpleNamespace(objective=Classification(), data_share=0.0, dtype=None)
    options = SimpleNamespace(seed=0, recipe="classic", epochs=n, steps=None, freeze_backbone=False, minutes=None,
                              teacher=None, distillation=None)
    train_vit._training_result(SimpleNamespace(
        trainer=blank, name="a", train_loader=SimpleNamespace(dataset_name="shapes"), options=options, model=model,
        entries=dict(n_steps=1, command=""), device="cpu"), history, 3)
    assert expected in capsys.readouterr().out


def test_train_vit_refuses_an_output_folder_with_files(capsys, tmp_path):
    (tmp_path / "best.pt").write_text("of an earlier run")
    code, error = run(["--output-dir", tmp_path, "--dry-run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "already holds files" in error
    assert (tmp_path / "best.pt").read_text() == "of an earlier run"


def test_train_vit_refuses_an_output_folder_it_cannot_make(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, error = run(["--output-dir", tmp_path / "file" / "run", "--dry-run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "cannot write to --output-dir" in error


@pytest.mark.slow
def test_train_vit_writes_files_that_agree(tmp_path, capsys):
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
    model = load(folder / "best.pt")
    assert len(model.preprocessing.class_names) == 10
    assert not model.training
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("to repeat this run: ", "--seed 3", "--device cpu", "--steps 2"))


@pytest.mark.slow
@pytest.mark.parametrize("side", [24, 72])
@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_train_vit_trains_and_scores_on_an_image_folder(side, parts, tmp_path, capsys):
    data = make_folder(tmp_path / "photos", side, parts)
    words = ["--dry-run", "--data-dir", data, "--output-dir", tmp_path / "run", "--device", "cpu",
             "--model", "vit_nano", "--img-size", side, "--batch-size", 4]
    train_vit.main(list(map(str, words)))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    split = "val" if parts == ("",) else "test"
    assert result[f"{split}_n"] == {"val": 2, "test": 8}[split]
    assert ("There are no test images" in capsys.readouterr().out) == (split == "val")
    assert load(tmp_path / "run" / "best.pt").preprocessing.class_names == ["blue", "red"]


def test_train_vit_names_a_corrupt_test_image_and_keeps_files(tmp_path, capsys):
    data = make_folder(tmp_path / "photos", 24, ("train", "test"))
    (data / "test" / "red" / "5.jpg").write_bytes(b"no image")
    code, error = run(["--dry-run", "--data-dir", data, "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "5.jpg" in error
    assert {"best.pt", "result.json", "curves.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


# ---- Classes and images


def test_train_vit_reports_uneven_classes_and_offers_class_weights(tmp_path, untested, capsys):
    data = make_folder(tmp_path / "photos", 24)
    for i in range(3, 12):
        (data / "blue" / f"{i}.jpg").unlink()
    even = prepared("--data-dir", data, "--output-dir", tmp_path / "a")
    assert "Classes differ in size: red 11, blue 2; look at the balanced accuracy, or" in \
        capsys.readouterr().out
    assert even.trainer.objective.loss_fn.class_weights is None
    weighted = prepared("--data-dir", data, "--output-dir", tmp_path / "b", "--class-weights")
    assert "red 11, blue 2; --class-weights gives every class the same weight." in capsys.readouterr().out
    torch.testing.assert_close(weighted.trainer.objective.loss_fn.class_weights, torch.tensor([13 / 4, 13 / 22]))


def test_unevenness_starts_at_a_factor_of_two_and_lists_ten():
    assert _unevenness(["a", "b"], [19, 10]) == ""
    assert _unevenness(["a", "b"], [10, 2000]) == "Classes differ in size: b 2,000, a 10"
    many = _unevenness([f"c{i}" for i in range(12)], [100 + i for i in range(11)] + [1])
    assert many == ("Classes differ in size: c10 110, c9 109, c8 108, c7 107, c6 106, c3 103, c2 102, c1 101, c0 100, "
                    "c11 1 (the largest and smallest of 12)")


@pytest.mark.parametrize(("words", "criterion"), [([], "val_acc"), (["--class-weights"], "val_balanced_acc")])
def test_train_vit_with_class_weights_selects_by_balanced_accuracy(
        words, criterion, photos, untested, tmp_path, monkeypatch):
    made = []

    class Seen(Saver):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(train_vit, "Saver", Seen)
    train(tmp_path / "run", "--data-dir", photos, "--steps", 1, *words)
    assert made[0].objective.criterion == criterion


def test_train_vit_looks_at_a_folder_first_and_takes_each_image_once(tmp_path, capsys):
    data = make_folder(tmp_path / "photos", 24, n=10)
    (data / "red" / "all").symlink_to("..")
    (data / "red" / "x").symlink_to("../blue")
    shutil.copy(data / "red" / "3.jpg", data / "blue" / "copy.jpg")
    with pytest.warns(Assumption, match="is ignored: it is a link to"):
        made = prepared("--data-dir", data, "--output-dir", tmp_path / "run")
    assert made.train_loader.n_images + made.val_loader.n_images == 21
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{data}: 21 image files (21 .jpg)"
    assert out[1] == "  classes, in the order of the model's outputs (alphabetical): blue (11), red (10)"
    assert out[3].startswith("  links and folders not followed: 2 ")
    assert out[4].startswith("  the same image in two classes, ")
    made.lock.close()


@pytest.mark.parametrize("side", [24, 72])
def test_train_vit_names_a_corrupt_image_and_suggests_skip_corrupt(side, tmp_path, capsys):
    data = make_folder(tmp_path / "photos", side, n=3)
    (data / "red" / "1.jpg").write_bytes(b"no image")
    code, error = run(["--data-dir", data, "--output-dir", tmp_path / "run", "--model", "vit_nano", "--img-size", side,
                       "--epochs", 1, "--device", "cpu"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert str(data / "red" / "1.jpg") in error
    assert "--skip-corrupt" in error


@pytest.mark.slow
@pytest.mark.parametrize("side", [24, 72])
@pytest.mark.parametrize("frozen", [False, True])
def test_skip_corrupt_names_and_counts_the_skipped_images(side, frozen, tmp_path, capsys):
    data = make_folder(tmp_path / "photos", side, n=12)
    bad = [data / "red" / f"{i}.jpg" for i in range(7)]
    for path in bad:
        path.write_bytes(b"no image")
    start = ["--model", "vit_nano", "--img-size", side]
    if frozen:
        save_model(ConvNet(side, 3, 2, (4,), (1,), 1), tmp_path / "start.pt",
                   Preprocessing(side, [0.5] * 3, [0.5] * 3))
        start = ["--pretrained", tmp_path / "start.pt", "--freeze-backbone"]
    train(tmp_path / "run", "--data-dir", data, *start, "--epochs", 1, "--skip-corrupt", "--batch-size", 8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Skipped" in line or "more" in line]
    named = [line.removeprefix("Skipped, because it cannot be read: ") for line in lines[:5]]
    assert set(named) < set(map(str, bad))
    assert lines[5:] == ["... and 2 more, 7 in all."]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped"] == 7


# ---- Pretrained weights


def shapes_model():
    return load(OURS_FOLDER / "vit_nano_shapes.pt")


def test_pretrained_keeps_its_preprocessing_and_gets_a_zero_head(photos, tmp_path, capsys):
    made, source = prepared("--data-dir", photos, "--output-dir", tmp_path / "run", "--pretrained",
                            "vit_nano_shapes"), shapes_model()
    for loader in (made.train_loader, made.val_loader):
        assert loader.img_size == 32
        assert loader.preprocessing == replace(source.preprocessing, class_names=loader.class_names)
    assert made.data["preprocessing"] == source.preprocessing  # for the test images too
    state, expected = made.model.state_dict(), source.state_dict()
    assert [key for key in expected if key not in ("head.weight", "head.bias")
            and not torch.equal(state[key], expected[key])] == []
    assert state["head.weight"].shape == (2, 96)
    assert not state["head.weight"].any()
    assert not state["head.bias"].any()
    assert "vit_nano_shapes: " in capsys.readouterr().out


def test_pretrained_resamples_positions_for_another_image_size(photos, tmp_path):
    made = prepared("--data-dir", photos, "--output-dir", tmp_path / "run", "--pretrained", "vit_nano_shapes",
                    "--img-size", 24)
    assert made.train_loader.img_size == made.model.config.img_size == 24
    assert made.model.pos_embed.shape[1] == 1 + 6 * 6


def test_pretrained_keeps_the_head_for_the_same_classes(tmp_path):
    data = make_folder(tmp_path / "photos", 24, classes=sorted(SHAPES), n=2)
    source = shapes_model()
    renamed = tmp_path / "sorted.pt"  # folders are read in alphabetical order
    save_model(source, renamed, replace(source.preprocessing, class_names=sorted(SHAPES)))
    made = prepared("--data-dir", data, "--output-dir", tmp_path / "run", "--pretrained", renamed)
    assert torch.equal(made.model.head.weight, source.head.weight)
    assert torch.equal(made.model.head.bias, source.head.bias)


def test_fit_head_adds_a_zero_head_of_the_right_width():
    for n_classes in (0, 3):
        for model in (VisionTransformer(8, 4, 3, n_classes, 12, 1, 3), ConvNet(8, 3, n_classes, (4, 6), (1, 1), 1)):
            width = 12 if isinstance(model, VisionTransformer) else 6
            line = fit_head(model, ["a", "b"])
            assert re.fullmatch(r"head: new, because (the weights have none|the trained one has 3 classes.*)", line)
            assert (model.head.weight.shape, model.config.n_classes) == ((2, width), 2)
            assert model.preprocessing == Preprocessing(8, class_names=["a", "b"])
            assert model.eval()(torch.zeros(1, 3, 8, 8)).tolist() == [[0, 0]]


@pytest.mark.parametrize("source", ["vit_nano_shapes", "hybrid_shapes", "convnet_shapes", "raw", "bare"])
def test_pretrained_starts_from_any_kind_of_weights_file(source, photos, untested, tmp_path):
    """One step at a learning rate of 1e-12 does not change the weights visibly."""
    path = OURS_FOLDER / f"{source}.pt"
    if source == "raw":
        torch.manual_seed(0)
        path, model = tmp_path / "raw.pth", VisionTransformer(24, 8, 3, 5, 64, 2, 1)
        torch.save(model.state_dict(), path)
    if source == "bare":  # without preprocessing
        path, model = tmp_path / "bare.pt", VisionTransformer(24, 8, 3, 5, 64, 2, 1)
        save_model(model, path)
    expected = torch.load(path, weights_only=True)
    expected = expected if source == "raw" else expected["state_dict"]
    train(tmp_path / "run", "--data-dir", photos, "--pretrained", path, "--steps", 1, "--lr", "1e-12")
    model = load(tmp_path / "run" / "best.pt")
    assert model.preprocessing.class_names == ["blue", "red"]
    for name, p in model.named_parameters():
        if not name.startswith("head."):
            torch.testing.assert_close(p.detach(), expected[name].float(), rtol=0, atol=1e-6)


def test_pretrained_lowers_the_learning_rate_unless_frozen(photos, untested, tmp_path):
    rates = {}
    for name, words in (("new", []), ("fine", ["--pretrained", "vit_nano_shapes"]),
                        ("head", ["--pretrained", "vit_nano_shapes", "--freeze-backbone"]), ("own", ["--lr", "0.125"])):
        train(tmp_path / name, "--data-dir", photos, "--steps", 1, *words)
        rates[name] = read_checkpoint(tmp_path / name / "last.pt")["training"]["lr"]
    assert rates == dict(new=2e-3, fine=5e-4, head=2e-3, own=0.125)


@pytest.mark.parametrize("source", ["vit_nano_shapes", "convnet_shapes"])
def test_freeze_backbone_trains_only_the_head_on_cached_features(
        source, photos, untested, tmp_path, monkeypatch, capsys):
    expected = load(OURS_FOLDER / f"{source}.pt")
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
        saved, other = (load(tmp_path / run / name).state_dict() for run in ("run", "uncut"))
        changed = {key for key, value in expected.state_dict().items()
                   if value.shape != saved[key].shape or not torch.equal(value, saved[key])}
        assert changed == {"head.weight", "head.bias"}
        assert saved["head.weight"].any()
        assert torch.equal(saved["head.weight"], other["head.weight"])
    assert sum(seen) == 3 * 24


# ---- The words of a command


@pytest.mark.parametrize(("words", "expected"), [
    (["--resume", "x", "--dry-run"], "--dry-run starts a new run"),
    (["--pretrained", "x", "--freeze-backbone", "--layer-decay", "0.7"], "--layer-decay cannot be combined")])
def test_parse_refuses_contradictory_options(words, expected):
    with pytest.raises(ValueError, match=expected):
        parse(words)


def test_parse_records_exactly_the_given_options():
    assert parse([]).given == {}
    assert parse(["--seed", "0", "--lr", "1e-3"]).given == dict(seed=0, lr=1e-3)  # although 0 is the default
    assert parse(["--model-ema", "--class-weights"]).given == dict(model_ema=0.999, class_weights=True)
    assert parse(["--data-dir=./data", "--resume", "x"]).given == dict(data_dir="./data", resume="x")
    assert parse(["--resume"]).given == dict(resume=True)


@pytest.mark.parametrize("words", [
    [], ["--data-dir", "my photos/it's \"here\"", "--seed", "9", "--lr", "3e-05"],
    ["--model-ema", "--class-weights", "--skip-corrupt", "--compile"], ["--model-ema", "0.99", "--accumulate", "4"],
    ["--model-ema", "1"], ["--model-ema", "0"], ["--drop-path", "0"], ["--warmup-epochs", "0", "--weight-decay", "0"],
    ["--teacher", "a b/best.pt"], ["--teacher", "convnet_cifar10", "--distillation", "soft"],
    ["--pretrained", "/tmp/a b/best.pt", "--freeze-backbone"], ["--pretrained", "x", "--layer-decay", "0.75"],
    ["--img-size", "48", "--patch-size", "6", "--model", "vit_nano", "--dataset", "shapes", "--workers", "0"],
    ["--val-fraction", "0.3", "--label-smoothing", "0", "--amp", "bf16", "--device", "cuda:1", "--batch-size", "3"],
    ["--minutes", "4", "--output-dir", "x y", "--save-minutes", "9"], ["--epochs", "4", "--resume", "--output-dir",
                                                                       "z"]])
def test_command_of_parses_back_to_the_same_options(words):
    options = {name: value for name, value in vars(parse(words)).items() if name != "given"}
    command = shlex.split(train_vit._command_of(options, 7))
    assert command[:2] == ["python", "train_vit.py"]
    again = parse(command[2:])
    changed = dict(steps=7, minutes=None, epochs=None, output_dir=None, resume=None, save_minutes=3, dry_run=False)
    assert {name: value for name, value in vars(again).items() if name != "given"} == options | changed


def test_make_parser_uses_only_options_that_can_be_rewritten():
    """Options of a new kind fail here, because _as_words() cannot write them."""
    kinds = {action.dest: type(action) for action in train_vit.make_parser()._actions if action.dest != "help"}
    assert set(kinds.values()) <= {argparse._StoreAction, argparse._StoreTrueAction, Names, Size}
    assert set(CHANGEABLE) <= set(kinds)


def test_help_shows_eleven_everyday_options_first_and_every_default(capsys):
    with pytest.raises(SystemExit):
        train_vit.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python train_vit.py [options]\n")
    groups = [group for group in train_vit.make_parser()._action_groups if group._group_actions]
    assert groups[0].title == "everyday options"
    assert len(groups[0]._group_actions) == 11 + 1  # and --help
    for action in [action for group in groups for action in group._group_actions]:
        alone = action.nargs == 0 or action.dest in ("steps", "resume", "n_heads", "class_names")
        assert alone or "default: " in action.help, action.dest


def test_command_includes_torchrun_for_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train_vit.command("--resume", "a b") == "torchrun --nproc-per-node=4 train_vit.py --resume 'a b'"


# ---- Several processes


@pytest.mark.slow
def test_train_vit_on_two_processes_matches_one(photos, tmp_path):
    """The slowest test here: torchrun starts two processes that share every batch."""
    words = ["--data-dir", photos, "--steps", 3, "--batch-size", 9, "--class-weights", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", ROOT / "train_vit.py",
         *map(str, words), "--amp", "off", "--output-dir", tmp_path / "two"],
        capture_output=True, text=True, timeout=200, check=False, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps, ") == done.stdout.count("val accuracy ") == 1  # only the first process prints
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


def test_train_vit_by_minutes_matches_the_same_run_by_steps(untested, tmp_path, monkeypatch):
    """Measuring the speed draws random numbers, which must not change the run after it."""
    monkeypatch.setattr(train_vit, "steps_within", lambda *args, **settings: int(torch.rand(3).numel()))
    data = make_folder(tmp_path / "photos", 24)
    common = ["--data-dir", str(data), "--drop-path", "0.5", "--batch-size", "4", "--device", "cpu", "--seed", "5"]
    weights = []
    for name, length in (("a", ["--minutes", "1"]), ("b", ["--steps", "3"])):
        train_vit.main([*common, *length, "--output-dir", str(tmp_path / name)])
        weights.append(load(tmp_path / name / "last.pt").state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(("words", "named"), [(["--flip", "none"], "--flip is for small images"),
                                              (["--cutout", "0"], "--cutout is for small images")])
def test_train_vit_refuses_small_image_options_for_photographs(words, named, tmp_path):
    with pytest.raises(InputError, match=named):
        prepared("--data-dir", make_folder(tmp_path / "photos", 72), *words)


def test_train_vit_refuses_a_recipe_for_another_model(photos):
    with pytest.raises(InputError, match="--recipe hybrid_fast is for --model hybrid, but the model is vit_nano"):
        prepared("--data-dir", photos, "--recipe", "hybrid_fast")


def test_train_vit_refuses_a_recipe_for_larger_images(photos):
    with pytest.raises(InputError, match="--recipe convnet_fast needs images of at least 16 pixels, but these have 12"):
        prepared("--data-dir", photos, "--img-size", 12, "--model", "convnet", "--recipe", "convnet_fast")


def test_train_vit_draws_no_attention_picture_for_a_convnet(photos, tmp_path):
    train(tmp_path / "run", "--data-dir", photos, "--model", "convnet", "--steps", 1)
    assert (tmp_path / "run" / "curves.png").exists()
    assert not (tmp_path / "run" / "attention.png").exists()
