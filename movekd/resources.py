"""Find the files that ship with the code: cache_specs/ and pipelines/.

A checkout has them at its top level, a wheel under ``movekd/_resources``.
"""

from pathlib import Path

from movekd.errors import MovekdError

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """Return the folder ``name`` ("cache_specs" or "pipelines").

    Raises:
        MovekdError: the folder is missing.
    """
    for candidate in (_PACKAGE / "_resources" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise MovekdError(f"{name}/ is missing beside the movekd package; reinstall movekd.")
