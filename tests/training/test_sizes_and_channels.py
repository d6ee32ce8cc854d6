"""Commands on rectangular and grey images, from training and resuming to the ONNX file."""

import json

import pytest
import torch
from command_runs import make_folder, run, train

import train_vit
from vit_bridge.weights.checkpoints import load, read_checkpoint

STEPS = ("--steps", 3, "--batch-size", 4)


def predictions(checkpoint, *files, capsys):
    capsys.readouterr()
    train_vit.main(["predict", "--checkpoint", str(checkpoint), "--json", *map(str, files)])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit_nano", "hybrid", "convnet"])
@pytest.mark.parametrize(("size", "channels"), [((24, 40), 3), ((72, 96), 3), ((24, 24), 1), ((24, 24), 4)])
def test_train_evaluate_predict_and_export_other_sizes_and_channels(model, size, channels, tmp_path, capsys):
    data = make_folder(tmp_path / "photos", 30, ("train", "test"))
    train(tmp_path / "run", "--data-dir", data, "--model", model, "--img-size", *size, "--in-channels", channels,
          *STEPS)
    best = tmp_path / "run" / "best.pt"
    trained = load(best)
    assert trained.preprocessing.size == size
    assert trained.config.in_channels == trained.preprocessing.n_channels == channels
    train_vit.main(["evaluate", "--checkpoint", str(best), "--data-dir", str(data), "--output-dir",
                    str(tmp_path / "scores"), "--device", "cpu", "--amp", "off"])
    n_right = json.loads((tmp_path / "scores" / "result.json").read_text())["correct"]
    assert n_right == json.loads((tmp_path / "run" / "result.json").read_text())["test_correct"]
    found = predictions(best, data / "test", capsys=capsys)
    names = [entry["file"].split("/")[-2] for entry in found]
    assert sum(entry["predictions"][0]["class"] == name for entry, name in zip(found, names, strict=True)) == n_right
    pytest.importorskip("onnxscript")
    train_vit.main(["export", "--checkpoint", str(best)])
    assert best.with_suffix(".onnx").is_file()


@pytest.mark.slow
def test_a_rectangular_training_resumes_and_starts_another_one(tmp_path, capsys):
    data = make_folder(tmp_path / "photos", 30)
    train(tmp_path / "run", "--data-dir", data, "--img-size", 24, 40, *STEPS)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "--img-size 24 40" in config["command"]
    whole = read_checkpoint(tmp_path / "run" / "last.pt")["state_dict"]
    (tmp_path / "run" / "last.pt").unlink()
    (tmp_path / "run" / "result.json").unlink()
    # from config.json, in which pairs are lists
    train(tmp_path / "run", "--resume", tmp_path / "run", "--img-size", 24, 40)
    again = read_checkpoint(tmp_path / "run" / "last.pt")["state_dict"]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    best = tmp_path / "run" / "best.pt"
    train(tmp_path / "same", "--data-dir", data, "--pretrained", best, *STEPS)
    assert load(tmp_path / "same" / "best.pt").config.img_size == (24, 40)
    train(tmp_path / "larger", "--data-dir", data, "--pretrained", best, "--img-size", 32, 48, *STEPS)
    larger = load(tmp_path / "larger" / "best.pt")
    assert larger.config.img_size == (32, 48)
    assert larger.pos_embed.shape[1] == 1 + 8 * 12


@pytest.mark.parametrize(("words", "expected"), [
    (["--img-size", 24, 40, 3], "--img-size 24 40 3 has 3 numbers; expected one side, or height and width"),
    (["--img-size", 24, 41], "img_size 24x41 is not divisible by patch_size 4x4"),
    (["--in-channels", 0], "--in-channels: 0 is out of range"),
    (["--in-channels", 2], "in_channels 2 is out of range")])
def test_sizes_and_channels_that_cannot_be_end_in_one_line(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_folder(tmp_path / "photos", 24)
    code, error = run(["--data-dir", data, *words, "--output-dir", tmp_path / "run"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert expected in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_training_says_that_the_test_images_changed_meanwhile(tmp_path, capsys, monkeypatch):
    data = make_folder(tmp_path / "photos", 24, ("train", "test"))
    fit = train_vit.fit

    def fit_and_remove(*args):
        found = fit(*args)
        (data / "test" / "red" / "5.jpg").unlink()
        return found

    train(tmp_path / "whole", "--data-dir", data, *STEPS)
    assert "test images are others" not in capsys.readouterr().out
    monkeypatch.setattr(train_vit, "fit", fit_and_remove)
    train(tmp_path / "run", "--data-dir", data, *STEPS)
    assert "the test images have changed since the training started; testing on the 23" in capsys.readouterr().out
