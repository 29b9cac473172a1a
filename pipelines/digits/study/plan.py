"""What the study runs: arms, contrasts, worlds, seeds and sizes, decided before the first run.

Comes from nowhere but here and docs/study.md; goes to ``queue``, ``run`` and ``page``. An arm is
the digits pipeline's two YAML files, a cache, and the keys that it changes.
"""

from dataclasses import dataclass

from demo import TEACHERS

WORLDS = (0, 1, 2)
SEEDS = (0, 1, 2, 3)
MORE_SEEDS = tuple(range(12))
"""Of the two arms that are tested for equivalence: a margin of one point needs more pairs."""
FIRST_EXPLORATORY_SEED = 100
"""Exploratory runs use seeds from here on, so that no choice is made on a seed of the study."""
MAX_EXPLORATORY = 20
"""Exploratory runs a question."""


@dataclass(frozen=True)
class Sizes:
    """How much is drawn, learned and asked."""

    num_pretrain: int = 4096
    num_finetune: int = 2048
    finetune_epochs: float = 2.0
    num_val: int = 512
    num_test: int = 2048
    batch_size: int = 16
    logging_steps: int = 16
    teacher_steps: int | None = None
    """Replaces each teacher's own number of steps; the study never does."""


FULL_SIZE = Sizes()
SMOKE = Sizes(
    num_pretrain=64, num_finetune=32, num_val=16, num_test=16, logging_steps=2, teacher_steps=2
)
"""For tests of the machinery: says nothing about any arm."""


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        name: in rows, figures and tables.
        what: in a few words.
        cache: which of ``CACHES`` it distils from; None without distillation.
        keys: what it changes in both stages, as ``a.b=c``.
        pretrain: what it changes in stage 1 alone.
        matches_time_of: an arm as long as whose runs this one trains.
        seeds: of its runs.
    """

    name: str
    what: str
    cache: str | None = "pooled_int8"
    keys: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    matches_time_of: str | None = None
    seeds: tuple[int, ...] = SEEDS

    @property
    def has_experts(self) -> bool:
        """Whether the student is a MoLE."""
        return "student.mole=null" not in self.keys


CACHES: dict[str, dict[str, str]] = {
    "pooled_int8": {},
    "native_int8": {"grid": "native"},
    "pooled_float16": {"codec": "float16"},
    "shuffled": {},
}
"""What a world's caches change in the teachers' specs. ``shuffled``: every image has another's."""

FULL = {"keys": ("student.mole=null",), "pretrain": ("trained=[vision_tower, projector]",)}
"""Full fine-tuning: no experts, the tower's own weights learn in both stages."""


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
    Arm("scaled_targets", "targets of one scale a teacher", keys=("distill.targets=scaled",)),
    *(
        Arm(
            f"only_{teacher}",
            f"{teacher} alone, all tokens alike",
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
"""What `make study-full` adds. Parts are taken away from, or changed in, `revised_mole`."""

TIME_BASE = {"revised_mole": "none_mole", "revised_full": "none_full"}
"""The arm without KD whose steps are multiplied until it takes as long."""


@dataclass(frozen=True)
class Contrast:
    """A difference of accuracy between two arms, paired by world and seed.

    Attributes:
        first: the arm that is expected to be better.
        second: the other one.
        margin: None tests for a difference; a number tests that there is none as large as it.
    """

    first: str
    second: str
    margin: float | None = None

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.first} - {self.second}"


PRIMARY = Contrast("revised_mole", "none_mole")
SECONDARY = (
    Contrast("revised_full", "none_full"),
    Contrast("revised_mole", "official_mole"),
    Contrast("none_mole", "none_full"),
    Contrast("revised_mole", "revised_full"),
    Contrast("revised_mole", "shuffled_mole"),
)
"""Holm's correction is over these. Those below have intervals and no claim."""
SECONDARY_MORE = (
    Contrast("revised_mole", "float16", margin=0.01),
    Contrast("revised_mole", "time_mole"),
    Contrast("revised_full", "time_full"),
)
"""Secondary as well, and in the correction, once `make study-full` has run."""
AFTERWARDS = (
    Contrast("official_mole", "none_mole"),
    Contrast("official_full", "none_full"),
    Contrast("shuffled_mole", "none_mole"),
    Contrast("base_in_stage1_scale_4", "revised_full"),
    *(Contrast(f"only_{teacher}", "none_mole") for teacher in TEACHERS),
)
"""Not in the plan: asked on 2026-11-29, when the results were known. Intervals and no claim."""


def arms(everything: bool) -> tuple[Arm, ...]:
    """Return the arms of `make study`, or of `make study-full` (each once, with all its seeds)."""
    chosen = {arm.name: arm for arm in (*STUDY, *(MORE if everything else ()))}
    return tuple(chosen.values())


def find_arm(name: str) -> Arm:
    """Return an arm by name.

    Raises:
        SystemExit: there is none.
    """
    for arm in arms(everything=True):
        if arm.name == name:
            return arm
    known = ", ".join(arm.name for arm in arms(everything=True))
    raise SystemExit(f"study: there is no arm '{name}'; known are {known}.")


@dataclass(frozen=True, order=True)
class RunId:
    """Which run: rows are known by it."""

    seed: int
    world: int
    arm: str


def runs(chosen: tuple[Arm, ...]) -> list[RunId]:
    """Return all runs, seed by seed, so that an interrupted study is a smaller balanced one.

    Arms that match the time of others come last.
    """
    order = sorted(chosen, key=lambda arm: arm.matches_time_of is not None)
    seeds = sorted({seed for arm in chosen for seed in arm.seeds})
    timed = [arm for arm in order if arm.matches_time_of]
    plain = [arm for arm in order if not arm.matches_time_of]
    return [
        RunId(seed, world, arm.name)
        for part in (plain, timed)
        for seed in seeds
        for world in WORLDS
        for arm in part
        if seed in arm.seeds
    ]
