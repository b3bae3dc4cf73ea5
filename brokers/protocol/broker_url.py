"""Where a broker is: `mqtt://[user[:password]@]host[:port]`, `mqtts://...` for TLS, `mqtt+unix:///path`. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from brokers.errors import UsageError

MQTT_PORT = 1883
MQTTS_PORT = 8883


@dataclass(eq=False)
class BadAddress(UsageError):
    """A broker address that cannot be read; `shown` is the address without what may be a password."""

    shown: str
    problem: str

    def __str__(self) -> str:
        return (
            f"broker address {self.shown!r}: {self.problem}; expected mqtt://[user[:password]@]host[:port], "
            "mqtts://[user[:password]@]host[:port] or mqtt+unix:///path"
        )


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """A parsed address; `str()` of it never holds the password."""

    scheme: str  # "mqtt", "mqtts" or "mqtt+unix"
    host: str  # a name, an IPv4 or IPv6 address, or the path of a Unix socket
    port: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def is_tls(self) -> bool:
        return self.scheme == "mqtts"

    @property
    def is_unix_socket(self) -> bool:
        return self.scheme == "mqtt+unix"

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        if self.is_unix_socket:
            return f"{self.scheme}://{user}{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{user}{host}:{self.port}"


def parse_address(text: str) -> BrokerAddress:
    """Return the address in `text`; raise `BadAddress`, one line that says what was expected."""
    scheme, separator, rest = text.partition("://")
    # Without a scheme, too, what stands before the last @ may be a password.
    shown = f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else text.rpartition("@")[2]
    if scheme not in ("mqtt", "mqtts", "mqtt+unix") or not separator:
        raise BadAddress(shown, f"unknown scheme {scheme!r}" if separator else "it has no scheme")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        problem = "the port is not a number from 1 to 65535" if "ort" in str(error) else str(error)
        raise BadAddress(shown, problem) from error
    if parts.query or parts.fragment:
        raise BadAddress(shown, "nothing may follow a '?' or '#'")
    user = unquote(parts.username) if parts.username is not None else None
    password = unquote(parts.password) if parts.password is not None else None
    if scheme == "mqtt+unix":
        if host or not parts.path.strip("/"):
            raise BadAddress(shown, "a Unix socket needs an absolute path after three slashes")
        if not unquote(parts.path).isprintable():
            raise BadAddress(shown, "the path holds a character that cannot be printed")
        return BrokerAddress(scheme, unquote(parts.path), 0, user, password)
    if not host:
        raise BadAddress(shown, "it names no host")
    _check_host(host, shown)
    if parts.path.strip("/"):
        raise BadAddress(shown, f"nothing may follow the port, got {parts.path.rpartition('@')[2]!r}")
    if port == 0:
        raise BadAddress(shown, "the port is not a number from 1 to 65535")
    return BrokerAddress(scheme, host, port or (MQTTS_PORT if scheme == "mqtts" else MQTT_PORT), user, password)


def _check_host(host: str, shown: str) -> None:
    """Refuse what the resolver would fail on with an error of another kind than for a host that does not exist."""
    problem = f"{host!r} is no name of a host: each part between two dots has 1 to 63 characters"
    try:
        host.encode("idna")  # as `socket.getaddrinfo` does
    except UnicodeError as error:
        raise BadAddress(shown, problem) from error
    if not host.isprintable() or " " in host:
        raise BadAddress(shown, f"{host!r} is no name of a host")
