"""Write a page that opens from disk, without scripts and without requests to the network."""

import datetime
import re
from pathlib import Path
from typing import Any

import jinja2

from movekd import __version__
from movekd.files.ownership import write_durably

_UNFIT = re.compile(r"[^\t\n\r -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that HTML does not take: control characters and halves of surrogate pairs."""


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a template of ``templates`` with every value escaped; replaces ``path`` atomically."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("movekd.view", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    today = datetime.date.today().isoformat()
    text = environment.get_template(template).render(version=__version__, date=today, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, _UNFIT.sub("\ufffd", text).encode())
