"""The pipeline file: what it may say, what it means, and one line for each mistake: file, key, expectation."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.config.pipeline_file import did_you_mean, load_pipeline, new_run_folder, resolve_broker_address
from brokers.config.schema import LOCAL_SITE
from brokers.errors import BadFile
from brokers.protocol.topics import StageTopics

GOOD = """\
[pipeline]
name = "street"
model = "yolov3-tiny"
cuts = [8, 13]
[[stage]]
name = "head"
[[stage]]
name = "body"
[[stage]]
name = "tail"
[source]
kind = "video"
path = "street.mp4"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "street.toml"


def mistake(file: Path, text: str) -> str:
    """The line that a file with this text is refused with, without the file's name."""
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadFile) as caught:
        load_pipeline(file)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{file}: ")
    return line.removeprefix(f"{file}: ")


# What it may say ----------------------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_defaults(file: Path) -> None:
    file.write_text(GOOD, encoding="utf-8")
    found = load_pipeline(file)
    assert (found.name, found.pipeline.cuts, found.folder) == ("street", (8, 13), file.parent)
    head = found.find_stage("head")
    assert (head.workers, head.site, head.device, head.max_batch, head.wire) == (1, LOCAL_SITE, "auto", 1, "float32")
    assert (found.source.kind, found.source.path, found.source.name) == ("video", "street.mp4", "source")


def test_stages_follow_one_another_and_know_their_parts(file: Path) -> None:
    text = GOOD.replace(
        '[[stage]]\nname = "tail"', '[[stage]]\nname = "blur"\nexecutor = "m:f"\n[[stage]]\nname = "tail"'
    )
    file.write_text(text, encoding="utf-8")
    found = load_pipeline(file)
    head, body, blur, tail = found.stage
    assert [found.next_stage(stage) for stage in found.stage] == [body, blur, tail, None]
    assert [found.part_index(stage) for stage in (head, body, tail)] == [0, 1, 2]
    assert found.topics(blur) == StageTopics(LOCAL_SITE, "street", "blur")


def test_the_window_can_be_said(file: Path) -> None:
    file.write_text(GOOD + "window = 3\n", encoding="utf-8")
    assert load_pipeline(file).source.window == 3


def test_a_site_has_the_broker_it_states_else_the_one_of_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(GOOD + '[[site]]\nname = "cloud"\nbroker = "mqtts://c:1"\n', encoding="utf-8")
    found = load_pipeline(file)
    monkeypatch.delenv("SPARSE_BROKER", raising=False)
    assert (resolve_broker_address(found, "cloud"), resolve_broker_address(found, LOCAL_SITE)) == ("mqtts://c:1", None)
    monkeypatch.setenv("SPARSE_BROKER", "mqtt://here:1")
    assert (resolve_broker_address(found, "cloud"), resolve_broker_address(found, LOCAL_SITE)) == (
        "mqtts://c:1",
        "mqtt://here:1",
    )
    assert resolve_broker_address(None, LOCAL_SITE) == "mqtt://here:1"
    assert resolve_broker_address(found, "cloud", "mqtt://said:1") == "mqtt://said:1"
    assert resolve_broker_address(found, "cloud", from_parent=True) == "mqtt://here:1"
    assert found.configured_broker(LOCAL_SITE) is None  # what a file says does not depend on where it is read


