"""From the files of text corpora to lines of labelled text, and back.

A corpus is kept as UTF-8, one line a text, of four columns between tabs: the position of its class
among ``DataSet.classes``, its document, its ratings, and the text. Document and ratings may be
empty; ratings are nine numbers: how many people answered −4, −3, ..., 4.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .formats import DataSet, named, read_content
from .texts import RATINGS, Texts

MOST_TEXT = 2 * 10**7  # bytes that a table may hold
# The letter of each genre in the names of the Brown corpus's files, and how many texts it has.
GENRES = {
    "news": ("a", 44),
    "editorial": ("b", 27),
    "reviews": ("c", 17),
    "religion": ("d", 17),
    "hobbies": ("e", 36),
    "lore": ("f", 48),
    "belles_lettres": ("g", 75),
    "government": ("h", 30),
    "learned": ("j", 80),
    "fiction": ("k", 29),
    "mystery": ("l", 24),
    "science_fiction": ("m", 6),
    "adventure": ("n", 29),
    "romance": ("p", 29),
    "humor": ("r", 9),
}
BROWN = tuple(f"c{letter}{i:02}" for letter, n in GENRES.values() for i in range(1, n + 1))
# The parts of the rated texts by our names and by the beginnings of their files' names.
REVIEWS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
SENTIMENTS = ("negative", "neutral", "positive")


def to_texts(raw: np.ndarray, classes: tuple) -> Texts:
    """The texts of a verified array of bytes; their ids are the positions of their lines."""
    lines = [line.split("\t") for line in raw.tobytes().decode().split("\n")]
    labels, documents, ratings, texts = zip(*lines, strict=True)
    return Texts(
        texts,
        [int(label) for label in labels],
        classes=classes,
        document=[int(d) for d in documents] if documents[0] else None,
        ratings=[[int(n) for n in row.split()] for row in ratings] if ratings[0] else None,
    )


def _bytes(lines: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def read_brown(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """The tagged files of the Brown corpus ("Form C"), one for each of its 500 texts."""
    letters = "".join(letter for letter, _ in GENRES.values())
    return [
        _bytes(
            f"{letters.index(path.name[1])}\t{document}\t\t{sentence}"
            for document, path in enumerate(paths)
            for sentence in named(_sentences, path)
        )
    ]


def _sentences(path: Path) -> list[str]:
    """The words of each line that is not blank, without the tags: ``The/at jury/nn said/vbd``."""
    sentences = []
    for line in read_content(path, 10**5).decode("ascii").split("\n"):  # the longest has 24 kB
        words = [word.rpartition("/")[0] for word in line.split()]  # "and/or" holds one too
        if not all(words):
            raise ValueError(f"it has words without a tag, in the line {line.strip()[:60]!r}")
        if words:
            sentences.append(" ".join(words))
    return sentences


def read_reviews(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """A file of texts and one of ratings for each part, joined by the name of the text.

    By that and not by the line: Amazon's two files are in different orders.
    """
    return [_rated(*pair) for pair in zip(paths[::2], paths[1::2], strict=True)]


def _rated(texts_path: Path, ratings_path: Path) -> np.ndarray:
    texts, ratings = named(_columns, texts_path, 3), named(_columns, ratings_path, 4)
    if texts.keys() != ratings.keys():
        odd = sorted(texts.keys() ^ ratings.keys())[:3]
        raise ValueError(f"{texts_path.name} and {ratings_path.name} do not both have {odd}")
    lines = []
    for name, text in texts.items():
        given = json.loads(ratings[name])
        counts = [given.count(rating) for rating in RATINGS]
        if not given or sum(counts) != len(given):
            raise ValueError(f"{ratings_path.name}: {name} is rated {ratings[name][:60]}")
        sign = (sum(given) > 0) - (sum(given) < 0)
        document, _, sentence = name.partition("_")  # "12_3": the third sentence of the twelfth
        document = str(int(document) - 1) if sentence else ""
        lines.append(f"{sign + 1}\t{document}\t{' '.join(map(str, counts))}\t{text.strip()}")
    return _bytes(lines)


def _columns(path: Path, count: int) -> dict[str, str]:
    """The last of ``count`` columns by the first."""
    lines = read_content(path, MOST_TEXT).decode("utf-8-sig").split("\r\n")
    rows = [line.split("\t") for line in lines if line]
    if bad := [i for i, row in enumerate(rows) if len(row) != count]:
        raise ValueError(f"line {bad[0] + 1} has {len(rows[bad[0]])} columns, not {count}")
    return {row[0]: row[-1] for row in rows}


def read_tab(data: DataSet, paths: Sequence[Path]) -> list[np.ndarray]:
    """Orange's tables of a category and a text, one file for each part."""
    return [named(_tab, path, data.classes) for path in paths]


def _tab(path: Path, classes: tuple) -> np.ndarray:
    lines = read_content(path, MOST_TEXT).decode("ascii").split("\n")
    if lines[:3] != ["Category\tText", "d\tstring", "class\t"]:
        raise ValueError(
            f"it is no table of categories and texts but starts with {lines[0][:60]!r}"
        )
    rows = [line.partition("\t") for line in lines[3:] if line]
    if unknown := sorted({category for category, _, _ in rows}.difference(classes)):
        raise ValueError(f"it has the categories {unknown[:3]}, which are none of {classes}")
    return _bytes(f"{classes.index(category)}\t\t\t{text.strip()}" for category, _, text in rows)
