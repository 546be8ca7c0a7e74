"""Damaged and hostile files: each refused by our own errors, quickly and in little memory, or read.

Some here; all formats with a thousand damages and more by MSIF_FUZZ=150 pytest tests/test_fuzz.py.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import msif_lab as msif
from msif_lab.data import formats, sources
from msif_lab.data.formats import ARRAYS, DataSet
from msif_lab.storage import write_tensors

ROUNDS = int(os.environ.get("MSIF_FUZZ", "6"))
SECONDS, MEGABYTES = 2.0, 300.0
COUNTS, SHAPE = (50, 10), (32, 32, 3)
draw = np.random.default_rng(0)
IMAGES = [draw.integers(0, 256, (n, *SHAPE), np.uint8) for n in COUNTS]
LABELS = [draw.integers(0, 10, n, np.uint8) for n in COUNTS]
ORIGINAL = [IMAGES[0], LABELS[0], IMAGES[1], LABELS[1]]
SPRITES = (*(f"train_{i}.png" for i in range(5)), "test.png", "train.json", "test.json")
BATCHES = (*(f"batch_{i}.bin" for i in range(5)), "test.bin")
IDX = ("a-idx3-ubyte", "b-idx1-ubyte", "c-idx3-ubyte", "d-idx1-ubyte")


def data_set():
    sums = tuple(formats._sha256(array) for array in ORIGINAL)
    forms = (
        (IDX, formats.read_idx),
        (BATCHES, formats.read_binary),
        (SPRITES, formats.read_sprites),
    )
    return DataSet(
        "Tiny", "tiny", tuple(range(10)), COUNTS, SHAPE, sums, forms, ("tiny.tgz",), "", list, "it"
    )


HUMAN = dict(zip(formats.LABELS, draw.integers(0, 10, (6, 50), np.uint8), strict=True))


def human_data():
    sums = tuple(formats._sha256(labels) for labels in HUMAN.values())
    forms = ((("CIFAR-10_human.pt",), formats.read_human),)
    names = tuple(f"{name}-labels" for name in HUMAN)
    about = "Human", "human", tuple(range(10)), (50, 0), (), sums, forms, ("n.whl", "n.zip"), ""
    return DataSet(*about, list, "it", names)


# ---- Whole files of every format ----


def idx(array):
    head = struct.pack(f">3xB{array.ndim}I", array.ndim, *array.shape)
    return b"\0\0\x08" + head[3:] + array.tobytes()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(images):
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(len(images), 1024, 3)).save(buffer, "png")
    return buffer.getvalue()


def rows(images, labels):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], planes], 1).astype(np.uint8).tobytes()


def parts():
    """Training images and labels in five batches, then the test's."""
    return [
        *zip(np.split(IMAGES[0], 5), np.split(LABELS[0], 5), strict=True),
        (IMAGES[1], LABELS[1]),
    ]


def archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def whole_files():
    """By format: file names and contents from which the data set can be read."""
    sprites = dict(zip(SPRITES, [png(images) for images, _ in parts()], strict=False))
    sprites |= dict(
        zip(SPRITES[-2:], [json.dumps(part.tolist()).encode() for part in LABELS], strict=True)
    )
    idx_files = dict(zip(IDX, map(idx, ORIGINAL), strict=True))
    return {
        "npy": {f"tiny-{name}.npy": npy(a) for name, a in zip(ARRAYS, ORIGINAL, strict=True)},
        "idx": idx_files,
        "idx.gz": {f"{name}.gz": gzip.compress(c) for name, c in idx_files.items()},
        "binary": dict(zip(BATCHES, [rows(*part) for part in parts()], strict=True)),
        "png and json": sprites,
        "tgz": {"tiny.tgz": archive(sprites)},
    }


def zipped(files, **settings):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **settings) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def human_files():
    """The forms of human labels, each from the file of PyTorch in it."""
    arrays = {formats.LABELS[name]: labels.astype("i8") for name, labels in HUMAN.items()}
    content = pickle.dumps(arrays, protocol=2).replace(b"numpy._core", b"numpy.core")
    pt = zipped({"archive/data.pkl": content, "archive/version": b"3\n"})
    inner = zipped({"CIFAR-N/CIFAR-10_human.pt": pt}, compression=zipfile.ZIP_DEFLATED)
    return pt, {
        "pt": {"CIFAR-10_human.pt": pt},
        "zip": {"n.zip": inner},
        "wheel": {"n.whl": zipped({"package/n.zip": inner})},
    }


