"""dattri: explicit inverse, conjugate gradients, EK-FAC.

All data come in one batch: of several batches it would add up the inverses.
"""

import torch
from dattri.algorithm.influence_function import (
    IFAttributorCG,
    IFAttributorEKFAC,
    IFAttributorExplicit,
)
from dattri.task import AttributionTask
from job import Job, work
from torch.utils.data import DataLoader


def run(job: Job, variant: str):
    def loss(parameters, data):
        x, y = data
        outputs = torch.func.functional_call(job.net, parameters, (x if x.ndim == 4 else x[None],))
        return torch.nn.functional.cross_entropy(outputs, y.reshape(-1))

    s = job.spec
    task = AttributionTask(loss_func=loss, model=job.net, checkpoints=job.net.state_dict())
    if variant == "explicit":
        attributor = IFAttributorExplicit(task, regularization=s.damping)
    elif variant == "cg":
        attributor = IFAttributorCG(task, max_iter=100, tol=s.residual, regularization=s.damping)
    else:
        attributor = IFAttributorEKFAC(task, damping=s.damping)
    whole = DataLoader(job.data(), batch_size=len(job.x))
    attributor.cache(whole)
    scores = attributor.attribute(whole, DataLoader(job.queries(), batch_size=len(job.qx)))
    return -scores.T / len(job.x)


if __name__ == "__main__":
    work(run)
