"""What draws random numbers, or writes where it should only read, is refused before training."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from oracles import draw
from torch import nn

import msif_lab as msif
from msif_lab.data.randomness import draws_from

DATA = msif.Examples(draw(24, 5), torch.arange(24) % 3)


def states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()


def unmoved(before):
    now = states()
    return (
        torch.equal(before[0], now[0]) and before[1] == now[1] and bool((before[2] == now[2]).all())
    )


def pipeline_of(model, data=DATA, loss=msif.cross_entropy):
    return msif.Pipeline([msif.Stage("fit", model.double(), data, loss)])


class Net(nn.Module):
    """One hidden layer, and something between it and the head."""

    def __init__(self, between, width=4):
        super().__init__()
        self.a, self.between, self.head = nn.Linear(5, width), between, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.between(torch.tanh(self.a(x))))


class Draws(nn.Module):
    """A layer that draws by a function of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class FunctionalDropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, training=True)


class OwnGenerator(nn.Module):
    """Noise from a generator among its attributes, on one call in a thousand."""

    def __init__(self):
        super().__init__()
        self.sources = {"noise": torch.Generator().manual_seed(1)}

    def forward(self, x):
        chance = torch.rand((), generator=self.sources["noise"])
        return x + float(chance < 1e-3)


class OwnNumpy(nn.Module):
    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, x):
        return x + float(self.source.random() < 1e-9)


# Rates at which two calls nearly always agree, so that values alone would not tell.
RARE = (1e-4, 1e-3, 0.01, 0.5)
RANDOM_NETS = [
    *(torchvision.ops.StochasticDepth(p, mode) for p in RARE for mode in ("row", "batch")),
    *(nn.Sequential(torchvision.ops.StochasticDepth(p, "batch"), nn.Tanh()) for p in RARE),
    *(FunctionalDropout(p) for p in RARE),
    *(nn.Sequential(nn.Linear(4, 4), FunctionalDropout(p)) for p in RARE),
    *(Draws(lambda x, p=p: F.feature_alpha_dropout(x, p, training=True)) for p in RARE),
    *(Draws(lambda x, p=p: F.alpha_dropout(x, p, training=True)) for p in RARE),
    *(Draws(lambda x, p=p: x + float(random.random() < p)) for p in RARE),
    *(Draws(lambda x, p=p: x + float(np.random.rand() < p)) for p in RARE),
    Draws(lambda x: x + (torch.rand(()) < 1e-6).to(x)),
    Draws(lambda x: x * torch.bernoulli(torch.full((len(x), 1), 1 - 1e-6, dtype=x.dtype))),
    Draws(lambda x: F.rrelu(x, training=True)),
    Draws(lambda x: x + 1e-12 * torch.randn_like(x)),
    OwnGenerator(),
    OwnNumpy(random.Random(1)),
    OwnNumpy(np.random.default_rng(1)),
    OwnNumpy(np.random.RandomState(1)),
]


def test_no_random_net_slips_through():
    assert len(RANDOM_NETS) >= 40
    before = states()
    for number, between in enumerate(RANDOM_NETS):
        torch.manual_seed(number)
        model = Net(between)
        seen = states()
        with pytest.raises(msif.UnsupportedModelError, match=r"draws from .*call to call"):
            pipeline_of(model)
        assert unmoved(seen), number
    assert not unmoved(before), "the control: seeding was noticed"


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_values_alone_would_let_them_through(mode):
    """Negative control: two calls of such a layer are equal nearly always."""
    layer = torchvision.ops.StochasticDepth(1e-3, mode)
    x = draw(5, 4)
    torch.manual_seed(0)
    assert all(torch.equal(layer(x), layer(x)) for _ in range(5))


def test_the_layer_and_the_generator_are_named():
    model = Net(nn.Sequential(nn.Tanh(), torchvision.ops.StochasticDepth(0.1, "row")))
    with pytest.raises(msif.UnsupportedModelError) as caught:
        pipeline_of(model)
    for words in ("stage 'fit'", "layer 'between.1' (StochasticDepth)", "torch's CPU generator"):
        assert words in str(caught.value)
    with pytest.raises(msif.UnsupportedModelError, match="own forward pass draws from Python's"):
        pipeline_of(OwnForward())


class OwnForward(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)

    def forward(self, x):
        return super().forward(x) + float(random.random() < 1e-9)


