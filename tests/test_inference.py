"""Predictions and scores of models whose logits are known; exported files; commands and their error messages."""

import csv
import functools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train_vit
from vit_bridge import inference
from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.cli import script
from vit_bridge.data.loaders import get_evaluation_loader
from vit_bridge.inference import export_onnx, predict, score
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import save_model
from vit_model import InputError, VisionTransformer

COLOURS = ["red", "green", "blue"]


class Echo(nn.Module):
    """Its logits are the numbers of the image, (3, 1, 2): six classes."""
    config = SimpleNamespace(img_size=(1, 2), in_channels=3, n_classes=6)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        assert not self.training
        return images.flatten(1) * self.weight


@torch.no_grad()
def colour_model():
    """A ConvNet whose logits are 10 times the mean of red, green and blue, in 0..1."""
    model = ConvNet(8, 3, 3, (3,), (1,), 1).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    model.stem[0].weight[range(3), range(3), 1, 1] = 1
    model.head.weight[:] = 10 * torch.eye(3)
    model.head.bias.zero_()
    model.preprocessing = Preprocessing(8, (0.0,) * 3, (1.0,) * 3, "bilinear", COLOURS)
    return model


def image_of(*colour, side=8):
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (side, side, 3)).copy()


def save(path, *colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_of(*colour)).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    save_model(colour_model(), tmp_path / "best.pt")
    return tmp_path / "best.pt"


def run(command, *words):
    """(exit code) of a command as train_vit.py runs it."""
    try:
        script(functools.partial(command, [str(word) for word in words]))
    except SystemExit as end:
        return end.code
    return 0


# ---- Predictions


def test_predict_accepts_every_kind_of_image(tmp_path):
    model, array = colour_model(), image_of(255, 51, 102)
    shares = torch.tensor([10.0, 2.0, 4.0]).softmax(dim=0).tolist()
    expected = [("red", shares[0]), ("blue", shares[2]), ("green", shares[1])]
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    path = save(tmp_path / "an image é.png", 255, 51, 102)
    images = [path, str(path), Image.fromarray(array), array, array / 255, tensor, tensor / 255]
    for image in images:
        result = predict(model, image)
        assert [name for name, _ in result] == [name for name, _ in expected]
        assert [share for _, share in result] == pytest.approx([share for _, share in expected], abs=1e-4)
    for several in (images, tuple(images), torch.stack([tensor / 255] * 2), (tensor / 255)[None], tensor[None]):
        results = predict(model, several, top=2)
        assert len(results) == len(several)
        assert {tuple(name for name, _ in result) for result in results} == {("red", "blue")}
    assert predict(model, []) == []
    assert len(predict(model, array, top=1)) == 1


