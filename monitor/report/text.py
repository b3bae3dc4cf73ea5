"""Numbers as a person reads them. Pure."""

from __future__ import annotations


def format_number(value: float) -> str:
    """A number as a person reads it: three digits that count, and all of a whole number."""
    if value == int(value) and abs(value) < 1e9:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.2e}"
