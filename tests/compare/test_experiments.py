"""The experiments on small models: what they measure is what measurements.py measures, and the sentences follow it."""

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
    consistencies,
    formula,
    off_diagonal,
    resized,
    what_remains,
)
from vit_bridge.compare.statistics import join_words, variance_of_ratio
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.runtime import predictions
from vit_model import VisionTransformer


@pytest.fixture(scope="module")
def setup():
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
    return ComparisonSetup({name: model.eval() for name, model in models.items()}, images, torch.arange(12) % 3, (0.5,) * 3,
                    (0.25,) * 3, seconds=0.001, sizes=(16, 32))


@pytest.fixture(scope="module")
def measured(setup):
    """{name: data}, through JSON, as it stands in results.json."""
    return {name: json.loads(json.dumps(experiment.measure(setup))) for name, experiment in EXPERIMENTS.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_data_become_figures_and_a_sentence(name, measured):
    figures = EXPERIMENTS[name].draw(measured[name])
    assert figures
    assert all(isinstance(figure, Figure) for figure in figures.values())
    sentence = EXPERIMENTS[name].say(measured[name])
    assert sentence.endswith(".")
    assert "nan" not in sentence
    for caption, (heads, *rows) in EXPERIMENTS[name].table(measured[name]):
        assert caption
        assert rows
        assert {len(row) for row in rows} == {len(heads)}


def test_costs_are_of_the_models_at_each_size(measured, setup):
    data = measured["cost"]
    for name, rows in data["resolution"].items():
        assert [row["size"] for row in rows] == [16, 32, 64, 128, 256, 512]
        assert rows[0]["flops"] == count_flops(setup.models[name])
        assert [("images_per_second" in row) for row in rows] == [True, True] + [False] * 4
    assert data["exponents"]["ConvNet"]["flops"] == pytest.approx(1, abs=0.02)
    assert 1.3 < data["exponents"]["ViT"]["flops"] < 2
    assert data["exponents"]["ViT"]["flops"] == pytest.approx(data["exponents"]["ViT"]["formula"], abs=0.1)
    assert [row["tokens"] for row in data["patch"]] == [1024, 256, 64, 16]


def test_the_formula_is_half_the_flops_of_the_blocks(setup):
    model = setup.models["ViT"]
    n, D, depth = 16, 12, 2
    assert formula(model, 16) == 12 * n * D**2 + 2 * n**2 * D
    blocks = 2 * depth * (12 * (n + 1) * D**2 + 2 * (n + 1) ** 2 * D)
    rest = 2 * (n * 48 * D + D * 3)
    assert count_flops(model) == blocks + rest


def test_the_cost_sentence_turns_with_the_numbers(measured):
    data = copy.deepcopy(measured["cost"])
    for speeds, words in (((9, 9), "A is the fastest at 16 pixels and A is the fastest at 32 pixels."),
                          ((9, 1), "A is the fastest at 16 pixels and B is the fastest at 32 pixels."),
                          ((9, 4.8), "A is the fastest at 16 pixels and B and A are the fastest at 32 pixels.")):
        data["resolution"] = {"A": [dict(size=size, images_per_second=speed)
                                    for size, speed in zip((16, 32), speeds, strict=True)],
                              "B": [dict(size=size, images_per_second=5) for size in (16, 32)]}
        assert words in EXPERIMENTS["cost"].say(data)
    data["exponents"] = dict(A=dict(flops=1.234, formula=1.5))
    assert "to the power 1.23 (A; by the formula 1.50)" in EXPERIMENTS["cost"].say(data)


def test_before_the_first_attention_a_vit_sees_one_patch(measured, setup):
    assert max(measured["receptive_field"]["ViT"][0]["trained"]) <= 2**0.5 * 1.5 + 1e-9
    field = receptive_field(setup.models["ViT"], setup.images, 0)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:12, 8:12] = True
    assert (field[inside] > 0).all()
    assert (field[~inside] == 0).all()


def test_a_convnet_sees_no_more_than_its_window(measured, setup):
    model = setup.models["ConvNet"]
    for row in measured["receptive_field"]["ConvNet"]:
        field = receptive_field(model, setup.images, row["depth"])
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
        matrices, random = ({name: [[1, value], [value, 1]] for name, value in (("A", own[0]), ("B", own[1]))}
                            for own in ((a, b), (0.6, 0.6)))
        return EXPERIMENTS["similarity"].say({"within": matrices, RANDOM: random,
                                              "across": {"A and B": [[0.1, 0.2], [0.3, 0.45]]}})

    first = sentence(0.9, 0.4)
    assert "A 0.90 (random weights 0.60) and B 0.40 (random weights 0.60)" in first
    assert "Training has made those of B less alike. Training has made those of A more alike." in first
    assert first.endswith("Of two models the last layers are alike by 0.45 (A and B).")
    assert "made those of A and B neither more nor less alike" in sentence(0.62, 0.58)
    assert off_diagonal([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]]) == pytest.approx(0.4)


