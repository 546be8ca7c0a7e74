"""kronfluence: EK-FAC, factors from labels drawn by the model, damping as the job's."""

import copy
import tempfile

import torch
from job import Job, work
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn.functional import cross_entropy


class Classification(Task):
    def compute_train_loss(self, batch, model, sample=False):
        outputs, y = model(batch[0]), batch[1]
        if sample:
            y = torch.multinomial(outputs.detach().softmax(1), 1).flatten()
        return cross_entropy(outputs, y, reduction="sum")

    def compute_measurement(self, batch, model):
        return cross_entropy(model(batch[0]), batch[1], reduction="sum")


def run(job: Job, variant: str):
    torch.manual_seed(0)
    task = Classification()
    with tempfile.TemporaryDirectory() as folder:
        net = prepare_model(copy.deepcopy(job.net), task)
        analyzer = Analyzer(
            "bench", net, task, cpu=True, output_dir=folder, disable_tqdm=True, log_level=40
        )
        analyzer.fit_all_factors(
            "factors",
            job.data(),
            per_device_batch_size=500,
            factor_args=FactorArguments(strategy=variant),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=job.queries(),
            train_dataset=job.data(),
            per_device_query_batch_size=len(job.qx),
            per_device_train_batch_size=500,
            score_args=ScoreArguments(damping_factor=job.spec.damping),
        )
        return -analyzer.load_pairwise_scores("scores")["all_modules"] / len(job.x)


if __name__ == "__main__":
    work(run)
