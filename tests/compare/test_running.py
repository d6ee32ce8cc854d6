"""Trials are planned before the first measurement, kept one by one, and measured after those that they depend on."""

import json
import signal

import pytest

from train_vit import NotFinite
from vit_bridge.compare import trained as td
from vit_bridge.compare import trials as tr
from vit_bridge.compare.ladder import BESIDE, RUNGS
from vit_bridge.compare.trials import SEEDS
from vit_bridge.data.shapes import make_mark
from vit_bridge.system import Interrupted
from vit_model import InputError

RUN = dict(device="cpu", amp="off")
COMMANDS = dict.fromkeys(td.TRAINED, "python cnn_vs_vit.py --train")


@pytest.fixture
def measured(monkeypatch):
    """Make trials of Reach take no time; return those measured, with the learning rates that were chosen for them."""
    trials = []

    def measure(self, trial, chosen, **run):
        trials.append((trial.arm, trial.seed, chosen and chosen["rate"]["learning_rate"]))
        return dict(arm=trial.arm, seed=trial.seed, distances=[8, 20], correct=[9, 7], n=10, learning_rate=0.25,
                    n_steps=1)

    monkeypatch.setattr(td.Reach, "measure", measure)
    return trials


def images(n=20, img_size=16):
    made = [make_mark(count, img_size, start=start) for count, start in ((n, 0), (12, 1000), (14, 2000))]
    return tuple(tr.loader_of(drawn.images, drawn.labels, drawn.class_names) for drawn in made)


def plan(names, folder, **options):
    return tr.plan_trials({name: td.TRAINED[name] for name in names}, folder, RUN, COMMANDS, **options)


def test_run_trials_keeps_each_and_measures_only_what_is_missing(measured, tmp_path, capsys):
    found = tr.run_trials(plan(["reach"], tmp_path))["reach"]
    n = len(SEEDS) * len(td.REACH_ARMS)
    assert "reach-ViT-0: saved after 0 s, 1 of 18" in capsys.readouterr().out
    assert len(measured) == len(found) == n
    assert measured == [(arm, seed, 0.25 if seed else {}) for seed in SEEDS for arm in td.REACH_ARMS]
    (tmp_path / "reach-hybrid-1.json").unlink()
    assert tr.run_trials(plan(["reach"], tmp_path))["reach"] == found
    assert measured[n:] == [("hybrid", 1, 0.25)]
    assert {"commit", "machine", "versions", "date", "seed", "setting", "command"} <= set(found[0])
    with pytest.raises(InputError, match="measured on other images, in another precision, or with other recipes"):
        plan(["reach"], tmp_path, little=dict(reach=dict(n_steps=3)))


