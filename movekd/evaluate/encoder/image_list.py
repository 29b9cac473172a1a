"""List labelled images that a CSV file names: columns ``file_name``, ``label`` and ``split``.

``file_name`` and ``label`` are the columns of a ``metadata.csv`` of Hugging Face's imagefolder,
``split`` is train or test. Other columns are not read. A path starts at the folder of the list.
"""

import csv
import io
from pathlib import Path

from movekd.errors import CorpusError, shorten
from movekd.files.reading import MIB, read_text

SPLITS = ("train", "test")
COLUMNS = ("file_name", "label", "split")
_REMEDY = "Write `file_name,label,split` as the first line, and one image per line below it."


def list_images(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str], int]:
    """Return name -> (split, label), name -> why it is not used, and how many rows were found.

    Raises:
        CorpusError: the file is no UTF-8 CSV file, or lacks a column.
    """
    text = read_text(path, max_bytes=256 * MIB, error=CorpusError, remedy=_REMEDY)
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    listed: dict[str, tuple[str, str]] = {}
    skipped: dict[str, str] = {}
    num_found = 0
    try:
        columns = reader.fieldnames or []
        if missing := [name for name in COLUMNS if columns.count(name) != 1]:
            raise CorpusError(
                f"{path} has the columns {shorten(', '.join(map(str, columns)))}; expected "
                f"{missing[0]} among them once. {_REMEDY}"
            )
        for row in reader:
            num_found += 1
            name, label, split = (row[column] for column in COLUMNS)
            line = f"line {reader.line_num}"
            if None in row or None in row.values():
                skipped[f"{name} ({line})"] = "its line has another number of fields than the first"
            elif not name or not label:
                skipped[f"{name} ({line})"] = "its file_name or label is empty"
            elif split not in SPLITS:
                reason = f"its split is '{shorten(split, 40)}'; expected train or test"
                skipped[f"{name} ({line})"] = reason
            elif name in listed:
                skipped[f"{name} ({line})"] = "an earlier line lists it"
            else:
                listed[name] = (split, label)
    except csv.Error as error:
        raise CorpusError(
            f"{path} is no CSV file that can be read, near line {reader.line_num + 1}: {error}. "
            f"{_REMEDY}"
        ) from None
    return listed, skipped, num_found
