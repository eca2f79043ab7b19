"""Checkpoints and the folder they lie in, with a state of a few numbers."""

from __future__ import annotations

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.parallel.distributed import allgather_strings, raise_on_all
from rflow_jax.parallel.layout import DistributedConfig
from rflow_jax.training.checkpoints import Checkpoints
from rflow_jax.training.config import CheckpointConfig
from rflow_jax.training.run_folder import open_folder, write_config
from rflow_jax.training.train_state import TrainState
from rflow_jax.utils.output_folder import LOCK
from tests.kit.power_cuts import Disk

CONFIG = {"train.seed": 0, "data.split_ratios.general": [0.5, 0.5], "data.split_ratios.editing": [0.5, 0.5]}


class Nothing:
    """An exporter without a form."""

    exports = None

    def export(self, trainable, folder):
        raise AssertionError("there is no such form")


EXPORTS_NOTHING = Nothing()


def state(step: int, size: int = 3) -> TrainState:
    return TrainState(jnp.asarray(step, jnp.int32), {"a": jnp.arange(size) + 1.0 * step}, {"mu": jnp.zeros(size)})


@pytest.fixture
def kept(tmp_path):
    """Checkpoints of the steps 2, 4 and 6."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for step in (2, 4, 6):
        checkpoints.save(state(step), {"step": step}, CONFIG, EXPORTS_NOTHING)
    checkpoints.wait()
    checkpoints.close()
    return tmp_path


def restored(out, like=None, config=CONFIG):
    checkpoints = Checkpoints(out, CheckpointConfig())
    try:
        return checkpoints.restore(like or state(0), config)
    finally:
        checkpoints.close()


def damage(out, step):
    file = max((out / "checkpoints" / str(step)).rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_all_that_is_kept_is_sealed_and_nothing_else(kept):
    assert sorted(file.name for file in (kept / "checksums").iterdir()) == ["2.json", "4.json", "6.json"]
    checkpoints = Checkpoints(kept, CheckpointConfig(keep_last=2))
    checkpoints.save(state(8), {}, CONFIG, EXPORTS_NOTHING)
    checkpoints.wait()
    checkpoints.close()
    assert sorted(file.name for file in (kept / "checksums").iterdir()) == ["6.json", "8.json"]


def test_damaged_ones_are_set_aside_when_one_before_them_can_be_read(kept, caplog):
    damage(kept, 4)
    damage(kept, 6)
    found, position = restored(kept)
    assert (int(found.step), position) == (2, {"step": 2})
    np.testing.assert_array_equal(found.trainable["a"], [2, 3, 4])
    assert (kept / "damaged_4").is_dir()
    assert (kept / "damaged_6").is_dir()
    assert caplog.text.count("going back to the checkpoint before it") == 2


def test_where_none_can_be_read_nothing_is_moved(kept):
    for step in (2, 4, 6):
        damage(kept, step)
    for _ in range(2):
        with pytest.raises(InputError, match=r"no checkpoint can be read .*is not as it was written"):
            restored(kept)
    assert not list(kept.glob("damaged*"))


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: out of memory"), PermissionError(13, "no"), ValueError("what is this")]
)
def test_what_is_no_damage_ends_the_run_and_moves_nothing(kept, error, monkeypatch):
    read = Checkpoints._read

    def fail(self, step, **items):
        if "state" in items:
            raise error
        return read(self, step, **items)

    monkeypatch.setattr(Checkpoints, "_read", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        restored(kept)
    monkeypatch.undo()
    assert not list(kept.glob("damaged*"))
    assert int(restored(kept)[0].step) == 6


def test_one_without_sums_is_taken_if_it_can_be_read(kept):
    (kept / "checksums" / "6.json").unlink()
    (kept / "checksums" / "4.json").write_text("{")
    assert int(restored(kept)[0].step) == 6
    (kept / "checkpoints" / "6" / "position" / "metadata").write_text("{")
    assert int(restored(kept)[0].step) == 4
    assert (kept / "damaged_6").is_dir()


def test_a_state_of_other_shapes_is_refused_in_one_line(kept):
    with pytest.raises(InputError, match=r"6: belongs to another model \(optimizer\.mu has the shape \(3,\)"):
        restored(kept, like=state(0, size=4))
    assert not list(kept.glob("damaged*"))


def test_a_subset_that_comes_or_goes_is_another_mixture(kept):
    fewer = {name: value for name, value in CONFIG.items() if not name.endswith("editing")}
    with pytest.raises(InputError, match=r"split_ratios\.editing \[0\.5, 0\.5\], and now it is None"):
        restored(kept, config=fewer)
    with pytest.raises(InputError, match=r"split_ratios\.rule None, and now it is \[1, 1\]"):
        restored(kept, config=CONFIG | {"data.split_ratios.rule": [1, 1]})
    assert restored(kept, config=CONFIG | {"train.of_a_later_version": 1}) is not None


def test_a_run_of_an_earlier_version_resumes_under_the_new_names_of_keys(tmp_path, caplog):
    old = {"optimizer.clip": 0.5, "train.accumulation": 2, "data.shards": "s", "watch.every": 10, "data.buffer": 1000}
    new = {"optimizer.max_grad_norm": 0.5, "train.gradient_accumulation_steps": 2, "data.path": "t"}
    new |= {"logging.every": 5, "data.shuffle_buffer_size": 1000}
    old |= {"trainable.rank": 4, "trainable.pattern": "q", "trainable.lora": None, "trainable.parameters": None}
    new |= {"lora.rank": 4, "lora.target_modules": "q", "lora.init_from": None, "trainable_parameters": None}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state(2), {}, CONFIG | old, EXPORTS_NOTHING)
    checkpoints.wait()
    checkpoints.close()
    assert restored(tmp_path, config=CONFIG | new) is not None
    assert caplog.text == ""
    assert restored(tmp_path, config=CONFIG | new | {"optimizer.max_grad_norm": 1.0}) is not None
    assert "optimizer.max_grad_norm 0.5 is now 1.0" in caplog.text
    with pytest.raises(InputError, match=r"was trained with lora\.rank 4, and now it is 8"):
        restored(tmp_path, config=CONFIG | new | {"lora.rank": 8})


# ---- the folder ----


def test_a_second_run_is_kept_out_as_long_as_the_first_is_there(tmp_path):
    out = tmp_path / "run"
    with open_folder(out, resume=False):
        for resume in (False, True):
            with pytest.raises(InputError, match="another process is using"), open_folder(out, resume):
                pass
        write_config(out, {"a": 1})
    assert [path.name for path in out.iterdir()] == ["config.yaml"]
    with pytest.raises(InputError, match="contains files already"), open_folder(out, resume=False):
        pass
    with open_folder(out, resume=True):
        assert (out / LOCK).exists()


def test_a_start_that_fails_or_is_killed_leaves_the_folder_free(tmp_path):
    with pytest.raises(ZeroDivisionError), open_folder(tmp_path, resume=False):
        raise ZeroDivisionError
    (tmp_path / LOCK).touch()
    with open_folder(tmp_path, resume=False):
        pass


def test_a_start_that_fails_leaves_no_new_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), open_folder(tmp_path / "new/run", resume=False):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("rflow_jax.utils.output_folder.fcntl.flock", refused)
    with caplog.at_level(logging.WARNING), open_folder(tmp_path, resume=False):
        pass
    assert "cannot be locked" in caplog.text


# ---- several processes ----


def test_settings_of_processes_need_the_switch():
    for name, value in {"coordinator": "a:1", "num_processes": 2, "process_id": 0}.items():
        with pytest.raises(InputError, match=rf"distributed\.{name} is given without distributed\.enabled"):
            DistributedConfig(**{name: value})
    for wrong in ({"num_processes": 0}, {"num_processes": 2, "process_id": 2}, {"process_id": -1}):
        with pytest.raises(InputError, match=r"distributed\.(num_processes|process_id) is"):
            DistributedConfig(enabled=True, **wrong)
    DistributedConfig(enabled=True, coordinator="a:1", num_processes=2, process_id=1)


def test_what_another_process_found_is_raised_here(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def gathered(rows):  # as from two processes: the other's error, or its size
        other = np.frombuffer(b"no such shard", np.uint8)
        if rows.size == 1 and rows.dtype != np.uint8:
            return np.stack([rows, [other.size]])
        return np.stack([rows, np.pad(other, (0, rows.size - other.size))])

    monkeypatch.setattr("rflow_jax.parallel.distributed.process_allgather", gathered)
    assert allgather_strings("größer") == ["größer", "no such shard"]
    with pytest.raises(InputError, match="no such shard"), raise_on_all():
        pass
    with pytest.raises(InputError, match="mine"), raise_on_all():
        raise InputError("mine")


def test_alone_only_its_own_errors_count():
    with raise_on_all():
        pass
    with pytest.raises(InputError, match="mine"), raise_on_all():
        raise InputError("mine")
    assert json.loads(allgather_strings(json.dumps({"a": 1}))[0]) == {"a": 1}


def test_after_a_power_cut_at_any_sync_a_whole_checkpoint_is_found(tmp_path, monkeypatch):
    """Of three checkpoints of which two are kept; also the position, the settings and the last rename are on disk."""
    out = tmp_path / "out"
    out.mkdir()
    disk = Disk(out, tmp_path / "states", every=2)
    reached = []
    with monkeypatch.context() as patched:
        disk.watch(patched)
        checkpoints = Checkpoints(out, CheckpointConfig(keep_last=2))
        for step in (2, 4, 6):
            checkpoints.save(state(step), {"step": step}, CONFIG, EXPORTS_NOTHING)
            checkpoints.wait()
            reached.append((len(disk.states), step))
        checkpoints.close()
    assert len(disk.states) > 20
    for number, folder in enumerate(disk.states):
        done = max((step for first, step in reached if number >= first), default=0)
        found = [file.read_bytes() for file in folder.glob("checkpoints/[246]/position/metadata")]
        assert not done or json.dumps({"step": done}).encode() in found, folder.name
    disk.copy(out, tmp_path / "after", only_synced=True)
    last = tmp_path / "after/checkpoints/6"
    assert json.loads((last / "position/metadata").read_text()) == {"step": 6}
    assert json.loads((last / "config/metadata").read_text()) == CONFIG
