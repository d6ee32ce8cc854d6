"""The notebook runs from top to bottom, and its claims hold."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from vit_bridge.analysis.attention import attention_distance
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.cost import count_parameters
from vit_bridge.data.images import open_image, sample_photographs
from vit_bridge.data.shapes import make_shapes
from vit_bridge.inference import predict
from vit_bridge.lessons import exercises
from vit_bridge.preprocessing import Preprocessing, eval_transform
from vit_bridge.training.tokenizer import PatchTokenizer
from vit_bridge.weights.checkpoints import load
from vit_model import create_vit_nano

ROOT = Path(__file__).parents[2]
BOOK = json.loads((ROOT / "lesson.ipynb").read_text(encoding="utf-8"))
SECTIONS = [({"code": "code", "markdown": "text"}[cell["cell_type"]], "".join(cell["source"]))
            for cell in BOOK["cells"]]
CODE = [(number, text) for number, (kind, text) in enumerate(SECTIONS) if kind == "code"]


def test_notebook_has_valid_cells():
    assert BOOK["nbformat"] == 4
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, figures = {}, 0
    for number, text in CODE:
        text = text.removeprefix("%matplotlib inline\n").replace("n_images=4_000", "n_images=40").replace(
            "shipped_setup(200)", "shipped_setup(8, reach=1)")
        last = text.rstrip().splitlines()[-1]
        code = compile(text, f"cell {number}", "exec")
        exec(code, names)
        if not last.startswith((" ", "print", ")")):
            figures += isinstance(eval(last, names), Figure)
    printed = capsys.readouterr().out
    assert printed.count("not filled in yet") == 7
    assert "does not hold" not in printed
    assert "produces the same numbers" in printed
    assert figures >= 8
    check_shuffled(printed)
    check_family(printed)
    check_hidden(printed)


def check_shuffled(printed):
    """Check the lesson's claims on positions: shuffling its own patches costs the ViT little, other squares most."""
    line = r"(\d+)% of the squares shuffled: accuracy (\d+)% on its own grid, (\d+)% on the moved grid"
    lines = re.findall(line, printed)
    shares, own, moved = zip(*[map(int, line) for line in lines], strict=True)
    assert shares == (0, 25, 50, 75)
    assert own[0] == moved[0]
    assert min(own) > own[0] - 5
    assert max(moved[1:]) < own[0] / 2
    control = r"random weights and 75% shuffled, (\d+)% of the predictions stay the same on its own grid, and (\d+)%"
    own, moved = map(int, re.search(control, printed).groups())
    assert own >= 95
    assert 50 < moved < 90


def check_family(printed):
    """Check the lesson's claims on the family: what the shift connects, and what twice the side costs."""
    reached = re.findall(r"(\d+) of 144 tokens can influence", printed)
    assert list(map(int, reached)) == [16, 16, 64]
    costs = {name: [int(number) for number in re.findall(r"(\d+) GFLOPs", line)]
             for name, line in re.findall(r"^(\w+_(?:small|tiny)): (.*)$", printed, flags=re.MULTILINE)}
    assert list(costs) == ["vit_small", "swin_tiny", "convnext_tiny"]
    assert {one[0] for one in costs.values()} == {9}
    assert {name: round(one[2] / one[1]) for name, one in costs.items()} == dict(vit_small=7, swin_tiny=4,
                                                                              convnext_tiny=4)


def check_hidden(printed):
    """Check the lesson's claims on reconstructions: the mean colour is never best, and interpolation gets worse."""
    line = r"(\d+)% hidden, mean squared error: model (\S+), interpolation (\S+), mean colour (\S+)\n"
    shares, model, interpolation, colour = zip(*[map(float, found) for found in re.findall(line, printed)], strict=True)
    assert shares == (25, 50, 75, 90)
    assert all(best < last for best, last in zip(map(min, model, interpolation), colour, strict=True))
    assert interpolation[-1] > 2 * interpolation[0]


