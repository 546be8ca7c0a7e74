"""Saved files: written whole or not at all, checked when read, and never a pickle."""

import hashlib
import json
import os
import re
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from .errors import SavedFileError

FORMAT = 2
LOOKED_AT = 64 * 10**6  # bytes of a tensor in a quick checksum
# Format 1 (version 0.1.0) named each loss by the module it was then defined in.
_LOSSES = r"(?=(?:cross_entropy|mean_squared_error|next_token_loss)\b)"
_FORMER_NAMES = re.compile(rf"\bmsif_lab\.objective\.{_LOSSES}")


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the dtypes, shapes and bytes of tensors: same digest, same numbers."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def checksum(tensor: torch.Tensor) -> int:
    """A quick checksum that tells whether a tensor was written into; of 64 MB of it at most."""
    tensor = tensor.detach()
    step = -(-tensor.numel() * tensor.element_size() // LOOKED_AT) or 1
    if step > 1 and tensor.ndim:  # evenly spaced rows
        tensor = tensor[::step]
    return zlib.crc32(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if len(flat) else b"")


def check_writable(path: str | os.PathLike) -> None:
    """Raise `OSError` before long work whose result could not be written to ``path``."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(
            f"{str(path)!r}: the folder {str(path.parent)!r} cannot be written to"
        )


def _content_digest(tensors: dict[str, torch.Tensor], header: str) -> str:
    names = sorted(tensors)
    body = digest(*(tensors[name] for name in names))
    return hashlib.sha256(f"{names}{header}{body}".encode()).hexdigest()


def write_bytes(path: str | os.PathLike, content: bytes) -> Path:
    """Write a file in one step: readers see the old content or the new one, never a part."""
    path = Path(path)
    check_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a saved result gets the permissions of any new file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_tensors(
    path: str | os.PathLike, kind: str, tensors: dict[str, torch.Tensor], facts: dict
) -> Path:
    """Write named tensors and JSON-able ``facts`` as one safetensors file with a checksum."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = json.dumps({"kind": kind, "format": FORMAT, "facts": facts}, sort_keys=True)
    metadata = {"msif_lab": header, "sha256": _content_digest(tensors, header)}
    return write_bytes(path, to_bytes(tensors, metadata=metadata))


def read_tensors(path: str | os.PathLike, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a file of `write_tensors`: the tensors and the facts.

    Raises:
        FileNotFoundError: there is no such file.
        SavedFileError: the file is cut off, changed, of another kind or not of msif_lab.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise SavedFileError(
            f"{str(path)!r} is cut off or is not a safetensors file ({error}); "
            "save it again from its source"
        ) from error
    header = metadata.get("msif_lab")
    if header is None:
        raise SavedFileError(
            f"{str(path)!r} was not written by msif_lab; "
            "load foreign weights into the model yourself"
        )
    if metadata.get("sha256") != _content_digest(tensors, header):
        raise SavedFileError(
            f"{str(path)!r} was changed after it was written (checksum differs); save it again"
        )
    facts = json.loads(header)
    if facts["format"] == 1:
        facts = json.loads(_FORMER_NAMES.sub("msif_lab.", header))
    if facts["format"] > FORMAT:
        raise SavedFileError(
            f"{str(path)!r} has format {facts['format']}, "
            f"this msif_lab reads up to {FORMAT}; update"
        )
    if facts["kind"] != kind:
        raise SavedFileError(f"{str(path)!r} holds a saved {facts['kind']}, not a {kind}")
    return tensors, facts["facts"]
