"""Options and output of the benchmarks: a table for people and, with `--json`, one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from brokers.server.mosquitto_conf import find_mosquitto

# Heading -> key of a row, and format specification of its values.
Columns = Mapping[str, tuple[str, str]]


def make_parser(module_doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--json`, and with the module's docstring as its description."""
    parser = argparse.ArgumentParser(description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


def add_broker_option(parser: argparse.ArgumentParser) -> None:
    default = "mosquitto" if find_mosquitto() else "embedded"
    parser.add_argument("--broker", choices=("mosquitto", "embedded"), default=default, help=f"(default {default})")


def print_table(title: str, columns: Columns, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a table; text is aligned left, numbers right, and None is an empty cell."""
    rows = list(rows)
    table = Table(title=title, title_justify="left")
    for heading, (key, _) in columns.items():
        is_text = any(isinstance(row[key], str) for row in rows)
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in rows:
        values = ((row[key], specification) for key, specification in columns.values())
        table.add_row(*("" if value is None else format(value, specification) for value, specification in values))
    Console(width=120).print(table)


def print_json(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the result as one line of JSON if the user wants it."""
    if options.json:
        print(json.dumps(result))
