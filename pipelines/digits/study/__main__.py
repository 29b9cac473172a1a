"""Command line of the study: ``PYTHONPATH=pipelines/digits python -m study --help``."""

import argparse
import os
from pathlib import Path

from study.plan import (
    CODEC_ARMS,
    FIRST_EXPLORATORY_SEED,
    FULL_SIZE,
    SMOKE,
    WORLDS,
    arms,
    find_arm,
)


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="study", description="The study of docs/study.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "prepare": "make the worlds: teachers, scenes, caches",
        "run": "make worlds, then every run without a row (--codecs: and its test answers)",
        "final": "answer the test questions, once",
        "report": "tables and figures of validation scenes; with --final of test scenes",
        "explore": "runs outside the plan, on validation scenes",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--work", type=Path, default=Path("runs/study"))
        command.add_argument(
            "--results", type=Path, default=None, help="default: the committed files"
        )
        command.add_argument("--jobs", type=int, default=2, help="processes at a time")
        command.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
        command.add_argument("--everything", action="store_true", help="the arms of study-full")
        command.add_argument(
            "--codecs", action="store_true", help="the comparison of codecs, with its own rows"
        )
        command.add_argument("--arms", nargs="*", default=[], help="only these arms, all seeds")
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
            command.add_argument("--worlds", nargs="*", type=int, default=[0], choices=WORLDS)
            command.add_argument("--seeds", nargs="*", type=int, default=[FIRST_EXPLORATORY_SEED])
    arguments = parser.parse_args()

    # they load torch, which --help need not
    from study import codec_report, explore, page, queue, results

    sizes = SMOKE if arguments.smoke else FULL_SIZE
    committed = results.CODEC_RESULTS if arguments.codecs else results.RESULTS
    where = arguments.results or (arguments.work / "results" if arguments.smoke else committed)
    place = queue.Place(arguments.work, where, sizes, arguments.jobs)
    named = tuple(find_arm(name) for name in arguments.arms)
    chosen = named or (CODEC_ARMS if arguments.codecs else arms(arguments.everything))
    if arguments.command == "prepare":
        queue.prepare(place, chosen)
    elif arguments.command == "run":
        if arguments.codecs:
            queue.run_and_test_all(place, chosen)
        else:
            queue.run_all(place, chosen)
            print(page.write_report(place, is_final=False))
    elif arguments.command == "final":
        queue.run_final(place, chosen)
        if not arguments.codecs:
            print("python -m study report --final writes it into docs/study.md")
    elif arguments.command == "report" and arguments.codecs:
        print(codec_report.write_report(place))
    elif arguments.command == "report":
        print(page.write_report(place, arguments.final))
    else:
        changes = (tuple(arguments.set), tuple(arguments.stage1))
        tried = explore.Trial(arguments.name, arguments.question, arguments.base, *changes)
        explore.run(place, tried, arguments.worlds, arguments.seeds)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstudy: interrupted; the same command continues with the next run.", flush=True)
        os._exit(130)  # the worker processes end with this one