def test_the_position_sentence_turns_with_the_numbers():
    def sentence(a, b, n=1000):
        models = {name: {"consistency": share, "consistency_beyond": share - 0.3, "shift_map": [[1] * 13] * 13,
                         f"consistency, {RANDOM}": 0.97,
                         "correct": {"shuffled": [n // 2, round(n // 2 * left)], MOVED: [n // 2, n // 4],
                                     "hidden, mean": [n // 2, n // 10]}}
                  for name, (share, left) in (("A", a), ("B", b))}
        return EXPERIMENTS["position"].say(dict(models=models, shares=[0, 0.75], n=n, n_shifted=n, n_control=16,
                                                trained_shift=4, classes=10))

    first = sentence((0.9, 0.4), (0.5, 0.8))
    assert "by up to 4 pixels, as in training, the predicted class stays in 90% (A) and 50% (B): A minds it" in first
    assert "Moved further, by up to 6, in 60% (A) and 20% (B): A minds it least." in first
    assert "it stays in 97% (A) and 97% (B) (16 images)." in first
    assert first.startswith("When 1000 images move by up to 4 pixels")
    assert ("With 75% of the patches of the ViT's own grid shuffled there are 40% (A; guessing 20%) and 80% (B; "
            "guessing 20%) as many right answers as before: B minds it least.") in first
    assert "half a patch, which cuts its tokens too, there are 50% (A; guessing 20%) and 50% (B; guessing 20%)" in first
    assert "as before: no difference between A and B shows." in first
    assert "hidden by the mean there are 20% (A; guessing 20%)" in first
    few = sentence((0.9, 0.5), (0.88, 0.6), n=50)
    assert "no difference between A and B shows" in few
    assert "no difference between B and A shows" in few
    second = sentence((0.5, 0.8), (0.9, 0.4))
    assert "stays in 50% (A) and 90% (B): B minds it least" in second
    assert "as many right answers as before: A minds it least" in second


def test_who_guesses_to_begin_with_has_nothing_to_lose():
    def counts(first):
        return {change: [first, 30] for change in ("shuffled", MOVED, "hidden, mean")}

    data = dict(models=dict(A=dict(correct=counts(90)), B=dict(correct=counts(12))), n=100, classes=10)
    assert what_remains(data, "shuffled") == (
        "there are 33% (A; guessing 11%) as many right answers as before: there is no other to compare it with")
    del data["models"]["A"]
    assert what_remains(data, MOVED) == "nothing follows, as no model does better than guessing to begin with"


def test_nobody_minds_least_by_chance_or_at_guessing():
    def said(*pairs):
        counts = {name: dict(correct={MOVED: list(pair)}) for name, pair in zip("AB", pairs, strict=False)}
        return what_remains(dict(models=counts, n=400, classes=10), MOVED).split(": ")[1]

    assert said((80, 56), (80, 66)) == "no difference between B and A shows"  # 70% and 83%, of 80 answers each
    assert said((380, 90), (380, 170)) == "B minds it least"
    assert said((60, 30), (60, 36)) == "no model does better than guessing then"
    assert said((380, 90), (380, 42)) == "only A still does better than guessing"
    assert said((60, 30)) == "that is no more than guessing gives"
    # 90 and 50 of 380 with p = 0.225 and 0.125: (90/380)^2 (0.775/90 + 0.05/380)
    assert variance_of_ratio(380, 90, 400) == pytest.approx(0.05609 * (0.008611 + 0.0001316), rel=1e-3)


def test_shifts_as_in_training_are_told_from_those_beyond():
    stays = torch.full((7, 7), 0.25)
    stays[2:5, 2:5] = 0.75
    stays[3, 3] = 1
    assert consistencies(stays, 1) == (0.75, 0.25)
    assert consistencies(stays, 3)[1] is None


def test_each_number_is_that_of_the_function_it_is_named_after(measured, setup):
    """Trained is trained and random is random: the entries against one call each."""
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
        expected = peak_memory(resized(model, img_size=16), images, train=train) / 2**20 / first["batch"]
        assert first[key] == pytest.approx(expected, rel=0.2)
    assert first["training_images_per_second"] < first["images_per_second"]


def test_similarities_are_of_the_model_and_of_its_random_twin(measured, setup):
    """Against one call each."""
    data, images = measured["similarity"], setup.images
    for name, model in setup.models.items():
        twin = untrained_copy(model)
        for key, which in (("within", model), (RANDOM, twin)):
            found = layer_similarity(which, which, images)
            torch.testing.assert_close(torch.tensor(data[key][name]), found, check_dtype=False)
        assert abs(off_diagonal(data["within"][name]) - off_diagonal(data[RANDOM][name])) > 0.01
    found = layer_similarity(setup.models["ConvNet"], setup.models["ViT"], images)
    torch.testing.assert_close(torch.tensor(data["across"]["ConvNet and ViT"]), found, check_dtype=False)


def test_patches_are_changed_as_their_curves_say(setup):
    """On a model that answers every class and is right until the images are changed, so that its four curves differ:
    each count against one call."""
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(setup.models["ViT"])
    with torch.no_grad():
        model.head.bias -= model(images).mean(dim=0)
    labels, normal = predictions(model, images), dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    own = ComparisonSetup({"ViT": model}, images, labels, **normal, reach=1, trained_shift=1)
    curves = EXPERIMENTS["position"].measure(own)["models"]["ViT"]["correct"]
    changes = {"shuffled": partial(shuffle_patches, patch_size=4),
               MOVED: partial(shuffle_patches, patch_size=4, offset=2),
               "hidden, mean": partial(occlude, patch_size=4),
               "hidden, black": partial(occlude, patch_size=4, fill="black", **normal)}
    assert curves == {what: [int((predictions(model, change(images, share=share)) == labels).sum()) for share in HIDDEN]
                      for what, change in changes.items()}
    assert len({tuple(counts) for counts in curves.values()}) == 4


def test_position_counts_the_images_as_they_are_first(measured, setup):
    for name, model in setup.models.items():
        right = int((model(setup.images).argmax(dim=1) == setup.labels).sum())
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


def test_random_twins_are_untrained(setup):
    twin = untrained_copy(setup.models["ViT"])
    assert not torch.equal(twin.head.weight, setup.models["ViT"].head.weight)


def test_listed():
    assert [join_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
