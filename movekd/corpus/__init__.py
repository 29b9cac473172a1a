"""Images and words in: tar shards with their index, decoded images, LLaVA conversations.

``pack`` writes a corpus folder, ``open_corpus`` (``index``) opens it for both pipelines,
``images`` makes model inputs of its bytes, ``conversations`` reads the words.
"""
