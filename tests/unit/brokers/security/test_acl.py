"""The access control list: the topics that each user of a pipeline may read and write."""

from __future__ import annotations

from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BadFile
from brokers.security.acl import acl_by_user, check_usernames, render_acl


def make_pipeline(name: str = "lesson", **tables: Any) -> Pipeline:
    """A training pipeline with the stages a, b, c and d."""
    training = {
        "pipeline": {"name": name, "kind": "training", "model": "vgg11-small", "cuts": [2, 4, 6]},
        "stage": [{"name": stage} for stage in "abcd"],
    }
    return Pipeline.model_validate({**training, **tables})


def allowed_filters(user: str, access: str) -> set[str]:
    """The last levels of the filters that a user may read or write."""
    rights = acl_by_user(make_pipeline(), "local")[user]
    filters = {topic.removeprefix("sparse/local/") for topic, mode in rights.items() if mode in (access, "readwrite")}
    return {topic.removeprefix("lesson/") for topic in filters}


def test_first_training_stage_exchanges_messages_with_all() -> None:
    assert allowed_filters("lesson.a", "read") == {"a/in/+", "a/up/+", "b/up/+", "c/up/+", "d/up/+", "source/up/+"}
    assert allowed_filters("lesson.a", "write") == {
        *("a/in/+", "a/up/+", "b/in/+", "c/in/+", "d/in/+", "source/+/inbox")
    }


def test_later_training_stage_writes_to_the_first_and_its_neighbours() -> None:
    assert allowed_filters("lesson.c", "read") == {"c/in/+", "c/up/+", "a/up/+"}
    assert allowed_filters("lesson.c", "write") == {"c/up/+", "a/in/+", "b/in/+", "d/in/+", "source/+/inbox"}


def test_training_source_writes_to_all_stages_and_reads_the_first() -> None:
    assert allowed_filters("lesson.source", "read") == {"source/+/inbox", "source/up/+", "a/up/+"}
    assert allowed_filters("lesson.source", "write") == {
        *("source/up/+", "a/in/+", "b/in/+", "c/in/+", "d/in/+", "results/+")
    }


def test_training_grants_no_shared_task_topic() -> None:
    users = acl_by_user(make_pipeline(), "local")
    users.pop("operator")
    assert not [topic for rights in users.values() for topic in rights if topic.endswith("/tasks")]


def test_users_of_other_sites_are_not_listed() -> None:
    pipeline = make_pipeline(
        stage=[{"name": "a"}, {"name": "b", "site": "cloud"}, {"name": "c"}, {"name": "d"}],
        site=[{"name": "local", "links": [{"to": "cloud"}], "cameras": ["door"]}, {"name": "cloud"}],
    )
    assert acl_by_user(pipeline, "cloud").keys() == {"lesson.b", "broker.local", "monitor", "operator"}
    assert "lesson.b" not in acl_by_user(pipeline, "local")
    assert acl_by_user(pipeline, "local")["camera.door"] == {"sparse/local/ingress/door": "write"}


def test_camera_writes_to_the_ingress_of_the_source_site() -> None:
    pipeline = make_pipeline(
        site=[{"name": "local"}, {"name": "yard", "links": [{"to": "local"}], "cameras": ["gate"]}],
        source={"kind": "ingress"},
    )
    assert acl_by_user(pipeline, "yard")["camera.gate"] == {"sparse/local/ingress/gate": "write"}
    assert acl_by_user(pipeline, "local")["broker.yard"]["sparse/local/ingress/+"] == "write"


def test_bridge_with_a_password_has_the_rights_under_its_user() -> None:
    link = {"to": "cloud", "user": "fog-7", "password_file": "secret"}
    rights = acl_by_user(make_pipeline(site=[{"name": "local", "links": [link]}, {"name": "cloud"}]), "cloud")
    assert rights["fog-7"] == rights["broker.local"]


def test_rendered_list_repeats_no_topic() -> None:
    blocks = render_acl(make_pipeline(), "local").split("\n\n")
    assert len(blocks) > 5
    for block in blocks:
        topics = [line.split()[-1] for line in block.splitlines() if line.startswith("topic ")]
        assert len(topics) == len(set(topics))


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
