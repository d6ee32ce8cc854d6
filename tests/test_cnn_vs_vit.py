import html
import json
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from command_runs import ROOT, make_folder

import cnn_vs_vit as cv
from cnn_vs_vit import DRY_RUN_IMAGES, HybridCNNViT
from train_vit import NotFinite
from vit_bridge.cli import script
from vit_bridge.compare import trials as trials_module
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
    read_trials,
)
from vit_bridge.compare.which import candidates_of
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


def test_plan_trials_goes_seed_by_seed(tmp_path):
    plan = cv.plan_trials(["reach", "cues"], tmp_path, options("--train"))
    assert len(set(plan.trials)) == len(plan.trials) == 2 * len(SEEDS) * len(CNN_TO_VIT_MODELS)
    assert [(trial.experiment, trial.kind, trial.seed) for trial in plan.trials[:5]] == [
        *(("reach", kind, SEEDS[0]) for kind in CNN_TO_VIT_MODELS), ("reach", "ViT", SEEDS[1])]


def test_read_trials_finds_those_of_the_checkout():
    """If the folder were wrong, the report would say that nothing has been measured."""
    found = read_trials(trials_module.TRAINING_EXPERIMENTS, [cv.COMMITTED])
    assert {name: len(own) for name, own in found.items()} == dict(cues=12, reach=12, data=72)


def test_cnn_vs_vit_reports_the_trials_of_the_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cv.main(["--only", *trials_module.TRAINING_EXPERIMENTS, "--output-dir", "out"])
    assert "Not measured yet" not in capsys.readouterr().out
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == {
        "cues", "reach", "data", "data_CIFAR-10 (JPEG)"}
    assert (tmp_path / "out" / "data_efficiency_CIFAR-10-JPEG.png").is_file()


@pytest.fixture
def few(monkeypatch):
    """Make trials take no time; return the list of measured ones, with the learning rates that they tried."""
    measured = []

    def measure(self, kind, seed, rates, **run):
        measured.append((kind, seed, rates))
        return dict(kind=kind, seed=seed, distances=[8, 20], correct=[9, 7], n=10, rate=rates[-1])

    monkeypatch.setattr(trials_module.Reach, "measure", measure)
    return measured


def options(*words):
    return cv.make_parser().parse_args([*words])


def train(names, folder, options, *recipe):
    return cv.run_trials(cv.plan_trials(names, folder, options, *recipe), options)


