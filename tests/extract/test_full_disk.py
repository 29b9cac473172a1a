"""A disk that is full or cannot be written: a sentence, nothing half-written, and no lost work."""

import os
import subprocess

import pytest

from builds import build
from movekd.errors import CacheError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems"),
]


@pytest.fixture
def disk(tmp_path):
    """A file system of its own in memory, and a function that changes its options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)

    try:
        mount("size=64M")
    except subprocess.CalledProcessError:
        pytest.skip("this container may not mount")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", folder], check=True)


def test_full_at_any_moment_and_run_again_equals_undisturbed(
    disk, corpus_dir, tiny_specs, undisturbed, snapshot, small_shards
) -> None:
    folder, remount = disk
    refused = 0
    for kib in (*range(4, 100, 8), *range(100, 400, 40)):
        remount(f"size={kib}k")
        try:
            build(folder / "cache", corpus_dir, tiny_specs)
        except CacheError as error:
            refused += 1
            sentence = str(error)
        else:
            break
        assert "No space left on device" in sentence, sentence
        assert len(sentence) < 2_000
        assert [*folder.rglob("*.tmp")] == []
    assert refused > 5
    remount("size=64M")
    build(folder / "cache", corpus_dir, tiny_specs)
    assert snapshot(folder / "cache") == undisturbed


def test_a_disk_that_is_read_only_is_a_sentence(disk, corpus_dir, tiny_specs, snapshot) -> None:
    folder, remount = disk
    build(folder / "cache", corpus_dir, tiny_specs[:1])
    before = snapshot(folder)
    remount("ro")
    with pytest.raises(CacheError, match="Read-only file system"):
        build(folder / "cache", corpus_dir, tiny_specs)
    with pytest.raises(CacheError, match="Read-only file system"):
        build(folder / "new", corpus_dir, tiny_specs)
    assert snapshot(folder) == before
