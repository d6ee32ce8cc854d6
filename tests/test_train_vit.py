import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train_vit
from cnn_model import ConvNet
from measurements import choose_device
from model_zoo import load_model
from train_vit import Trainer, choose_precision, learning_rate_at, parameter_groups, set_train_mode, steps_within
from vit_data import make_shapes
from vit_model import InputError, VisionTransformer, freeze_backbone

TINY = dict(img_size=8, patch_size=4, embed_dim=12, depth=1, n_heads=3, n_classes=3)


def toy_batches(n_batches=5, batch_size=7):
    """Three classes that a linear model can part: the mean of a channel says which."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(n_batches):
        labels = torch.randint(0, 3, (batch_size,), generator=generator)
        images = 0.1 * torch.randn(batch_size, 3, 8, 8, generator=generator)
        images[torch.arange(batch_size), labels] += 1.0
        batches.append((images, labels))
    return batches


def toy_trainer(seed=0, **settings):
    torch.manual_seed(seed)
    return Trainer(VisionTransformer(**TINY), device="cpu", **settings)


def test_history_has_an_entry_an_epoch_in_every_list_and_accuracies_are_shares():
    history = toy_trainer().train(toy_batches(), toy_batches(2), n_epochs=3, learning_rate=1e-3)
    assert tuple(history) == ("train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds", "images_per_second")
    assert {len(values) for values in history.values()} == {3}
    assert all(0 <= share <= 1 for share in history["train_acc"] + history["val_acc"])


def test_it_learns_what_can_be_learned():
    history = toy_trainer().train(toy_batches(), toy_batches(), n_epochs=30, learning_rate=1e-2)
    assert history["val_acc"][-1] == 1.0


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    weights = []
    for seed in (0, 0, 1):
        trainer = toy_trainer(seed)
        trainer.train(toy_batches(), n_epochs=1)
        weights.append(trainer.model.head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_validation_its_columns_are_nan():
    history = toy_trainer().train(toy_batches(), n_epochs=1)
    assert math.isnan(history["val_loss"][0])
    assert math.isnan(history["val_acc"][0])


def test_n_steps_ends_the_run_inside_an_epoch():
    trainer = toy_trainer()
    trainer.train(toy_batches(1), n_epochs=1)
    history = trainer.train(toy_batches(5), n_steps=7)
    assert len(history["lr"]) == 2  # five steps, then two


def test_one_step_is_adamw_on_the_clipped_gradient():
    torch.manual_seed(0)
    model, by_hand = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    by_hand.load_state_dict(model.state_dict())
    (images, labels), = toy_batches(1)
    Trainer(model, "cpu", loss_fn=nn.CrossEntropyLoss(), clip_norm=0.01).train(
        [(images, labels)], n_epochs=1, learning_rate=0.1, weight_decay=0.5, warmup_epochs=0)
    nn.functional.cross_entropy(by_hand(images), labels).backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
    for name, p in by_hand.named_parameters():
        gradient = p.grad * 0.01 / (norm + 1e-6)
        decay = 0.5 if p.ndim == 2 else 0.0
        expected = p * (1 - 0.1 * decay) - 0.1 * gradient / (gradient.abs() + 1e-8)  # Adam's first step is a sign
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


def test_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    rates = [learning_rate_at(step, 12, 4, 8.0) for step in range(12)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[8] == pytest.approx(4.0)  # halfway between 4 and 12
    assert rates[11] == pytest.approx(4.0 * (1 + math.cos(math.pi * 7 / 8)))


@pytest.mark.parametrize(("warmup_epochs", "expected"), [(None, 1), (0, 0), (0.5, 3), (2, 10), (99, 15)])
def test_warmup_is_a_twentieth_of_the_run_or_what_is_asked_for(warmup_epochs, expected):
    assert Trainer.plan(range(5), 3, None, warmup_epochs, 1e-3, 0.0) == (15, expected)


def test_no_weight_decay_on_biases_norms_positions_and_tokens():
    model = VisionTransformer(**TINY)
    decayed, plain = (group["params"] for group in parameter_groups(model, 0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed} == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight"}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} < {names[id(p)] for p in plain}
    assert len(decayed) + len(plain) == len(names)


def test_a_frozen_model_has_nothing_to_train():
    with pytest.raises(InputError, match="no trainable parameter"):
        parameter_groups(VisionTransformer(**TINY).requires_grad_(False), 0.0)


def test_a_frozen_backbone_stays_as_it_is_with_its_batch_statistics():
    model = freeze_backbone(ConvNet(8, 3, 3, (5,), (1,), 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model, "cpu").train(toy_batches(), n_epochs=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_train_mode_leaves_what_is_not_frozen_in_training():
    model = VisionTransformer(**TINY, dropout=0.1)
    set_train_mode(model)
    assert all(module.training for module in model.modules())


def test_evaluate_counts_every_image_once_and_gives_the_mode_back():
    trainer = toy_trainer()
    trainer.model.train()
    batches = [*toy_batches(2, 7), *toy_batches(1, 3)]
    score = trainer.evaluate(batches)
    trainer.model.eval()
    logits = torch.cat([trainer.model(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert (score["n"], score["correct"]) == (17, int((logits.argmax(1) == labels).sum()))
    assert score["acc"] == pytest.approx(score["correct"] / 17)
    assert score["loss"] == pytest.approx(trainer.loss_fn(logits, labels).item(), rel=1e-5)
    trainer.model.train()
    trainer.evaluate(batches)
    assert trainer.model.training


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(amp):
    """fp16 goes through the gradient scaler, on the CPU as on CUDA; it may skip the first steps to find its scale."""
    losses = {}
    for precision in ("off", amp):
        trainer = toy_trainer(amp=precision)
        losses[precision] = trainer.train(toy_batches(1), n_epochs=12, learning_rate=1e-2)["train_loss"]
        assert trainer.model.head.weight.dtype == torch.float32
    assert losses[amp][0] == pytest.approx(losses["off"][0], rel=0.01)  # before any step
    assert losses[amp][0] != losses["off"][0]
    assert losses[amp][-1] < 0.7 * losses[amp][0]


def test_bf16_on_a_cpu_only_where_the_hardware_multiplies_it(monkeypatch):
    for abilities, expected in (({}, None), (dict(amx_bf16=True), torch.bfloat16),
                                (dict(avx512_bf16=True), torch.bfloat16), (dict(amx_bf16=False), None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=abilities: found)
        assert choose_precision("auto", torch.device("cpu")) == expected


def test_steps_within_fills_the_time_and_leaves_the_model_as_it_is():
    trainer, batches = toy_trainer(), toy_batches(3)
    before = trainer.model.head.weight.clone()
    n_steps = steps_within(6.0, trainer.model, batches, batches, device="cpu")
    assert torch.equal(trainer.model.head.weight, before)
    history = trainer.train(batches, batches, n_steps=n_steps)
    assert 0.5 < sum(history["seconds"]) < 9.0


@pytest.mark.parametrize(("numbers", "value"), [
    (dict(n_epochs=0), "n_epochs 0"), (dict(n_steps=0), "n_steps 0"), (dict(n_epochs=1.5), "n_epochs 1.5"),
    (dict(learning_rate=math.nan), "learning_rate nan"), (dict(learning_rate=0), "learning_rate 0"),
    (dict(learning_rate=math.inf), "learning_rate inf"), (dict(weight_decay=-1), "weight_decay -1"),
    (dict(warmup_epochs=-1), "warmup_epochs -1")])
def test_nonsense_numbers_are_named(numbers, value):
    with pytest.raises(InputError, match=rf"\A{value} is out of range; [^\n]*\Z"):
        toy_trainer().train(toy_batches(), **numbers)


def test_labels_past_the_head_are_named():
    images, labels = toy_batches(1)[0]
    with pytest.raises(InputError, match="label 5 has no place among the model's 3 classes"):
        toy_trainer().train([(images, labels.clamp(min=2) + 3)], n_epochs=1)


def test_a_loader_without_images_is_named():
    with pytest.raises(InputError, match="gave no images"):
        toy_trainer().train([], n_steps=3)


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_devices_that_cannot_be_are_named(device):
    with pytest.raises(InputError, match=rf"\Adevice '{device}' is [^\n]*\Z"):
        choose_device(device)


def test_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    with pytest.raises(InputError, match="'cuda' is not there"):
        Trainer(VisionTransformer(**TINY), device="cuda")


# ---- The command line -------------------------------------------------------------------------------------


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
    (["--drop-path", 1], "drop_path 1.0")])
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
        "config.json", "history.csv", "result.json", "best.pt", "last.pt", "curves.png", "attention.png"}
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


def make_folder(root, side, parts=("",)):
    """Two classes of twelve JPEG images each, red and blue, in every part."""
    generator = np.random.default_rng(0)
    for part in parts:
        for channel, name in ((0, "red"), (2, "blue")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(12):
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


def test_the_printed_command_repeats_the_run(tmp_path, monkeypatch):
    """Measuring the speed draws random numbers; the run after it must not notice."""
    monkeypatch.setattr(train_vit, "steps_within", lambda *args, **settings: int(torch.rand(3).numel()))
    data = make_folder(tmp_path / "photos", 24)
    common = ["--data-dir", str(data), "--drop-path", "0.5", "--batch-size", "4", "--device", "cpu", "--seed", "5"]
    weights = []
    for name, length in (("a", ["--minutes", "1"]), ("b", ["--steps", "3"])):
        train_vit.main([*common, *length, "--output-dir", str(tmp_path / name)])
        weights.append(load_model(tmp_path / name / "last.pt").state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_convnet_has_no_attention_picture(tmp_path):
    train_vit.main(["--dry-run", "--output-dir", str(tmp_path / "run"), "--model", "convnet", "--device", "cpu"])
    assert not (tmp_path / "run" / "attention.png").exists()
