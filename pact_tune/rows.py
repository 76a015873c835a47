"""Rows from files, folders and Hugging Face data sets, each with the place where it stands."""

import csv
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pact_tune.errors import UserError, one_line

Source = str | Path | Sequence[str | Path]
# Files that are named after splits say how their folder is divided; not all of it is to be trained on.
SPLIT_NAMES = re.compile(r"(^|[^a-z])(train|training|test|testing|valid|validation|dev|eval|evaluation)([^a-z]|$)")


class BrokenRow(UserError):
    """A row of a file that cannot be read; its message names the place, ``reason`` does not."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_rows(
    source: Source, name: str | None = None, split: str | None = None, options: Mapping[str, Any] | None = None
) -> list[Any]:
    """Rows of a source, as they stand there.

    Args:
        source (Source): see :func:`read_places`.
        name (str | None): configuration of a Hub data set.
        split (str | None): split of a Hub data set; default "train".
        options (Mapping[str, Any] | None): what a Hub data set's own builder needs to be told.

    Returns:
        list[Any]: see :func:`read_places`.

    Raises:
        UserError: no such file or data set, or a file that cannot be read.
    """
    return [row for _, row in read_places(source, name, split, options)]


def read_places(
    source: Source, name: str | None = None, split: str | None = None, options: Mapping[str, Any] | None = None
) -> list[tuple[str, Any]]:
    """Rows of a source, and where each stands.

    Args:
        source (Source): a .json, .jsonl, .csv, .tsv, .txt (all UTF-8) or .parquet file, .gz behind it or not, endings in
            upper or lower case; a folder of such files (.txt aside), which are read in the order of their names; the name
            of a Hub data set, or a folder in a Hub data set's layout (with a README.md, or files named after splits); or
            a list of these. In a .tsv file quotation marks are text like any other.
        name (str | None): configuration of a Hub data set.
        split (str | None): split of a Hub data set; default "train".
        options (Mapping[str, Any] | None): what a Hub data set's own builder needs to be told.

    Returns:
        list[tuple[str, Any]]: a place ("row 3", "line 3 of b.jsonl") and a row: a dict, of a .txt file one str a line. In
        place of a broken row (a JSONL line that cannot be parsed, a CSV row of too many fields) stands the
        :class:`BrokenRow` that says so: the caller counts it or raises it.

    Raises:
        UserError: no such file or data set, a file that cannot be read, or a split or configuration of a file.
    """
    if not isinstance(source, str | Path):
        several = list(source) if isinstance(source, Sequence) else [source]
        if not several or not all(isinstance(one, str | Path) for one in several):
            raise UserError(f"The source is {source!r}; it is a file, a folder, a data set's name, or a list of these.")
        return _read_several([(one, Path(one).name) for one in several], name, split, options)
    path = Path(source)
    if path.is_file() or (names_a_file(path) and not path.is_dir()):
        return _read_file(path, name, split)
    if path.is_dir() and name is None and split is None and (files := _plain_files(path)):
        return _read_several([(file, file.name) for file in files], None, None, None)
    return _read_hub(str(source), name, split, options)


def _read_several(sources: list[tuple[str | Path, str]], *arguments: Any) -> list[tuple[str, Any]]:
    several = len(sources) > 1
    return [
        (f"{place} of {name}" if several else place, row)
        for source, name in sources
        for place, row in read_places(source, *arguments)
    ]


def names_a_file(source: str | Path) -> bool:
    """Whether a source that is not there is a missing file, as its ending tells, and no name of the Hub's."""
    return _kind(Path(source)) in _READERS


