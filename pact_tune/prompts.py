"""Prompts, and responses where there are any, from a file or a Hugging Face data set."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from pact_tune.errors import UserError

Row = dict[str, Any]


def read_rows(
    source: str | Path,
    *,
    name: str | None = None,
    split: str = "train",
    where: dict[str, str] | None = None,
    limit: int | None = None,
    options: dict[str, Any] | None = None,
) -> list[Row]:
    """Reads rows in their order.

    Args:
        source (str | Path): a .jsonl, .json, .csv, .tsv or .txt file (one prompt a line), or a data set of the Hub.
        name (str | None): configuration of a Hub data set.
        split (str): split of a Hub data set.
        where (dict[str, str] | None): keep the rows whose columns have these values.
        limit (int | None): at most how many rows, counted after `where`; None: all.
        options (dict[str, Any] | None): what a Hub data set's own builder needs to be told.

    Returns:
        list[Row]: at least one row; a line of text, or a string in a JSON list, becomes ``{"prompt": text}``.

    Raises:
        UserError: the source cannot be read, or no row is left.
    """
    if limit is not None and limit < 1:
        raise UserError(f"The number of prompts must be at least 1, not {limit}.")
    where = where or {}
    # Whatever the rows come from, they are filtered, counted and cut in one place below.
    rows = (
        _read_file(Path(source)) if Path(source).is_file() else _read_data_set(str(source), name, split, options or {})
    )
    if missing := [column for column in where if rows and column not in rows[0]]:
        raise UserError(f"'{source}' has no column '{missing[0]}'; it has: {_columns(rows[0])}.")
    kept = [row for row in rows if all(str(row[column]) == value for column, value in where.items())]
    if not kept:
        condition = " with " + ", ".join(f"{column}={value}" for column, value in where.items()) if where else ""
        raise UserError(f"'{source}' holds no rows{condition}: give a file or data set that has some.")
    return kept[:limit]


def column(rows: list[Row], name: str, source: str | Path) -> list[str]:
    """The texts of one column.

    Args:
        rows (list[Row]): rows of :func:`read_rows`.
        name (str): the column.
        source (str | Path): where the rows came from, for messages.

    Returns:
        list[str]: one text a row, in order.

    Raises:
        UserError: no such column, or a row whose value is not a text or is blank.
    """
    if name not in rows[0]:
        raise UserError(f"'{source}' has no column '{name}'; it has: {_columns(rows[0])}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise UserError(f"Row {number} of '{source}' has no text in column '{name}': mend or remove the row.")
    return [row[name] for row in rows]


def _columns(row: Row) -> str:
    return ", ".join(map(str, row))


def _read_file(path: Path) -> list[Row]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _txt}
    if path.suffix not in readers:
        raise UserError(f"'{path}' is of an unknown kind: give a {', '.join(readers)} file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as UTF-8 text ({error}).") from error
    rows = [{"prompt": row} if isinstance(row, str) else row for row in readers[path.suffix](path, text)]
    if bad := [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise UserError(f"Row {bad[0]} of '{path}' is neither a text nor an object with columns: mend or remove it.")
    return rows


def _jsonl(path: Path, text: str) -> list[Any]:
    # Not splitlines(): it would also break a row at U+2028, which JSON allows inside a string.
    return [_parse(path, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(path: Path, text: str) -> list[Any]:
    rows = _parse(path, text, 1)
    if not isinstance(rows, list):
        raise UserError(f"'{path}' is not a JSON list of rows: put the rows in a list, or give JSONL.")
    return rows


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not valid JSON at line {line + error.lineno - 1} ({error.msg}).") from error


def _csv(path: Path, text: str) -> list[Any]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _tsv(path: Path, text: str) -> list[Any]:
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))


def _txt(path: Path, text: str) -> list[Any]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _read_data_set(source: str, name: str | None, split: str, options: dict[str, Any]) -> list[Row]:
    if Path(source).suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt"):
        raise UserError(f"There is no file '{source}': check the path.")
    import datasets  # takes a second to import; files do not need it

    try:
        return list(datasets.load_dataset(source, name, split=split, **options))
    except Exception as error:  # the Hub client, pyarrow and datasets each raise types of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The data set '{source}' (split '{split}') could not be loaded ({reason}): check the name, log in with "
            "`hf auth login` where it asks for access, or give a local file."
        ) from error
