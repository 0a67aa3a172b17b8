"""Copies versions of models between a repository and a store.

    <store>/<name>/<version>/package.json    the listing: size and SHA-256 of each file
                             files/...       the files, by their path in the model's folder

A push writes the listing last, so nobody sees half a version. A pull fetches the files into a
hidden folder of the repository and checks them against the listing before the version appears. If
a pull is interrupted, the next one continues with the files that have arrived.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec
from msgspec import Meta

from inferno import names
from inferno.errors import PackageError
from inferno.packaging.creation import check_absent, publish
from inferno.packaging.python_code import neighbours
from inferno.packaging.stores import CHUNK, open_store, shown
from inferno.repository.manifest import MANIFEST
from inferno.repository.package import Package

LISTING = "package.json"
#: Maximum size of a listing, in bytes.
MAX_LISTING_BYTES = 16 << 20
#: Maximum number of files of a version.
MAX_FILES = 10_000
#: Maximum length of a path, and of one part of it, in bytes of UTF-8; the file system has limits.
MAX_PATH_BYTES, MAX_PART_BYTES = 1000, 200
#: Space to leave on the disk, in bytes.
SPARE_BYTES = 256 << 20


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a package."""

    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Meta(ge=0)]


class Listing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All files of a version."""

    name: Annotated[str, Meta(pattern=f"^{names.MODEL_NAME.pattern}$")]
    version: Annotated[int, Meta(ge=1)]
    #: Files by their path in the model's folder, such as ``2/model.yaml`` or ``processor.py``.
    files: dict[str, Entry]

    @property
    def size_bytes(self) -> int:
        """Total size of the files, in bytes."""
        return sum(entry.size_bytes for entry in self.files.values())


@dataclass(frozen=True)
class Transfer:
    """Callbacks that report the progress of a transfer."""

    #: Called first, with the total size in bytes.
    begin: Callable[[int], None]
    #: Called with the number of bytes that were transferred since the last call.
    advance: Callable[[int], None]


# -- Push ------------------------------------------------------------------------------------------


def push_version(package: Package, url: str, progress: Transfer) -> str:
    """Copy a version to a store.

    Args:
      package: the version.
      url: URL of the store.
      progress: reports the progress.
    Returns:
      The version's URL, for `pull_version`.
    Raises:
      PackageError: the version needs files from elsewhere, or the store has different contents
        under this number.
      ConfigurationError: the store does not accept it.
    """
    contents = _contents(package)
    listing = Listing(
        package.name,
        package.version,
        {
            path: Entry(_digest(file), file.stat().st_size)
            for path, file in sorted(contents.items())
        },
    )
    store, place = open_store(url), f"{package.name}/{package.version}"
    where = f"{url.rstrip('/')}/{place}"
    present = store.read(f"{place}/{LISTING}")
    if present is not None:
        if _read_listing(present, where) != listing:
            raise PackageError(
                f"{shown(where)} already exists with other content, and versions never change; "
                "choose another number"
            )
        return where
    progress.begin(listing.size_bytes)
    for path, file in contents.items():
        store.write(f"{place}/files/{path}", file, progress.advance)
    text = msgspec.json.format(msgspec.json.encode(listing), indent=1)
    store.write(f"{place}/{LISTING}", text, lambda _: None)
    return where


def _contents(package: Package) -> dict[str, Path]:
    """Return the files that a version needs, by their path in the model's folder."""
    folder = package.path.resolve()
    files = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    manifest = package.manifest
    named = [manifest.artifact] if manifest.artifact else []
    functions = filter(None, (manifest.entrypoint, manifest.processor))
    named += [f"{function.partition(':')[0]}.py" for function in functions]
    for name in named:
        file = Path(os.path.normpath(folder / name))
        if not file.is_file():
            raise PackageError(f"{file} is missing; a package is pushed with all its files")
        files.add(file)
        if file.suffix == ".py":
            files.update(neighbours(file))
    contents = {}
    for file in files:
        if not file.is_relative_to(folder.parent):
            raise PackageError(
                f"{package.path}: needs {file}, which is outside the model's folder "
                f"{folder.parent}; it cannot be pushed"
            )
        if file.is_file():
            contents[file.relative_to(folder.parent).as_posix()] = file
    return contents


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# -- Pull ------------------------------------------------------------------------------------------


