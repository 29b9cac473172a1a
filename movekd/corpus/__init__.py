"""Images and conversations: tar shards with an index, decoding, model inputs, LLaVA's JSON.

``pack``, ``parquet`` and ``webdataset`` write a corpus folder. ``index`` opens it for both
pipelines, ``transforms`` turns image bytes into model inputs, ``conversations`` reads LLaVA's JSON.
"""

from movekd.corpus.conversations import Conversation, load_conversations
from movekd.corpus.decode import decode_image
from movekd.corpus.index import Corpus, open_corpus
from movekd.corpus.pack import DEFAULT_WORKERS, pack_folder, pack_llava
from movekd.corpus.parquet import pack_parquet
from movekd.corpus.report import PackReport
from movekd.corpus.transforms import ImageTransform
from movekd.corpus.webdataset import index_webdataset

__all__ = [
    "DEFAULT_WORKERS",
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
    "pack_parquet",
]
