"""Distil on eight disjoint subsets of photographs, and test over them: docs/photos.md has the plan.

    divide -> per subset: pack -> cache the teachers -> train each arm -> probe -> a row per subset

    PYTHONPATH=pipelines/digits python pipelines/photos/subsets.py run --images cifar10
    PYTHONPATH=pipelines/digits python pipelines/photos/subsets.py report

A subset is a unit: 1,250 images to distil on, 250 test images, a seed. No two share an image. The
settings are those of the pilot, frozen. Each subset is a ``Pilot`` with its folder of rows below
benchmarks/results/photographs; what has a row is not made again.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from demo_real import HERE, Steps
from movekd.errors import ConfigError
from movekd.t_interval import LEVEL
from pilot import RESULTS, Pilot
from pilot_arms import ARMS, TWO, Arm
from pilot_images import DRAWN, Sizes, class_files
from pilot_rows import PROBES
from study import results
from study.statistics import t_test
from weights import make_weights

ROWS = RESULTS.with_name("photographs")
PAGE = HERE.parents[1] / "docs" / "photos.md"
BEGIN, END = "<!-- subsets: begin -->", "<!-- subsets: end -->"
NUM_SUBSETS = 8
SIZES = Sizes(
    distilled=DRAWN["train"] // NUM_SUBSETS,
    labelled=DRAWN["train"] // NUM_SUBSETS,
    val=0,
    test=DRAWN["test"] // NUM_SUBSETS,
)


def frozen_arms() -> tuple[Arm, ...]:
    """Return the pilot's best settings for experts and for the whole tower, and a control."""
    pilot = {arm.name: arm for arm in ARMS}
    experts, whole = pilot["experts_cnn_8"], pilot["full_cnn_8"]
    shuffled = replace(whole, name="shuffled", cache="shuffled")
    return tuple(replace(arm, compared_with=()) for arm in (experts, whole, shuffled))


PRIMARY = ("experts_cnn_8", "base")
SECONDARY = (("full_cnn_8", "base"), ("full_cnn_8", "shuffled"), ("experts_cnn_8", "full_cnn_8"))
"""Tested in this order if the primary one holds, each at 5%, until one shows nothing."""
CLAIMED_PROBE = "linear patches"


def divide_subsets(images: Path, output: Path) -> list[Path]:
    """Copy the images of each subset to ``output/N/images``; return these folders.

    Every eighth image of a class belongs to a subset, so that no two subsets share one.

    Raises:
        ConfigError: a class has too few images.
    """
    folders = [output / str(number) / "images" for number in range(NUM_SUBSETS)]
    for split, count in DRAWN.items():
        for name, files in class_files(images, split, count).items():
            for number, folder in enumerate(folders):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                for file in files[number:count:NUM_SUBSETS]:
                    shutil.copyfile(file, folder / split / name / file.name)
    return folders


def run(pilots: Sequence[Pilot], arms: Sequence[Arm]) -> None:
    """Train and probe all arms of each subset; what has rows is not made again."""
    for number, pilot in enumerate(pilots):
        print(f"subset {number} of {len(pilots)}", flush=True)
        pilot.train(arms)
        pilot.final(arms)


def summarise(rows: Path) -> dict[str, Any]:
    """Return accuracies and contrasts with subsets as units.

    Only subsets in which every arm has answered count; claims need all of them.
    """
    names = ["base", *(arm.name for arm in frozen_arms())]
    units = []
    for number in range(NUM_SUBSETS):
        found = {row["arm"]: row["test"] for row in results.read(rows / str(number), "final")}
        if all(name in found for name in names):
            units.append(found)
    may_claim = len(units) == NUM_SUBSETS
    contrasts = []
    for first, second in (PRIMARY, *SECONDARY):
        entry: dict[str, Any] = {"contrast": f"{first} - {second}"}
        for probe in PROBES:
            differences = [
                u[first][probe]["accuracy"] - u[second][probe]["accuracy"] for u in units
            ]
            test = t_test(differences) if differences else None
            if test is None or test.p is None:
                continue
            values = (test.interval.mean, test.interval.low, test.interval.high)
            entry[probe] = [round(value, 6) for value in values]
            if probe == CLAIMED_PROBE:
                entry["p"] = float(f"{test.p:.4g}")
                may_claim = may_claim and test.p < 1 - LEVEL
        contrasts.append(entry | {"claimed": may_claim})
    arms = {
        name: {probe: _mean([u[name][probe]["accuracy"] for u in units]) for probe in PROBES}
        for name in names
        if units
    }
    return {"unit": "subset", "subsets": len(units), "arms": arms, "contrasts": contrasts}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


def tables(found: dict[str, Any]) -> list[str]:
    """Return the summary as Markdown."""
    if found["subsets"] < 2:
        return ["No result yet: two subsets or more need all their rows."]
    header = ["kNN [CLS]", "kNN patches", "linear [CLS]", "linear patches"]
    lines = [f"Means over {found['subsets']} of {NUM_SUBSETS} subsets:", ""]
    lines += [_line(["arm", *header]), _line(["---"] * 5)]
    for name, scores in found["arms"].items():
        lines.append(_line([f"`{name}`", *(f"{scores[probe]:.3f}" for probe in PROBES)]))
    lines += [
        "",
        "Differences in points, with 95% intervals over subsets; p is of linear patches:",
        "",
    ]
    lines += [_line(["contrast", *header, "p", "claimed"]), _line(["---"] * 7)]
    for contrast in found["contrasts"]:
        cells = [_points(contrast[probe]) for probe in PROBES]
        claimed = "yes" if contrast["claimed"] else "no"
        lines.append(_line([contrast["contrast"], *cells, f"{contrast['p']:#.2g}", claimed]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _points(values: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def write_page(found: dict[str, Any], page: Path = PAGE) -> None:
    """Write the tables between their marks."""
    text = page.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    lines = "\n".join(tables(found))
    page.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{after}", encoding="utf-8")


def main() -> None:
    """Parse the command line; run what has no row yet, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--images", type=Path, help="Folder: train/ and test/.")
    parser.add_argument("--output", type=Path, default=Path("photographs"), help="Folder to write.")
    parser.add_argument("--weights", type=Path, default=Path("demo-real/weights"))
    parser.add_argument("--results", type=Path, default=ROWS, help="Folder of the rows.")
    given = parser.parse_args()
    if given.command == "report":
        found = summarise(given.results)
        (given.results / "report.json").write_text(json.dumps(found, indent=1) + "\n")
        write_page(found)
        print(PAGE)
        return
    if given.images is None:
        raise ConfigError("run needs the photographs; give their folder with --images.")
    output, weights = given.output.resolve(), given.weights.resolve()
    make_weights(weights, TWO)
    folders = divide_subsets(given.images.resolve(), output)
    pilots = [
        Pilot(
            Steps(folder.parent, asdict(SIZES) | {"seed": number}),
            folder.parent,
            folder,
            weights,
            given.results.resolve() / str(number),
            sizes=SIZES,
            seed=number,
        )
        for number, folder in enumerate(folders)
    ]
    run(pilots, frozen_arms())


if __name__ == "__main__":
    from movekd.cli.failures import run_guarded

    run_guarded(main)
