"""Saved files: written whole or not at all, checked when read, and never a pickle.

They are in the safetensors format, whose reader and writer here take no copy of all tensors, and
check what a file declares before anything of that size is made.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock
import torch
from torch import Tensor

from .arguments import check_path
from .errors import SavedFileError

FORMAT = 3
LOOKED_AT = 64 * 10**6  # bytes of a tensor in a quick checksum
BLOCK = 2**20
PATIENCE = 600  # seconds to wait for a lock
MOST_HEADER = 10**8  # bytes, as in safetensors
YOUNG = 600  # seconds in which a temporary file is left alone
OLD = 86_400  # seconds after which another machine's temporary file is nobody's any more
# Format 1 (version 0.1.0) named each loss by the module it was then defined in.
_LOSSES = r"(?=(?:cross_entropy|mean_squared_error|next_token_loss)\b)"
_FORMER_NAMES = re.compile(rf"\bmsif_lab\.objective\.{_LOSSES}")
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


# ---- Digests ----


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the dtypes, shapes and bytes of tensors: same digest, same numbers."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(_kind(tensor.dtype, tensor.shape))
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _kind(dtype: torch.dtype, shape) -> bytes:
    return f"{dtype}{tuple(shape)}".encode()


def checksum(tensor: Tensor) -> int:
    """A quick checksum that tells whether a tensor was written into; of 64 MB of it at most."""
    flat = tensor.detach().reshape(-1)
    step = -(-len(flat) * tensor.element_size() // LOOKED_AT) or 1
    found = 0
    for block in flat[::step].split(2**18):  # evenly spaced numbers, gathered a few at a time
        found = zlib.crc32(_bytes(block), found)
    return found


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if len(flat) else b"")


# ---- Writing ----


def check_writable(path: str | os.PathLike) -> None:
    """Raise `OSError` before long work whose result could not be written to ``path``."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"{str(path)!r} is a device or pipe, no file; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(
            f"{str(path)!r}: the folder {str(path.parent)!r} cannot be written to"
        )


def _temporary_prefix(path: Path, host: str, process: str) -> str:
    """How names of temporary files for ``path`` start; short, whatever the length of its name."""
    short = [hashlib.sha256(word.encode()).hexdigest()[:10] for word in (path.name, host)]
    return f".msif-{short[0]}-{short[1]}-{process}-"


def remove_debris(path: str | os.PathLike, alone: bool = False) -> None:
    """Delete the temporary files of writers of ``path`` that were killed.

    Args:
        path: of the file.
        alone: whether nobody else can be writing, as under a lock that every writer takes.
    """
    path = Path(os.path.realpath(path))
    here, now = _temporary_prefix(path, socket.gethostname(), ""), time.time()
    anywhere = here.rsplit("-", 3)[0]
    for left in path.parent.glob(f"{anywhere}-*"):
        process = left.name.split("-")[3]
        mine = left.name.startswith(here[:-1])
        with contextlib.suppress(OSError):  # somebody else has deleted it
            # Containers may share a host's name, but not its processes.
            age = now - left.stat().st_mtime
            if alone or age > OLD or (mine and age > YOUNG and not _alive(process)):
                left.unlink()


