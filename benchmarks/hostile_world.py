"""A small world to attack: corpora, a cache, a run with checkpoints, exports. And commands in it.

Everything is made by movekd's own commands from scenes of real handwriting. A command runs in a
fork of a process that has imported everything, so that a trial takes a second and not five; its
output, memory, time and the files that it touches are recorded.
"""

import hashlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ROOT / "pipelines" / "digits"
WEIGHTS = PIPELINE / "weights"
TIMEOUT_S = 90.0
"""A command that takes longer hangs: the longest takes 4 s."""
MAX_MORE_BYTES = 4 * 2**30
"""Address space that a command may take; a file without an end would take the machine's."""
TEACHERS = ("clip", "sam")
_AT = {"os.remove", "os.rmdir"}  # with the descriptor of their folder
_WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link"}


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        code: its exit code; negative: the signal that ended it; -999: it hung and was killed.
        output: standard output and errors, in the order of their bytes.
        errors: standard errors.
        seconds: time.
        peak_mib: most memory of the process in MiB, what it was forked with included.
        num_operations: file operations that Python announced.
        outside: files outside of the allowed folders that it opened for writing.
    """

    code: int
    output: str
    errors: str
    seconds: float
    peak_mib: float
    num_operations: int
    outside: tuple[str, ...]

    @property
    def last_line(self) -> str:
        """The last line that it printed to standard errors."""
        return (self.errors.strip().splitlines() or [""])[-1]


class World:
    """Folders below ``base``: what all trials start from. Nothing below it ever changes.

    Attributes:
        base: the folder.
    """

    def __init__(self, base: Path) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Path:
        return self.base / name

    def build(self) -> None:
        """Make everything; a few seconds."""
        self.base.mkdir(parents=True)
        scratch = self.base / "scratch"

        def run(*words: object) -> None:
            done = command(words, scratch)
            if done.code:
                raise SystemExit(
                    f"{' '.join(map(str, words))}\nended with {done.code}:\n{done.output}"
                )

        in_fork(lambda: _write_scenes(self.base / "source"), scratch)
        source = self.base / "source"
        for part in ("small", "large"):
            run(*pack_words(source, self.base / part, [f"{part}.json"]))
        _as_webdataset(source / "images", self.base / "tars")
        run(*build_words(self.base / "small", self.base / "cache"))
        run(*train_words(self.base, self.base / "run", steps=6))
        hf = ("--format", "hf", "--output", self.base / "hf")
        run("export", self.base / "run", *hf, "--no-check")
        released = ("--set", "recipe=official", "--set", "distill=null")
        run(*train_words(self.base, self.base / "run_official", *released, steps=2))
        official = ("--format", "official", "--output", self.base / "official")
        run("export", self.base / "run_official", *official, "--no-check")


def pack_words(source: Path, output: Path, files: Sequence[str]) -> list[object]:
    """Return the command that packs LLaVA files in small shards."""
    named = [word for file in files for word in ("--llava-json", source / file)]
    return ["shards", "pack", *named, "--images", source / "images", "--output", output]


def build_words(data: Path, cache: Path, *more: object) -> list[object]:
    """Return the command that builds two small real teachers."""
    teachers = [
        word for t in TEACHERS for word in ("--teacher", PIPELINE / "teachers" / f"{t}.yaml")
    ]
    fixed = ("--batch-size", 8, "--num-workers", 0, "--device", "cpu")
    return ["cache", "build", *teachers, "--shards", data, "--cache", cache, *fixed, *more]


def train_words(base: Path, output: Path, *more: object, steps: int = 6) -> list[object]:
    """Return the command of a run with a checkpoint every second step."""
    changes = [
        f"data.shards={base / 'small'}",
        f"data.conversations=[{base / 'source' / 'small.json'}]",
        f"distill.teachers=[{', '.join(TEACHERS)}]",
        "student.mole.r=4",
        "training.per_device_train_batch_size=4",
        f"training.max_steps={steps}",
        "training.logging_steps=1",
        "training.report_to=none",
        "training.use_cpu=true",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.save_total_limit=2",
    ]
    sets = [word for change in changes for word in ("--set", change)]
    config = ("--config", PIPELINE / "pretrain.yaml", "--cache", base / "cache")
    return ["train", *config, "--output", output, *sets, *more]


def command(
    words: Sequence[object],
    scratch: Path,
    *,
    allowed: Sequence[Path] = (),
    kill_at: int = 0,
    kill_after_s: float | None = None,
) -> Outcome:
    """Run a `movekd` command in a fork.

    Args:
        words: the command, without "movekd".
        scratch: folder for its output and temporary files.
        allowed: folders that it may write to, besides ``scratch``.
        kill_at: kill it with -9 at this file operation below ``allowed``; 0: never.
        kill_after_s: kill it with -9 after so long.
    """

    def work() -> None:
        from movekd.cli.main import main

        sys.argv = ["movekd", *map(str, words)]
        main()

    return in_fork(work, scratch, allowed=allowed, kill_at=kill_at, kill_after_s=kill_after_s)


def in_fork(
    work: Callable[[], None],
    scratch: Path,
    *,
    allowed: Sequence[Path] = (),
    kill_at: int = 0,
    kill_after_s: float | None = None,
) -> Outcome:
    """Run ``work`` in a fork and record what it does; the arguments are those of ``command``."""
    scratch.mkdir(parents=True, exist_ok=True)
    paths = [scratch / name for name in ("stdout", "stderr", "record")]
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _become(work, scratch, paths, [*allowed, scratch], kill_at)
    watched = os.pidfd_open(child)
    limit = TIMEOUT_S if kill_after_s is None else kill_after_s
    is_done = bool(select.select([watched], [], [], limit)[0])
    os.close(watched)
    if not is_done:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    if is_done:
        _end_group(child)
    code = os.waitstatus_to_exitcode(status)
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in paths[:2])
    lines = paths[2].read_text(encoding="utf-8", errors="replace").splitlines()
    return Outcome(
        code if is_done or kill_after_s is not None else -999,
        out + err,
        err,
        seconds,
        usage.ru_maxrss / 1024,
        sum(line == "." for line in lines),
        tuple(line for line in lines if line != "."),
    )


def _become(
    work: Callable[[], None],
    scratch: Path,
    paths: Sequence[Path],
    allowed: Sequence[Path],
    kill_at: int,
) -> None:
    """Be the child: redirect, watch, work, end."""
    code = 70
    try:
        os.setpgid(0, 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        out, err, record = (os.open(path, flags, 0o600) for path in paths)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ["TMPDIR"] = str(scratch)
        os.environ["HF_HUB_OFFLINE"] = "1"
        import tempfile

        tempfile.tempdir = str(scratch)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MAX_MORE_BYTES,) * 2)
        sys.addaudithook(_Watch(allowed, record, kill_at))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Watch:
    """An audit hook: counts file operations, kills at one of them, notes writes elsewhere."""

    def __init__(self, allowed: Sequence[Path], record: int, kill_at: int) -> None:
        self._allowed = tuple(f"{path}/" for path in allowed) + tuple(map(str, allowed))
        self._record, self._kill_at, self._seen = record, kill_at, 0

    def __call__(self, name: str, arguments: tuple[object, ...]) -> None:
        if name == "open":
            path, _mode, flags = arguments
            is_write = isinstance(flags, int) and bool(
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
        elif name in _WRITES:
            path, is_write = arguments[0], True
        else:
            return
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return
        fd = next((fd for fd in arguments[1:] if name in _AT and isinstance(fd, int)), -1)
        where = os.path.abspath(path if fd < 0 else f"{os.readlink(f'/proc/self/fd/{fd}')}/{path}")
        if where.startswith(self._allowed[:-1]):
            self._seen += 1
            os.write(self._record, b".\n")
            if self._seen == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        elif is_write and not where.startswith(("/dev/", "/proc/", "/sys/")):
            os.write(self._record, f"{name} {where}\n".encode(errors="replace"))


def _end_group(leader: int) -> None:
    """Kill processes that a killed command left behind: decoding processes."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder; links and special files as what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "special"
    return found