def test_predict_in_batches_keeps_the_order(monkeypatch):
    model, sizes = colour_model(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    images = [image_of(*(255 * (channel == i % 3) for channel in range(3))) for i in range(131)]
    assert [result[0][0] for result in predict(model, images)] == [COLOURS[i % 3] for i in range(131)]
    assert sizes == [64, 64, 3]


def test_predict_leaves_the_model_as_it_was():
    model = colour_model().train()
    model.head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    predict(model, image_of(1, 2, 3))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_predict_without_names_numbers_the_classes_in_order():
    model = colour_model()
    model.preprocessing = replace(model.preprocessing, class_names=None)
    assert [name for name, _ in predict(model, image_of(9, 9, 9))] == ["0", "1", "2"]


def test_predict_refuses_bad_arguments_and_models():
    with pytest.raises(InputError, match="top 0"):
        predict(colour_model(), image_of(0, 0, 0), top=0)
    with pytest.raises(InputError, match=r"nowhere\.png"):
        predict(colour_model(), ["nowhere.png"])
    with pytest.raises(InputError, match="no head"):
        predict(ConvNet(8, 3, 0, (3,), (1,), 1), image_of(0, 0, 0))
    broken = colour_model()
    broken.head.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        predict(broken, image_of(0, 0, 0))


# ---- Scores

# Six classes: label, and the logits that Echo is shown. Right but for the 2nd, 4th and 6th image.
SHOWN = [(0, [9, 0, 0, 0, 0, 0]), (0, [0, 3, 2, 2, 2, 2]), (1, [0, 9, 0, 0, 0, 0]), (1, [8, 1, 2, 3, 4, 0]),
         (1, [0, 9, 1, 0, 0, 0]), (5, [5, 4, 3, 2, 1, 0]), (5, [0, 0, 0, 0, 0, 1])]


def shown_batches(size=3):
    labels = torch.tensor([label for label, _ in SHOWN])
    images = torch.tensor([logits for _, logits in SHOWN], dtype=torch.float32).view(-1, 3, 1, 2)
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    return [*batches[:1], (images[:0], labels[:0]), *batches[1:]]


def test_score_matches_counts_by_hand():
    model = Echo().train()
    found = score(model, shown_batches(), "cpu")
    expected = torch.zeros(6, 6, dtype=torch.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[1, 0], expected[5, 0], expected[5, 5] = 1, 1, 2, 1, 1, 1
    assert torch.equal(found.confusion, expected)
    assert (found.n, found.correct, found.accuracy, found.interval) == (7, 4, 4 / 7, wilson_interval(4, 7))
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3)
    assert found.top5 == pytest.approx(5 / 7)  # of two images the label is the sixth, of one the fifth
    assert found.class_names == ["0", "1", "2", "3", "4", "5"]
    assert model.training


def test_score_lists_the_worst_mistakes_first():
    shares = [torch.tensor(logits, dtype=torch.float32).softmax(dim=0) for _, logits in SHOWN]
    for size in (1, 3, 7):
        worst = score(Echo(), shown_batches(size), "cpu").mistakes
        assert worst.labels.tolist() == [1, 5, 0]
        assert worst.predictions.tolist() == [0, 0, 1]
        torch.testing.assert_close(worst.probabilities, torch.stack([shares[3][0], shares[5][0], shares[1][1]]))
        torch.testing.assert_close(worst.label_probabilities, torch.stack([shares[3][1], shares[5][5], shares[1][0]]))
        assert worst.images[:, 0, 0, 0].tolist() == [8, 5, 0]
        assert worst.files == [None] * 3
        assert score(Echo(), shown_batches(size), "cpu", n_worst=1).mistakes.labels.tolist() == [1]
    none = score(Echo(), shown_batches(1)[:1], "cpu").mistakes
    assert (none.images.shape, none.files) == ((0, 3, 1, 2), [])


class Batches(list):
    """A loader that knows its files."""
    files = None
    skipped = ()


def test_score_names_the_files_of_mistakes():
    loader = Batches(shown_batches())
    loader.files = [f"{i}.png" for i in range(7)]
    assert score(Echo(), loader, "cpu").mistakes.files == ["3.png", "5.png", "1.png"]
    loader.files = [f"{i}.png" for i in ("0", "bad", "1", "2", "3", "4", "worse", "5", "6")]
    assert score(Echo(), loader, "cpu").mistakes.files == [None] * 3
    loader.skipped = {"bad.png": "cut off", "worse.png": "empty"}
    assert score(Echo(), loader, "cpu").mistakes.files == ["3.png", "5.png", "1.png"]
    loader.training = True
    assert score(Echo(), loader, "cpu").mistakes.files == [None] * 3


def test_score_works_in_half_precision():
    found = score(Echo(), shown_batches(), "cpu", amp="bf16")
    assert found.correct == 4


def test_score_names_the_classes_or_refuses():
    loader, model = Batches(shown_batches()), Echo()
    loader.class_names = list("abcdef")
    assert score(model, loader, "cpu").class_names == list("abcdef")
    model.preprocessing = Preprocessing((1, 2), class_names=list("abcdef"))
    assert score(model, loader, "cpu").class_names == list("abcdef")
    for names in (list("abcdfe"), list("abc")):
        loader.class_names = names
        with pytest.raises(InputError, match="labelled with its own classes"):
            score(model, loader, "cpu")
    with pytest.raises(InputError, match="labelled with its own classes"):
        score(Echo(), loader, "cpu")
    with pytest.raises(InputError, match="label 6 is out of range for a model with 6 classes; labels begin at 0"):
        score(Echo(), [(torch.zeros(2, 3, 1, 2), torch.tensor([0, 6]))], "cpu")
    with pytest.raises(InputError, match="0 images"):
        score(Echo(), [], "cpu")


# ---- Export


def tiny(name):
    torch.manual_seed(0)
    options = dict(n_classes=3, embed_dim=8, depth=1, n_heads=2, img_size=8, patch_size=4)
    return dict(vit=VisionTransformer, hybrid=HybridCNNViT)[name](**options) if name != "convnet" else colour_model()


@pytest.mark.parametrize("name", ["convnet", "vit", "hybrid"])
def test_export_onnx_computes_what_the_model_does(name, tmp_path, capfd):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = tiny(name).train()
    nn.init.normal_(model.head.weight)
    std = torch.tensor([0.5, 0.5, 0.25])
    model.preprocessing = Preprocessing(8, (0.1, 0.2, 0.3), std, class_names=["a", "b é", "c"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "model.onnx"
    assert 0 <= export_onnx(model, path) < inference.TOLERANCE
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    facts = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert facts == dict(class_names=["a", "b é", "c"], mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.25], img_size=8,
                         interpolation="bilinear")
    assert b".py" not in path.read_bytes()  # no line tells of the machine that wrote it
    (images,), (logits,) = proto.graph.input, proto.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    for n in (1, 5):
        x = torch.rand(n, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(inference._run_onnx(path.read_bytes(), x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_export_onnx_names_missing_packages(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install onnx onnxscript$") as error:
        export_onnx(colour_model(), tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


class Proto:
    """What to_onnx gives, without its work."""

    def __init__(self):
        self.metadata_props = SimpleNamespace(add=lambda key, value: None)

    def SerializeToString(self):
        return b"graph"


@pytest.fixture
def untraced(monkeypatch):
    """export_onnx without tracing: its file is "graph", and the returned function sets how it runs."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(inference, "_to_onnx", lambda model, images: Proto())
    return lambda run: monkeypatch.setattr(inference, "_run_onnx", run)


def test_export_onnx_keeps_no_file_that_computes_otherwise(tmp_path, untraced):
    model, path = colour_model(), tmp_path / "model.onnx"
    with torch.no_grad():
        for factor, sound in ((1, True), (1 + 5e-5, True), (1 + 2e-4, False), (torch.nan, False)):
            untraced(lambda content, images, factor=factor: model(images) * factor)
            if sound:
                assert export_onnx(model, path) == pytest.approx(factor - 1, abs=1e-6)
                assert path.read_bytes() == b"graph"
                path.unlink()
            else:
                with pytest.raises(InputError, match="so it was not kept"):
                    export_onnx(model, path)
        untraced(lambda content, images: model(images)[:2])
        with pytest.raises(InputError, match="so it was not kept"):
            export_onnx(model, path)
        untraced(lambda content, images: 1 / 0)
        with pytest.raises(InputError, match="does not run"):
            export_onnx(model, path)
    assert not list(tmp_path.iterdir())


def test_export_onnx_refuses_missing_folders_and_large_models(tmp_path, monkeypatch, untraced):
    with pytest.raises(InputError, match="there is no folder"):
        export_onnx(colour_model(), tmp_path / "absent" / "model.onnx")
    monkeypatch.setattr(inference, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(InputError, match="less than 2"):
        export_onnx(colour_model(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_to_onnx_refuses_an_untraceable_model_in_one_line():
    pytest.importorskip("onnxscript")

    class Untraceable(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    with pytest.raises(InputError, match=r"^this Untraceable cannot be exported \(.*\)") as error:
        inference._to_onnx(Untraceable(), torch.zeros(2, 3, 8, 8))
    assert "\n" not in str(error.value)


# ---- The commands


def colour_folder(root):
    """Two images a class and a green one among the red, in test/; train/ is only there."""
    for i, name in enumerate(COLOURS):
        for k in range(2):
            save(root / "test" / name / f"{k}.png", *(255 * (channel == i) for channel in range(3)))
            save(root / "train" / name / f"{k}.png", 255, 255, 255)
    save(root / "test" / "red" / "a wrong é.png", 51, 255, 0)
    return root


def test_evaluate_writes_scores_confusion_and_mistakes(tmp_path, checkpoint, capsys):
    data, out = colour_folder(tmp_path / "data"), tmp_path / "out"
    assert run(train_vit.evaluate_command, "--checkpoint", checkpoint, "--data-dir", data, "--output-dir", out,
               "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "data: 7 test images\n" in printed
    assert "accuracy           85.7% (48.7 to 97.4), 6 correct" in printed
    assert "balanced accuracy  88.9%" in printed
    assert "top-5" not in printed
    assert "  red     66.7%  2 of 3\n  green  100.0%  2 of 2\n" in printed
    names = ["confusion.csv", "confusion.png", "mistakes.csv", "mistakes.png", "result.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    with open(out / "confusion.csv", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["true \\ predicted", *COLOURS], ["red", "2", "1", "0"],
                                          ["green", "0", "2", "0"], ["blue", "0", "0", "2"]]
    with open(out / "mistakes.csv", encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    share = torch.tensor([2.0, 10.0, 0.0]).softmax(dim=0)[1].item()
    assert (line["file"], line["true"], line["predicted"]) == (str(data / "test" / "red" / "a wrong é.png"), "red",
                                                              "green")
    assert float(line["probability"]) == pytest.approx(share, abs=1e-5)
    result = json.loads((out / "result.json").read_text())
    assert (result["n"], result["correct"], result["split"], result["top5"]) == (7, 6, "test", None)
    assert result["classes"][0] == dict(name="red", n=3, correct=2)


def test_evaluate_without_mistakes_writes_no_figure_of_them(tmp_path, checkpoint, capsys):
    data, out = colour_folder(tmp_path / "data"), tmp_path / "out"
    (data / "test" / "red" / "a wrong é.png").unlink()
    (data / "test" / "red" / "broken.png").write_bytes(b"no image")
    command = ("--checkpoint", checkpoint, "--data-dir", data, "--output-dir", out, "--device", "cpu")
    assert run(train_vit.evaluate_command, *command) == 2
    assert "broken.png" in capsys.readouterr().err
    assert run(train_vit.evaluate_command, *command, "--skip-corrupt") == 0
    assert "skipped: 1 image file that cannot" in capsys.readouterr().out
    assert not (out / "mistakes.png").exists()
    assert (out / "mistakes.csv").read_text().split() == ["file,true,predicted,probability"]
    assert list(json.loads((out / "result.json").read_text())["skipped"]) == [str(data / "test" / "red" / "broken.png")]


def test_evaluate_holds_nothing_out_of_a_changed_folder(tmp_path, capsys):
    data, path = tmp_path / "data", tmp_path / "best.pt"
    for name in COLOURS:
        for k in range(4):
            save(data / name / f"{k}.png", 10 * k, 0, 0)
    val_loader = get_evaluation_loader(data, COLOURS, img_size=8, held_out=True, val_fraction=0.5, seed=3)
    options = dict(data_dir=str(data), val_fraction=0.5, seed=3)
    save_model(colour_model(), path, options=options, validation_files=train_vit._fingerprint(val_loader))
    words = ("--checkpoint", path, "--data-dir", data, "--device", "cpu", "--output-dir")
    assert run(train_vit.evaluate_command, *words, tmp_path / "a") == 0
    assert "6 validation images; the best epoch was chosen on them" in capsys.readouterr().out
    save(data / next(iter(COLOURS)) / "0 new.png", 5, 0, 0)
    assert run(train_vit.evaluate_command, *words, tmp_path / "b") == 0
    printed = capsys.readouterr().out
    assert "have changed since the training" in printed
    assert ": all 13 images; if the model was trained on some of them" in printed


@pytest.mark.slow
def test_evaluate_takes_the_images_held_out_of_the_training(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    for name in COLOURS:
        for k in range(4):
            save(data / name / f"{k}.png", 10 * k, 0, 0)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "best.pt"
    save_model(colour_model(), path, options=dict(data_dir="data", val_fraction=0.5, seed=3))
    assert run(train_vit.evaluate_command, "--checkpoint", path, "--data-dir", data, "--device", "cpu") == 0
    assert "data: 6 validation images; the best epoch was chosen on them" in capsys.readouterr().out
    assert (tmp_path / "runs" / "evaluation-folder-1" / "result.json").exists()
    data.rename(tmp_path / "other")
    assert run(train_vit.evaluate_command, "--checkpoint", path, "--data-dir", "other", "--device", "cpu") == 0
    assert "other: all 12 images; if the model was trained on some of them" in capsys.readouterr().out
    cut = dict(held_out=True, val_fraction=0.5, seed=3)
    assert train_vit._training_cut(path, tmp_path / "x" / ".." / "data") == (cut, None)


def test_describe_score_lists_the_lowest_recalls():
    confusion = torch.diag(torch.arange(25))  # the first class has no images
    confusion[7, 8] = 100
    found = SimpleNamespace(confusion=confusion, class_names=[f"class {i}" for i in range(25)], n=400, correct=300,
                            balanced_accuracy=0.5, top5=0.9)
    loader = SimpleNamespace(dataset_name="folder", split="val", skipped={"a": "b"})
    text = train_vit._describe_score(found, loader, "photos")
    assert text.startswith("photos: 400 validation images, because there are no test images; if the best epoch")
    assert "skipped: 1 image file that cannot be read" in text
    assert "the mean of the recalls of 24 classes; the other 1 have no images" in text
    assert "top-5 accuracy     90.0%" in text
    assert "class 0 " not in text
    lines = text.splitlines()
    assert lines[-20] == "  class 7     6.5%  7 of 107"
    assert lines[-21] == "the 20 classes with the lowest recall:"


def test_predict_command_prints_the_top_classes(tmp_path, checkpoint, capsys):
    folder = tmp_path / "a folder ü"
    red, green = save(folder / "b" / "red one.PNG", 255, 0, 0), save(folder / "green.png", 51, 255, 0)
    save(folder / ".hidden" / "x.png", 0, 0, 255)
    save(folder / ".hidden.png", 0, 0, 255)
    (folder / "notes.txt").write_text("no image")
    lone = save(tmp_path / "lone.png", 0, 0, 255)
    assert run(train_vit.predict_command, "--checkpoint", checkpoint, folder, lone, "--top", 2, "--device", "cpu") == 0
    shares = torch.tensor([2.0, 10.0, 0.0]).softmax(dim=0)
    width = min(80, len(str(red)))
    assert capsys.readouterr().out.splitlines() == [
        f"{green!s:{width}}  green {shares[1]:.1%}, red {shares[0]:.1%}",
        f"{red!s:{width}}  red 100.0%, green 0.0%",
        f"{lone!s:{width}}  blue 100.0%, red 0.0%"]


def test_predict_command_goes_on_after_unreadable_files(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(inference, "BATCH_SIZE", 2)
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = save(tmp_path / "good.png", 0, 0, 255)
    words = ("--checkpoint", checkpoint, bad, good, "absent.png", tmp_path / "empty", good, "--device", "cpu")
    assert run(train_vit.predict_command, *words) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [str(good)] * 2
    errors = err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("train_vit.py predict: ") for line in errors)
    assert "bad.png" in errors[0]
    assert "absent.png" in errors[1]
    assert f"folder '{tmp_path / 'empty'}' has no image files" in errors[2]
    assert run(train_vit.predict_command, *words, "--json", "--top", 1) == 2
    entries = json.loads(capsys.readouterr().out)
    assert [entry["file"] for entry in entries] == [str(word) for word in words[2:7]]
    assert ["error" in entry for entry in entries] == [True, False, True, True, False]
    assert entries[1]["predictions"] == [{"class": "blue", "probability": pytest.approx(1, abs=1e-3)}]


def test_export_command_does_not_overwrite(checkpoint, capsys, untraced):
    untraced(lambda content, images: 10 * images.mean(dim=(2, 3)).clamp(min=0))
    model = colour_model()
    untraced(lambda content, images: model(images).detach())
    assert run(train_vit.export_command, "--checkpoint", checkpoint) == 0
    path = checkpoint.with_suffix(".onnx")
    assert path.read_bytes() == b"graph"
    assert capsys.readouterr().out.startswith(f"{path}: 0.0 MB; ")
    assert run(train_vit.export_command, "--checkpoint", checkpoint) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{path} already exists" in err
    assert run(train_vit.export_command, "--checkpoint", checkpoint, "--output", path.with_name("other.onnx")) == 0
    assert path.with_name("other.onnx").exists()


@pytest.mark.parametrize(("command", "words", "text"), [
    (train_vit.evaluate_command, ["--checkpoint", "absent.pt"], "no file absent.pt"),
    (train_vit.evaluate_command, [], "--checkpoint"),
    (train_vit.evaluate_command, ["--checkpoint", "best.pt", "--data-dir", "absent"], "no data folder 'absent'"),
    (train_vit.evaluate_command, ["--checkpoint", "best.pt", "--data-dir", "other"], "the class 'cat'"),
    (train_vit.evaluate_command, ["--checkpoint", "best.pt", "--dataset", "shapes"], "first at position 1: 'circle'"),
    (train_vit.evaluate_command, ["--checkpoint", "best.pt", "--device", "gpu"], "device 'gpu'"),
    (train_vit.evaluate_command, ["--checkpoint", "best.pt", "--batch-size", "0"], "--batch-size"),
    (train_vit.predict_command, ["--checkpoint", "best.pt"], "IMAGE"),
    (train_vit.predict_command, ["--checkpoint", "absent.pt", "x.png"], "no file absent.pt"),
    (train_vit.predict_command, ["--checkpoint", "best.pt", "x.png", "--top", "0"], "--top"),
    (train_vit.predict_command, ["--checkpoint", "headless.pt", "x.png"], "no head"),
    (train_vit.export_command, ["--checkpoint", "absent.pt"], "no file absent.pt"),
    (train_vit.export_command, ["--checkpoint", "best.pt", "--output", "absent/model.onnx"], "no folder absent"),
])
def test_commands_report_bad_options_in_one_line(command, words, text, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "other" / "cat" / "0.png", 0, 0, 0)
    if "headless.pt" in words:
        save_model(ConvNet(8, 3, 0, (3,), (1,), 1), "headless.pt", Preprocessing(8))
    if "--output" in words:
        pytest.importorskip("onnxscript")
    assert run(command, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err
    assert not (tmp_path / "runs").exists()
