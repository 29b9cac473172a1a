"""`movekd shards`: pack images and conversations into tar shards, and list them."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from movekd.cli.aliases import Command
from movekd.cli.options import Json
from movekd.cli.output import print_json, progress_bar, say, size
from movekd.errors import ConfigError, shorten

if TYPE_CHECKING:
    from movekd.corpus.report import PackReport

app = typer.Typer(
    help="Pack images and conversations into tar shards, and list them.", no_args_is_help=True
)

_NUM_EXAMPLES = 3


@app.command(cls=Command)
def pack(
    llava_json: Annotated[
        list[Path] | None,
        typer.Option("--llava-json", help="LLaVA conversations, .json or .jsonl. Repeat for more."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images. Without --llava-json, all of them are packed."),
    ] = None,
    parquet: Annotated[
        list[str] | None,
        typer.Option(
            "--parquet",
            help="Parquet files of images and conversations: a file, a folder, or a glob in "
            "quotation marks. Repeat for more.",
        ),
    ] = None,
    webdataset: Annotated[
        Path | None,
        typer.Option(help="Folder of tars to index where they are, instead of packing."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Corpus folder to write.", show_default="data/")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace another corpus that movekd packed."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="With --overwrite: also replace what is not provably of movekd: files that were "
            "changed or stand in the way, and a corpus packed before it kept a list of its files.",
        ),
    ] = False,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode.", show_default="cores, up to 8")
    ] = None,
    max_shard_mib: Annotated[int, typer.Option(min=1, help="Maximum size of a tar in MiB.")] = 512,
    as_json: Json = False,
) -> None:
    """Pack images into tar shards, without duplicates, and index them.

    Exit code 0: nothing was dropped. 1: done, but entries, rows, files or members of tars were
    dropped; report.json lists them.

    Examples:

    movekd shards pack --llava-json conversations.json --images images/ --output data/

    movekd shards pack --parquet LLaVA-OneVision-Data/ --output data/

    movekd shards pack --webdataset tars/
    """
    num_sources = sum(source is not None for source in (images, parquet or None, webdataset))
    if num_sources != 1 or (llava_json and not images) or (webdataset and output):
        raise ConfigError(
            "pack needs one source; expected --images DIR (with --llava-json FILE for "
            "conversations, and --output DIR), --parquet FILES (with --output DIR), or only "
            "--webdataset DIR."
        )
    from movekd import corpus as packer

    target = webdataset or output or Path("data")
    label = "index tars" if webdataset else "pack rows" if parquet else "pack images"
    with progress_bar() as show:
        given: dict[str, Any] = {
            "num_workers": num_workers or packer.DEFAULT_WORKERS,
            "overwrite": overwrite,
            "force": force,
            "progress": partial(show, label),
        }
        if webdataset is None:
            given["max_shard_bytes"] = max_shard_mib * 2**20
        if webdataset is not None:
            report = packer.index_webdataset(webdataset, **given)
        elif parquet:
            report = packer.pack_parquet(parquet, target, **given)
        elif images is not None:
            if llava_json:
                report = packer.pack_llava(llava_json, images, target, **given)
            else:
                report = packer.pack_folder(images, target, **given)
    if as_json:
        print_json({"out": target, **report.counts}, indent=None)
    else:
        _print_report(report, target)
    if report.num_dropped:
        raise typer.Exit(1)


@app.command("ls", cls=Command)
def list_shards(
    data_dir: Annotated[Path, typer.Argument(help="Corpus folder.", metavar="DIR")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare the tables with the checksums of the pack, and the SHA-256 of all "
            "images with their keys; exit 1 if some differ.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List a corpus folder: images, shards, sizes, conversations, fingerprint.

    Examples:

    movekd shards ls data/

    movekd shards ls data/ --verify
    """
    import pyarrow.compute as pc

    from movekd.corpus.conversations import iter_conversations
    from movekd.corpus.index import open_corpus
    from movekd.corpus.record import require_as_packed

    corpus = open_corpus(data_dir)
    if verify:
        require_as_packed(data_dir)
    width, height = (pc.min_max(corpus.index[side]).as_py() for side in ("width", "height"))
    figures: dict[str, Any] = {
        "shards": len(corpus.shards),
        "shard_bytes": sum((data_dir / shard).stat().st_size for shard in corpus.shards),
        "images": len(corpus),
        "image_bytes": pc.sum(corpus.index["size"]).as_py() or 0,
        "width": [width["min"], width["max"]],
        "height": [height["min"], height["max"]],
        "names": len(corpus.names),
        "conversations": 0,
        "text_only": 0,
        "fingerprint": corpus.fingerprint(),
    }
    if corpus.conversations_path is not None:
        for conversation in iter_conversations(corpus.conversations_path):
            figures["conversations"] += 1
            figures["text_only"] += not conversation.images
    wrong = []
    if verify:
        with progress_bar() as show:
            wrong = list(corpus.verify(partial(show, "verify images")))
        figures["wrong"] = wrong
    if as_json:
        print_json(figures, indent=None)
        if wrong:
            raise typer.Exit(1)
        return
    say(
        f"{data_dir}: {figures['images']:,} images ({size(figures['image_bytes'])}) in "
        f"{figures['shards']:,} shards ({size(figures['shard_bytes'])})",
        f"  width {width['min']} to {width['max']}, height {height['min']} to {height['max']}",
        f"  {figures['names']:,} names",
        f"  {figures['conversations']:,} conversations, {figures['text_only']:,} of them text only",
        f"  fingerprint {figures['fingerprint'][:16]}",
    )
    for sentence in wrong:
        say(f"  {sentence}")
    if verify:
        say(f"  {len(wrong):,} of {len(corpus):,} images differ from their keys")
    if wrong:
        raise typer.Exit(1)


def _print_report(report: "PackReport", target: Path) -> None:
    """Print the counts, and the first entries of each list."""
    say(
        f"{target}: {report.num_images:,} images ({size(report.size_bytes)}) in "
        f"{report.num_shards:,} shards, {report.num_names:,} names",
        f"  {report.num_kept:,} of {report.num_entries:,} conversations kept, "
        f"{report.num_text_only:,} of them text only",
    )
    for unit, sums in report.sums.items():
        if unit != "entries":
            say(f"  {sums.get('kept', 0):,} of {sums['found']:,} {unit} kept")
    for kind, problems in report.problems.items():
        say(f"  {kind.replace('_', ' ')}: {len(problems):,}")
        for identity, reason in problems[:_NUM_EXAMPLES]:
            say(f"    {shorten(identity)}: {shorten(reason, 400)}")
        if len(problems) > _NUM_EXAMPLES:
            say(f"    ... all of them in {target / 'report.json'}")
    if report.num_dropped:
        say(f"  {report.num_dropped:,} dropped; see {target / 'report.json'}")