def test_a_stage_that_is_not_there_is_told_with_the_nearest(file: Path) -> None:
    file.write_text(GOOD, encoding="utf-8")
    with pytest.raises(BadFile, match=re.escape("no stage 'haed' (did you mean 'head'?): it has head, body, tail")):
        load_pipeline(file).find_stage("haed")


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    first = new_run_folder(tmp_path, "street")
    first.mkdir()
    assert new_run_folder(tmp_path, "street") != first
    assert re.fullmatch(r"street-\d{8}-\d{6}", first.name)


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_missing_or_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"nowhere\.toml: no such file$"):
        load_pipeline(tmp_path / "nowhere.toml")
    with pytest.raises(BadFile, match="Is a directory"):
        load_pipeline(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(BadFile, match=r"is not text: expected TOML in UTF-8"):
        load_pipeline(binary)


@pytest.mark.parametrize(
    "text", ["[pipeline", "name street", "a = 1\na = 2", "a = " + "[" * 100_000], ids=lambda t: t[:20]
)
def test_what_is_not_toml_says_so(file: Path, text: str) -> None:
    assert mistake(file, text).startswith("is not TOML: ")


# What is written after a key that is always there, and the line it leads to.
IN_PIPELINE = {
    "colour = 1": "pipeline.colour: unknown key: expected one of name, kind, model, model_settings, weights, cuts",
    "sed = 1": "pipeline.sed: unknown key (did you mean 'seed'?)",
    "seed = 1.5": "pipeline.seed: expected a whole number, got 1.5",
    "weights = 5": "pipeline.weights: expected text, got 5",
    "threshold = 2": "pipeline.threshold: expected less than or equal to 1, got 2",
    "threshold = nan": "pipeline.threshold: expected",
    'kind = "cooking"': "pipeline.kind: expected 'inference' or 'training', got 'cooking'",
}
IN_STAGE = {
    "max_bach = 2": "stage.0.max_bach: unknown key (did you mean 'max_batch'?)",
    'workers = "two"': "stage.0.workers: expected a whole number, got 'two'",
    "workers = 1.5": "stage.0.workers: expected a whole number, got 1.5",
    "workers = true": "stage.0.workers: expected a whole number, got true or false",
    "workers = [1]": "stage.0.workers: expected a whole number, got a list",
    "workers = 0": "stage.0.workers: expected greater than or equal to 1, got 0",
    "workers = 65": "stage.0.workers: expected less than or equal to 64, got 65",
    'max_wait_ms = "5"': "stage.0.max_wait_ms: expected a number, got '5'",
    "max_wait_ms = -1": "stage.0.max_wait_ms: expected greater than or equal to 0, got -1",
    'wire = "int8"': "stage.0.wire: expected 'float32', 'float16' or 'bfloat16', got 'int8'",
    'device = "gpu"': "stage.0.device: ",
    'site = "moon"': "stage 'head': site 'moon' is not one of local",
    'site = "a/b"': "stage.0.site: site 'a/b' is not a name",
}
IN_SOURCE = {
    "pth = 1": "source.pth: unknown key (did you mean 'path'?)",
    "xyzzy = 1": "source.xyzzy: unknown key: expected one of kind, name, site, path",
    "loop = 1": "source.loop: expected true or false, got 1",
    "settings = 1": "source.settings: expected a table, got 1",
    "device = 1.5": "source.device: expected a whole number, got 1.5",
    "limit = 0": "source.limit: expected greater than or equal to 1, got 0",
    "deadline_ms = 0": "source.deadline_ms: expected greater than 0, got 0",
    "deadline_ms = inf": "source.deadline_ms: expected a finite number, got inf",
    "deadline_ms = 1e13": "source.deadline_ms: expected less than or equal to 4294967295000",
    'name = "a b"': "source.name: source 'a b' is not a name",
    'site = "moon"': "source: site 'moon' is not one of local",
    '[[site]]\nname = "c"\nbrocker = "x"': "site.0.brocker: unknown key (did you mean 'broker'?): expected",
    '[[site]]\nname = "c"\nbroker = "u:secret@x"': "site.0.broker: broker address 'x': it has no scheme; expected mqtt://",
    '[[site]]\nname = "c"\n[[site]]\nname = "c"': "site: two sites are named 'c'",
    f'[[site]]\nname = "{"s" * 65}"': "site.0.name: site 'sss",
    'site = "c"\n[[site]]\nname = "c"': "site 'local': no link reaches it from 'c', where the source is",
    '[[site]]\nname = "local"\nlinks = [{ to = "moon" }]': "site 'local': links to 'moon', and there is no such",
    '[[site]]\nname = "local"\nlinks = [{ to = "local" }]': "site 'local': its link to 'local' makes a bridge loop",
    '[[site]]\nname = "c"\nlinks = [{ to = "local", delay = 1 }]': "site.0.links.0.delay: unknown key (did you mean",
    '[[site]]\nname = "c"\nlinks = [{ to = "local", delay_ms = -1 }]': "site.0.links.0.delay_ms: expected greater",
    '[[site]]\nname = "c"\nlinks = [{ to = "local", rate_mbit = 0 }]': "site.0.links.0.rate_mbit: expected greater",
    '[[site]]\nname = "c"\nlinks = [{ to = "l", password_file = "p" }]': "site.0.links.0: password_file: is of a user",
    '[[site]]\nname = "c"\nlinks = [{ to = "l", user = "u\\nallow_anonymous true" }]': "site.0.links.0.user: ",
    '[[site]]\nname = "c"\nlinks = [{ to = "l", user = "u v" }]': "site.0.links.0.user: ",
    '[[site]]\nname = "c"\ncameras = ["a/b"]': "site.0.cameras.0: source 'a/b' is not a name",
    "[sauce]": "sauce: unknown key (did you mean 'source'?): expected one of pipeline, stage, site, source",
}


@pytest.mark.parametrize(
    ("after", "text", "expected"),
    [("cuts = [8, 13]", *case) for case in IN_PIPELINE.items()]
    + [('name = "head"', *case) for case in IN_STAGE.items()]
    + [('path = "street.mp4"', *case) for case in IN_SOURCE.items()],
)
def test_a_wrong_key_is_told_in_one_line_with_what_was_expected(
    file: Path, after: str, text: str, expected: str
) -> None:
    assert mistake(file, GOOD.replace(after, f"{after}\n{text}")).startswith(expected)


# What of the good file is replaced, by what, and the line it leads to.
REPLACED = [
    ("[pipeline]", "[pipelin]", "pipeline: is missing"),
    ("[pipeline]", 'path = "x"\n[pipeline]', "path: unknown key: expected one of pipeline, stage, site, source"),
    ('name = "street"\n', "", "pipeline.name: is missing"),
    ('"street"', "5", "pipeline.name: expected text, got 5"),
    ('"street"', '"st/reet"', "pipeline.name: pipeline 'st/reet' is not a name: expected 1 to 64 letters"),
    ('"street"', '"source"', "pipeline.name: pipeline 'source' is not a name: expected 1 to 64 letters"),
    ('"body"', '"bo+dy"', "stage.1.name: stage 'bo+dy' is not a name"),
    ('"body"', '""', "stage.1.name: stage '' is not a name"),
    ('"body"', '"head"', "stage: two stages are named 'head'"),
    ("[8, 13]", "8", "pipeline.cuts: expected a list, got 8"),
    ("[8, 13]", '[8, "x"]', "pipeline.cuts.1: expected a whole number, got 'x'"),
    ("[8, 13]", "[0, 13]", "pipeline.cuts.0: expected greater than or equal to 1, got 0"),
    ("[8, 13]", "[13, 8]", "pipeline.cuts: must rise, each cut once, got [13, 8]"),
    ("[8, 13]", "[8, 8]", "pipeline.cuts: must rise, each cut once, got [8, 8]"),
    ("[8, 13]", "[8]", "pipeline.cuts: 1 cuts make 2 parts, 3 stages without an executor take one"),
    ("[8, 13]", "[8, 9, 10]", "pipeline.cuts: 3 cuts make 4 parts, 3 stages without an executor take one"),
]
PIPELINE, STAGE = '[pipeline]\nname = "p"\n', '[[stage]]\nname = "a"\nexecutor = "m:f"\n'
WHOLE = [
    ("", "pipeline: is missing"),
    (PIPELINE, "stage: is missing"),
    ("stage = []\n" + PIPELINE, "stage: expected one or more [[stage]], got a list"),
    (PIPELINE + STAGE.replace("[[stage]]", "[stage]"), "stage: expected one or more [[stage]], got a table"),
    ("pipeline = 5\n" + STAGE, "pipeline: expected a table, got 5"),
    ('[[pipeline]]\nname = "p"\n' + STAGE, "pipeline: expected a table, got a list"),
    (PIPELINE + 'model = "vgg11"\n' + STAGE, "pipeline.cuts: 0 cuts make 1 parts, 0 stages"),
    (PIPELINE + "cuts = [3]\n" + STAGE, "pipeline.cuts: there is no model to be cut at [3]"),
    (PIPELINE + STAGE + '[[stage]]\nname = "b"\n', "stage 'b': needs an executor, or the pipeline a model"),
]


@pytest.mark.parametrize(
    ("text", "expected"), WHOLE + [(GOOD.replace(old, new, 1), expected) for old, new, expected in REPLACED]
)
def test_a_file_that_does_not_fit_together_is_told_in_one_line(file: Path, text: str, expected: str) -> None:
    assert text != GOOD
    assert mistake(file, text).startswith(expected)


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(0, len(GOOD)))
def test_no_text_raises_anything_but_one_line(text: str, at: int) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(GOOD[:at] + text + GOOD[at:])
        file.flush()
        with contextlib.suppress(BadFile):
            assert load_pipeline(file.name).stage


def test_the_nearest_name_is_offered_only_where_one_is_near() -> None:
    assert did_you_mean("hed", ["head", "tail"]) == " (did you mean 'head'?)"
    assert did_you_mean("xyz", ["head", "tail"]) == ""
