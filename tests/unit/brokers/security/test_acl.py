"""Access lists: what a role that trains may do, who is not there, and how several pipelines share a broker."""

from __future__ import annotations

from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BadFile
from brokers.security.acl import acl_by_user, render_acl
from brokers.security.principals import check_usernames


def pipeline(name: str = "lesson", **more: Any) -> Pipeline:
    table = {
        "pipeline": {"name": name, "kind": "training", "model": "vgg11-small", "cuts": [2, 4, 6]},
        "stage": [{"name": each} for each in ("a", "b", "c", "d")],
    }
    return Pipeline.model_validate({**table, **more})


def may(who: str, what: str) -> set[str]:
    """The stages and sources, by the last levels of their filters, that somebody may read or write."""
    rights = acl_by_user(pipeline(), "local")[who]
    found = {topic.removeprefix("sparse/local/") for topic, access in rights.items() if access in (what, "readwrite")}
    return {topic.removeprefix("lesson/") for topic in found}


def test_the_first_stage_of_a_training_hears_all_and_writes_to_all() -> None:
    assert may("lesson.a", "read") == {"a/in/+", "a/up/+", "b/up/+", "c/up/+", "d/up/+", "source/up/+"}
    assert may("lesson.a", "write") == {"a/in/+", "a/up/+", "b/in/+", "c/in/+", "d/in/+", "source/+/inbox"}


def test_a_later_stage_of_a_training_knows_the_first_and_its_neighbours() -> None:
    assert may("lesson.c", "read") == {"c/in/+", "c/up/+", "a/up/+"}
    assert may("lesson.c", "write") == {"c/up/+", "a/in/+", "b/in/+", "d/in/+", "source/+/inbox"}


def test_a_source_that_trains_writes_to_all_and_hears_the_first() -> None:
    assert may("lesson.source", "read") == {"source/+/inbox", "source/up/+", "a/up/+"}
    assert may("lesson.source", "write") == {"source/up/+", "a/in/+", "b/in/+", "c/in/+", "d/in/+", "results/+"}


def test_nobody_trains_by_the_front_door() -> None:
    everybody = acl_by_user(pipeline(), "local")
    everybody.pop("operator")
    assert not [topic for rights in everybody.values() for topic in rights if topic.endswith("/tasks")]


def test_who_is_elsewhere_is_not_named() -> None:
    away = pipeline(
        stage=[{"name": "a"}, {"name": "b", "site": "cloud"}, {"name": "c"}, {"name": "d"}],
        site=[{"name": "local", "links": [{"to": "cloud"}], "cameras": ["door"]}, {"name": "cloud"}],
    )
    assert acl_by_user(away, "cloud").keys() == {"lesson.b", "broker.local", "monitor", "operator"}
    assert "lesson.b" not in acl_by_user(away, "local")
    assert acl_by_user(away, "local")["camera.door"] == {"sparse/local/ingress/door": "write"}


def test_a_camera_writes_to_where_the_gateway_reads_from_whatever_site_it_comes() -> None:
    away = pipeline(
        site=[{"name": "local"}, {"name": "yard", "links": [{"to": "local"}], "cameras": ["gate"]}],
        source={"kind": "ingress"},
    )
    assert acl_by_user(away, "yard")["camera.gate"] == {"sparse/local/ingress/gate": "write"}
    assert acl_by_user(away, "local")["broker.yard"]["sparse/local/ingress/+"] == "write"


def test_a_bridge_that_logs_in_by_password_has_its_own_name() -> None:
    link = {"to": "cloud", "user": "fog-7", "password_file": "secret"}
    away = pipeline(site=[{"name": "local", "links": [link]}, {"name": "cloud"}])
    rights = acl_by_user(away, "cloud")
    assert rights["fog-7"] == rights["broker.local"]


def test_no_right_stands_twice() -> None:
    lines = render_acl(pipeline(), "local").split("\n\n")
    assert len(lines) > 5
    for block in lines:
        topics = [line.split()[-1] for line in block.splitlines() if line.startswith("topic ")]
        assert len(topics) == len(set(topics))


@pytest.mark.parametrize("name", ["broker", "camera", "broker.cloud", "a.b"])
def test_a_pipeline_that_could_be_taken_for_somebody_else_is_refused(name: str) -> None:
    with pytest.raises(BadFile, match="cannot be told apart"):
        check_usernames(pipeline(name))


def test_a_name_that_fits_into_no_certificate_is_refused() -> None:
    with pytest.raises(BadFile, match="has 66 characters, a certificate's name has at most 64"):
        check_usernames(pipeline("p" * 64))


def test_a_camera_has_one_site() -> None:
    with pytest.raises(BadFile, match="'door' is at 'local' and at 'cloud': one camera has one site"):
        check_usernames(
            pipeline(
                site=[
                    {"name": "local", "links": [{"to": "cloud"}], "cameras": ["door"]},
                    {"name": "cloud", "cameras": ["door"]},
                ]
            )
        )
