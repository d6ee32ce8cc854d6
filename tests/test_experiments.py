"""The experiments on small models: what they measure is what measurements.py measures, and the sentences follow it."""

import copy
import json

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from cnn_model import ConvNet, HybridCNNViT
from experiments import EXPERIMENTS, HIDDEN, RANDOM, Subjects, formula, listed, off_diagonal
from measurements import count_flops, receptive_field, unit_centre
from visualizations import untrained_copy
from vit_model import VisionTransformer


@pytest.fixture(scope="module")
def subjects():
    torch.manual_seed(0)
    common = dict(img_size=16, n_classes=3)
    models = {"ConvNet": ConvNet(**common, widths=(3, 5), depths=(1, 1), stem_stride=1),
              "Hybrid": HybridCNNViT(**common, embed_dim=12, depth=2, n_heads=2, patch_size=4),
              "ViT": VisionTransformer(**common, embed_dim=12, depth=2, n_heads=2, patch_size=4)}
    for model in models.values():
        model.mean, model.std = (0.5,) * 3, (0.25,) * 3
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    images = torch.randn(12, 3, 16, 16)
    return Subjects({name: model.eval() for name, model in models.items()}, images, torch.arange(12) % 3, (0.5,) * 3,
                    (0.25,) * 3, seconds=0.001, sizes=(16, 32))


@pytest.fixture(scope="module")
def measured(subjects):
    """{name: data}, through JSON, as it stands in results.json."""
    return {name: json.loads(json.dumps(experiment.measure(subjects))) for name, experiment in EXPERIMENTS.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_data_become_figures_and_a_sentence(name, measured):
    figures = EXPERIMENTS[name].draw(measured[name])
    assert figures
    assert all(isinstance(figure, Figure) for figure in figures.values())
    sentence = EXPERIMENTS[name].say(measured[name])
    assert sentence.endswith(".")
    assert "nan" not in sentence


def test_costs_are_of_the_models_at_each_size(measured, subjects):
    data = measured["cost"]
    for name, rows in data["resolution"].items():
        assert [row["size"] for row in rows] == [16, 32, 64, 128, 256, 512]
        assert rows[0]["flops"] == count_flops(subjects.models[name])
        assert [("images_per_second" in row) for row in rows] == [True, True] + [False] * 4
    assert data["exponents"]["ConvNet"]["flops"] == pytest.approx(1, abs=0.02)
    assert 1.3 < data["exponents"]["ViT"]["flops"] < 2
    assert data["exponents"]["ViT"]["flops"] == pytest.approx(data["exponents"]["ViT"]["formula"], abs=0.1)
    assert [row["tokens"] for row in data["patch"]] == [1024, 256, 64, 16]


def test_the_formula_is_half_the_flops_of_the_blocks(subjects):
    model = subjects.models["ViT"]
    n, D, depth = 16, 12, 2
    assert formula(model, 16) == 12 * n * D**2 + 2 * n**2 * D
    blocks = 2 * depth * (12 * (n + 1) * D**2 + 2 * (n + 1) ** 2 * D)
    rest = 2 * (n * 48 * D + D * 3)
    assert count_flops(model) == blocks + rest


def test_the_cost_sentence_turns_with_the_numbers(measured):
    data = copy.deepcopy(measured["cost"])
    for speeds, words in (((9, 9), "A is the fastest at 16 pixels, and still at 32"),
                          ((9, 1), "A is the fastest at 16 pixels, B at 32")):
        data["resolution"] = {"A": [dict(size=size, images_per_second=speed)
                                    for size, speed in zip((16, 32), speeds, strict=True)],
                              "B": [dict(size=size, images_per_second=5) for size in (16, 32)]}
        assert words in EXPERIMENTS["cost"].say(data)


def test_before_the_first_attention_a_vit_sees_one_patch(measured, subjects):
    assert max(measured["receptive_field"]["ViT"][0]["trained"]) <= 2**0.5 * 1.5 + 1e-9
    field = receptive_field(subjects.models["ViT"], subjects.images, 0)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:12, 8:12] = True
    assert (field[inside] > 0).all()
    assert (field[~inside] == 0).all()


def test_a_convnet_sees_no_more_than_its_window(measured, subjects):
    model = subjects.models["ConvNet"]
    for row in measured["receptive_field"]["ConvNet"]:
        field = receptive_field(model, subjects.images, row["depth"])
        middle = unit_centre(model, (16, 16), row["depth"])
        rows, columns = field.nonzero().T
        for places, centre in ((rows, middle[0]), (columns, middle[1])):
            assert (places - centre).abs().max() <= (row["window"] - 1) / 2 + 1e-9


