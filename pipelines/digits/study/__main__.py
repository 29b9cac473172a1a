"""Command line of the study: ``PYTHONPATH=pipelines/digits python -m study --help``."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from study import plan_twelve
from study.plan import (
    CODEC_ARMS,
    FIRST_EXPLORATORY_SEED,
    FULL_SIZE,
    SMOKE,
    Arm,
    arms,
    find_arm,
)

HELPS = {
    "prepare": "make the worlds: teachers, scenes, caches",
    "run": "make worlds, then every run without a row; codecs and twelve answer the test at once",
    "final": "answer the test questions, once (study first)",
    "report": "tables and figures of validation scenes; with --final of test scenes",
    "explore": "runs outside the plan, on validation scenes",
    "tune": "tune the official recipe as the plan of twelve worlds says",
}


def main() -> None:
    """Parse the command line and run the command."""
    arguments = _parser().parse_args()

    # they load torch, which --help need not
    from study import (
        codec_report,
        explore,
        page,
        queue,
        results,
        summary,
        tune,
        twelve_page,
        twelve_report,
    )

    committed = {
        "first": results.RESULTS,
        "codecs": results.CODEC_RESULTS,
        "twelve": results.TWELVE_RESULTS,
    }
    sizes = SMOKE if arguments.smoke else FULL_SIZE
    study = "twelve" if arguments.command == "tune" else arguments.study
    smoke = arguments.work / "results"
    where = arguments.results or (smoke if arguments.smoke else committed[study])
    place = queue.Place(arguments.work, where, sizes, arguments.jobs)
    chosen = _chosen(arguments)
    if arguments.command == "prepare":
        queue.prepare(place, chosen)
    elif arguments.command == "run" and study == "first":
        queue.run_all(place, chosen)
        print(page.write_report(place, is_final=False))
    elif arguments.command == "run":
        for part in _main_first(chosen):
            queue.run_and_test_all(place, part)
    elif arguments.command == "final":
        queue.run_final(place, chosen)
        print("python -m study report --final writes it into docs/study.md")
    elif arguments.command == "report" and study == "codecs":
        print(codec_report.write_report(place))
    elif arguments.command == "report" and study == "twelve":
        found = twelve_report.summarise(place.results)
        summary.write(found, place.results)
        print(twelve_page.write_page(found, place.results))
    elif arguments.command == "report":
        print(page.write_report(place, arguments.final))
    elif arguments.command == "tune":
        tune.tune(place)
        if not arguments.smoke:
            print(twelve_page.write_page(summary.read(place.results), place.results))
    else:
        base = find_arm(arguments.base, _arms(arguments))
        changes = (tuple(arguments.set), tuple(arguments.stage1), tuple(arguments.stage2))
        tried = explore.Trial(arguments.name, arguments.question, base, *changes)
        explore.run(place, tried, arguments.worlds or [0], arguments.seeds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study", description="The studies of docs/study.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in HELPS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--work", type=Path, default=Path("runs/study"))
        command.add_argument(
            "--results", type=Path, default=None, help="default: the committed files"
        )
        command.add_argument("--jobs", type=int, default=2, help="processes at a time")
        command.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
        command.add_argument(
            "--study",
            choices=["first", "codecs", "twelve"],
            default="first",
            help="three worlds, the comparison of codecs, or twelve worlds",
        )
        command.add_argument("--everything", action="store_true", help="the arms of study-full")
        command.add_argument("--arms", nargs="*", default=[], help="only these arms, all seeds")
        command.add_argument("--worlds", nargs="*", type=int, default=[], help="only these worlds")
        if name == "report":
            command.add_argument("--final", action="store_true")
        if name == "explore":
            command.add_argument("name", help="name of the trial")
            command.add_argument(
                "--question", required=True, help="question that the trial answers"
            )
            command.add_argument("--base", default="revised_mole", help="arm to change")
            command.add_argument("--set", nargs="*", default=[], help="a.b=c, both stages")
            command.add_argument("--stage1", nargs="*", default=[], help="a.b=c, only stage 1")
            command.add_argument("--stage2", nargs="*", default=[], help="a.b=c, only stage 2")
            command.add_argument("--seeds", nargs="*", type=int, default=[FIRST_EXPLORATORY_SEED])
    return parser


def _arms(arguments: argparse.Namespace, *, is_everything: bool = True) -> tuple[Arm, ...]:
    """Return the arms of the study that the command names."""
    if arguments.study == "first":
        return arms(is_everything)
    return CODEC_ARMS if arguments.study == "codecs" else plan_twelve.ARMS


def _chosen(arguments: argparse.Namespace) -> tuple[Arm, ...]:
    """Return the arms to run, each with the worlds to run it in."""
    known = _arms(arguments)
    named = tuple(find_arm(name, known) for name in arguments.arms)
    chosen = named or _arms(arguments, is_everything=arguments.everything)
    if not arguments.worlds:
        return chosen
    worlds = set(arguments.worlds)
    kept = tuple(replace(a, worlds=tuple(w for w in a.worlds if w in worlds)) for a in chosen)
    return tuple(arm for arm in kept if arm.worlds)


def _main_first(chosen: tuple[Arm, ...]) -> list[tuple[Arm, ...]]:
    """Return the main arms, which suffice for the claims, and the others, each if it has arms."""
    parts = (tuple(arm for arm in chosen if arm.is_main is is_main) for is_main in (True, False))
    return [part for part in parts if part]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstudy: interrupted; the same command continues with the next run.", flush=True)
        os._exit(130)  # the worker processes end with this one
