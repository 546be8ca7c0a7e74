"""What millions of parameters need: derivatives by the trained part only, and bounded memory."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from oracles import (
    F64,
    LINKS,
    Oracle,
    close,
    draw,
    implicit_scores,
    library_gradients,
    random_pipeline,
    random_queries,
)
from torch import nn

import msif_lab as msif
from msif_lab import memory
from msif_lab.curvature.derivatives import cross_products
from msif_lab.curvature.layers import Scale, find_layers
from msif_lab.influence import implicit
from msif_lab.memory import working_bytes
from msif_lab.objective import Objective, Places


def test_places_are_positions():
    """Spans in any order, touching or empty, against a table of positions."""
    for spans in ([range(2, 5), range(5, 7), range(0, 1)], [range(3, 9)], [range(4, 4)], []):
        places, flat = Places(spans), draw(3, 9)
        table = torch.tensor([i for span in spans for i in span], dtype=torch.int64)
        values = draw(3, len(table), seed=1)
        assert torch.equal(places.table(flat.device), table)
        assert places.size == len(table)
        assert torch.equal(places.take(flat), flat[:, table])
        assert torch.equal(places.put(flat.clone(), values), flat.index_copy(1, table, values))
        assert torch.equal(places.add(flat.clone(), values), flat.index_add(1, table, values))
        assert torch.equal(
            places.add(flat.clone(), 2.0), flat.index_add(1, table, torch.full_like(values, 2.0))
        )
    assert len(Places([range(0, 3), range(3, 8)]).spans) == 1


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_a_frozen_stage_is_differentiated_by_its_head_alone(kind):
    """Every derivative by T alone, against the rows T of the derivative by all D parameters."""
    pipeline = random_pipeline(kind, link=msif.Frozen(), fit=False)
    p, o = pipeline.functional(1), pipeline.objective(1)
    full, v = o.layout.flatten(o.model) + 0.3 * draw(o.layout.size), draw(o.size, 4)
    padded = torch.zeros(o.layout.size, 4, dtype=F64).index_copy(0, o.trained_positions, v)
    for operator in (msif.Hessian, msif.GGN):
        close(
            operator(o, full, ridge=False) @ v,
            (operator(o, full, every=True) @ padded)[o.trained_positions],
        )
    own = library_gradients(o, full, every=True)[:, o.trained_positions]
    close(library_gradients(o, full), own)
    for mode in ("forward", "gradients", "layers"):
        close(msif.example_products(o, full, v, mode=mode), (own @ v).T, case=mode)
    weights = draw(len(o.data), seed=2).abs()
    mixed = msif.Hessian(o, full, weights, every=True) @ padded
    close(cross_products(o, full, p.frozen, v.T, weights), p.here["frozen"].take(mixed.T))
    leaf = full.clone().requires_grad_()
    named = o.parameters(leaf[o.trained_positions], leaf)
    backbone = torch.autograd.grad(o.losses(named, o.data.x, o.data.y).sum(), leaf)[0]
    assert float(p.here["frozen"].take(backbone).abs().max()) == 0


def test_nothing_is_pulled_back_to_what_nobody_trained(monkeypatch):
    """No product is spent on parameters that are shared by a Proximal link but never trained."""
    pipeline = random_pipeline("mlp", link=LINKS["proximal"], fit=False)
    for stage in pipeline.stages:
        next(stage.model.parameters()).requires_grad_(False)
    first = next(pipeline.stages[0].model.named_parameters())[0]
    state = {first: pipeline.stages[0].model.get_parameter(first).detach()}
    pipeline.stages[1].model.load_state_dict(state, strict=False)
    pipeline = msif.Pipeline(pipeline.stages).fit(progress=False)
    assert pipeline.functional(1).frozen == [first]
    assert first not in pipeline.functional(1).live
    monkeypatch.setattr(implicit, "cross_products", lambda *_: pytest.fail("worked for nothing"))
    scores = implicit_scores(pipeline, random_queries(pipeline), curvature="ggn")
    assert float(scores.abs().max()) > 0


class Watched:
    """Conjugate gradients that note how many columns they are given at once."""

    def __init__(self):
        self.solver, self.widths = msif.ConjugateGradient(1e-12), []

    def prepare(self, operator):
        prepared, widths = self.solver.prepare(operator), self.widths

        class Noting:
            def solve(self, columns):
                widths.append(columns.shape[1])
                return prepared.solve(columns)

        return Noting()


@pytest.mark.parametrize("link", LINKS)
def test_queries_in_groups_score_the_same(link, monkeypatch):
    pipeline = random_pipeline("mlp", link=LINKS[link])
    queries = random_queries(pipeline, n=7)
    size = max(pipeline.objective(k).layout.size for k in (0, 1))
    for settings in ({}, {"leave_one_out": True}):
        solver = Watched()
        attributor = msif.ImplicitInfluence(solver, curvature="ggn", **settings).fit(pipeline)
        expected, report = attributor.score(queries).values, attributor.report_["stage0"]
        solver.widths.clear()
        # 3 queries of 10 vectors each: 6 that the solver holds and 4 around it
        monkeypatch.setattr(implicit, "SOLVING_BYTES", 3 * 10 * size * 8)
        close(attributor.score(queries).values, expected, case=settings)
        assert solver.widths == [3, 3, 3, 3, 1, 1], "both stages, group by group"
        grouped = attributor.report_["stage0"]
        # columns stop at the same step, up to rounding
        assert grouped.products >= report.products - 7
        assert len(grouped.residuals) == len(report.residuals) == 7
        assert bool(grouped.converged.all())
        monkeypatch.undo()
    attributor = msif.ImplicitInfluence(curvature="ggn").fit(pipeline)
    monkeypatch.setattr(implicit, "SOLVING_BYTES", 1)
    close(
        attributor.score(queries, top=2).lowest.values,
        attributor.score(queries).values.sort(1).values[:, :2],
    )


def test_working_memory(monkeypatch):
    cpu = torch.device("cpu")
    assert working_bytes(cpu) == 32 * 10**6
    assert working_bytes(cpu, example=10**7) == 160 * 10**6  # 16 of them
    assert working_bytes(cpu, example=10**9) == 256 * 10**6
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * 10**9)
    assert working_bytes(torch.device("cuda")) == 10 * 10**9
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 28 * 10**9)
    assert working_bytes(torch.device("cuda")) == 3 * 10**9  # half of what is left
    monkeypatch.setenv("MSIF_WORKING_BYTES", "2GB")
    assert working_bytes(cpu) == 2 * 10**9
    monkeypatch.setattr(memory, "WORKING_BYTES", 123)
    assert working_bytes(cpu, 10**9) == 123
    monkeypatch.undo()
    monkeypatch.setenv("MSIF_WORKING_BYTES", "much")
    with pytest.raises(ValueError, match="MSIF_WORKING_BYTES='much'"):
        working_bytes(cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_chunk_takes_about_the_working_memory_however_many_columns(kind, dtype, tmp_path):
    x = draw(160, 1, 28, 28, dtype=dtype)
    net = msif.convnet((1, 28, 28), (8, 16), 16, classes=4).to(dtype)
    stage = msif.Stage("images", net, msif.Examples(x, torch.arange(160) % 4, classes=range(4)))
    operator = msif.Pipeline([stage]).adopt().curvature(0, kind)
    for columns in (1, 5, 20):
        vectors = torch.ones(operator.shape[0], columns, dtype=dtype)
        operator @ vectors  # what is made only once does not count
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            operator @ vectors
        profile.export_chrome_trace(str(tmp_path / "trace"))
        events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
        events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
        held = peak = 0
        for event in events:
            held += event["args"]["Bytes"]
            peak = max(peak, held)
        assert 0.2 * 32e6 < peak < 2 * 32e6, columns


def test_the_core_does_without_the_compiler():
    """No call imports torch._dynamo: 110 MB that a lesson on Binder cannot spare.

    `torch.func.grad` and `torch.func.vjp` would import it at first use.
    """
    code = """
        import sys, torch, msif_lab as msif
        train, _ = msif.load_digits(dtype=torch.float64)
        old, new = train.select(range(4), n=80), train.select(range(4, 10), n=60)
        shared = msif.ConjugateGradient(preconditioner=msif.LowRank(10), shares=(0.3,))
        settings = ({"leave_one_out": True}, {"curvature": "ggn"},
                    {"solver": shared, "damping": 1.0})
        for link in (msif.Frozen(), msif.Proximal(0.1)):
            nets = [msif.mlp(64, hidden=(4,), classes=c).double() for c in (4, 6)]
            stages = [msif.Stage("a", nets[0], old, weight_decay=1e-2),
                      msif.Stage("b", nets[1], new, weight_decay=1e-2, link=link)]
            pipeline = msif.Pipeline(stages).fit(progress=False)
            for given in settings:
                msif.ImplicitInfluence(**given).fit(pipeline).score(new[:5])
            msif.removal_effects(pipeline, new[:5], [[0], [1]], progress=False)
            for stage in stages:
                stage.recipe = msif.SGD(lr=0.1, epochs=2)
            pipeline.fit(progress=False)
            unrolled = msif.UnrolledInfluence().fit(pipeline, progress=False)
            unrolled.score(new[:5], progress=False)
        print("torch._dynamo" in sys.modules)
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "False", run.stderr


