"""The plan of the first study, and of the comparison of codecs, fixed before their first runs.

docs/study.md explains it; ``plan_twelve`` has the study with twelve worlds. An arm is the two YAML
files of the digits pipeline, a cache, and the keys that it changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from demo import TEACHERS

WORLDS = (0, 1, 2)
SEEDS = (0, 1, 2, 3)
MORE_SEEDS = tuple(range(12))
"""Seeds of the two arms that are tested for equivalence: a margin of one point needs more pairs."""
FIRST_EXPLORATORY_SEED = 100
"""Exploratory runs use this seed or higher ones, so that no choice rests on a seed of the study."""
MAX_EXPLORATORY = 20
"""Limit of exploratory runs per question."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of scenes, epochs and questions."""

    num_pretrain: int = 4096
    num_finetune: int = 2048
    finetune_epochs: float = 2.0
    num_val: int = 512
    num_test: int = 2048
    batch_size: int = 16
    logging_steps: int = 16
    teacher_steps: int | None = None
    """Replaces the number of steps of each teacher; only tests set it."""

    @property
    def num_probe(self) -> int:
        """Scenes of one digit in each half of a probe; a probe needs some of each digit."""
        return max(self.num_test // 2, 40)


FULL_SIZE = Sizes()
SMOKE = Sizes(
    num_pretrain=64, num_finetune=32, num_val=16, num_test=16, logging_steps=2, teacher_steps=2
)
"""Sizes for tests of the code; results mean nothing."""


REVISED = "recipe=revised_2026_11"
"""The first key of every run: `revised` as it was when the studies were planned."""
SHIPPED_CACHE = "pooled_int8"
"""The cache that the teachers' shipped specs make."""


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        name: name in rows, figures and tables.
        what: a short description.
        cache: which of ``CACHES`` or ``DERIVED`` it distils from; None without distillation.
        keys: changes in both stages, as ``a.b=c``.
        pretrain: changes in stage 1 only.
        finetune: changes in stage 2 only.
        matches_time_of: this arm trains as long as that one.
        counts_teachers: to that time belong the teachers' training and the building of the cache.
        seeds: seeds of its runs.
        worlds: worlds of its runs.
        is_main: its students also answer scenes with more clutter or noise, and are probed.
    """

    name: str
    what: str
    cache: str | None = SHIPPED_CACHE
    keys: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    matches_time_of: str | None = None
    counts_teachers: bool = False
    seeds: tuple[int, ...] = SEEDS
    worlds: tuple[int, ...] = WORLDS
    is_main: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether the student is a MoLE."""
        return "student.mole=null" not in self.keys


CODECS = ("int8", "int4", "lloyd4", "lloyd3", "lloyd2", "lowrank16", "lowrank8", "lowrank4")
"""Codecs that are compared with float16, from the most bits to the fewest."""
CACHES: dict[str, dict[str, str]] = {
    SHIPPED_CACHE: {},
    "native_int8": {"grid": "native"},
    "pooled_float16": {"codec": "float16"},
}
"""Changes of the teachers' specs per cache that is built."""
DERIVED = {"shuffled": SHIPPED_CACHE, "labels": SHIPPED_CACHE} | {
    f"recoded_{codec}": "pooled_float16" for codec in CODECS
}
"""Caches that are made from another one. ``shuffled``: images have features of others. ``labels``:
tokens are what the teachers with dense labels were trained to say."""

FULL = {"keys": ("student.mole=null",), "pretrain": ("trained=[vision_tower, projector]",)}
"""Full fine-tuning: no experts; the tower's weights learn in both stages."""


def _full(name: str, what: str, *keys: str, **others: str | None) -> Arm:
    return Arm(name, what, keys=FULL["keys"] + keys, pretrain=FULL["pretrain"], **others)  # type: ignore[arg-type]


NONE = "distill=null"
STUDY = (
    Arm("none_mole", "MoLE, no KD", cache=None, keys=(NONE,)),
    Arm("revised_mole", "MoLE, revised KD", seeds=SEEDS),
    _full("none_full", "full fine-tuning, no KD", NONE, cache=None),
    _full("revised_full", "full fine-tuning, revised KD"),
    Arm("official_mole", "MoLE, official KD", cache="native_int8", keys=("recipe=official",)),
    Arm("shuffled_mole", "MoLE, revised KD, targets of other images", cache="shuffled"),
)
"""The arms of `make study`."""

MORE = (
    _full("official_full", "full fine-tuning, official KD", "recipe=official", cache="native_int8"),
    _full("shuffled_full", "full fine-tuning, targets of other images", cache="shuffled"),
    Arm("single_lora", "one LoRA of rank 16", keys=("student.mole.num_experts=1",)),
    Arm(
        "single_lora_wide",
        "one LoRA of rank 48, as many weights as the experts",
        keys=("student.mole.num_experts=1", "student.mole.r=48"),
    ),
    Arm("minus_heads", "adapters on the teachers' side", keys=("distill.adapters=teacher",)),
    Arm("minus_attention", "all tokens alike", keys=("distill.token_weighting=none",)),
    Arm("minus_standardised", "raw targets", keys=("distill.targets=raw",)),
    Arm("minus_gate", "no gate", keys=("student.mole.use_gate=false",)),
    Arm("minus_zero_init", "Kaiming init", keys=("student.mole.init_lora_weights=kaiming",)),
    Arm("minus_balance", "official balance loss", keys=("student.mole.balance=sample",)),
    Arm("minus_scale", "LoRA scale 1/16", keys=("student.mole.lora_alpha=1",)),
    Arm("scale_4", "LoRA scale 4", keys=("student.mole.lora_alpha=64",)),
    Arm(
        "base_in_stage1",
        "the tower's own weights learn in stage 1, too",
        pretrain=("trained=[vision_tower, mole, projector]",),
    ),
    Arm(
        "base_in_stage1_scale_4",
        "LoRA scale 4 and the tower's own weights in stage 1",
        keys=("student.mole.lora_alpha=64",),
        pretrain=("trained=[vision_tower, mole, projector]",),
    ),
    Arm("similarity", "teachers by similarity", keys=("distill.teacher_weighting=similarity",)),
    Arm("balanced", "teachers by their losses", keys=("distill.teacher_weighting=balanced",)),
    Arm("scaled_targets", "targets of one scale per teacher", keys=("distill.targets=scaled",)),
    *(
        Arm(
            f"only_{teacher}",
            f"only {teacher}, all tokens alike",
            keys=(f"distill.teachers=[{teacher}]", "distill.token_weighting=none"),
        )
        for teacher in TEACHERS
    ),
    Arm("native", "cache on the teachers' own grids", cache="native_int8"),
    Arm("revised_mole", "MoLE, revised KD", seeds=MORE_SEEDS),
    Arm("float16", "float16 cache", cache="pooled_float16", seeds=MORE_SEEDS),
    Arm(
        "time_mole",
        "MoLE, no KD, trained as long as with",
        cache=None,
        keys=(NONE,),
        matches_time_of="revised_mole",
    ),
    _full(
        "time_full",
        "full fine-tuning, no KD, trained as long as with",
        NONE,
        cache=None,
        matches_time_of="revised_full",
    ),
)
"""The arms that `make study-full` adds. They remove or change a part of `revised_mole`."""

CODEC_SEEDS = tuple(range(8))
CODEC_ARMS = (
    Arm("codec_float16", "float16", cache="pooled_float16", seeds=CODEC_SEEDS),
    *(Arm(f"codec_{c}", c, cache=f"recoded_{c}", seeds=CODEC_SEEDS) for c in CODECS),
)
"""`revised_mole` from caches in each codec: a comparison with its own rows (docs/codecs.md)."""

TIME_BASE = {"revised_mole": "none_mole", "revised_full": "none_full"}
"""The arm without KD that gets more steps until it takes as long."""


@dataclass(frozen=True)
class Contrast:
    """A difference of accuracy between two arms, paired by world and seed.

    Attributes:
        first: the arm that is expected to be better.
        second: the other one.
        margin: None tests for a difference; a number tests that the difference is smaller.
    """

    first: str
    second: str
    margin: float | None = None

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.first} - {self.second}"


