"""The pipeline file: its defaults and meaning, and the line that each mistake raises."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.config.pipeline_file import add_error_context, load_pipeline, resolve_broker_address
from brokers.config.schema import LOCAL_SITE
from brokers.errors import BadFile, UsageError, did_you_mean
from brokers.protocol.topics import StageTopics

VALID = """\
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
    path = tmp_path / "street.toml"
    path.write_text(VALID, encoding="utf-8")
    return path


def mistake(file: Path, text: str) -> str:
    """The error line of a file with this text, without the path."""
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadFile) as caught:
        load_pipeline(file)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{file}: ")
    return line.removeprefix(f"{file}: ")


# Valid files --------------------------------------------------------------------------------------------------------


def test_omitted_keys_have_defaults(file: Path) -> None:
    pipeline = load_pipeline(file)
    assert (pipeline.name, pipeline.pipeline.cuts, pipeline.folder) == ("street", (8, 13), file.parent)
    head = pipeline.find_stage("head")
    assert (head.workers, head.site, head.device, head.max_batch, head.wire) == (1, LOCAL_SITE, "auto", 1, "float32")
    assert (pipeline.source.kind, pipeline.source.path, pipeline.source.name) == ("video", "street.mp4", "source")


def test_stages_know_their_order_and_parts(file: Path) -> None:
    tail = '[[stage]]\nname = "tail"'
    file.write_text(VALID.replace(tail, f'[[stage]]\nname = "blur"\nexecutor = "m:f"\n{tail}'), encoding="utf-8")
    pipeline = load_pipeline(file)
    head, body, blur, last = pipeline.stage
    assert [pipeline.next_stage(stage) for stage in pipeline.stage] == [body, blur, last, None]
    assert [pipeline.part_index(stage) for stage in (head, body, last)] == [0, 1, 2]
    assert pipeline.topics(blur) == StageTopics(LOCAL_SITE, "street", "blur")


def test_broker_address_comes_from_option_file_or_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(VALID + '[[site]]\nname = "cloud"\nbroker = "mqtts://c:1"\n', encoding="utf-8")
    pipeline = load_pipeline(file)
    monkeypatch.delenv("SPARSE_BROKER", raising=False)
    assert resolve_broker_address(pipeline, "cloud") == "mqtts://c:1"
    assert resolve_broker_address(pipeline, LOCAL_SITE) is None
    monkeypatch.setenv("SPARSE_BROKER", "mqtt://here:1")
    assert resolve_broker_address(pipeline, "cloud") == "mqtts://c:1"
    assert resolve_broker_address(pipeline, LOCAL_SITE) == "mqtt://here:1"
    assert resolve_broker_address(None, LOCAL_SITE) == "mqtt://here:1"
    assert resolve_broker_address(pipeline, "cloud", "mqtt://option:1") == "mqtt://option:1"
    assert resolve_broker_address(pipeline, "cloud", from_parent=True) == "mqtt://here:1"
    assert pipeline.configured_broker(LOCAL_SITE) is None


def test_unknown_stage_and_site_raise_with_the_nearest_name(file: Path) -> None:
    pipeline = load_pipeline(file)
    with pytest.raises(BadFile, match=re.escape("no stage 'haed' (did you mean 'head'?): expected one of head, body")):
        pipeline.find_stage("haed")
    with pytest.raises(BadFile, match=re.escape("no site 'cloud': the file has no [[site]]")):
        pipeline.find_site("cloud")


