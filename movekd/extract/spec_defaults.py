"""Settle the keys of a spec whose default depends on the cache: a sealed teacher keeps what it has.

Caches from before such a key are resumed and appended to with the same bytes and fingerprints.
``extract.run`` settles specs before a build, ``extract.calibrate`` for ``--channel-stats``.
"""

import itertools
from typing import Any

from movekd.cache.contents import TeacherContents, read_calibration
from movekd.cache.spec import DEFAULT_CLS_ATTENTION_HEADS, DEFAULT_STD_FLOOR, CacheSpec
from movekd.cache.storage import Storage
from movekd.errors import CacheError


def with_defaults(
    spec: CacheSpec, *, own: Storage | None = None, other: Storage | None = None
) -> CacheSpec:
    """Return the spec with ``std_floor`` and ``cls_attention_heads``.

    Each is the spec's own, the sealed one, or for a new teacher the default.

    Args:
        spec: the teacher. Keys that it names stay.
        own: the cache, unless the teacher in it will be deleted.
        other: the cache of ``--channel-stats``.

    Raises:
        CacheError: the teacher was recoded; a build would mix its rows with others.
    """
    choices: dict[str, tuple[Any, Any]] = {}  # what caches without the key have, and the default
    if spec.std_floor is None:
        choices["std_floor"] = (0.0, DEFAULT_STD_FLOOR)
    if spec.cls_attention and spec.cls_attention_heads is None:
        choices["cls_attention_heads"] = ("all", DEFAULT_CLS_ATTENTION_HEADS)
    for storage in (own, other):
        calibration = None if storage is None else read_calibration(storage, spec.name)
        if storage is None or calibration is None:
            continue
        for values in itertools.product(*choices.values()):
            # The calibration is enough: the build may have to mend the attributes.
            settled = spec.with_changes(**dict(zip(choices, values, strict=True)))
            if settled.fingerprint == calibration.spec_fingerprint:
                return settled
        sealed = TeacherContents(storage, spec.name, 0).spec
        if sealed.recoded_from and not spec.recoded_from:
            raise CacheError(
                f"teacher '{spec.name}' in {storage.url} was recoded from codec "
                f"{sealed.recoded_from[-1].codec}, and a build encodes the teacher's own output; "
                "nothing in a row would say which of the two it is. Build into the cache that it "
                "was recoded from, then run `movekd cache recode` again; or use another --cache."
            )
        return spec.with_changes(
            **{key: getattr(sealed, key) or without for key, (without, _) in choices.items()}
        )
    return spec.with_changes(**{key: default for key, (_, default) in choices.items()})
