"""Prompts, and responses where there are any, from a file or a Hugging Face data set."""

from pathlib import Path
from typing import Any

from pact_tune.data import BadRow, as_text
from pact_tune.errors import UserError
from pact_tune.rows import Source, read_rows

Row = dict[str, Any]


def read_prompts(
    source: Source,
    *,
    name: str | None = None,
    split: str | None = None,
    where: dict[str, str] | None = None,
    limit: int | None = None,
    options: dict[str, Any] | None = None,
) -> list[Row]:
    """Reads rows in their order.

    Args:
        source (Source): what :func:`pact_tune.rows.read_rows` reads; a .txt file holds one prompt a line.
        name (str | None): configuration of a Hub data set.
        split (str | None): split of a Hub data set; default "train".
        where (dict[str, str] | None): keep the rows whose columns have these values.
        limit (int | None): at most how many rows, counted after `where`; None: all.
        options (dict[str, Any] | None): what a Hub data set's own builder needs to be told.

    Returns:
        list[Row]: at least one row; a line of text, or a string in a JSON list, becomes ``{"prompt": text}``.

    Raises:
        UserError: the source cannot be read, a row of it is broken, or no row is left.
    """
    if limit is not None and limit < 1:
        raise UserError(f"The number of prompts must be at least 1, not {limit}.")
    where = where or {}
    rows = [{"prompt": row} if isinstance(row, str) else row for row in read_rows(source, name, split, options)]
    for number, row in enumerate(rows, 1):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise UserError(
                f"Row {number} of '{source}' is neither a text nor an object with columns: mend or remove it."
            )
    if missing := [column for column in where if rows and column not in rows[0]]:
        raise UserError(f"'{source}' has no column '{missing[0]}'; it has: {_columns(rows[0])}.")
    kept = [row for row in rows if all(str(row.get(column)) == value for column, value in where.items())]
    if not kept:
        condition = " with " + ", ".join(f"{column}={value}" for column, value in where.items()) if where else ""
        raise UserError(f"'{source}' holds no rows{condition}: give a file or data set that has some.")
    return kept[:limit]


def column(rows: list[Row], name: str, source: str | Path) -> list[str]:
    """The texts of one column.

    Args:
        rows (list[Row]): rows of :func:`read_prompts`.
        name (str): the column.
        source (str | Path): where the rows came from, for messages.

    Returns:
        list[str]: one text a row, in order.

    Raises:
        UserError: no such column, or a row whose value is not a text or is blank.
    """
    if name not in rows[0]:
        raise UserError(f"'{source}' has no column '{name}'; it has: {_columns(rows[0])}.")
    texts = []
    for number, row in enumerate(rows, 1):
        try:
            text = as_text(row.get(name), "a value")
            text.encode()  # half a surrogate pair, which JSON can write, is no text
        except (BadRow, UnicodeEncodeError):
            text = ""
        if not text.strip():
            raise UserError(f"Row {number} of '{source}' has no text in column '{name}': mend or remove the row.")
        texts.append(text)
    return texts


def _columns(row: Row) -> str:
    return ", ".join(map(str, row))
