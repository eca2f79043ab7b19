"""Safetensors files: read and written tensor by tensor, with errors that say what is wrong with a file."""

from __future__ import annotations

import errno
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rflow_jax.errors import InputError
from rflow_jax.utils.file_kinds import require_true_files
from rflow_jax.utils.json_files import read_object
from rflow_jax.weights import reduced_precision
from rflow_jax.weights.pytorch_files import open_pickle
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import PARTIAL, atomic_output, need_space, save_tensors, write_safetensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.asarray(3.5, np.float16),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "one.safetensors", {"made": "here"})
    return tmp_path / "one.safetensors"


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        np.testing.assert_array_equal(got[key], value)


def read_all(path):
    return dict(TensorFiles.open(path).stream())


def test_reads_what_safetensors_wrote(file):
    files = TensorFiles.open(file)
    assert files.metadata == {"made": "here"}
    assert files.shapes == {"a": (2, 3), "b": (5,), "c": ()}
    assert files.nbytes == 24 + 10 + 2
    assert_equal(read_all(file), TENSORS)


def test_the_stream_keeps_the_order_asked_for(file):
    files = TensorFiles.open(file)
    assert [key for key, _ in files.stream(["c", "a"], threads=2, ahead=1)] == ["c", "a"]


ARRAYS = st.dictionaries(
    # Not under the names by which other kinds of few bits are known, and refused.
    st.text(min_size=1, max_size=8).filter(
        lambda key: key != "__metadata__" and key.rpartition(".")[2] not in reduced_precision._REFUSED
    ),
    st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, max_dims=3, max_side=3),
            elements=hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False),
        )
    ),
    max_size=4,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARRAYS, st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_what_is_written_is_read_back(tmp_path, tensors, metadata):
    path = tmp_path / "file.safetensors"
    save_tensors(path, tensors, metadata)
    files = TensorFiles.open(path)
    assert files.metadata == metadata
    assert_equal(dict(files.stream()), tensors)
    assert_equal(load_file(path), tensors)


def test_the_writer_wants_what_it_was_promised(tmp_path):
    infos = {"a": (np.dtype(np.float32), (2,))}
    with pytest.raises(ValueError, match="came instead of a"):
        write_safetensors(tmp_path / "x", infos, [("a", np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match="a never came"):
        write_safetensors(tmp_path / "x", infos, [])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:40],
        lambda data: b"",
        lambda data: b"\xff" * 4 + data,
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: struct.pack("<Q", 2**40) + data[8:],
        lambda data: data.replace(b'"F16"', b"[16] "),
        lambda data: data.replace(b"[2,3]", b"[3,3]"),
        lambda data: data.replace(b"[2,3]", b"[-2,-3]").replace(b"  ", b"", 1),
        lambda data: data.replace(b"[24,34]", b"[14,24]"),  # two tensors in one place
        lambda data: data.replace(b'"here"', b"999999"),
        lambda data: data[:8] + b"[" * 10_000 + data[8:],
    ],
)
def test_damaged_files(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"not a safetensors file, or cut short \(.*\); copy or download") as error:
        TensorFiles.open(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def header_file(folder, header, nbytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * nbytes)
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("header", "nbytes", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "a and b overlap"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "a and b overlap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "between a and b is a gap"),
        ({"a": entry(8, 16)}, 16, "between the header and a is a gap"),
        ({"a": entry(-8, 0)}, 8, r"a has the range \[-8, 0\]"),
        ({"a": entry(8, 0)}, 8, r"a has the range \[8, 0\]"),
        ({"a": entry(0, 8.0)}, 8, r"a has the range \[0, 8\.0\]"),
        ({"a": entry(0, True)}, 8, r"a has the range \[0, True\]"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, "b ends at byte 16 of 12"),
        ({"a": entry(0, 8)}, 12, "4 bytes after a belong to no tensor"),
        ({"a": entry(0, 8, [3])}, 8, r"a has 8 bytes, but F32 \[3\] takes 12"),
        ({"a": entry(0, 8, [-2])}, 8, r"a has the shape \[-2\]"),
        ({"a": entry(0, 8, [2**64, 2**64])}, 8, "a has the shape"),
        ({"a": entry(0, 8, [1] * 65)}, 8, "a has the shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a has the range None"),
        ({"a": 3}, 8, "a has no dtype"),
        ({"a" * 3000: entry(0, 8)}, 8, "a name of 3000 letters"),
        ({"a": entry(0, 8), "__metadata__": {"x": 1}}, 8, "__metadata__ is not an object of texts"),
        (
            f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(0, 8))}}}'.encode(),
            8,
            "a stands in the header twice",
        ),
        (b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', 8, "shape stands in"),
        (b'{"a\\u001b[2J": 3}', 8, r"a\?\[2J has no dtype"),
        (b"[" + b"1" * 9 + b"]", 0, "no header"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 0, "a header that does not parse"),
    ],
)
def test_what_the_format_forbids(tmp_path, header, nbytes, message):
    with pytest.raises(InputError, match=rf"x\.safetensors: not a safetensors file, or cut short \({message}") as error:
        TensorFiles.open(header_file(tmp_path, header, nbytes))
    assert len(str(error.value)) < 600