def _plain_files(folder: Path) -> list[Path]:
    """The files of a folder that is no data set in the Hub's layout."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _kind(file) in set(_READERS) - {".txt"})
    divided = (folder / "README.md").exists() or any(SPLIT_NAMES.search(file.name.lower()) for file in files)
    return [] if divided else files


def _read_hub(
    source: str, name: str | None, split: str | None, options: Mapping[str, Any] | None
) -> list[tuple[str, Any]]:
    import datasets  # takes seconds to import, and only Hub data need it

    split = split or "train"
    try:
        rows = list(datasets.load_dataset(source, name, split=split, **(options or {})))
    except Exception as error:  # datasets raises its own, fsspec's and huggingface_hub's types
        raise UserError(
            f"The data set '{source}' (split '{split}') could not be loaded ({one_line(error)}): check the name, log in "
            f"with `hf auth login` where it asks for access, or give a {', '.join(_READERS)} file."
        ) from error
    return _numbered(rows)


def _kind(path: Path) -> str:
    """The ending that says how a file is read: ".jsonl" of "ROWS.JSONL.GZ"."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path, name: str | None, split: str | None) -> list[tuple[str, Any]]:
    if _kind(path) not in _READERS:
        raise UserError(f"'{path}' is of an unknown kind: give a {', '.join(_READERS)} file, .gz behind it or not.")
    if not path.is_file():
        raise UserError(f"The file '{path}' does not exist: check the path.")
    for key, value in (("split", split), ("name", name)):
        if value is not None:
            raise UserError(f"'{path}' is a file and has no {key} '{value}': leave {key} out, or set it to null.")
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' cannot be read ({one_line(error)}): check the file.") from error
    return _READERS[_kind(path)](path, content)


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # Windows programs begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' cannot be read as UTF-8 text ({error}): save it as UTF-8.") from error


def _numbered(rows: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _lines(text: str) -> Iterable[str]:
    # Not splitlines(): JSON allows U+2028 and its like inside a string.
    return io.StringIO(text, newline="")


def _read_json(path: Path, content: bytes) -> list[tuple[str, Any]]:
    text = _text(path, content)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"'{path}' is not valid JSON ({error}): mend it; a file with one row a line is called .jsonl."
        ) from error
    if not isinstance(rows, list):
        kind = type(rows).__name__
        raise UserError(f"'{path}' holds one JSON {kind}, not a JSON list: put the rows in a list, or give JSONL.")
    return _numbered(rows)


def _read_jsonl(path: Path, content: bytes) -> list[tuple[str, Any]]:
    text = _text(path, content)
    rows = [(f"line {n}", _parse_line(path, n, line)) for n, line in enumerate(_lines(text), 1) if line.strip()]
    if rows and isinstance(rows[0][1], BrokenRow | list) and _begins_with_json(text):
        raise UserError(
            f"'{path}' holds JSON that is no row a line (a list, or printed over several lines): a list of rows is called "
            ".json; in a .jsonl file each row stands on one line."
        )
    return rows


def _begins_with_json(text: str) -> bool:
    try:
        value, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(row, dict) for row in value))


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).split(": line 1 ")[0]  # each line is the parser's first
        message = f"'{path}' is not valid JSON at line {number} ({reason}): mend or remove the line."
        return BrokenRow("that are not valid JSON", message)


def _read_csv(path: Path, content: bytes, **dialect: Any) -> list[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 131,072 characters would end the run
    reader = csv.DictReader(_lines(_text(path, content)), strict=True, **dialect)
    try:
        return _numbered([_csv_row(path, reader.line_num, row) for row in reader])
    except csv.Error as error:
        raise UserError(
            f"'{path}' is not valid CSV (line {reader.reader.line_num}: {error}): a field with quotation marks must "
            "stand in quotation marks, its own ones doubled."
        ) from error


def _csv_row(path: Path, line: int, row: dict[Any, Any]) -> Any:
    if None not in row:
        return row
    # A surplus field stands under None: a comma that was not quoted has then cut the last column short.
    message = f"'{path}' has more fields than columns at line {line}: mend or remove the row."
    return BrokenRow("with more fields than columns", message)


def _read_txt(path: Path, content: bytes) -> list[tuple[str, Any]]:
    lines = enumerate(_lines(_text(path, content)), 1)
    return [(f"line {number}", line.strip()) for number, line in lines if line.strip()]


def _read_parquet(path: Path, content: bytes) -> list[tuple[str, Any]]:
    import pyarrow  # like datasets, which brings it along
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' is no valid Parquet file ({one_line(error)}): write it again.") from error
    return _numbered(rows)


_READERS: dict[str, Callable[[Path, bytes], list[tuple[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
