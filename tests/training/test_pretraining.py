"""python train_vit.py --pretrain: labels are ignored, a run resumes exactly, and its encoder can be fine-tuned."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from command_runs import PowerCut, at_step, cut, make_folder, run, tensors_in, train

import train_vit
from train_vit import USUAL_MODELS, Trainer, main
from vit_bridge.models.beit import MASKED_TOKEN_VARIANTS, BEiT, MaskedTokenModel
from vit_bridge.models.mae import MaskedAutoencoder
from vit_bridge.models.registry import MODELS, build_model
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import load, read_checkpoint, save_model
from vit_bridge.weights.heads import fit_head
from vit_model import InputError, VisionTransformer

KINDS = {"mae": (MaskedAutoencoder, VisionTransformer, "reconstruction.png"),
         "beit": (MaskedTokenModel, BEiT, "tokens.png")}


@pytest.fixture
def photos(tmp_path):
    """24 small photographs in one flat folder."""
    folder = make_folder(tmp_path / "made", 32, n=12)
    flat = tmp_path / "photos"
    flat.mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        path.rename(flat / f"{i}.jpg")
    return flat


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_on_a_flat_folder_then_fine_tuning(kind, photos, tmp_path, capsys):
    model_class, encoder_class, figure = KINDS[kind]
    train(tmp_path / "run", "--pretrain", kind, "--data-dir", photos, "--steps", 3, "--batch-size", 12)
    said = capsys.readouterr().out
    assert "labels ignored" in said
    assert ("perplexity" in said) == (kind == "beit")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val_loss"] > 0
    assert "val_acc" not in result
    assert {"mae": "interpolation", "beit": "commonest"}[kind] in result["pretraining"]
    assert (tmp_path / "run" / figure).stat().st_size > 5000
    model = load(tmp_path / "run" / "best.pt")
    assert type(model) is model_class
    assert model.preprocessing.class_names is None

    labelled = make_folder(tmp_path / "labelled", 32)
    train(tmp_path / "tuned", "--pretrained", tmp_path / "run" / "best.pt", "--data-dir", labelled, "--steps", 1)
    assert "which learned without labels; the run starts from its encoder" in capsys.readouterr().out
    tuned = load(tmp_path / "tuned" / "best.pt")
    assert type(tuned) is encoder_class
    assert tuned.preprocessing.class_names == ["blue", "red"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_pretraining_ends_as_one_in_one_go(kind, photos, tmp_path, monkeypatch):
    words = ("--pretrain", kind, "--data-dir", photos, "--steps", 4, "--batch-size", 8)
    train(tmp_path / "whole", *words)
    at_step(monkeypatch, 3, cut)
    with pytest.raises(PowerCut):
        train(tmp_path / "cut", *words, "--save-minutes", 1e-9)
    train(tmp_path / "cut", "--resume")
    ends = [tensors_in(read_checkpoint(tmp_path / name / "last.pt")["state_dict"]) for name in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def saved(kind, folder):
    """A whole model of this kind in a file, as a run without labels leaves it."""
    torch.manual_seed(0)
    model = build_model(USUAL_MODELS[kind][0], img_size=16, embed_dim=12, depth=1)
    save_model(model, folder / f"{kind}.pt", Preprocessing(16))
    return folder / f"{kind}.pt"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [["predict", "0.jpg"], ["evaluate", "--data-dir", "."], ["export"]])
def test_commands_for_classes_name_the_way_to_them_in_one_line(kind, words, photos, tmp_path, capsys, monkeypatch):
    path = saved(kind, tmp_path)
    monkeypatch.chdir(photos)
    before = sorted(tmp_path.rglob("*"))
    code, error = run([words[0], "--checkpoint", path, *words[1:]], capsys)
    assert code == 2
    assert f"a {KINDS[kind][0].__name__} learns without labels and has no head; train its encoder" in error
    assert "python train_vit.py --pretrained FILE" in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [dict(n_classes=3), dict(n_classes=0), dict(class_names=["a", "b"])])
def test_loading_a_whole_model_with_classes_names_its_encoder_in_one_line(kind, classes, tmp_path):
    path = saved(kind, tmp_path)
    words = "class_names=(a, b)" if "class_names" in classes else f"n_classes={classes['n_classes']}"
    with pytest.raises(InputError) as error:
        load(path, **classes)
    assert str(error.value) == (
        f"{words} does not fit {path}, a whole {KINDS[kind][0].__name__}, which learned without labels and has no "
        f"head; use encoder = load({str(path)!r}).encoder() and fit_head(encoder, classes), or train it with `python "
        f"train_vit.py --pretrained {path}`")
    encoder = load(path).encoder()
    assert fit_head(encoder, 3) == "head: new, because the weights have none"
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_classes_with_a_whole_model_is_refused_before_the_training(kind, tmp_path):
    with pytest.raises(InputError, match=r"\Aa Masked\w+ learns without labels and has no head; [^\n]*\Z"):
        Trainer(load(saved(kind, tmp_path)), "cpu")


@pytest.mark.parametrize(("words", "expected"), [
    (["--pretrain", "dino"], "'dino'"),
    (["--pretrain", "mae", "--teacher", "convnet_shapes"], "--teacher cannot be combined with --pretrain mae"),
    (["--pretrain", "mae", "--class-weights"], "--class-weights cannot be combined with --pretrain mae"),
    (["--pretrain", "beit", "--pretrained", "vit_nano_shapes"], "--pretrained cannot be combined with --pretrain beit"),
    (["--pretrain", "mae", "--label-smoothing", "0"], "--label-smoothing cannot be combined with --pretrain mae"),
    (["--pretrain", "mae", "--class-names", "a", "b"], "--class-names cannot be combined with --pretrain mae"),
    (["--pretrain", "beit", "--mixing", "none"], "--mixing cannot be combined with --pretrain beit"),
    (["--pretrain", "mae", "--model", "vit_nano"], "--model vit_nano learns from labels, not for --pretrain mae"),
    (["--pretrain", "beit", "--model", "mae_nano"], "--model mae_nano is for --pretrain mae, not for --pretrain beit"),
    (["--pretrain", "beit", "--model", "vit_nano"], "choose one of beit_nano_pretraining, beit_tiny_pretraining, beit"),
    (["--pretrain", "mae", "--model", "beit_nano_pretraining"], "is for --pretrain beit, not for --pretrain mae"),
    (["--model", "mae_nano"], "--model mae_nano learns without labels; add --pretrain mae"),
    (["--model", "beit_nano_pretraining"], "learns without labels; add --pretrain beit")])
def test_contradictory_options_are_refused_in_one_line(words, expected, capsys):
    code, error = run(words, capsys)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("n", "expected"), [(0, "has 0 images"), (1, "has 1 image ("),
                                             (None, "; use a folder of images\n")])
def test_too_few_images_are_refused_in_one_line(n, expected, tmp_path, capsys):
    if n is not None:
        make_folder(tmp_path / "photos", 32, classes=("red",)[:n], n=1)
        (tmp_path / "photos").mkdir(exist_ok=True)
    code, error = run(["--pretrain", "mae", "--data-dir", tmp_path / "photos", "--steps", 1], capsys)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_patches_are_refused_before_the_run_has_a_folder(kind, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, USUAL_MODELS["beit"][0], replace(  # 24 photographs of one patch
        MODELS[USUAL_MODELS["beit"][0]], arguments=vars(MASKED_TOKEN_VARIANTS[USUAL_MODELS["beit"][0]])
        | dict(n_tokens=2)))
    before = sorted(tmp_path.rglob("*"))
    code, error = run(["--pretrain", kind, "--data-dir", photos, "--steps", 1, "--patch-size", 32], capsys)
    assert code == 2
    assert {"mae": "0 of 1 patches visible", "beit": "1 of 1 patches leaves none visible"}[kind] in error
    assert "smaller patches" in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", [False, True])
def test_a_dry_run_does_not_advise_to_use_its_model(keep, photos, tmp_path, capsys):
    words = ["--output-dir", tmp_path / "run"] if keep else []
    main([str(word) for word in ["--pretrain", "mae", "--data-dir", photos, "--dry-run", *words]])
    said = capsys.readouterr().out
    assert "--pretrained" not in said
    assert ("its files were deleted" in said) is not keep
    assert "Mean squared error of hidden pixels" in said
    assert "The model borrows the mean and the contrast of each hidden patch" in said  # mae_nano normalises


@pytest.mark.parametrize(("n", "batch", "wanted"), [(100, 7, 10), (95, 32, 10), (9, 4, 10), (64, 64, 1), (50, 8, 49)])
def test_images_to_reconstruct_are_spread_over_the_whole_set(n, batch, wanted):
    class Numbers(list):
        n_images = n

    loader = Numbers((images, None) for images in torch.arange(n)[:, None].split(batch))
    numbers = train_vit._spread_images(loader, wanted)[:, 0]
    assert 0 < len(numbers) <= wanted
    apart = numbers.diff().unique()
    assert len(apart) <= 1
    assert n - 1 - numbers[-1] < (apart.item() if len(apart) else n)


def test_unreadable_files_are_refused_or_reported(photos, tmp_path, capsys):
    (photos / "3.jpg").write_bytes(b"no image")
    words = ["--pretrain", "mae", "--data-dir", photos, "--steps", 1, "--device", "cpu", "--amp", "off"]
    code, error = run([*words, "--output-dir", tmp_path / "refused"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "3.jpg' is damaged, or not an image that Pillow can read; remove it, or add --skip-corrupt" in error
    train(tmp_path / "run", *words[:6], "--skip-corrupt")
    said = capsys.readouterr().out
    assert f"Skipped, because it cannot be read: {photos / '3.jpg'}" in said
    assert "label smoothing" not in said  # there are no labels
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped"] == 1


def test_the_encoder_of_a_model_without_labels_can_teach_a_tokenizer(photos, tmp_path, capsys):
    path = saved("mae", tmp_path)
    train(tmp_path / "run", "--pretrain", "beit", "--data-dir", photos, "--steps", 1, "--teacher", path)
    assert "by k-means of the features of patches" in capsys.readouterr().out


@pytest.mark.parametrize(("side", "n_images"), [(32, 2000), (224, 332), (20_000, 1)])
def test_a_tokenizer_is_fitted_on_fewer_large_images(side, n_images):
    model = SimpleNamespace(config=SimpleNamespace(in_channels=3))
    asked = []

    def stop(n):
        asked.append(n)
        raise KeyError

    with pytest.raises(KeyError):
        train_vit._fit_tokenizer(model, SimpleNamespace(size=(side, side), without_augmentation=stop), None)
    assert asked == [n_images]