def test_a_header_longer_than_the_format_allows(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(100_000_100)
    with pytest.raises(InputError, match=r"a header of 100000001 bytes in .*; the format allows 100000000"):
        TensorFiles.open(path)


NUMBERS = st.integers(-1, 9) | st.sampled_from([2.0, None, 2**63, "4"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F16"]),
        "shape": st.lists(st.integers(0, 3), max_size=2) | st.lists(NUMBERS, max_size=2),
        "data_offsets": st.tuples(st.sampled_from([0, 4, 8]), st.sampled_from([0, 4, 8]))
        | st.lists(NUMBERS, max_size=3),
    }
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from("abc"), ENTRIES, max_size=3), st.sampled_from([0, 4, 8]))
def test_what_the_library_refuses_is_refused(tmp_path, header, nbytes):
    path = header_file(tmp_path, header, nbytes)
    try:
        want = load_file(path)
    except (SafetensorError, ValueError):
        with pytest.raises(InputError):
            TensorFiles.open(path)
    else:
        assert_equal(read_all(path), want)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"<!DOCTYPE html><html><head></head></html>", "a web page"),
        (b"\n<html lang='en'>", "a web page"),
        (b"PK\x03\x04" + b"\0" * 600, "a PyTorch pickle under this name; take a safetensors file"),
        (b"\x80\x02}q\x00X\x03\0\0\0abc", "a PyTorch pickle"),
        (b"GGUF\x03\0\0\0" + b"\0" * 50, "a GGUF file"),
        (b"\0" * 1000, "nothing but zeros"),
        (b"Entry not found", "a text that begins with 'Entry not found'"),
        (b'{"error": "Repository not found"}', "a text that begins with"),
    ],
)
def test_other_files_under_this_name(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.safetensors: not a safetensors file, but {message}") as error:
        TensorFiles.open(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0x280, 0x04034B50 % 2**16])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, length):
    text = json.dumps({"a": entry(0, 8)}).encode().ljust(length)
    assert TensorFiles.open(header_file(tmp_path, text, 8)).shapes == {"a": (2,)}


@pytest.mark.parametrize("content", [LFS, b"<html>"])
def test_pointers_in_place_of_other_files(tmp_path, content):
    for name, read in (
        ("model.safetensors.index.json", lambda path: TensorFiles.open(path.parent)),
        ("config.json", read_object),
        ("vocab.json", lambda path: require_true_files(path.parent)),
        ("x.pth", lambda path: open_pickle(path, allow=True)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path}: a (Git LFS pointer|web page)"):
            read(path)
        path.unlink()


def test_a_type_that_is_not_read(file):
    file.write_bytes(file.read_bytes().replace(b'"F16"', b'"U16"'))
    with pytest.raises(InputError, match="c is stored as U16, which is not read; take a file in BF16") as error:
        TensorFiles.open(file)
    assert str(file) in str(error.value)


def test_a_file_that_shrinks_while_it_is_read(file):
    files = TensorFiles.open(file)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match="ended while"):
        list(files.stream())


