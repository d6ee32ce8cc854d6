"""Candidates are trained as train_vit.py would train them, all on the same images, and their report stays cautious."""

import shlex
from dataclasses import replace

import pytest
import torch
from command_runs import make_folder, prepared
from toy_training import one_step

import train_vit
from train_vit import NotFinite, Trainer
from vit_bridge.compare import which
from vit_bridge.compare.which import (
    Candidate,
    FolderImages,
    candidates_of,
    compare_candidates,
    fitting_candidates,
)
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.registry import build_model
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import OutOfMemory, predictions
from vit_bridge.training.config import RECIPES
from vit_bridge.weights.checkpoints import load, save_model
from vit_bridge.weights.heads import fit_head
from vit_model import InputError, VisionTransformer

CLASSES = ("truck", "cat")  # two of CIFAR-10's, in another order
ON_CPU = dict(device="cpu", amp="off")
SMALL = dict(vit_nano=dict(embed_dim=12, depth=1, n_heads=2), hybrid=dict(embed_dim=12, depth=1, n_heads=2),
             convnet=dict(widths=(3, 4, 5)))


@pytest.fixture
def small(monkeypatch):
    """Make the new models small, under the same names, and measure no speed."""
    monkeypatch.setattr(train_vit, "build_model", lambda name, **options: build_model(name, **options | SMALL[name]))
    monkeypatch.setattr(which, "steps_within", one_step)
    monkeypatch.setattr(which, "throughput", lambda model, **how: 500.0)


@pytest.fixture
def images(tmp_path):
    return FolderImages(data_dir=make_folder(tmp_path / "photos", 16, ("train", "test"), classes=CLASSES))


def weights_file(path, n_channels=3, names=("a", "b"), size=8):
    """Save a small ViT with random weights."""
    torch.manual_seed(5)
    model = VisionTransformer(img_size=size, patch_size=4, in_channels=n_channels, n_classes=len(names), embed_dim=12,
                              depth=1, n_heads=3)
    shown = Preprocessing(size, (0.4,) * n_channels, (0.3,) * n_channels, class_names=list(names))
    save_model(model, path, shown)
    return str(path)


def convnet_file(path):
    save_model(ConvNet(8, 3, 3, (5,), (1,), 1), path, Preprocessing(8, class_names=["a", "b", "c"]))
    return str(path)


# ---- Candidates


def test_candidates_are_a_probe_fine_tunings_and_new_models(tmp_path):
    assert [(one.name, one.model, one.start) for one in candidates_of()] == [
        ("linear probe of vit_nano_cifar10", "vit_nano_cifar10", "head"),
        ("fine-tuned vit_nano_cifar10", "vit_nano_cifar10", "pretrained"),
        ("fine-tuned convnet_cifar10", "convnet_cifar10", "pretrained"),
        ("ViT from scratch", "vit_nano", "new"), ("hybrid from scratch", "hybrid", "new"),
        ("ConvNet from scratch", "convnet", "new")]
    files = weights_file(tmp_path / "vit.pt"), convnet_file(tmp_path / "cnn.pt")
    assert [one.start for one in candidates_of(files)] == ["head", "pretrained", "pretrained", "new", "new", "new"]
    probe, *_ = candidates_of(["mae_nano_cifar10"])  # learned without labels
    assert (probe.start, probe.weights.config.n_classes) == ("head", 0)
    with pytest.raises(InputError, match="lists vit_nano_cifar10 twice"):
        candidates_of(["vit_nano_cifar10", "vit_nano_cifar10"])


def test_describe_weights_names_their_data_and_an_unfair_start(tmp_path):
    ours = candidates_of()[0]
    origin, unfair = which.describe_weights(ours, ["tabby", "poodle"])
    assert (origin, unfair) == ("vit_nano_cifar10 (VisionTransformer) was trained on CIFAR-10 (JPEG).", "")
    names = ours.preprocessing.class_names
    assert "was trained on the same classes. If these" in which.describe_weights(ours, names[::-1])[1]
    assert "was trained on classes of the same names (cat)." in which.describe_weights(ours, ["cat", "poodle"])[1]
    path = weights_file(tmp_path / "vit.pt")
    assert which.describe_weights(candidates_of([path])[0], ["cat"])[0] == (
        f"{path} (VisionTransformer) was trained on images of 2 classes (a, b).")
    public = Candidate("x", "deit_tiny_patch16_224", "head", load(path))
    assert "DeiT, Touvron et al. 2021" in which.describe_weights(public, ["cat"])[0]
    assert which.describe_weights(candidates_of(["mae_nano_cifar10"])[0], names)[1] == ""  # it has no classes