def damaged(content, kind, dice):
    """A file with some of its bits or bytes changed."""
    content = bytearray(content)
    place = dice.randrange(len(content))
    early = dice.randrange(min(200, len(content)))  # headers are short
    if kind == "bit":
        content[early] ^= 1 << dice.randrange(8)
    elif kind == "late bit":
        content[place] ^= 1 << dice.randrange(8)
    elif kind == "cut off":
        del content[place:]
    elif kind == "bytes":
        content[early : early + 8] = dice.randbytes(8)
    elif kind == "twice":
        content = content * 2
    elif kind == "gone":
        content = b""
    else:
        content = dice.randbytes(len(content))
    return bytes(content)


KINDS = ("bit", "late bit", "cut off", "bytes", "twice", "gone", "noise")


class Budget:
    """Whether what happens inside takes little time, and little memory beyond what is held."""

    def __enter__(self):
        self.reset = Path("/proc/self/clear_refs")
        if self.reset.exists():
            self.reset.write_text("5")
        self.start, self.before = time.process_time(), psutil.Process().memory_info().rss
        return self

    def __exit__(self, kind, error, trace):
        assert time.process_time() - self.start < SECONDS
        if self.reset.exists():
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(int(line.split()[1]) * 1e3 for line in lines if line.startswith("VmHWM"))
            assert (peak - self.before) / 1e6 < MEGABYTES


