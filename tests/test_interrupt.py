"""Ctrl-C, or any other exception, leaves the user's modules bit for bit as they were."""

import copy
from contextlib import contextmanager

import pytest
import torch
from oracles import random_pipeline, same

import msif_lab as msif

LINK = msif.Proximal(0.3)


def make(fit=False):
    """A quick pipeline whose modules have all that could get lost: modes, flags, gradients."""
    pipeline = random_pipeline(link=LINK, fit=False)
    for stage in pipeline.stages:
        stage.model.embedding[1].bias.requires_grad_(False)
        stage.model.head.eval()
        stage.model.head.weight.grad = torch.full_like(stage.model.head.weight, 7.0)
    recipe = msif.SGD(0.1, epochs=4, batch_size=5)
    pipeline = msif.Pipeline(
        [msif.Stage(s.name, s.model, s.data, s.loss, 0.05, s.link, recipe) for s in pipeline.stages]
    )
    return pipeline.fit(progress=False) if fit else pipeline


def photograph(pipeline):
    """Everything a user sees of the modules."""
    return [
        {
            "state": copy.deepcopy(stage.model.state_dict()),
            "storage": {n: p.data_ptr() for n, p in stage.model.named_parameters()},
            "parameters": {n: id(p) for n, p in stage.model.named_parameters()},
            "flags": {n: p.requires_grad for n, p in stage.model.named_parameters()},
            "gradients": {
                n: None if p.grad is None else p.grad.clone()
                for n, p in stage.model.named_parameters()
            },
            "modes": {n: m.training for n, m in stage.model.named_modules()},
            "attributes": {n: sorted(vars(m)) for n, m in stage.model.named_modules()},
        }
        for stage in pipeline.stages
    ]


def differences(before, after):
    """Names of what differs between two photographs; empty when nothing does."""
    found = []
    for k, (old, new) in enumerate(zip(before, after, strict=True)):
        for kind in old:
            if old[kind].keys() != new[kind].keys():
                found.append((k, kind))
            for name in old[kind].keys() & new[kind].keys():
                a, b = old[kind][name], new[kind][name]
                if not (
                    torch.equal(a, b)
                    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
                    else a == b
                ):
                    found.append((k, kind, name))
    return found


@contextmanager
def raising(module, after, error=KeyboardInterrupt):
    """Raise inside the module's forward at call number ``after``; yields the list of calls."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == after:
            raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def weights(lanes=2):
    ones = torch.ones(lanes, 24)
    ones[0, 0] = 0
    return ones


def score(pipeline, solver=None, **settings):
    attributor = msif.ImplicitInfluence(solver, curvature="ggn", damping=1.0, **settings)
    return [attributor.fit(pipeline).score(pipeline.stages[-1].data[:3]).values]


WORK = {
    "refit": lambda p: p.fit(progress=False).trained(),
    "retrain one": lambda p: p.retrain(weights(1), progress=False).parameters,
    "retrain lanes": lambda p: p.retrain(weights(), progress=False).parameters,
    "warm start": lambda p: p.retrain(weights(), warm_start=True, progress=False).parameters,
    "evaluate": lambda p: [p.evaluate(p.stages[-1].data)],
    "factorise": score,
    "conjugate gradients": lambda p: score(p, msif.ConjugateGradient(tol=1e-2)),
    "leave one out": lambda p: score(p, leave_one_out=True),
    "removals": lambda p: [
        msif.removal_effects(p, p.stages[-1].data[:3], [0, 1], lanes=1, progress=False).values
    ],
}


@pytest.fixture(scope="module")
def fitted():
    return make(fit=True)


@pytest.fixture(scope="module")
def undisturbed(fitted):
    """What each work returns when nothing interrupts it, and its calls of the last model."""
    found = {}
    for name, work in WORK.items():
        work(fitted)  # measures what is measured only once: bytes per example, layers
        with raising(fitted.stages[-1].model, after=0) as calls:
            found[name] = work(fitted), len(calls)
    return found


@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
@pytest.mark.parametrize("work", WORK)
def test_an_interrupt_inside_the_models_forward_changes_nothing(fitted, undisturbed, work):
    """At the first, a middle and the last call of the last stage's model."""
    expected, calls = undisturbed[work]
    before = photograph(fitted)
    middle = (calls + 1) // 2
    for after, error in ((1, KeyboardInterrupt), (middle, KeyboardInterrupt), (calls, MemoryError)):
        with pytest.raises(error), raising(fitted.stages[-1].model, after, error):
            WORK[work](fitted)
        assert differences(before, photograph(fitted)) == [], f"call {after} of {calls}"
        found = WORK[work](fitted)
        assert same(list(found), list(expected)), f"another result after call {after} of {calls}"


