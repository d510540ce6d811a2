"""Files that are either whole or absent: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError, system_error

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # bytes that are copied at once
READERS = 4  # files that are hashed at the same time
os.umask(UMASK := os.umask(0))  # there is no other way to ask for it
SEAL = "sha256"  # metadata key of a safetensors file: hash of its tensors
TEMPORARY = ".tmp-"  # prefix of everything unfinished; safe to delete when no process holds the run's lock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced, given the rights of a new file, and renamed to
    ``path``. An error of the system names ``path``.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        fsync(temporary)
        temporary.chmod(0o666 & ~UMASK)  # safetensors writes 0600
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file's or folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: bytes | str) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def atomic_save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Without metadata it gets the hash of its tensors, which `sealed` compares.

    At most one metadata key: with two the file's bytes differ from run to run.
    """
    if metadata and len(metadata) > 1:
        raise ValueError("give one metadata key; put a JSON document in it")
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_tensors(whole, temporary, metadata or {SEAL: _digest(whole)})


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file`; OSError with its number where the system refuses, such as a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        if refused := system_error(error):
            raise OSError(refused.errno, refused.strerror, str(path)) from error
        raise


def sealed(path: Path) -> bool:
    """Whether a safetensors file holds what `atomic_save` wrote. True too for one that carries no hash."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            seal = (file.metadata() or {}).get(SEAL)
            return seal is None or seal == _digest({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  no mapping
    except SafetensorError:
        return False


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest_tensor(digest, name, tensor)
    return digest.hexdigest()


def digest_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Add the name, dtype, shape and values of a tensor to a hash."""
    import torch

    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_json(path: Path, document: Any) -> None:
    atomic_write(path, json_text(document, indent=2) + "\n")


def json_text(document: Any, indent: int | None = None) -> str:
    """A document as JSON in UTF-8. A path whose bytes are no UTF-8 holds surrogates: they become JSON's escapes."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def require_regular(path: Path) -> None:
    """InputError for a pipe, a device or a folder: opening a pipe would wait without end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no regular file", "put a file in its place")


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, with or without a byte order mark. Lines end with a line feed, also those of Windows.

    Raises:
        InputError: another encoding, or no regular file: a pipe would be waited for without end.
    """
    require_regular(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise InputError(f"{path} is not UTF-8 text: {found}", "save the file as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path} is not UTF-8 text: it holds a zero byte", "save the file as UTF-8")
    return text.replace("\r\n", "\n")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, without their ends. Only line feeds end a line: U+2028 and the like are part of it."""
    lines = read_text(path).split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json(path: Path, hint: str = "fetch the file again") -> Any:
    """What a JSON file holds; InputError when it is damaged. hint: what helps."""
    try:
        return json.loads(read_text(Path(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}", hint) from error


def read_object(path: Path, hint: str = "fetch the file again") -> dict[str, Any]:
    """A JSON file that must hold an object; InputError when it does not. hint: what helps."""
    document = read_json(path, hint)
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no JSON object", hint)
    return document


_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@contextmanager
def understood(path: Path, hint: str = "fetch the file again") -> Iterator[None]:
    """Taking a document apart that ``path`` held: InputError with the file's name where it is not what it should be."""
    try:
        yield
    except _DAMAGE as error:
        what = str(error).partition("\n")[0][:200]
        raise InputError(f"{path} is damaged: {type(error).__name__}: {what}", hint) from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    require_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(paths: Iterable[Path], advance: Callable[[int], object] | None = None) -> list[str]:
    """`sha256` of every file, in order. `READERS` files are read at the same time, a chunk of each.

    Args:
        advance: is told the number of bytes of each file that was read.
    """
    files, found, ended = list(paths), [], Event()

    def read(path: Path) -> str:
        require_regular(path)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while not ended.is_set() and (chunk := file.read(CHUNK)):
                digest.update(chunk)
        return digest.hexdigest()

    with ThreadPoolExecutor(READERS) as pool:
        try:
            for path, value in zip(files, pool.map(read, files), strict=True):
                found.append(value)
                if advance:
                    advance(path.stat().st_size)
        finally:
            ended.set()  # after an error or a signal nobody waits for the rest of large files
    return found


def fresh_folder(path: Path) -> Path:
    """An empty folder at ``path``; what was there is moved aside first, so that a crash never leaves a mixture."""
    if path.exists():
        aside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
        os.replace(path, aside)
        shutil.rmtree(aside)
    path.mkdir(parents=True)
    return path


def once(folder: Path, made_of: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Call ``write(folder)`` unless the marker beside the folder says that it is made of the same; return the folder.

    The marker is written last, so an interrupted write is repeated.
    """
    marker = folder.with_name(f"{folder.name}.json")
    if not (folder.is_dir() and marker.exists() and read_json(marker) == made_of):
        marker.unlink(missing_ok=True)
        write(folder)
        write_json(marker, made_of)
    return folder


def copy_file(origin: Path, path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Copy a file, whole or not at all.

    Args:
        advance: is told the number of bytes after each chunk.
    Returns:
        Hex SHA-256 of the bytes that were read, with which a later read of ``path`` can be compared.
    """
    require_regular(origin)
    digest = hashlib.sha256()
    with replacing(path) as temporary, open(origin, "rb") as reader, open(temporary, "wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            if advance:
                advance(len(chunk))
        writer.flush()
    return digest.hexdigest()
