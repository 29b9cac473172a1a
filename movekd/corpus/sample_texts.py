"""Read the conversations of a WebDataset sample, and find which of its images each is about.

Input: a ``Sample``. Output: conversations in the corpus, or reasons in its report: each text member
is read or left out, and each entry in one is kept or dropped.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from movekd.corpus.conversations import (
    IMAGE_PLACEHOLDER,
    Change,
    Conversation,
    parse_conversation,
    parse_json,
)
from movekd.corpus.image_source import RejectedImage
from movekd.corpus.media import unknown_media
from movekd.corpus.report import ProblemKind
from movekd.corpus.samples import Sample
from movekd.corpus.tar import TarMember, read_member
from movekd.corpus.writer import CorpusBuilder
from movekd.errors import ConfigError, shorten
from movekd.files.reading import MIB

_MAX_TEXT_BYTES = 16 * MIB


def collect_texts(
    builder: CorpusBuilder,
    sample: Sample,
    path: Path,
    shard: str,
    names: Mapping[str, str],
    rejected: Mapping[str, RejectedImage],
) -> None:
    """Keep or report the conversations of a sample: of its .json member, else of its .txt member.

    Args:
        builder: receives them.
        sample: the sample.
        path: its tar.
        shard: what the tar is called.
        names: member name of each image of the sample -> the name that conversations use.
        rejected: by such names, the images that cannot be used.
    """
    entries, caption = _read_json(sample, path, shard)
    unused, reason = sample.json, "it holds no conversation"
    found: list[Conversation | None] = []
    if entries:
        unused, reason = sample.txt, "the .json member is read instead"
        found = [_parse(builder, sample, entry, shard) for entry in entries]
    elif sample.txt is not None:
        found = [_parse_caption(builder, sample, _read_text(path, sample.txt))]
    elif caption is not None:
        unused = None
        found = [_parse_caption(builder, sample, caption)]
    builder.tally.find("entries", len(found))
    for member in (sample.json, sample.txt):
        if member is not None and member is unused:
            identity = f"{shard}/{member.name}"
            builder.tally.leave_out("members", "unused_members", identity, reason)
        elif member is not None:
            builder.tally.keep("members")
    conversations = [conversation for conversation in found if conversation is not None]
    for conversation in conversations:
        images = tuple(names[name] for name in conversation.images)
        matched = builder.match_placeholders(replace(conversation, images=images))
        if matched is not None:
            builder.keep_or_drop(matched, rejected)
    used = {name for conversation in conversations for name in conversation.images}
    for image in sample.images if used else []:
        if image.name not in used and names[image.name] not in rejected:
            reason = f"the conversations of {shorten(sample.key)} are about other images"
            builder.note("auxiliary_images", f"{shard}/{image.name}", reason)


def _read_json(sample: Sample, path: Path, shard: str) -> tuple[list[Any], str | None]:
    """Return the entries in a sample's .json member, an error among them, and the caption there."""
    if sample.json is None:
        return [], None
    text = _read_text(path, sample.json)
    if isinstance(text, ConfigError):
        return [text], None
    try:
        content = parse_json(text, f"{shard}/{shorten(sample.json.name)}")
    except ConfigError as error:
        return [error], None
    return _entries(content), _caption(content)


