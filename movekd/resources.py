"""Files that ship beside the code: cache_specs/ and pipelines/.

In a checkout they lie at its top level, where people look for them; in a wheel they lie
under ``movekd/_resources``. ``resource_dir`` finds either.
"""

from pathlib import Path

from movekd.errors import MovekdError

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """Return the folder ``name`` ("cache_specs" or "pipelines").

    Raises:
        MovekdError: neither the checkout nor the wheel holds it.
    """
    for candidate in (_PACKAGE / "_resources" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise MovekdError(f"{name}/ is missing beside the movekd package; reinstall movekd.")
