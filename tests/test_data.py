"""`Examples`, the bundled digits and the model builders: identity, order and seeds are kept."""

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import msif_lab as msif


def toy(n=30, classes=3):
    """Examples whose input tells their position, in no class order."""
    y = torch.arange(n) * 7 % classes
    return msif.Examples(torch.arange(2.0 * n).reshape(n, 2), y, ids=torch.arange(n) + 100)


# ---- Examples ----


def test_indexing_keeps_inputs_labels_and_ids_together():
    data = toy()
    for index in (
        slice(2, 20, 3),
        slice(None, None, None),
        slice(-4, None),
        [5, 3, 28],
        [-1, 0],
        (4, 5),
        torch.tensor([7, 2]),
        torch.arange(30) % 4 == 1,
        [i % 5 == 0 for i in range(30)],
    ):
        part = data[index]
        positions = torch.arange(30)[list(index) if isinstance(index, tuple) else index]
        assert len(part) == len(positions) and part.classes == data.classes, index
        for name in ("x", "y", "ids"):
            assert torch.equal(getattr(part, name), getattr(data, name)[positions]), (index, name)


def test_one_position_of_any_integer_type_gives_the_pair():
    data = toy()
    for position in (0, 17, -1, torch.tensor(3), numpy.int64(3)):
        x, y = data[position]
        assert torch.equal(x, data.x[position]) and int(y) == int(data.y[position]), position


def test_a_data_loader_reads_every_example_once_and_in_order():
    data = toy()
    batches = list(DataLoader(data, batch_size=8))
    assert [len(y) for _, y in batches] == [8, 8, 8, 6]
    assert torch.equal(torch.cat([x for x, _ in batches]), data.x)
    assert torch.equal(torch.cat([y for _, y in batches]), data.y)


def test_iteration_ends():
    assert [int(y) for _, y in toy(5)] == toy(5).y.tolist()


def test_lists_and_arrays_become_tensors_with_default_ids_and_classes():
    data = msif.Examples(numpy.ones((3, 2)), [1, 0, 1])
    assert data.x.dtype == torch.float64
    assert data.ids.tolist() == [0, 1, 2] and data.classes == (0, 1)


def test_floating_targets_are_no_labels():
    assert toy().has_labels
    for y in (torch.ones(3), torch.ones(3, 2)):
        data = msif.Examples(torch.ones(3, 2), y)
        assert not data.has_labels and data.classes is None


def test_select_reindexes_labels_in_the_given_order():
    data = toy()
    for classes in ((2, 0), (1,), None, (2, 1, 0)):
        part = data.select(classes=classes)
        wanted = classes or (0, 1, 2)
        assert part.classes == wanted and part.counts() == {c: 10 for c in wanted}
        positions = part.ids - 100
        assert torch.equal(part.x, data.x[positions])
        assert [wanted[y] for y in part.y.tolist()] == data.y[positions].tolist(), classes
        assert part.ids.tolist() == sorted(part.ids.tolist()), "the order of the data is kept"


def test_select_is_stratified_within_one_example():
    for n in (3, 7, 11, 30):
        counts = list(toy().select(n=n).counts().values())
        assert sum(counts) == n and max(counts) - min(counts) <= 1, counts
        assert counts == sorted(counts, reverse=True), "the first classes get the remainder"


def test_select_of_unequal_classes_takes_equal_numbers():
    data = msif.Examples(torch.randn(20, 1), [0] * 15 + [1] * 5)
    assert data.select(n=9).counts() == {0: 5, 1: 4}
    assert data.select().counts() == {0: 15, 1: 5}


