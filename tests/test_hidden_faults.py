"""Faults that hide: aside of the gradient, in a copy, in rare rows, behind a head of zeros."""

import contextlib
import pickle
import threading

import pytest
import torch
from oracles import F64, draw, relative_error
from torch import nn

import msif_lab as msif
from msif_lab.data.examples import unequal

RECIPE = msif.SGD(0.1, epochs=2, batch_size=6)


def seeded(make, dtype=F64, seed=0):
    torch.manual_seed(seed)
    return make().to(dtype)


def labelled(n=12, seed=0, dtype=F64):
    return msif.Examples(draw(n, 4, seed=seed), torch.arange(n) % 3).to(dtype)


def one_stage(model, data=None, loss=msif.cross_entropy):
    dtype = next(model.parameters()).dtype
    data = labelled(dtype=dtype) if data is None else data
    return msif.Pipeline([msif.Stage("fit", model, data, loss, 0.05, recipe=RECIPE)])


# ---- Cut off from the stage before ----


class Probed(nn.Module):
    """A body whose features may be cut off from the graph, as linear probes do."""

    def __init__(self, cut=None):
        super().__init__()
        self.body, self.head, self.cut = nn.Linear(4, 5), nn.Linear(5, 3), cut

    def forward(self, x):
        with torch.no_grad() if self.cut == "no_grad" else contextlib.nullcontext():
            features = torch.tanh(self.body(x))
        return self.head(features.detach() if self.cut == "detach" else features)


def two_stages(cut, link):
    first, second = seeded(Probed), seeded(lambda: Probed(cut), seed=1)
    stages = [
        msif.Stage("pre", first, labelled(), weight_decay=0.05, recipe=RECIPE),
        msif.Stage("fine", second, labelled(seed=1), weight_decay=0.05, link=link, recipe=RECIPE),
    ]
    return msif.Pipeline(stages)


LINKS = [msif.Frozen("body."), msif.Proximal(0.3, "body."), msif.WarmStart("body.")]


@pytest.mark.parametrize("cut", ["no_grad", "detach"])
@pytest.mark.parametrize("link", LINKS, ids=["frozen", "proximal", "warm"])
def test_a_backbone_cut_off_from_the_stage_that_trained_it_is_refused(link, cut):
    """All scores of that stage would be zero."""
    words = r"depends on 'body\.weight', 'body\.bias', taken over .* no gradient .*no_grad"
    with pytest.raises(msif.UnsupportedModelError, match=words):
        two_stages(cut, link)
    two_stages(None, link)


def test_a_backbone_that_nobody_has_trained_may_be_cut_off():
    model = seeded(lambda: Probed("no_grad"))
    model.body.requires_grad_(False)
    pipeline = one_stage(model).fit(progress=False)
    scores = msif.UnrolledInfluence().fit(pipeline, progress=False).score(labelled(2, 5))
    weights = torch.ones(2, 12, dtype=F64)
    weights[:, 0] += 1e-4 * torch.tensor([1.0, -1.0], dtype=F64)
    q = pipeline.retrain(weights, progress=False).evaluate(labelled(2, 5))
    assert relative_error(scores.values[:, 0], (q[:, 0] - q[:, 1]) / 2e-4) < 1e-6


# ---- Checked in float64, whatever the model ----


class Faulty(nn.Module):
    """A small stop-gradient, in a model that cannot be copied."""

    def __init__(self, keep):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.keep = keep

    def forward(self, x):
        z = torch.tanh(self.layer(x))
        self.kept = z if self.keep == "activations" else None
        return self.head(z + 0.2 * z.detach())


def uncopied(keep):
    model = Faulty(keep)
    if keep == "lock":
        model.lock = threading.Lock()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("keep", ["lock", "activations"])
def test_a_model_that_cannot_be_copied_is_checked_as_precisely(keep, dtype):
    model = seeded(lambda: uncopied(keep), dtype)
    with pytest.raises(msif.UnsupportedModelError, match="not the derivative of the loss"):
        one_stage(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("width", [5, 300])
def test_a_small_layer_of_a_wide_net_is_not_overlooked(width, dtype):
    """PyTorch's second derivative of weight_norm is wrong; its hooks cannot be copied."""

    def make():
        last = torch.nn.utils.weight_norm(nn.Linear(3, 3))
        hidden = [nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(*hidden, nn.Linear(width, 3), last)

    with pytest.warns(msif.UnsupportedModelWarning, match=r"those of layer '5' .* are wrong by"):
        one_stage(seeded(make, dtype))
    sound = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3), nn.Linear(3, 3))
    one_stage(sound.to(dtype)).adopt().curvature(0)


