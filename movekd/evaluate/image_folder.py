"""Read the images of questions from a folder, and check all of them before a model loads.

Input: a folder, and image names from a question file of a stranger. Output: bytes. A name never
leads out of its folder, and only regular files are read.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from movekd.corpus.decode import decode_image
from movekd.errors import CorpusError, MovekdError, shorten
from movekd.files.reading import MIB, read_bytes

_MAX_IMAGE_BYTES = 512 * MIB
_MAX_THREADS = 8
_MAX_LISTED_CHARACTERS = 1500
Progress = Callable[[str, int, int], None]


def read_from_folder(folder: Path) -> Callable[[str], bytes]:
    """Return a reader of images by name that never leaves ``folder``.

    Raises:
        CorpusError: when called: the image is missing or no regular file, or its name leads out of
            the folder.
    """
    root = folder.resolve()

    def read(name: str) -> bytes:
        shown, remedy = shorten(name), "Give the folder of the questions' images with --images."
        try:
            path = (root / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
            raise CorpusError(
                f"image '{shown}' cannot be read in {folder}: {error}; expected the name of a "
                f"file there. {remedy}"
            ) from None
        if not path.is_relative_to(root):
            raise CorpusError(f"the image name '{shown}' leads out of {folder}; it is refused.")
        try:
            return read_bytes(path, max_bytes=_MAX_IMAGE_BYTES, error=CorpusError)
        except CorpusError as error:
            raise CorpusError(
                f"image '{shown}' cannot be read in {folder}: {error} {remedy}"
            ) from None

    return read


def check_images(readers: Mapping[str, Callable[[], bytes]], progress: Progress) -> None:
    """Read and decode images in threads, a few at a time.

    Args:
        readers: name of an image, for the message -> returns its bytes.
        progress: called with a label, the checked images and all images.

    Raises:
        CorpusError: some cannot be read or decoded; lists them.
    """
    bad: dict[str, str] = {}
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        left, done = iter(readers.items()), 0
        while some := list(islice(left, 16 * threads)):
            for (name, _), problem in zip(some, pool.map(_problem, some), strict=True):
                if problem:
                    bad[name] = problem
                done += 1
                progress("check images", done, len(readers))
    if bad:
        raise CorpusError(
            f"{len(bad)} of {len(readers)} images cannot be used: {list_problems(bad)}. Mend them, "
            "or take their questions out; nothing was asked yet."
        )


def list_problems(problems: Mapping[str, str]) -> str:
    """Return ``name: problem; ...`` for as many as a message holds, and how many more."""
    parts: list[str] = []
    for name, problem in problems.items():
        parts.append(shorten(f"{shorten(name, 80)}: {problem.rstrip('.')}"))
        if sum(map(len, parts)) > _MAX_LISTED_CHARACTERS:
            break
    more = len(problems) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "")


def _problem(item: tuple[str, Callable[[], bytes]]) -> str:
    """Return what is wrong with an image, or an empty string."""
    try:
        decode_image(item[1]())
    except MovekdError as error:
        return str(error)
    return ""
