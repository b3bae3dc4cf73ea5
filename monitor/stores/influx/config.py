"""Which InfluxDB telemetry goes to and comes from, as the environment says: SPARSE_INFLUX_URL and its companions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from brokers.errors import BadFile
from monitor.errors import BadSetting

URL_VARIABLE = "SPARSE_INFLUX_URL"
ORG_VARIABLE = "SPARSE_INFLUX_ORG"
BUCKET_VARIABLE = "SPARSE_INFLUX_BUCKET"
TOKEN_VARIABLE = "SPARSE_INFLUX_TOKEN"
TOKEN_FILE_VARIABLE = "SPARSE_INFLUX_TOKEN_FILE"
CA_VARIABLE = "SPARSE_INFLUX_CA"
SPOOL_VARIABLE = "SPARSE_INFLUX_SPOOL"

_TOKEN_LIMIT_BYTES = 4096  # more would not pass as a header; a larger file is some other file


@dataclass(frozen=True, slots=True)
class InfluxTarget:
    """A bucket of a server. `ca`: a PEM file of who may vouch for a server with https, in place of the system's own."""

    url: str  # without a slash at its end
    org: str = "sparse"
    bucket: str = "sparse"
    token: str = field(default="", repr=False)
    ca_file: Path | None = None

    def __str__(self) -> str:
        return f"bucket {self.bucket} of {self.url}"


def influx_target(environment: Mapping[str, str]) -> InfluxTarget | None:
    """What SPARSE_INFLUX_URL, _ORG, _BUCKET, _TOKEN_FILE or _TOKEN, and _CA say; None where there is no URL.

    Reads the files that it names, and nothing else. Raises `BadSetting`, which names the variable.
    """
    given = {
        name: value
        for name in (URL_VARIABLE, ORG_VARIABLE, BUCKET_VARIABLE, TOKEN_VARIABLE, TOKEN_FILE_VARIABLE, CA_VARIABLE)
        if (value := environment.get(name))
    }
    if URL_VARIABLE not in given:
        return None
    url = _checked_url(given[URL_VARIABLE])
    return InfluxTarget(
        url, _name(given, ORG_VARIABLE), _name(given, BUCKET_VARIABLE), _token(given), _authority(given)
    )


def spool_folder(environment: Mapping[str, str]) -> Path:
    """Where points wait for the server: SPARSE_INFLUX_SPOOL, else below the user's folder for what programs keep."""
    if named := environment.get(SPOOL_VARIABLE):
        return Path(named).expanduser()
    if state := environment.get("XDG_STATE_HOME"):
        return Path(state) / "sparse" / "influx-spool"
    return Path("~/.local/state/sparse/influx-spool").expanduser()


def _checked_url(text: str) -> str:
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  # it is read when it is asked for, and may be no number
    except ValueError as error:
        raise BadSetting(URL_VARIABLE, f"{error}; {expected}") from None
    if parts.username is not None or parts.password is not None:
        raise BadSetting(
            URL_VARIABLE, f"no user and no password belong there: {TOKEN_FILE_VARIABLE} names a file with the token"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadSetting(URL_VARIABLE, f"it is no address of a server; {expected}")
    if parts.query or parts.fragment or not text.isprintable() or " " in text:
        raise BadSetting(URL_VARIABLE, f"it has more than an address; {expected}")
    return text.rstrip("/")


def _name(given: Mapping[str, str], variable: str) -> str:
    name = given.get(variable, "sparse")
    if not name.isprintable():
        raise BadSetting(variable, f"{name!r} is no name")
    return name


def _authority(given: Mapping[str, str]) -> Path | None:
    if CA_VARIABLE not in given:
        return None
    # Only here: few need it, and what reads certificates takes its time to import.
    from brokers.mqtt.tls_files import read_certificate

    path = Path(given[CA_VARIABLE]).expanduser()
    try:
        read_certificate(path)
    except BadFile as error:
        raise BadSetting(CA_VARIABLE, str(error)) from None
    return path


def _token(given: Mapping[str, str]) -> str:
    if TOKEN_VARIABLE in given and TOKEN_FILE_VARIABLE in given:
        raise BadSetting(TOKEN_VARIABLE, f"{TOKEN_FILE_VARIABLE} is there, too: expected one of them")
    variable = TOKEN_FILE_VARIABLE if TOKEN_FILE_VARIABLE in given else TOKEN_VARIABLE
    token = given.get(TOKEN_VARIABLE, "")
    if TOKEN_FILE_VARIABLE in given:
        token = _file_text(Path(given[TOKEN_FILE_VARIABLE]).expanduser()).strip()
        if not token:
            raise BadSetting(TOKEN_FILE_VARIABLE, f"{given[TOKEN_FILE_VARIABLE]} is empty: expected a token")
    # It goes into a header of HTTP.
    if not (token.isascii() and token.isprintable()):
        raise BadSetting(variable, "the token has characters that no token has: expected one line of printable ASCII")
    return token


def _file_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_TOKEN_LIMIT_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else "it is no text"
        raise BadSetting(TOKEN_FILE_VARIABLE, f"{path} cannot be read: {reason.lower()}") from None