class Normed(nn.Module):
    """A normalisation of each kind, in-place activations, a skip connection."""

    def __init__(self):
        super().__init__()
        self.conv, self.batch = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.group = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.relu, self.flat, self.head = nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.batch.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        self.batch.running_var.add_(0.5)

    def forward(self, x):
        z = self.relu(self.batch(self.conv(x)))
        y = self.group(self.second(z))
        y += z
        return self.head(self.flat(torch.tanh(y).mean((2, 3))))


def test_norm_layers_are_recognised():
    torch.manual_seed(0)
    model = Normed().double().eval()
    o = Objective(
        model, msif.Examples(draw(9, 2, 5, 5), torch.arange(9) % 3), msif.cross_entropy, 0.1
    )
    full, v = o.layout.flatten(model) + 0.1 * draw(o.layout.size, seed=2), draw(o.size, 20)
    assert sum(isinstance(layer, Scale) for layer in find_layers(o)) == 3

    oracle = Oracle(o, full)
    ggn, gradients = oracle.ggn() - torch.diag(oracle.penalty()), oracle.gradients()
    close(msif.GGN(o, full, ridge=False) @ v, ggn @ v)
    close(msif.GGN(o, full, ridge=False).dense(), ggn)
    close(library_gradients(o, full), gradients)
    for columns in (1, 20):  # each layer by its inputs, and by its gradients
        found = msif.example_products(o, full, v[:, :columns], mode="layers")
        close(found, (gradients @ v[:, :columns]).T, case=columns)