def test_trials_of_another_default_length_are_not_mixed(tmp_path, monkeypatch):
    def measure_with(n_steps):
        def measure(self, trial, chosen, n_steps=n_steps, **run):
            return dict(arm=trial.arm, seed=trial.seed, learning_rate=0.25, n_steps=n_steps)
        return measure

    monkeypatch.setattr(td.Reach, "measure", measure_with(10))
    tr.run_trials(plan(["reach"], tmp_path))
    plan(["reach"], tmp_path)
    monkeypatch.setattr(td.Reach, "measure", measure_with(20))
    with pytest.raises(InputError, match="numbers of steps; remove it"):
        plan(["reach"], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_trials_says_what_is_kept_when_stopped(number, measured, tmp_path, monkeypatch):
    measure = td.Reach.measure

    def cut_off(self, trial, chosen, **run):
        if trial.arm == "hybrid":
            signal.raise_signal(number)
        return measure(self, trial, chosen, **run)

    monkeypatch.setattr(td.Reach, "measure", cut_off)
    with pytest.raises(Interrupted, match=r"2 of 18 trials are in .*; the same command continues with the next one"):
        tr.run_trials(plan(["reach"], tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_run_trials_skips_an_arm_that_diverges(measured, tmp_path, monkeypatch, capsys):
    measure = td.Reach.measure

    def diverges(self, trial, chosen, **run):
        if (trial.arm, trial.seed) == ("Swin", 0):
            raise NotFinite("the loss is NaN")
        return measure(self, trial, chosen, **run)

    monkeypatch.setattr(td.Reach, "measure", diverges)
    found = tr.run_trials(plan(["reach"], tmp_path))["reach"]
    printed = capsys.readouterr().out
    assert "reach-Swin-0 is skipped: the loss is NaN" in printed
    assert printed.endswith("2 more trials are not measured, because they need the choices of a skipped one\n")
    assert {one["result"]["arm"] for one in found} == set(td.REACH_ARMS) - {"Swin"}  # its other seeds need its rate


def test_plan_trials_of_the_ladder_measures_first_what_others_use(tmp_path):
    made = plan(["ladder"], tmp_path, images=(images(), [4, 20], "", {}))
    assert len(set(made.trials)) == len(made.trials) == len(SEEDS) * (len(RUNGS) + 1 + len(BESIDE))
    for i, trial in enumerate(made.trials):
        assert all(owner in made.trials[:i] for owner in made.owners(trial).values())
    chooses = [trial for trial in made.trials if not made.owners(trial)]
    assert {trial.seed for trial in chooses} == {SEEDS[0]}
    assert len(chooses) == len(RUNGS) + 2  # each rung, PLAIN with all images, and the pre-trained ViT


def test_plan_trials_checks_everything_first(tmp_path):
    with pytest.raises(InputError, match="not divisible by patch_size"):
        plan(["ladder"], tmp_path, images=(images(img_size=18), [4, 20], "", {}))
    first = plan(["data"], tmp_path, images=(images(), [20], "photos", dict(content="a")))
    tr.write_json(dict(date="", command="", setting=first.setting_of("data", "ViT"), result=dict(
        arm="ViT", seed=0, learning_rate=0.1, dataset="photos")), first.trials[0].path(tmp_path))
    plan(["data"], tmp_path, images=(images(), [20], "photos", dict(content="a")))
    plan(["data"], tmp_path, images=(images(), [20], "other", dict(content="b")))
    with pytest.raises(InputError, match="measured on other images"):
        plan(["data"], tmp_path, images=(images(), [20], "photos", dict(content="b")))
    with pytest.raises(InputError, match="--train-fractions gives only 20"):
        plan(["ladder"], tmp_path, images=(images(), [20], "", {}))
    tr.write_json(dict(date="", command="", result=dict(arm="hybrid", seed=0, learning_rate=0.1, n_images=20,
                                                        dataset="")), tmp_path / "ladder-hybrid-20-0.json")
    with pytest.raises(InputError, match="has 20 training images, but --train-fractions gives 2 and 4;"):
        plan(["ladder"], tmp_path, images=(images(), [2, 4], "", {}))
    (tmp_path / "reach-ViT-0.json").write_text("{")
    with pytest.raises(InputError, match="is not a result"):
        plan(["reach"], tmp_path)


@pytest.mark.slow
def test_run_trials_in_two_processes(tmp_path):
    little = dict(cues=dict(n_steps=1, n_images=10, n_val=5, n_test=5, img_size=16))
    made = plan(["cues"], tmp_path, little=little)
    made.trials = [trial for trial in made.trials if trial.arm == "ViT, patches of 8"]
    made.trials += [tr.replace(made.trials[0], seed=seed) for seed in SEEDS[1:]]
    found = tr.run_trials(made, jobs=2)["cues"]
    assert [one["result"]["seed"] for one in found] == list(SEEDS)
    assert len({one["result"]["learning_rate"] for one in found}) == 1


class FailingCues(td.Cues):
    """Its measurements cannot go on."""

    def measure(self, trial, **run):
        raise InputError("the disk is full")


@pytest.mark.slow
def test_run_trials_ends_when_one_of_its_processes_does(tmp_path, capfd):
    made = plan(["cues"], tmp_path)
    made.experiments = dict(cues=FailingCues())
    with pytest.raises(InputError, match=r"for the reason above\. 0 of 15 trials are in .*; the same command"):
        tr.run_trials(made, jobs=2)
    printed = capfd.readouterr()
    assert "cues-ViT-patches-of-2-0: the disk is full" in printed.out
    assert "Traceback" not in printed.err


def test_speeds_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(td.Ladder, "measure_speeds", lambda self, loader, **run: dict(ConvNet=7.0))
    made = plan(["ladder"], tmp_path, images=(images(), [4, 20], "photos", {}))
    assert tr._speeds_of("ladder", made) == dict(ConvNet=7.0)
    monkeypatch.setattr(td.Ladder, "measure_speeds", None)
    assert tr._speeds_of("ladder", made) == dict(ConvNet=7.0)
    path = tmp_path / "speeds-ladder-photos.json"
    assert json.loads(path.read_text())["table"] == "speeds"
    other = plan(["ladder"], tmp_path, images=(images(), [4, 20], "photos", dict(content="b")))
    with pytest.raises(InputError, match=r"speeds-ladder-photos\.json was measured on other images"):
        tr._speeds_of("ladder", other)
    path.write_text("{")
    with pytest.raises(InputError, match="holds no speeds"):
        tr._speeds_of("ladder", made)
    path.unlink()
    made.trials[0].path(tmp_path).write_text("{}")
    with pytest.raises(InputError, match=r"is missing, but ladder-photos-ViT-CLS-4-0\.json was trained with its"):
        tr._speeds_of("ladder", made)


def test_trials_of_another_version_are_named():
    whole = dict(arm="ViT", seed=1) | dict.fromkeys(td.Reach.keys)
    td.Reach().check([whole])
    with pytest.raises(InputError, match="'ViT' with seed 1 in 'Reach' has no sums, so it is from another version"):
        td.Reach().check([whole, {key: value for key, value in whole.items() if key != "sums"}])
    with pytest.raises(InputError, match="'ViT-9' with seed 1 in 'Reach' is of an unknown network, so it is"):
        td.Reach().check([whole | dict(arm="ViT-9")])
