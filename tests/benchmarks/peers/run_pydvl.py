"""pyDVL: dense solve, or conjugate gradients with all queries in one block.

Queries are solved once, data come in batches.
"""

import torch
from job import Job, work
from pydvl.influence import InfluenceMode
from pydvl.influence.torch import (
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    NystroemPreconditioner,
    SecondOrderMode,
)
from torch.utils.data import DataLoader


def run(job: Job, variant: str):
    s, loss = job.spec, torch.nn.functional.cross_entropy
    mode = SecondOrderMode.HESSIAN if s.curvature == "hessian" else SecondOrderMode.GAUSS_NEWTON
    iterative = {"rtol": s.residual, "atol": 0.0, "maxiter": 500, "solve_simultaneously": True}
    if variant == "direct":
        model = DirectInfluence(job.net, loss, s.damping, second_order_mode=mode)
    elif variant == "ekfac":
        model = EkfacInfluence(job.net, update_diagonal=True, hessian_regularization=s.damping)
    else:
        conditioner = NystroemPreconditioner(rank=50) if variant == "block-cg-nystrom" else None
        model = CgInfluence(
            job.net,
            loss,
            s.damping,
            preconditioner=conditioner,
            second_order_mode=mode,
            **iterative,
        )
    model = model.fit(DataLoader(job.data(), batch_size=500))
    if variant == "ekfac":  # has no factors for a joint block
        return -model.influences(job.qx, job.qy, job.x, job.y, mode=InfluenceMode.Up) / len(job.x)
    factors = model.influence_factors(job.qx, job.qy)
    parts = [
        model.influences_from_factors(factors, x, y, mode=InfluenceMode.Up)
        for x, y in zip(job.x.split(500), job.y.split(500), strict=True)
    ]
    return -torch.cat(parts, 1) / len(job.x)


if __name__ == "__main__":
    work(run)
