"""PyTorch's own files that ask for more than they have."""

import pickle
import zipfile

import pytest

from rflow_jax.errors import InputError
from rflow_jax.weights.pytorch_files import open_pickle

torch = pytest.importorskip("torch", reason="the parity extra is not installed")


class _Large:
    """As a pickle: an array of a petabyte of zeros."""

    def __reduce__(self):
        return bytearray, (2**50,)


def _repacked(file, change):
    with zipfile.ZipFile(file) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    change(file, members)


def _compressed(file, members):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content + bytes(2**20) * name.endswith("/data/0"))


def _asking_for_much(file, members):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps({"a": _Large()}, 2) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("change", "message"), [(_compressed, "its members are compressed"), (_asking_for_much, "asks for 1,125,8")]
)
def test_a_zip(tmp_path, change, message):
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)}, file)
    _repacked(file, change)
    with pytest.raises(InputError, match=rf"^{file}: not read as a PyTorch file: .*{message}"):
        open_pickle(file, allow=True)


def test_the_format_of_before(tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(4)}, file, _use_new_zipfile_serialization=False)
    assert open_pickle(file, allow=True).read("a").tolist() == [1] * 4
    content = file.read_bytes()
    assert content.count(b"cpuq") == 1
    place = content.index(b"K\x04", content.index(b"cpuq"))  # the length of the storage
    file.write_bytes(content[:place] + b"\x8a\x06" + (2**42).to_bytes(6, "little") + content[place + 2 :])
    with pytest.raises(InputError, match="it asks for 4,398,046,511,104 bytes or numbers"):
        open_pickle(file, allow=True)


def test_one_number_repeated_without_end(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1).expand(60_000, 60_000)}, file)
    with pytest.raises(InputError, match=r"a has the shape \[60000, 60000\], in a file of"):
        open_pickle(file, allow=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"\x80\x02" + b"(" * 3_000_000, b"hello"])
def test_other_files(tmp_path, content):
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{file}: "):
        open_pickle(file, allow=True)


@pytest.mark.parametrize("loaded", [{1: torch.ones(3)}, {("a",): torch.ones(3)}, [torch.ones(3)], {"a": 3}])
def test_what_is_no_dictionary_of_tensors_is_said(tmp_path, loaded):
    torch.save(loaded, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth: expected a dictionary of tensors by name"):
        open_pickle(tmp_path / "x.pth", allow=True)


def test_what_torch_cannot_read_itself_is_one_line(tmp_path):
    small = torch.ones(4).to(torch.float8_e4m3fn)
    torch.save({"a": small}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"x.pth: torch cannot read it as weights only"):
        open_pickle(tmp_path / "x.pth", allow=True)
