"""Experiments on small models measure what the functions of analysis/ return, and their findings follow from it."""

import copy
import json
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from vit_bridge.analysis.attention import attention_distance
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.cost import count_flops, peak_memory
from vit_bridge.analysis.perturbations import mean_consistency, occlude, shift_consistency, shuffle_patches
from vit_bridge.analysis.receptive_field import radius_holding, receptive_field, unit_centre, untrained_copy
from vit_bridge.analysis.similarity import layer_similarity
from vit_bridge.compare.experiments import (
    EXPERIMENTS,
    HIDDEN,
    MOVED,
    RANDOM,
    ComparisonSetup,
    _consistencies,
    _off_diagonal_mean,
    _resized,
    _textbook_cost,
)
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import predictions
from vit_model import VisionTransformer

PREPROCESSING = Preprocessing(16, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    common = dict(img_size=16, n_classes=3)
    models = {"ConvNet": ConvNet(**common, widths=(3, 5), depths=(1, 1), stem_stride=1),
              "Hybrid": HybridCNNViT(**common, embed_dim=12, depth=2, n_heads=2, patch_size=4),
              "ViT": VisionTransformer(**common, embed_dim=12, depth=2, n_heads=2, patch_size=4)}
    for model in models.values():
        model.preprocessing = PREPROCESSING
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    images = torch.randn(12, 3, 16, 16)
    return ComparisonSetup({name: model.eval() for name, model in models.items()}, images, torch.arange(12) % 3,
                           PREPROCESSING, seconds=0.001, sizes=(16, 32))


@pytest.fixture(scope="module")
def measured(setup):
    """Return {name: data} after a round trip through JSON, as in results.json."""
    return {name: json.loads(json.dumps(experiment.measure(setup))) for name, experiment in EXPERIMENTS.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_give_figures_findings_and_tables(name, measured, setup):
    figures = EXPERIMENTS[name].draw(measured[name], setup)
    assert figures
    assert all(isinstance(figure, Figure) for figure in figures.values())
    sentence = EXPERIMENTS[name].finding(measured[name])
    assert sentence.endswith(".")
    assert "nan" not in sentence
    for caption, (heads, *rows) in EXPERIMENTS[name].tables(measured[name]):
        assert caption
        assert rows
        assert {len(row) for row in rows} == {len(heads)}


def test_cost_measures_the_models_at_each_size(measured, setup):
    data = measured["cost"]
    for name, rows in data["resolution"].items():
        assert [row["size"] for row in rows] == [16, 32, 64, 128, 256, 512]
        assert rows[0]["flops"] == count_flops(setup.models[name])
        assert [("images_per_second" in row) for row in rows] == [True, True] + [False] * 4
    assert data["exponents"]["ConvNet"]["flops"] == pytest.approx(1, abs=0.02)
    assert 1.3 < data["exponents"]["ViT"]["flops"] < 2
    assert data["exponents"]["ViT"]["flops"] == pytest.approx(data["exponents"]["ViT"]["formula"], abs=0.1)
    assert [row["tokens"] for row in data["patch"]] == [1024, 256, 64, 16]


def test_textbook_cost_is_half_the_flops_of_the_blocks(setup):
    model = setup.models["ViT"]
    n, D, depth = 16, 12, 2
    assert _textbook_cost(model, 16) == 12 * n * D**2 + 2 * n**2 * D
    blocks = 2 * depth * (12 * (n + 1) * D**2 + 2 * (n + 1) ** 2 * D)
    rest = 2 * (n * 48 * D + D * 3)
    assert count_flops(model) == blocks + rest


def test_cost_finding_follows_the_numbers(measured):
    data = copy.deepcopy(measured["cost"])
    for speeds, words in (((9, 9), ". In inference, A is fastest at 16 and 32 pixels a side."),
                          ((9, 1), "A is fastest at 16 pixels a side; B is fastest at 32 pixels a side."),
                          ((9, 4.8), "; B and A are fastest at 32 pixels a side.")):
        data["resolution"] = {"A": [dict(size=size, images_per_second=speed)
                                    for size, speed in zip((16, 32), speeds, strict=True)],
                              "B": [dict(size=size, images_per_second=5) for size in (16, 32)]}
        assert EXPERIMENTS["cost"].finding(data).endswith(words)
    data["exponents"] = dict(A=dict(flops=1.234, formula=1.5), B=dict(flops=1.6, formula=1.6))
    assert "to the power 1.23 (A) to 1.60 (B)." in EXPERIMENTS["cost"].finding(data)


def test_receptive_field_of_a_vit_starts_with_one_patch(measured, setup):
    assert max(measured["receptive_field"]["ViT"][0]["trained"]) <= 2**0.5 * 1.5 + 1e-9
    field = receptive_field(setup.models["ViT"], setup.images, 0)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:12, 8:12] = True
    assert (field[inside] > 0).all()
    assert (field[~inside] == 0).all()


def test_receptive_field_of_a_convnet_stays_in_its_window(measured, setup):
    model = setup.models["ConvNet"]
    for row in measured["receptive_field"]["ConvNet"]:
        field = receptive_field(model, setup.images, row["depth"])
        middle = unit_centre(model, (16, 16), row["depth"])
        rows, columns = field.nonzero().T
        for places, centre in ((rows, middle[0]), (columns, middle[1])):
            assert (places - centre).abs().max() <= (row["window"] - 1) / 2 + 1e-9


def test_receptive_field_finding_follows_the_numbers():
    def finding(trained, random):
        rows = [dict(depth=1, trained=[trained, 9, 9], **{RANDOM: [random, 9, 9]})]
        return EXPERIMENTS["receptive_field"].finding({"A": rows})

    assert finding(7.0, 3.0).endswith("this radius is larger for A.")
    assert finding(3.0, 7.0).endswith("this radius is smaller for A.")
    assert "lies within 3.0 pixels (A)." in finding(3.0, 3.1)
    assert finding(3.0, 3.1).endswith("this radius is about the same for A.")


def test_attention_distance_finding_follows_the_numbers():
    def finding(trained, random):
        return EXPERIMENTS["attention_distance"].finding(
            {"A": {"trained": [trained], RANDOM: [random], "uniform": 16.5}})

    assert finding([2.0, 15.0], [8.0, 8.2]) == (
        "The mean attention distance of the nearest head in the first block is 2.0 pixels in A (uniform attention: "
        "16.5). Compared with random weights, heads with clearly different distances appear in A.")
    assert finding([8.0, 8.2], [8.0, 8.2]).endswith("appear in no model.")


def test_similarity_finding_follows_the_numbers():
    def finding(a, b):
        matrices, random = ({name: [[1, value], [value, 1]] for name, value in (("A", own[0]), ("B", own[1]))}
                            for own in ((a, b), (0.6, 0.6)))
        return EXPERIMENTS["similarity"].finding({"within": matrices, RANDOM: random, "across": {}})

    assert finding(0.9, 0.4) == (
        "The mean CKA of two different layers of a model is 0.40 (B) to 0.90 (A). Compared with random weights, it is "
        "lower in B and higher in A.")
    assert finding(0.62, 0.58).endswith("it is about the same in A and B.")
    alone = {key: {"A": [[1, value], [value, 1]]} for key, value in (("within", 0.4), (RANDOM, 0.9))}
    assert EXPERIMENTS["similarity"].finding(alone | {"across": {}}).startswith(
        "The mean CKA of two different layers of a model is 0.40 (A). Compared")
    assert _off_diagonal_mean([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]]) == pytest.approx(0.4)