def test_seeds_are_reproducible_and_differ():
    first, again, other = (toy().select(n=9, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.x, again.x)
    assert not torch.equal(first.ids, other.ids)


def test_select_of_a_selection_keeps_the_original_ids_and_names():
    part = toy().select(classes=(2, 0), n=12).select(classes=(0,), n=4)
    assert part.classes == (0,) and part.y.tolist() == [0] * 4
    assert all(int(toy().y[i - 100]) == 0 for i in part.ids.tolist())


def test_named_classes_follow_their_examples():
    data = msif.Examples(torch.randn(6, 1), [0, 1, 2] * 2, classes=("cat", "dog", "owl"))
    part = data.select(classes=("owl", "cat"))
    assert part.counts() == {"owl": 2, "cat": 2}
    assert part.ids.tolist() == [0, 2, 3, 5] and part.y.tolist() == [1, 0, 1, 0]


def test_nothing_modifies_the_data_or_the_global_generator():
    data = toy()
    before = [t.clone() for t in (data.x, data.y, data.ids)]
    state = torch.random.get_rng_state()
    part = data.select(classes=(2, 1), n=10, seed=1)
    part.x.zero_()
    part.y.zero_()
    data[[1, 2]].x.zero_()
    data.to(torch.float64).x.zero_()
    assert all(map(torch.equal, (data.x, data.y, data.ids), before))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_conversion_casts_inputs_and_floating_targets_but_not_labels():
    labelled, regression = toy().double(), msif.Examples(torch.ones(2, 1), torch.ones(2)).double()
    assert (labelled.x.dtype, labelled.y.dtype) == (torch.float64, torch.int64)
    assert (regression.x.dtype, regression.y.dtype) == (torch.float64, torch.float64)
    assert torch.equal(labelled.ids, toy().ids) and labelled.classes == toy().classes


def test_examples_show_themselves():
    x = torch.ones(2, 1)
    targets = {"numbers": torch.ones(2), "bool": torch.tensor([True, False])}
    shown = {case: msif.Examples(x, y) for case, y in targets.items()} | {"labels": toy()}
    for case, data in shown.items():
        page = data._repr_html_()
        assert str(len(data)) in repr(data) and str(len(data)) in page, case
        assert page.startswith("<"), case


# ---- Digits ----


def test_digits_are_all_there_and_split_once(digits):
    train, test = digits
    assert (len(train), len(test)) == (1201, 596)
    assert sorted(train.ids.tolist() + test.ids.tolist()) == list(range(1797))
    assert train.x.shape[1:] == (1, 8, 8) and train.classes == tuple(range(10))


def test_the_docstring_of_digits_counts_right(digits):
    assert all(f"{len(part):,} " in msif.load_digits.__doc__ for part in digits)


def test_digits_are_scaled_to_unit_range_and_match_scikit_learn(digits):
    from sklearn.datasets import load_digits

    raw = load_digits()
    for part in digits:
        assert float(part.x.min()) == 0.0 and float(part.x.max()) == 1.0
        assert torch.equal(part.x[:, 0] * 16, torch.as_tensor(raw.images)[part.ids])
        assert torch.equal(part.y, torch.as_tensor(raw.target)[part.ids])


def test_digits_are_stratified(digits):
    train, test = (part.counts() for part in digits)
    assert all(test[c] == (train[c] + test[c]) // 3 for c in range(10))


def test_digits_are_the_same_in_every_call_whatever_the_generator(digits):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = msif.load_digits(dtype=torch.float64)
    assert torch.equal(state, torch.random.get_rng_state())
    for one, other in zip(digits, again, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.ids, other.ids)
    assert msif.load_digits()[0].x.dtype == torch.get_default_dtype()


def test_a_selection_for_pretraining_and_one_for_finetuning_share_no_digit(digits):
    pre = digits[0].select(classes=(0, 1, 2, 3), n=400)
    fine = digits[0].select(classes=(4, 5, 6, 7, 8, 9), n=200)
    assert pre.counts() == dict.fromkeys(range(4), 100)
    assert sorted(fine.counts().values()) == [33] * 4 + [34] * 2
    assert fine.classes == (4, 5, 6, 7, 8, 9) and int(fine.y.max()) == 5
    assert not set(pre.ids.tolist()) & set(fine.ids.tolist())


# ---- Models ----


BUILDERS = {
    "mlp": lambda **s: msif.mlp(12, hidden=(5, 4), classes=3, **s),
    "convnet": lambda **s: msif.convnet((3, 4, 4), channels=(2,), width=4, classes=3, **s),
    "softmax_regression": lambda **s: msif.softmax_regression(12, 3, **s),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_builders_draw_from_their_seed_alone(build):
    state = torch.random.get_rng_state()
    first = build(seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    again, other = build(seed=1), build(seed=2)
    pairs = [list(m.parameters()) for m in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(pairs[0], pairs[2], strict=True))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_zero_head_changes_the_head_alone(build):
    usual, zero = build(), build(zero_head=True)
    for (name, a), (_, b) in zip(usual.named_parameters(), zero.named_parameters(), strict=True):
        assert not b.any() and a.any() if name.startswith("head.") else torch.equal(a, b)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_models_are_a_head_on_an_embedding(build):
    side = 4 if build is BUILDERS["convnet"] else 2
    model, x = build(), torch.randn(5, 3, side, side)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} <= {"embedding", "head"}
    assert model(x).shape == (5, 3) and torch.equal(model(x), model.head(model.embedding(x)))


def test_parameter_counts():
    for model, count in (
        (msif.convnet((1, 14, 14), classes=4), 6020),
        (msif.convnet((3, 16, 16), classes=2), 9682),
        (msif.convnet((1, 8, 8), channels=(2,), width=4, classes=3), 20 + 132 + 15),
        (msif.convnet((1, 14, 14), norm_groups=4, classes=4), 6020 + 2 * (8 + 16)),
        (msif.mlp(64, hidden=(16,), classes=4), 64 * 16 + 16 + 16 * 4 + 4),
        (msif.mlp(5, hidden=(), classes=2), 12),
        (msif.softmax_regression(64, 10), 650),
    ):
        assert sum(p.numel() for p in model.parameters()) == count, model


def test_activations_can_be_exchanged():
    kinds = {type(m) for m in msif.mlp(4, (3,), classes=2, activation=nn.SiLU).modules()}
    assert nn.SiLU in kinds and nn.Tanh not in kinds


@pytest.mark.parametrize(
    "cases",
    [
        {
            "in_features=0 | positive whole number": lambda: msif.mlp(0, classes=2),
            "hidden[1]=-1 | positive whole number": lambda: msif.mlp(4, (3, -1), classes=2),
            "classes=2.0 | positive whole number": lambda: msif.mlp(4, classes=2.0),
            "classes=0 | positive whole number": lambda: msif.softmax_regression(4, 0),
            "channels[0]=0 | positive": lambda: msif.convnet((1, 8, 8), channels=(0,), classes=2),
            "width=0 | positive": lambda: msif.convnet((1, 8, 8), width=0, classes=2),
        },
        {"hidden=16": lambda: msif.mlp(4, hidden=16, classes=2)},
        {
            "in_shape=(8, 8) | (channels, height, width)": lambda: msif.convnet((8, 8), classes=2),
            "in_shape=(0, 8, 8)": lambda: msif.convnet((0, 8, 8), classes=2),
        },
        {
            "in_shape=(1, 3, 8) | at least 4 | 2 poolings": lambda: msif.convnet(
                (1, 3, 8), classes=2
            )
        },
        {
            "norm_groups=3 | channels=(8, 16)": lambda: msif.convnet(
                (1, 8, 8), norm_groups=3, classes=2
            )
        },
    ],
    ids=["sizes", "hidden", "in_shape", "poolings", "norm_groups"],
)
def test_builders_refuse(cases):
    for says, build in cases.items():
        with pytest.raises((ValueError, TypeError)) as caught:
            build()
        assert all(piece in str(caught.value) for piece in says.split(" | ")), str(caught.value)


def test_a_resnet_with_a_new_head_shares_everything_else():
    from torchvision.models import resnet18

    first, second = (resnet18(num_classes=c).eval() for c in (3, 2))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0, 1])
    link = msif.Frozen(shared=lambda name: not name.startswith("fc."))
    stages = [
        msif.Stage("one", first, msif.Examples(x, y)),
        msif.Stage("two", second, msif.Examples(x, y), link=link),
    ]
    prepared = msif.Pipeline(stages).functional(1)
    names = [name for name, _ in second.named_parameters()]
    assert prepared.frozen == [n for n in names if n not in ("fc.weight", "fc.bias")]
    assert prepared.coupled == []
    assert prepared.objective.trained_names == ["fc.weight", "fc.bias"]
    assert prepared.objective.size == 2 * 512 + 2


def test_a_resnet_in_train_mode_is_refused_with_the_layer():
    from torchvision.models import resnet18

    data = msif.Examples(torch.zeros(2, 3, 32, 32), [0, 1])
    with pytest.raises(
        msif.UnsupportedModelError, match=r"layer 'bn1' \(BatchNorm2d\).*model\.eval\(\)"
    ):
        msif.Pipeline([msif.Stage("one", resnet18(num_classes=2), data)])


def test_other_labels_leave_the_rest(digits):
    train = digits[0].select(classes=(3, 5, 8), n=30)
    before = train.digest()
    new = train.with_labels(2 - train.y)
    assert new.x.data_ptr() == train.x.data_ptr(), "no copy of the inputs"
    assert (
        torch.equal(new.x, train.x) and torch.equal(new.ids, train.ids) and new.classes == (3, 5, 8)
    )
    assert torch.equal(new.y, 2 - train.y) and train.digest() == before
    assert new.named == train.named and not msif.Examples(train.x, train.y).with_labels(new.y).named
    pets = msif.Examples([[0.0], [1.0]], ["cat", "dog"])
    assert pets.with_labels(["dog", "dog"]).y.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"owl.*classes=\('cat', 'dog'\)"):
        pets.with_labels(["dog", "owl"])
    with pytest.raises(ValueError, match="needs class labels before and after"):
        msif.Examples([[0.0], [1.0]], [0.5, 1.5]).with_labels([0, 1])


def test_other_labels_read_no_inputs():
    lazy = msif.Examples.from_dataset([(torch.ones(2), 0), (torch.zeros(2), 1)])
    assert lazy.with_labels([1, 1]).x is lazy.x
