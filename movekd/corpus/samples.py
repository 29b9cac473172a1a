"""Group the members of a tar into samples: which text belongs to which images.

Input: members, sorted into images and texts. Output: ``Sample`` objects. WebDataset's key of a
member ends at the first dot of its file name; where texts and images agree on more, the longer key
counts. So each of ``22.05.jpg 22.05.json 22.06.jpg 22.06.json`` finds its own, and ``x.input.jpg
x.outputs.txt`` are one sample. Members of a sample need not be neighbours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from movekd.corpus.media import suffix
from movekd.corpus.report import ProblemKind
from movekd.corpus.tar import TarMember, split_member


@dataclass
class Sample:
    """The images and texts of one sample.

    Attributes:
        key: what its members' names have in common.
        images: in the order of the tar.
        json: its .json member, or None.
        txt: its .txt member, or None.
        left_out: (member, kind, reason) of its other members.
    """

    key: str
    images: list[TarMember] = field(default_factory=list)
    json: TarMember | None = None
    txt: TarMember | None = None
    left_out: list[tuple[TarMember, ProblemKind, str]] = field(default_factory=list)

    @property
    def members(self) -> list[TarMember]:
        """Images and texts."""
        return [*self.images, *(text for text in (self.json, self.txt) if text is not None)]

    @property
    def first_offset(self) -> int:
        """Where its first member lies in the tar."""
        others = [member for member, _, _ in self.left_out]
        return min(member.offset for member in [*self.members, *others])


def group_samples(images: Iterable[TarMember], texts: Iterable[TarMember]) -> list[Sample]:
    """Return the samples of a tar, in the order of their first members.

    Args:
        images: image members, in the order of the tar.
        texts: .json and .txt members, in the order of the tar.
    """
    groups: dict[str, tuple[list[TarMember], list[TarMember]]] = {}
    for place, members in enumerate((images, texts)):
        for member in members:
            groups.setdefault(sample_key(member.name), ([], []))[place].append(member)
    samples = [sample for key, group in groups.items() for sample in _split(key, *group)]
    return sorted(samples, key=lambda sample: sample.first_offset)


def sample_key(name: str) -> str:
    """Return WebDataset's key of a member; for names that it ignores, the name without its suffix.

    WebDataset ignores ``name`` and ``.hidden.jpg``.
    """
    split = split_member(name)
    return split[0] if split else _stem(name)


def _split(key: str, images: list[TarMember], texts: list[TarMember]) -> list[Sample]:
    """Return the samples of members of one WebDataset key."""
    stems = {_stem(text.name) for text in texts}
    # the longer keys: all of a text's name that an image's name begins with
    keys = {prefix for image in images for prefix in _prefixes(image.name, key) if prefix in stems}
    samples: dict[str, Sample] = {}
    below: dict[str, set[str]] = {}  # a shorter key -> longer ones with images
    for image in images:
        own = next((prefix for prefix in _prefixes(image.name, key) if prefix in keys), None)
        own = own or (_stem(image.name) if keys else key)
        samples.setdefault(own, Sample(own)).images.append(image)
        for prefix in _prefixes(image.name, key):
            below.setdefault(prefix, set()).add(own)
    texts_of: dict[str, list[TarMember]] = {}
    for text in texts:
        own = next((prefix for prefix in _prefixes(text.name, key) if prefix in keys), None)
        own = own or (_stem(text.name) if keys else key)
        if own not in samples and len(below.get(own, ())) == 1:
            (own,) = below[own]  # a.json of a.jpg that has a caption a.jpg.txt
        texts_of.setdefault(own, []).append(text)
    for own, members in texts_of.items():
        sample = samples.setdefault(own, Sample(own))
        sample.json = _choose(sample, members, "json")
        sample.txt = _choose(sample, members, "txt")
    return list(samples.values())


def _choose(sample: Sample, texts: list[TarMember], kind: str) -> TarMember | None:
    """Return the text of one kind that is read: KEY.KIND, or else the only one."""
    same = [text for text in texts if suffix(text.name) == kind]
    exact = [text for text in same if _stem(text.name) == sample.key] or same
    if len(exact) == 1:
        others = [text for text in same if text is not exact[0]]
        reason = f"{exact[0].name} is what is read of this sample"
        sample.left_out += [(text, "unused_members", reason) for text in others]
        return exact[0]
    for text in same:
        reason = (
            f"its sample has {len(exact)} .{kind} members; expected one, or {sample.key}.{kind}"
        )
        sample.left_out.append((text, "ambiguous_texts", reason))
    return None


def _stem(name: str) -> str:
    """Return a member's name without its last suffix."""
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.rpartition(".")
    return f"{folder}{slash}{stem}" if dot and stem else name


def _prefixes(name: str, key: str) -> list[str]:
    """Return a name, then what is left of it at each of its dots from the last on, down to ``key``.

    The name itself is one, because people call a caption ``a.jpg.txt`` too.
    """
    found = [name]
    while len(name) > len(key) and "." in name[len(key) :]:
        name = name[: name.rindex(".")]
        found.append(name)
    return found
