"""Downloads: verified, complete or absent, and made once however many processes need them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from brokers.errors import UsageError
from brokers.process.download_cache import (
    DownloadOrigin,
    PackageOrigin,
    UrlOrigin,
    _extract_member,
    cache_folder,
    fetch_file,
)
from tests.support.errors import raises_error

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()
UNREACHABLE = UrlOrigin("http://127.0.0.1:1/x")


class Site(ThreadingHTTPServer):
    """A web site: `/right` is the file, `/wrong` another one, `/cut` ends too soon, all else is not found."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requested: list[str] = []

    def origin(self, path: str) -> UrlOrigin:
        return UrlOrigin(f"http://127.0.0.1:{self.server_address[1]}/{path}")


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Site)
        self.server.requested.append(self.path)
        body = {"/right": CONTENT, "/wrong": b"another", "/cut": CONTENT[:1000]}.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) if self.path == "/cut" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, its name in the standard library
        """Log nothing."""


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="site")
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".a.bin.lock")


def test_file_is_downloaded_once_and_then_cached(site: Site, tmp_path: Path) -> None:
    for _ in range(3):
        path = fetch_file("a.bin", SHA256, [site.origin("right")], tmp_path / "cache")
        assert path.read_bytes() == CONTENT
    assert site.requested == ["/right"]
    assert names_in(tmp_path / "cache") == ["a.bin"]


def test_next_origin_is_tried_after_a_failure(site: Site, tmp_path: Path) -> None:
    origins = [UNREACHABLE, site.origin("none"), site.origin("cut"), site.origin("right")]
    assert fetch_file("a.bin", SHA256, origins, tmp_path).read_bytes() == CONTENT
    assert site.requested == ["/none", "/cut", "/right"]


def test_error_names_every_origin_with_its_reason(site: Site, tmp_path: Path) -> None:
    origins = [UNREACHABLE, site.origin("none"), site.origin("cut"), UrlOrigin("nonsense")]
    with raises_error(UsageError, "DownloadFailed") as caught:
        fetch_file("a.bin", SHA256, origins, tmp_path)
    message = str(caught.value)
    assert "127.0.0.1:1/x: [Errno 111] Connection refused; " in message
    assert "/none: 404 " in message
    assert "/cut: IncompleteRead(1000 bytes read" in message
    assert "nonsense: Invalid URL" in message
    assert f"put it at {tmp_path / 'a.bin'}" in message
    assert "\n" not in message
    assert names_in(tmp_path) == []


def test_wrong_file_is_refused_and_not_kept(site: Site, tmp_path: Path) -> None:
    with raises_error(UsageError, "BadChecksum") as caught:
        fetch_file("a.bin", SHA256, [site.origin("wrong"), UNREACHABLE], tmp_path)
    assert SHA256 in str(caught.value)
    assert hashlib.sha256(b"another").hexdigest() in str(caught.value)
    assert names_in(tmp_path) == []


def test_changed_file_in_the_cache_is_replaced(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"changed")
    assert fetch_file("a.bin", SHA256, [site.origin("right")], tmp_path).read_bytes() == CONTENT


def test_cached_file_is_found_in_a_read_only_cache(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    fetch_file("a.bin", SHA256, [], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]  # no lock file


def test_cache_that_cannot_be_created_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with raises_error(UsageError, "DownloadFailed", match=r"Not a directory|File exists"):
        fetch_file("a.bin", SHA256, [], tmp_path / "file" / "cache")


def test_concurrent_processes_download_once(site: Site, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from brokers.process.download_cache import *;"
        "print(fetch_file('a.bin', sys.argv[1], [UrlOrigin(sys.argv[2])], pathlib.Path(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, SHA256, str(site.origin("right")), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [str(tmp_path / "cache" / "a.bin")] * 3
    assert site.requested == ["/right"]


# Packages -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the file, in the only folder where pip looks for packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    path = folder / "toy_data-1.0-py3-none-any.whl"
    info = "toy_data-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_data/a.bin", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_file_is_read_from_a_package_that_pip_downloads(wheel: Path, tmp_path: Path) -> None:
    archive_sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    origins = [PackageOrigin("toy-data==1.0", "toy_data/a.bin", archive_sha256)]
    assert fetch_file("a.bin", SHA256, origins, tmp_path / "cache").read_bytes() == CONTENT
    assert names_in(tmp_path / "cache") == ["a.bin"]


def test_error_says_why_pip_or_the_package_failed(wheel: Path, tmp_path: Path) -> None:
    origins: list[DownloadOrigin] = [
        PackageOrigin("not-there==1.0", "a.bin", "0" * 64),
        PackageOrigin("toy-data==1.0", "toy_data/a.bin", "0" * 64),  # another archive: it is not even opened
    ]
    with raises_error(UsageError, "DownloadFailed", match=r"not-there==1\.0: .*not-there.*; package toy-data==1\.0: "):
        fetch_file("a.bin", SHA256, origins, tmp_path / "cache")


def test_member_is_found_below_the_top_folder_of_a_source_archive(tmp_path: Path) -> None:
    archive = tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as sdist:
        for name, content in (("toy-1.0/build/toy/a.bin", b"not this"), ("toy-1.0/toy/a.bin", CONTENT)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))
    _extract_member(archive, "toy/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    with pytest.raises(OSError, match=r"toy-1\.0\.tar\.gz has no file toy/b\.bin"):
        _extract_member(archive, "toy/b.bin", tmp_path / "a.bin")


def test_member_missing_from_a_wheel_is_named(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"any\.whl has no file toy_data/b\.bin"):
        _extract_member(wheel, "toy_data/b.bin", tmp_path / "b.bin")


def test_damaged_archive_raises_os_error(tmp_path: Path) -> None:
    (tmp_path / "toy-1.0.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(OSError, match=r"toy-1\.0\.tar\.gz: "):
        _extract_member(tmp_path / "toy-1.0.tar.gz", "toy/a.bin", tmp_path / "a.bin")


def test_cache_folder_comes_from_the_environment() -> None:
    assert cache_folder({"SPARSE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"SPARSE_CACHE": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/sparse")
    assert cache_folder({}) == Path.home() / ".cache" / "sparse"