def test_run_trials_skips_trials_already_measured(few, tmp_path, capsys):
    trials = train(["reach"], tmp_path, options("--train"))
    assert "reach-ViT-0: saved, 1 of 12" in capsys.readouterr().out
    assert len(few) == len(trials["reach"]) == 12
    (tmp_path / "reach-ConvNet-1.json").unlink()
    again = train(["reach"], tmp_path, options("--train"))
    assert few[12:] == [("ConvNet", 1, RATES[-1:])]
    assert {rates for _, number, rates in few if number == SEEDS[0]} == {RATES}  # the first seed chooses
    assert {rates for _, number, rates in few if number != SEEDS[0]} == {RATES[-1:]}
    assert again == trials
    first = trials["reach"][0]
    assert first["command"] == "python cnn_vs_vit.py --train --only reach"
    assert first["result"]["kind"] in CNN_TO_VIT_MODELS
    assert {"commit", "machine", "versions", "date", "seed", "setting"} <= set(first)
    with pytest.raises(InputError, match="measured on other images, in another precision or with another recipe"):
        train(["reach"], tmp_path, options("--train"), TrialRecipe(n_steps=3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_trials_says_what_is_kept_when_stopped(number, few, tmp_path, monkeypatch):
    def cut_off(self, kind, seed, **run):
        if (kind, seed) == ("ConvNet", 0):
            signal.raise_signal(number)
        return dict(kind=kind, seed=seed, distances=[8], correct=[9], n=10, rate=1e-3)

    monkeypatch.setattr(trials_module.Reach, "measure", cut_off)
    with pytest.raises(Interrupted, match=r"3 of 12 trials are in .*; the same command continues with the next one"):
        train(["reach"], tmp_path, options("--train"))
    assert len(list(tmp_path.iterdir())) == 3


def test_show_trials_separates_datasets(few, tmp_path, capsys):
    trials = train(["reach"], tmp_path, options("--train"))["reach"]
    for trial in trials[:6]:
        trial["result"]["dataset"] = "photos"
    assert {group: len(own) for group, own in by_dataset(trials).items()} == {"photos": 6, "": 6}
    results, sections = cv.show_trials(["reach", "cues"], tmp_path, dict(reach=trials))
    assert set(results) == {"reach", "reach_photos"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"reach.png", "reach_photos.png"}
    for trial in trials[:6]:
        trial["result"]["dataset"] = "CIFAR-10 (JPEG)"
    cv.show_trials(["reach"], tmp_path, dict(reach=trials))
    assert (tmp_path / "reach_CIFAR-10-JPEG.png").is_file()
    assert "6 trials, measured " in sections[0].note
    assert "python cnn_vs_vit.py --train --only cues" in capsys.readouterr().out
    assert [section.finding[:16] for section in sections if section.title == "Outline or texture"] == [
        "Not measured yet"]


def test_run_trials_on_a_folder_records_name_and_checks_images(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "a" / "my set", 16, ("train", "test"))
    tried = []

    def measure(self, kind, seed, n_images, loaders, rates, **run):
        tried.append((seed, n_images, rates))
        return dict(kind=kind, seed=seed, n_images=n_images, correct=3, n=4, rate=rates[-1])

    monkeypatch.setattr(trials_module.DataEfficiency, "measure", measure)
    words = ["--train", "--data-dir", str(folder), "--train-fractions", "1", "0.5"]
    trials = train(["data"], tmp_path / "trials", options(*words))
    assert len(trials["data"]) == 24
    assert {trial["result"]["dataset"] for trial in trials["data"]} == {"my set"}
    most = max(n_images for _, n_images, _ in tried)  # with which the first seed chooses the rates
    assert all((rates == RATES) == ((number, n_images) == (SEEDS[0], most)) for number, n_images, rates in tried)
    assert trials["data"][0]["command"].endswith(f"--train --only data --data-dir '{folder}' --train-fractions 1 0.5")
    other = make_folder(tmp_path / "b" / "my set", 16, ("train", "test"), n=20)
    with pytest.raises(InputError, match="measured on other images"):  # although its trials would have other names
        train(["data"], tmp_path / "trials", options("--train", "--data-dir", str(other), "--train-fractions", "1"))
    assert len(list((tmp_path / "trials").iterdir())) == 24
    with pytest.raises(InputError, match="has no test images"):
        train(["data"], tmp_path / "trials", options("--train", "--data-dir", str(folder / "train")))


def test_plan_trials_refuses_changed_images_of_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr(trials_module.DataEfficiency, "measure", lambda self, kind, seed, n_images, rates, **run: dict(
        kind=kind, seed=seed, n_images=n_images, correct=3, n=4, rate=rates[-1]))
    first = make_folder(tmp_path / "a" / "photos", 16, ("train", "test"))
    other = make_folder(tmp_path / "b" / "photos", 16, ("train", "test"))
    shutil.copy(other / "train" / "red" / "0.jpg", other / "train" / "red" / "1.jpg")
    words, trials = ["--train", "--train-fractions", "1", "--data-dir"], tmp_path / "trials"
    for _ in range(2):
        assert len(train(["data"], trials, options(*words, str(first)))["data"]) == 12
    with pytest.raises(InputError, match="measured on other images"):
        cv.plan_trials(["data"], trials, options(*words, str(other)))


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


def test_run_trials_asks_for_another_output_folder_when_stopped(few, tmp_path, monkeypatch):
    def cut_off(self, kind, seed, **run):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trials_module.Reach, "measure", cut_off)
    with pytest.raises(Interrupted, match=r"0 of 12 trials .*; the same command with another --output-dir continues"):
        train(["reach"], tmp_path, options("--train", "--output-dir", "out"))


@pytest.mark.slow
def test_cnn_vs_vit_mentions_shipped_models_only_where_used(tmp_path):
    for name, there in (("convolution", True), ("reach", False)):
        cv.main(["--only", name, "--output-dir", str(tmp_path / name)])
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert (cv.SHIPPED_NOTE in page, cv.INTRODUCTION in page) == (there, True)


# ---- Which for my images?


@pytest.mark.slow
def test_cnn_vs_vit_judges_a_folder_in_a_dry_run(tmp_path, capsys):
    photos = make_folder(tmp_path / "photos", 16, ("train", "test"), n=30)
    broken = [next((photos / part).rglob("*.jpg")) for part in ("train", "test")]
    for path in broken:
        path.write_text("no picture")
    cv.main(["--data-dir", str(photos), "--minutes", "1", "--dry-run", "--skip-corrupt", "--device", "cpu", "--amp",
             "off", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["verdict"]
    assert list(found["results"]) == [one.name for one in candidates_of()]
    assert {len(row["right"]) for result in found["results"].values() for row in result["rows"]} == {DRY_RUN_IMAGES}
    assert found["finding"] in printed
    assert found["skipped"] == sorted(map(str, broken))
    assert all(f"Skipped, because it cannot be read: {path}" in printed for path in broken)
    assert (tmp_path / "out" / "verdict.png").is_file()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.escape(found["finding"]).replace("\n", "<br>\n") in page
    assert f"Accuracy on {DRY_RUN_IMAGES} images" in page
    assert "always the largest class</td>" in page


@pytest.fixture
def judged(monkeypatch):
    """Replace the trainings: all candidates are right on 150 of 200 images, and the last one on all of them.

    Returns what was printed before the trainings, and the arguments of compare_candidates().
    """
    before = []

    def compare(candidates, images, minutes, **run):
        before.append((candidates, images, minutes, run))
        print("TRAINING")
        levels = [150] * (len(candidates) - 1) + [200]
        return {one.name: dict(recipe="classic", img_size=32, parameters=9, ms=2.0, seconds=1.0, rows=[
            dict(seed=seed, n_steps=9, epochs=9.0, diverged="", accuracy=n / 200, right=[i < n for i in range(200)])
            for seed in SEEDS]) for one, n in zip(candidates, levels, strict=True)}

    monkeypatch.setattr(cv, "compare_candidates", compare)
    return before


def judge(folder, tmp_path, *words):
    """Return (data, section) of compare_on_folder()."""
    results, (section,) = cv.compare_on_folder(options("--data-dir", str(folder), "--minutes", "1", *words), tmp_path)
    return results["verdict"], section


@pytest.mark.parametrize(("parts", "split"), [(("",), "validation"), (("train", "test"), "test")])
def test_compare_on_folder_says_beforehand_what_is_compared_and_can_be_found(parts, split, judged, tmp_path, capsys):
    photos = make_folder(tmp_path / "photos", 16, parts, n=200)
    found, section = judge(photos, tmp_path)
    before, _, after = capsys.readouterr().out.partition("TRAINING")
    n = judged[0][1].loaders()[1 if split == "validation" else 2].n_images
    assert f"6 candidates, each with 3 seeds, share 1 min and are compared on {n} {split} images." in before
    assert "vit_nano_cifar10 (VisionTransformer) was trained on CIFAR-10 (JPEG)." in before
    expected = (f"Expected before any training (assuming an accuracy of 75%, and seeds that differ by 1 point): "
                f"{describe_power(assumed_noise(n, 3, 6))}")
    assert expected in before
    assert expected not in after
    assert section.note == expected
    assert section.finding == found["finding"]
    assert section.finding in after
    ((caption, (heads, *rows)),) = section.tables
    assert {len(row) for row in rows} == {len(heads)}
    assert caption.startswith("Accuracy on 200 images")


@pytest.mark.parametrize(("parts", "advice"), [
    (("train",), "Put more images into {photos}/test/<class>/."),
    (("",), "Move the training images into {photos}/train/<class>/ and put test images into {photos}/test/<class>/.")])
def test_compare_on_folder_says_beforehand_that_images_are_too_few(parts, advice, judged, tmp_path, capsys):
    photos = make_folder(tmp_path / "photos", 16, parts, n=8)
    judge(photos, tmp_path)
    n = judged[0][1].loaders()[1].n_images
    assert (f"{n} validation images are too few to name a winner; at least 20 are needed. "
            f"{advice.format(photos=photos)}\nTRAINING") in capsys.readouterr().out


def test_compare_on_folder_recommends_the_winners_command(judged, tmp_path):
    photos = make_folder(tmp_path / "photos", 16, ("train", "test"))
    found, _ = judge(photos, tmp_path, "--img-size", "20")
    first, second, *_ = found["finding"].splitlines()
    assert first.startswith("ConvNet from scratch is ahead of linear probe of vit_nano_cifar10 by 25.0 points (95% ")
    assert second == f"Next: python train_vit.py --data-dir {photos} --model convnet --img-size 20 --minutes 1"


def test_compare_on_folder_names_an_unfair_start(judged, tmp_path):
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    photos = make_folder(tmp_path / "photos", 16, ("train", "test"), classes=names, n=4)
    found, _ = judge(photos, tmp_path)
    assert [line.partition(" was")[0] for line in found["finding"].splitlines() if "is unfair" in line] == [
        "vit_nano_cifar10", "convnet_cifar10"]
    found, _ = judge(make_folder(tmp_path / "two", 16, ("train", "test"), n=4), tmp_path)
    assert "unfair" not in found["finding"]


def test_compare_on_folder_passes_the_options_on(judged, tmp_path):
    photos = make_folder(tmp_path / "photos", 16, ("train", "test"))
    judge(photos, tmp_path, "--pretrained", "convnet_cifar10", "vit_nano_shapes", "--seed", "4", "--img-size", "24",
          "--device", "cpu", "--amp", "off")
    ((candidates, images, minutes, run),) = judged
    assert [one.name for one in candidates[:3]] == ["fine-tuned convnet_cifar10", "linear probe of vit_nano_shapes",
                                                    "fine-tuned vit_nano_shapes"]
    assert (minutes, run) == (1.0, dict(device="cpu", amp="off", n_steps=None))
    assert (images.loaders()[0].seed, images.loaders()[0].img_size, images.limit) == (4, 24, None)


def test_cnn_vs_vit_says_a_stopped_verdict_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cv, "compare_candidates", lambda *words, **run: signal.raise_signal(signal.SIGTERM))
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
    (["--pretrained", "vit_nano_cifar10"], "--pretrained is for the comparison on your own images; add --data-dir DIR"),
    (["--data-dir", ".", "--minutes", "3", "--pretrained", "vit_nanno"], "there is no pretrained model or file"),
    (["--data-dir", ".", "--minutes", "3", "--pretrained", "a.pt", "a.pt"], "--pretrained lists a.pt twice"),
    (["--data-dir", ".", "--minutes", "0"], "--minutes: 0 is out of range; expected a positive number"),
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
