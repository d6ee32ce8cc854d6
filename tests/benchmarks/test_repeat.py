"""benchmarks/repeat.py trains a trial again with what its file says."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vit_bridge.compare.trials import Trial
from vit_bridge.errors import InputError


def test_repeat_changes_only_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    repeat = importlib.import_module("repeat").repeat
    trial = Trial("ladder", "ViT, CLS", 0, 450, "photos")
    first = dict(arm=trial.arm, seed=0, learning_rate=0.004, correct=6, n=10, n_steps=3)
    setting = dict(recipe="classic", images=dict(content="a"))
    old = dict(date="", command="", machine="an old one", setting=setting, result=first)
    trial.path(tmp_path).write_text(json.dumps(old))
    speeds = {"ViT, CLS": 100.0, "ConvNet": 200.0}
    (tmp_path / "speeds-ladder-photos.json").write_text(json.dumps(dict(result=dict(speeds=speeds))))
    given = {}

    def measure(trial, **options):
        given.update(options, trial=trial)
        return dict(arm=trial.arm, correct=5, n=10, n_steps=6)

    ladder, reach = (SimpleNamespace(measure=measure, needs_speeds=needs_speeds) for needs_speeds in (True, False))
    plan = SimpleNamespace(loaders="images", run=dict(device="cpu", amp="off"),
                           experiments=dict(ladder=ladder, reach=reach), setting_of=lambda *words: setting)
    result = repeat(trial, plan, tmp_path)
    assert result == dict(arm="ViT, CLS", correct=5, n=10, n_steps=6, device="cpu", first=dict(
        machine="an old one", correct=6, n=10, n_steps=3, learning_rate=0.004))
    same = dict(trial=trial, loaders="images", speeds=speeds, chosen=dict(rate=dict(learning_rate=0.004)),
                device="cpu", amp="off")
    assert given == same
    given.clear()
    repeat(trial, plan, tmp_path, as_fast_as="ConvNet")
    assert given == same | dict(speeds={"ViT, CLS": 200.0, "ConvNet": 200.0})
    repeat(trial, plan, tmp_path, minutes=2.5, lr=0.008)
    assert given == same | dict(minutes=2.5, chosen=dict(rate=dict(learning_rate=0.008)))
    given.clear()
    trial = Trial("reach", "Swin", 0)
    trial.path(tmp_path).write_text(json.dumps(old))
    repeat(trial, plan, tmp_path, n_steps=8, distances=(8, 9))
    assert given == dict(trial=trial, chosen=dict(rate=dict(learning_rate=0.004)), n_steps=8, distances=(8, 9),
                         device="cpu", amp="off")
    plan.setting_of = lambda *words: setting | dict(images=dict(content="b"))
    with pytest.raises(InputError, match="was trained with other images than this version and --data-dir give"):
        repeat(trial, plan, tmp_path)
