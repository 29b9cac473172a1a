"""Tests of movekd.student.tokenizer: what is loaded reads as sentencepiece and LLaVA do."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer

from movekd.errors import WeightsError
from movekd.student import load_tokenizer
from movekd.student.sentencepiece_tokenizer import (
    PROBES,
    read_sentencepiece,
    require_sentencepiece_tokens,
)
from movekd.student.tokenizer import IMAGE_TOKEN, copy_tokenizer_files, forget_calls
from text_kit import FIXTURE, byte_bpe, write_mistral

TEXTS = [
    *PROBES,
    "USER: <image>\nWhat? ASSISTANT: 2</s>USER: hi",
    "<image>a cat<image><image> x</s>",
    "</s>a <unk> b</s></s>c",
]


@pytest.fixture(scope="module")
def processor():
    return SentencePieceProcessor(model_file=str(FIXTURE / "tokenizer.model"))


@pytest.fixture(scope="module", params=[False, True, None])
def mistral(request, tmp_path_factory):
    return load_tokenizer(write_mistral(tmp_path_factory.mktemp("mistral"), request.param))


def pieces_as_llava(text, processor, legacy):
    """Tokenise with sentencepiece only, in the steps of LLaVA and of the slow tokenizer."""
    found = []
    for number, part in enumerate(text.split(IMAGE_TOKEN)):
        found += [IMAGE_TOKEN] if number else []
        parts = [p for p in re.split(r"(<s>|</s>|<unk>)", part) if p]
        for at, piece in enumerate(parts):
            if piece in ("<s>", "</s>", "<unk>"):
                found.append(piece)
            elif legacy or at == 0:
                found += processor.encode(piece, out_type=str)
            else:  # sentencepiece puts a blank before every text: take it off behind a mark
                found += processor.encode("\n" + piece, out_type=str)[2:]
    return found


def test_a_tokenizer_is_saved_as_loaded_whatever_it_has_tokenised(tmp_path):
    """A run that ends and one that resumes from its last step must save the same bytes."""
    tokenizer = load_tokenizer(write_mistral(tmp_path / "source"))
    forget_calls(tokenizer).save_pretrained(tmp_path / "before")
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer(["a", "a cat"], padding=True, truncation=True, max_length=2)
    tokenizer.pad_token = None
    forget_calls(tokenizer).save_pretrained(tmp_path / "after")
    before, after = (tmp_path / name / "tokenizer.json" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_runs_of_blanks_are_those_of_sentencepiece(mistral, tmp_path):
    """transformers' own conversion joins four blanks where sentencepiece joins three."""
    assert mistral.tokenize("\n    return") == ["▁", "<0x0A>", "▁▁▁", "▁return"]
    stock = LlamaTokenizer.from_pretrained(write_mistral(tmp_path))
    if stock.tokenize("\n    return") != ["▁", "<0x0A>", "▁▁▁", "▁return"]:
        model = read_sentencepiece(tmp_path / "tokenizer.model")
        with pytest.raises(WeightsError, match=r"the tokenizer of here makes .* where sentencep"):
            require_sentencepiece_tokens(stock, model, "here")


def test_a_whole_text_reads_as_llavas_pieces(mistral, processor):
    for text in TEXTS:
        expected = pieces_as_llava(text, processor, mistral.init_kwargs["legacy"])
        assert mistral.tokenize(text) == expected, text


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            st.text(max_size=12),
            st.sampled_from(["</s>", "<unk>", IMAGE_TOKEN, "\n", "    ", "2", "猫", "=" * 9, "\t"]),
        ),
        max_size=8,
    )
)
def test_any_text_reads_as_llavas_pieces(mistral, processor, parts):
    text = "".join(parts).replace("\0", "")  # ends a text in sentencepiece
    expected = pieces_as_llava(text, processor, mistral.init_kwargs["legacy"])
    assert mistral.tokenize(text) == expected


def test_random_runs_and_pieces_read_as_sentencepiece(mistral, processor):
    rng = random.Random(0)
    words = [processor.id_to_piece(i).replace("▁", " ") for i in range(300, 31_000, 7)]
    for _ in range(2_000):
        runs = [rng.choice(" \t\n=-_.*#/aé0") * rng.randint(1, 40) for _ in range(4)]
        text = "".join(rng.choice([rng.choice(words), run]) for run in runs * 2)
        assert mistral.tokenize(text) == processor.encode(text, out_type=str), text


