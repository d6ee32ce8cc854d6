import html
import json
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from command_runs import ROOT, make_folder
from toy_training import one_step

import cnn_vs_vit as cv
from cnn_vs_vit import HybridCNNViT
from train_vit import NotFinite
from vit_bridge.cli import script
from vit_bridge.compare import trained
from vit_bridge.compare.experiments import EXPERIMENTS
from vit_bridge.compare.statistics import assumed_noise, describe_power
from vit_bridge.compare.trials import (
    CNN_TO_VIT_MODELS,
    RATES,
    SEEDS,
    TRAIN_FRACTIONS,
    Trial,
    TrialRecipe,
    by_dataset,
    loader_of,
    read_trials,
)
from vit_bridge.data.shapes import make_mark
from vit_bridge.models.hybrid import HybridCNNViT as HybridOfThePackage
from vit_bridge.system import Interrupted
from vit_model import InputError


def test_shipped_setup_uses_images_the_models_know():
    setup = cv.shipped_setup(50)
    for name, model in setup.models.items():
        right = (model(setup.images).argmax(dim=1) == setup.labels).float().mean()
        assert right > 0.8, name


@pytest.mark.slow
def test_cnn_vs_vit_dry_run_writes_its_files(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "cnn_vs_vit.py", "--dry-run", "--output-dir", "comparison"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "comparison"
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "results.json", "cost_flops.png", "receptive_fields.png", "attention_distance.png",
            "similarity_within.png", "patches_changed.png", "convolution_as_attention.png"} <= names
    results = json.loads((folder / "results.json").read_text())["results"]
    assert set(EXPERIMENTS) <= set(results)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        assert results[name]["finding"] in done.stdout
        assert html.escape(results[name]["finding"]) in page
    assert "they show nothing about other images" in done.stdout


def test_cnn_vs_vit_exports_the_hybrid():
    assert HybridCNNViT is HybridOfThePackage


# ---- Trials


def test_read_trials_finds_those_of_the_checkout():
    """If the folder were wrong, the report would say that nothing has been measured."""
    found = read_trials(TRAINED, [cv.COMMITTED])
    assert all(len({trial["result"]["seed"] for trial in own}) <= len(SEEDS) for own in found.values())


@pytest.fixture
def few(monkeypatch):
    """Make trials of Reach take no time; return those that are measured."""
    measured = []

    def measure(self, trial, chosen, **run):
        measured.append(trial)
        return dict(arm=trial.arm, seed=trial.seed, distances=[8, 20], correct=[9, 7], n=10, detector=[0.5, 0.5],
                    window=None, learning_rate=0.25, rates={0.25: 0.9}, n_steps=1)

    monkeypatch.setattr(trained.Reach, "measure", measure)
    return measured


def options(*words):
    return cv.make_parser().parse_args([*words])