def position_data(n=1000, **models):
    """Build data from name=(consistency, fractions kept: shuffled, on the moved grid, hidden)."""
    return dict(n=n, n_shifted=n, n_control=16, trained_shift=4, classes=10, shares=[0, 0.75], models={
        name: {"consistency": stays, "consistency_beyond": None, f"consistency, {RANDOM}": 0.97,
               "correct": {what: [n // 2, round(n // 2 * left)] for what, left in zip(
                   ("shuffled", MOVED, "hidden, mean"), kept, strict=True)}}
        for name, (stays, *kept) in models.items()})


def test_attention_distance_draws_the_uniform_line_of_each_model():
    rows = {"trained": [[8.0, 9.0]], RANDOM: [[8.0, 8.5]]}
    for uniform, labels in ((16.5, {"uniform: 16.5"}), (16.1, {"uniform: 16.5", "uniform: 16.1"})):
        (figure,) = EXPERIMENTS["attention_distance"].draw({"A": dict(rows, uniform=16.5),
                                                            "B": dict(rows, uniform=uniform)}).values()
        assert {line.get_label() for line in figure.axes[0].lines if line.get_label().startswith("uniform")} == labels


def test_position_finding_follows_the_numbers():
    finding = EXPERIMENTS["position"].finding
    assert finding(position_data(A=(0.9, 0.4, 0.5, 0.2), B=(0.5, 0.8, 0.5, 0.9))) == (
        "By the fraction of predictions that stay the same when the image is shifted, A is ahead. With 75% of the "
        "ViT's own patches shuffled, A keeps 40% of its accuracy and B 80%; all are better than guessing. With the "
        "shuffled grid moved by half a patch, A keeps 50% of its accuracy and B 50%; all are better than guessing. "
        "With the patches hidden, A keeps 20% of its accuracy and B 90%; A is no better than guessing.")
    few = finding(position_data(50, A=(0.9, 0.5, 0.5, 0.5), B=(0.88, 0.6, 0.5, 0.5)))
    assert "shifted, A and B cannot be distinguished." in few


