"""Stores of packages: a folder, a web server, or anything else that fsspec supports, such as S3."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from inferno.errors import ConfigurationError, InfernoError

#: Bytes to read at once.
CHUNK = 1 << 20
#: Time without a byte after which a web server counts as dead, in seconds.
SILENCE_S = 60.0


class Store(Protocol):
    """A place with files, each under a path."""

    def read(self, path: str, offset: int = 0) -> Iterator[bytes] | None:
        """Yield the content of a file from an offset in bytes; None if the file does not exist.

        Raises:
          ConfigurationError: the store does not answer, or answers with an error.
        """

    def write(self, path: str, content: bytes | Path, progress: Callable[[int], None]) -> None:
        """Write a file.

        Args:
          path: path of the file; folders are created.
          content: the content, or a file that holds it.
          progress: called with the number of bytes written since the last call.
        Raises:
          ConfigurationError: the store does not accept the file.
        """


def open_store(url: str) -> Store:
    """Return the store at a URL or in a folder.

    Raises:
      ConfigurationError: the URL's scheme is unknown, or a library is missing.
    """
    if url.startswith(("http://", "https://")):
        return WebStore(url)
    return FileStore(url)


def shown(url: str) -> str:
    """Return a URL without its password and query, which may hold secrets."""
    if "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


class FileStore:
    """A folder, or anything that fsspec presents as one."""

    def __init__(self, url: str) -> None:
        """Open the file system of the URL; nothing is read yet."""
        # Imported here: it is slow, and other commands do not need it.
        import fsspec

        self._url = url
        with self._explained("cannot be opened"):
            try:
                self._files, root = fsspec.core.url_to_fs(url)
            except ImportError as exc:
                hint = "; pip install 'inferno[s3]'" if url.startswith("s3://") else ""
                raise ConfigurationError(f"{shown(url)}: {exc}{hint}") from None
        self._root = root.rstrip("/")
        #: Whether the store is a folder of this machine, which may contain symbolic links.
        self._is_local = "file" in self._files.protocol

    def read(self, path: str, offset: int = 0) -> Iterator[bytes] | None:
        """Yield the content of a file; see `Store.read`."""
        with self._explained(f"{path} cannot be read"):
            self._check_inside(path)
            try:
                file = self._files.open(f"{self._root}/{path}", "rb")
            except FileNotFoundError:
                return None
        return self._chunks(file, path, offset)

    def _chunks(self, file: Any, path: str, offset: int) -> Iterator[bytes]:
        with self._explained(f"{path} cannot be read"), file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk

    def write(self, path: str, content: bytes | Path, progress: Callable[[int], None]) -> None:
        """Write a file; see `Store.write`."""
        target = f"{self._root}/{path}"
        with self._explained(f"{path} cannot be written"):
            self._check_inside(path)
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            with self._files.open(target, "wb") as file:
                for chunk in _chunks(content):
                    file.write(chunk)
                    progress(len(chunk))

    def _check_inside(self, path: str) -> None:
        root = Path(self._root)
        if self._is_local and not (root / path).resolve().is_relative_to(root.resolve()):
            raise ConfigurationError(f"{root / path}: leads out of the store")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except InfernoError:
            raise
        except Exception as exc:  # Each kind of store has its own library and exceptions.
            raise ConfigurationError(
                f"{shown(self._url)}: {what}: {type(exc).__name__}: {exc}"
            ) from exc


class WebStore:
    """Any web server that serves files; to push, it must accept PUT."""

    def __init__(self, url: str) -> None:
        """Store the URL; nothing is sent yet."""
        self._url = httpx.URL(url)
        self._client = httpx.Client(timeout=SILENCE_S, follow_redirects=True)

    def read(self, path: str, offset: int = 0) -> Iterator[bytes] | None:
        """Yield the content of a file; see `Store.read`."""
        chunks = self._chunks(path, offset)
        # The first chunk arrives after the head of the answer.
        first = next(chunks)
        if first is None:
            chunks.close()
            return None
        return _joined(first, chunks)

    def _chunks(self, path: str, offset: int) -> Generator[bytes | None, None, None]:
        # In a compressed answer, offsets would be different.
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with (
            self._explained(path),
            self._client.stream("GET", self._at(path), headers=headers) as answer,
        ):
            if answer.status_code in (404, 410):
                yield None
                return
            answer.raise_for_status()
            if (encoding := answer.headers.get("content-encoding", "identity")) != "identity":
                # A few compressed bytes could become many.
                raise ConfigurationError(
                    f"{shown(str(self._url))}: {path}: the server compressed its answer "
                    f"({encoding}), although the request forbids it"
                )
            yield b""
            # A server that ignores ranges sends the file from its beginning.
            skip = 0 if answer.status_code == 206 else offset
            for chunk in answer.iter_bytes(CHUNK):
                yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def write(self, path: str, content: bytes | Path, progress: Callable[[int], None]) -> None:
        """Write a file; see `Store.write`."""

        def sent() -> Iterator[bytes]:
            for chunk in _chunks(content):
                yield chunk
                progress(len(chunk))

        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        with self._explained(path):
            answer = self._client.put(
                self._at(path), content=sent(), headers={"Content-Length": str(size)}
            )
            if answer.status_code in (405, 501):
                raise ConfigurationError(
                    f"{shown(str(self._url))}: the server does not accept files (PUT); push to "
                    "the folder that it serves"
                )
            answer.raise_for_status()

    def _at(self, path: str) -> httpx.URL:
        path = quote(f"{self._url.path.rstrip('/')}/{path}")
        query = f"?{self._url.query.decode()}" if self._url.query else ""
        return self._url.copy_with(raw_path=f"{path}{query}".encode())

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        where = f"{shown(str(self._url))}: {path}"
        try:
            yield
        except httpx.HTTPStatusError as exc:
            status = f"{exc.response.status_code} {exc.response.reason_phrase}"
            raise ConfigurationError(f"{where}: the server answered {status}") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
            raise ConfigurationError(f"{where}: {type(exc).__name__}: {exc}") from None


def _joined(first: bytes, rest: Iterator[bytes | None]) -> Iterator[bytes]:
    yield first
    for chunk in rest:
        yield chunk or b""


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
