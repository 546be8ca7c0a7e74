"""The study of acting on scores: what its settings hold, and a small run of all of it."""

from dataclasses import replace
from functools import partial

import pandas
import pytest
import torch
from oracles import F64

import msif_lab as msif
from msif_lab import acting


@pytest.mark.parametrize("noise", acting.NOISES)
def test_a_setting_keeps_apart_what_trains_chooses_and_judges(noise):
    setting = acting.SETTINGS["digits"][0](noise)
    assert len(setting.pretraining) == 400
    assert int(setting.truth.sum()) == round(400 * acting.NOISES[noise])
    assert torch.equal(setting.pretraining.y != setting.clean, setting.truth)
    train, test = msif.load_digits(dtype=F64)
    for fine, validation, judges in setting.tasks.values():
        assert not set(fine.ids.tolist()) & set(validation.ids.tolist())
        for part, whole in ((fine, train), (validation, train), (judges, test)):
            rows = [torch.where(whole.ids == i)[0].item() for i in part.ids.tolist()]
            assert torch.equal(whole.x[rows], part.x)


def test_the_planted_group_hurts_one_task_and_helps_the_other():
    """Found by the scores for the one and not for the other; by retraining, too."""
    found = {}
    for noise in acting.PLANTED:
        setting = acting.SETTINGS["planted"][0](noise)
        build = partial(setting.build, "warm start")
        runs = msif.over_seeds(build, range(4), lanes=4, progress=False)
        task = next(iter(setting.tasks))
        _, validation, test = setting.tasks[task]
        method = msif.AveragedInfluence(msif.UnrolledInfluence(trust=0))
        scores = method.fit(runs).score(validation, aggregate="mean", progress=False)
        without = (~setting.truth).double()
        after = [p.retrain({0: without}, progress=False).evaluate(test).mean() for p in runs]
        change = float((torch.stack(after) - runs.evaluate(test).mean(1)).mean())
        found[task] = msif.detection(scores, setting.truth, resamples=10).roc_auc, change
    assert found["odd"][0] > 0.55 > 0.4 > found["above 6"][0]
    assert found["odd"][1] < -0.01 and found["above 6"][1] > 0.01


def test_the_command_writes_one_table(tmp_path, monkeypatch, capsys):
    digits = acting.SETTINGS["digits"][0]("20 %")
    setting = replace(digits, epochs=(2, 2), fractions=(0.1, 0.3))
    monkeypatch.setitem(acting.SETTINGS, "digits", (lambda noise: setting, ("20 %",)))
    monkeypatch.setattr(acting, "SCORING", 4)
    acting.main(["digits", "--links", "frozen", "--seeds", "2", "--out", str(tmp_path)])
    assert "acting_digits.csv: 20 %, frozen" in capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "acting_digits.csv")
    assert set(table.kind) == {"detection", "gain", "stability", "change"}
    loss = table.query("kind == 'detection' and method == 'loss' and measure == 'roc_auc'")
    assert float(loss.value.iloc[0]) > 0.9
    changes = table.query("kind == 'change' and against == 'keep all' and task == 'test'")
    methods = {acting.OURS, "random", "loss", "oracle", "labels corrected", "guided weights"}
    assert methods <= set(changes.method)
    chosen = changes.query("chosen and measure == 'loss' and method == 'influence'")
    assert len(chosen) == 1 and float(chosen.low.iloc[0]) < float(chosen.change.iloc[0])
    assert {"7–9", "pretrain", "test", "validation"} <= set(table.task.dropna())
    closer = table.query("kind == 'change' and against == 'loss' and measure == 'loss'")
    zero = closer[(closer.method == "loss") & closer.chosen.astype(bool)]
    assert float(zero.change.abs().max()) == 0
