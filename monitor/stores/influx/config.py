"""The InfluxDB for telemetry, configured by the environment: SPARSE_INFLUX_URL and its companions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from brokers.errors import BadFile, UsageError

URL_VARIABLE = "SPARSE_INFLUX_URL"
ORG_VARIABLE = "SPARSE_INFLUX_ORG"
BUCKET_VARIABLE = "SPARSE_INFLUX_BUCKET"
TOKEN_VARIABLE = "SPARSE_INFLUX_TOKEN"
TOKEN_FILE_VARIABLE = "SPARSE_INFLUX_TOKEN_FILE"
CA_VARIABLE = "SPARSE_INFLUX_CA"
SPOOL_VARIABLE = "SPARSE_INFLUX_SPOOL"

_TOKEN_LIMIT_BYTES = 4096  # a longer one does not fit into an HTTP header
_EXPECTED_URL = "expected http://HOST:PORT or https://HOST:PORT"


@dataclass(frozen=True, slots=True)
class InfluxTarget:
    """A bucket of a server. `ca_file` (PEM) replaces the system's certificate authorities for https."""

    url: str  # without a trailing slash
    org: str = "sparse"
    bucket: str = "sparse"
    token: str = field(default="", repr=False)
    ca_file: Path | None = None

    def __str__(self) -> str:
        return f"bucket {self.bucket} of {self.url}"


def influx_target(environment: Mapping[str, str]) -> InfluxTarget | None:
    """The target that the environment names; None without SPARSE_INFLUX_URL.

    Reads the files that it names. Raises `UsageError` with the field `variable`; no message contains a token.
    """
    url = environment.get(URL_VARIABLE)
    if not url:
        return None
    return InfluxTarget(
        _checked_url(url),
        environment.get(ORG_VARIABLE) or "sparse",
        environment.get(BUCKET_VARIABLE) or "sparse",
        _token(environment),
        _ca_file(environment),
    )


def spool_folder(environment: Mapping[str, str]) -> Path:
    """The folder in which points wait for the server: SPARSE_INFLUX_SPOOL, or one in the user's state folder."""
    state_home = environment.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(environment.get(SPOOL_VARIABLE) or f"{state_home}/sparse/influx-spool").expanduser()


def _setting_error(variable: str, problem: str) -> UsageError:
    return UsageError("BadSetting", f"{variable}: {problem}", variable=variable)


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - parsed when it is read
    except ValueError as error:
        raise _setting_error(URL_VARIABLE, f"{error}; {_EXPECTED_URL}") from None
    if parts.username is not None or parts.password is not None:
        problem = f"the URL must not contain a user or password: put the token into a file, {TOKEN_FILE_VARIABLE}"
        raise _setting_error(URL_VARIABLE, problem)
    is_server = parts.scheme in ("http", "https") and parts.hostname
    if not is_server or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise _setting_error(URL_VARIABLE, f"not the address of a server; {_EXPECTED_URL}")
    return url.rstrip("/")


def _ca_file(environment: Mapping[str, str]) -> Path | None:
    if not (value := environment.get(CA_VARIABLE)):
        return None
    from brokers.mqtt.tls_files import read_certificate  # slow to import, and rarely needed

    path = Path(value).expanduser()
    try:
        read_certificate(path)
    except BadFile as error:
        raise _setting_error(CA_VARIABLE, str(error)) from None
    return path


def _token(environment: Mapping[str, str]) -> str:
    token = environment.get(TOKEN_VARIABLE) or ""
    variable = TOKEN_VARIABLE
    if file := environment.get(TOKEN_FILE_VARIABLE):
        if token:
            raise _setting_error(TOKEN_VARIABLE, f"set this or {TOKEN_FILE_VARIABLE}, not both")
        variable = TOKEN_FILE_VARIABLE
        token = _read_text(Path(file).expanduser()).strip()
        if not token:
            raise _setting_error(variable, f"{file} is empty: expected a token")
    if not (token.isascii() and token.isprintable()):  # it becomes an HTTP header
        raise _setting_error(variable, "not a token: expected one line of printable ASCII characters")
    return token


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_TOKEN_LIMIT_BYTES)
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "not a text file"
        raise _setting_error(TOKEN_FILE_VARIABLE, f"cannot read {path}: {reason}") from None
