"""Tests of movekd.student.tensor_files: what is read, and what is refused without being run."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from movekd.errors import WeightsError
from movekd.student.tensor_files import (
    TensorFiles,
    open_checkpoint,
    read_bin,
    write_bin,
    write_shards,
)


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def tensors():
    return {
        "a": torch.randn(3, 4),
        "b.weight": torch.randn(8).to(torch.bfloat16),
        "c": torch.arange(6).view(2, 3),
        "d": torch.randn(2, 2).half(),
    }


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard_bytes", [10**9, 60, 1])
def test_shards_come_back_with_headers_that_tell_shapes(tmp_path, tensors, shard_bytes):
    write_shards(tmp_path, tensors, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)
    found = open_checkpoint(tmp_path)
    assert_equal(found, tensors)
    for name, tensor in tensors.items():
        assert found.shape(name) == tuple(tensor.shape)
        assert found.dtype(name) == tensor.dtype


def test_values_are_read_when_it_is_their_turn(tmp_path, tensors):
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    write_shards(tmp_path, empty, tensors.__getitem__, shard_bytes=60)
    assert_equal(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize("is_zip", [True, False])
def test_bin_files_come_back_whatever_pytorch_wrote_them(tmp_path, tensors, is_zip):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    assert_equal(read_bin(path), tensors)
    found = open_checkpoint(tmp_path)
    assert found.shape("c") == (2, 3)
    assert found.dtype("d") == torch.float16


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    write_bin(tmp_path / "one.bin", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "one.bin").stat().st_size < 20_000
    assert read_bin(tmp_path / "one.bin")["row"].shape == (1000,)


def test_shards_of_bin_files_are_found_through_their_index(tmp_path, tensors):
    names = sorted(tensors)
    torch.save({n: tensors[n] for n in names[:2]}, tmp_path / "one.bin")
    torch.save({n: tensors[n] for n in names[2:]}, tmp_path / "two.bin")
    weight_map = {n: "one.bin" if n in names[:2] else "two.bin" for n in names}
    index = {"weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_equal(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_malicious_pickle_is_a_sentence_and_is_not_run(tmp_path, is_zip):
    path, trap = tmp_path / "mm_projector.bin", tmp_path / "was_run"
    torch.save({"a": Malicious(trap)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(WeightsError, match=r"nothing in it was run.*ask for safetensors") as caught:
        read_bin(path)
    assert "weights_only" not in str(caught.value)
    path.write_bytes(pickle.dumps(Malicious(trap)))  # no file of torch at all
    with pytest.raises(WeightsError, match=r"mm_projector\.bin"):
        read_bin(path)
    assert not trap.exists()


def test_a_program_of_torchscript_is_refused_without_the_advice_to_run_it(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:  # what tells torch that a file is one
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(WeightsError, match="nothing in it was run") as caught:
        read_bin(path)
    assert "weights_only" not in str(caught.value)


def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path):
    path = tmp_path / "odd.bin"
    for content in ([torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(2)):
        torch.save(content, path)
        with pytest.raises(WeightsError, match="expected tensors by name"):
            read_bin(path)


def test_damaged_and_missing_files_are_sentences(tmp_path):
    for name in ("model.safetensors", "model.bin"):
        path = tmp_path / name
        with pytest.raises(WeightsError, match="does not exist"):
            TensorFiles({path: None})
        for content in (b"", b"\xff" * 64):
            path.write_bytes(content)
            with pytest.raises(WeightsError, match=r"cannot be read|tensors or is damaged"):
                TensorFiles({path: None})
    with pytest.raises(WeightsError, match="holds no weights; expected one of"):
        open_checkpoint(tmp_path / "nowhere")


def test_an_index_cannot_lead_out_of_its_folder_or_promise_what_is_not_there(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for file in ("../x.safetensors", "/x.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(WeightsError, match="expected the name of a file beside it"):
            open_checkpoint(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "x.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(WeightsError, match=r"lacks 1 tensors that its index promises \(a\)"):
        open_checkpoint(tmp_path)
    for content in ("[]", "{}", "nonsense"):
        index.write_text(content)
        with pytest.raises(WeightsError, match=r"index\.json"):
            open_checkpoint(tmp_path)