def test_the_receptive_field_sentence_turns_with_the_numbers():
    def sentence(trained, random):
        rows = [dict(depth=1, trained=[trained, 9, 9], **{RANDOM: [random, 9, 9]})]
        return EXPERIMENTS["receptive_field"].say({"A": rows})

    assert "widened that of A" in sentence(7.0, 3.0)
    assert "narrowed that of A" in sentence(3.0, 7.0)
    assert "hardly moved that of A" in sentence(3.0, 3.1)
    assert "within 3.0 pixels (A)" in sentence(3.0, 3.1)


def test_the_attention_distance_sentence_turns_with_the_numbers():
    def sentence(trained, random):
        return EXPERIMENTS["attention_distance"].say({"A": {"trained": [trained], RANDOM: [random], "uniform": 16.5}})

    assert "differ by 13.0 pixels, with random weights by 0.2: near and far heads side by side are learned" in sentence(
        [2.0, 15.0], [8.0, 8.2])
    assert sentence([8.0, 8.2], [8.0, 8.2]).endswith("with random weights by 0.2.")
    assert sentence([4.0, 12.0], [4.0, 10.0]).endswith("by 8.0 pixels, with random weights by 6.0.")  # less than twice
    assert "uniform attention 16.5" in sentence([8.0, 8.2], [8.0, 8.2])


def test_the_similarity_sentence_turns_with_the_numbers():
    def sentence(a, b):
        matrices = {name: [[1, value], [value, 1]] for name, value in (("A", a), ("B", b))}
        return EXPERIMENTS["similarity"].say({"within": matrices, RANDOM: matrices, "across": {}})

    assert "The layers of A are most alike, those of B least" in sentence(0.9, 0.4)
    assert "The layers of B are most alike, those of A least" in sentence(0.4, 0.9)
    assert off_diagonal([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]]) == pytest.approx(0.4)


def test_the_position_sentence_turns_with_the_numbers():
    def sentence(a, b, n=1000):
        models = {name: dict(consistency=share, shift_map=[[1] * 9] * 9, correct={"shuffled": [100, round(100 * left)]})
                  for name, (share, left) in (("A", a), ("B", b))}
        return EXPERIMENTS["position"].say(dict(models=models, shares=[0, 0.75], n=n, n_shifted=n))

    first = sentence((0.9, 0.2), (0.5, 0.8))
    assert "up to 4 pixels" in first
    assert "A minds it least" in first
    assert "B leans on their order least" in first
    assert "With 75% of the patches shuffled 20% (A) and 80% (B) of as many right answers as without remain" in first
    few = sentence((0.9, 0.2), (0.88, 0.25), n=50)
    assert "no difference between A and B shows" in few
    assert "no difference between B and A shows" in few
    second = sentence((0.5, 0.8), (0.9, 0.2))
    assert "B minds it least" in second
    assert "A leans on their order least" in second


def test_position_counts_the_images_as_they_are_first(measured, subjects):
    for name, model in subjects.models.items():
        right = int((model(subjects.images).argmax(dim=1) == subjects.labels).sum())
        curves = measured["position"]["models"][name]["correct"]
        assert {what: counts[0] for what, counts in curves.items()} == dict.fromkeys(curves, right)
        assert all(len(counts) == len(HIDDEN) for counts in curves.values())


def test_convolutions_are_attention(measured):
    data = measured["convolution"]
    assert len(data["rows"]) == 4  # all but the strided one
    assert max(row["difference"] for row in data["rows"]) < 1e-5
    assert min(row["unset"] for row in data["rows"]) > 0.1
    assert "gives the same numbers" in EXPERIMENTS["convolution"].say(data)
    data["rows"][0]["difference"] = 0.1
    assert "it is not the same" in EXPERIMENTS["convolution"].say(data)
    for i, head in enumerate(data["maps"]):  # around the pixel in the middle of 9 x 9
        place = torch.tensor(head).argmax().item()
        assert divmod(place, 9) == (3 + i // 3, 3 + i % 3)


def test_random_twins_are_untrained(subjects):
    twin = untrained_copy(subjects.models["ViT"])
    assert not torch.equal(twin.head.weight, subjects.models["ViT"].head.weight)


def test_listed():
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