CODEC_CONTRASTS = tuple(
    Contrast(arm.name, CODEC_ARMS[0].name, margin=0.01) for arm in CODEC_ARMS[1:]
)
"""Tested in this order, each at 5%; the first that fails ends the claims."""
PRIMARY = Contrast("revised_mole", "none_mole")
SECONDARY = (
    Contrast("revised_full", "none_full"),
    Contrast("revised_mole", "official_mole"),
    Contrast("none_mole", "none_full"),
    Contrast("revised_mole", "revised_full"),
    Contrast("revised_mole", "shuffled_mole"),
)
"""Holm's correction covers these. Contrasts of later lists have intervals but no claim."""
SECONDARY_MORE = (
    Contrast("revised_mole", "float16", margin=0.01),
    Contrast("revised_mole", "time_mole"),
    Contrast("revised_full", "time_full"),
)
"""Also secondary: the correction covers them once `make study-full` has run."""
AFTERWARDS = (
    Contrast("official_mole", "none_mole"),
    Contrast("official_full", "none_full"),
    Contrast("shuffled_mole", "none_mole"),
    Contrast("base_in_stage1_scale_4", "revised_full"),
    *(Contrast(f"only_{teacher}", "none_mole") for teacher in TEACHERS),
)
"""Not in the plan: added on 2026-11-29, when the results were known. Intervals but no claim."""


def arms(everything: bool) -> tuple[Arm, ...]:
    """Return the arms of `make study`, or of `make study-full` (each once, with all its seeds)."""
    chosen = {arm.name: arm for arm in (*STUDY, *(MORE if everything else ()))}
    return tuple(chosen.values())


def find_arm(name: str, among: Sequence[Arm] = ()) -> Arm:
    """Return an arm by name; by default one of the first study or of the comparison of codecs.

    Raises:
        SystemExit: the name is unknown.
    """
    every = tuple(among) or (*arms(everything=True), *CODEC_ARMS)
    for arm in every:
        if arm.name == name:
            return arm
    known = ", ".join(arm.name for arm in every)
    raise SystemExit(f"study: no arm is named '{name}'; known are {known}.")


@dataclass(frozen=True, order=True)
class RunId:
    """Identity of a run and of its rows."""

    seed: int
    world: int
    arm: str


def runs(chosen: Sequence[Arm]) -> list[RunId]:
    """Return all runs, seed by seed, so that an interrupted study is a smaller balanced one.

    Arms that match the training time of others are last.
    """
    order = sorted(chosen, key=lambda arm: arm.matches_time_of is not None)
    seeds = sorted({seed for arm in chosen for seed in arm.seeds})
    worlds = sorted({world for arm in chosen for world in arm.worlds})
    timed = [arm for arm in order if arm.matches_time_of]
    plain = [arm for arm in order if not arm.matches_time_of]
    return [
        RunId(seed, world, arm.name)
        for part in (plain, timed)
        for seed in seeds
        for world in worlds
        for arm in part
        if seed in arm.seeds and world in arm.worlds
    ]
