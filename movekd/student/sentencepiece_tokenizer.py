"""Convert Llama's SentencePiece tokenizers to fast tokenizers that give LLaVA's tokens.

Input: a `tokenizer.model` and whether its tokenizer_config.json says `legacy`. Output: a
`tokenizers.Tokenizer`. Used by ``tokenizer.load_tokenizer``, which checks the result against
sentencepiece itself.

LLaVA cuts a text at every ``<image>`` and gives each piece to transformers 4's slow
``LlamaTokenizer``, so a blank (``▁``) stands before the text behind an image, too. The tokenizer
here does that to a whole text: each piece between images gets its blank. That is why a processor
of transformers, which knows nothing of pieces, gives the same tokens from its files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from movekd.errors import WeightsError

BLANK = "▁"
"""How SentencePiece writes a blank."""

PROBES = (
    *("A chat between a user and an assistant. USER: What is it? ASSISTANT: A cat.", "2", "12:30"),
    *("1990", "50%", "½", "猫", "这张图片", "🐱", "«café»", '"quoted"', "(B) pear", " blank"),
    *(
        "  two blanks",
        "\n    return",
        "\ndef f(x):\n        return  x\n",
        "a\tb\t\tc",
        "line\r\nline",
    ),
    *("=" * 37, "-" * 80, "." * 11, "x" + " " * 25 + "y", "aaaaaaaaaaaaaaa", "1.000.000,00"),
    *("https://a.b/c?d=e&f=g", "</tag>", "[0.31,0.2,0.55,0.94]", "Ελλάδα", "10\u00a0km", "#####"),
)
"""Texts on which a converted tokenizer must agree with sentencepiece."""


@dataclass(frozen=True)
class SentencePieceModel:
    """A `tokenizer.model`: its description (a protobuf message), and what tokenises with it."""

    spec: Any
    processor: Any


def read_sentencepiece(model_file: Path) -> SentencePieceModel:
    """Return a SentencePiece model.

    Raises:
        WeightsError: the file is none.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    content = model_file.read_bytes()
    try:
        spec = sentencepiece_model_pb2.ModelProto.FromString(content)
        return SentencePieceModel(spec, SentencePieceProcessor(model_proto=content))
    except Exception as error:  # protobuf and sentencepiece raise their own classes
        raise WeightsError(
            f"{model_file} is no SentencePiece model ({str(error).splitlines()[0]}); download it "
            "again, or give a directory with a tokenizer.json."
        ) from None


def convert_sentencepiece(
    model: SentencePieceModel,
    legacy: bool,
    special_tokens: list[str],
    added_tokens: Mapping[int, AddedToken],
) -> Tokenizer | None:
    """Return the fast tokenizer of a Llama's `tokenizer.model`, or None for another kind of model.

    Args:
        model: what ``read_sentencepiece`` returns.
        legacy: what transformers 4 called so: a blank before the text behind every added token,
            ``</s>`` for one. Otherwise a blank stands at the start of a piece only.
        special_tokens: the added tokens that are special.
        added_tokens: number -> what is added to the vocabulary, or taken out of a text whole.

    Source: haotian-liu/LLaVA llava/mm_utils.py, tokenizer_image_token; transformers 4.37
    models/llama/tokenization_llama.py (tokenize, _tokenize).
    """
    spec, processor = model.spec, model.processor
    is_like_llama = (
        spec.trainer_spec.model_type == spec.trainer_spec.BPE
        and spec.normalizer_spec.add_dummy_prefix
        and not spec.normalizer_spec.remove_extra_whitespaces
        and not spec.normalizer_spec.precompiled_charsmap
        and not any(piece.type == piece.USER_DEFINED for piece in spec.pieces)
    )
    if not is_like_llama:
        return None
    vocabulary = {piece.piece: number for number, piece in enumerate(spec.pieces)}
    bpe = models.BPE(
        vocab=vocabulary,
        merges=_merges(spec),
        unk_token=processor.id_to_piece(processor.unk_id()),
        fuse_unk=True,
        byte_fallback=spec.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = _blanks(special_tokens, legacy)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    begin = processor.id_to_piece(processor.bos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, processor.bos_id())],
    )
    _add_tokens(tokenizer, added_tokens, are_piece_ends=legacy)
    return tokenizer


def start_pieces_with_blank(tokenizer: Tokenizer, special_tokens: list[str]) -> bool | None:
    """Put a blank before every piece, if a tokenizer.json has one only before the first.

    Files of tokenizers that were converted with `legacy: false` say so with a Metaspace; others
    stay as they are. Returns `legacy`; None for a tokenizer that is no SentencePiece one.
    """
    metaspace = tokenizer.pre_tokenizer
    if (
        tokenizer.normalizer is None
        and type(metaspace).__name__ == "Metaspace"
        and metaspace.prepend_scheme == "first"
        and not metaspace.split
        and metaspace.replacement == BLANK
    ):
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = _blanks(special_tokens, legacy=False)
        _add_tokens(tokenizer, tokenizer.get_added_tokens_decoder(), are_piece_ends=False)
        return False
    return True if "Prepend" in repr(tokenizer.normalizer) else None


def require_sentencepiece_tokens(tokenizer: Any, model: SentencePieceModel, source: str) -> None:
    """Refuse a converted tokenizer that gives other tokens than sentencepiece.

    Raises:
        WeightsError: names the tokenizer, a text, and what either makes of it.
    """
    for text in PROBES:
        expected = model.processor.encode(text, out_type=str)
        found = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
        if found != expected:
            raise WeightsError(
                f"the tokenizer of {source} makes {found} of {text!r}, where sentencepiece reads "
                f"{expected} with its tokenizer.model; a model that learned the one does not know "
                "the other. Give a directory whose tokenizer.json was made from that file."
            )


def _add_tokens(
    tokenizer: Tokenizer, tokens: Mapping[int, AddedToken], are_piece_ends: bool
) -> None:
    """Add tokens; ``are_piece_ends`` says whether a new piece starts behind them.

    tokenizers takes tokens with ``normalized=False`` out of the raw text, and each of the pieces
    between them is normalised, so gets its blank. It looks for the others after that.
    """
    for _, token in sorted(tokens.items()):
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        again = AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=not are_piece_ends,
            special=token.special,
        )
        add([again])


def _blanks(special_tokens: list[str], legacy: bool) -> normalizers.Normalizer:
    """Return the normalizer that puts a blank before each piece, as SentencePiece does.

    Slow tokenizers drop the blank in front of a special token. The same pattern keeps the special
    tokens themselves, which tokenizers normalises as well, as they are.
    """
    replace = normalizers.Replace(" ", BLANK)
    if legacy:
        return normalizers.Sequence([normalizers.Prepend(BLANK), replace])
    specials = "|".join(re.escape(token) for token in sorted(special_tokens))
    start = Regex(rf"\A(?!{specials})" if specials else r"\A")
    return normalizers.Sequence([normalizers.Replace(start, BLANK), replace])


def _merges(spec: Any) -> list[tuple[str, str]]:
    """Return the pairs that BPE joins, best piece first, as sentencepiece ranks them.

    Source: google/sentencepiece src/bpe_model.cc: of all neighbours, those that form the piece of
    the highest score are joined. transformers 5.23 ranks by the piece's number instead, which
    differs for runs of blanks.
    """
    normal = [piece for piece in spec.pieces if piece.type == piece.NORMAL]
    vocabulary = {piece.piece for piece in normal}
    return [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in sorted(normal, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in vocabulary and piece.piece[cut:] in vocabulary
    ]