class Cached(nn.Module):
    """Draws a projection at its first call and keeps it, as sound as any constant."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        if not self.cache:
            self.cache["projection"] = torch.randn(4, 4, dtype=x.dtype)
        return x @ self.cache["projection"]


class SelfSeeded(nn.Module):
    """Sets a seed of its own before it draws, so that every call gives the same."""

    def forward(self, x):
        torch.manual_seed(3)
        return x * torch.rand(4, dtype=x.dtype)


SOUND = {
    "dropout off": nn.Dropout(0.5),
    "stochastic depth off": torchvision.ops.StochasticDepth(0.5, "row"),
    "leaky": nn.RReLU(),
    "no rate": FunctionalDropout(0.0),
    "cached": Cached(),
    "own seed": SelfSeeded(),
    "in place": nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_are_taken_and_the_stream_goes_on(name):
    model = Net(SOUND[name])
    model.eval()
    torch.manual_seed(7)
    before = states()
    pipeline = pipeline_of(model).adopt()
    assert unmoved(before) or name == "own seed"  # which moves the state whoever calls it
    assert pipeline.evaluate(DATA[:4]).shape == (4,)


def test_random_losses_and_targets_are_refused():
    def noisy(z, y):
        return msif.cross_entropy(z, y) + float(random.random() < 1e-9)

    before = states()
    with pytest.raises(ValueError, match=r"loss\(outputs, targets\) draws from Python's random"):
        pipeline_of(nn.Linear(5, 3), loss=noisy)
    pipeline = pipeline_of(nn.Linear(5, 3)).adopt()
    with pytest.raises(ValueError, match=r"target\(outputs, targets\) draws from Python's random"):
        msif.GradientDot().fit(pipeline).score(DATA[:3], target=noisy)
    assert len(before) == 3


class Items:
    """A map-style data set with a transform."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return self.transform(torch.full((3, 4), float(i))), i % 2


class Flip:
    """Flips one item in a million, by a generator among its attributes."""

    def __init__(self, source):
        self.source = source

    def __call__(self, x):
        return x.flip(1) if self.source.random() < 1e-6 else x


TRANSFORMS = {
    "torchvision": torchvision.transforms.RandomHorizontalFlip(1e-6),
    "composed": torchvision.transforms.Compose(
        [torchvision.transforms.Pad(1), torchvision.transforms.RandomVerticalFlip(1e-6)]
    ),
    "python": Flip(random),
    "numpy": Flip(np.random),
    "own python": Flip(random.Random(1)),
    "own numpy": Flip(np.random.default_rng(1)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_random_transforms_are_refused(name):
    before = states()
    with pytest.raises(ValueError, match="random augmentation out of the transform"):
        msif.Examples.from_dataset(Items(TRANSFORMS[name]), targets=torch.arange(20) % 2)
    assert unmoved(before)


def test_random_targets_are_refused_unless_they_are_given():
    class Noisy(Items):
        calls = 0

        def __getitem__(self, i):
            self.calls += 1
            return torch.full((3,), float(i)), int(self.calls > 9)

    with pytest.raises(ValueError, match="another target at the second reading"):
        msif.Examples.from_dataset(Noisy(None))
    assert len(msif.Examples.from_dataset(Noisy(None), targets=torch.arange(20) % 2)) == 20


def test_fixed_transforms_are_taken():
    before = states()

    def seeded(x):
        generator = torch.Generator().manual_seed(int(x.sum()))
        return x + torch.rand((), generator=generator)

    def sets_the_seed(x):
        torch.manual_seed(int(x.sum()))
        return x + torch.rand(())

    for transform in (torch.flatten, seeded):
        assert len(msif.Examples.from_dataset(Items(transform))) == 20
    assert unmoved(before)
    assert len(msif.Examples.from_dataset(Items(sets_the_seed))) == 20


def test_another_thread_that_draws_is_not_blamed():
    calls = []

    def once_disturbed():
        calls.append(1)
        if len(calls) == 2:
            torch.rand(1)

    before = states()
    assert draws_from(once_disturbed) == []
    assert draws_from(lambda: torch.rand(1)) == ["torch's CPU generator"]
    assert unmoved(before)


class Writes(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.a, self.write = nn.Linear(5, 3), write

    def forward(self, x):
        self.write(self, x)
        return self.a(x)


def test_calls_that_write_are_refused():
    data = msif.Examples(DATA.x.clone(), DATA.y)
    for write, words in [
        (lambda m, x: x.sub_(1.0), "writes into its inputs"),
        (lambda m, x: m.a.weight.data.mul_(0.9), "writes into its parameter 'a.weight'"),
    ]:
        model = Writes(write)
        weight = model.a.weight.detach().clone().double()
        with pytest.raises(msif.UnsupportedModelError, match=words):
            pipeline_of(model, data)
        assert torch.equal(model.a.weight, weight) and torch.equal(data.x, DATA.x)

    def halves(z, y):
        return msif.cross_entropy(z.mul_(0.5), y)

    with pytest.raises(ValueError, match="writes into the outputs or targets"):
        pipeline_of(nn.Linear(5, 3), data, loss=halves)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_draws_on_the_gpu_are_seen():
    data = DATA.to("cuda")
    model = Net(FunctionalDropout(1e-4)).cuda()
    before = torch.cuda.get_rng_state()
    with pytest.raises(msif.UnsupportedModelError, match=r"torch's generator of cuda:0"):
        pipeline_of(model, data)
    assert torch.equal(before, torch.cuda.get_rng_state())
