"""msif_lab on a job; a variant names a solver, since not every version has every solver."""

import warnings

from job import Job, work

import msif_lab as msif

SOLVERS = {
    "exact": lambda tol: msif.Exact(),
    "cg": lambda tol: msif.ConjugateGradient(tol=tol),
    "cg-jacobi": lambda tol: msif.ConjugateGradient(tol=tol, preconditioner=msif.Jacobi()),
    "cg-lowrank": lambda tol: msif.ConjugateGradient(tol=tol, preconditioner=msif.LowRank()),
    "cg-nested": lambda tol: msif.ConjugateGradient(
        tol=tol, preconditioner=msif.LowRank(rank=100), shares=(0.08, 0.3)
    ),
    "cg-ekfac": lambda tol: msif.ConjugateGradient(tol=tol, preconditioner=msif.EKFAC()),
    "minres": lambda tol: msif.MINRES(tol=tol),
    "lissa": lambda tol: msif.LiSSA(tol=tol),
    "lowrank": lambda tol: msif.LowRank(),
    "ekfac": lambda tol: msif.EKFAC(),
}


def run(job: Job, variant: str):
    # trained by a short SGD run: no optimum, on purpose
    warnings.simplefilter("ignore", msif.ConvergenceWarning)
    s = job.spec
    data, queries = msif.Examples(job.x, job.y), msif.Examples(job.qx, job.qy)
    pipeline = msif.Pipeline([msif.Stage("only", job.net, data)]).adopt()
    method = msif.ImplicitInfluence(
        SOLVERS[variant](s.residual), curvature=s.curvature, damping=s.damping
    )
    scores = method.fit(pipeline).score(queries)
    return scores.values, str(method.report_["only"])


if __name__ == "__main__":
    work(run)
