"""Packages are carried to stores and back: a folder, a web server, and a store of fsspec's."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest

from inferno.errors import ConfigurationError, PackageError
from inferno.packaging.exchange import MAX_FILES, Transfer, pull_version, push_version
from inferno.packaging.stores import open_store, shown
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import RepositorySettings
from tests.unit.inferno.conftest import WritePackage

QUIET = Transfer(begin=lambda total: None, advance=lambda count: None)
BUILD = (
    "from .words import WORD\n\ndef build(context):\n    return lambda inputs: {'y': inputs['x']}"
)
#: More than one chunk.
LARGE = bytes(range(256)) * 12_000


@pytest.fixture
def package(write_package: WritePackage, root: Path) -> Package:
    """A version with code beside its folder, and a large file."""
    files: dict[str, str | bytes] = {"weights ä.bin": LARGE, "__init__.py": ""}
    folder = write_package("net", 2, entrypoint="../code:build", files=files)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "vocabulary.txt").write_text("a b c")
    (root / "net" / "code.py").write_text(BUILD)
    (root / "net" / "words.py").write_text("WORD = 'word'")
    return Package.read(folder)


class Server(http.server.ThreadingHTTPServer):
    """A web server for files, with ranges, and with PUT if it is allowed."""

    put = True
    compressed = False
    #: Connections are cut off after so many bytes of an answer.
    cut: int | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if self.server.compressed:
            content = gzip.compress(content)
        wanted = self.headers.get("Range")
        start = int(re.findall(r"\d+", wanted)[0]) if wanted else 0
        if wanted:
            self.server.ranges.append(wanted)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.server.compressed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut])
        self.close_connection = True

    def do_PUT(self) -> None:
        if not self.server.put:
            self.send_error(405)
            return
        path = Path(self.translate_path(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(201)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["folder", "web", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "web":
        yield f"{request.getfixturevalue('server').url}/a%20store"
    elif request.param == "memory":
        yield "memory://store"
        fsspec.filesystem("memory").rm("/store", recursive=True)
    else:
        yield str(tmp_path / "store")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_version_is_the_same_elsewhere(store: str, package: Package, tmp_path: Path) -> None:
    where = push_version(package, store, QUIET)
    pulled = pull_version(tmp_path / "other", where, None, QUIET)

    assert where == f"{store}/net/2"
    assert contents(tmp_path / "other") == contents(package.path.parents[1])
    assert pulled.digest == package.digest
    assert push_version(package, store, QUIET) == where


def test_a_pulled_version_can_have_another_name(package: Package, tmp_path: Path) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)

    pulled = pull_version(tmp_path / "other", where, "mesh", QUIET)

    assert (pulled.name, pulled.version) == ("mesh", 2)
    assert os.listdir(tmp_path / "other") == ["mesh"]


def test_versions_in_a_store_do_not_change(package: Package, tmp_path: Path) -> None:
    push_version(package, str(tmp_path / "store"), QUIET)
    (package.path / "deeper" / "vocabulary.txt").write_text("others")

    with pytest.raises(PackageError, match="already exists with other content"):
        push_version(package, str(tmp_path / "store"), QUIET)


def test_versions_in_a_repository_do_not_change(package: Package, tmp_path: Path) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)

    with pytest.raises(PackageError, match="net/2 already exists"):
        pull_version(package.path.parents[1], where, None, QUIET)


def test_code_that_other_versions_use_is_not_replaced(package: Package, tmp_path: Path) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)
    (tmp_path / "other" / "net").mkdir(parents=True)
    (tmp_path / "other" / "net" / "code.py").write_text("")

    with pytest.raises(PackageError, match=r"code\.py already exists with other content"):
        pull_version(tmp_path / "other", where, None, QUIET)


def test_a_changed_file_is_found_and_nothing_appears(package: Package, tmp_path: Path) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)
    file = tmp_path / "store/net/2/files/2/deeper/vocabulary.txt"
    file.write_text("a b d")

    with pytest.raises(PackageError, match=r"vocabulary\.txt does not match the listing"):
        pull_version(tmp_path / "other", where, None, QUIET)
    assert not Repository.read(RepositorySettings(root=tmp_path / "other")).models
    assert not (tmp_path / "other" / "net").exists()

    file.write_text("a b c")
    assert pull_version(tmp_path / "other", where, None, QUIET).digest == package.digest
    assert os.listdir(tmp_path / "other") == ["net"]


def test_a_pull_that_is_cut_off_goes_on(server: Server, package: Package, tmp_path: Path) -> None:
    where = push_version(package, server.url, QUIET)
    server.cut = 2_000_000
    with pytest.raises(ConfigurationError, match=r"weights ä\.bin: RemoteProtocolError"):
        pull_version(tmp_path / "other", where, None, QUIET)
    assert not Repository.read(RepositorySettings(root=tmp_path / "other")).models

    server.cut = None
    pulled = pull_version(tmp_path / "other", where, None, QUIET)

    assert pulled.digest == package.digest
    # Full chunks had arrived, or what the connection had brought.
    assert re.fullmatch(r"bytes=[1-9]\d{5,6}-", server.ranges[0])


def test_a_server_that_takes_no_files_is_named(server: Server, package: Package) -> None:
    server.put = False

    with pytest.raises(ConfigurationError, match=r"does not accept files \(PUT\)"):
        push_version(package, server.url, QUIET)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"../escape.py": "x"}, "expected a path inside the model's folder"),
        ({"2/../../escape.py": "x"}, "expected a path inside"),
        ({"/etc/escape": "x"}, "expected a path inside"),
        ({"2//double": "x"}, "expected a path inside"),
        ({"2\\escape": "x"}, "expected a path inside"),
        ({"3/model.yaml": "x"}, "expected only version 2"),
        ({"": "x"}, "expected a path inside"),
        ({".": "x"}, "expected a path inside"),
        ({"2/..": "x"}, "expected a path inside"),
        ({"2/a\0b": "x"}, "expected a path inside"),
        ({"2/a\nb": "x"}, "expected a path inside"),
        ({"2/\x1b[2J": "x"}, "expected a path inside"),
        ({"2/MODEL.yaml": "x"}, "may be the same file"),
        ({"2/weights a\u0308.bin": "x"}, "may be the same file"),
        ({"2/deeper/vocabulary.txt/x": "x"}, "is both a file and a folder"),
        ({"2/" + "a" * 300: "x"}, "with parts of at most 200"),
        ({"2/" + "a/" * 600 + "a": "x"}, "expected a path of at most 1000 bytes"),
    ],
)
def test_hostile_paths_are_refused(
    change: dict[str, str], reason: str, package: Package, tmp_path: Path
) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)
    change_listing(where, {path: {"sha256": "0" * 64, "size_bytes": 1} for path in change})

    with pytest.raises(PackageError, match=reason):
        pull_version(tmp_path / "other", where, None, QUIET)
    assert not (tmp_path / "other").exists()


def test_hostile_paths_are_refused_from_every_store(
    package: Package, tmp_path: Path, store: str
) -> None:
    where = push_version(package, store, QUIET)
    change_listing(where, {"2/../../../escape": {"sha256": "0" * 64, "size_bytes": 1}})

    with pytest.raises(PackageError, match="expected a path inside the model's folder"):
        pull_version(tmp_path / "other", where, None, QUIET)
    assert not (tmp_path / "other").exists()


def change_listing(where: str, files: dict[str, dict[str, Any]]) -> None:
    """Add files to the listing of a version in a store, as a hostile owner of the store could."""
    store = open_store(where)
    content = store.read("package.json")
    assert content is not None
    document = msgspec.json.decode(b"".join(content))
    document["files"] |= files
    store.write("package.json", msgspec.json.encode(document), lambda count: None)


def test_more_files_than_a_version_may_have_are_refused(package: Package, tmp_path: Path) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)
    change_listing(
        where, {f"2/{n}": {"sha256": "0" * 64, "size_bytes": 0} for n in range(MAX_FILES)}
    )

    with pytest.raises(PackageError, match="expected at most 10000"):
        pull_version(tmp_path / "other", where, None, QUIET)


@pytest.mark.parametrize("size", [1 << 50, 10**30])
def test_a_version_larger_than_the_disk_is_refused_before_it_is_fetched(
    size: int, package: Package, tmp_path: Path
) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)
    change_listing(where, {"2/huge": {"sha256": "0" * 64, "size_bytes": size}})

    with pytest.raises(PackageError, match=r"the disk of .* has room for|is not a valid listing"):
        pull_version(tmp_path / "other", where, None, QUIET)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_cannot_grow_beyond_its_listing(
    kind: str, package: Package, tmp_path: Path
) -> None:
    push_version(package, str(tmp_path / "store"), QUIET)
    # Compressed, it is a thousandth of that.
    (tmp_path / "store/net/2/files/2/deeper/vocabulary.txt").write_bytes(bytes(50 << 20))
    archive = shutil.make_archive(
        str(tmp_path / "bomb"), {"zip": "zip", "tar": "gztar"}[kind], tmp_path / "store", "net"
    )
    got: list[int] = []
    counted = Transfer(begin=lambda total: None, advance=got.append)

    with pytest.raises(PackageError, match=r"vocabulary\.txt does not match the listing"):
        pull_version(tmp_path / "other", f"{kind}://net/2::file://{archive}", None, counted)
    assert sum(got) < 10 << 20
    written = [path.stat().st_size for path in (tmp_path / "other").rglob("*") if path.is_file()]
    assert sum(written) < 10 << 20


def test_a_server_that_compresses_is_refused(
    server: Server, package: Package, tmp_path: Path
) -> None:
    where = push_version(package, server.url, QUIET)
    server.compressed = True

    with pytest.raises(ConfigurationError, match=r"package\.json: the server compressed"):
        pull_version(tmp_path / "other", where, None, QUIET)


def test_versions_that_are_there_get_no_files(
    package: Package, tmp_path: Path, write_package: WritePackage
) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)
    write_package("net", 1)
    shutil.rmtree(package.path)
    change_listing(where, {"1/adapter.bin": {"sha256": "0" * 64, "size_bytes": 1}})

    with pytest.raises(PackageError, match="would add a file to version 1"):
        pull_version(package.path.parents[1], where, None, QUIET)


def test_a_store_cannot_lead_elsewhere(package: Package, tmp_path: Path) -> None:
    (tmp_path / "store" / "net" / "2").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store" / "net" / "2" / "files").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigurationError, match="leads out of the store"):
        push_version(package, str(tmp_path / "store"), QUIET)
    assert not os.listdir(tmp_path / "elsewhere")


def test_nothing_is_written_through_links(package: Package, tmp_path: Path) -> None:
    where = push_version(package, str(tmp_path / "store"), QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store/net/2/package.json").write_text(
        (tmp_path / "store/net/2/package.json").read_text().replace('"code.py"', '"sub/code.py"')
    )
    (tmp_path / "other" / "net").mkdir()
    (tmp_path / "other" / "net" / "sub").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(PackageError, match="through a symbolic link"):
        pull_version(tmp_path / "other", where, None, QUIET)
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"has no package\.json"),
        (b"<html>", "is not a valid listing"),
        (b'{"name": "../x", "version": 1, "files": {}}', "is not a valid listing"),
    ],
)
def test_what_is_no_package_is_named(content: bytes | None, reason: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    if content is not None:
        (tmp_path / "store" / "package.json").write_bytes(content)

    with pytest.raises(PackageError, match=reason):
        pull_version(tmp_path / "other", str(tmp_path / "store"), None, QUIET)


def test_stores_that_are_not_known_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nonsense://x: "):
        pull_version(tmp_path, "nonsense://x", None, QUIET)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://user:secret@host/a/b?signature=secret", "https://host/a/b"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("/mnt/a@b?c", "/mnt/a@b?c"),
    ],
)
def test_secrets_of_addresses_are_not_shown(url: str, text: str) -> None:
    assert shown(url) == text