def test_saved_and_loaded_again_by_anybody_it_gives_the_same_tokens(mistral, tmp_path):
    mistral.save_pretrained(tmp_path)
    for other in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert [other(text).input_ids for text in TEXTS] == [mistral(t).input_ids for t in TEXTS]
        assert other.init_kwargs["legacy"] == mistral.init_kwargs["legacy"]
        assert other.convert_tokens_to_ids(IMAGE_TOKEN) == 32_000


def test_a_tokenizer_json_of_such_a_tokenizer_reads_as_pieces_too(mistral, tmp_path):
    """Others have converted the same model: the file says `legacy` by its parts."""
    if mistral.init_kwargs["legacy"]:
        pytest.skip("the other conversion")
    LlamaTokenizer.from_pretrained(write_mistral(tmp_path / "stock", False)).save_pretrained(
        tmp_path / "json"
    )
    assert not (tmp_path / "json" / "tokenizer.model").exists()
    loaded = load_tokenizer(tmp_path / "json")
    for text in ("USER: <image>\nWhat? ASSISTANT: 2</s>USER: hi", "<image>a<image><image>b</s>c"):
        assert loaded.tokenize(text) == mistral.tokenize(text)


def test_vicunas_files_are_read_without_a_tokenizer_json(tmp_path):
    """The keys of lmsys/vicuna-7b-v1.5, with a padding token behind the vocabulary."""
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    keys = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": "<s>", **token},
        "eos_token": {"__type": "AddedToken", "content": "</s>", **token},
        "unk_token": {"__type": "AddedToken", "content": "<unk>", **token},
        "pad_token": None,
        "model_max_length": 4096,
        "padding_side": "right",
    }
    folder = write_mistral(tmp_path / "vicuna", False, **keys)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 32_000}))
    special = {name: keys[name]["content"] for name in ("bos_token", "eos_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.model_max_length, tokenizer.pad_token) == (4096, "<unk>")
    assert tokenizer.convert_tokens_to_ids(["<pad>", IMAGE_TOKEN]) == [32_000, 32_001]
    assert tokenizer.tokenize("ASSISTANT: 2</s>U")[-5:] == [":", "▁", "2", "</s>", "U"]
    assert tokenizer("a").input_ids[0] == 1


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "LlamaTokenizerFast"}])
def test_a_tokenizer_model_by_itself_is_a_llamas(config, tmp_path):
    folder = write_mistral(tmp_path, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).tokenize("</s>a") == ["</s>", "▁a"]


def test_the_begin_token_can_be_switched_off(tmp_path):
    tokenizer = load_tokenizer(write_mistral(tmp_path, add_bos_token=False))
    assert tokenizer("a").input_ids == tokenizer.convert_tokens_to_ids(["▁a"])


def test_other_tokenizers_stay_as_they_are(tmp_path):
    stock = byte_bpe()
    stock.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in PROBES:
        assert loaded(text).input_ids == stock(text).input_ids
    image = loaded.convert_tokens_to_ids(IMAGE_TOKEN)
    assert loaded(f"a{IMAGE_TOKEN}b").input_ids.count(image) == 1
    assert image == len(stock)


def test_a_tokenizer_model_of_another_kind_is_not_looked_at_beside_a_tokenizer_json(tmp_path):
    """Some repositories keep tiktoken's ranks under that name."""
    byte_bpe().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert load_tokenizer(tmp_path)("a cat").input_ids == byte_bpe()("a cat").input_ids


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"holds no tokenizer; expected a tokenizer.json or"):
        load_tokenizer(tmp_path)
    folder = write_mistral(tmp_path / "broken")
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(
        WeightsError, match=r"broken/tokenizer.model is no SentencePiece model .* download"
    ):
        load_tokenizer(folder)
    folder = write_mistral(
        tmp_path / "numbers", added_tokens_decoder={"40000": {"content": "<x>", "special": True}}
    )
    with pytest.raises(
        WeightsError, match=r"'<x>' has the number 40000; behind the 32000 .* 32000"
    ):
        load_tokenizer(folder)


def test_a_tokenizers_own_files_are_copied_for_the_released_code(tmp_path):
    folder = write_mistral(tmp_path / "from")
    (tmp_path / "to").mkdir()
    copy_tokenizer_files(str(folder), tmp_path / "to")
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]
