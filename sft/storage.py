"""Storage by address: a local folder, s3:// or gs://, through pyarrow's file systems."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyarrow import ArrowException, NativeFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from sft.errors import StorageError


def resolve(address: str) -> tuple[FileSystem, str]:
    """Finds the file system of an address and the path in it. Local paths become absolute.

    Raises:
        StorageError: the scheme is unknown or the address is malformed.
    """
    if "://" not in address:
        return LocalFileSystem(), str(Path(address).expanduser().absolute())
    try:
        filesystem, path = FileSystem.from_uri(address)
    except (ArrowException, ValueError, OSError) as error:
        raise StorageError(f"{address}: cannot be used as a storage address ({error})") from None
    return filesystem, path


def find(address: str, suffixes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """Lists files below an address: itself if it is a file, else a folder's or glob's files with these suffixes.

    Returns:
        (full path in the file system, stable name below the address, size in bytes), sorted by name.

    Raises:
        StorageError: the address cannot be reached or nothing is there.
    """
    filesystem, path = resolve(address)
    wild = next((i for i, part in enumerate(path.split("/")) if any(c in part for c in "*?[")), None)
    root = path if wild is None else "/".join(path.split("/")[:wild])
    try:
        info = filesystem.get_file_info(root)
        if info.type is FileType.File:
            return [(root, info.base_name, info.size)]
        if info.type is not FileType.Directory:
            raise StorageError(f"{address}: there is no such file or folder")
        entries: list[FileInfo] = filesystem.get_file_info(FileSelector(root, recursive=True))
    except OSError as error:
        raise StorageError(f"{address}: cannot be listed ({error})") from None
    files = [
        (entry.path, entry.path[len(root) :].lstrip("/"), entry.size)
        for entry in entries
        if entry.type is FileType.File and entry.path.endswith(suffixes)
    ]
    if wild is not None:
        files = [file for file in files if fnmatch.fnmatch(file[0], path)]
    if not files:
        raise StorageError(f"{address}: holds no file that ends in {' or '.join(suffixes)}")
    return sorted(files, key=lambda file: file[1])


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
