"""Benchmark rows as a table in the terminal."""

from typing import Any

from optinfer.course.card import Table


def show(rows: list[dict[str, Any]]) -> Table:
    """All fields that are not raw samples, in the order in which they first appear."""
    columns = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    )
    body = tuple(tuple(_cell(row.get(column)) for column in columns) for row in rows)
    return Table(tuple(columns), body)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
