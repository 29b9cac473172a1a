"""Images and words in: tar shards with their index, decoded images, LLaVA conversations.

``pack`` writes a corpus folder, ``open_corpus`` (``index``) opens it for both pipelines,
``images`` makes model inputs of its bytes, ``conversations`` reads the words.
"""

from movekd.corpus.conversations import Conversation, load_conversations
from movekd.corpus.decode import decode_image
from movekd.corpus.index import Corpus, open_corpus
from movekd.corpus.pack import index_webdataset, pack_folder, pack_llava
from movekd.corpus.report import PackReport
from movekd.corpus.transforms import ImageTransform

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
