"""Write the results part of docs/twelve-worlds.md from ``report.json`` and the exploratory rows.

The text above its mark is written by hand. Every figure is in points of accuracy where it is a
difference, and has its 95% interval over worlds.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from study import results, tune
from study.page import BEGIN, DOCS, END, constant_sentence
from study.plan_twelve import PART_CONTRASTS
from study.results import Row
from study.summary import KINDS, Summary

mpl.use("Agg")
from matplotlib import pyplot as plt

PAGE = "twelve-worlds.md"
FIGURE = "study/twelve-parts.png"
NOT_YET = (
    "**Not a result**: validation scenes, and only worlds whose runs of {what} all have a row. "
    "The answers about test scenes are read when all runs have them."
)


def write_page(found: Summary | None, folder: Path, docs: Path = DOCS) -> Path:
    """Write the results part and its figure; return the page.

    Args:
        found: the report; None before a world has all runs of main arms.
        folder: of the rows.
        docs: folder of the page.
    """
    page = docs / PAGE
    whole = page.read_text(encoding="utf-8")
    before, after = whole[: whole.index(BEGIN)], whole[whole.index(END) :]
    tried, later = (results.read(folder, kind) for kind in ("exploratory", "afterwards"))
    lines = results_part(found, tried, later)
    if found is not None and found["rest"] is not None:
        (docs / FIGURE).parent.mkdir(exist_ok=True)
        draw_parts(found["rest"], docs / FIGURE)
    text = "\n".join(lines)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{after}", encoding="utf-8")
    return page


def results_part(
    found: Summary | None, tried: Sequence[Row], later: Sequence[Row] = ()
) -> list[str]:
    """Return the results as lines of Markdown."""
    lines = ["## Results"]
    if found is None:
        lines += ["", "No world has all runs of the main arms yet."]
    else:
        lines += main_part(found["main"])
        lines += ["", "### Parts, experts, controls and ideas", ""]
        rest = found["rest"]
        lines += ["No world has all of these runs yet."] if rest is None else rest_part(rest)
    if tried:
        lines += ["", "### Tuning of the official recipe", "", *tuning_part(tried)]
    if later:
        lines += ["", "### Learning rates, afterwards", "", *rates_part(later)]
    return lines


def main_part(found: Summary) -> list[str]:
    """Return claims, main arms and robustness."""
    lines = [
        "",
        *_introduction(found, "main arms"),
        "",
        "### Claims",
        "",
        *claims_part(found),
        "",
        mixed_sentence(found["mixed_model"]),
        "",
        "### Main arms",
        "",
        constant_sentence(found["constant_answers"]),
        "",
        *arms_table(found["arms"]),
        "",
        *differences_table(found["others"]),
    ]
    if "unseen" in found:
        lines += ["", "### Unseen clutter and noise, and the encoder by itself", ""]
        lines += more_table(found)
    return lines


def rest_part(found: Summary) -> list[str]:
    """Return single parts, experts, controls and ideas."""
    return [
        *_introduction(found, "parts, experts, controls and ideas"),
        "",
        *parts_table(found["parts"]),
        "",
        f"![What each part gives in either recipe, with 95% intervals over worlds]({FIGURE})",
        "",
        *differences_table(found["others"]),
        "",
        *arms_table(found["arms"]),
    ]


def _introduction(found: Summary, what: str) -> list[str]:
    """Return what the figures of a part of the report are of."""
    is_test, worlds = found["part"] == "test", len(found["worlds"])
    scenes, asked = "test scenes" if is_test else "validation scenes", found["num_questions"]
    return [
        *([] if is_test else [NOT_YET.format(what=what), ""]),
        f"Accuracy on {scenes}, {asked:,} questions per world, {worlds} worlds. Differences are in "
        "points, with 95% intervals over worlds.",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def points(figures: Summary) -> str:
    """Return a difference in points with its interval."""
    mean, low, high = (figures[key] for key in ("difference", "low", "high"))
    if low is None:
        return f"{100 * mean:+.1f}"
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def claims_part(found: Summary) -> list[str]:
    """Return a line per claim; on validation scenes without p, because nothing is tested there."""
    if found["part"] == "test":
        return claims_table(found["claims"])
    return ["Nothing is tested yet.", "", *differences_table(found["claims"])]


def claims_table(claims: Sequence[Summary]) -> list[str]:
    """Return a line per test, in their order."""
    rows = [
        [
            claim["contrast"],
            points(claim),
            _signs(claim["worlds"]),
            _p(claim["p"]),
            _p(claim["p_equal"]),
            claim["outcome"],
            "yes" if claim["claimed"] else "no",
        ]
        for claim in claims
    ]
    header = ("contrast", "difference", "worlds above 0", "p", "p, equal", "outcome", "claimed")
    return _table(header, rows)


def _signs(worlds: Sequence[float]) -> str:
    return f"{sum(world > 0 for world in worlds)} of {len(worlds)}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:#.2g}"


def mixed_sentence(model: Summary) -> str:
    """Return what the mixed model of the primary contrast says."""
    if model["difference"] is None:
        return "A mixed model needs three worlds."
    text = (
        f"Mixed model of {model['contrast']} (REML, normal interval): {points(model)}; standard "
        f"deviation between worlds {100 * model['std_between_worlds']:.2f}, between pairs of a "
        f"world {100 * model['std_between_pairs']:.2f} points."
    )
    return " ".join([text, *(f"statsmodels warns: {said}" for said in model["warnings"])])


def arms_table(arms: Sequence[Summary]) -> list[str]:
    """Return a line per arm."""
    rows = []
    for arm in arms:
        mean, low, high = (arm["accuracy"][key] for key in ("mean", "low", "high"))
        interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
        rows.append(
            [
                f"`{arm['arm']}`",
                arm["what"],
                f"{arm['runs']} in {len(arm['worlds'])}",
                *(f"{arm['kinds'][kind]:.3f}" for kind in KINDS[:-1]),
                f"{mean:.3f}{interval}",
                f"{arm['seconds']:.0f}",
                f"{arm['token_std']:.2f}",
                f"{arm['token_rank']:.1f}",
            ]
        )
    header = ["arm", "what", "runs in worlds", *KINDS, "CPU seconds", "token std", "rank"]
    return _table(header, rows)


def parts_table(parts: Sequence[Summary]) -> list[str]:
    """Return a line per part: what it gives in the revised and in the official recipe."""
    rows = [
        [part, *(points(found[r]) if r in found else "-" for r in _RECIPES)]
        for part, found in _by_part(parts).items()
    ]
    return _table(("part", "in the revised recipe", "in the official one"), rows)


def _by_part(parts: Sequence[Summary]) -> dict[str, dict[str, Summary]]:
    """Return what each part gives: its name -> recipe -> contrast."""
    by_part: dict[str, dict[str, Summary]] = {}
    figures = {c["contrast"]: c for c in parts}
    for contrast in PART_CONTRASTS:
        changed = max(contrast.first, contrast.second, key=len)
        recipe, part = changed.split("_", 1)[0], changed.split("_", 2)[2]
        title = _ZERO.get((recipe, part)) or _NAMES[part]
        by_part.setdefault(title, {})[recipe] = figures[contrast.name]
    return by_part


_RECIPES = {"revised": "#1f77b4", "official": "#d62728"}
"""Recipe -> its colour."""
_NAMES = {
    "heads": "heads on the student's side",
    "grid_fixed_heads": "heads on the student's side",
    "grid_fixed": "equal shares beside the anchor's",
    "grid": "the student's grid",
    "heads_grid": "the student's grid",
    "standardised": "standardised targets",
    "blend": "blended token weights",
    "equal": "equal teachers",
    "gate": "gate",
    "balance": "balance over the batch",
    "base": "the base learns in stage 1",
    "scale": "scale 4, not 1/16",
}
_ZERO = {
    ("revised", "scale_zero"): "zero initial values, not Kaiming, at a scale of 1/16",
    ("official", "zero"): "zero initial values, not Kaiming, at a scale of 1/16",
    ("official", "scale_zero"): "zero initial values, not Kaiming, at a scale of 4",
}
"""What an arm is about, by the end of its name; where it changes two parts, the second one."""


def differences_table(contrasts: Sequence[Summary]) -> list[str]:
    """Return a line per contrast without a claim."""
    rows = [
        [c["contrast"], points(c), _signs(c["worlds"]), f"{c['pairs']} in {len(c['worlds'])}"]
        for c in contrasts
    ]
    return _table(("contrast", "difference", "worlds above 0", "pairs in worlds"), rows)


def more_table(found: Summary) -> list[str]:
    """Return differences of main arms under unseen looks and on the probe, a column each."""
    columns = {**found["unseen"], **found["probe"]}
    names = [c["contrast"] for c in next(iter(columns.values()))["contrasts"]]
    rows = [
        [name, *(points(column["contrasts"][at]) for column in columns.values())]
        for at, name in enumerate(names)
    ]
    arms = [
        [f"`{arm}`", *(f"{column['arms'][arm]['mean']:.3f}" for column in columns.values())]
        for arm in next(iter(columns.values()))["arms"]
    ]
    return [*_table(("arm", *columns), arms), "", *_table(("contrast", *columns), rows)]


def tuning_part(tried: Sequence[Row]) -> list[str]:
    """Return a line per setting that was tried, and what was kept."""
    rows = []
    for name in dict.fromkeys(row["arm"] for row in tried):
        mine = [row for row in tried if row["arm"] == name]
        shares = [row["val"]["all"][0] / row["val"]["all"][1] for row in mine]
        keys = [k.split(".", 1)[1] for k in (*mine[0]["keys"], *mine[0]["finetune"]) if "." in k]
        each = ", ".join(f"{share:.3f}" for share in shares)
        rows.append(
            [", ".join(f"`{key}`" for key in keys), each, f"{tune.mean_accuracy(mine):.4f}"]
        )
    return [
        "Validation scenes of the old worlds, one exploratory run each: no result.",
        "",
        *_table(("setting", "worlds 0, 1, 2", "mean"), rows),
    ]


def rates_part(tried: Sequence[Row]) -> list[str]:
    """Return a line per trial that was made after the answers about test scenes."""
    rows = []
    for name in dict.fromkeys(row["arm"] for row in tried):
        mine = sorted((row for row in tried if row["arm"] == name), key=lambda row: row["world"])
        shares = [row["val"]["all"][0] / row["val"]["all"][1] for row in mine]
        rates = [key for key in (*mine[0]["keys"], *mine[0]["pretrain"]) if "learning_rate" in key]
        changed = ", ".join(f"`{key}`" for key in rates) or "-"
        each = ", ".join(f"{share:.3f}" for share in shares)
        rows.append([f"`{mine[0]['base']}`", changed, each, f"{tune.mean_accuracy(mine):.4f}"])
    return [
        "Validation scenes of the old worlds, one exploratory run each: no result.",
        "",
        *_table(("arm", "changed", "worlds 0, 1, 2", "mean"), rows),
    ]


def draw_parts(found: Summary, path: Path) -> None:
    """Plot what each part gives in either recipe, a dot and an interval each."""
    by_part = _by_part(found["parts"])
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(by_part) + 1))
    for at, contrasts in enumerate(reversed(by_part.values())):
        for recipe, contrast in contrasts.items():
            mean, low, high = (contrast[key] for key in ("difference", "low", "high"))
            low, high = (mean if low is None else low), (mean if high is None else high)
            place = at + (0.14 if recipe == "revised" else -0.14)
            colour = _RECIPES[recipe]
            axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=1.5)
            axes.plot([100 * mean], [place], "o", color=colour, markersize=5)
    for recipe, colour in _RECIPES.items():
        axes.plot([], [], "o-", color=colour, label=f"in the {recipe} recipe")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False)
    axes.set_yticks(range(len(by_part)), list(reversed(by_part)), fontsize=9)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("points of accuracy that the part gives, 95% over worlds")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
