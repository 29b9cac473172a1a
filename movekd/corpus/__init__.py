"""Images and words in: tar shards with their index, decoded images, LLaVA conversations.

``pack`` writes a corpus folder, ``open_corpus`` (``index``) opens it for both pipelines,
``images`` makes model inputs of its bytes, ``conversations`` reads the words.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from movekd.corpus.conversations import Conversation, load_conversations
    from movekd.corpus.decode import decode_image
    from movekd.corpus.images import ImageTransform
    from movekd.corpus.index import Corpus, open_corpus
    from movekd.corpus.pack import index_webdataset, pack_folder, pack_llava
    from movekd.corpus.report import PackReport

__all__ = [
    "Conversation",
    "Corpus",
    "ImageTransform",
    "PackReport",
    "decode_image",
    "index_webdataset",
    "load_conversations",
    "open_corpus",
    "pack_folder",
    "pack_llava",
]

_MODULES = {
    "Conversation": "movekd.corpus.conversations",
    "Corpus": "movekd.corpus.index",
    "ImageTransform": "movekd.corpus.images",
    "PackReport": "movekd.corpus.report",
    "decode_image": "movekd.corpus.decode",
    "index_webdataset": "movekd.corpus.pack",
    "load_conversations": "movekd.corpus.conversations",
    "open_corpus": "movekd.corpus.index",
    "pack_folder": "movekd.corpus.pack",
    "pack_llava": "movekd.corpus.pack",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
