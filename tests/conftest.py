"""Small real and random problems shared by the tests; everything in float64 unless a test says
otherwise.
"""

import os

import pytest
import torch

import msif_lab as msif
from msif_lab.data import sources

# these problems are tiny, and two threads on a busy machine cost five times more
torch.set_num_threads(1)


def random_examples(n, shape, outputs, regression, seed):
    """A learnable random task: targets from a fixed random teacher plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = draw(n, *shape)
    scores = x.flatten(1) @ draw(x[0].numel(), outputs) / x[0].numel() ** 0.5 + 0.3 * draw(
        n, outputs
    )
    return msif.Examples(x, torch.tanh(scores) if regression else scores.argmax(1))


def random_model(kind, outputs, seed):
    """A tiny net on inputs of shape (1, 4, 4)."""
    if kind == "mlp":
        return msif.mlp(16, hidden=(4,), classes=outputs, seed=seed).double()
    return msif.convnet((1, 4, 4), channels=(2,), width=4, classes=outputs, seed=seed).double()


def random_pipeline(kind="mlp", regression=False, link=None, k=2, weight_decay=5e-2, fit=True):
    """k stages on different random tasks with 3, 2, 3, ... outputs."""
    loss = msif.mean_squared_error if regression else msif.cross_entropy
    stages = []
    for i in range(k):
        outputs = 3 - i % 2
        data = random_examples(24 - 4 * i, (1, 4, 4), outputs, regression, seed=10 + i)
        model = random_model(kind, outputs, seed=i)
        stages.append(msif.Stage(f"stage{i}", model, data, loss, weight_decay, link if i else None))
    pipeline = msif.Pipeline(stages)
    return pipeline.fit(progress=False) if fit else pipeline


def random_queries(pipeline, n=5):
    """Fresh examples of the last stage's task."""
    data = pipeline.stages[-1].data
    outputs = data.y.shape[1] if data.y.ndim == 2 else len(data.classes)
    return random_examples(n, tuple(data.x.shape[1:]), outputs, data.y.ndim == 2, seed=99)


@pytest.fixture(scope="session")
def digits():
    """(train, test) of the bundled digits in float64."""
    return msif.load_digits(dtype=torch.float64)


def digits_pipeline(digits, link, hidden=16, seed=0, recipe=None, weight_decay=1e-2):
    """The issue's setting: pretrain 0-3 on 400, finetune 4-9 on 200."""
    train, _ = digits
    recipe = recipe or msif.LBFGS()
    return msif.Pipeline(
        [
            msif.Stage(
                "pretrain",
                msif.mlp(64, hidden=(hidden,), classes=4, seed=seed).double(),
                train.select(classes=(0, 1, 2, 3), n=400, seed=seed),
                weight_decay=weight_decay,
                recipe=recipe,
            ),
            msif.Stage(
                "finetune",
                msif.mlp(64, hidden=(hidden,), classes=6, seed=seed).double(),
                train.select(classes=(4, 5, 6, 7, 8, 9), n=200, seed=seed),
                weight_decay=weight_decay,
                link=link,
                recipe=recipe,
            ),
        ]
    )


@pytest.fixture(scope="session")
def digits_pair(digits):
    """Both of the paper's cases, fitted."""
    links = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.05)}
    return {name: digits_pipeline(digits, link).fit(progress=False) for name, link in links.items()}


def real_data(load, folder, classes):
    """``load`` with a cache in ``folder``; the user's own one, if there is one, saves the download."""
    own = sources._cache_folder()
    usual = {"root": own} if own.is_dir() and not os.environ.get("MSIF_DATA") else {}

    def loader(**settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            return load(**usual | {"progress": False} | settings)

    try:
        loader(classes=classes)
    except msif.DataUnavailableError as error:
        pytest.skip(str(error))
    return loader


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def mnist(real_cache):
    """`msif.load_mnist` on the real data, fetched once a session; skips where no source has them."""
    return real_data(msif.load_mnist, real_cache, (0,))


@pytest.fixture(scope="session")
def cifar10(real_cache):
    """`msif.load_cifar10` on the real data, fetched once a session; skips where no source has them."""
    return real_data(msif.load_cifar10, real_cache, ("frog",))
