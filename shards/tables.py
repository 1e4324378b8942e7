"""Tables as people have them: CSV with commas, semicolons or tabs, in UTF-8 or what Excel writes, compressed, or Parquet.

In: a file. Out: a table of text, and in one line what it was taken for. Invariants: text stays text (`001`, `NA`, `True`); no cell
begins or ends with white space or holds a line break; a row is dropped only where it is blank or repeats the header.
"""

import csv
import io
import warnings
import zlib
from gzip import BadGzipFile
from pathlib import PurePath
from typing import TYPE_CHECKING

from shards.tree import RemotePath, SourcePath, read_start

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tab", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".tab.gz", ".parquet")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
GZIP = b"\x1f\x8b"
HEADER_BYTES = 100_000  # no header is longer
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def is_table(path: PurePath | RemotePath) -> bool:
    """Whether a file's name is that of a table."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def read_table_file(path: SourcePath) -> tuple["pd.DataFrame", str]:
    """A table of text from a CSV or Parquet file.

    Returns:
        the table, blank where a cell is, with its columns named by the header; and what the file was taken for, such as
        `tabs, Windows-1252`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no table: rows longer than the header, an archive, another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The file {path} does not exist. Give a CSV or Parquet file with one row an image.")
    if path.suffix.lower() in (".zip", ".7z", ".rar", ".tar", ".tgz"):
        raise ValueError(f"{path} is an archive. Unpack it, and give the table that is in it.")
    if path.suffix.lower() in (".xls", ".xlsx", ".ods"):
        raise ValueError(f"{path} is a spreadsheet. Save it as CSV, and give that file.")
    if path.suffix.lower() == ".parquet":
        return _tidy(_read_parquet(path), path), "Parquet"
    text, encoding = _decode(_unzip(path))
    separator = find_separator(text)
    table, repeated = _drop_repeated_headers(_parse(path, text, separator))
    said = SEPARATORS[separator] + ("" if encoding == "UTF-8" else f", {encoding}")
    return _tidy(table, path), said + (f", {repeated} repeated headers left out" if repeated else "")


def read_header(path: SourcePath) -> list[str]:
    """The names of a table's columns; none where the file is no table, or cannot be read without its end (Parquet)."""
    if path.suffix.lower() == ".parquet":
        return []
    data = read_start(path, HEADER_BYTES)
    if data.startswith(GZIP):
        try:
            data = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(data, HEADER_BYTES)  # 16: of gzip
        except zlib.error:
            return []
    text = _decode(data)[0]
    header = next((line for line in text.splitlines() if line.strip()), "")
    return [name.strip() for name in next(csv.reader([header], delimiter=find_separator(text)), [])]


def find_separator(text: str) -> str:
    """What separates the columns of the header, its first line that is not blank; a comma where nothing does."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    columns = {separator: len(next(csv.reader([header], delimiter=separator), [])) for separator in SEPARATORS}
    return max(columns, key=lambda separator: columns[separator])


def _unzip(path: SourcePath) -> bytes:
    data = path.read_bytes()
    if not data.startswith(GZIP):
        return data
    import gzip

    try:
        return gzip.decompress(data)
    except (BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}). Download it again.") from error


def _decode(data: bytes) -> tuple[str, str]:
    """Text, and its encoding for people."""
    for mark, encoding in BOMS.items():
        if data.startswith(mark):
            return data.decode(encoding, errors="replace"), "UTF-8" if encoding == "utf-8-sig" else "UTF-16"
    try:
        return data.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError:  # Excel's, in Western Europe; five of its bytes mean nothing
        return data.decode("cp1252", errors="replace"), "Windows-1252"


def _parse(path: SourcePath, text: str, separator: str) -> "pd.DataFrame":
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of rows that are longer than the header
            return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as error:
        if isinstance(error, pd.errors.EmptyDataError):
            raise ValueError(f"{path} is empty. Download it again.") from error
        raise ValueError(
            f"{path} is not a CSV file: {error}. It was read with {SEPARATORS[separator]} between columns. Download it "
            "again, or save it as CSV."
        ) from error


def _read_parquet(path: SourcePath) -> "pd.DataFrame":
    import pandas as pd

    try:
        return pd.read_parquet(io.BytesIO(path.read_bytes())).astype("string").fillna("").astype(object)
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow") from error
    except Exception as error:  # pyarrow's errors are its own kinds
        raise ValueError(f"{path} is not a Parquet file: {error}. Write it again.") from error


def _drop_repeated_headers(table: "pd.DataFrame") -> tuple["pd.DataFrame", int]:
    """Without rows that say the header again, as files that were put together have them; and how many there were."""
    is_header = (table == list(table.columns)).all(axis=1)
    return table[~is_header], int(is_header.sum())


def _tidy(table: "pd.DataFrame", path: SourcePath) -> "pd.DataFrame":
    """Names and cells without white space around them and without line breaks; rows that are all blank are left out."""
    table = table.rename(columns=lambda name: str(name).strip())
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise ValueError(f"{path} has the column {twice!r} twice. Rename one of them.")
    if table.empty:
        return table.reset_index(drop=True)
    table = table.apply(lambda column: column.str.replace(r"\s*[\r\n]+\s*", " ", regex=True).str.strip())
    return table[(table != "").any(axis=1)].reset_index(drop=True)
