"""Storage by address: a local folder, s3:// or gs:// through pyarrow's file systems, hf:// through the hub's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyarrow import ArrowException, NativeFile
from pyarrow.fs import (
    FileInfo,
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
    copy_files,
)

from sft.errors import StorageError

HUB = "hf://"
_HUB_ADDRESS = re.compile(r"hf://datasets/[^/@*?\[]+/[^/*?\[]+(/.*)?")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was found: its own address, its name below the address that was asked for, and its size in bytes.

    `named` is true where the address that was asked for is this file's own.
    """

    address: str
    name: str
    size: int
    named: bool = False


def resolve(address: str) -> tuple[FileSystem, str]:
    """Finds the file system of an address and the path in it. Local paths become absolute.

    Raises:
        StorageError: the scheme is unknown or the address is malformed.
    """
    if "://" not in address:
        return LocalFileSystem(), str(Path(address).expanduser().absolute())
    if address.startswith(HUB):
        if not _HUB_ADDRESS.fullmatch(address):
            raise StorageError(
                f"{address}: a data set on the hub is written hf://datasets/OWNER/NAME[@REVISION][/PATH]"
            )
        return PyFileSystem(FSSpecHandler(hub())), address[len(HUB) :].rstrip("/")
    path, _, options = address.partition("?")
    try:
        filesystem, path = FileSystem.from_uri(quote(path, safe="%/:@*+,;=~!$&'()") + (options and f"?{options}"))
    except (ArrowException, ValueError, OSError) as error:
        raise StorageError(f"{address}: cannot be used as a storage address ({error})") from None
    return filesystem, path


def hub() -> Any:
    """The Hugging Face hub as an fsspec file system; it takes its token from HF_TOKEN or the user's login."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def faults(address: str) -> tuple[type[Exception], ...]:
    """What the file system of an address raises when something there cannot be reached or read."""
    if not address.startswith(HUB):
        return OSError, ArrowException
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # what its HTTP client raises

    return OSError, ArrowException, HTTPError, ValueError


def find(address: str) -> list[StoredFile]:
    """Lists files below an address: itself if it is a file, else all files of a folder, or those that a glob matches.

    A star stays within one folder, two stars (`**`) reach into all below. Names that begin with a dot or an underscore
    are left out, as they are markers and caches and not data.

    Returns:
        The files, sorted by name.

    Raises:
        StorageError: the address cannot be reached or nothing is there.
    """
    filesystem, path = resolve(address)
    parts = path.split("/")
    wild = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    pattern = parts[wild:]
    try:
        info = filesystem.get_file_info(path)
        if info.type is FileType.File:
            return [StoredFile(_address_of(path, address), info.base_name, info.size, named=True)]
        if info.type is FileType.Directory:
            root, pattern = path, ["**"]
        elif wild < len(parts):
            root = "/".join(parts[:wild]) or "/"
        else:
            raise StorageError(f"{address}: there is no such file or folder{_hint(address)}")
        entries: list[FileInfo] = filesystem.get_file_info(FileSelector(root, recursive=True))
    except faults(address) as error:
        raise StorageError(f"{address}: cannot be listed ({error}){_hint(address)}") from None
    files = []
    for entry in entries:
        name = entry.path[len(root) :].lstrip("/")
        below = name.split("/")
        hidden = any(part.startswith((".", "_")) for part in below)
        if entry.type is FileType.File and not hidden and _matches(below, pattern):
            files.append(StoredFile(_address_of(entry.path, address), name, entry.size))
    if not files:
        raise StorageError(f"{address}: no file is there{_hint(address)}")
    return sorted(files, key=lambda file: file.name)


def _address_of(path: str, asked: str) -> str:
    """The address of a path in the file system of another address, with that one's options."""
    if asked.startswith(HUB):
        return HUB + path
    if "://" not in asked or asked.startswith("file://"):
        return path
    scheme, _, rest = asked.partition("://")
    _, mark, options = rest.partition("?")
    return f"{scheme}://{quote(path)}{mark}{options}"


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the folders and name of a file match a glob's, folder by folder."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _hint(address: str) -> str:
    if not address.startswith(HUB):
        return ""
    return "; check the name and the network, and set HF_TOKEN where the data set is private"


def write(address: str, content: bytes) -> None:
    """Writes a small file whole, making the folders above it.

    Raises:
        StorageError: it cannot be written.
    """
    filesystem, path = resolve(address)
    try:
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
    except OSError as error:
        raise StorageError(f"{address}: cannot be written ({error})") from None


@contextmanager
def write_late(address: str) -> Iterator[Callable[[bytes], None]]:
    """Writes a file piece by piece; it is begun with the first piece, so without one there is no file.

    Raises:
        StorageError: it cannot be written.
    """
    with ExitStack() as stack:
        streams: list[NativeFile] = []

        def append(content: bytes) -> None:
            try:
                if not streams:
                    filesystem, path = resolve(address)
                    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
                    streams.append(stack.enter_context(filesystem.open_output_stream(path)))
                streams[0].write(content)
            except OSError as error:
                raise StorageError(f"{address}: cannot be written ({error})") from None

        yield append


def read(address: str) -> bytes | None:
    """Reads a small file whole; None where there is none.

    Raises:
        StorageError: it is there but cannot be read.
    """
    filesystem, path = resolve(address)
    try:
        if filesystem.get_file_info(path).type is not FileType.File:
            return None
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content
    except OSError as error:
        raise StorageError(f"{address}: cannot be read ({error})") from None


def folders(address: str) -> list[str]:
    """Names of the folders in a folder, sorted; none where it is not there.

    Raises:
        StorageError: it cannot be listed.
    """
    filesystem, path = resolve(address)
    try:
        entries: list[FileInfo] = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
    except faults(address) as error:
        raise StorageError(f"{address}: cannot be listed ({error})") from None
    return sorted(entry.base_name for entry in entries if entry.type is FileType.Directory)


def remove(address: str) -> None:
    """Removes a folder and all in it, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    filesystem, path = resolve(address)
    try:
        filesystem.delete_dir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{address}: cannot be removed ({error})") from None


def upload(folder: Path, address: str, *, last: str) -> None:
    """Copies a local folder's files to an address; the file named `last` is written after all others.

    Raises:
        StorageError: it cannot be written.
    """
    filesystem, path = resolve(address)
    names = sorted((entry.name for entry in folder.iterdir()), key=lambda name: (name == last, name))
    try:
        filesystem.create_dir(path, recursive=True)
        for name in names:
            copy_files(str(folder / name), f"{path}/{name}", LocalFileSystem(), filesystem)
    except OSError as error:
        raise StorageError(f"{address}: cannot be written ({error})") from None


def download(address: str, folder: Path) -> None:
    """Copies the files below an address into a local folder.

    Raises:
        StorageError: it cannot be read.
    """
    filesystem, path = resolve(address)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        copy_files(path, str(folder), filesystem, LocalFileSystem())
    except OSError as error:
        raise StorageError(f"{address}: cannot be read ({error})") from None
