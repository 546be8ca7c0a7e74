"""Marking of the lessons' exercises: every state, every hint, and answers that nobody should give."""

import math

import numpy
import pandas
import pytest
import torch

import msif_lab as msif
from msif_lab.exercises import EXERCISES
from msif_lab.exercises.marking import Exercise

NAN, INF = math.nan, math.inf
USUAL = ("sign", "factor m", "factor 1/m", "factor 2", "factor 1/2")


def draw(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(name, seed=0):
    """Small random quantities to ask an exercise with."""
    if name == "00-1":
        return {
            "scores": msif.Influence(
                draw(4, 30, seed=seed), torch.arange(30) + 100, torch.arange(4)
            )
        }
    if name == "00-2":
        predicted = draw(4, 9, seed=seed) + torch.arange(4.0)[:, None]
        return {"predicted": predicted, "actual": predicted + draw(4, 9, seed=seed + 1) + 0.5}
    if name == "00-3":
        return {
            "frozen": draw(4, 30, seed=seed),
            "full": draw(4, 30, seed=seed) + draw(4, 30, seed=seed + 1),
        }
    # 01
    if name.startswith("01-"):
        given = {"X": draw(12, 4, seed=seed), "y": draw(12, seed=seed + 1), "lam": 0.1}
        if name == "01-1":
            return {"X": given["X"], "X_q": draw(5, 4, seed=seed + 2), "lam": 0.1}
        return given if name == "01-2" else {**given, "group": [3, 7]}

    # 02
    if name in ("02-1", "02-3"):
        half = draw(7, 7, seed=seed)
        H, g = half @ half.T + torch.eye(7), draw(7, seed=seed + 1)
        if name == "02-3":
            return {"b": draw(3, 5, seed=seed + 2), "H_F": H, "theta": g, "m": 30}
        return {
            "H_WW": H[:5, :5],
            "H_WU": H[:5, 5:],
            "H_UU": H[5:, 5:],
            "f_W": g[:5],
            "f_U": g[5:],
            "m": 30,
        }
    if name == "02-2":
        half = draw(6, 6, seed=seed)
        return {
            "u": draw(9, 4, seed=seed + 1),
            "G_WT": draw(9, 6, seed=seed + 2),
            "G_TT": half @ half.T,
        }

    # 03
    if name == "03-1":
        half = draw(4, 4, seed=seed)
        return {
            "G_TT": half @ half.T,
            "G_WT": draw(9, 4, seed=seed + 1),
            "dW": draw(9, 9, seed=seed + 2),
        }
    if name == "03-2":
        half = draw(6, 6, seed=seed)
        s, E = torch.linalg.eigh(half @ half.T)
        return {"s": s, "E": E, "c": draw(6, seed=seed + 1), "alpha": 0.3}
    if name == "03-3":
        half, W = draw(6, 6, seed=seed), torch.arange(4)
        gradients = {"grad_q": draw(6, 3, seed=seed + 1), "grad_g": draw(8, 6, seed=seed + 2)}
        return {"H_G": half @ half.T, "W": W, "alpha": 0.3, **gradients}

    if name == "04-1":
        return {"r": draw(7, seed=seed), "p": draw(7, seed=seed + 1), "A_p": draw(7, seed=seed + 2)}
    if name == "04-2":
        half = draw(6, 6, seed=seed)
        s, E = torch.linalg.eigh(half @ half.T)
        return {"s": s, "E": E, "a": draw(6, seed=seed + 1), "delta": 0.3}
    if name == "04-3":
        return {"J": draw(4, 9, seed=seed), "prob": draw(4, seed=seed + 1).softmax(0)}
    if name == "05-1":
        return {"grad_q": draw(4, 7, seed=seed), "grad_f": draw(30, 7, seed=seed + 1)}
    if name == "05-2":
        return {
            "predicted": pandas.Series(draw(40, seed=seed)),
            "actual": pandas.Series(draw(40, seed=seed + 1)),
        }
    if name == "05-3":
        half = draw(6, 6, seed=seed)
        return {
            "g_T": draw(4, 6, seed=seed + 1),
            "G_WT": draw(9, 6, seed=seed + 2),
            "G_TT": half @ half.T,
        }
    if name == "06-1":
        return {"scores": draw(4, 30, seed=seed), "group": [3, 7, 8, 20]}
    if name == "06-2":
        x = draw(40, seed=seed).numpy()
        return {"predicted": x + 1, "actual": 1.5 * x + draw(40, seed=seed + 1).numpy() + 3}
    if name == "06-3":
        return {"runs": draw(4, 9, seed=seed)[None] * 2 + draw(3, 4, 9, seed=seed + 1)}
    if name == "07-1":
        predicted = draw(4, 15, seed=seed).cumsum(0)
        return {"predicted": predicted, "actual": predicted + draw(4, 15, seed=seed + 1)}
    if name == "07-2":
        return {"runs": draw(3, 4, 60, seed=seed)}
    if name == "07-3":
        return {"r": draw(20, seed=seed).tanh()}
    if name == "09-1":
        return {"gradients": draw(5, 7, seed=seed), "g_bar": draw(7, seed=seed + 1), "m": 40}
    if name == "09-2":
        half = draw(6, 6, seed=seed)
        bars = {"theta_bar": draw(6, seed=seed + 1), "v_bar": draw(6, seed=seed + 2)}
        return {**bars, "hessian": half @ half.T, "rate": 0.3}
    if name == "09-3":
        return {"rates": draw(9, seed=seed).exp().tolist(), "momentum": 0.9}
    # 11
    if name == "11-1":
        return {"scores": draw(4, 30, seed=seed), "group": [3, 7, 8, 20]}
    if name == "11-2":
        return {"s": draw(1, seed=seed).exp()[0]}
    if name == "11-3":
        truth = torch.zeros(40, dtype=torch.bool)
        truth[[1, 5, 6, 11, 12, 20, 33, 39]] = True
        order = draw(40, seed=seed).argsort()
        return {
            "order": torch.cat(
                [order[truth[order]][:5], order[~truth[order]], order[truth[order]][5:]]
            ),
            "truth": truth,
            "k": 7,
        }
    raise KeyError(f"give exercise {name} a row here")


def asked(monkeypatch, expected, **settings):
    """An exercise "99-1" without quantities and with this right answer; returns how to answer it."""
    task = Exercise(lambda m=None: expected, "and then?", **settings)
    monkeypatch.setitem(EXERCISES, "99-1", task)
    return lambda answer, **given: msif.check("99-1", answer, **given)


each_exercise = pytest.mark.parametrize("name", EXERCISES)


# ---- The registered exercises ----


@each_exercise
@pytest.mark.parametrize("seed", range(5))
def test_right_answer_and_next_question(name, seed):
    given = example(name, seed)
    right = EXERCISES[name].expected(**given)
    verdict = msif.check(name, right, **given)
    assert (verdict.state, verdict.message) == ("right", EXERCISES[name].next)
    assert verdict.message.endswith("?")
    if isinstance(right, torch.Tensor):
        for same in (
            right.float(),
            right.numpy(),
            right.tolist(),
            list(right),
            right.clone().requires_grad_(),
        ):
            assert msif.check(name, same, **given).state == "right"


@each_exercise
@pytest.mark.parametrize("seed", range(5))
def test_each_mistake_gets_its_own_hint(name, seed):
    given = example(name, seed)
    answers = EXERCISES[name].wrong_answers(**given)
    assert set(answers) >= set(EXERCISES[name].mistakes), "a mistake that the example cannot show"
    hints = [hint for _, hint in EXERCISES[name].mistakes.values()]
    assert len(set(hints)) == len(hints)
    for mistake, (wrong, hint) in answers.items():
        verdict = msif.check(name, wrong, **given)
        assert verdict.state == "wrong", mistake
        if mistake in EXERCISES[name].mistakes:
            assert verdict.message.endswith(f". Hint: {hint}"), mistake
        else:  # one of the exercise's own may look the same, such as a forgotten ½ and the factor 2
            assert ". Hint: " in verdict.message, mistake


@each_exercise
def test_unattempted_is_no_error(name):
    given = example(name)
    for dots in (..., (1.0, ...), [..., 2]):
        assert msif.check(name, dots, **given).state == "unattempted"
    first = next(iter(given))
    assert msif.check(name, 1.0, **given | {first: ...}).state == "unattempted", (
        "what it starts from is itself a stub"
    )


@each_exercise
def test_other_wrong_answers_get_a_general_line(name):
    given = example(name)
    right = EXERCISES[name].expected(**given)
    if isinstance(right, list):
        wrong, says = (
            [*right[:4], 0 if 0 not in right else 1],
            "4 of 5 positions are right, of 5 given",
        )
    else:
        wrong, says = torch.as_tensor(right) + 1.2345, "the largest difference is 1.2"
    verdict = msif.check(name, wrong, **given)
    assert (
        verdict.state == "wrong"
        and verdict.message.startswith(says)
        and "Hint" not in verdict.message
    )


@each_exercise
@pytest.mark.parametrize(
    "odd", [None, "five", {}, {"a": 1}, object(), print, 10**40, [[1], [2, 3]], 1j, True, [], NAN]
)
def test_odd_answers_are_wrong_and_no_error(name, odd):
    verdict = msif.check(name, odd, **example(name))
    assert verdict.state == "wrong" and verdict.message


def test_positions_in_any_order_and_form():
    given = example("00-1")
    right = given["scores"].mean().harmful(5).positions[0]
    mixed = right[torch.tensor([3, 0, 4, 2, 1])]
    for same in (
        mixed,
        mixed.numpy(),
        mixed.numpy()[::-1],
        mixed.tolist(),
        tuple(mixed.tolist()),
        set(mixed.tolist()),
    ):
        assert msif.check("00-1", same, **given).state == "right"
    for answer, says in (
        (right[None], "this has the shape (1, 5)"),
        (given["scores"].mean().harmful(5), "this is of type Ranking"),
        (given["scores"], "this is of type Influence"),
        (right.double(), "these are float64"),
        ([1, 1, 2, 3, 4], "a position comes twice"),
        (right[:3], "3 of 5 positions are right, of 3 given"),
        ([], "0 of 5 positions are right, of 0 given"),
    ):
        verdict = msif.check("00-1", answer, **given)
        assert verdict.state == "wrong" and says in verdict.message


# ---- What every exercise can do ----


def test_usual_mistakes_are_known_without_an_entry(monkeypatch):
    right = draw(3, 4, seed=0)
    answer = asked(monkeypatch, right)
    for wrong, hint in (
        (-right, "the sign is flipped"),
        (right.T, "rows and columns are swapped"),
        (50 * right, "this is m times the right answer, with m = 50"),
        (right / 50, "this is 1/m times the right answer, with m = 50"),
        (2 * right, "this is 2 times"),
        (right / 2, "this is 1/2 times"),
    ):
        verdict = answer(wrong, m=50)
        assert verdict.state == "wrong" and hint in verdict.message.split(". Hint: ")[1]
    assert "Hint" not in answer(50 * right).message, "m is not among the quantities"


def test_transposed_square_matrix(monkeypatch):
    right = draw(3, 3, seed=1)
    assert "swapped" in asked(monkeypatch, right)(right.T).message
    assert asked(monkeypatch, right + right.T)(right + right.T).state == "right"


def test_shapes_places_and_broken_numbers(monkeypatch):
    right = torch.arange(6.0).reshape(2, 3)
    answer = asked(monkeypatch, right)
    assert answer(right.flatten()).message == "the shape is (6,), it should be (2, 3)"
    assert answer(right[None]).message == "the shape is (1, 2, 3), it should be (2, 3)"
    off = right.clone()
    off[1, 0] += 0.25
    assert answer(off).message == "the largest difference is 0.25, at [1, 0]"
    off[0] = torch.tensor([NAN, INF, 1.0])
    assert answer(off).message.startswith("2 of 6 numbers are NaN or inf")
    assert answer(right > 1).message == "real numbers asked for, these are bool"


def test_tolerance_is_relative_to_the_largest_number(monkeypatch):
    right = torch.tensor([1000.0, 1e-3])
    answer = asked(monkeypatch, right)
    assert answer(right + 0.09).state == "right"
    assert answer(right + 0.11).state == "wrong"
    assert asked(monkeypatch, right, tolerance=1e-3)(right + 0.11).state == "right"
    assert asked(monkeypatch, 20_000)(20_001).state == "wrong", "whole numbers are exact"
    assert asked(monkeypatch, 0.0)(1e-5).state == "right"
    assert asked(monkeypatch, torch.zeros(0))(torch.zeros(0)).state == "right"


@pytest.mark.parametrize(
    "same", [2, 2.0, [2.0], numpy.float32(2), torch.tensor([[2]]), pandas.Series([2.0], index=[7])]
)
def test_one_number_however_wrapped(monkeypatch, same):
    assert asked(monkeypatch, 2.0)(same).state == "right"


def test_words_and_yes_or_no(monkeypatch):
    answer = asked(
        monkeypatch,
        "frozen",
        mistakes={"other": (lambda right, given: "full", "that is the other case")},
    )
    assert answer(" Frozen ").state == "right"
    assert answer("full").message == "it is not so. Hint: that is the other case"
    assert answer(3).message == "a word asked for, this is of type int"
    answer = asked(monkeypatch, True)
    assert [answer(x).state for x in (True, numpy.bool_(True), torch.tensor(True))] == ["right"] * 3
    assert answer(False).message == "it is not so"
    assert answer(1).message == "True or False asked for, this is of type int"
    assert answer(torch.tensor([True, True])).state == "wrong"


def test_judge_decides_where_many_answers_are_right(monkeypatch):
    def judge(answer, given):
        return "" if float(answer.norm()) == 1 else "the length is not 1"

    mistakes = {"ones": (lambda right, given: torch.ones(2), "divide by the length")}
    answer = asked(monkeypatch, torch.tensor([1.0, 0.0]), judge=judge, mistakes=mistakes)
    assert [answer(x).state for x in ([1.0, 0.0], [0, -1], [3, 4])] == ["right", "right", "wrong"]
    assert answer([1.0, 1.0]).message == "the length is not 1. Hint: divide by the length"
    assert answer([-2.0, 0.0]).message == "the length is not 1", "no usual mistakes here"
    assert answer("x").message == "real numbers asked for, this is of type str"


def test_mistake_that_cannot_happen_is_left_out():
    given = example("09-1")
    del given["m"]
    assert "divided by m" not in EXERCISES["09-1"].wrong_answers(**given)
    assert msif.check("09-1", -EXERCISES["09-1"].expected(**given), **given).state == "wrong"


# ---- Errors of whoever writes the lesson, and how a verdict looks ----


def test_lesson_errors_are_raised():
    with pytest.raises(ValueError, match=r"exercise='42-1' is none of 00-1, .*09-3"):
        msif.check("42-1", ...)
    with pytest.raises(ValueError, match="is none of"):
        msif.check(torch.ones(3), "09-1")
    with pytest.raises(
        TypeError,
        match=r"missing a required argument: 'momentum'; it takes \['rates', 'momentum'\]",
    ):
        msif.check("09-3", ..., rates=[0.1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        msif.check("09-3", ..., rates=[0.1], momentum=0.9, alpha=1)
    with pytest.raises(ValueError, match="NaN or inf"):
        msif.check("09-3", 1.0, rates=[NAN], momentum=0.9)


@pytest.mark.parametrize(("answer", "sign"), [(..., "○"), (0.5, "✗"), (0.25, "✓")])
def test_verdict_shows_sign_and_words_not_only_colour(answer, sign):
    verdict = msif.check("09-3", answer, rates=[0.2], momentum=0.9)
    text, page = repr(verdict), verdict._repr_html_()
    assert text == f"{sign} 09-3 {verdict.state}: {verdict.message}" and "\n" not in text
    for piece in (sign, "09-3", verdict.state, "#"):
        assert piece in page
    assert "background" not in page and page.count("color: #") == 1, "text keeps the theme's colour"


def test_verdict_escapes_html(monkeypatch):
    monkeypatch.setitem(EXERCISES, "99-1", Exercise(lambda: 1.0, "is a < b & c?"))
    assert "a &lt; b &amp; c?" in msif.check("99-1", 1.0)._repr_html_()