def test_commands_are_those_of_train_vit(tmp_path):
    for one in candidates_of():
        for img_size in (None, 64):
            words = shlex.split(one.command(tmp_path / "my photos", img_size, 2.5, "classic", ["--skip-corrupt"]))
            assert words[:2] == ["python", "train_vit.py"]
            options = train_vit.parse(words[2:])
            assert (options.data_dir, options.freeze_backbone) == (str(tmp_path / "my photos"), one.start == "head")
            assert options.minutes == (None if one.start == "head" else 2.5)
            new = one.start == "new"
            assert (options.model, options.pretrained) == ((one.model, None) if new else (None, one.model))
            assert options.img_size == (img_size if new else None)
            assert (options.recipe, options.skip_corrupt) == ("classic" if new else None, True)


@pytest.mark.slow
def test_candidates_start_and_train_as_train_vit_does(images):
    """Recipe, settings, loss, images and first weights are those of the command that the report recommends."""
    for one in candidates_of():
        loader = images.loaders(one.preprocessing)[0]
        name = which._recipe(one, loader, 2, torch.device("cpu"), "off")  # 2 of the 10 minutes are its share
        words = shlex.split(one.command(images.data["data_dir"], None, 10, name))[2:]
        chosen = train_vit.parse([*words, "--amp", "off"])
        train_vit._choose_run_recipe(chosen, None, one.model, loader, torch.device("cpu"))
        assert chosen.recipe == name
        words = [word for word in words if word not in ("--minutes", "10", "--recipe", name)]
        run = prepared(*words, "--amp", "off", "--recipe", name)  # of one step
        model = which._first_model(one, RECIPES[name], loader, 0)
        trainer = train_vit.trainer_for(RECIPES[name], model, "cpu", seed=0, amp="off")
        assert trainer.config == run.trainer.config
        assert trainer.objective.loss_fn.label_smoothing == run.trainer.objective.loss_fn.label_smoothing
        assert (loader.batch_size, loader.seed) == (run.train_loader.batch_size, run.train_loader.seed)
        assert loader.preprocessing == run.train_loader.preprocessing
        if one.start != "head":  # whose features are computed without augmentation
            assert loader.augmentation == run.train_loader.augmentation
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, run.model.state_dict()[key])


# ---- Images


def test_folder_images_are_the_same_for_every_preprocessing(images, tmp_path):
    shown = Preprocessing(8, (0.1,) * 3, (0.2,) * 3)
    for own, theirs in zip(images.loaders(), images.loaders(shown), strict=True):
        assert (own.img_size, theirs.img_size, theirs.preprocessing.mean) == (16, 8, (0.1,) * 3)
        assert own.files == theirs.files
        assert torch.equal(own.labels, theirs.labels)
    assert images.loaders(replace(shown)) is images.loaders(shown)  # read once
    assert (images.img_size, images.skipped) == (None, [])
    without_test = FolderImages(data_dir=tmp_path / "photos" / "train", seed=3)
    assert without_test.loaders()[2] is None
    assert without_test.loaders()[1].files == without_test.loaders(shown)[1].files


def test_folder_images_shrink_photographs_for_new_models_and_may_be_few(tmp_path):
    photos = make_folder(tmp_path / "photos", 100, ("train", "test"), n=5)
    images = FolderImages(3, data_dir=photos)
    assert (images.img_size, images.loaders()[0].size) == (64, (64, 64))
    assert images.loaders(Preprocessing(72))[0].size == (72, 72)
    train, val, test = images.loaders()
    assert ([one.n_images for one in (train, val, test)], train.training, test.training) == ([3, 2, 3], True, False)
    assert FolderImages(data_dir=photos, img_size=24).loaders()[0].size == (24, 24)
    (photos / "test" / "red" / "0.jpg").write_text("no picture")
    images = FolderImages(data_dir=photos, skip_corrupt=True)
    images.loaders()
    assert images.skipped == [str(photos / "test" / "red" / "0.jpg")]


def test_baselines_use_the_largest_class_of_the_training_images(tmp_path):
    photos = make_folder(tmp_path, 16, ("train",), n=6)
    make_folder(tmp_path, 16, ("test",), n=4)
    (photos / "train" / "red" / "0.jpg").unlink()
    (photos / "test" / "red" / "0.jpg").unlink()
    controls, guessing = which.baselines(FolderImages(data_dir=photos).loaders())
    assert controls == {which.LINEAR: 1.0, which.LARGEST: 4 / 7}
    assert guessing == 4 / 7
    _, guessing = which.baselines(FolderImages(data_dir=photos / "train", val_fraction=0.5).loaders())
    assert guessing == pytest.approx(0.5, abs=0.11)


