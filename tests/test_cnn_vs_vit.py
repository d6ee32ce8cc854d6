import json
import subprocess
import sys

import pytest
import torch
from command_runs import ROOT

import cnn_model
import cnn_vs_vit
import train_vit
from cnn_vs_vit import HybridCNNViT, compare_costs, compare_training, matched_models
from measurements import count_parameters


def test_the_three_have_nearly_the_same_number_of_parameters():
    counts = {name: count_parameters(model) for name, model in matched_models().items()}
    assert set(counts) == {"ConvNet", "Hybrid", "ViT"}
    assert max(counts.values()) <= 1.1 * min(counts.values())


def test_the_hybrid_is_the_one_of_cnn_model():
    assert HybridCNNViT is cnn_model.HybridCNNViT


def test_costs_are_positive_numbers_of_the_same_quantities():
    torch.manual_seed(0)
    rows = compare_costs(matched_models(n_classes=3, img_size=16), torch.randn(2, 3, 16, 16), seconds=0.01)
    assert len({tuple(row) for row in rows.values()}) == 1
    assert all(value > 0 for row in rows.values() for value in row.values())


def test_all_train_by_one_recipe():
    batches = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))] * 3
    trainers, histories = compare_training(matched_models(n_classes=3, img_size=16), batches, batches[:1], n_steps=3)
    assert trainers.keys() == histories.keys()
    assert len({tuple(history["lr"]) for history in histories.values()}) == 1


def test_a_dry_run_leaves_its_files(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "cnn_vs_vit.py", "--dry-run", "--output-dir", "comparison"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "comparison"
    assert {path.name for path in folder.iterdir()} == {"cost.png", "training.png", "receptive_fields.png",
                                                        "results.json"}
    results = json.loads((folder / "results.json").read_text())
    assert set(results["costs"]) == set(results["histories"]) == set(results["scores"])
    for words in ("No verdict", "MFLOPs", "Dry run"):
        assert words in done.stdout


@pytest.mark.parametrize(("words", "expected"), [(["--steps", "0"], "--steps: 0"), (["--lr", "inf"], "--lr: inf"),
                                                 (["--data-dir", "nowhere"], "nowhere")])
def test_bad_words_end_in_one_line_and_exit_code_2(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_vit.script(lambda: cnn_vs_vit.main(words))
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert expected in error
    assert not list(tmp_path.iterdir())
