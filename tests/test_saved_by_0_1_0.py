"""Files that version 0.1.0 wrote still load, with the numbers it wrote.

That version made the folder `saved_by_0_1_0` by ``save(FOLDER)``; no test writes into it.
"""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import msif_lab as msif
from msif_lab.fingerprints import describe, same_by_name

FOLDER = Path(__file__).parent / "saved_by_0_1_0"
SUBSETS = [[0], [3], [1, 5]]


def numbers(count, width, seed):
    """Sixteenths from a linear congruence: the same bits on every machine and in every version."""
    return ((torch.arange(count * width) * 7 + 13 * seed) % 17).double().reshape(count, width) / 16


def labelled(count, seed):
    return msif.Examples(
        numbers(count, 3, seed), torch.arange(count) * 5 % 3, 100 * seed + torch.arange(count)
    )


def measured(count, seed):
    return msif.Examples(
        numbers(count, 3, seed), numbers(count, 2, seed + 1), 100 * seed + torch.arange(count)
    )


def written(count, seed):
    tokens = (torch.arange(count * 4) * 3 + seed) % 5
    return msif.Examples(
        tokens.reshape(count, 4), tokens.reshape(count, 4), 100 * seed + torch.arange(count)
    )


def language_model():
    return msif.EmbeddingHead(nn.Embedding(5, 3), nn.Linear(3, 5)).double()


def proximal():
    """Cross-entropy at an optimum."""
    nets = [msif.mlp(3, hidden=(2,), classes=3).double() for _ in range(2)]
    first = msif.Stage("pretrain", nets[0], labelled(12, 1), weight_decay=1e-1)
    last = msif.Stage(
        "finetune", nets[1], labelled(9, 2), weight_decay=1e-1, link=msif.Proximal(0.5)
    )
    return msif.Pipeline([first, last]), labelled(4, 3)


def warm_start():
    """Squared error, stopped early."""
    recipe = msif.SGD(lr=0.1, epochs=3, batch_size=4, schedule="linear", warmup=2)
    nets = [msif.mlp(3, hidden=(2,), classes=2).double() for _ in range(2)]
    settings = {"loss": msif.mean_squared_error, "recipe": recipe, "weight_decay": 1e-2}
    first = msif.Stage("pretrain", nets[0], measured(12, 1), **settings)
    last = msif.Stage("finetune", nets[1], measured(8, 2), link=msif.WarmStart(), **settings)
    return msif.Pipeline([first, last]), measured(4, 3)


def frozen():
    """Next tokens, Adam."""
    settings = {"loss": msif.next_token_loss, "recipe": msif.Adam(lr=0.05, epochs=2, batch_size=4)}
    first = msif.Stage("pretrain", language_model(), written(8, 1), **settings)
    last = msif.Stage("finetune", language_model(), written(8, 2), link=msif.Frozen(), **settings)
    return msif.Pipeline([first, last]), written(3, 3)


PIPELINES = {"proximal": proximal, "warm_start": warm_start, "frozen": frozen}


def attributor(name):
    return msif.ImplicitInfluence() if name == "proximal" else msif.UnrolledInfluence()


def removals(pipeline, queries, store):
    return msif.removal_effects(
        pipeline, queries, SUBSETS, protocol="same-seed", store=store, progress=False
    )


def save(folder):
    for name, build in PIPELINES.items():
        pipeline, queries = build()
        pipeline.fit(progress=False).save(folder / f"{name}.pipeline.safetensors")
        scores = attributor(name).fit(pipeline).score(queries)
        scores.save(folder / f"{name}.scores.safetensors")
        effects = removals(pipeline, queries, folder / f"{name}.store.safetensors")
        effects.save(folder / f"{name}.effects.safetensors")
        told = {
            "queries": pipeline.evaluate(queries).tolist(),
            "scores": scores.values.tolist(),
            "effects": effects.values.tolist(),
        }
        (folder / f"{name}.json").write_text(json.dumps(told))


def near(one, other):
    """Equal up to the rounding of another processor, on which the numbers were computed again."""
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PIPELINES)
def test_everything_that_0_1_0_saved_still_loads(name, tmp_path, monkeypatch):
    for file in FOLDER.glob(f"{name}.*"):
        shutil.copy(file, tmp_path)
    told = json.loads((tmp_path / f"{name}.json").read_text())
    told = {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in told.items()}

    pipeline, queries = PIPELINES[name]()
    pipeline.load(tmp_path / f"{name}.pipeline.safetensors")
    assert near(pipeline.evaluate(queries), told["queries"])
    assert near(attributor(name).fit(pipeline).score(queries).values, told["scores"])

    scores = msif.Influence.load(tmp_path / f"{name}.scores.safetensors")
    assert torch.equal(scores.values, told["scores"])
    assert torch.equal(scores.query_ids, queries.ids)
    assert (scores.stage, scores.target) == ("pretrain", "loss")

    effects = msif.Effects.load(tmp_path / f"{name}.effects.safetensors")
    assert torch.equal(effects.values, told["effects"])
    assert effects.subsets == SUBSETS

    store = tmp_path / f"{name}.store.safetensors"
    with pytest.raises(msif.SavedFileError, match="another pipeline, queries or subsets"):
        removals(pipeline, queries[:2], store)
    monkeypatch.setattr(msif.Pipeline, "retrain", None)  # all is stored, nothing is trained again
    assert near(removals(pipeline, queries, store).values, told["effects"])


def test_pipeline_with_another_loss_is_still_refused(tmp_path):
    shutil.copy(FOLDER / "warm_start.pipeline.safetensors", tmp_path)
    pipeline, _ = warm_start()
    pipeline.stages[0].loss = lambda outputs, targets: msif.mean_squared_error(outputs, targets) * 2
    with pytest.raises(msif.SavedFileError, match="loss"):
        pipeline.load(tmp_path / "warm_start.pipeline.safetensors")


def smooth(loss):
    def smoothed(outputs, targets):
        return 0.9 * loss(outputs, targets)

    return smoothed


def test_functions_of_ones_own_are_taken_by_their_name(tmp_path):
    """That version looked at less of them, so what it wrote cannot be compared with today's."""
    loss = smooth(msif.mean_squared_error)
    assert same_by_name(describe(loss), "smoothed#512e609ee258")
    assert not same_by_name(describe(loss), "rough#512e609ee258")


def test_functions_of_a_package_that_is_not_imported_itself_are_described(monkeypatch):
    """As of a file loaded by its path: `describe` must not look for its package."""

    def made(column):
        module = types.ModuleType("nowhere.losses")
        exec(f"def loss(outputs, targets):\n    return outputs[:, {column}]", vars(module))
        module.loss.__module__ = "nowhere.losses"
        monkeypatch.setitem(sys.modules, "nowhere.losses", module)
        return module.loss

    assert describe(made(0)) == describe(made(0)) != describe(made(1))


def test_a_users_own_words_are_left_as_they_are(tmp_path):
    name = "after msif_lab.objective.cross_entropy"
    scores = msif.Influence(torch.zeros(1, 2), torch.arange(2), torch.arange(1), stage=name)
    scores.save(tmp_path / "scores")
    assert msif.Influence.load(tmp_path / "scores").stage == name