def test_cnn_vs_vit_measures_and_reports_trials(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cv.main(["--train", "--only", "reach", "--results-dir", "trials", "--output-dir", "out"])
    shown = capsys.readouterr().out
    assert "reach-ViT-0: saved" in shown
    assert "ViT: none" in shown
    assert len(few) == len(SEEDS) * len(trained.REACH_ARMS)
    assert (tmp_path / "out" / "reach.png").is_file()
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == {"reach"}
    cv.main(["--only", "reach", "--results-dir", "trials", "--output-dir", "again"])
    assert (tmp_path / "again" / "reach.png").is_file()
    assert len(few) == len(SEEDS) * len(trained.REACH_ARMS)


def test_show_trials_separates_datasets(few, tmp_path, capsys):
    plan = plan_trials(["reach"], tmp_path / "trials", dict(device="cpu", amp="off"), dict(reach="the command"))
    trials = run_trials(plan)["reach"]
    for trial in trials[:6]:
        trial["result"]["dataset"] = "CIFAR-10 (JPEG)"
    results, sections = cv.show_trials(["reach", "cues"], tmp_path, dict(reach=trials))
    assert set(results) == {"reach", "reach_CIFAR-10 (JPEG)"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"reach.png", "reach_CIFAR-10-JPEG.png"}
    assert "6 trials, measured " in sections[0].note
    assert sections[0].note.endswith("with: the command")
    assert "python cnn_vs_vit.py --train --only cues" in capsys.readouterr().out
    assert [section.finding[:16] for section in sections if section.title == "Outline or texture"] == [
        "Not measured yet"]


def test_make_plan_describes_the_images(tmp_path):
    folder = make_folder(tmp_path / "my set", 16, ("train", "test"))
    words = ["--train", "--data-dir", str(folder), "--train-fractions", "1", "0.5"]
    plan = cv.make_plan(["data"], tmp_path / "trials", options(*words))
    assert plan.numbers[0] * 2 == pytest.approx(plan.numbers[1], abs=1)
    assert {trial.dataset for trial in plan.trials} == {"my set"}
    assert len(plan.trials) == 2 * len(SEEDS) * len(trained.DATA_ARMS)
    assert plan.commands["data"].endswith(f"--train --only data --data-dir '{folder}' --train-fractions 1 0.5")
    with pytest.raises(InputError, match="has no test images"):
        cv.make_plan(["data"], tmp_path / "other", options("--train", "--data-dir", str(folder / "train")))


def test_make_plan_tells_changed_images_of_the_same_names_apart(tmp_path):
    first = make_folder(tmp_path / "a" / "photos", 16, ("train", "test"))
    other = make_folder(tmp_path / "b" / "photos", 16, ("train", "test"))
    shutil.copy(other / "train" / "red" / "0.jpg", other / "train" / "red" / "1.jpg")
    contents = [cv.make_plan(["data"], tmp_path / "trials", options("--train", "--data-dir", str(folder))).settings[
        "data"]["images"]["content"] for folder in (first, first, other)]
    assert contents[0] == contents[1] != contents[2]


def test_cnn_vs_vit_reports_every_error_before_measuring(few, tmp_path, monkeypatch):
    for measures in ("run_experiments", "run_trials"):
        monkeypatch.setattr(cv, measures, lambda *words: pytest.fail("measured first"))
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "reach-ViT-0.json").write_text("{")
    (tmp_path / "file").touch()
    folder = make_folder(tmp_path / "photos", 16, ("train", "test"))
    two = ["--only", "reach", "convolution"]
    for words, expected in (([*two, "--results-dir", "trials"], "is not a result"),
                            ([*two, "--results-dir", "file"], "--results-dir file is a file; choose the folder"),
                            (["--train", *two, "--results-dir", "trials"], "is not a result"),
                            (["--train", "--results-dir", "file"], "--results-dir file is a file; choose the folder"),
                            (["--train", "--data-dir", str(folder), "--img-size", "18"], "not divisible by patch")):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=expected):
            cv.main([*words, "--output-dir", "out"])
    assert not few
    assert not (tmp_path / "out").exists()


def test_make_parser_accepts_the_old_spellings():
    old = options("--full", "--cells", "runs/x", "--shares", "0.5")
    assert old == options("--train", "--results-dir", "runs/x", "--train-fractions", "0.5")


def test_command_of_repeats_every_option_that_matters():
    words = ["--seed", "5", "--skip-corrupt", "--amp", "bf16", "--device", "cpu", "--img-size", "24", "--data-dir",
             "a b", "--train-fractions", "1"]
    command = cv._command_of("data", options("--train", *words))
    own, again = (vars(options(*part)) for part in (["--train", *words], shlex.split(command)[2:]))
    assert own | dict(only=["data"]) == again


@pytest.mark.slow
def test_cnn_vs_vit_mentions_shipped_models_only_where_used(tmp_path):
    for name, there in (("convolution", True), ("reach", False)):
        cv.main(["--only", name, "--output-dir", str(tmp_path / name)])
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert (cv.SHIPPED_NOTE in page, cv.INTRODUCTION in page) == (there, True)


# ---- Which for my data?