def _alive(process: str) -> bool:
    if os.name != "posix":  # where a signal of 0 is no question
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` in one step when all of it is written.

    Readers see the old content or the new one, never a part. A link stays and what it points to is
    replaced; permissions are those of the old file, else of any new one.
    """
    check_path("path", path)
    check_writable(path)
    path = Path(os.path.realpath(path))
    remove_debris(path)
    prefix = _temporary_prefix(path, socket.gethostname(), str(os.getpid()))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
        else:  # mkstemp makes the file private
            umask = os.umask(0)
            os.umask(umask)
            mode = 0o666 & ~umask
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network folders cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike, content: bytes) -> Path:
    """Write a file in one step; see `replacing`."""
    with replacing(path) as file:
        file.write(content)
    return Path(path)


def write_tensors(
    path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], facts: dict
) -> Path:
    """Write named tensors and JSON-able ``facts`` as one safetensors file with a checksum."""
    header = json.dumps({"kind": kind, "format": FORMAT, "facts": facts}, sort_keys=True)
    names = sorted(tensors)
    sums = hashlib.sha256(f"{names}{header}".encode())
    sums.update(digest(*(tensors[name] for name in names)).encode())
    entries: dict = {"__metadata__": {"msif_lab": header, "sha256": sums.hexdigest()}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name} is {tensor.dtype}, which safetensors files cannot hold")
        shape, offsets = list(tensor.shape), [start, end]
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    table = json.dumps(entries).encode()
    table += b" " * (-len(table) % 8)
    with replacing(path) as file:
        file.write(len(table).to_bytes(8, "little"))
        file.write(table)
        for name in names:
            file.write(_bytes(tensors[name]))
    return Path(path)


# ---- Reading ----


def read_tensors(
    path: str | os.PathLike, kind: str, most: int | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Read a file of `write_tensors`: the tensors and the facts.

    Args:
        path: of the file.
        kind: what it should hold.
        most: bytes of tensors that are expected at most; default any number.

    Raises:
        FileNotFoundError: there is no such file.
        SavedFileError: the file cannot be read, is cut off, changed, of another kind or not of
            msif_lab.
    """
    check_path("path", path)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file")
    if not path.is_file():
        raise SavedFileError(f"{str(path)!r} is a folder, device or pipe, no file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise SavedFileError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    with file:
        entries, metadata, start = _table(path, file)
        header = metadata.get("msif_lab")
        if header is None:
            raise SavedFileError(
                f"{str(path)!r} was not written by msif_lab; "
                "load foreign weights into the model yourself"
            )
        declared = sum(end - begin for _, _, begin, end in entries.values())
        if most is not None and declared > most:
            raise SavedFileError(
                f"{str(path)!r} declares {declared / 1e6:,.0f} MB of tensors where at most "
                f"{most / 1e6:,.0f} MB are expected; it is of something else"
            )
        # Before anything as large as the file is made.
        sums = hashlib.sha256(f"{sorted(entries)}{header}".encode())
        sums.update(_digest_of_file(file, entries, start).encode())
        if metadata.get("sha256") != sums.hexdigest():
            raise SavedFileError(
                f"{str(path)!r} was changed after it was written (checksum differs); save it again"
            )
        facts = _facts(path, header, kind)
        tensors = {}
        for name, (dtype, shape, begin, _) in entries.items():
            with valid(path):
                tensors[name] = torch.empty(shape, dtype=dtype)
            if tensors[name].numel():
                file.seek(start + begin)
                if file.readinto(_bytes(tensors[name])) != tensors[name].nbytes:
                    raise SavedFileError(f"{str(path)!r} was cut off while it was read")
    return tensors, facts


def _table(path: Path, file: BinaryIO) -> tuple[dict[str, tuple], dict, int]:
    """What a file declares: dtype, shape and place of each tensor, its metadata, where data start.

    Raises:
        SavedFileError: more than the file holds, or nothing that makes sense.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, size - 8):
            raise ValueError("its header is longer than the file")
        declared = json.loads(file.read(length))
        metadata = declared.pop("__metadata__", {})
        entries = {name: _entry(entry) for name, entry in declared.items()}
        places = sorted((begin, end) for _, _, begin, end in entries.values())
        ends = [0, *(end for _, end in places)]
        if [begin for begin, _ in places] != ends[:-1] or ends[-1] != size - 8 - length:
            raise ValueError("its tensors do not fill it")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no text")
        "".join([*declared, *metadata.values()]).encode()  # no half characters
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise SavedFileError(
            f"{str(path)!r} is cut off or is not a safetensors file ({error}); "
            "save it again from its source"
        ) from error
    return entries, metadata, 8 + length


def _entry(entry: dict) -> tuple[torch.dtype, list[int], int, int]:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(shape) > 64:
        raise ValueError("a shape or place is no whole number")
    dtype = TYPES[entry["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("a tensor's shape and place do not fit")
    return dtype, shape, begin, end


def _digest_of_file(file: BinaryIO, entries: dict[str, tuple], start: int) -> str:
    """`digest` of a file's tensors in the order of their names, a block at a time."""
    sha = hashlib.sha256()
    for name in sorted(entries):
        dtype, shape, begin, end = entries[name]
        sha.update(_kind(dtype, shape))
        file.seek(start + begin)
        for at in range(begin, end, BLOCK):
            sha.update(file.read(min(BLOCK, end - at)))
    return sha.hexdigest()


def _facts(path: Path, header: str, kind: str) -> dict:
    """The facts in a file's header, of this kind and a format that is known."""
    try:
        facts = json.loads(header)
        if facts["format"] == 1:
            facts = json.loads(_FORMER_NAMES.sub("msif_lab.", header))
        newer, found, inside = facts["format"] > FORMAT, facts["kind"], facts["facts"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SavedFileError(f"{str(path)!r} has a damaged header ({error})") from error
    if newer:
        raise SavedFileError(
            f"{str(path)!r} has format {facts['format']}, "
            f"this msif_lab reads up to {FORMAT}; update"
        )
    if found != kind or not isinstance(inside, dict):
        raise SavedFileError(f"{str(path)!r} holds a saved {found}, not a {kind}")
    return inside


@contextlib.contextmanager
def valid(path: str | os.PathLike) -> Iterator[None]:
    """Turn what is wrong with the content of an undamaged file into `SavedFileError`."""
    try:
        yield
    except SavedFileError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise SavedFileError(
            f"{str(path)!r} is whole, but does not hold what it should: "
            f"{type(error).__name__}: {error}"
        ) from error


# ---- Sharing ----


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Alone among all processes that lock ``path``, on network folders too where these can lock.

    A file of its name, hidden and with ``.lock`` behind, stays.
    """
    path = Path(os.path.realpath(path))
    name = f".{path.name}.lock"
    if len(name.encode()) > 255:
        name = f".msif-{hashlib.sha256(path.name.encode()).hexdigest()[:20]}.lock"
    try:
        try:
            lock = filelock.FileLock(path.parent / name, timeout=PATIENCE)
            lock.acquire()
        except (PermissionError, filelock.Timeout):
            raise
        except (NotImplementedError, OSError):  # a network folder without locks
            lock = filelock.SoftFileLock(path.parent / f"{name}.soft", timeout=PATIENCE)
            lock.acquire()
    except filelock.Timeout as error:
        raise SavedFileError(
            f"{str(path)!r} has been locked by another process for {PATIENCE} s; if there is none, "
            f"delete {error.lock_file!r}"
        ) from error
    try:
        yield
    finally:
        lock.release()