@pytest.mark.parametrize("link", ["frozen", "proximal"])
def test_resnet18_end_to_end(link):
    """torchvision's own ResNet-18 with 11 million parameters."""
    resnet18 = pytest.importorskip("torchvision").models.resnet18

    def net(classes, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return resnet18(num_classes=classes).eval()

    def shared(name):
        return not name.startswith("fc.")

    before, after = net(6, 0), net(4, 1)
    after.load_state_dict({n: t for n, t in before.state_dict().items() if shared(n)}, strict=False)
    data = [
        msif.Examples(draw(8, 3, 32, 32, seed=k, dtype=torch.float32), torch.arange(8) % c)
        for k, c in enumerate((6, 4, 4))
    ]
    how = msif.Frozen(shared) if link == "frozen" else msif.Proximal(0.05, shared)
    stages = [
        msif.Stage("pretrain", before, data[0], weight_decay=1e-2),
        msif.Stage("finetune", after, data[1], weight_decay=1e-2, link=how),
    ]
    pipeline = msif.Pipeline(stages).adopt()
    assert find_layers(pipeline.objective(0)) is not None
    attributor = msif.ImplicitInfluence(
        msif.ConjugateGradient(max_iter=2), curvature="ggn", damping=0.1
    )
    with pytest.warns(msif.ConvergenceWarning):  # random weights, two steps
        scores = attributor.fit(pipeline).score(data[2][:2])
    assert scores.values.shape == (2, 8)
    assert float(scores.values.abs().min()) > 0
    # two steps, and the check of the residuals
    assert 4 < attributor.report_["pretrain"].products <= 7