@pytest.mark.slow
def test_cnn_vs_vit_reports_skipped_images(tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path / "photos", 16, ("train", "test"))
    broken = [next((folder / part).rglob("*.jpg")) for part in ("train", "test")]
    for path in broken:
        path.write_text("no picture")
    monkeypatch.setattr("vit_bridge.compare.trials.steps_within", one_step)
    cv.main(["--data-dir", str(folder), "--minutes", "1", "--skip-corrupt", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert all(f"Skipped, because it cannot be read: {path}" in printed for path in broken)
    assert "2 image files cannot be read and were ignored." in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["verdict"]
    assert found["skipped"] == sorted(map(str, broken))


def test_split_for_linear_sets_a_fifth_aside():
    drawn = make_mark(17, 32)
    loader = loader_of(drawn.images, drawn.labels, drawn.class_names, TrialRecipe(batch_size=8), training=True)
    fit, choose = cv._split_for_linear(loader)
    assert torch.equal(choose.images, drawn.images[[0, 5, 10, 15]])
    assert torch.equal(choose.labels, drawn.labels[[0, 5, 10, 15]])
    assert fit.n_images == 13
    assert not fit.training


@pytest.mark.slow
def test_cnn_vs_vit_judges_a_folder(tmp_path, monkeypatch, capsys):
    drawn = [make_mark(n, 32, start=start) for n, start in ((40, 0), (12, 100), (30, 200))]
    loaders = tuple(loader_of(one.images, one.labels, one.class_names, TrialRecipe(batch_size=8), training=i == 0)
                    for i, one in enumerate(drawn))
    monkeypatch.setattr(cv, "_loaders_of", lambda options: loaders)
    monkeypatch.setattr("vit_bridge.compare.trials.steps_within", one_step)
    cv.main(["--data-dir", str(tmp_path), "--minutes", "1", "--device", "cpu", "--output-dir", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["verdict"]
    assert set(results["rows"]) == {"ConvNet", "Hybrid", "ViT"}
    assert results["finding"] in capsys.readouterr().out
    assert (tmp_path / "out" / "verdict.png").is_file()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.escape(results["finding"]).replace("\n", "<br>\n") in page
    assert "Accuracy on 30 test images" in page
    assert "predicting the largest class every time</td><td>50.0%" in page
    assert "One model was trained for only 1 step " in results["finding"]
    assert "With only 40 training images, a pretrained model may do better" in results["finding"]


@pytest.fixture
def judged(monkeypatch):
    """Replace the trainings: three equal models, right on 15 of 20 images, at 500, 250 and 1,000 images per second.

    The linear classifier is right on 30% of the images that choose its strength, and on 40% of the test images.
    """
    speeds = dict(ConvNet=500, Hybrid=250, ViT=1000)
    right = [True] * 15 + [False] * 5
    rows = {kind: [dict(seed=seed, n_steps=200, right=right, accuracy=0.75) for seed in SEEDS] for kind in speeds}
    monkeypatch.setattr(cv, "compare_on_dataset", lambda loaders, minutes, **run: rows)
    monkeypatch.setattr(cv, "build_kind", lambda kind, n_classes, img_size: kind)
    monkeypatch.setattr(cv, "throughput", lambda model, **run: speeds[model])
    monkeypatch.setattr(cv, "linear_classifier", lambda fit, choose, asked: dict(
        val_acc=0.3, test_acc=0.9 if choose is asked else 0.4))


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize(("parts", "split"), [(("",), "validation"), (("train", "test"), "test")])
def test_compare_on_folder_names_the_images_and_costs(parts, split, tmp_path, capsys):
    words = options("--data-dir", str(make_folder(tmp_path / "photos", 16, parts)), "--minutes", "1", "--device", "cpu")
    results, (section,) = cv.compare_on_folder(words, tmp_path)
    found = results["verdict"]
    assert found["costs"] == dict(ConvNet=2.0, Hybrid=4.0, ViT=1.0)
    assert "ViT is the fastest, at about 1 ms per image" in found["finding"]
    assert found["finding"] == section.finding
    assert found["controls"]["a linear classifier on the pixels"] == 0.4
    ((caption, (heads, *rows)),) = section.tables
    assert caption.endswith(f" {split} images")
    assert {len(row) for row in rows} == {len(heads)}
    assert rows[3][:2] == ["a linear classifier on the pixels", "40.0%"]
    assert section.figures["verdict"].axes[0].get_title().startswith(f"accuracy on the {split} images (%)\n")
    assert f" {split} images. " in capsys.readouterr().out
    assert [(name, cost) for name, *_, cost in rows[:3]] == [("ConvNet", "2.00"), ("Hybrid", "4.00"), ("ViT", "1.00")]


@pytest.mark.usefixtures("judged")
def test_compare_on_folder_says_beforehand_what_can_be_found(tmp_path, monkeypatch, capsys):
    words = options("--data-dir", str(make_folder(tmp_path / "photos", 16, ("train", "test"))), "--minutes", "1",
                    "--device", "cpu")
    n = cv._loaders_of(words)[2].n_images
    expected = f": {describe_power(assumed_noise(n, 3))}"
    monkeypatch.setattr(cv, "compare_on_dataset", lambda *loaders, compare=cv.compare_on_dataset, **run: (
        asked.append(capsys.readouterr().out), compare(*loaders, **run))[1])
    asked = []
    _, (section,) = cv.compare_on_folder(words, tmp_path)
    assert (f"Expected before any training (assuming an accuracy of 75%, and seeds that differ by 1 point){expected}"
            in asked[0])
    assert expected not in capsys.readouterr().out  # printed once
    assert section.note.endswith(expected)


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize(("parts", "advice"), [
    (("train",), "Put more images into {photos}/test/<class>/."),
    (("",), "Move the training images into {photos}/train/<class>/ and put test images into {photos}/test/<class>/.")])
def test_compare_on_folder_says_beforehand_that_images_are_too_few(parts, advice, tmp_path, monkeypatch, capsys):
    photos = make_folder(tmp_path / "photos", 16, parts, n=8)
    words = options("--data-dir", str(photos), "--minutes", "1", "--device", "cpu")
    n = cv._loaders_of(words)[1].n_images
    printed = []
    monkeypatch.setattr(cv, "compare_on_dataset", lambda *loaders, compare=cv.compare_on_dataset, **run: (
        printed.append(capsys.readouterr().out), compare(*loaders, **run))[1])
    cv.compare_on_folder(words, tmp_path)
    assert (f"{n} validation images are too few to name a winner; at least 20 are needed. "
            f"{advice.format(photos=photos)}\n") in printed[0]


@pytest.mark.usefixtures("judged")
def test_compare_on_folder_gives_no_mean_to_a_kind_that_learns_or_does_not(tmp_path, monkeypatch):
    levels = dict(ConvNet=(0.9, 0.91, 0.9), Hybrid=(0.7, 0.71, 0.7), ViT=(0.5, 0.97, 0.96))
    rows = {kind: [dict(seed=seed, n_steps=200, right=[i < 1000 * own for i in range(1000)], accuracy=own)
                   for seed, own in enumerate(levels[kind])] for kind in levels}
    monkeypatch.setattr(cv, "compare_on_dataset", lambda loaders, minutes, **run: rows)
    monkeypatch.setattr(cv, "_share_of_largest_class", lambda *loaders: 0.5)
    words = options("--data-dir", str(make_folder(tmp_path / "photos", 16, ("train", "test"))), "--minutes", "1",
                    "--device", "cpu")
    _, (section,) = cv.compare_on_folder(words, tmp_path)
    assert section.finding.startswith("ConvNet is ahead of Hybrid by 20.0 points")
    assert "ViT learned with only 2 of 3 seeds. These reach at least 96.0%, the others at" in section.finding
    ((_, (_, *table)),) = section.tables
    assert [row[:5] for row in table[:3]] == [
        ["ConvNet", "90.3%", "90.0%", "91.0%", "90.0%"], ["Hybrid", "70.3%", "70.0%", "71.0%", "70.0%"],
        ["ViT", "2 of 3 learned", "50.0%", "97.0%", "96.0%"]]
    names = [label.get_text() for label in section.figures["verdict"].axes[0].get_yticklabels()]
    assert "ViT: 2 of 3 learned" in [" ".join(name.split()) for name in names]
    assert [bar.get_width() for bar in section.figures["verdict"].axes[0].patches][2] == pytest.approx(96.5)


def test_cnn_vs_vit_says_a_stopped_verdict_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cv, "compare_on_dataset", lambda *loaders, **run: signal.raise_signal(signal.SIGTERM))
    folder = make_folder(tmp_path / "photos", 16, ("train", "test"))
    with pytest.raises(Interrupted, match="none of them is saved; use fewer --minutes"):
        cv.main(["--data-dir", str(folder), "--minutes", "1", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "expected"), [
    (["--only", "costs"], "--only 'costs' is unknown; choose one of: cost, receptive_field, "),
    (["--minutes", "3"], "set --data-dir DIR too"),
    (["--data-dir", "nowhere"], "--data-dir nowhere does not specify what to compare; add --minutes M"),
    (["--train-fractions", "2"], "--train-fractions/--shares: 2"),
    (["--data-dir", "data", "--minutes", "3"], "--data-dir data does not exist"),
    (["--data-dir", "data", "--minutes", "3", "--dry-run"], "--data-dir data does not exist"),
    (["--data-dir", ".", "--minutes", "3", "--train"], "remove --train and --only"),
    (["--data-dir", ".", "--minutes", "3", "--only", "cost"], "remove --train and --only"),
    (["--data-dir", ".", "--train", "--only", "position"], "not with --only position"),
    (["--device", "gpu"], "device 'gpu' is unknown"), (["--img-size", "96"], "a whole number from 8 to 64")])
def test_cnn_vs_vit_reports_bad_options_in_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script(lambda: cv.main(words))
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert expected in error


def test_make_parser_defaults_to_the_experiments_fractions():
    assert options().train_fractions == list(TRAIN_FRACTIONS)


def test_trial_path_names_its_parts():
    trials = [Trial("reach", "ViT", 0), Trial("data", "ViT, mean pooling", 2, 450, "photos")]
    assert [trial.path(cv.COMMITTED).name for trial in trials] == [
        "reach-ViT-0.json", "data-photos-ViT-mean-pooling-450-2.json"]


def test_read_trials_prefers_the_fuller_then_the_first_folder(few, tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    train(["reach"], mine, options("--train"))
    assert len(read_trials(["reach"], [mine, theirs])["reach"]) == 12
    assert len(read_trials(["reach"], [theirs, mine])["reach"]) == 12
    train(["reach"], theirs, options("--train"))
    for path in list(theirs.iterdir())[:5]:
        path.unlink()
    assert len(read_trials(["reach"], [mine, theirs])["reach"]) == 12  # never some of both
    assert len(read_trials(["reach"], [theirs, mine])["reach"]) == 12  # and rather all than some
    first = read_trials(["reach"], [mine, theirs])["reach"][0] | dict(commit="mine")
    (mine / "reach-ViT-0.json").write_text(json.dumps(first))
    train(["reach"], theirs, options("--train"))
    commits = [[trial["commit"] for trial in read_trials(["reach"], folders)["reach"]].count("mine")
               for folders in ([mine, theirs], [theirs, mine])]
    assert commits == [1, 0]  # the first of equals


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"result": {}}', '{"result": {"kind": "ViT"}, "date": ""}'])
def test_read_trials_refuses_a_file_that_is_no_trial(text, tmp_path, few):
    (tmp_path / "reach-ViT-0.json").write_text(text)
    for read in (lambda: read_trials(["reach"], [tmp_path]),
                 lambda: train(["reach"], tmp_path, options("--train"))):
        with pytest.raises(InputError, match=r"reach-ViT-0.json is not a result of cnn_vs_vit.py --train .*; remove"):
            read()
    assert not few


def test_share_of_largest_class_picks_it_by_training_images():
    counts = [type("Loader", (), dict(class_counts=own, n_images=sum(own))) for own in ([3, 7], [30, 10])]
    assert cv._share_of_largest_class(*counts) == 0.25


def test_shipped_note_quotes_the_models_training_results():
    for key in ("convnet", "hybrid", "vit_nano"):
        trial = json.loads((cv.COMMITTED / f"weights-{key}-0.json").read_text())["result"]
        assert f"{trial['n_steps']:,}" in cv.SHIPPED_NOTE
        assert f"{trial['test_acc']:.1%}" in cv.SHIPPED_NOTE


@pytest.mark.slow
def test_cnn_vs_vit_train_dry_run_finishes(tmp_path, capsys):
    cv.main(["--train", "--dry-run", "--only", "data", "--train-fractions", "1", "--device", "cpu", "--amp", "off"])
    printed = capsys.readouterr().out
    assert "Data efficiency" in printed
    assert "4 trials, measured" in printed
    assert "Dry run" in printed


def test_run_trials_leaves_out_a_diverging_trial(tmp_path, monkeypatch, capsys):
    def diverges(self, kind, seed, **run):
        raise NotFinite("loss or gradient are not finite")

    monkeypatch.setattr(trials_module.Reach, "measure", diverges)
    assert train(["reach"], tmp_path, options("--train")) == dict(reach=[])
    assert "reach-ViT-0 is skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "change"), [
    ("reach-ViT-0", dict(correct=[1])), ("reach-ViT-0", dict(seed=None)), ("reach-ViT-0", dict(n=0)),
    ("reach-ViT-0", dict(kind="Foo")), ("reach-ViT-0", dict(rate="0.1")), ("cues-ViT-0", dict(choices={})),
    ("cues-ViT-0", dict(shape_bias=None)), ("data-ViT-18000-0", dict(correct="9")), ("data-ViT-18000-0", dict(n="9")),
    ("data-ViT-18000-0", dict(n_images=-1))])
def test_read_trials_refuses_a_trial_with_wrong_values(name, change, tmp_path):
    trial = json.loads((cv.COMMITTED / f"{name}.json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps(trial))
    experiment = name.split("-")[0]
    assert len(read_trials([experiment], [tmp_path])[experiment]) == 1
    trial["result"] |= change
    (tmp_path / f"{name}.json").write_text(json.dumps(trial))
    with pytest.raises(InputError, match=rf"\A[^\n]*{name}.json is not a result of [^\n]*; remove it"):
        read_trials([experiment], [tmp_path])


def test_loaders_of_shrinks_photographs(tmp_path, capsys):
    folder = make_folder(tmp_path / "photos", 100, ("train", "test"))
    loaders = cv._loaders_of(options("--data-dir", str(folder)))
    assert [loader.img_size for loader in loaders] == [64, 64, 64]
    assert "compared at 64 x 64 pixels" in capsys.readouterr().out
    assert cv._loaders_of(options("--data-dir", str(folder), "--img-size", "24"))[0].img_size == 24
