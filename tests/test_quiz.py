"""Every question is answered by measuring, among its own guesses; guesses are counted, and nobody has to give one."""

import pytest

import quiz

FAST = quiz.Question("Which?", ("this", "that"), lambda: (1, "It is so."))


def read_from(*answers):
    waiting = list(answers)

    def read(prompt):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read


@pytest.mark.parametrize("question", quiz.QUESTIONS, ids=lambda question: question.measure.__name__)
def test_a_measured_answer_is_one_of_the_guesses(question):
    place, sentence = question.measure()
    assert 0 <= place < len(question.guesses)
    assert sentence.endswith(".")
    assert any(letter.isdigit() for letter in sentence)


def test_the_answers_that_are_exact():
    assert [quiz.shuffled_without_positions()[0], quiz.gradient_after_the_last_block()[0], quiz.price_of_heads()[0],
            quiz.cost_of_twice_the_side()[0]] == [0, 0, 1, 1]


def test_guesses_are_told_right_or_wrong_and_counted():
    said = []
    assert quiz.ask([FAST] * 3, read_from("2", "1", ""), said.append) == (1, 2)
    text = "\n".join(said)
    assert "Right. Measured: that. It is so." in text
    assert "No. Measured: that. It is so." in text
    assert text.endswith("\n1 of 2 right.")


def test_what_is_no_guess_is_asked_again():
    said = []
    assert quiz.ask([FAST], read_from("9", "perhaps", " 2 "), said.append) == (1, 1)
    assert "'9' is none of them; expected 1 to 2." in "\n".join(said)


def test_enough_is_enough():
    said = []
    assert quiz.ask([FAST] * 3, read_from("2", "q"), said.append) == (1, 1)
    assert sum("Measured" in line for line in said) == 1


def test_with_nobody_there_the_answers_are_told():
    said = []
    assert quiz.ask([FAST, FAST], read_from(), said.append) == (0, 0)
    assert sum("Measured: that" in line for line in said) == 2
