"""Names of clients and brokers: unambiguous, and short enough for a certificate."""

from __future__ import annotations

import pytest

from brokers.errors import BadFile
from brokers.security.principals import check_usernames
from tests.unit.brokers.security.test_acl import make_pipeline


@pytest.mark.parametrize("name", ["broker", "camera", "broker.cloud", "a.b"])
def test_ambiguous_pipeline_name_raises_bad_file(name: str) -> None:
    with pytest.raises(BadFile, match="is ambiguous in an access list") as caught:
        check_usernames(make_pipeline(name))
    assert caught.value.key == "pipeline.name"


def test_name_too_long_for_a_certificate_raises_bad_file() -> None:
    with pytest.raises(BadFile, match="has 66 characters, a certificate's name has at most 64"):
        check_usernames(make_pipeline("p" * 64))


def test_camera_at_two_sites_raises_bad_file() -> None:
    sites = [
        {"name": "local", "links": [{"to": "cloud"}], "cameras": ["door"]},
        {"name": "cloud", "cameras": ["door"]},
    ]
    with pytest.raises(BadFile, match="'door' is at 'local' and at 'cloud': a camera has one site"):
        check_usernames(make_pipeline(site=sites))