def test_the_photograph_sees_what_it_should():
    """Negative control: each kind of change is found."""
    pipeline = make()
    before, model = photograph(pipeline), pipeline.stages[0].model
    model.train()
    model.head.weight.grad += 1
    model.embedding[1].bias.requires_grad_(True)
    torch.nn.init.zeros_(model.embedding[1].weight)
    model.head.bias = torch.nn.Parameter(model.head.bias.detach().clone())
    kinds = {found[1] for found in differences(before, photograph(pipeline))}
    assert kinds == {"state", "storage", "parameters", "flags", "gradients", "modes"}


def test_an_interrupted_first_fit_leaves_the_models_untrained():
    reference = make(fit=True)
    for stage in (0, 1):
        pipeline = make()
        before = photograph(pipeline)
        with pytest.raises(KeyboardInterrupt), raising(pipeline.stages[stage].model, after=12):
            pipeline.fit(progress=False)
        assert differences(before, photograph(pipeline)) == [], stage
        assert pipeline.reports is None
        with pytest.raises(ValueError, match="not trained"):
            pipeline.trained()
        assert same(pipeline.fit(progress=False).trained(), reference.trained()), stage


def test_an_interrupt_while_the_trained_weights_are_written_changes_nothing(monkeypatch):
    """The last moment of a fit: some parameters are copied, others not yet."""
    pipeline = make()
    before, copy_, written = photograph(pipeline), torch.Tensor.copy_, []
    parameters = {id(p) for stage in pipeline.stages for p in stage.model.parameters()}

    def interrupted(self, *arguments, **settings):
        if id(self) in parameters:
            written.append(self)
            if len(written) == 3:
                raise KeyboardInterrupt
        return copy_(self, *arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.fit(progress=False)
    monkeypatch.undo()
    assert len(written) > 3, "what was written must be taken back"
    assert differences(before, photograph(pipeline)) == []


def test_a_completed_fit_changes_the_weights_and_nothing_else():
    pipeline = make()
    before = photograph(pipeline)
    pipeline.fit(progress=False)
    changed = differences(before, photograph(pipeline))
    assert {kind for _, kind, _ in changed} == {"state"}
    assert (0, "state", "embedding.1.bias") not in changed, "what needs no gradient is not trained"


@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
def test_an_interrupt_in_a_solvers_callback_changes_nothing(fitted):
    before = photograph(fitted)

    def stop(iteration, residuals):
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(fitted, msif.ConjugateGradient(tol=1e-6, callback=stop))
    assert differences(before, photograph(fitted)) == []


def test_a_failed_save_or_load_changes_nothing(fitted, tmp_path, monkeypatch):
    before = photograph(fitted)
    fitted.save(tmp_path / "p")
    content = (tmp_path / "p").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-9])
    with pytest.raises(msif.SavedFileError):
        fitted.load(tmp_path / "cut")
    monkeypatch.setattr(
        "msif_lab.pipeline.saved.read_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        fitted.load(tmp_path / "p")
    assert differences(before, photograph(fitted)) == []


def test_tensors_given_by_the_user_are_never_written(fitted):
    def tensors():
        return [(s.data.x, s.data.y, s.data.ids) for s in fitted.stages]

    before, given = copy.deepcopy(tensors()), weights()
    fitted.retrain(given, progress=False)
    msif.removal_effects(fitted, fitted.stages[-1].data, [0, 1], progress=False)
    with pytest.warns(msif.ConvergenceWarning):
        score(fitted)
    assert torch.equal(given, weights())
    assert same(tensors(), before)


@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
def test_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    pipeline = make(fit=True)
    for work in WORK.values():
        work(pipeline)
    assert torch.equal(state, torch.random.get_rng_state())
