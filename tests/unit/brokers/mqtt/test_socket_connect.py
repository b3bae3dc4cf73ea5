"""TLS contexts from PEM files."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers.errors import BadFile
from brokers.mqtt.socket_connect import TlsConfig


@pytest.mark.parametrize("text", [None, "hello"])
def test_unusable_ca_file_raises_bad_file(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadFile) as caught:
        TlsConfig(cafile=str(path)).create_context()
    assert caught.value.path == str(path)