class Ids(nn.Module):
    def __init__(self, keep=1.0):
        super().__init__()
        self.words, self.head, self.keep = nn.Embedding(9, 4), nn.Linear(4, 3), keep

    def forward(self, ids):
        z = torch.tanh(self.words(ids).mean(1))
        return self.head(z + self.keep * z.detach())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_call_that_closes_over_its_model_is_checked(dtype):
    ids = torch.randint(0, 9, (12, 6), generator=torch.Generator().manual_seed(0))
    data = msif.Examples(ids, torch.arange(12) % 3)
    net = seeded(Ids, dtype)
    with pytest.raises(msif.UnsupportedModelError, match="not the derivative of the loss"):
        one_stage(msif.wrap(net, lambda _, batch: net(batch)), data)
    fine = seeded(lambda: Ids(0.0), dtype)
    one_stage(msif.wrap(fine, lambda _, batch: fine(batch)), data)


def test_a_loss_that_sees_only_detached_outputs_is_refused():
    outside = torch.ones(3, dtype=F64, requires_grad=True)
    with pytest.raises(msif.UnsupportedModelError, match="not the derivative of the loss"):
        one_stage(seeded(Probed), loss=lambda z, y: (z.detach() * outside).square().sum(1))


# ---- Rare rows ----


def test_rare_rows_are_among_those_that_are_checked():
    tokens = torch.randint(1, 6, (640, 7), generator=torch.Generator().manual_seed(0))
    tokens[333, 2] = 9
    tokens[334, 1] = 3
    data = msif.Examples(tokens, torch.zeros(640).long())
    assert 333 in unequal(data)
    tokens[tokens == 0] = 1
    tokens[77, 5] = 0
    assert 77 in unequal(msif.Examples(tokens, torch.zeros(640).long()))
    tokens[tokens == 4] = 3
    tokens[55, 0] = 4
    data = msif.Examples(tokens, torch.zeros(640).long())
    assert 55 in unequal(data, holding=[4])
    assert 55 not in unequal(data)
    blank = torch.zeros(640, 4)
    blank[123] = 1.0
    assert 123 in unequal(msif.Examples(blank, torch.zeros(640).long()))


@pytest.mark.parametrize("rare", [3, 601])
def test_a_rare_padding_row_is_seen(rare):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4, padding_idx=5), nn.Linear(4, 3)

        def forward(self, ids):
            return self.head(torch.tanh(self.words(ids)).mean(1))

    tokens = torch.randint(0, 5, (640, 6), generator=torch.Generator().manual_seed(0))
    tokens[rare, 2:] = 5
    model = seeded(Words)
    with torch.no_grad():
        model.words.weight[5] = 1.0
    pipeline = one_stage(model, msif.Examples(tokens, torch.arange(640) % 3)).adopt()
    o, full = pipeline.objective(0), pipeline.trained()[0]
    v = draw(o.size, 3, seed=2)
    rows = torch.cat([g for _, g in msif.per_example_gradients(o, full)])
    assert relative_error(msif.example_products(o, full, v)[:, rare], (rows @ v)[rare]) < 1e-9


def test_a_token_that_no_embedding_has_is_refused_before_training():
    ids = torch.zeros(640, 6).long()
    ids[401, 3] = 99
    with pytest.raises(ValueError, match=r"holds 0 \.\. 99, the embedding has the rows 0 \.\. 8"):
        one_stage(seeded(lambda: Ids(0.0)), msif.Examples(ids, torch.arange(640) % 3))


# ---- Small numbers ----


class Mixing(nn.Module):
    def forward(self, x):
        return x - 0.5 * x.mean(0)


