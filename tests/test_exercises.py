"""Marking of the lessons' exercises: right answers, every hint, and answers of the wrong type."""

import math

import numpy
import pandas
import pytest
import torch

import msif_lab as msif
from msif_lab.exercises import EXERCISES
from msif_lab.exercises.marking import Exercise

NAN, INF = math.nan, math.inf
SEEDS = range(5)


def draw(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_positive(n, seed):
    """A random positive definite matrix."""
    half = draw(n, n, seed=seed)
    return half @ half.T


def draw_spectrum(seed):
    """Eigenvalues and eigenvectors of a positive definite 6 × 6 matrix, and a vector."""
    values, vectors = torch.linalg.eigh(draw_positive(6, seed))
    return values, vectors, draw(6, seed=seed + 1)


# ---- Small random quantities to ask each lesson's exercises with ----


def lesson_00(seed):
    first, second = draw(4, 30, seed=seed), draw(4, 30, seed=seed + 1)
    predicted = draw(4, 9, seed=seed) + torch.arange(4.0)[:, None]
    yield {"scores": msif.Influence(first, torch.arange(30) + 100, torch.arange(4))}
    yield {"predicted": predicted, "actual": predicted + draw(4, 9, seed=seed + 1) + 0.5}
    yield {"frozen": first, "full": first + second}


def lesson_01(seed):
    given = {"X": draw(12, 4, seed=seed), "y": draw(12, seed=seed + 1), "lam": 0.1}
    yield {"X": given["X"], "X_q": draw(5, 4, seed=seed + 2), "lam": 0.1}
    yield given
    yield given | {"group": [3, 7]}


def lesson_02(seed):
    H = draw_positive(7, seed) + torch.eye(7)
    g = draw(7, seed=seed + 1)
    blocks = {"H_WW": H[:5, :5], "H_WU": H[:5, 5:], "H_UU": H[5:, 5:]}
    yield blocks | {"f_W": g[:5], "f_U": g[5:], "m": 30}
    u, G_WT = draw(9, 4, seed=seed + 1), draw(9, 6, seed=seed + 2)
    yield {"u": u, "G_WT": G_WT, "G_TT": draw_positive(6, seed)}
    yield {"b": draw(3, 5, seed=seed + 2), "H_F": H, "theta": g, "m": 30}


def lesson_03(seed):
    G_WT, dW = draw(9, 4, seed=seed + 1), draw(9, 9, seed=seed + 2)
    yield {"G_TT": draw_positive(4, seed), "G_WT": G_WT, "dW": dW}
    s, E, c = draw_spectrum(seed)
    yield {"s": s, "E": E, "c": c, "alpha": 0.3}
    gradients = {"grad_q": draw(6, 3, seed=seed + 1), "grad_g": draw(8, 6, seed=seed + 2)}
    yield {"H_G": draw_positive(6, seed), "W": torch.arange(4), "alpha": 0.3, **gradients}


def lesson_04(seed):
    yield {"r": draw(7, seed=seed), "p": draw(7, seed=seed + 1), "A_p": draw(7, seed=seed + 2)}
    s, E, a = draw_spectrum(seed)
    yield {"s": s, "E": E, "a": a, "delta": 0.3}
    yield {"J": draw(4, 9, seed=seed), "prob": draw(4, seed=seed + 1).softmax(0)}


def lesson_05(seed):
    yield {"grad_q": draw(4, 7, seed=seed), "grad_f": draw(30, 7, seed=seed + 1)}
    predicted, actual = (pandas.Series(draw(40, seed=s)) for s in (seed, seed + 1))
    yield {"predicted": predicted, "actual": actual}
    g_T, G_WT = draw(4, 6, seed=seed + 1), draw(9, 6, seed=seed + 2)
    yield {"g_T": g_T, "G_WT": G_WT, "G_TT": draw_positive(6, seed)}


def lesson_06(seed):
    yield {"scores": draw(4, 30, seed=seed), "group": [3, 7, 8, 20]}
    x, noise = (draw(40, seed=s).numpy() for s in (seed, seed + 1))
    yield {"predicted": x + 1, "actual": 1.5 * x + noise + 3}
    yield {"runs": draw(4, 9, seed=seed)[None] * 2 + draw(3, 4, 9, seed=seed + 1)}


def lesson_07(seed):
    predicted = draw(4, 15, seed=seed).cumsum(0)
    yield {"predicted": predicted, "actual": predicted + draw(4, 15, seed=seed + 1)}
    yield {"runs": draw(3, 4, 60, seed=seed)}
    yield {"r": draw(20, seed=seed).tanh()}


def lesson_08(seed):
    suspicion, wrong = draw(40, seed=seed), torch.arange(40) % 5 == 0
    yield {"suspicion": suspicion + 0.5 * wrong, "wrong": wrong}
    before = draw(6, seed=seed)
    yield {"before": before, "after": before - 0.3 + 0.2 * draw(6, seed=seed + 1)}
    yield {"per_seed": draw(30, seed=seed) + draw(6, 30, seed=seed + 1), "k": 5}
    yield {"w": torch.ones(30).double(), "g": draw(30, seed=seed), "eta": 1.5, "limit": 3.0}


def lesson_09(seed):
    yield {"gradients": draw(5, 7, seed=seed), "g_bar": draw(7, seed=seed + 1), "m": 40}
    bars = {"theta_bar": draw(6, seed=seed + 1), "v_bar": draw(6, seed=seed + 2)}
    yield {**bars, "hessian": draw_positive(6, seed), "rate": 0.3}
    yield {"rates": draw(9, seed=seed).exp().tolist(), "momentum": 0.9}


def lesson_10(seed):
    yield {"rho": 0.2 + 0.1 * seed, "r": 0.9}
    yield {"per_seed": draw(6, 9, seed=seed), "t": 2.57}
    spread = torch.rand(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    small = 1e-5 * spread[:5], 2e-3 + 1e-3 * spread[:6], 0.04 + 0.01 * spread[:4]
    yield {"p": torch.cat([spread, *small]), "wrong": 0.05}


def lesson_11(seed):
    yield {"scores": draw(4, 30, seed=seed), "group": [3, 7, 8, 20]}
    yield {"s": draw(1, seed=seed).exp()[0]}
    truth = torch.zeros(40, dtype=torch.bool)
    truth[[1, 5, 6, 11, 12, 20, 33, 39]] = True
    order = draw(40, seed=seed).argsort()
    hits, misses = order[truth[order]], order[~truth[order]]
    yield {"order": torch.cat([hits[:5], misses, hits[5:]]), "truth": truth, "k": 7}


LESSONS = {
    make.__name__.removeprefix("lesson_"): make
    for make in (
        *(lesson_00, lesson_01, lesson_02, lesson_03, lesson_04),
        *(lesson_05, lesson_06, lesson_07, lesson_08, lesson_09, lesson_10, lesson_11),
    )
}


def quantities(name, seed=0):
    """What exercise ``name`` starts from."""
    lesson, number = name.split("-")
    return list(LESSONS[lesson](seed))[int(number) - 1]


def asked(monkeypatch, expected, **settings):
    """A new exercise without quantities and with this right answer; returns how to answer it."""
    task = Exercise(lambda m=None: expected, "and then?", **settings)
    monkeypatch.setitem(EXERCISES, "99-1", task)
    return lambda answer, **given: msif.check("99-1", answer, **given)


# ---- The registered exercises ----


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answer_and_next_question(name):
    for seed in SEEDS:
        given = quantities(name, seed)
        right = EXERCISES[name].expected(**given)
        same = [right]
        if isinstance(right, torch.Tensor):
            same += [right.float(), right.numpy(), right.tolist(), list(right)]
            same += [right.clone().requires_grad_()]
        for answer in same:
            verdict = msif.check(name, answer, **given)
            assert verdict.state == "right", (name, seed, answer, verdict)
            assert verdict.message == EXERCISES[name].next and verdict.message.endswith("?")


@pytest.mark.parametrize("name", EXERCISES)
def test_each_mistake_gets_its_own_hint(name):
    own = EXERCISES[name].mistakes
    hints = [hint for _, hint in own.values()]
    assert len(set(hints)) == len(hints), "two mistakes share a hint"
    for seed in SEEDS:
        given = quantities(name, seed)
        answers = EXERCISES[name].wrong_answers(**given)
        assert set(answers) >= set(own), "a mistake that these quantities cannot show"
        for mistake, (wrong, hint) in answers.items():
            verdict = msif.check(name, wrong, **given)
            assert verdict.state == "wrong", (name, seed, mistake)
            if mistake in own:
                assert verdict.message.endswith(f". Hint: {hint}"), (name, seed, mistake, verdict)
            else:  # the exercise's own hint may come instead: a forgotten ½ is also the factor 2
                assert ". Hint: " in verdict.message, (name, seed, mistake, verdict)


# A few words of each hint, written a second time: a hint must belong to its own mistake.
HINTS = {
    "00-1": {"helpful": "most helpful", "ids": "are ids", "first query": "first query alone"},
    "00-2": {"pooled": "all pairs", "over queries": "compares queries", "sign": "minus the score"},
    "00-3": {"disagree": "disagree", "harmful only": "harmful in both", "correlation": "sizes too"},
    "01-1": {
        "sign": "sign is flipped",
        "no 1/m": "1/m is missing",
        "no weight decay": "λ is missing",
        "no inverse": "H is missing",
    },
    "01-2": {
        "not left out": "has seen",
        "times": "divide by",
        "1 + h": "added a second time",
        "change only": "change of the prediction",
        "h without weight decay": "λ is missing",
    },
    "01-3": {
        "derivative": "derivative",
        "sum of singles": "two single removals",
        "sign": "sign is flipped",
        "mean over the rest": "patients that stay",
    },
    "02-1": {
        "U held": "U block is dropped",
        "curvature of W alone": "too stiff",
        "pull on W alone": "curvature is right",
        "sign": "sign is flipped",
    },
    "02-2": {
        "sign": "sign is flipped",
        "no inverse": "G_TT⁻¹ is missing",
        "not solved": "not by its inverse",
        "transposed": "transpose",
    },
    "02-3": {
        "1/m": "divided by m",
        "U held": "U block is dropped",
        "half": "half of it",
        "sign": "sign is flipped",
    },
    "03-1": {
        "sign": "sign is flipped",
        "no inverse": "G_TT⁻¹ is missing",
        "frozen": "frozen case",
    },
    "03-2": {
        "upside down": "upside down",
        "no 2": "without a ½",
        "no 2α in front": "hence the 2α in front",
        "eigenvectors as rows": "columns of E",
    },
    "03-3": {
        "2α in front": "no α",
        "P everywhere": "zero on T",
        "no P": "belongs in the Hessian",
        "shared part only": "only the rows of W",
        "sign": "sign is flipped",
        "no mean": "1/n is missing",
    },
    "04-1": {
        "no curvature": "were 1",
        "upside down": "upside down",
        "sign": "sign is flipped",
    },
    "04-2": {
        "no damping": "that is H⁻¹a",
        "product": "the product",
        "eigenvectors as rows": "columns of E",
    },
    "04-3": {"diagonal": "couples", "no loss": "squared error", "plus": "the sign of p pᵀ"},
    "05-1": {"sign": "sign is flipped", "sum": "with 1/m", "cosine": "cosine"},
    "05-2": {"signed": "compares signs", "one side": "only the predictions", "Pearson": "Pearson"},
    "05-3": {
        "sign": "sign is flipped",
        "no inverse": "G_TT⁻¹ is missing",
        "transposed": "transpose",
    },
    "06-1": {"sign": "sign is flipped", "mean": "their mean", "over queries": "summed over"},
    "06-2": {
        "predicted on actual": "predicted on actual",
        "through the origin": "through the origin",
        "correlation": "that is r",
    },
    "06-3": {"itself": "with itself", "pooled": "pools queries"},
    "07-1": {"Pearson": "Pearson", "pooled": "ranks all pairs together", "order": "argsort"},
    "07-2": {
        "sizes": "averages sizes",
        "one seed": "first seed alone",
        "over queries": "averages over queries",
    },
    "07-3": {
        "spread": "single queries",
        "standard error": "1.96 of them",
        "whole width": "whole width",
    },
    "08-1": {"upside down": "right label comes first", "precision": "flags nothing"},
    "08-2": {
        "not paired": "seed by seed",
        "single seeds": "spread of single changes",
        "divided by S": "divided by √S",
    },
    "08-3": {
        "in sample": "gain in sample",
        "own choice": "judges its own list",
        "the other end": "most helpful",
        "judged by the others": "other way round",
    },
    "08-4": {"uphill": "against the score", "not clipped": "clip to 0", "norm": "that is the norm"},
    "09-1": {"no mean": "1/|B|", "divided by m": "divided by m", "sign": "sign is flipped"},
    "09-2": {"old v_bar": "later steps", "no Hessian": "unchanged", "minus": "wrong sign"},
    "09-3": {"no 2": "without a ½", "no momentum": "repeats each gradient"},
    "10-1": {"r for r²": "square both sides", "upside down": "does the opposite"},
    "10-2": {
        "single seeds": "spread of single seeds",
        "no t": "hence t",
        "population": "divided by S − 1",
        "divided by S": "divided by √S",
    },
    "10-3": {"each alone": "each pair alone", "Bonferroni": "Bonferroni's bound"},
    "11-1": {
        "one image": "mean over the images",
        "all queries": "summed over the queries",
        "sign": "sign is flipped",
    },
    "11-2": {"no factor 2": "2α, not α", "twice": "half of s"},
    "11-3": {"precision": "that is the precision", "the other end": "least suspicious"},
}


def test_each_hint_belongs_to_its_mistake():
    for name, task in EXERCISES.items():
        hints = {mistake: hint for mistake, (_, hint) in task.mistakes.items()}
        assert set(hints) == set(HINTS[name]), name
        for mistake, words in HINTS[name].items():
            found = [other for other, hint in hints.items() if words in hint]
            assert found == [mistake], (name, mistake, words, found)


def test_unattempted_is_no_error():
    for name in EXERCISES:
        given = quantities(name)
        for dots in (..., (1.0, ...), [..., 2]):
            assert msif.check(name, dots, **given).state == "unattempted", (name, dots)
        from_a_stub = given | {next(iter(given)): ...}
        assert msif.check(name, 1.0, **from_a_stub).state == "unattempted", name


def test_an_unknown_mistake_gets_a_general_line_without_hint():
    for name in EXERCISES:
        given = quantities(name)
        right = EXERCISES[name].expected(**given)
        if isinstance(right, list):
            wrong = [*right[:4], 0 if 0 not in right else 1]
            says = "4 of 5 positions are right, of 5 given"
        else:
            wrong = torch.as_tensor(right) + 1.2345
            says = "the largest difference is 1.2"
        verdict = msif.check(name, wrong, **given)
        assert verdict.state == "wrong" and verdict.message.startswith(says), (name, verdict)
        assert "Hint" not in verdict.message, (name, verdict)


# ---- Odd answers ----


def unit_length(answer, given):
    return "" if float(answer.norm()) == 1 else "the length is not 1"


ODD = [None, "five", {}, {"a": 1}, object(), print, 10**40, [[1], [2, 3]], 1j, True, [], NAN]
ODD += [torch.ones(2, 2, 2), [NAN, 1.0], set(), (), "", b"1", numpy.array(["a"]), [None]]
KINDS = {
    "number": (2.0, {}),
    "matrix": (torch.eye(2), {}),
    "bool": (False, {}),
    "word": ("frozen", {}),
    "set": ([1, 2, 3], {}),
    "judge": (torch.tensor([1.0, 0.0]), {"judge": unit_length}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_answers_are_wrong_and_no_error(monkeypatch, kind):
    expected, settings = KINDS[kind]
    answer = asked(monkeypatch, expected, **settings)
    for odd in ODD:
        verdict = answer(odd)
        assert verdict.state == "wrong" and verdict.message, (odd, verdict)


def test_positions_in_any_order_and_form():
    given = quantities("00-1")
    right = given["scores"].mean().harmful(5).positions[0]
    mixed = right[torch.tensor([3, 0, 4, 2, 1])]
    whole = mixed.tolist()
    for same in (mixed, mixed.numpy(), mixed.numpy()[::-1], whole, tuple(whole), set(whole)):
        assert msif.check("00-1", same, **given).state == "right", same
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
        assert verdict.state == "wrong" and says in verdict.message, (answer, verdict)


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
        assert verdict.state == "wrong" and hint in verdict.message.split(". Hint: ")[1], hint
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


def test_one_number_however_wrapped(monkeypatch):
    answer = asked(monkeypatch, 2.0)
    series = pandas.Series([2.0], index=[7])
    for same in (2, 2.0, [2.0], numpy.float32(2), torch.tensor([[2]]), series):
        assert answer(same).state == "right", same


def test_words_and_yes_or_no(monkeypatch):
    mistakes = {"other": (lambda right, given: "full", "that is the other case")}
    answer = asked(monkeypatch, "frozen", mistakes=mistakes)
    assert answer(" Frozen ").state == "right"
    assert answer("full").message == "it is not so. Hint: that is the other case"
    assert answer(3).message == "a word asked for, this is of type int"
    answer = asked(monkeypatch, True)
    for same in (True, numpy.bool_(True), torch.tensor(True)):
        assert answer(same).state == "right", same
    assert answer(False).message == "it is not so"
    assert answer(1).message == "True or False asked for, this is of type int"
    assert answer(torch.tensor([True, True])).state == "wrong"


def test_judge_decides_where_many_answers_are_right(monkeypatch):
    mistakes = {"ones": (lambda right, given: torch.ones(2), "divide by the length")}
    right = torch.tensor([1.0, 0.0])
    answer = asked(monkeypatch, right, judge=unit_length, mistakes=mistakes)
    assert [answer(x).state for x in ([1.0, 0.0], [0, -1], [3, 4])] == ["right", "right", "wrong"]
    assert answer([1.0, 1.0]).message == "the length is not 1. Hint: divide by the length"
    assert answer([-2.0, 0.0]).message == "the length is not 1", "no usual mistakes here"
    assert answer("x").message == "real numbers asked for, this is of type str"


def test_mistake_that_cannot_happen_is_left_out():
    given = quantities("09-1")
    del given["m"]
    assert "divided by m" not in EXERCISES["09-1"].wrong_answers(**given)
    assert msif.check("09-1", -EXERCISES["09-1"].expected(**given), **given).state == "wrong"


# ---- Errors in the lesson itself, and how a verdict looks ----


def test_lesson_errors_are_raised():
    with pytest.raises(ValueError, match=r"exercise='42-1' is none of 00-1, .*09-3"):
        msif.check("42-1", ...)
    with pytest.raises(ValueError, match="is none of"):
        msif.check(torch.ones(3), "09-1")
    missing = r"missing a required argument: 'momentum'; it takes \['rates', 'momentum'\]"
    with pytest.raises(TypeError, match=missing):
        msif.check("09-3", ..., rates=[0.1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        msif.check("09-3", ..., rates=[0.1], momentum=0.9, alpha=1)
    with pytest.raises(ValueError, match="NaN or inf"):
        msif.check("09-3", 1.0, rates=[NAN], momentum=0.9)


def test_verdict_shows_sign_and_words_not_only_colour():
    for answer, sign in ((..., "○"), (0.5, "✗"), (0.25, "✓")):
        verdict = msif.check("09-3", answer, rates=[0.2], momentum=0.9)
        text, page = repr(verdict), verdict._repr_html_()
        assert text == f"{sign} 09-3 {verdict.state}: {verdict.message}" and "\n" not in text
        assert all(piece in page for piece in (sign, "09-3", verdict.state, "#")), page
        # the message keeps the theme's own colour
        assert "background" not in page and page.count("color: #") == 1, page


def test_verdict_escapes_html(monkeypatch):
    monkeypatch.setitem(EXERCISES, "99-1", Exercise(lambda: 1.0, "is a < b & c?"))
    assert "a &lt; b &amp; c?" in msif.check("99-1", 1.0)._repr_html_()
