"""Broker addresses: `mqtt://[user[:password]@]host[:port]`, `mqtts://...` for TLS, `mqtt+unix:///path`."""

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from brokers.errors import UsageError

MQTT_PORT = 1883
MQTTS_PORT = 8883


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """A parsed address; `str()` of it does not contain the password.

    `host` is a name, an IPv4 or IPv6 address, or the path of a Unix socket; `scheme` is "mqtt", "mqtts" or "mqtt+unix".
    """

    scheme: str
    host: str
    port: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def is_tls(self) -> bool:
        return self.scheme == "mqtts"

    @property
    def is_unix_socket(self) -> bool:
        return self.scheme == "mqtt+unix"

    @property
    def host_and_port(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"{self.scheme}://{user}{self.host if self.is_unix_socket else self.host_and_port}"


def parse_address(text: str) -> BrokerAddress:
    """Parse a broker address. Raises `UsageError` ("BadAddress"), whose message does not contain the password."""
    try:
        return _parse(text)
    except ValueError as error:
        # Even without a scheme, text before the last @ may be a password.
        scheme, separator, rest = text.partition("://") if "://" in text else ("", "", text)
        message = (
            f"broker address {scheme + separator + rest.rpartition('@')[2]!r}: {error}; expected "
            "mqtt://[user[:password]@]host[:port], mqtts://[user[:password]@]host[:port] or mqtt+unix:///path"
        )
        raise UsageError("BadAddress", message) from None


def _parse(text: str) -> BrokerAddress:
    """Parse an address. Raises `ValueError` with the reason, without the password."""
    scheme, separator, _ = text.partition("://")
    if not separator:
        raise ValueError("it has no scheme")
    if scheme not in ("mqtt", "mqtts", "mqtt+unix"):
        raise ValueError(f"unknown scheme {scheme!r}")
    try:
        parts = urlsplit(text)
    except ValueError:  # its text may contain the password
        raise ValueError("the host is not valid") from None
    if parts.query or parts.fragment:
        raise ValueError("nothing may follow a '?' or '#'")
    user = unquote(parts.username) if parts.username is not None else None
    password = unquote(parts.password) if parts.password is not None else None
    if scheme == "mqtt+unix":
        path = unquote(parts.path)
        if parts.hostname or not path.strip("/"):
            raise ValueError("a Unix socket needs an absolute path after three slashes")
        if not path.isprintable():
            raise ValueError("the path contains a character that cannot be printed")
        return BrokerAddress(scheme, path, 0, user, password)
    try:
        port = parts.port
    except ValueError:  # the same
        port = 0
    if port == 0:
        raise ValueError("the port is not a number from 1 to 65535")
    host = parts.hostname or ""
    _check_host(host)
    if parts.path.strip("/"):
        raise ValueError(f"nothing may follow the port, got {parts.path.rpartition('@')[2]!r}")
    return BrokerAddress(scheme, host, port or (MQTTS_PORT if scheme == "mqtts" else MQTT_PORT), user, password)


def _check_host(host: str) -> None:
    """Reject names for which `socket.getaddrinfo` would raise another error than for a host that does not exist."""
    if not host:
        raise ValueError("it has no host")
    if not host.isprintable() or " " in host:
        raise ValueError(f"{host!r} is not a host name")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"{host!r} is not a host name: each label between two dots has 1 to 63 characters") from None