def test_a_head_of_zeros_hides_no_mixing():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mixing(), nn.Linear(5, 3)))
    nn.init.zeros_(model[3].weight)
    with pytest.raises(msif.UnsupportedModelError, match="with the batch around an example"):
        one_stage(model)
    model[2] = nn.Identity()
    one_stage(model)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_small_losses_hide_no_mixing(dtype):
    data = msif.Examples(draw(12, 4), 1e-3 * draw(12, seed=1)).to(dtype)
    model = seeded(lambda: nn.Linear(4, 1), dtype)
    with torch.no_grad():
        model.weight.mul_(1e-3)
        model.bias.zero_()
    mixing = {
        "broadcast": lambda z, y: ((z - y) ** 2).mean(1),
        "centred": lambda z, y: ((z[:, 0] - y) - 0.5 * (z[:, 0] - y).mean()) ** 2,
    }
    for loss in mixing.values():
        with pytest.raises(ValueError, match="mixes the examples"):
            one_stage(model, data, loss)
    one_stage(model, data, lambda z, y: (z[:, 0] - y) ** 2)


# ---- No false alarms, nothing kept ----


class LazyMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("best", torch.tensor(float("nan")))

    def forward(self, x):
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(4, dtype=x.dtype))
        return self.layer(x * self.mask)


class Remembering(nn.Module):
    """Keeps its last states, as the LSTM of many tutorials does."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        z, self.hidden = self.cells(x.view(-1, 2, 2))
        return self.head(z[:, -1])


@pytest.mark.parametrize("kind", [LazyMask, Remembering])
def test_what_models_keep_is_no_obstacle(kind):
    pipeline = one_stage(seeded(kind)).fit(progress=False).fit(progress=False)
    assert msif.GradientDot().fit(pipeline).score(labelled(2, 5)).values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_checked_pipeline_can_be_pickled(dtype):
    pipeline = one_stage(seeded(lambda: nn.Linear(4, 3), dtype)).fit(progress=False)
    again = pickle.loads(pickle.dumps(pipeline))
    assert torch.equal(again.trained()[0], pipeline.trained()[0])


def test_a_target_is_tried_on_the_queries_and_not_on_the_stage_s_data():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.scale = nn.Embedding(9, 9), nn.Parameter(torch.ones(9))

        def forward(self, ids):
            return self.words(ids) * self.scale

    ids = torch.randint(0, 9, (12, 5), generator=torch.Generator().manual_seed(0))
    data = msif.Examples(ids, ids)

    def loss(z, y):
        return nn.functional.cross_entropy(z.mT, y, reduction="none").mean(1)

    pipeline = one_stage(seeded(Steps), data, loss).fit(progress=False)
    longer = torch.randint(0, 9, (3, 8), generator=torch.Generator().manual_seed(1))
    queries = msif.Examples(longer, longer)
    scores = msif.GradientDot().fit(pipeline).score(queries, target=lambda z, y: z[:, 7, 0])
    assert scores.values.abs().max() > 0


TARGETS = {
    "cut in part": lambda z, y: z[:, 0] * z.detach()[:, 1],
    "through": lambda z, y: z[:, 0] + (z.sign() - z).detach().sum(1) * z[:, 1],
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_whose_gradient_is_no_derivative_is_refused(target):
    pipeline = one_stage(seeded(Probed)).fit(progress=False)
    scored, queries = msif.GradientDot().fit(pipeline), labelled(3, 5)
    with pytest.raises(ValueError, match=r"its gradient is not its derivative, off by"):
        scored.score(queries, target=TARGETS[target])
    with pytest.raises(ValueError, match=r"aggregate=.*: its gradient is not its derivative"):
        scored.score(queries, aggregate=lambda values: (values * values.detach()).sum())
    smooth = [lambda z, y: z[:, 0] * z[:, 1], lambda z, y: (1 - z[:, 0]).relu() ** 2]
    for function in smooth:
        assert scored.score(queries, target=function).values.isfinite().all()


def test_generators_that_a_function_reads_from_outside_are_found():
    generator = torch.Generator().manual_seed(0)

    def noisy(z, y):
        return msif.cross_entropy(z, y) + torch.rand(len(y), generator=generator)

    with pytest.raises(ValueError, match="Generator of its own"):
        one_stage(seeded(Probed), loss=noisy)


def test_inference_mode_and_other_stages_are_refused_in_words():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode"):
        one_stage(seeded(Probed))
    pipeline = one_stage(seeded(Probed)).fit(progress=False)
    scored = msif.GradientDot().fit(pipeline)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode"):
        scored.score(labelled(2, 5))
    pipeline.stages.append(pipeline.stages[0])
    with pytest.raises(ValueError, match="make a new one"):
        pipeline.fit(progress=False)