def pull_version(root: Path, url: str, name: str | None, progress: Transfer) -> Package:
    """Fetch a version into the repository.

    Args:
      root: the repository; created if it does not exist.
      url: URL that `push_version` returned.
      name: name of the model in the repository; None to keep its name.
      progress: reports the progress.
    Raises:
      PackageError: a file does not match the listing, or exists here with other content.
      ConfigurationError: the store does not answer.
    """
    url = url.removesuffix("/").removesuffix(f"/{LISTING}")
    store = open_store(url)
    content = store.read(LISTING)
    if content is None:
        raise PackageError(
            f"{shown(url)}: has no {LISTING}; expected a URL from `inferno models push`, such as "
            "<store>/<name>/<version>"
        )
    listing = _read_listing(content, url)
    _check_paths(listing, url)
    name = name or listing.name
    if not names.MODEL_NAME.fullmatch(name) or names.RESERVED.fullmatch(name):
        raise PackageError(f"{name}: not a valid model name; choose another one with --name")
    check_absent(root, name, listing.version)
    _check_shared(root, name, listing)
    _check_space(root, listing, url)
    with _arrivals(root, name, listing) as folder:
        progress.begin(listing.size_bytes)
        for path, entry in listing.files.items():
            _fetch(store.read, path, entry, folder / name / path, url, progress)
        version = folder / name / str(listing.version)
        if name != listing.name:
            _rename(version / MANIFEST, listing.name, name)
        Package.read(version)
        for path in _shared(listing):
            _place(folder / name / path, root / name / path)
        published = publish(root, version)
    return Package.read(published)


