"""The series of a page in Prometheus' text format, read by prometheus_client's parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

SeriesValues = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse_exposition(text: str) -> SeriesValues:
    """The values of all series by name and labels; a series that occurs twice fails, as it does in Prometheus."""
    series: SeriesValues = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in series, f"{key} occurs twice"
            series[key] = sample.value
    return series


def select_series(series: SeriesValues, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
    """The series of a name that have these labels among theirs."""
    selected = set(labels.items())
    return {key: value for (known, key), value in series.items() if known == name and selected <= key}


def series_value(series: SeriesValues, name: str, **labels: str) -> float:
    """The value of the only series of a name that has these labels among its own."""
    (value,) = select_series(series, name, **labels).values()
    return value
