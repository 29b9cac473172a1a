"""Commands for the reader's own images, run from top to bottom with small models.

``conftest.run`` says what is replaced.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "finetune")


def commands(page: str) -> list[list[str]]:
    """Return a page's `movekd` commands in order, as words."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (movekd .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def check_teachers(page: str) -> None:
    """What is built is what is trained with: in the commands, and as the run found it."""
    found = commands(page)
    built = {
        words[words.index("--cache") + 1]: {
            words[at + 1] for at, word in enumerate(words) if word == "--teacher"
        }
        for words in found
        if words[1:3] == ["cache", "build"]
    }
    runs = [words for words in found if words[1] == "train"]
    assert [words[words.index("--output") + 1] for words in runs] == [f"runs/{s}" for s in STAGES]
    for words, stage in zip(runs, STAGES, strict=True):
        config = yaml.safe_load(Path(f"runs/{stage}/config.yaml").read_text())
        named = next(word for word in words if word.startswith("distill.teachers="))
        assert yaml.safe_load(named.partition("=")[2]) == config["distill"]["teachers"]
        assert set(config["distill"]["teachers"]) == built[words[words.index("--cache") + 1]]


def test_readme_trains_both_stages_and_exports_the_last(run: Any) -> None:
    Path("images").symlink_to("LLaVA-Pretrain")
    Path("captions.json").symlink_to("blip_laion_cc_sbu_558k.json")
    Path("chats.json").symlink_to("blip_laion_cc_sbu_558k.json")
    for words in commands("README.md"):
        plan = ["--num-images", "558000", "--assume-rate", "100", "--no-measure-disk"]
        run([*words, *plan] if words[1:3] == ["cache", "plan"] else words)
    check_teachers("README.md")
    assert AutoModelForImageTextToText.from_pretrained("my-model").config.model_type == "llava"


def write_parquet_corpora() -> None:
    """Write small files in place of the data sets that the page packs from Parquet."""
    picture = next(path for path in Path("LLaVA-Pretrain").rglob("*") if path.is_file())
    image = {"bytes": picture.read_bytes(), "path": picture.name}
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    fine = {"images": [image], "texts": [{"user": "What?", "assistant": "This."}]}
    for name, row in (
        ("LLaVA-OneVision-Data/train.parquet", {"id": "1", "image": image, "conversations": turns}),
        ("FineVision/ai2d_merged/0.parquet", fine),
        ("FineVision/chartqa/0.parquet", fine),
    ):
        Path(name).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([row]), name)


def test_the_page_on_llava_s_data_trains_both_stages(run: Any) -> None:
    write_parquet_corpora()
    page = "docs/howto/llava-data.md"
    others = ("photos/", "tars/", "ls")
    for words in commands(page):
        if not any(word in others for word in words):
            run(words)
    check_teachers(page)