# ---- Training


@pytest.mark.usefixtures("small")
def test_compare_candidates_trains_each_with_every_seed_in_its_share_of_the_time(images, tmp_path, monkeypatch):
    asked, lines = [], []
    monkeypatch.setattr(which, "steps_within", lambda seconds, *rest, **run: asked.append(seconds) or 2)
    monkeypatch.setattr(which, "HEAD_EPOCHS", 3)
    candidates = candidates_of([weights_file(tmp_path / "vit.pt"), convnet_file(tmp_path / "cnn.pt")])
    results, left_out = compare_candidates(candidates, images, 3, seeds=(0, 1), report=lines.append, **ON_CPU)
    assert left_out == []
    assert list(results) == [one.name for one in candidates]
    assert asked == [18.0] * 5  # 3 minutes for 5 candidates and 2 seeds; the probe is not counted
    assert len(lines) == 12
    for one in candidates:
        result = results[one.name]
        assert [row["seed"] for row in result["rows"]] == [0, 1]
        assert {row["n_steps"] for row in result["rows"]} == {3 if one.start == "head" else 2}
        assert result["img_size"] == (16 if one.start == "new" else 8)
        assert result["ms"] == 2.0
        for row in result["rows"]:
            assert len(row["right"]) == images.loaders()[2].n_images
            assert row["accuracy"] == pytest.approx(sum(row["right"]) / len(row["right"]))


@pytest.mark.usefixtures("small")
def test_compare_candidates_tests_the_right_model_on_the_right_images(images, monkeypatch):
    """Without a training, a probe and a fine-tuning are the trained model itself, with the rows of these classes."""
    monkeypatch.setattr(Trainer, "train", lambda self, *loaders, **settings: None)
    results, _ = compare_candidates(candidates_of(), images, 1, report=lambda line: None, **ON_CPU)
    for name in ("vit_nano_cifar10", "convnet_cifar10"):
        model = load(name)
        fit_head(model, images.loaders()[0].class_names)
        loader = images.loaders(model.preprocessing)[2]
        right = torch.cat([predictions(model, inputs) == labels for inputs, labels in loader]).tolist()
        assert len(set(right)) == 2
        for own in [own for key, own in results.items() if name in key]:
            assert [row["right"] for row in own["rows"]] == [right] * 3


