"""Tell images from other media by the words that people use: suffixes, JSON keys, placeholders.

Input: names, and entries of LLaVA's JSON. Whether a file is an image, its bytes decide
(``image_source``); this module finds what an entry or a sample is about beside that.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMAGE_SUFFIXES = _words(
    "jpg jpeg jpe jfif mpo png apng webp bmp dib gif tif tiff ppm pgm pbm pnm "
    # formats that are not read: their files are called images all the same
    "avif avifs heic heif jp2 j2k jpx jxl ico icns svg tga psd qoi exr hdr eps raw dng"
)
"""Suffixes of image files, in lower case and without the dot."""

MEDIA_SUFFIXES = _words(
    "mp4 m4v mov mkv webm avi mpg mpeg wmv flv ogv wav mp3 flac ogg m4a aac opus wma pdf"
)
"""Suffixes of videos, sounds and PDFs, in lower case and without the dot."""

_OTHER_MEDIA = _words("video videos audio audios speech sound sounds pdf pdfs")
_IMAGES = _words(
    "image images img imgs photo photos picture pictures pic pics pixel pixels frame frames"
)
_PLACES = _words("path paths file files url urls name names folder dir")
_UNDERSTOOD = frozenset(("id", "sample_id", "image", "images", "conversations", "question_type"))
_PLACEHOLDER = re.compile(r"<(video|audio|speech|pdf)>")


def suffix(name: str) -> str:
    """Return the last suffix of a path, in lower case and without its dot; may be empty."""
    return PurePosixPath(name).suffix[1:].lower()


def unknown_media(entry: Mapping[str, Any]) -> str:
    """Return the key that makes an entry one about media that movekd does not read, or "".

    Such a key names a video, sound or PDF; or, in an entry without ``image``, an image. Read as a
    conversation of text only, the entry would teach to answer about what was never seen.
    """
    if _UNDERSTOOD.issuperset(entry):
        return ""
    has_image = bool(entry.get("image") or entry.get("images"))
    for key, value in entry.items():
        if not value or key in _UNDERSTOOD:
            continue
        words = _split(key)
        if has_image:  # "video_id" beside an image only says where the image is from
            is_media = words[:1] and words[0] in _OTHER_MEDIA and _PLACES.issuperset(words[1:])
            is_media = is_media and isinstance(value, str | list | dict)
        else:
            is_media = not (_OTHER_MEDIA | _IMAGES).isdisjoint(words) or _names_media(value)
        if is_media:
            return key
    return ""


def promises_media(column: str) -> bool:
    """Return whether a column's name says that it holds media, or where they lie.

    ``video`` and ``img_path`` do; ``image_id`` and ``image_correspondence_ratings`` do not.
    """
    words = _split(column)
    is_media = bool(words) and words[0] in _OTHER_MEDIA | _IMAGES
    return is_media and _PLACES.issuperset(words[1:])


def unknown_placeholder(text: str) -> str:
    """Return a placeholder of other media in a question, say ``<video>``, or an empty string.

    A closing tag, ``</video>``, makes it a question about HTML.
    """
    for match in _PLACEHOLDER.finditer(text):
        if f"</{match[1]}>" not in text:
            return match[0]
    return ""


def _split(key: str) -> list[str]:
    """Return the words of a key, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)]


def _names_media(value: Any) -> bool:
    """Return whether a value is the name of a media file, or a list that begins with one."""
    name = value[0] if isinstance(value, list) else value
    if not isinstance(name, str) or len(name) > 4096 or re.search(r"\s", name.strip()):
        return False
    return suffix(name.strip().partition("?")[0]) in IMAGE_SUFFIXES | MEDIA_SUFFIXES
