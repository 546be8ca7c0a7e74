"""Problems that the tests share, and their answers found without the library's own operators.

Answers come from retrained pipelines (finite differences), from plain autograd and dense matrices,
or from a closed form. Everything is small, and in float64 unless a test asks for something else.
"""

import copy

import torch
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

import msif_lab as msif
from msif_lab.curvature import Operator

F64 = torch.float64
LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.3)}
ALL_LINKS = LINKS | {"warm": msif.WarmStart()}

# ---- Comparisons ----


def draw(*size, seed=0, dtype=F64):
    """Standard normal numbers."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, tol=1e-10, case=None):
    """Assert that no entry is off by more than ``tol`` times the largest; 0.0 means equal bits."""
    assert actual.shape == expected.shape, case
    error = float((actual - expected).abs().max()) if actual.numel() else 0.0
    scale = float(expected.abs().max()) if actual.numel() else 0.0
    assert error <= tol * (scale or 1.0), f"off by {error:.1e} of {scale:.1e} ({case})"


def relative_error(actual, expected):
    """``‖actual − expected‖ / ‖expected‖``."""
    return float((actual - expected).norm() / expected.norm())


def same(left, right):
    """Whether tensors, or lists, tuples and dicts of them, agree in shape, dtype and every bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left.dtype == right.dtype and torch.equal(left, right)


def states(pipeline):
    """A copy of every stage's state dict, to be compared by `same`."""
    return [copy.deepcopy(stage.model.state_dict()) for stage in pipeline.stages]