def test_position_finding_sets_guessing_models_apart():
    data = position_data(A=(0.9, 0.1, 0.4, 0.4), B=(0.9, 0.1, 0.1, 0.4), C=(0.9, 0.1, 0.4, 0.4))
    finding = EXPERIMENTS["position"].finding(data)
    assert "shuffled, A keeps 10% of its accuracy, B 10% and C 10%; A, B and C are no better than guessing." in finding
    assert "by half a patch, A keeps 40% of its accuracy, B 10% and C 40%; B is no better than guessing." in finding
    for model in data["models"].values():
        model["correct"] = {what: [100, 90] for what in model["correct"]}
    assert EXPERIMENTS["position"].finding(data).count("all models guess to begin with") == 3


def test_consistencies_separate_trained_shifts_from_larger_ones():
    stays = torch.full((7, 7), 0.25)
    stays[2:5, 2:5] = 0.75
    stays[3, 3] = 1
    assert _consistencies(stays, 1) == (0.75, 0.25)
    assert _consistencies(stays, 3)[1] is None


def test_experiments_report_what_their_functions_return(measured, setup):
    """Compare each entry with one direct call, so that trained and random weights are not mixed up."""
    model = setup.models["ViT"]
    twin, layout = untrained_copy(model), ((4, 4), 4, 1)
    distance = measured["attention_distance"]["ViT"]
    for key, which, options in (("trained", model, {}), (RANDOM, twin, {}),
                                ("trained, CLS counted", model, dict(renormalise=False))):
        found = attention_distance(attention_maps(which, setup.images), *layout, **options)
        torch.testing.assert_close(torch.tensor(distance[key]), found, check_dtype=False)
    row = measured["receptive_field"]["ViT"][1]
    for key, which in (("trained", model), (RANDOM, twin)):
        field = receptive_field(which, setup.images, 1)
        assert row[key][0] == pytest.approx(radius_holding(field, 0.5, unit_centre(which, (16, 16), 1)))
    position = measured["position"]["models"]["ViT"]
    stays = shift_consistency(model, setup.images, setup.reach)
    assert position["shift_map"] == stays.tolist()
    assert position[f"consistency, {RANDOM}"] == pytest.approx(
        mean_consistency(shift_consistency(twin, setup.images[:16], setup.trained_shift)))
    first = measured["cost"]["resolution"]["ViT"][0]
    images = torch.zeros(first["batch"], 3, 16, 16)
    for key, train in (("peak_mib", False), ("training_peak_mib", True)):
        expected = peak_memory(_resized(model, img_size=16), images, train=train) / 2**20 / first["batch"]
        assert first[key] == pytest.approx(expected, rel=0.2)
    assert first["training_images_per_second"] < first["images_per_second"]