def test_error_context_adds_the_file_to_errors_with_a_key(file: Path) -> None:
    pipeline = load_pipeline(file)
    with pytest.raises(BadFile) as caught, add_error_context(pipeline):
        raise UsageError("NotAVideo", "street.mp4: not a video", key="source.path")
    assert str(caught.value) == f"{file}: source.path: street.mp4: not a video"
    with pytest.raises(UsageError) as other, add_error_context(pipeline):
        raise UsageError("NoDevice", "no such device")
    assert other.value.code == "NoDevice"


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_unreadable_file_raises(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"nowhere\.toml: no such file$"):
        load_pipeline(tmp_path / "nowhere.toml")
    with pytest.raises(BadFile, match="Is a directory"):
        load_pipeline(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(BadFile, match=r"not text: expected TOML in UTF-8"):
        load_pipeline(binary)


@pytest.mark.parametrize(
    "text", ["[pipeline", "name street", "a = 1\na = 2", "a = " + "[" * 100_000], ids=lambda text: text[:20]
)
def test_text_that_is_not_toml_raises(file: Path, text: str) -> None:
    assert mistake(file, text).startswith("not TOML: ")


# A line added to a table of the valid file, and the start of the error.
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
    "max_bach = 2": "stage.head.max_bach: unknown key (did you mean 'max_batch'?)",
    'workers = "two"': "stage.head.workers: expected a whole number, got 'two'",
    "workers = 1.5": "stage.head.workers: expected a whole number, got 1.5",
    "workers = true": "stage.head.workers: expected a whole number, got true",
    "workers = [1]": "stage.head.workers: expected a whole number, got a list",
    "workers = 0": "stage.head.workers: expected greater than or equal to 1, got 0",
    "workers = 65": "stage.head.workers: expected less than or equal to 64, got 65",
    'max_wait_ms = "5"': "stage.head.max_wait_ms: expected a number, got '5'",
    "max_wait_ms = -1": "stage.head.max_wait_ms: expected greater than or equal to 0, got -1",
    'wire = "int8"': "stage.head.wire: expected 'float32', 'float16' or 'bfloat16', got 'int8'",
    'device = "gpu"': "stage.head.device: ",
    'site = "moon"': "stage.head.site: no site 'moon': expected one of local",
    'site = "locl"': "stage.head.site: no site 'locl' (did you mean 'local'?): expected one of local",
    'site = "a/b"': "stage.head.site: site 'a/b' is not a name",
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
    'site = "moon"': "source.site: no site 'moon': expected one of local",
    f'pace = "{"x" * 10_000}"': "source.pace: expected 'max' or 'native', got 'xxx",
    '[[site]]\nname = "c"\nbrocker = "x"': "site.c.brocker: unknown key (did you mean 'broker'?): expected",
    '[[site]]\nname = "c"\nbroker = "u:secret@x"': "site.c.broker: broker address 'x': ",
    '[[site]]\nname = "c"\n[[site]]\nname = "c"': "site.c: expected one site of this name, got 2",
    f'[[site]]\nname = "{"s" * 65}"': "site.0.name: site 'sss",
    'site = "c"\n[[site]]\nname = "c"': "site.local: no links connect it with 'c', the site of the source",
    '[[site]]\nname = "local"\nlinks = [{ to = "moon" }]': "site.local.links: no site 'moon'",
    '[[site]]\nname = "local"\nlinks = [{ to = "local" }]': "site.local.links: the link to 'local' makes a loop",
    '[[site]]\nname = "c"\nlinks = [{ to = "d", delay = 1 }]': "site.c.links.d.delay: unknown key (did you mean",
    '[[site]]\nname = "c"\nlinks = [{ to = "d", delay_ms = -1 }]': "site.c.links.d.delay_ms: expected greater",
    '[[site]]\nname = "c"\nlinks = [{ to = "d", rate_mbit = 0 }]': "site.c.links.d.rate_mbit: expected greater",
    '[[site]]\nname = "c"\nlinks = [{ to = "d", password_file = "p" }]': "site.c.links.d: password_file needs a user",
    '[[site]]\nname = "c"\nlinks = [{ to = "d", user = "u\\nallow_anonymous true" }]': "site.c.links.d.user: ",
    '[[site]]\nname = "c"\nlinks = [{ to = "d", user = "u v" }]': "site.c.links.d.user: ",
    '[[site]]\nname = "c"\ncameras = ["a/b"]': "site.c.cameras.0: source 'a/b' is not a name",
    "[sauce]": "sauce: unknown key (did you mean 'source'?): expected one of pipeline, stage, site, source",
    "[training]": "training: expected pipeline.kind = 'training' for this table, got 'inference'",
}


@pytest.mark.parametrize(
    ("after", "text", "expected"),
    [("cuts = [8, 13]", *case) for case in IN_PIPELINE.items()]
    + [('name = "head"', *case) for case in IN_STAGE.items()]
    + [('path = "street.mp4"', *case) for case in IN_SOURCE.items()],
    ids=lambda text: text[:60],
)
def test_wrong_key_or_value_raises_with_the_expectation(file: Path, after: str, text: str, expected: str) -> None:
    line = mistake(file, VALID.replace(after, f"{after}\n{text}"))
    assert line.startswith(expected)
    assert len(line) < 500