def test_notebook_claims_about_tokens_hold():
    shown = Preprocessing(224, (0.5,) * 3, (0.5,) * 3)
    photographs = torch.stack([eval_transform(shown)(open_image(path)) for path in sample_photographs()])
    for n_tokens in (4, 16):
        tokenizer = PatchTokenizer(n_tokens, patch_size=8).fit(photographs)
        ids, colours = tokenizer(photographs), tokenizer.pictures.mean(dim=(2, 3)) / 2 + 0.5  # (4, 784), (K, 3)
        blue = (colours[:, 2] > 1.1 * colours[:, 0])[ids].sum(dim=1)  # (4): of each photograph
        assert blue[1] > 0
        assert blue[3] > 0.9 * blue.sum()  # the rocket


def test_notebook_claims_about_explanations_hold():
    cells = [json.loads(path.read_text(encoding="utf-8"))["result"]
             for path in (ROOT / "benchmarks" / "results").glob("trust-*.json")]
    assert len(cells) == 3
    for cell in cells:
        assert cell["n"] == 500
        hidden, shown = ({name: area for name, area in cell[what].items() if name != "random order"}
                         for what in ("deletion", "insertion"))
        assert len(hidden) == len(shown) == 4
        assert max(hidden.values()) < cell["deletion"]["random order"]
    leads = {name: [cell["leads"]["insertion"][name] for cell in cells] for name in shown}  # (mean, standard error)
    clear = {name: sum(lead > 2 * error for lead, error in own) for name, own in leads.items()}
    assert clear == dict(rollout=3, relevance=3, attention=2, grad_cam=0)


def test_notebook_model_is_as_large_as_stated():
    assert "a ViT with half a million parameters" in " ".join(text for _, text in SECTIONS)
    assert 0.45e6 < count_parameters(create_vit_nano(n_classes=10)) < 0.55e6


def test_notebook_folds_a_hint_and_a_solution_below_each_exercise():
    folded = [text for kind, text in SECTIONS if "<summary>Hint" in text]
    assert len(folded) == 7
    for name, one in exercises.EXERCISES.items():
        stub, solution = next((SECTIONS[i][1], SECTIONS[i + 1][1]) for i, (_, text) in
                              enumerate(SECTIONS) if f"check_function('{name}'" in text)
        names = dict(math=math, torch=torch, F=torch.nn.functional)
        hint, solution = solution.split("<details><summary>Solution</summary>")
        assert one.hint in " ".join(hint.split())
        exec(solution.split("```python\n")[1].split("```")[0], names)
        assert exercises.check_function(name, names[one.function]).right
        body = exercises.stub(name).split("\n\n\n", 1)[1].rstrip()
        assert stub.startswith(f"# Exercise {name} ({one.level})\n{body}\n")
        assert f"`{name}` ({one.level})" in SECTIONS[0][1]


def test_notebook_folds_an_answer_below_each_question():
    text = "\n".join(text for kind, text in SECTIONS if kind == "text")
    _, *questions = re.split(r"\*\*(?:Look|Discuss|Last question):", text)
    assert len(questions) >= 8
    for question in questions:
        assert "<summary>Our answer</summary>" in question, question[:80]
    assert text.count("<details>") == text.count("</details>")


def test_notebook_answers_are_true():
    cat = sample_photographs()[1]
    assert [predict(load(f"{name}_cifar10"), cat, top=1)[0][0] for name in ("vit_nano", "hybrid", "convnet")] == [
        "dog", "cat", "cat"]
    model = load("vit_nano_shapes")
    images = model.preprocessing.normalise(make_shapes(32, 32, start=50_000).images)
    distances = attention_distance(attention_maps(model, images), (8, 8), (4, 4), 1)
    assert distances.min() > 15
    assert distances.max() < 17
    block = model.blocks[0]
    assert count_parameters(block.mlp) / count_parameters(block) == pytest.approx(2 / 3, abs=0.01)


def test_notebook_timetable_fills_ninety_minutes():
    headings = [line for kind, text in SECTIONS if kind == "text" for line in text.splitlines()
                if line.startswith("## ")]
    spans = [tuple(map(int, heading.split(":")[0].removeprefix("## ").split(" to "))) for heading in headings]
    assert spans[0][0] == 0
    assert spans[-1][1] == 90
    assert all(a[1] == b[0] for a, b in pairwise(spans))