@pytest.mark.usefixtures("small")
def test_each_seed_has_its_own_new_weights_and_order(images, tmp_path, monkeypatch):
    found = {}

    def watch(self, loader, *, n_steps, progress):
        loader.set_epoch(0)
        weights = torch.cat([own.flatten() for own in self.model.parameters()]).tolist()
        found.setdefault(names[(len(seen) // 3)], []).append((weights, [y.tolist() for _, y in loader],
                                                              self.config.seed))
        seen.append(1)

    candidates = candidates_of([weights_file(tmp_path / "vit.pt", names=CLASSES)])
    names, seen = [one.name for one in candidates], []
    monkeypatch.setattr(Trainer, "train", watch)
    compare_candidates(candidates, images, 1, report=lambda line: None, **ON_CPU)
    for one in candidates:
        weights, orders, seeds = zip(*found[one.name], strict=True)
        assert seeds == (0, 1, 2)
        assert len({str(order) for order in orders}) == 3
        assert len({str(own) for own in weights}) == (3 if one.start == "new" else 1)


@pytest.mark.usefixtures("small")
def test_candidates_that_do_not_fit_are_left_out_with_a_reason(tmp_path):
    photos = make_folder(tmp_path / "photos", 18, ("train", "test"))
    candidates = candidates_of([weights_file(tmp_path / "vit.pt"), weights_file(tmp_path / "two.pt", n_channels=2)])
    images = FolderImages(data_dir=photos, img_size=18)
    fitting, left_out = fitting_candidates(candidates, images, 1, **ON_CPU)
    two = tmp_path / "two.pt"
    assert [line.partition(" is left out: ")[0] for line in left_out] == [
        f"linear probe of {two}", f"fine-tuned {two}", "ViT from scratch", "hybrid from scratch"]
    assert "in_channels 2 is out of range; photographs have 1, 3 or 4 channels" in left_out[0]
    assert "img_size 18x18 is not divisible by patch_size 4x4" in left_out[2]
    assert fitting == [one for one in candidates if one.name not in "\n".join(left_out)]
    with pytest.raises(InputError, match="only 1 of 2 candidates can be trained on these images"):
        fitting_candidates(candidates[-2:], images, 1, **ON_CPU)


@pytest.mark.usefixtures("small")
def test_a_candidate_that_needs_too_much_memory_is_left_out(images, monkeypatch):
    def train(self, *loaders, **settings):
        if isinstance(self.model, ConvNet):
            raise OutOfMemory("out of memory", 2)

    lines, candidates = [], candidates_of()
    monkeypatch.setattr(Trainer, "train", train)
    results, left_out = compare_candidates(candidates, images, 1, report=lines.append, **ON_CPU)
    assert [line.partition(" is left out: ")[0] for line in left_out] == ["fine-tuned convnet_cifar10",
                                                                          "ConvNet from scratch"]
    assert set(left_out) < set(lines)
    assert list(results) == [one.name for one in candidates if one.name not in "\n".join(left_out)]
    with pytest.raises(InputError, match="only 0 of 1 candidates"):
        compare_candidates(candidates[-1:], images, 1, report=lines.append, **ON_CPU)


@pytest.mark.usefixtures("small")
def test_photographs_are_read_in_the_size_of_each_candidate(tmp_path):
    """Those of 72 pixels from their files, those of 64 from memory; a broken file counts for neither."""
    photos = make_folder(tmp_path / "photos", 80, ("train", "test"), n=4)
    for part in ("train", "test"):
        (photos / part / "red" / "0.jpg").write_text("no picture")
    images = FolderImages(data_dir=photos, skip_corrupt=True)
    results, _ = compare_candidates(candidates_of([weights_file(tmp_path / "vit.pt", size=72)]), images, 1, n_steps=1,
                                    report=lambda line: None, **ON_CPU)
    assert [result["img_size"] for result in results.values()] == [72, 72, 64, 64, 64]
    assert {len(row["right"]) for result in results.values() for row in result["rows"]} == {7}
    assert images.skipped == [str(photos / part / "red" / "0.jpg") for part in ("test", "train")]


@pytest.mark.usefixtures("small")
def test_a_diverging_training_counts_as_zero(images, tmp_path, monkeypatch):
    def train(self, *loaders, **settings):
        raise NotFinite("the loss is not finite")

    lines = []
    monkeypatch.setattr(Trainer, "train", train)
    results, _ = compare_candidates(candidates_of([convnet_file(tmp_path / "cnn.pt")]), images, 1,
                                    report=lines.append, **ON_CPU)
    assert {row["accuracy"] for result in results.values() for row in result["rows"]} == {0.0}
    assert lines[0].endswith("; counts as 0%: the loss is not finite")
    assert which.caveats(results, {which.LINEAR: 0.4, which.LARGEST: 0.5}, 0.5)[:2] == [
        f"3 of 3 training runs of {name} diverged and count as 0%." for name in list(results)[:2]]


@pytest.mark.usefixtures("small")
def test_weights_that_are_not_finite_do_not_end_the_comparison(images, monkeypatch):
    """The measurement of the speed already fails with them."""
    def steps_within(seconds, model, *rest, **run):
        raise NotFinite("the loss is not finite")

    lines = []
    monkeypatch.setattr(which, "steps_within", steps_within)
    results, _ = compare_candidates(candidates_of()[-2:], images, 1, report=lines.append, **ON_CPU)
    assert {(row["accuracy"], row["n_steps"]) for result in results.values() for row in result["rows"]} == {(0.0, 0)}
    caveats = which.caveats(results, {which.LINEAR: 0.4, which.LARGEST: 0.5}, 0.5)
    assert not any("less than one epoch" in sentence for sentence in caveats)


# ---- The report


def results_of(accuracies, n=1000, epochs=9.0):
    """Return what compare_candidates() returns for these accuracies of each seed."""
    return {name: dict(recipe="classic", img_size=32, parameters=1234, ms=ms, seconds=60.4, rows=[
        dict(seed=seed, n_steps=200, epochs=epochs, diverged="", accuracy=level,
             right=[i < round(level * n) for i in range(n)]) for seed, level in enumerate(own)])
            for ms, (name, own) in enumerate(accuracies.items(), 1)}


@pytest.mark.usefixtures("small")
def test_compare_candidates_gives_a_probe_and_a_fine_tuning_the_same_cost(images, tmp_path, monkeypatch):
    speeds = iter((100, 200, 400, 800, 1600))
    monkeypatch.setattr(which, "throughput", lambda *words, **options: next(speeds))
    candidates = candidates_of([weights_file(tmp_path / "vit.pt")])
    results, _ = compare_candidates(candidates, images, 1, n_steps=1, report=lambda line: None, **ON_CPU)
    assert [result["ms"] for result in results.values()] == [5.0, 5.0, 2.5, 1.25, 0.625]


def next_of(accuracies, n=1000, costs=None, guessing=0.1):
    rows = {name: result["rows"] for name, result in results_of(accuracies, n).items()}
    costs = costs or dict.fromkeys(rows, 1.0)
    return which.next_step(rows, costs, {name: f"train {name}" for name in rows}, guessing)


def test_next_step_is_the_winners_command():
    assert next_of(dict(A=(0.7, 0.71, 0.7), B=(0.9, 0.91, 0.9))) == ["Next: train B"]


def test_next_step_of_a_tie_is_the_fastest_and_what_would_settle_it():
    tied = dict(A=(0.9, 0.9, 0.9), B=(0.895, 0.895, 0.895), C=(0.3, 0.3, 0.3))
    first, second = next_of(tied, costs=dict(A=2.0, B=1.0, C=0.1))
    assert first == ("Next: take the fastest of them, B (1 ms per image; a difference of 10% does not count): train B")
    assert next_of(tied, costs=dict(A=1.05, B=1.0, C=0.1))[0].endswith("train A")  # the first of equals
    assert second.startswith("A and B differ by 0.5 points; about ")
    assert second.endswith(" test images instead of 1,000 would tell them apart.")
    (_, text) = next_of(dict(A=(0.9, 0.8, 0.85), B=(0.84, 0.9, 0.8)))
    assert text == "A and B differ by 0.3 points; more test images alone would not tell them apart."


def test_next_step_recommends_no_model_if_none_can_be_chosen():
    assert next_of(dict(A=(0.9,) * 3, B=(0.1,) * 3), n=10) == ["Next: repeat the comparison with more test images."]
    for accuracies in (dict(A=(0.5,) * 3, B=(0.51,) * 3), dict(A=(0.9, 0.5, 0.9), B=(0.9, 0.9, 0.5))):
        assert next_of(accuracies, guessing=0.5)[0].startswith("Next: repeat the comparison with more --minutes")


def test_caveats_are_those_that_hold():
    def caveats(level, linear, guessing=0.5, n=400, **how):
        controls = {which.LINEAR: linear, which.LARGEST: guessing}
        return which.caveats(results_of(dict(A=(level,) * 3, B=(guessing,) * 3), n, **how), controls, guessing)

    weak = "Not shown to beat guessing (50.0%): B."
    assert caveats(0.9, 0.6) == [weak]
    assert caveats(0.9, 0.6, epochs=0.99) == ["A and B trained for less than one epoch; use more --minutes.", weak]
    both = results_of(dict(A=(0.9,) * 3, B=(0.8,) * 3), 400)
    assert which.caveats(both, {which.LINEAR: 0.8}, 0.5) == [
        "Not shown to beat the linear classifier on pixels (80.0%): B."]
    assert which.caveats(both, {which.LINEAR: 0.6}, 0.5) == []
    assert caveats(0.52, 0.52) == ["No candidate beats guessing (50.0%) by more than chance."]
    assert caveats(0.9, 1.0) == [
        "No candidate can beat the linear classifier on pixels, which classifies all 400 images correctly."]
    assert caveats(0.9, 0.9) == [
        "With 400 images, it cannot be shown that any candidate beats the linear classifier on pixels (90.0%)."]


def test_figure_and_table_show_no_mean_of_seeds_that_part():
    results = results_of({"A": (0.9, 0.91, 0.9), "B": (0.5, 0.97, 0.96)})
    controls = {which.LINEAR: 0.4, which.LARGEST: 0.5}
    caption, (heads, *rows) = which.candidate_table(results, controls, 0.5)
    assert caption.startswith("Accuracy on 1,000 images")
    assert {len(row) for row in rows} == {len(heads)}
    assert rows[0] == ["A", "90.3%", "90.0%", "91.0%", "90.0%", "classic", "32", "1,234", "9", "60", "1.00"]
    assert rows[1][:5] == ["B", "2 of 3 learned", "50.0%", "97.0%", "96.0%"]
    assert [row[:2] for row in rows[2:]] == [[which.LINEAR, "40.0%"], [which.LARGEST, "50.0%"]]
    accuracies, costs = which.draw_candidates(results, controls, 0.5).axes
    assert [label.get_text() for label in accuracies.get_yticklabels()][:2] == ["A", "B: 2 of 3 learned"]
    assert [bar.get_width() for bar in accuracies.patches] == pytest.approx([90.33, 96.5, 40, 50], abs=0.01)
    assert [bar.get_width() for bar in costs.patches] == [1.0, 2.0]
