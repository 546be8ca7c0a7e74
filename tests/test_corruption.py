"""Data spoilt on purpose: as much as was asked for, where the truth says, and nothing else."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import F64

import msif_lab as msif

MANY = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def labelled(draw, most=30):
    """Examples of two to five classes with ids of their own, and a share of at least one of them.

    Inputs are all different and hold their position, so that a test sees where each went.
    """
    n, size = draw(st.integers(2, most)), draw(st.integers(2, 5))
    labels = torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n)))
    x = torch.arange(n * 4, dtype=F64).reshape(n, 1, 2, 2)
    ids = draw(st.lists(st.integers(0, 10**6), min_size=n, max_size=n, unique=True))
    examples = msif.Examples(x, labels, ids, classes="abcde"[:size])
    fraction = draw(st.floats(0.51 / n, 1.0))
    return examples, fraction, round(fraction * n), draw(st.integers(0, 10**6))


def unchanged(examples, x, y):
    assert torch.equal(examples.x, x) and torch.equal(examples.y, y), "the argument was changed"


def same(ours, theirs):
    return ours.examples.digest() == theirs.examples.digest() and torch.equal(
        ours.truth, theirs.truth
    )


# ---- Labels ----


@MANY
@given(labelled())
def test_flips_are_as_many_as_asked_for_and_where_the_truth_says(case):
    examples, fraction, count, seed = case
    x, y = examples.x.clone(), examples.y.clone()
    noisy, truth = flipped = msif.flip_labels(examples, fraction, seed)
    unchanged(examples, x, y)
    assert torch.equal(noisy.y != y, truth) and int(truth.sum()) == count
    assert torch.equal(noisy.x, x) and torch.equal(noisy.ids, examples.ids)
    assert noisy.classes == examples.classes and int(noisy.y.max()) < len(noisy.classes)
    assert same(flipped, msif.flip_labels(examples, fraction, seed))
    assert repr(flipped) == f"Corrupted({count} of {len(y)} examples)"


@MANY
@given(labelled(), st.data())
def test_a_dictionary_flips_only_its_classes_into_theirs(case, data):
    examples, _, _, seed = case
    names = examples.classes
    olds = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    pairs = {c: data.draw(st.sampled_from([d for d in names if d != c])) for c in olds}
    possible = sum(names[label] in pairs for label in examples.y)
    if not possible:
        return
    count = data.draw(st.integers(1, possible))
    noisy, truth = msif.flip_labels(examples, count / len(examples), seed, transition=pairs)
    assert int(truth.sum()) == count
    for old, new, wrong in zip(examples.y, noisy.y, truth, strict=True):
        assert names[new] == (pairs[names[old]] if wrong else names[old])
    if possible < len(examples):
        with pytest.raises(ValueError, match=f"only {possible} be flipped") as caught:
            msif.flip_labels(examples, (possible + 1) / len(examples), seed, transition=pairs)
        way_out = float(re.search(r"at most ([\d.e-]+)", str(caught.value))[1])
        assert round(way_out * len(examples)) == possible


def test_labels_become_others_as_often_as_the_matrix_says():
    """Of 60,000 examples, within five standard errors; a uniform draw is far outside."""
    n, size = 60_000, 3
    matrix = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.6, 0.3], [0.0, 0.0, 1.0]], dtype=F64)
    examples = msif.Examples(torch.zeros(n, 1), torch.arange(n) % size)
    fraction = float((1 - matrix.diagonal()[examples.y]).mean())  # what the matrix stands for

    def far(noisy):
        table = torch.zeros(size, size, dtype=F64)
        table.index_put_((examples.y, noisy.y), torch.ones(n, dtype=F64), accumulate=True)
        share = table / table.sum(1, keepdim=True)
        error = (matrix * (1 - matrix) / (n / size)).sqrt()
        return bool(((share - matrix).abs() > 5 * error + 0.01).any())

    assert not far(msif.flip_labels(examples, fraction, 0, transition=matrix).examples)
    assert not far(msif.flip_labels(examples, fraction, 1, transition=matrix.tolist()).examples)
    assert far(msif.flip_labels(examples, fraction, 0).examples), "the control"


def test_uniform_flips_reach_every_example_and_every_other_class_alike():
    examples = msif.Examples(torch.zeros(6, 1), [0, 1, 2, 0, 1, 2])
    drawn = [msif.flip_labels(examples, 0.5, seed) for seed in range(3000)]
    rate = torch.stack([truth for _, truth in drawn]).double().mean(0)
    assert float((rate - 0.5).abs().max()) < 5 * (0.25 / 3000) ** 0.5
    labels = torch.stack([noisy.y for noisy, _ in drawn])
    for wrong in (1, 2):
        share = ((labels - examples.y) % 3 == wrong).double().mean()
        assert abs(float(share) - 0.25) < 5 * (0.1875 / 18_000) ** 0.5


def test_none_is_a_control_and_less_than_one_is_refused(digits):
    train = digits[0][:90]
    for spoil in (
        lambda f: msif.flip_labels(train, f, 0),
        lambda f: msif.duplicate(train, f, 0),
        lambda f: msif.out_of_distribution(train, digits[1], f, 0),
    ):
        as_it_was = spoil(0)
        assert as_it_was.examples.digest() == train.digest() and not as_it_was.truth.any()
        with pytest.raises(ValueError, match=r"fraction=0\.005 of 90 .* less than one.*0\.01111"):
            spoil(0.005)


# ---- Inputs ----


@MANY
@given(labelled(), st.integers(1, 3))
def test_duplicates_say_whose_copies_they_are(case, copies):
    examples, fraction, count, seed = case
    n, before = len(examples), examples.digest()
    both, truth = twice = msif.duplicate(examples, fraction, seed, copies=copies)
    assert examples.digest() == before and both[:n].digest() == before
    assert truth.tolist() == [False] * n + [True] * (copies * count)
    digits = len(str(int(examples.ids.max())))
    place = {int(i): at for at, i in enumerate(examples.ids)}
    found = []
    for at in range(n, len(both)):
        number, of = divmod(int(both.ids[at]), 10**digits)
        found.append((number, of))
        assert torch.equal(both.x[at], examples.x[place[of]])
        assert both.y[at] == examples.y[place[of]]
    originals = {of for _, of in found}
    assert len(originals) == count
    assert set(found) == {(c + 1, of) for c in range(copies) for of in originals}
    assert same(twice, msif.duplicate(examples, fraction, seed, copies=copies))


@MANY
@given(labelled(), st.integers(0, 20))
def test_foreign_inputs_replace_others_under_their_labels(case, spare):
    examples, fraction, count, seed = case
    before = examples.digest()
    values = -1 - torch.arange((count + spare) * 4, dtype=F64)
    other = msif.Examples(values.reshape(-1, 1, 2, 2), [0] * (count + spare))
    mixed, truth = foreign = msif.out_of_distribution(examples, other, fraction, seed)
    assert examples.digest() == before and int(truth.sum()) == count
    assert torch.equal(mixed.x[~truth], examples.x[~truth])
    new = mixed.x[truth].flatten(1)
    assert bool((new < 0).all()) and len(new.unique(dim=0)) == count, "each at most once"
    assert all(bool((row == other.x.flatten(1)).all(1).any()) for row in new), "whole images"
    assert torch.equal(mixed.y, examples.y) and torch.equal(mixed.ids, examples.ids)
    assert same(foreign, msif.out_of_distribution(examples, other, fraction, seed))


def test_other_seeds_spoil_other_examples(digits):
    train, test = digits
    for spoil in (
        lambda seed: msif.flip_labels(train, 0.2, seed),
        lambda seed: msif.duplicate(train, 0.2, seed),
        lambda seed: msif.out_of_distribution(train, test, 0.2, seed),
    ):
        assert same(spoil(3), spoil(3)) and not same(spoil(3), spoil(4))


def test_fields_and_inputs_read_when_needed():
    tokens = {"tokens": [[1, 2], [3, 4], [5, 6]], "mask": [[1, 1], [1, 0], [0, 0]]}
    other = {"mask": [[7, 7], [8, 8], [9, 9]], "tokens": [[-7, -7], [-8, -8], [-9, -9]]}
    examples, foreign = msif.Examples(tokens, [0, 1, 0]), msif.Examples(other, [0, 0, 0])
    mixed, truth = msif.out_of_distribution(examples, foreign, 0.67, 0)
    for at in range(3):
        pair = mixed.x["tokens"][at].tolist(), mixed.x["mask"][at].tolist()
        allowed = foreign if truth[at] else examples
        assert pair in [(r["tokens"].tolist(), r["mask"].tolist()) for r, _ in allowed]
    lazy = msif.Examples.from_dataset([(torch.full((2,), float(i)), i % 2) for i in range(5)])
    both, copies = msif.duplicate(lazy, 0.4, 0)
    assert both.x[[5, 6]][:, 0].tolist() == (both.ids[copies] % 10).tolist()
    assert int((msif.flip_labels(lazy, 0.4, 0).examples.y != lazy.y).sum()) == 2
    for call in (
        lambda: msif.out_of_distribution(lazy, foreign, 0.5, 0),
        lambda: msif.plant(lazy, lazy, label=0),
    ):
        with pytest.raises(TypeError, match="must be in memory"):
            call()


def test_inputs_of_another_form_or_too_few_are_refused():
    train = msif.Examples(torch.zeros(6, 1, 2, 2), [0, 1] * 3)
    flat, double = msif.Examples(torch.eye(6), [0] * 6), train.double()
    for spoil, name in (
        (lambda other: msif.out_of_distribution(train, other, 0.5, 0), "other"),
        (lambda other: msif.plant(train, other, label=0), "group"),
    ):
        with pytest.raises(ValueError, match=rf"{name} has inputs \(\(6,\), .*\(1, 2, 2\)"):
            spoil(flat)
        with pytest.raises(ValueError, match=rf"float64.*float32.*{name}\.to\(dtype\)"):
            spoil(double)
    with pytest.raises(ValueError, match="are 3, but other holds only 2"):
        msif.out_of_distribution(train, train[:2], 0.5, 0)
    with pytest.raises(ValueError, match=r"ids from -1 to 4 .*number the examples from 0"):
        msif.duplicate(msif.Examples(torch.eye(2), [0, 1], [-1, 4]), 0.5, 0)


# ---- Planted groups ----


@MANY
@given(labelled(), st.data())
def test_a_planted_group_is_wrong_in_one_way_and_nothing_else_is(case, data):
    examples, _, count, _ = case
    before = examples.digest()
    group = data.draw(st.permutations(range(len(examples))))[:count]
    label = data.draw(st.sampled_from(examples.classes))
    patch = torch.full((1, 2), -1.0)
    planted, truth = msif.plant(examples, group, label=label, patch=patch)
    assert examples.digest() == before
    assert truth.nonzero()[:, 0].tolist() == sorted(group)
    assert torch.equal(planted.y[~truth], examples.y[~truth])
    assert {planted.classes[y] for y in planted.y[truth]} == {label}
    expected = examples.x.clone()
    expected[truth, :, 1, :] = -1.0
    assert torch.equal(planted.x, expected) and torch.equal(planted.ids, examples.ids)
    by_mask = msif.plant(examples, truth, label=label, patch=patch[None])
    assert by_mask.examples.digest() == planted.digest() and torch.equal(by_mask.truth, truth)


def test_a_planted_group_of_other_examples_is_added():
    train = msif.Examples(torch.zeros(3, 1, 2, 2), [0, 1, 1], [5, 7, 12], classes=("cat", "dog"))
    group = msif.Examples(torch.ones(2, 1, 2, 2), [1, 0], [7, 104], classes=("dog", "cat"))
    own = msif.plant(train, group)
    assert own.examples.y.tolist() == [0, 1, 1, 0, 1], "by the names of the classes"
    assert own.examples.ids.tolist() == [5, 7, 12, 1007, 1104]
    assert own.truth.tolist() == [False] * 3 + [True] * 2
    assert own.examples.x[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1]
    swapped = msif.plant(train, group, label={"cat": "dog", "dog": "cat"})
    assert swapped.examples.y.tolist() == [0, 1, 1, 1, 0]
    foreign = msif.Examples(torch.ones(2, 1, 2, 2), [0, 0], classes=("ship",))
    assert msif.plant(train, foreign, label="dog").examples.y.tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"ship.* not all among \('cat', 'dog'\)"):
        msif.plant(train, foreign)
    patched = msif.plant(train, group, patch=torch.full((1, 1), 9.0)).examples
    assert patched.x[3, 0].tolist() == [[1.0, 1.0], [1.0, 9.0]] and not patched.x[:3].any()
    assert torch.equal(group.x, torch.ones(2, 1, 2, 2)), "the group was changed"


def test_a_group_that_stays_as_it_was_is_refused():
    train = msif.Examples(torch.zeros(3, 1, 2, 2), [0, 1, 1])
    with pytest.raises(ValueError, match="leave 1 of the 2 examples of the group as they are"):
        msif.plant(train, [0, 1], label=1)
    with pytest.raises(ValueError, match="leave 2 of the 2"):
        msif.plant(train, [0, 1])
    with pytest.raises(ValueError, match="leave 1 of the 2"):
        msif.plant(train, [0, 1], label={0: 1})


# ---- What a pipeline makes of it ----


def test_a_pipeline_takes_spoilt_data_and_loss_finds_flips(digits):
    """Ids go through to the scores. The control: copies are not lost on a net, so loss is blind."""
    train = digits[0].select(classes=range(4), n=200)

    def found(spoilt):
        net = msif.mlp(64, hidden=(8,), classes=4).double()
        stage = msif.Stage("digits", net, spoilt.examples, weight_decay=1e-2)
        scores = msif.Loss().fit(msif.Pipeline([stage]).fit(progress=False)).score(digits[1][:1])
        assert torch.equal(scores.ids, spoilt.examples.ids)
        first = scores.values[0].argsort(descending=True)[: int(spoilt.truth.sum())]
        return float(spoilt.truth[first].double().mean())

    assert found(msif.flip_labels(train, 0.15, 0)) > 0.8
    assert found(msif.duplicate(train, 0.15, 0)) < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_what_is_spoilt_has_nothing_to_do_with_other_draws_of_the_seed(seed):
    """Every use of seed 0 draws the same numbers; a random ranking must not find the truth."""
    data = msif.Examples(torch.zeros(400, 1), torch.arange(400) % 4)
    truth = msif.flip_labels(data, 0.2, seed).truth
    drawn = torch.rand(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert 0.4 < msif.detection(drawn, truth, resamples=10).roc_auc < 0.6
