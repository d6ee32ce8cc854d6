"""Each question's result is measured and is one of its guesses; guesses are counted and optional."""

import re

import pytest
import torch

from vit_bridge.analysis.attention import attention_distance
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.perturbations import shift_consistency, shuffle_patches
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.lessons import quiz
from vit_bridge.runtime import predictions
from vit_bridge.weights.checkpoints import load

FAST = quiz.Question("Which?", ("this", "that"), lambda: (1, "It is so."))


def read_from(*answers):
    waiting = list(answers)

    def read(prompt):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read


@pytest.mark.parametrize("question", quiz.QUESTIONS, ids=lambda question: question.measure.__name__)
def test_quiz_answer_is_one_of_the_guesses(question):
    place, sentence = question.measure()
    assert 0 <= place < len(question.guesses)
    assert sentence.endswith(".")
    assert any(letter.isdigit() for letter in sentence)


def test_quiz_gives_the_exact_answers():
    assert [quiz._shuffled_without_positions()[0], quiz._gradient_after_the_last_block()[0], quiz._price_of_heads()[0],
            quiz._cost_of_twice_the_side()[0], quiz._cost_of_windows()[0]] == [0, 0, 1, 1, 1]


# ---- Results that are measured, compared with direct measurements


def shapes(model, n_images):
    drawn = make_shapes(n_images, 32, start=TEST_START)
    return model.preprocessing.normalise(drawn.images), drawn.labels


def numbers_in(sentence, unit):
    return [float(number) for number in re.findall(rf"([\d.]+){unit}", sentence)]


@pytest.mark.slow
def test_who_needs_the_order_counts_on_both_grids():
    shares = []
    for key in ("vit_nano_shapes", "convnet_shapes"):
        model = load(key)
        images, labels = shapes(model, 200)
        right = set((predictions(model, images) == labels).nonzero().flatten().tolist())
        for offset in (0, 2):
            shuffled = shuffle_patches(images, 4, 0.75, offset=offset)
            still = set((predictions(model, shuffled) == labels).nonzero().flatten().tolist())
            shares.append(round(100 * len(right & still) / len(right)))
    place, sentence = quiz._who_needs_the_order()
    assert numbers_in(sentence, "%") == shares
    assert place == (0 if shares[0] < 50 else 1 if shares[0] < 90 else 2)
    assert sentence.endswith(quiz._conclude_about_order(shares[0] / 100, shares[1] / 100))


def test_accuracy_kept_counts_right_before_and_after(monkeypatch):
    model = load("convnet_shapes")
    labels = shapes(model, 200)[1]
    before, after = labels.clone(), labels.clone()
    before[50:] += 1  # right: 0 to 49
    after[:30] += 1  # right: 30 to 199, of which 20 were right before
    answers = [before, after]
    monkeypatch.setattr(quiz, "predictions", lambda model, images: answers.pop(0))
    assert quiz._accuracy_kept(model, 4, 0) == 20 / 50


@pytest.mark.parametrize(("own", "moved", "words"), [
    (0.89, 0.1, "depend on where its patches are"), (0.95, 0.2, "but the patches must stay intact"),
    (0.95, 0.94, "nor on whether they stay intact")])
def test_conclude_about_order_follows_the_numbers(own, moved, words):
    assert words in quiz._conclude_about_order(own, moved)


@pytest.mark.slow
def test_who_minds_a_shift_looks_at_two_pixels(monkeypatch):
    model = load("vit_nano_shapes")
    stays = shift_consistency(model, shapes(model, 64)[0], 2)
    expected = (stays.sum().item() - 1) / 24
    place, sentence = quiz._who_minds_a_shift()
    assert f"stays in {expected:.0%} of cases" in sentence
    assert place == (0 if expected < 0.6 else 1 if expected < 0.9 else 2)
    reaches = []
    monkeypatch.setattr(quiz, "shift_consistency", lambda model, images, reach: reaches.append(reach) or stays)
    quiz._who_minds_a_shift()
    assert reaches == [2]


def test_how_far_the_first_block_looks_uses_the_nearest_head():
    model = load("vit_nano_shapes")
    maps = attention_maps(model, shapes(model, 32)[0])  # (L, B, H, N, N)
    nearest = attention_distance(maps, (8, 8), (4, 4), 1)[0].min().item()
    place, sentence = quiz._how_far_the_first_block_looks()
    assert numbers_in(sentence, " pixels")[0] == round(nearest, 1)
    between = torch.cdist(*[torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)) * 4] * 2)  # (n, n)
    assert f"for uniform attention it is {between.mean():.1f} pixels." in sentence
    assert place == (0 if nearest < 0.5 * between.mean() else 1 if nearest < 0.8 * between.mean() else 2)


@pytest.mark.parametrize(("distance", "place", "said"), [(4.0, 0, False), (10.0, 1, False), (16.0, 2, True)])
def test_how_far_the_first_block_looks_explains_missing_near_heads(distance, place, said, monkeypatch):
    monkeypatch.setattr(quiz, "attention_distance", lambda *args: torch.tensor([[distance, 20.0], [1.0, 1.0]]))
    found, sentence = quiz._how_far_the_first_block_looks()
    assert found == place
    assert ("Fig. 7" in sentence) == said


def test_ask_judges_and_counts_guesses():
    said = []
    assert quiz.ask([FAST] * 3, read_from("2", "1", ""), said.append) == (1, 2)
    text = "\n".join(said)
    assert "Right. Measured: that. It is so." in text
    assert "No. Measured: that. It is so." in text
    assert text.endswith("\n1 of 2 right, 1 skipped.")


def test_ask_repeats_after_an_invalid_guess():
    said = []
    assert quiz.ask([FAST], read_from("9", "perhaps", " 2 "), said.append) == (1, 1)
    assert "'9' is not a choice; expected 1 to 2." in "\n".join(said)


def test_ask_stops_at_q():
    said = []
    assert quiz.ask([FAST] * 3, read_from("2", "q"), said.append) == (1, 1)
    assert sum("Measured" in line for line in said) == 1


def test_ask_shows_the_results_without_input():
    said = []
    assert quiz.ask([FAST, FAST], read_from(), said.append) == (0, 0)
    assert sum("Measured: that" in line for line in said) == 2
