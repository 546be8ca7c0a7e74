"""captum: dense inverse (NaiveInfluenceFunction) or a rank-50 Arnoldi projection."""

import inspect

import torch
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from captum.influence._core.influence_function import NaiveInfluenceFunction
from job import Job, work
from torch import nn


def run(job: Job, variant: str):
    path = job.folder / "captum.pt"
    torch.save(job.net.state_dict(), path)
    kind = NaiveInfluenceFunction if variant == "naive" else ArnoldiInfluenceFunction
    settings = (
        {"projection_dim": job.parameters}
        if variant == "naive"
        else {"projection_dim": 50, "arnoldi_dim": 100}
    )
    assert set(settings) <= set(inspect.signature(kind).parameters)
    method = kind(
        job.net,
        job.data(),
        str(path),
        checkpoints_load_func=lambda net, file: net.load_state_dict(torch.load(file)) and 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=500,
        sample_wise_grads_per_batch=True,
        # captum's Hessian is the sum over the data, not the mean
        hessian_reg=job.spec.damping * len(job.x),
        hessian_inverse_tol=0.0,
        **settings,
    )
    return -method.influence((job.qx, job.qy))


if __name__ == "__main__":
    work(run)
