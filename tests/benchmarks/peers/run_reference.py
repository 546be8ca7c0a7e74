"""The right answer by plain PyTorch: closed form in float64 (S), or conjugate gradients."""

import copy

import torch
from job import Job, work
from torch.autograd import grad
from torch.nn.functional import cross_entropy

CHUNK = 500


def softmax_regression(job: Job) -> torch.Tensor:
    """``H = (1/N) Σ (diag p − ppᵀ) ⊗ x̃x̃ᵀ`` in float64, solved densely."""
    net = copy.deepcopy(job.net).double()
    x, q = (
        torch.cat([a.double().flatten(1), torch.ones(len(a), 1).double()], 1)
        for a in (job.x, job.qx)
    )
    p, p_query = net(job.x.double()).softmax(1), net(job.qx.double()).softmax(1)
    bend = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    size = x.shape[1]
    matrix = torch.einsum("nab,ni,nj->aibj", bend, x, x).reshape(4 * size, 4 * size) / len(x)
    matrix += job.spec.damping * torch.eye(len(matrix), dtype=matrix.dtype)
    left, right = (
        ((s - torch.eye(4, dtype=s.dtype)[y])[:, :, None] * a[:, None]).flatten(1)
        for s, y, a in ((p_query, job.qy, q), (p, job.y, x))
    )
    return -left @ torch.linalg.solve(matrix, right.T) / len(x)


class Product:
    """``(C + damping) V`` for ``V`` (P, K), one column and one chunk of examples at a time, by
    double backward.
    """

    def __init__(self, job: Job):
        self.job, self.parameters = job, list(job.net.parameters())

    def shaped(self, v):
        parts = v.split([p.numel() for p in self.parameters])
        return [a.reshape(p.shape) for a, p in zip(parts, self.parameters, strict=True)]

    def __call__(self, columns):
        job, result = self.job, self.job.spec.damping * columns
        for x, y in zip(job.x.split(CHUNK), job.y.split(CHUNK), strict=True):
            z = job.net(x)
            if job.spec.curvature == "hessian":
                first = grad(
                    cross_entropy(z, y, reduction="sum") / len(job.x),
                    self.parameters,
                    create_graph=True,
                )
            else:
                dummy, p = torch.zeros_like(z, requires_grad=True), z.detach().softmax(1)
                first = grad(z, self.parameters, dummy, create_graph=True)
            for k, v in enumerate(columns.T):
                inner = sum((a * b).sum() for a, b in zip(first, self.shaped(v), strict=True))
                if job.spec.curvature == "hessian":
                    product = grad(inner, self.parameters, retain_graph=True)
                else:
                    (s,) = grad(inner, dummy, retain_graph=True)  # J v
                    s = p * (s - (p * s).sum(1, keepdim=True)) / len(job.x)  # Λ J v
                    product = grad(z, self.parameters, s, retain_graph=True)
                result[:, k] += torch.cat([a.flatten() for a in product])
        return result


def solve(product, b, tol, most=400):
    """Textbook conjugate gradients, each column its own; returns the solution and its true
    residuals.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    square = (r * r).sum(0)
    for _ in range(most):
        if bool((square.sqrt() <= tol * b.norm(dim=0)).all()):
            break
        a_p = product(p)
        step = square / (p * a_p).sum(0)
        x, r = x + step * p, r - step * a_p
        new = (r * r).sum(0)
        p, square = r + new / square * p, new
    return x, (product(x) - b).norm(dim=0) / b.norm(dim=0)


def iterative(job: Job) -> tuple[torch.Tensor, str]:
    product, queries = Product(job), job.spec.checked
    parameters = product.parameters
    losses = [cross_entropy(job.net(job.qx[[q]]), job.qy[[q]]) for q in range(queries)]
    b = torch.stack(
        [torch.cat([g.flatten() for g in grad(loss, parameters)]) for loss in losses], 1
    )
    v, residuals = solve(product, b, 1e-5)
    scores = torch.empty(queries, len(job.x))
    for start in range(0, len(job.x), CHUNK):
        rows = slice(start, start + CHUNK)
        weights = torch.ones(len(job.x[rows]), requires_grad=True)
        loss = cross_entropy(job.net(job.x[rows]), job.y[rows], reduction="none")
        first = grad((weights * loss).sum(), parameters, create_graph=True)
        for q in range(queries):
            inner = sum((a * c).sum() for a, c in zip(first, product.shaped(v[:, q]), strict=True))
            scores[q, rows] = -grad(inner, weights, retain_graph=True)[0] / len(job.x)
    return scores, f"residuals up to {float(residuals.max()):.1e}"


if __name__ == "__main__":
    work(lambda job, _: softmax_regression(job) if job.spec.net == "softmax" else iterative(job))
