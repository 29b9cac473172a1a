"""A few dozen scenes of real handwriting, packed and cached with two of the small real teachers."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import set_seed

import scenes
from movekd.cache import open_cache
from movekd.cache.spec import load_spec
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.distill.objective import kd_terms
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.student.hf_loading import quiet_libraries
from movekd.train.config import load_config
from movekd.train.run import build_data, build_model, train

PIPELINE = Path(scenes.__file__).parent
TEACHERS = ("clip", "sam")


@dataclass(frozen=True)
class Digits:
    """Where things lie: ``source`` LLaVA JSON and images, ``data`` shards, ``cache`` features."""

    source: Path
    data: Path
    cache: Path

    def config(self, stage="pretrain", *overrides):
        """Return a run of 6 steps (pretrain), 4 (finetune) or 9 (distill), batch 4, all logged."""
        is_distill = stage == "distill"  # of every image of the corpus, without text
        conversations = "" if is_distill else f"{self.source / stage}.json"
        fixed = [
            f"stage={stage}",
            f"data.shards={self.data}",
            f"data.conversations=[{conversations}]",
            f"distill.teachers=[{', '.join(TEACHERS)}]",
            "training.per_device_train_batch_size=4",
            "training.num_train_epochs=1",
            "training.logging_steps=1",
            "training.report_to=none",
            "training.use_cpu=true",
        ]
        path = PIPELINE / f"{'pretrain' if is_distill else stage}.yaml"
        return load_config(path, [*fixed, *overrides])

    def train(self, output, stage="pretrain", *overrides, learning_rate=None, **kwargs):
        """Train such a run; return its summary. ``learning_rate`` may be one that no config may."""
        config = self.config(stage, *overrides)
        if learning_rate is not None:
            keys = config.training | {"learning_rate": learning_rate}
            config = config.model_copy(update={"training": keys})
        cache = None if config.distill is None else self.cache
        return train(config, output, cache, **kwargs)

    def parts(self, config):
        """Return the model, its student, the data set and the collator of a run."""
        cache = None if config.distill is None else open_cache(self.cache)
        set_seed(0)
        model, student = build_model(config, cache)
        dataset, collator = build_data(config, open_corpus(config.data.shards), cache, student)
        return model, student, dataset, collator

    @staticmethod
    def terms(model, batch):
        """Return the sum of each loss term of a batch, and each statistic, by name."""
        model.measures_rank = True
        return {name: value for name, value, *_ in model(**batch)}

    @staticmethod
    def kd(model, student_IND, targets):
        """Return the KD loss of some tokens of the student, and that of each teacher."""
        terms = kd_terms(model.objective.distill, model.compare(student_IND, targets))
        return {name: value for name, value, *_ in terms}

    @staticmethod
    def weights(output):
        """Return every tensor of a run's model, file/name -> tensor."""
        return {
            f"{path.name}/{name}": tensor
            for path in sorted((output / "model").rglob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    @staticmethod
    def logged(summary):
        """Return the logged figures of each step, without times and memory."""
        timed = ("runtime", "per_second", "peak_gib")
        return [
            {key: value for key, value in entry.items() if not key.endswith(timed)}
            for entry in summary.log
            if "loss" in entry
        ]


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    """As the commands do: advice of libraries stays out."""
    quiet_libraries()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """24 captions, and 16 mixed entries: questions, two images, one image twice, text only."""
    folder = tmp_path_factory.mktemp("digits")
    scenes.write_corpus(folder, num_pretrain=24, num_finetune=10, num_val=1, num_test=1, seed=3)
    entries = json.loads((folder / "finetune.json").read_text())
    first, second = entries[0]["image"], entries[1]["image"]
    entries[2]["image"] = first  # one image in several conversations
    entries.append(
        {
            "id": "two",
            "image": [second, entries[3]["image"]],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nIs there a 3?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
    )
    for number in range(5):
        turns = [
            {"from": "human", "value": "What is the sum of 1, 2?"},
            {"from": "gpt", "value": "3" + " , 3" * number},
        ]
        entries.append({"id": f"text-{number}", "conversations": turns})
    (folder / "finetune.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="session")
def digit_specs():
    """Specs of two real teachers; sam keeps its native 12x12 grid, the student's is 6x6."""
    specs = [load_spec(str(PIPELINE / "teachers" / f"{name}.yaml")) for name in TEACHERS]
    return [specs[0], specs[1].with_changes(grid="native")]


@pytest.fixture(scope="session")
def digits(source, digit_specs):
    """The packed corpus and its cache."""
    files = [source / "pretrain.json", source / "finetune.json"]
    pack_llava(files, source / "images", source / "data", num_workers=1)
    list(
        build_cache(
            source / "cache",
            open_corpus(source / "data"),
            digit_specs,
            geometry="crop",
            options=BuildOptions(num_workers=0),
        )
    )
    return Digits(source, source / "data", source / "cache")