def read(folder, data=None, original=ORIGINAL):
    """``"refused"``, or ``"read"`` where the original bytes came out."""
    with Budget(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            arrays = sources._read(data or data_set(), folder)
        except sources._Absent:
            return "refused"
    assert all(map(np.array_equal, arrays, original))
    return "read"


def read_human(folder):
    return read(folder, human_data(), HUMAN.values())


def put(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("form", whole_files())
def test_damaged_data_files_are_refused_or_harmless(form, tmp_path):
    files = whole_files()[form]
    assert read(put(tmp_path / "whole", files)) == "read"
    dice, found = random.Random(form), []
    for i in range(ROUNDS):
        for kind in KINDS:
            name = dice.choice(sorted(files))
            spoilt = files | {name: damaged(files[name], kind, dice)}
            found.append(read(put(tmp_path / f"{i} {kind}", spoilt)))
    assert found.count("refused") > len(found) / 3


@pytest.mark.parametrize("form", ("pt", "zip", "wheel"))
def test_damaged_human_labels_are_refused_or_harmless(form, tmp_path, monkeypatch):
    pt, files = human_files()[0], human_files()[1][form]
    monkeypatch.setattr(formats, "HUMAN_SHA256", hashlib.sha256(pt).hexdigest())
    assert read_human(put(tmp_path / "whole", files)) == "read"
    dice, found = random.Random(form), []
    (name,) = files
    for i in range(ROUNDS):
        for kind in KINDS:
            spoilt = {name: damaged(files[name], kind, dice)}
            found.append(read_human(put(tmp_path / f"{i} {kind}", spoilt)))
    assert found.count("refused") > len(found) / 3


def sparse(path, size, start=b""):
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def bomb(size, start=b""):
    """A gzip file that unpacks to so many zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(10**6)
    packed = [packer.compress(start), *(packer.compress(block) for _ in range(size // len(block)))]
    return b"".join([*packed, packer.flush()])


def bombed_tar():
    """Claims a member of 3 GB, of which nothing follows."""
    member = tarfile.TarInfo("package/a-idx3-ubyte")
    member.size = 3 * 10**9
    return gzip.compress(member.tobuf() + bytes(1024))


def huge_png():
    """Claims 60,000 × 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


HOSTILE = {
    "sparse idx": ("idx", IDX[0], lambda p: sparse(p, 3 * 10**9, b"\0\0\x08\x01\xb2\xd0\x5e\0")),
    "sparse binary": ("binary", BATCHES[0], lambda p: sparse(p, 3073 * 10**6)),
    "sparse npy": ("npy", "tiny-train-images.npy", lambda p: sparse(p, 3 * 10**9, npy(IMAGES[0]))),
    "sparse json": ("png and json", SPRITES[-1], lambda p: sparse(p, 3 * 10**9, b"[")),
    "sparse archive": ("tgz", "tiny.tgz", lambda p: sparse(p, 3 * 10**9)),
    "gzip bomb": ("idx.gz", f"{IDX[0]}.gz", lambda p: p.write_bytes(bomb(10**9, b"\0\0\x08\x01"))),
    "archive bomb": ("tgz", "tiny.tgz", lambda p: p.write_bytes(bombed_tar())),
    "png bomb": ("png and json", SPRITES[0], lambda p: p.write_bytes(huge_png())),
    "deep json": ("png and json", SPRITES[-1], lambda p: p.write_bytes(b"[" * 10**6)),
    "words as labels": ("png and json", SPRITES[-1], lambda p: p.write_bytes(b'["a"]')),
    "objects": ("npy", "tiny-test-labels.npy", lambda p: p.write_bytes(npy(np.array([{}])))),
    "no header": ("npy", "tiny-test-labels.npy", lambda p: p.write_bytes(header(b"{'descr': "))),
    "deep header": ("npy", "tiny-test-labels.npy", lambda p: p.write_bytes(header(b"(" * 9000))),
    "huge shape": (
        "npy",
        "tiny-test-labels.npy",
        lambda p: p.write_bytes(
            header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000,)}\n")
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_data_files_are_refused(name, tmp_path):
    form, file, make = HOSTILE[name]
    folder = put(tmp_path / "data", whole_files()[form])
    make(folder / file)
    assert read(folder) == "refused"


def crowded(count):
    """A zip file of so many empty members."""
    return zipped({str(i): b"" for i in range(count)})


def claiming(content, at, size):
    """A zip file that claims another size: of its table (12 in its end), where it is (16)."""
    end = content.rindex(b"PK\5\6") + at
    return content[:end] + struct.pack("<I", size) + content[end + 4 :]


HOSTILE_ZIPS = {
    "bomb": lambda pt: zipped({pt: bytes(10**9)}, compression=zipfile.ZIP_DEFLATED),
    "crowded": lambda pt: crowded(40_000),
    "crowded and large": lambda pt: crowded(50_000),
    "huge table": lambda pt: claiming(zipped({pt: b"1"}), 12, 2**32 - 1),
    "table elsewhere": lambda pt: claiming(zipped({pt: b"1"}), 16, 2**31),
    "link out": lambda pt: zipped({f"../../{pt}": b"1", f"/{pt}": b"2"}),
    "folder": lambda pt: zipped({f"{pt}/": b""}),
    "itself": lambda pt: zipped({"n.zip": zipped({"n.zip": b"PK", "n.whl": b"PK"})}),
}


@pytest.mark.parametrize("name", HOSTILE_ZIPS)
@pytest.mark.parametrize("file", ["n.whl", "n.zip"])
def test_hostile_zip_files_are_refused(name, file, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).write_bytes(HOSTILE_ZIPS[name]("CIFAR-10_human.pt"))
    assert read_human(tmp_path / "data") == "refused"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [file]


def test_a_sparse_zip_file_is_refused(tmp_path):
    sparse(tmp_path / "n.zip", 3 * 10**9, b"PK\3\4")
    assert read_human(tmp_path) == "refused"


# ---- Saved results ----


def saved(folder):
    """A file of every kind, with what reads it."""
    stage = msif.Stage(
        "one", msif.mlp(4, (3,), classes=2), msif.Examples(torch.eye(4), [0, 1, 0, 1])
    )
    pipeline = msif.Pipeline([stage]).adopt()
    pipeline.save(folder / "pipeline")
    scores = msif.GradientDot().fit(pipeline).score(stage.data)
    scores.save(folder / "influence")
    effects = msif.Effects.from_values([0.0] * 4, torch.ones(4, 3), [0, 1, [2, 3]], like=scores)
    effects.save(folder / "effects")
    return {
        "pipeline": pipeline.load,
        "influence": msif.Influence.load,
        "effects": msif.Effects.load,
    }


def test_damaged_saved_files_are_refused_or_harmless(tmp_path):
    dice, found = random.Random(1), []
    for name, load in saved(tmp_path).items():
        content = (tmp_path / name).read_bytes()
        for _ in range(ROUNDS):
            for kind in KINDS:
                (tmp_path / "spoilt").write_bytes(damaged(content, kind, dice))
                with Budget():
                    try:
                        load(tmp_path / "spoilt")
                        found.append("read")
                    except msif.SavedFileError:
                        found.append("refused")
    assert found.count("refused") > 0.9 * len(found)


def declaring(entries, metadata=None, tail=b""):
    table = json.dumps({"__metadata__": metadata or {"msif_lab": "{}"}} | entries).encode()
    return len(table).to_bytes(8, "little") + table + tail


F32 = {"dtype": "F32"}
LYING = {
    "length": (2**63).to_bytes(8, "little") + b"{}",
    "longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "no json": (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
    "deep json": (10**6).to_bytes(8, "little") + b"[" * 10**6,
    "no table": (2).to_bytes(8, "little") + b"[]",
    "negative": declaring({"x": F32 | {"shape": [-1], "data_offsets": [0, -4]}}),
    "huge": declaring({"x": F32 | {"shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
    "huge product": declaring({"x": F32 | {"shape": [2**40, 2**40], "data_offsets": [0, 4]}}),
    "overlap": declaring(
        {n: F32 | {"shape": [1], "data_offsets": [0, 4]} for n in "xy"}, tail=bytes(4)
    ),
    "hole": declaring({"x": F32 | {"shape": [1], "data_offsets": [4, 8]}}, tail=bytes(8)),
    "tail": declaring({"x": F32 | {"shape": [1], "data_offsets": [0, 4]}}, tail=bytes(9)),
    "unknown type": declaring(
        {"x": {"dtype": "C64", "shape": [], "data_offsets": [0, 8]}}, tail=bytes(8)
    ),
    "words": declaring({"x": F32 | {"shape": ["1"], "data_offsets": [0, 4]}}, tail=bytes(4)),
    "no offsets": declaring({"x": F32 | {"shape": [1]}}, tail=bytes(4)),
    "metadata of numbers": declaring({}, {"msif_lab": 3}),
    "half a character": declaring({}, {"msif_lab": "\ud800"}),
    "overflow": declaring({"x": F32 | {"shape": [2**61, 2**61, 0], "data_offsets": [0, 0]}}),
}


@pytest.mark.parametrize("name", LYING)
def test_files_that_lie_about_themselves_are_refused(name, tmp_path):
    (tmp_path / "file").write_bytes(LYING[name])
    for load in (msif.Influence.load, msif.Effects.load):
        with Budget(), pytest.raises(msif.SavedFileError):
            load(tmp_path / "file")


def test_a_sparse_file_that_claims_gigabytes_is_refused_before_they_are_read(tmp_path):
    entry = {"x": F32 | {"shape": [75 * 10**7], "data_offsets": [0, 3 * 10**9]}}
    head = declaring(entry, {"msif_lab": "{}", "sha256": "0" * 64})
    sparse(tmp_path / "file", len(head) + 3 * 10**9, head)
    path = tmp_path / "file"
    before = psutil.Process().memory_info().rss
    with pytest.raises(msif.SavedFileError, match="checksum differs"):
        msif.Influence.load(path)
    assert psutil.Process().memory_info().rss - before < MEGABYTES * 1e6
    saved(tmp_path)
    stage = msif.Stage(
        "one", msif.mlp(4, (3,), classes=2), msif.Examples(torch.eye(4), [0, 1, 0, 1])
    )
    with Budget(), pytest.raises(msif.SavedFileError, match=r"3,000 MB .* expected"):
        msif.Pipeline([stage]).load(path)


INFLUENCE = {"stage": "one", "target": "loss", "method": "m", "aggregate": ""}
WRONG = {
    "NaN": ({"values": torch.full((2, 3), torch.nan)}, {}),
    "shape": ({"values": torch.ones(3, 2)}, {}),
    "empty": ({"values": torch.ones(0, 0)}, {}),
    "one axis": ({"values": torch.ones(6)}, {}),
    "missing": ({"values": None}, {}),
    "unknown fact": ({}, {"colour": "red"}),
    "no origin": ({}, {"origin": [1]}),
    "half an origin": ({}, {"origin": {"stages": {}}}),
}


@pytest.mark.parametrize("name", WRONG)
def test_valid_files_with_wrong_content_are_refused(name, tmp_path):
    tensors, facts = WRONG[name]
    whole = {"values": torch.ones(2, 3), "ids": torch.arange(3), "query_ids": torch.arange(2)}
    write_tensors(tmp_path / "file", "influence", whole, INFLUENCE)
    assert msif.Influence.load(tmp_path / "file").values.shape == (2, 3)
    changed = {name: t for name, t in (whole | tensors).items() if t is not None}
    write_tensors(tmp_path / "file", "influence", changed, INFLUENCE | facts)
    with pytest.raises(msif.SavedFileError):
        msif.Influence.load(tmp_path / "file")