def _read_text(path: Path, member: TarMember) -> str | ConfigError:
    """Return the text of a member, or the error if it is too large or not UTF-8."""
    name = shorten(member.name)
    if member.size > _MAX_TEXT_BYTES:
        return ConfigError(
            f"{name} has {member.size:,} bytes; expected a text of at most {_MAX_TEXT_BYTES:,}. "
            "Remove it, or give it another suffix."
        )
    try:
        text = read_member(path, member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"is no UTF-8 text (byte {error.start})"
    else:
        if "\0" not in text:
            return text
        found = "holds NUL characters, as UTF-16 does"
    return ConfigError(f"{name} {found}; expected UTF-8. Convert it.")


def _entries(content: Any) -> list[Any]:
    """Return the LLaVA entries in a .json member; none in metadata."""
    entries = content if isinstance(content, list) else [content]
    is_llava = any(isinstance(e, dict) and {"conversations", "messages"} & set(e) for e in entries)
    return entries if is_llava else []


def _caption(content: Any) -> str | None:
    """Return the caption in the metadata that img2dataset writes."""
    caption = content.get("caption") if isinstance(content, dict) else None
    return caption if isinstance(caption, str) else None


def _parse_caption(
    builder: CorpusBuilder, sample: Sample, caption: str | ConfigError
) -> Conversation | None:
    """Return a caption as a conversation about all images; None after reporting why not."""
    kind: ProblemKind = "texts_without_image"
    reason = "its sample has no image"
    if isinstance(caption, str) and sample.images:
        images = tuple(image.name for image in sample.images)
        question = "\n".join([IMAGE_PLACEHOLDER] * len(images))
        return Conversation(sample.key, images, (("human", question), ("gpt", caption.strip())))
    if isinstance(caption, ConfigError):
        kind, reason = "undecodable_text", str(caption)
    builder.tally.leave_out("entries", kind, sample.key, reason)
    return None


def _parse(builder: CorpusBuilder, sample: Sample, entry: Any, shard: str) -> Conversation | None:
    """Return a conversation with the member names of its images; None after reporting why not."""
    changes: list[tuple[Change, str]] = []
    kind: ProblemKind = "malformed_entries"
    try:
        if isinstance(entry, ConfigError):
            raise entry
        if isinstance(entry, dict):
            given = [entry.get(key) for key in ("image", "images")]
            if sample.images and all(value in (None, []) for value in given):
                entry = entry | {"image": [image.name for image in sample.images]}
            kind = "unknown_media" if unknown_media(entry) else kind
        where = f"{shard}/{shorten(sample.json.name if sample.json else sample.key)}"
        found = parse_conversation(entry, where, default_id=sample.key, changes=changes)
    except ConfigError as error:
        identity = entry.get("id", entry.get("sample_id")) if isinstance(entry, dict) else None
        identity = identity if isinstance(identity, str | int) else sample.key
        builder.tally.leave_out("entries", kind, str(identity), str(error))
        return None
    images, is_guessed = _find_images(found.images, sample)
    if images is None:
        reason = (
            f"it names {len(found.images)} images, '{shorten(found.images[0])}' first, which its "
            f"sample of {len(sample.images)} does not hold"
        )
        builder.tally.leave_out("entries", "missing_files", found.id, reason)
        return None
    for change, reason in changes:
        if change != "numbered_entries":  # it got the sample's key
            builder.note(change, found.id, reason)
    if is_guessed:
        reason = f"it names '{shorten(found.images[0])}'; taken: '{shorten(images[0])}'"
        builder.note("images_by_position", found.id, reason)
    return replace(found, images=images)


def _find_images(named: tuple[str, ...], sample: Sample) -> tuple[tuple[str, ...] | None, bool]:
    """Return the members that an entry names, None if the sample lacks one; and whether guessed.

    One image and one name belong together, whatever the name. Else the whole name counts, or the
    file name if it is the name of one member only. If no name fits, the order decides: as many
    images as names, or the one image called KEY.SUFFIX.
    """
    members = [image.name for image in sample.images]
    if len(members) == len(named) == 1:
        return tuple(members), False
    of_file: dict[str, list[str]] = {}
    for member in members:
        of_file.setdefault(PurePosixPath(member).name, []).append(member)
    found = []
    for name in named:
        same = [name] if name in members else of_file.get(PurePosixPath(name).name, [])
        found.append(same[0] if len(same) == 1 else None)
    if None not in found:
        return tuple(name for name in found if name is not None), False
    if any(found):
        return None, False
    if len(members) == len(named):
        return tuple(members), True
    plain = [name for name in members if name.rpartition(".")[0] == sample.key]
    return ((plain[0],), True) if len(plain) == len(named) == 1 else (None, False)