def _read_listing(content: Iterator[bytes], url: str) -> Listing:
    raw = b""
    for chunk in content:
        raw += chunk
        if len(raw) > MAX_LISTING_BYTES:
            raise PackageError(f"{shown(url)}: {LISTING} is longer than {MAX_LISTING_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=Listing)
    except msgspec.DecodeError as exc:
        raise PackageError(f"{shown(url)}: {LISTING} is not a valid listing: {exc}") from None


def _check_paths(listing: Listing, url: str) -> None:
    """Check that every path stays in the model's folder, and that no two mean the same file."""
    if len(listing.files) > MAX_FILES:
        raise PackageError(
            f"{shown(url)}: has {len(listing.files)} files; expected at most {MAX_FILES}"
        )
    seen: dict[str, str] = {}
    for path in listing.files:
        _check_path(listing, path, url)
        # Some file systems ignore case, or write letters with accents in another way.
        other = seen.setdefault(_folded(path), path)
        if other != path:
            raise PackageError(f"{shown(url)}: {path!r} and {other!r} may be the same file")
    for path in listing.files:
        for folder in PurePosixPath(path).parents:
            if (other := seen.get(_folded(str(folder)), "")) and str(folder) != ".":
                raise PackageError(f"{shown(url)}: {other!r} is both a file and a folder")


def _folded(path: str) -> str:
    return unicodedata.normalize("NFKC", path).casefold()


def _check_path(listing: Listing, path: str, url: str) -> None:
    """Check that a path stays in the model's folder and does not add another version."""
    parts = PurePosixPath(path).parts
    plain = path.isprintable() and "\\" not in path and "/".join(parts) == path
    if not plain or not path or path.startswith("/") or ".." in parts:
        raise PackageError(f"{shown(url)}: {path!r}: expected a path inside the model's folder")
    longest = max(len(part.encode()) for part in parts)
    if len(path.encode()) > MAX_PATH_BYTES or longest > MAX_PART_BYTES:
        raise PackageError(
            f"{shown(url)}: {path[:80]!r}...: expected a path of at most {MAX_PATH_BYTES} bytes, "
            f"with parts of at most {MAX_PART_BYTES}"
        )
    if parts[-1] == MANIFEST and parts != (str(listing.version), MANIFEST):
        raise PackageError(f"{shown(url)}: {path!r}: expected only version {listing.version}")


def _shared(listing: Listing) -> list[str]:
    """Return the files outside the version's folder, which other versions may share."""
    return [path for path in listing.files if PurePosixPath(path).parts[0] != str(listing.version)]


def _check_shared(root: Path, name: str, listing: Listing) -> None:
    model = (root / name).resolve()
    for path in _shared(listing):
        target = root / name / path
        version = root / name / PurePosixPath(path).parts[0]
        if (version / MANIFEST).exists() and not target.exists():
            raise PackageError(
                f"{target}: would add a file to version {version.name}, and versions never change; "
                "choose another name with --name"
            )
        if not target.parent.resolve().is_relative_to(model):
            raise PackageError(f"{target}: would be written through a symbolic link")
        if target.exists() and _digest(target) != listing.files[path].sha256:
            raise PackageError(
                f"{target} already exists with other content, which other versions may need; "
                "choose another name with --name"
            )


def _check_space(root: Path, listing: Listing, url: str) -> None:
    """Check that the disk has room for the files; no more bytes than listed are fetched."""
    place = next(path for path in (root.resolve(), *root.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free - SPARE_BYTES
    if listing.size_bytes > free:
        raise PackageError(
            f"{shown(url)}: has {listing.size_bytes} bytes, and the disk of {root} has room for "
            f"{max(free, 0)}"
        )


@contextmanager
def _arrivals(root: Path, name: str, listing: Listing) -> Iterator[Path]:
    """Yield the hidden folder for the files of this listing; after a failure, it is kept."""
    content = hashlib.sha256(msgspec.json.encode(listing)).hexdigest()[:16]
    folder = root / f".pull-{name}-{listing.version}-{content}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackageError(
                f"{name} version {listing.version} is already being pulled"
            ) from None
        yield folder
    shutil.rmtree(folder)


def _fetch(
    read: Callable[[str, int], Iterator[bytes] | None],
    path: str,
    entry: Entry,
    target: Path,
    url: str,
    progress: Transfer,
) -> None:
    """Fetch one file, or the missing rest of it, and check it against the listing."""
    if target.is_file() and _digest(target) == entry.sha256:
        progress.advance(entry.size_bytes)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    found = hashlib.sha256()
    with part.open("a+b") as file:
        file.seek(0)
        while chunk := file.read(CHUNK):
            found.update(chunk)
        size = file.tell()
        progress.advance(size)
        chunks = read(f"files/{path}", size) if size < entry.size_bytes or not size else iter(())
        if chunks is None:
            raise PackageError(f"{shown(url)}: files/{path} is in the listing, but missing")
        for chunk in chunks:
            file.write(chunk)
            found.update(chunk)
            size += len(chunk)
            progress.advance(len(chunk))
            if size > entry.size_bytes:
                break
    if size != entry.size_bytes or found.hexdigest() != entry.sha256:
        part.unlink()
        raise PackageError(
            f"{shown(url)}: files/{path} does not match the listing: expected {entry.size_bytes} "
            f"bytes with SHA-256 {entry.sha256}, got {size} with {found.hexdigest()}; the file "
            "was deleted"
        )
    part.rename(target)


def _rename(manifest: Path, old: str, new: str) -> None:
    text = manifest.read_text(encoding="utf-8")
    changed, count = re.subn(
        rf"^name:\s*['\"]?{re.escape(old)}['\"]?(?=\s|$)", f"name: {new}", text, count=1, flags=re.M
    )
    if not count:
        raise PackageError(f"{manifest.name} has no line `name: {old}` to change")
    manifest.write_text(changed, encoding="utf-8")


def _place(file: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(file, target)