def import_everything() -> None:
    """Import what the commands import, once, before the forks. Starts no thread."""
    import importlib

    sys.path.insert(0, str(PIPELINE))
    for name in _MODULES:
        importlib.import_module(name)


_MODULES = (
    "torch",
    "transformers",
    "transformers.models.auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.sam.modeling_sam",
    "transformers.trainer",
    "tensorstore",
    "pyarrow.parquet",
    "movekd.cli.main",
    "movekd.corpus",
    "movekd.extract.run",
    "movekd.train.run",
    "movekd.student.export.formats",
    "movekd.student.official.import_checkpoint",
    "movekd.evaluate.generate",
    "movekd.view.report",
    "movekd.teachers.providers",
    "movekd.analysis.verify_features",
    "scenes",
)


def _write_scenes(folder: Path) -> None:
    import scenes

    scenes.write_corpus(folder, num_pretrain=40, num_finetune=1, num_val=1, num_test=6, seed=3)
    entries = json.loads((folder / "pretrain.json").read_text())
    (folder / "small.json").write_text(json.dumps(entries[:24]))
    (folder / "large.json").write_text(json.dumps(entries))


def _as_webdataset(images: Path, folder: Path) -> None:
    """Write two tars of images, each with a caption beside."""
    import io
    import tarfile

    folder.mkdir()
    paths = sorted(images.iterdir())[:12]
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in paths[number::2]:
                for name, data in (
                    (path.name, path.read_bytes()),
                    (f"{path.stem}.txt", f"caption of {path.stem}".encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def spec_file(folder: Path, name: str) -> Path:
    """Return a copy of a teacher's spec whose weights are named by an absolute path."""
    content = yaml.safe_load((PIPELINE / "teachers" / f"{name}.yaml").read_text())
    content["weights"] = str(WEIGHTS / name)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def copy(source: Path, target: Path) -> Path:
    """Copy a folder, links as links; return the copy."""
    shutil.copytree(source, target, symlinks=True)
    return target
