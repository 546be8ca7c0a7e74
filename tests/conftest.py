"""Fixtures that the tests share: real data, and pipelines that take long to fit."""

import os

import pytest
import torch
from oracles import digits_pipeline

import msif_lab as msif
from msif_lab.data import sources

# The problems are tiny: two threads on a busy machine would take five times longer.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    """(train, test) of the bundled digits in float64."""
    return msif.load_digits(dtype=torch.float64)


@pytest.fixture(scope="session")
def digits_pair(digits):
    """A fitted pipeline for either way to finetune: with frozen and with proximal weights."""
    links = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.05)}
    return {name: digits_pipeline(digits, link).fit(progress=False) for name, link in links.items()}


def real_data(load, folder, classes):
    """``load`` with a cache in ``folder``, but from the user's own cache where there is one."""
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
    """`msif.load_mnist` on the real data, fetched once; skips where no source has them."""
    return real_data(msif.load_mnist, real_cache, (0,))


@pytest.fixture(scope="session")
def cifar10(real_cache):
    """`msif.load_cifar10` on the real data, fetched once; skips where no source has them."""
    return real_data(msif.load_cifar10, real_cache, ("frog",))
