"""`make test-hostile`: kills, full disks, damages and mutations, drawn from a seed.

    python benchmarks/hostile.py --minutes 10 --seed 1
    python benchmarks/hostile.py --seed 1 --only kills:17     repeats one trial, with its details

Prints a tally and every trial that did not hold, writes results/hostile.json, and exits with 1 if
one did not hold. A trial follows from its seed, its campaign and its number; an instant of a kill
does too, but not what the process has done by then.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads of OpenMP do not survive a fork

from hostile_damages import damage_trial
from hostile_kills import can_mount, disk_trial, kill_trial
from hostile_mutations import mutation_trial
from hostile_world import World, import_everything

Trial = Callable[[World, Path, random.Random], tuple[str, str, str]]
"""Returns what was done, the verdict and the details. Verdicts: held, found, harmless, clean are
good; fault (a traceback, a hang, a wrong exit code) and silent (another result, exit 0) are not."""

CAMPAIGNS: dict[str, Trial] = {
    "kills": kill_trial,
    "damages": damage_trial,
    "mutations": mutation_trial,
    "disks": disk_trial,
}
GOOD = {"held", "found", "harmless", "clean"}


def main() -> None:
    """Run trials by turns until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--trials", type=int, help="So many trials instead of minutes.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", help="CAMPAIGN, or CAMPAIGN:NUMBER to repeat one trial.")
    parser.add_argument("--keep", action="store_true", help="Keep the folder of a repeated trial.")
    arguments = parser.parse_args()
    import_everything()
    folder = Path(tempfile.mkdtemp(prefix="movekd-hostile-"))
    try:
        world = World(folder / "world")
        world.build()
        if arguments.only and ":" in arguments.only:
            campaign, number = arguments.only.split(":")
            print(
                json.dumps(_trial(world, folder, arguments.seed, campaign, int(number)), indent=1)
            )
            if arguments.keep:
                print(folder)
            return
        campaigns = [arguments.only] if arguments.only else list(CAMPAIGNS)
        if "disks" in campaigns and not can_mount(folder / "disk"):
            campaigns.remove("disks")
            print("disks: left out, because only root may mount a small one", flush=True)
        found = list(_run(world, folder, arguments, campaigns))
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(_report(found, arguments, is_whole=not arguments.only and not arguments.trials))


def _run(
    world: World, folder: Path, arguments: argparse.Namespace, campaigns: list[str]
) -> Iterator[dict[str, object]]:
    """Run trials in some processes; yield them."""
    deadline = time.monotonic() + 60 * arguments.minutes
    children = []
    for job in range(arguments.jobs):
        log = folder / f"trials-{job}.jsonl"
        child = os.fork()
        if child == 0:
            with log.open("w", encoding="utf-8") as file:
                number = job
                while number < (arguments.trials or number + 1) and (
                    arguments.trials or time.monotonic() < deadline
                ):
                    campaign = campaigns[number % len(campaigns)]
                    found = _trial(world, folder, arguments.seed, campaign, number)
                    file.write(json.dumps(found) + "\n")
                    file.flush()
                    number += arguments.jobs
            os._exit(0)
        children.append((child, log))
    for child, log in children:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit("a process of trials ended before its time; its error is above")
        for line in log.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _trial(world: World, folder: Path, seed: int, campaign: str, number: int) -> dict[str, object]:
    """Run one trial; also check that the world is as before."""
    own = folder / f"{campaign}-{number}"
    shutil.rmtree(own, ignore_errors=True)
    before = _stamps(world.base)
    started = time.monotonic()
    what, verdict, detail = CAMPAIGNS[campaign](world, own, random.Random(f"{seed} {own.name}"))
    if _stamps(world.base) != before:
        verdict, detail = "silent", f"a file that it only reads has changed. {detail}"
    shutil.rmtree(own, ignore_errors=True)
    seconds = round(time.monotonic() - started, 2)
    found = {"campaign": campaign, "number": number, "what": what, "verdict": verdict}
    return found | {"detail": detail, "seconds": seconds}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file of the world."""
    found = {}
    for path in folder.rglob("*"):
        if "scratch" not in path.parts:
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns if path.is_file() else 0)
    return found


def _report(
    found: list[dict[str, object]], arguments: argparse.Namespace, *, is_whole: bool
) -> int:
    """Print the tally, write the figures of a whole run, and return the exit code."""
    from report import write_results

    count = Counter((str(trial["campaign"]), str(trial["verdict"])) for trial in found)

    def sum_of(campaign: str, *verdicts: str) -> int:
        return sum(n for (c, v), n in count.items() if c == campaign and v in (verdicts or {v}))

    for trial in found:
        if trial["verdict"] not in GOOD:
            print(f"{trial['campaign']}:{trial['number']} {trial['verdict']}: {trial['what']}")
            print(f"    {trial['detail']}")
    figures = {
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "kills": sum_of("kills"),
        "kills_held": sum_of("kills", "held"),
        "damages": sum_of("damages"),
        "damages_found": sum_of("damages", "found"),
        "damages_harmless": sum_of("damages", "harmless"),
        "mutations": sum_of("mutations"),
        "mutations_clean": sum_of("mutations", "clean"),
        "full_disks": sum_of("disks"),
        "full_disks_held": sum_of("disks", "held"),
        "silent_wrong": sum(n for (_, verdict), n in count.items() if verdict == "silent"),
    }
    notes = {
        "kills": "commands killed with -9 at a file operation or an instant",
        "kills_held": "run again, they gave the bytes of an undisturbed one",
        "damages": "files deleted, emptied, cut, flipped, extended, swapped or replaced",
        "damages_found": "a command said so, or mended it",
        "damages_harmless": "the results are those of the undamaged file",
        "mutations": "values of files changed as a stranger could",
        "mutations_clean": "refused in one line, or run, within 2 s and 200 MiB",
        "full_disks": "commands on a disk that is too small",
        "full_disks_held": "said so in a line; with more room they gave the right bytes",
        "silent_wrong": "another result, without a word",
    }
    if is_whole:
        write_results("hostile", figures, notes)
    else:
        print(json.dumps(figures, indent=1))
    return int(any(trial["verdict"] not in GOOD for trial in found))


if __name__ == "__main__":
    main()
