"""What `movekd demo` prints at its end: tables of its figures, and what to look at next.

Input: the content of ``demo.json``. ``demo`` calls it.
"""

from pathlib import Path
from typing import Any

from movekd.cli.output import print_table

COLUMNS = ("where", "exists", "largest", "sum", "all")


def report(figures: dict[str, Any], output: Path, pipeline: Path) -> None:
    """Print the tables, and what to look at next."""
    print()
    arms = figures["arms"]
    print_table(
        "accuracy on unseen scans (exact match; interval over questions)",
        ["arm", *COLUMNS, "95% interval of all"],
        [
            [
                arm,
                *(f"{arms[arm]['accuracy'][column]['accuracy']:.3f}" for column in COLUMNS),
                "{:.3f} - {:.3f}".format(*arms[arm]["accuracy"]["all"]["interval"]),
            ]
            for arm in arms
        ],
    )
    print_table(
        f"the first {len(figures['questions'])} questions",
        ["question", "right", *arms],
        [
            [*asked, *(arms[arm]["answers"][number] for arm in arms)]
            for number, asked in enumerate(figures["questions"])
        ],
    )
    print_table(
        "collapse or learning? the KD loss must fall while the tokens keep their spread",
        ["arm", "stage", "KD loss first", "last", "token std first", "last"],
        [
            [arm, stage, *_first_last(log, "loss_kd"), *_first_last(log, "token_std")]
            for arm, result in arms.items()
            for stage, log in (("pretrain", result["pretrain"]), ("finetune", result["finetune"]))
        ],
    )
    print_table(
        f"{figures['seconds']:.0f} s in all; both arms ran at the same time",
        ["step", "seconds", "peak memory of its process so far, GiB"],
        [[s["name"], f"{s['seconds']:.1f}", f"{s['peak_gib']:.2f}"] for s in figures["steps"]],
    )
    cache, run_dir = output / "cache", output / "runs" / "with_teachers" / "finetune"
    print(
        "One seed illustrates and does not prove: another seed moves these figures by points.\n"
        f"Look at {output / 'sheets'}/*.png and {run_dir / 'report.html'}; then\n"
        f"  movekd view --cache {cache} --shards {output / 'data'} --run {run_dir}\n"
        f"  python -c \"import zarr; print(zarr.open('{cache}/clip.zarr').tree())\"\n"
        f"  movekd ask {run_dir} {output}/source/images/test_00000.png "
        '"What is the sum of the digits?"\n'
        f"  tensorboard --logdir {output / 'runs'}\n"
        f"  {pipeline / 'finetune.yaml'}"
    )


def _first_last(log: list[dict[str, float]], name: str) -> tuple[str, str]:
    values = [entry[name] for entry in log if name in entry]
    return (f"{values[0]:.3f}", f"{values[-1]:.3f}") if values else ("-", "-")