def test_similarity_measures_the_model_and_its_random_twin(measured, setup):
    """Compare each entry with one direct call."""
    data, images = measured["similarity"], setup.images
    for name, model in setup.models.items():
        twin = untrained_copy(model)
        for key, which in (("within", model), (RANDOM, twin)):
            found = layer_similarity(which, which, images)
            torch.testing.assert_close(torch.tensor(data[key][name]), found, check_dtype=False)
        assert abs(_off_diagonal_mean(data["within"][name]) - _off_diagonal_mean(data[RANDOM][name])) > 0.01
    found = layer_similarity(setup.models["ConvNet"], setup.models["ViT"], images)
    torch.testing.assert_close(torch.tensor(data["across"]["ConvNet and ViT"]), found, check_dtype=False)


def test_position_curves_match_their_patch_changes(setup):
    """Compare each count with one direct call, on a model that predicts all classes, so that the four curves differ."""
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(setup.models["ViT"])
    with torch.no_grad():
        model.head.bias -= model(images).mean(dim=0)
    labels, normal = predictions(model, images), dict(preprocessing=PREPROCESSING)
    own = ComparisonSetup({"ViT": model}, images, labels, **normal, reach=1, trained_shift=1)
    curves = EXPERIMENTS["position"].measure(own)["models"]["ViT"]["correct"]
    changes = {"shuffled": partial(shuffle_patches, patch_size=4),
               MOVED: partial(shuffle_patches, patch_size=4, offset=2),
               "hidden, mean": partial(occlude, patch_size=4),
               "hidden, black": partial(occlude, patch_size=4, fill="black", **normal)}
    assert curves == {what: [int((predictions(model, change(images, share=share)) == labels).sum()) for share in HIDDEN]
                      for what, change in changes.items()}
    assert len({tuple(counts) for counts in curves.values()}) == 4


def test_position_curves_start_with_unchanged_images(measured, setup):
    for name, model in setup.models.items():
        right = int((model(setup.images).argmax(dim=1) == setup.labels).sum())
        curves = measured["position"]["models"][name]["correct"]
        assert {what: counts[0] for what, counts in curves.items()} == dict.fromkeys(curves, right)
        assert all(len(counts) == len(HIDDEN) for counts in curves.values())


def test_convolution_experiment_reproduces_convolutions_by_attention(measured):
    data = measured["convolution"]
    assert len(data["rows"]) == 4  # all but the strided one
    assert max(row["difference"] for row in data["rows"]) < 1e-5
    assert min(row["unset"] for row in data["rows"]) > 0.1
    assert "produces the same numbers" in EXPERIMENTS["convolution"].finding(data)
    data["rows"][0]["difference"] = 0.1
    assert "differs from it by up to 1.0e-01" in EXPERIMENTS["convolution"].finding(data)
    for i, head in enumerate(data["maps"]):  # around the pixel in the middle of 9 x 9
        place = torch.tensor(head).argmax().item()
        assert divmod(place, 9) == (3 + i // 3, 3 + i % 3)


def test_untrained_copy_has_other_weights(setup):
    twin = untrained_copy(setup.models["ViT"])
    assert not torch.equal(twin.head.weight, setup.models["ViT"].head.weight)