# A text in the valid file, its replacement, and the start of the error.
REPLACED = [
    ("[pipeline]", "[pipelin]", "pipeline: is missing"),
    ("[pipeline]", 'path = "x"\n[pipeline]', "path: unknown key: expected one of pipeline, stage, site, source"),
    ('name = "street"\n', "", "pipeline.name: is missing"),
    ('"street"', "5", "pipeline.name: expected text, got 5"),
    ('"street"', '"st/reet"', "pipeline.name: pipeline 'st/reet' is not a name: expected 1 to 64 letters"),
    ('"street"', '"source"', "pipeline.name: pipeline 'source' is not a name: expected 1 to 64 letters"),
    ('"body"', '"bo+dy"', "stage.1.name: stage 'bo+dy' is not a name"),
    ('"body"', '""', "stage.1.name: stage '' is not a name"),
    ('"body"', '"head"', "stage.head: expected one stage of this name, got 2"),
    ("[8, 13]", "8", "pipeline.cuts: expected a list, got 8"),
    ("[8, 13]", '[8, "x"]', "pipeline.cuts.1: expected a whole number, got 'x'"),
    ("[8, 13]", "[0, 13]", "pipeline.cuts.0: expected greater than or equal to 1, got 0"),
    ("[8, 13]", "[13, 8]", "pipeline.cuts: expected ascending numbers, each once, got [13, 8]"),
    ("[8, 13]", "[8, 8]", "pipeline.cuts: expected ascending numbers, each once, got [8, 8]"),
    ("[8, 13]", "[8]", "pipeline.cuts: 1 cuts make 2 parts: expected as many stages without an executor, got 3"),
    ("[8, 13]", "[8, 9, 10]", "pipeline.cuts: 3 cuts make 4 parts: expected as many stages without an executor, got 3"),
]
PIPELINE = '[pipeline]\nname = "p"\n'
STAGE = '[[stage]]\nname = "a"\nexecutor = "m:f"\n'
WHOLE = [
    ("", "pipeline: is missing"),
    (PIPELINE, "stage: is missing: expected one or more [[stage]]"),
    ("stage = []\n" + PIPELINE, "stage: expected one or more [[stage]], got a list"),
    (PIPELINE + STAGE.replace("[[stage]]", "[stage]"), "stage: expected one or more [[stage]], got a table"),
    ("pipeline = 5\n" + STAGE, "pipeline: expected a table, got 5"),
    ('[[pipeline]]\nname = "p"\n' + STAGE, "pipeline: expected a table, got a list"),
    (PIPELINE + 'model = "vgg11"\n' + STAGE, "pipeline.cuts: 0 cuts make 1 parts: expected as many stages"),
    (PIPELINE + "cuts = [3]\n" + STAGE, "pipeline.cuts: expected a model in [pipeline] to cut at [3]"),
    (PIPELINE + STAGE + '[[stage]]\nname = "b"\n', "stage.b: expected an executor, or a model in [pipeline]"),
]
TRAINING = VALID.replace("cuts =", 'kind = "training"\ncuts =')
OF_TRAINING = [
    ('name = "body"', 'name = "body"\nmax_batch = 2', "stage.body.max_batch: expected 1 in training, got 2"),
    ('name = "body"', 'name = "body"\nwire = "float16"', "stage.body.wire: expected 'float32' in training"),
    ("[source]", '[[stage]]\nname = "x"\nexecutor = "m:f"\n[source]', "stage.x.executor: a training pipeline has only"),
    ("[source]", "[training]\nbatch = 2\n[source]", "training.micro_batches: expected at most batch = 2, got 4"),
    (
        'name = "tail"',
        """name = "tail"
site = "far"
[[site]]
name = "far"
links = [{ to = "local" }]
[[site]]
name = "local"
[training]
labels = "stay\"""",
        "training.labels: 'stay' needs the last stage at the site of the source: expected site = 'local'",
    ),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    WHOLE
    + [(VALID.replace(old, new, 1), expected) for old, new, expected in REPLACED]
    + [(TRAINING.replace(old, new, 1), expected) for old, new, expected in OF_TRAINING],
    ids=lambda text: text[:60],
)
def test_inconsistent_file_raises_with_the_expectation(file: Path, text: str, expected: str) -> None:
    assert text not in (VALID, TRAINING)
    assert mistake(file, text).startswith(expected)


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(0, len(VALID)))
def test_any_text_is_valid_or_raises_bad_file(text: str, at: int) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(VALID[:at] + text + VALID[at:])
        file.flush()
        with contextlib.suppress(BadFile):
            assert load_pipeline(file.name).stage


def test_nearest_name_is_suggested_only_if_one_is_similar() -> None:
    assert did_you_mean("hed", ["head", "tail"]) == " (did you mean 'head'?)"
    assert did_you_mean("xyz", ["head", "tail"]) == ""