def attributes(model):
    """All attributes of every module, hooks included: equal as long as none came or went."""
    return {
        (name, attribute): copy.copy(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    }


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# ---- Pipelines ----


def random_examples(n, shape, outputs, regression, seed):
    """A learnable random task: targets from a fixed random teacher plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=F64)

    x = normal(n, *shape)
    width = x[0].numel()
    scores = x.flatten(1) @ normal(width, outputs) / width**0.5 + 0.3 * normal(n, outputs)
    return msif.Examples(x, torch.tanh(scores) if regression else scores.argmax(1))


def random_model(kind, outputs, seed):
    """A tiny net on inputs of shape (1, 4, 4)."""
    if kind == "mlp":
        return msif.mlp(16, hidden=(4,), classes=outputs, seed=seed).double()
    return msif.convnet((1, 4, 4), channels=(2,), width=4, classes=outputs, seed=seed).double()


def random_pipeline(
    kind="mlp", regression=False, link=None, k=2, weight_decay=5e-2, fit=True, recipe=None
):
    """``k`` stages on different random tasks: 3, 2, 3, ... outputs, 24, 20, 16, ... examples.

    Args:
        recipe: one for all stages (L-BFGS by default), or a list with one for each.
    """
    loss = msif.mean_squared_error if regression else msif.cross_entropy
    recipes = recipe if isinstance(recipe, (list, tuple)) else [recipe or msif.LBFGS()] * k
    stages = []
    for i in range(k):
        outputs = 3 - i % 2
        data = random_examples(24 - 4 * i, (1, 4, 4), outputs, regression, seed=10 + i)
        model = random_model(kind, outputs, seed=i)
        before = link if i else None
        stages.append(msif.Stage(f"stage{i}", model, data, loss, weight_decay, before, recipes[i]))
    pipeline = msif.Pipeline(stages)
    return pipeline.fit(progress=False) if fit else pipeline


def random_queries(pipeline, n=5):
    """Fresh examples of the last stage's task."""
    data = pipeline.stages[-1].data
    outputs = data.y.shape[1] if data.y.ndim == 2 else len(data.classes)
    return random_examples(n, tuple(data.x.shape[1:]), outputs, data.y.ndim == 2, seed=99)


def digits_pipeline(digits, link, hidden=16, seed=0, recipe=None, weight_decay=1e-2):
    """Pretrained on 400 digits of the classes 0-3, finetuned on 200 of the classes 4-9."""
    train, _ = digits
    stages = []
    for name, classes, n in (("pretrain", range(4), 400), ("finetune", range(4, 10), 200)):
        model = msif.mlp(64, hidden=(hidden,), classes=len(classes), seed=seed).double()
        stages.append(
            msif.Stage(
                name,
                model,
                train.select(classes=classes, n=n, seed=seed),
                weight_decay=weight_decay,
                link=link if stages else None,
                recipe=recipe or msif.LBFGS(),
            )
        )
    return msif.Pipeline(stages)


def implicit_scores(pipeline, queries, solver=None, *, stage=0, target="loss", **settings):
    """(Q, N) scores of a fresh `msif.ImplicitInfluence`."""
    attributor = msif.ImplicitInfluence(solver, **settings).fit(pipeline)
    return attributor.score(queries, stage=stage, target=target).values


def unrolled_scores(pipeline, queries, *, stage=0, target="loss", **settings):
    """(Q, N) scores of a fresh `msif.UnrolledInfluence`."""
    attributor = msif.UnrolledInfluence(**settings).fit(pipeline, progress=False)
    return attributor.score(queries, stage=stage, target=target, progress=False).values


# ---- Derivatives by retraining ----


def central_differences(
    pipeline, queries, stage, examples, step=1e-3, *, optimum, centre=1.0, target="loss"
):
    """(Q, E) derivatives of the queries in example weights, from a pipeline retrained as a whole.

    Args:
        optimum: True retrains to the optimum near the trained weights, by second-order differences;
            False repeats the very run that trained them, by fourth-order ones.
        centre: the weight of all examples around which one weight is moved.
    """
    offsets, factors = ([1, -1], [1 / 2, -1 / 2])
    if not optimum:
        offsets, factors = ([1, -1, 2, -2], [2 / 3, -2 / 3, -1 / 12, 1 / 12])
    m, n = len(pipeline.stages[stage].data), len(examples)
    weights = torch.full((len(offsets), n, m), centre, dtype=F64)
    for lane, i in enumerate(examples):
        weights[:, lane, i] += step * torch.tensor(offsets, dtype=F64)
    again = pipeline.retrain({stage: weights.reshape(-1, m)}, warm_start=optimum, progress=False)
    if optimum:
        assert all(float(r.gradient_norm.max()) < 1e-12 for r in again.reports), "not an optimum"
    q = again.evaluate(queries, target).reshape(len(queries), len(offsets), n)
    return torch.einsum("qon,o->qn", q, torch.tensor(factors, dtype=F64)) / step


# ---- Derivatives of one objective ----


def linear_objective(weight_decay=1e-2):
    """Softmax regression at a random point: convex, and its Hessian is its Gauss-Newton matrix."""
    data = random_examples(20, (6,), 3, False, seed=5)
    model = msif.softmax_regression(6, 3).double()
    o = msif.Pipeline([msif.Stage("linear", model, data, weight_decay=weight_decay)]).objective(0)
    return o, draw(o.size, seed=6)


class Oracle:
    """An objective F at one point, from its definition: own flattening, closed-form losses.

    Args:
        o: the objective; its model, data, names and penalties are read, none of its methods.
        full: values of all parameters of the model, trained or not.
        weights: of the examples, ``(m,)``; all one by default.
    """

    def __init__(self, o, full, weights=None):
        self.o = o
        self.weights = torch.ones(len(o.data), dtype=F64) if weights is None else weights
        shapes = {name: p.shape for name, p in o.model.named_parameters()}
        parts = full.split([shape.numel() for shape in shapes.values()])
        self.values = {
            name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)
        }
        self.theta = torch.cat([self.values[name].reshape(-1) for name in o.trained_names])
        self.shared = torch.cat(
            [torch.full((shapes[name].numel(),), "head" not in name) for name in o.trained_names]
        )

    def outputs(self, theta, x):
        values, start = dict(self.values), 0
        for name in self.o.trained_names:
            size = values[name].numel()
            values[name] = theta[start : start + size].view(values[name].shape)
            start += size
        return functional_call(self.o.model, values, (x,))

    def losses(self, theta, x, y):
        z = self.outputs(theta, x)
        if y.ndim == 1:
            return functional.cross_entropy(z, y, reduction="none")
        return ((z - y) ** 2).mean(1)

    def risk(self, theta):
        o = self.o
        data = (self.weights * self.losses(theta, o.data.x, o.data.y)).sum() / len(o.data)
        apart = theta[self.shared] - 1.0  # the centre of the link does not matter to the curvature
        return data + o.weight_decay / 2 * (theta**2).sum() + o.alpha * (apart**2).sum()

    def penalty(self):
        """Diagonal of the Hessian of weight decay and proximal term."""
        return self.o.weight_decay + 2 * self.o.alpha * self.shared.to(F64)

    def hessian(self):
        return torch.autograd.functional.hessian(self.risk, self.theta)

    def jacobians(self):
        """``(m, C, P)``: of each example's outputs."""

        def outputs(theta, x):
            return self.outputs(theta, x[None])[0]

        return vmap(jacrev(outputs), (None, 0))(self.theta, self.o.data.x)

    def ggn(self):
        """``(1/m) Σ w_i J_iᵀ Λ_i J_i``, Λ the loss's own Hessian in closed form, plus penalties."""
        y, j = self.o.data.y, self.jacobians()
        if y.ndim == 1:
            p = self.outputs(self.theta, self.o.data.x).softmax(1)
            inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        else:
            inner = 2 / y.shape[1] * torch.eye(y.shape[1], dtype=F64).expand(len(y), -1, -1)
        matrix = torch.einsum("i,iap,iab,ibq->pq", self.weights / len(y), j, inner, j)
        return matrix + torch.diag(self.penalty())

    def gradients(self, examples=None, function=None):
        """``(N, P)``: of each example's loss, or another function, one by one in reverse mode."""
        examples, rows = examples or self.o.data, []
        for x, y in zip(examples.x, examples.y, strict=True):
            theta = self.theta.clone().requires_grad_()
            if function:
                value = function(self.outputs(theta, x[None]), y[None])
            else:
                value = self.losses(theta, x[None], y[None])
            rows.append(torch.autograd.grad(value[0], theta)[0])
        return torch.stack(rows)


