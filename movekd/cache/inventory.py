"""Compare existence and size of a teacher's sealed files with what the seals say.

Input: an opened teacher. Output: its wrong files. No features are read, so this costs seconds for
millions of images. `cache ls`, `cache build` and `train` start with it. ``verify`` compares bytes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from movekd.cache import layout
from movekd.cache.codecs import ArrayLayout
from movekd.cache.contents import TeacherContents
from movekd.cache.schema import GroupRecord, ShardSeal, SkippedSeal
from movekd.cache.seal import read_record
from movekd.errors import CacheError, CorruptCacheError
from movekd.files.ownership import FileEntry

_SHOWN = 5


@dataclass(frozen=True)
class WrongFile:
    """A sealed file that is missing or has another size.

    Attributes:
        name: path below the cache.
        shard: the Zarr shard that it belongs to; None for the small files of a teacher.
        expected_bytes: size in the seal; None if the seal does not list the file.
        found_bytes: its size; None if it is missing.
    """

    name: str
    shard: int | None
    expected_bytes: int | None
    found_bytes: int | None

    def __str__(self) -> str:
        if self.expected_bytes is None:
            return f"{self.name} is listed by no seal that can be read"
        found = "is missing" if self.found_bytes is None else f"has {self.found_bytes:,} bytes"
        return f"{self.name} {found} (sealed with {self.expected_bytes:,} bytes)"


def wrong_files(teacher: TeacherContents) -> list[WrongFile]:
    """Return the sealed files of a teacher that are missing or have another size, by name.

    Raises:
        CorruptCacheError: a seal is damaged.
    """
    storage = teacher.storage
    group, seals = layout.group_name(teacher.teacher), layout.seals_name(teacher.teacher)
    wrong: list[WrongFile] = []
    small = dict(_small_files(teacher))
    for folder in (group, seals):
        names = [name for name in small if name.startswith(f"{folder}/")]
        there = storage.sizes_of(folder, names)
        wrong += [
            WrongFile(name, None, small[name], there.get(name))
            for name in names
            if small[name] is None or there.get(name) != small[name]
        ]
    shards = teacher.sealed_shards

    def look(array: ArrayLayout) -> tuple[list[str], list[int | None]]:
        names = [f"{group}/{layout.shard_file(array, shard)}" for shard in shards]
        found = storage.sizes_of(f"{group}/{array.name}", names)
        return names, [found.get(name) for name in names]

    with ThreadPoolExecutor(1) as beside:  # Python reads the seals, Arrow looks at the files
        looks = [beside.submit(look, array) for array in teacher.layout.arrays.values()]
        sums = teacher.sums
    for at, each in enumerate(looks):
        names, sizes = each.result()
        sealed = sums.file_bytes_SA[:, at].tolist()
        if sizes == sealed:
            continue
        for name, shard, size, found in zip(names, shards, sealed, sizes, strict=True):
            if found != size:
                wrong.append(WrongFile(name, shard, None if size < 0 else size, found))
    return sorted(wrong, key=lambda file: file.name)


def _small_files(teacher: TeacherContents) -> Iterator[tuple[str, int | None]]:
    """Yield name and sealed size of the files beside the Zarr shards."""
    storage, name = teacher.storage, teacher.teacher
    sealed = read_record(storage, layout.metadata_name(name), GroupRecord).files
    for file in teacher.metadata_files:
        yield f"{layout.group_name(name)}/{file}", _size(sealed, file)
    seal, table = layout.skipped_seal_name(name), layout.skipped_name(name)
    if storage.exists(seal):  # the end of a build writes it; the first caches had none
        listed: Mapping[str, FileEntry] = {}
        with contextlib.suppress(CorruptCacheError):
            listed = read_record(storage, seal, SkippedSeal).files
        yield table, _size(listed, table.rpartition("/")[2])


def damaged_seals(teacher: TeacherContents) -> dict[int, str]:
    """Return the seals that cannot be read, Zarr shard -> what is wrong.

    They are looked at one by one only if reading all of them fails.
    """
    try:
        _ = teacher.sums
    except CorruptCacheError:
        pass
    else:
        return {}
    damaged: dict[int, str] = {}
    for shard in range(teacher.layout.num_shards(teacher.num_rows)):
        name = layout.seal_name(teacher.teacher, shard)
        try:
            if teacher.storage.exists(name):
                read_record(teacher.storage, name, ShardSeal)
        except CorruptCacheError as error:
            damaged[shard] = str(error)
    return damaged


def require_whole(teacher: TeacherContents) -> None:
    """Refuse a teacher with sealed files that are missing or have another size.

    Raises:
        CacheError: names the first files, and the command that builds them again.
    """
    if wrong := wrong_files(teacher):
        raise CacheError(
            f"teacher '{teacher.teacher}' in {teacher.storage.url}: {describe(wrong)}; expected "
            f"every sealed file. Run its `movekd cache build --teacher {teacher.teacher}` again, "
            "which builds their Zarr shards anew."
        )


def describe(wrong: Sequence[WrongFile]) -> str:
    """Return one clause about some wrong files; it names the first ones and counts the others."""
    shown = "; ".join(map(str, wrong[:_SHOWN]))
    return shown + (f"; and {len(wrong) - _SHOWN} more files" if wrong[_SHOWN:] else "")


def _size(sealed: Mapping[str, FileEntry], name: str) -> int | None:
    entry = sealed.get(name)
    return None if entry is None else entry.size_bytes