class TestFolders:
    def shards(self, folder, **maps):
        for name in {*maps.values()}:
            keys = [key for key, shard in maps.items() if shard == name]
            save_file({key: TENSORS[key] for key in keys}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": maps}))

    def test_an_index(self, tmp_path):
        self.shards(tmp_path, a="1.safetensors", b="2.safetensors", c="1.safetensors")
        assert_equal(read_all(tmp_path), TENSORS)

    def test_a_missing_shard(self, tmp_path):
        self.shards(tmp_path, a="1.safetensors", b="2.safetensors")
        (tmp_path / "2.safetensors").unlink()
        with pytest.raises(InputError, match=r"2\.safetensors: missing, though model.safetensors.index.json names"):
            TensorFiles.open(tmp_path)

    def test_a_key_in_two_shards(self, tmp_path):
        for name in ("1.safetensors", "2.safetensors"):
            save_file({"a": TENSORS["a"]}, tmp_path / name)
        with pytest.raises(InputError, match=r"a is also in 1\.safetensors"):
            TensorFiles([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'])
    def test_a_broken_index(self, tmp_path, text):
        (tmp_path / "x.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match=r"index\.json(:1)?: (not an index|cannot be read as JSON|holds a list)"):
            TensorFiles.open(tmp_path)

    @pytest.mark.parametrize("name", ["../a.safetensors", "x/../../a.safetensors", "/etc/passwd", "{}/a.safetensors"])
    def test_an_index_that_leaves_its_folder(self, tmp_path, name):
        save_file({"a": TENSORS["a"]}, tmp_path / "a.safetensors")
        (tmp_path / "in").mkdir()
        name = name.format(tmp_path)
        (tmp_path / "in" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match=r"index\.json: '.*' is not a file in this folder"):
            TensorFiles.open(tmp_path / "in")

    def test_links_to_shards_are_followed(self, tmp_path):
        """The Hub's cache has nothing else."""
        (tmp_path / "in").mkdir()
        self.shards(tmp_path / "in", a="1.safetensors", b="2.safetensors", c="1.safetensors")
        (tmp_path / "in" / "1.safetensors").rename(tmp_path / "blob")
        (tmp_path / "in" / "1.safetensors").symlink_to("../blob")
        assert_equal(read_all(tmp_path / "in"), TENSORS)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match="found none"):
            TensorFiles.open(tmp_path)
        with pytest.raises(InputError, match="no such file or folder"):
            TensorFiles.open(tmp_path / "none")


class TestWhole:
    def test_a_file_and_a_folder(self, tmp_path):
        with atomic_output(tmp_path / "sub" / "file") as partial:
            partial.write_text("x")
            assert not (tmp_path / "sub" / "file").exists()
        assert (tmp_path / "sub" / "file").read_text() == "x"
        with atomic_output(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / "inside").touch()
        assert (tmp_path / "folder" / "inside").is_file()

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "file").write_text("old")
        with pytest.raises(InputError, match="exists already"), atomic_output(tmp_path / "file"):
            pass
        assert (tmp_path / "file").read_text() == "old"

    def test_a_failure_leaves_nothing(self, tmp_path):
        def interrupted():
            with atomic_output(tmp_path / "folder") as partial:
                partial.mkdir()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(tmp_path.iterdir()) == []

    def test_the_rest_of_a_crash_is_replaced(self, tmp_path):
        left = tmp_path / f"folder{PARTIAL}"
        left.mkdir()
        (left / "old").touch()
        with atomic_output(tmp_path / "folder") as partial:
            partial.mkdir()
        assert list((tmp_path / "folder").iterdir()) == []

    def test_a_full_disk_is_one_line(self, tmp_path):
        with (
            pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'x'}'"),
            atomic_output(tmp_path / "x"),
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(InputError, match=r"needs 1e\+09 GB"):
            need_space(tmp_path / "a" / "b", 10**18)
        need_space(tmp_path / "a" / "b", 1)


class TestPickles:
    def test_only_on_request(self, tmp_path):
        (tmp_path / "x.pth").write_bytes(b"x")
        with pytest.raises(InputError, match="to rflow convert add --allow_pickle"):
            open_pickle(tmp_path / "x.pth", allow=False)
        with pytest.raises(InputError, match="no such file"):
            open_pickle(tmp_path / "y.pth", allow=True)

    def test_without_torch(self, tmp_path, monkeypatch):
        (tmp_path / "x.pth").write_bytes(b"x")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match="needs torch"):
            open_pickle(tmp_path / "x.pth", allow=True)

    @pytest.mark.parity
    def test_tensors(self, tmp_path):
        torch = pytest.importorskip("torch", reason="the parity extra is not installed")
        tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5).to(torch.bfloat16)}
        tensors["d"] = torch.arange(4.0).to(torch.float8_e4m3fn)
        torch.save({"state_dict": tensors}, tmp_path / "x.pth")
        files = open_pickle(tmp_path / "x.pth", allow=True)
        eight_bits = np.arange(4).astype(ml_dtypes.float8_e4m3fn)
        assert_equal(dict(files.stream()), {"a": TENSORS["a"], "b": TENSORS["b"], "d": eight_bits})

    @pytest.mark.parity
    @pytest.mark.parametrize("content", [[1, 2], {"a": 3}, print])
    def test_anything_else_is_refused(self, tmp_path, content):
        torch = pytest.importorskip("torch", reason="the parity extra is not installed")
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(InputError, match=r"expected a dictionary of tensors|weights only"):
            open_pickle(tmp_path / "x.pth", allow=True)
