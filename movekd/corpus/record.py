"""Compare a corpus with what its pack recorded, before a cache or a run is made of it."""

from pathlib import Path

from movekd.corpus.index import CONVERSATIONS_FILE, INDEX_FILE, NAMES_FILE
from movekd.errors import CorpusError
from movekd.files.ownership import OWNERSHIP_FILE, file_entry, read_owned


def require_as_packed(data_dir: Path) -> None:
    """Compare the tables and the conversations of a corpus with the checksums of its pack.

    A changed name or text would go into every cache and run that is made of it. Reads the files
    once; images have their own hashes. A corpus without a record is taken as it is.

    Raises:
        CorpusError: a file is missing or was changed since; names it.
    """
    owned = read_owned(data_dir)
    if owned is None:
        return
    for name in (INDEX_FILE, NAMES_FILE, CONVERSATIONS_FILE):
        path, entry = data_dir / name, owned.files.get(name)
        if entry is None or (path.is_file() and file_entry(path) == entry):
            continue
        what = "was changed since it was packed" if path.is_file() else "is missing"
        raise CorpusError(
            f"{path} {what}; expected the file with the checksum in {OWNERSHIP_FILE} beside it. "
            "Restore it, or pack the corpus again with --overwrite --force; if the change is "
            f"meant, delete {OWNERSHIP_FILE}."
        )
