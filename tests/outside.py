"""Models that were not made for this library, and their derivatives by the module itself.

The oracle calls the module as its makers meant it, one example at a time and by plain reverse mode;
second derivatives and effects of weights are differences of what it gives.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracles import F64, draw, relative_error
from torch import nn

import msif_lab as msif

RECIPE = msif.SGD(0.1, momentum=0.5, epochs=1, batch_size=3)
WEIGHT_DECAY = 0.05
TOKENS = 7


@dataclass
class Case:
    """A model, how it is called, and what it is trained on.

    Attributes:
        coarse: whether it computes in float32 inside, so that differences need large steps.
    """

    model: nn.Module
    call: Callable
    train: msif.Examples
    queries: msif.Examples
    loss: Callable = msif.cross_entropy
    coarse: bool = False

    def pipeline(self, **settings):
        settings = {"weight_decay": WEIGHT_DECAY, "recipe": RECIPE, "loss": self.loss} | settings
        model = msif.wrap(self.model, self.call) if self.call is not plain else self.model
        return msif.Pipeline([msif.Stage("fit", model, self.train, **settings)])

    def at(self, theta):
        """A copy of the model with these values of all that it trains."""
        model = copy.deepcopy(self.model)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, part in zip(trained, theta.split([p.numel() for p in trained]), strict=True):
                p.copy_(part.view_as(p))
        return model, trained

    def outputs(self, model, data, i):
        x = data.x[i : i + 1]
        return self.call(model, dict(x.items()) if isinstance(x, msif.data.Fields) else x)

    def gradients(self, data, theta):
        """``(N, P)``: of each example's loss."""
        model, trained = self.at(theta)
        rows = []
        for i in range(len(data)):
            value = self.loss(self.outputs(model, data, i), data.y[i : i + 1])
            parts = torch.autograd.grad(value.sum(), trained, materialize_grads=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows)

    def ggn_product(self, theta, v, step):
        """``(1/m) Σ Jᵀ Λ J v`` with ``J v`` by differences and Λ by double differentiation."""
        up, down = (self.at(theta + s * step * v)[0] for s in (1, -1))
        model, trained = self.at(theta)
        total = torch.zeros_like(theta)
        for i in range(len(self.train)):
            with torch.no_grad():
                ends = [self.outputs(m, self.train, i) for m in (up, down)]
            pushed = (ends[0] - ends[1]) / (2 * step)
            z = self.outputs(model, self.train, i)
            leaf = z.detach().requires_grad_()
            value = self.loss(leaf, self.train.y[i : i + 1]).sum()
            (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
            (bent,) = torch.autograd.grad(slope, leaf, pushed)
            parts = torch.autograd.grad(z, trained, bent, materialize_grads=True)
            total += torch.cat([part.reshape(-1) for part in parts]) / len(self.train)
        return total + WEIGHT_DECAY * v


def plain(model, x):
    return model(x)


def close_for_some_step(ours, difference, coarse=False, tol=None):
    """Assert that differences with one of the step sizes agree: kinks spoil some, rounding others.

    Returns the smallest relative error.
    """
    steps = (3e-2, 1e-2, 1e-3) if coarse else (1e-4, 1e-5, 1e-6)
    errors = []
    for step in steps:
        errors.append(relative_error(ours, difference(step)))
        if errors[-1] < 1e-8:
            break
    assert min(errors) < (tol or (2e-3 if coarse else 1e-6)), errors
    return min(errors)


def check_gradients(case, pipeline):
    o, full = pipeline.objective(0), pipeline.trained()[0]
    rows = case.gradients(case.train, o.trained.take(full))
    ours = torch.cat([g for _, g in msif.per_example_gradients(o, full)])
    errors = [relative_error(ours, rows)]
    for count in (1, 4):
        vectors = draw(o.size, count, seed=count)
        products = msif.example_products(o, full, vectors)
        errors.append(relative_error(products, (rows @ vectors).T))
    assert max(errors) < (1e-4 if case.coarse else 1e-9), errors
    asked = case.gradients(case.queries, o.trained.take(full))
    dot = msif.GradientDot().fit(pipeline).score(case.queries).values
    assert relative_error(dot, -(asked @ rows.T) / len(rows)) < (1e-4 if case.coarse else 1e-9)
    return max(errors)


def check_curvature(case, pipeline, kinds=("hessian", "ggn")):
    o = pipeline.objective(0)
    theta = o.trained.take(pipeline.trained()[0])
    v = draw(o.size, seed=5)
    v = v / v.norm()
    errors = {}

    def slope(step):
        up, down = (case.gradients(case.train, theta + s * step * v).mean(0) for s in (1, -1))
        return (up - down) / (2 * step) + WEIGHT_DECAY * v

    differences = {"hessian": slope, "ggn": lambda step: case.ggn_product(theta, v, step)}
    for kind in kinds:
        ours = (pipeline.curvature(0, kind) @ v[:, None])[:, 0]
        errors[kind] = close_for_some_step(ours, differences[kind], case.coarse)
    assert len(kinds) < 2 or relative_error(*(d(1e-4) for d in differences.values())) > 1e-2
    return errors


def check_scores(case, pipeline, curvature="ggn"):
    """Solves under so much damping that gradients alone tell the scores."""
    o, full = pipeline.objective(0), pipeline.trained()[0]
    theta = o.trained.take(full)
    expected = -(case.gradients(case.queries, theta) @ case.gradients(case.train, theta).T)
    damping = 1e5
    solver = msif.ConjugateGradient(tol=1e-10)
    attributor = msif.ImplicitInfluence(solver, curvature=curvature, damping=damping)
    scores = attributor.fit(pipeline).score(case.queries).values
    assert relative_error(scores, expected / len(case.train) / damping) < 1e-3


def check_run(case, pipeline, example=1):
    """Unrolled scores against the run repeated under other weights."""
    attributor = msif.UnrolledInfluence(memory="8GB").fit(pipeline, progress=False)
    ours = attributor.score(case.queries, progress=False).values[:, example]

    def difference(step):
        weights = torch.ones(2, len(case.train), dtype=F64)
        weights[:, example] += step * torch.tensor([1.0, -1.0], dtype=F64)
        q = pipeline.retrain(weights, progress=False).evaluate(case.queries)
        return (q[:, 0] - q[:, 1]) / (2 * step)

    return close_for_some_step(ours, difference, case.coarse, 1e-2 if case.coarse else None)
