"""benchmarks/pretraining.py: what is trained when, on which images, and what may read the test images."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def pretraining(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("pretraining", BENCHMARKS / "pretraining.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pretraining", module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_labelled_images_are_balanced_nested_and_drawn_by_the_seed(pretraining):
    labels = torch.arange(1000) % 10
    few, many = (pretraining.labelled(labels, n, 0) for n in (50, 500))
    assert torch.bincount(labels[few]).tolist() == [5] * 10
    assert set(few.tolist()) < set(many.tolist())
    assert set(few.tolist()) != set(pretraining.labelled(labels, 50, 1).tolist())


def test_the_most_accurate_inner_rate_is_chosen_for_each_number_of_labels(pretraining, monkeypatch):
    tried = {}
    monkeypatch.setattr(pretraining.Cell, "result", property(lambda cell: tried.get(cell)))
    best = {450: 1e-3, 4_500: 4e-3, 45_000: 2.5e-4}
    for _ in range(20):
        missing = [cell for cell in pretraining.wanted_cells() if cell.name == "MAE, fine-tuned" and cell not in tried]
        if not missing:
            break
        tried |= {cell: dict(val_acc=-abs(cell.rate - best[cell.n_labels]), test_acc=0.0) for cell in missing}
    assert {n: pretraining.search("MAE, fine-tuned", n)[0] for n in best} == best
    assert pretraining.search("MAE, 50% hidden, fine-tuned", 4_500)[0] == best[4_500]


def test_all_trainings_of_one_number_of_labels_have_equal_minutes(pretraining, monkeypatch):
    monkeypatch.setattr(pretraining, "search", lambda name, n_labels: (1e-3, []))
    for n_labels, minutes in pretraining.MINUTES.items():
        for name, arm in pretraining.ARMS.items():
            alone = name in ("ViT", "hybrid")
            wanted = minutes if alone else minutes + pretraining.PRETRAINING
            if name == "BEiT, tokens of MAE's features, fine-tuned":
                wanted += pretraining.PRETRAINING  # of the MAE whose features it names
            if n_labels in arm.labels:
                assert pretraining.Cell(name, 0, n_labels, 1e-3).total_minutes == wanted, name


def test_blocks_hide_as_many_patches_as_the_model_expects(pretraining):
    from vit_bridge.models.registry import build_model

    model, objective = build_model("mae_nano", mask_ratio=0.4), pretraining.BlockMaskedPixels()
    objective.check_model(model)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    objective(model, (torch.randn(3, 3, 32, 32),))
    hidden = 64 - int(64 * 0.6)
    assert seen[0].sum(dim=1).tolist() == [hidden] * 3
    _, _, mask = model(torch.randn(3, 3, 32, 32), seen[0])
    assert torch.equal(mask, seen[0])  # exactly the blocks are hidden


def test_a_job_names_the_cells_whose_start_is_missing(pretraining, monkeypatch, tmp_path, capsys):
    cells = [pretraining.Cell("MAE, fine-tuned", seed, 450, 1e-3) for seed in (0, 1)]
    monkeypatch.setattr(pretraining, "wanted_cells", lambda: cells)
    options = SimpleNamespace(only="MAE", seeds=[1], work=tmp_path, device="cpu", until=1)
    pretraining.run_job(options, (), "")
    assert capsys.readouterr().out == (f"{cells[1].path.stem} is left out: it starts from "
                                       f"{cells[1].source.path.stem}.pt, which is not in {tmp_path}\n")
