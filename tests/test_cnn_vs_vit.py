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
from vit_bridge.cli import script
from vit_bridge.compare import trained
from vit_bridge.compare.experiments import EXPERIMENTS
from vit_bridge.compare.statistics import assumed_noise, describe_power
from vit_bridge.compare.trained import TRAINED
from vit_bridge.compare.trials import SEEDS, plan_trials, read_trials, run_trials
from vit_bridge.compare.which import candidates_of
from vit_bridge.data.audit import audit_folder
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
        return dict(arm=trial.arm, seed=trial.seed, distances=[8, 20], correct=[9, 7], n=10, sums=[[0.5, 0.75]] * 2,
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
    assert "no network is right in at least 95% of the images" in shown
    assert len(few) == len(SEEDS) * len(trained.REACH_ARMS)
    assert (tmp_path / "out" / "reach.png").is_file()
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == {"reach"}
    cv.main(["--only", "reach", "--results-dir", "trials", "--output-dir", "again"])
    assert (tmp_path / "again" / "reach.png").is_file()
    assert len(few) == len(SEEDS) * len(trained.REACH_ARMS)


def test_show_trials_separates_datasets(few, tmp_path, capsys):
    plan = plan_trials(dict(reach=TRAINED["reach"]), tmp_path / "trials", dict(device="cpu", amp="off"),
                       dict(reach="the command"))
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
    for trial, dataset in zip(trials[:6], ["my photos", "my-photos"] * 3, strict=True):
        trial["result"]["dataset"] = dataset
    _, sections = cv.show_trials(["reach"], tmp_path, dict(reach=trials[:6]))
    assert [*sections[0].figures, *sections[1].figures] == ["reach_my-photos", "reach_my-photos-2"]


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
    contents = [cv.make_plan(["data"], tmp_path / "trials", options(
        "--train", "--data-dir", str(folder), "--train-fractions", "1")).settings["data"]["images"]["content"]
        for folder in (first, first, other)]
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
                            (["--train", "--only", "cost"], "--train has no effect on cost; remove it, or add one of"),
                            (["--train", "--data-dir", str(folder)], "2 training images, drawn by seed 0, show only 1"),
                            (["--train", "--data-dir", str(folder), "--train-fractions", "0.5", "1", "--img-size",
                              "18"], "not divisible by patch")):
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
    assert found["finding"].startswith("A dry run: every model trained for one step, so what follows means nothing.")
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
            for seed in SEEDS]) for one, n in zip(candidates, levels, strict=True)}, []

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
    assert f"6 candidates, each with 3 seeds, share 1 min (4 s for each training run, except that of a probe) and " \
           f"are compared on {n} {split} images." in before
    assert "vit_nano_cifar10 (VisionTransformer) was trained on CIFAR-10 (JPEG)." in before
    expected = (f"Expected before any training (assuming an accuracy of 75%, and seeds that differ by 1 point): "
                f"{describe_power(assumed_noise(n, 3, 6))}")
    assert expected in before
    assert expected not in after
    assert section.note.startswith(f"{expected}\nvit_nano_cifar10 (VisionTransformer) was trained on ")
    assert str(audit_folder(photos)) in section.note
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
    found, _ = judge(photos, tmp_path, "--img-size", "20", "--skip-corrupt", "--device", "cpu")
    first, second, *_ = found["finding"].splitlines()
    assert first.startswith("ConvNet from scratch is ahead of linear probe of vit_nano_cifar10 by 25.0 points (95% ")
    assert second == (f"Next: python train_vit.py --data-dir {photos} --model convnet --skip-corrupt "
                      f"--device cpu --img-size 20 --recipe classic --minutes 1")


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
    assert (images.data["seed"], images.loaders()[0].img_size, images.limit) == (4, 24, None)


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
    (["--jobs", "2"], "--jobs has no effect here; remove it"),
    (["--data-dir", ".", "--minutes", "3", "--train-fractions", "0.5"], "--train-fractions has no effect here"),
    (["--data-dir", ".", "--minutes", "3", "--results-dir", "x"], "--results-dir has no effect here"),
    (["--img-size", "32"], "--img-size has no effect here"),
    (["--seed", "3"], "--seed has no effect here"),
    (["--skip-corrupt"], "--skip-corrupt has no effect here"),
    (["--device", "gpu"], "device 'gpu' is unknown"), (["--img-size", "96"], "a whole number from 8 to 64")])
def test_cnn_vs_vit_reports_bad_options_in_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script(lambda: cv.main(words))
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert expected in error


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
    assert "3 trials, measured" in printed
    assert "Dry run" in printed


def test_loaders_of_shrinks_photographs(tmp_path, capsys):
    folder = make_folder(tmp_path / "photos", 100, ("train", "test"))
    loaders = cv._loaders_of(options("--data-dir", str(folder)))
    assert [loader.img_size for loader in loaders] == [64, 64, 64]
    assert "compared at 64 x 64 pixels" in capsys.readouterr().out
    assert cv._loaders_of(options("--data-dir", str(folder), "--img-size", "24"))[0].img_size == 24