def library_gradients(o, full, *examples, **settings):
    """All rows of `msif.per_example_gradients` in one tensor."""
    return torch.cat([g for _, g in msif.per_example_gradients(o, full, *examples, **settings)])


# ---- Matrices ----


class Matrix(Operator):
    """An operator from a dense matrix that counts its products."""

    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.columns = matrix, 0

    def _product(self, vectors):
        self.columns += vectors.shape[1]
        return self.matrix @ vectors


def with_eigenvalues(values, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    vectors, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return vectors @ torch.diag(torch.as_tensor(values, dtype=F64)) @ vectors.T


def convex():
    """Hessian of softmax regression at a random point."""
    return msif.Hessian(*linear_objective())


def gauss_newton():
    """Damped GGN of an untrained net, where the Hessian itself is indefinite."""
    pipeline = random_pipeline(link=msif.Frozen(), fit=False)
    o = pipeline.objective(0)
    return msif.GGN(o, o.layout.flatten(pipeline.stages[0].model), ridge=False) + 0.05


def true_residuals(a, x, b):
    """``‖A x − b‖ / ‖b‖`` of each column, by the dense matrix; 0 for a zero column."""
    return (a.dense() @ x - b).norm(dim=0) / b.norm(dim=0).clamp(min=1e-300)


def worst_error(pipeline, stages=None):
    """Largest relative error of unrolled scores; each example at the better of two steps."""
    attributor, worst = msif.UnrolledInfluence(trust=0).fit(pipeline, progress=False), 0.0
    queries, examples = random_queries(pipeline), [0, 3, 7, 11, 13]
    for stage in range(len(pipeline.stages)) if stages is None else stages:
        values = attributor.score(queries, stage=stage, progress=False).values[:, examples]
        errors = []
        for step in (1e-3, 1e-4):
            truth = central_differences(pipeline, queries, stage, examples, step, optimum=False)
            errors.append((values - truth).norm(dim=0) / truth.norm(dim=0).clamp(min=1e-9))
        worst = max(worst, float(torch.stack(errors).amin(0).max()))
    return worst
