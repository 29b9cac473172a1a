"""`movekd train`: train a student against a cache."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from movekd import distributed
from movekd.cli.options import Json
from movekd.cli.output import print_json, progress_bar, quiet_libraries, say

if TYPE_CHECKING:
    from movekd.train.config import TrainConfig


def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run.")],
    cache: Annotated[
        str | None,
        typer.Option(help="Folder of the cache, or s3://bucket/prefix; needed for distillation."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/student"),
    override: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=c overrides a key of the config.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Continue from the last whole checkpoint; without one, start."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Delete what an earlier run wrote into --output.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            help="With --overwrite: delete also what no record shows to be of that run, at names "
            "that a run uses (config.yaml, model, runs, checkpoint-N, ...)."
        ),
    ] = False,
    allow_random_teachers: Annotated[
        bool, typer.Option(help="Accept features of teachers with random weights (for tests).")
    ] = False,
    verify_cache: Annotated[
        bool,
        typer.Option(
            "--verify-cache",
            help="Compare each Zarr shard with its checksum before its first row is used.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved config and stop.")] = False,
    show_samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Print this many training samples as tokens, learned ones marked, and stop."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train the student and the projector on cached features.

    On several GPUs: torchrun --nproc-per-node 8 -m movekd train ... Only rank 0 prints.

    Example: movekd train --cache cache/ --config student.yaml --output runs/pretrain
    """
    from movekd.train.config import load_config

    is_main = distributed.is_main_process()
    resolved = load_config(
        config,
        override,
        begun=_begun(output) if resume else None,
        notify=lambda line: say(f"movekd: {line}", err=True) if is_main else None,
    )
    if dry_run:
        if distributed.is_main_process() and json:
            print_json(resolved.model_dump(mode="json"))
        elif distributed.is_main_process():
            say(*resolved.to_yaml().split("\n"))
        model = resolved.student.language_model
        if all(source.shards.exists() for source in resolved.data.all_sources()):
            _say_data(resolved)
            if model is not None and Path(model).is_dir():
                # of a hub's id it would download the tokenizer
                _count_samples(resolved, says_packing=resolved.data.packing)
        return
    quiet_libraries()
    if show_samples is not None:
        _show_samples(resolved, show_samples, json)
        _say_data(resolved)
        _count_samples(resolved)
        return
    from movekd.train.checkpoints import continue_hint
    from movekd.train.run import train as run

    try:
        with progress_bar() as progress:
            summary = run(
                resolved,
                output,
                cache,
                resume=resume,
                overwrite=overwrite,
                force=force,
                allow_random_teachers=allow_random_teachers,
                verify_cache=verify_cache,
                progress=progress,
                notify=lambda line: say(f"movekd: {line}", err=True),
            )
    except KeyboardInterrupt:
        sentence = f"interrupted. {continue_hint(output)}"
        if distributed.should_print(sentence):
            say(f"movekd: {sentence}", err=True)
        raise SystemExit(130) from None
    distributed.destroy_process_group()
    if not distributed.is_main_process():
        return
    if json:
        facts = {"steps": summary.steps, "seconds": summary.seconds, "model": output / "model"}
        print_json(facts)
        return
    say(f"{summary.steps} steps in {summary.seconds:.0f} s; model in {output / 'model'}")
    say(f"curves: tensorboard --logdir {output}")


def _begun(output: Path) -> dict[str, Any] | None:
    """Return the config of the run in a folder; None if it holds none yet."""
    from movekd.student.checkpoint import CONFIG_FILE, read_run_config

    path = output / CONFIG_FILE
    return read_run_config(path) if path.exists() else None


def _show_samples(config: "TrainConfig", number: int, json: bool) -> None:
    from movekd.train.show_samples import show_samples

    shown = show_samples(config, number)
    if not distributed.is_main_process():
        return
    if json:
        print_json(shown)
        return
    for sample in shown:
        say(*sample.as_text().split("\n"), "")
    say(
        f"{len(shown)} of {shown[0].num_samples} samples. The model learns the text in [[ ]]; each "
        "image is shown as one <image>."
    )


def _say_data(config: "TrainConfig") -> None:
    """Print on standard error what a run learns from each source, and what it holds out, if any."""
    from movekd.train.held_out import describe_sources, describe_split

    if not distributed.is_main_process():
        return
    held_out = describe_split(config)
    for line in (*describe_sources(config), *([] if held_out is None else [held_out])):
        say(f"movekd: {line}", err=True)


def _count_samples(config: "TrainConfig", says_packing: bool = False) -> None:
    """Print on standard error how many samples teach nothing, and how full packed rows are."""
    from movekd.train.packed_data import describe_packing
    from movekd.train.packing_keys import require_packable
    from movekd.train.sample_count import count_samples
    from movekd.train.show_samples import open_conversations

    if config.stage == "distill" or not distributed.is_main_process():
        return
    quiet_libraries()
    if says_packing:
        require_packable(config)
    trained, held_out = open_conversations(config)
    packed: list[str] = []
    for datasets, what in ((trained, "conversations"), (held_out, "held-out conversations")):
        for dataset in datasets:
            of = f" of {dataset.corpus.data_dir}" if len(datasets) > 1 else ""
            packs = says_packing and datasets is trained
            with progress_bar() as progress:
                count = count_samples(dataset, progress=progress, needs_lengths=packs)
            count = replace(count, what=what + of)
            count.require_samples(dataset.max_length)
            say(f"movekd: {count.sentence(dataset.max_length)}", err=True)
            if packs:
                packed.append(describe_packing(config, dataset, count.lengths))
    for line in packed:
        say(f"movekd: {line}", err=True)
