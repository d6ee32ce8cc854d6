"""benchmarks/repeat.py trains a trial again with what its file says."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

from vit_bridge.compare.trials import Trial


def test_repeat_uses_the_rate_and_speeds_of_the_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    repeat = importlib.import_module("repeat").repeat
    trial = Trial("ladder", "ViT, CLS", 0, 450, "photos")
    first = dict(arm=trial.arm, seed=0, learning_rate=0.004, correct=6, n=10, n_steps=3)
    trial.path(tmp_path).write_text(json.dumps(dict(date="", command="", machine="an old one", result=first)))
    speeds = {"ViT, CLS": 100.0, "ConvNet": 200.0}
    (tmp_path / "speeds-ladder-photos.json").write_text(json.dumps(dict(result=dict(speeds=speeds))))
    given = {}

    def measure(trial, **options):
        given.update(options, trial=trial)
        return dict(arm=trial.arm, correct=5, n=10, n_steps=6)

    plan = SimpleNamespace(trials=[trial, Trial("ladder", "ViT, CLS", 1, 450, "photos")], loaders="images",
                           run=dict(device="cpu", amp="off"), experiments=dict(ladder=SimpleNamespace(measure=measure)))
    found, result = repeat("ViT, CLS", 0, plan, tmp_path)
    assert found == trial
    assert result == dict(arm="ViT, CLS", correct=5, n=10, n_steps=6, device="cpu",
                          first=dict(machine="an old one", correct=6, n=10, n_steps=3))
    assert given == dict(trial=trial, loaders="images", speeds=speeds, chosen=dict(rate=first), device="cpu", amp="off")
    repeat("ViT, CLS", 0, plan, tmp_path, "ConvNet")
    assert given["speeds"] == {"ViT, CLS": 200.0, "ConvNet": 200.0}
