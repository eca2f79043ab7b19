"""The checkpoints of a run: written, checked against checksums, restored and exported."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rflow_jax.errors import InputError, RunError
from rflow_jax.parallel.distributed import allgather_strings
from rflow_jax.training.config import CheckpointConfig
from rflow_jax.training.run_folder import fresh
from rflow_jax.training.task import Exporter
from rflow_jax.training.train_state import TrainState
from rflow_jax.utils.atomic_io import sync_folder, sync_tree, write_file
from rflow_jax.utils.checks import current_key
from rflow_jax.utils.json_files import read_object
from rflow_jax.utils.output_folder import require_present
from rflow_jax.utils.secrets import public_addresses

_BLOCK = 1 << 24  # bytes


class CheckResult(NamedTuple):
    """The result of comparing a checkpoint's files with their checksums.

    Attributes:
        whole: all files are as they were written; False also without checksums.
        broken: what has changed; empty if nothing is known to have.
    """

    whole: bool
    broken: str


class ChecksumStore:
    """The checksums of a run's checkpoints, one JSON file per checkpoint; only the first process writes them.

    Args:
        folder: of the checksums.
        checkpoints: the folder of the checkpoints, whose subfolders are named by their steps.
    """

    def __init__(self, folder: Path, checkpoints: Path):
        self._folder, self._checkpoints = folder, checkpoints
        self._thread = ThreadPoolExecutor(1, "seal")
        self._pending: Future[None] | None = None

    def begin(self, steps: Sequence[int]) -> None:
        """Starts computing checksums of complete checkpoints, in a thread: reading a large state takes minutes."""
        self.wait()
        if jax.process_index() == 0:
            self._pending = self._thread.submit(self._write, list(steps))

    def wait(self) -> None:
        """Waits for what :meth:`begin` started, and raises its errors."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self._thread.shutdown()

    def read(self, step: int) -> CheckResult:
        """Compares a checkpoint's files with their checksums."""
        file = self._file(step)
        if not file.exists():  # the newest of a killed run: complete, but without checksums yet
            return CheckResult(False, "")
        try:
            noted = read_object(file)
        except InputError:  # the checksums are damaged, which says nothing about the checkpoint
            return CheckResult(False, "")
        found = _checksums(self._checkpoints / str(step))
        wrong = sorted(name for name in noted if noted[name] != found.get(name))
        return CheckResult(not wrong, f"{wrong[0]} is not as it was written" if wrong else "")

    def remove(self, step: int) -> None:
        """Deletes the checksums of a checkpoint."""
        self._file(step).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.json"

    def _write(self, steps: Sequence[int]) -> None:
        for step in steps:
            if not self._file(step).exists():
                with suppress(FileNotFoundError):  # the manager is just removing it, to keep newer ones
                    write_file(self._file(step), json.dumps(_checksums(self._checkpoints / str(step))))
        for file in self._folder.glob("*.json"):
            if not (self._checkpoints / file.stem).exists():
                file.unlink()


def _checksums(folder: Path) -> dict[str, int]:
    """File -> checksum."""
    sums: dict[str, int] = {}
    for file in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        total = 0
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                total = zlib.crc32(block, total)
        sums[str(file.relative_to(folder))] = total
    return sums


# Settings that a resumed run must keep: otherwise its numbers would mean something else, or its state would not fit.
IMMUTABLE_ON_RESUME = (
    *(
        "task",
        "model",
        "lora.*",
        "trainable_parameters",
        *("optimizer.name", "optimizer.muon_parameters"),
        "train.batch_size",
        "train.dtype",
        "train.seed",
    ),
    *("train.*_attn", "train.latent_lora", "train.max_sequence_length"),
    *("data.split_ratios.*", "data.training_stages", "data.*_size", "data.crop", "data.drop_*", "data.max_*"),
    "reward.*",
)
NAMED = ("data.split_ratios.*",)  # dictionaries whose keys are the user's
# Settings that do not affect training; a change of any other (the learning rate, say) is logged.
MUTABLE_ON_RESUME = ("out", "resume", "distributed.*", "logging.*", "checkpoint.*", "validation.*", "data.path")

_DISK = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}
CHECKPOINTS, SEALS = "checkpoints", "checksums"
# Disk space of a checkpoint while it is written: Orbax writes parts and merges them, plus some metadata.
_COPIES, _OVERHEAD = 2, 1 << 21
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run's folder.

    A checkpoint becomes visible when all of it is on disk, so a kill at any moment leaves the earlier ones intact.
    """

    def __init__(self, out: Path, config: CheckpointConfig):
        self.out, self.config = out, config
        self._opened: ocp.CheckpointManager | None = None
        self._sealed = ChecksumStore(out / SEALS, out / CHECKPOINTS)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Opened when first needed: a run that cannot start leaves nothing in its folder."""
        if self._opened is None:
            # Orbax also raises what it logs as errors, and we report that in one line; of several writes that fail
            # together it raises the first, and asyncio logs the others.
            for name in ("absl", "asyncio"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.config.keep_last,
                keep_period=self.config.keep_every,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._sync),
            )
            handlers = {
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            }
            folder = (self.out / CHECKPOINTS).absolute()
            self._opened = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)
        return self._opened

    def _sync(self) -> None:
        """Puts a new checkpoint on disk before it gets its final name; Orbax does so only with the arrays."""
        if jax.process_index() == 0:
            for path in (self.out / CHECKPOINTS).iterdir():
                if not path.name.isdecimal():
                    sync_tree(path)
            self._sync_names()

    def _sync_names(self) -> None:
        if jax.process_index() == 0:
            sync_folder(self.out / CHECKPOINTS)
            sync_folder(self.out)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, the newest last."""
        if self._opened is None and not (self.out / CHECKPOINTS).exists():
            return []
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, position: dict[str, Any], config: dict[str, Any], trained: Exporter) -> None:
        """Starts writing; the state is copied first, so that training can go on.

        A failed write is reported here or in :meth:`wait`.

        Args:
            position: of the data, so that the next run continues where this one stopped.
            config: the run's settings by their dotted names.

        Raises:
            RunError: this checkpoint, or the one before it, could not be written.
        """
        step = int(jax.device_get(state.step))
        require_present(self.out / CHECKPOINTS)
        with self._disk_errors():
            if step in self.steps:
                return
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state)),
                position=ocp.args.JsonSave(position),
                config=ocp.args.JsonSave(config),
            )
            self._manager.wait_until_finished()  # the previous checkpoint takes space too
            self._sync_names()
            # Checked first: a write that fails halfway makes Orbax's other writes fail noisily.
            needed = _COPIES * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
            if shutil.disk_usage(self.out).free < needed:
                raise OSError(errno.ENOSPC, _DISK[errno.ENOSPC], str(self.out))
            self._manager.save(step, args=items)
            self._sealed.begin([one for one in self.steps if one < step])
            if self.config.export and trained.exports:
                self._export(step, state, trained, trained.exports)

    def export_missing(self, state: TrainState, trained: Exporter) -> None:
        """Exports a restored state if the previous run ended between the checkpoint and its export."""
        step = int(jax.device_get(state.step))
        if not self.config.export or not trained.exports or (self.out / trained.exports.format(step=step)).exists():
            return
        with self._disk_errors():
            self._export(step, state, trained, trained.exports)

    def restore(self, like: TrainState, config: dict[str, Any]) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable state, with the data's position; None if there is no checkpoint.

        Damaged checkpoints are set aside with a warning, and the one before them is used. An intact one that cannot
        be read, for lack of memory perhaps, ends the run instead, and nothing is moved.

        Args:
            like: a state with the wanted shapes and shardings.
            config: the run's settings by their dotted names, compared with those of the checkpoint.

        Raises:
            InputError: the checkpoint belongs to another model or run, or none can be read.
        """
        damaged: dict[int, str] = {}
        steps, results = self.steps, ""
        if jax.process_index() == 0:  # only one reads the files, so no process sees files that another moves
            results = json.dumps([[step, *self._sealed.read(step)] for step in reversed(steps)])
        for step, whole, broken in json.loads(allgather_strings(results)[0]):
            try:
                if broken:
                    raise _Damaged(broken)
                found = self._restored(step, whole, like, config)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged)
            return found
        if damaged:
            raise InputError(
                f"{self.out / CHECKPOINTS}: no checkpoint can be read (step {max(damaged)}: {damaged[max(damaged)]}); "
                "start afresh with another out"
            )
        return None

    def _restored(
        self, step: int, whole: bool, like: TrainState, config: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Raises _Damaged for a checkpoint that is not known to be whole and cannot be read."""
        with _damage(suspected=not whole):
            stored = self._read(step, config=ocp.args.JsonRestore())["config"]
        _compare(stored, config, self.out / CHECKPOINTS / str(step))
        with _damage(suspected=not whole):
            self._require_fit(step, like)
            abstract = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in _tree(like).items()
            }
            read = self._read(step, state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        state = jax.tree.unflatten(jax.tree.structure(like), [read["state"][name] for name in _tree(like)])
        return state, read["position"]

    def _require_fit(self, step: int, like: TrainState) -> None:
        """Raises InputError unless a checkpoint has the parameters that are trained now."""
        stored = self._manager.item_metadata(step)["state"]
        if stored is None:
            return
        shapes = {name: tuple(leaf.shape) for name, leaf in dict(stored).items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in _tree(like).items()}
        for name in sorted(shapes.keys() | wanted):
            if shapes.get(name) != wanted.get(name):
                raise InputError(
                    f"{self.out / CHECKPOINTS / str(step)}: belongs to another model ({name} has the shape "
                    f"{shapes.get(name)}, and now it is {wanted.get(name)}); start afresh with another out"
                )

    def wait(self) -> None:
        """Waits until everything is on disk; raises RunError if it could not be written."""
        if self._opened is not None:
            with self._disk_errors():
                self._opened.wait_until_finished()
                self._sync_names()
                self._sealed.begin(self.steps)
                self._sealed.wait()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns a full disk into one RunError, whichever library noticed it."""
        try:
            yield
        except Exception as error:
            if getattr(error, "errno", None) not in _DISK and not any(word in str(error) for word in _DISK.values()):
                raise
            kept = f"the newest whole checkpoint is of step {self.steps[-1]}" if self.steps else "none is whole"
            raise RunError(
                f"{self.out}: the checkpoint cannot be written, the disk is full or a quota is used up; {kept}; free "
                "some space and resume with --resume"
            ) from error

    def close(self) -> None:
        if self._opened is not None:
            with self._disk_errors():  # waits for pending writes
                self._opened.close()
        self._sealed.close()

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        if not damaged:
            return
        for step, reason in damaged.items():
            folder = self.out / CHECKPOINTS / str(step)
            log.warning("%s: cannot be read (%s); going back to the checkpoint before it", folder, reason)
            if jax.process_index() == 0:
                aside = self.out / f"damaged_{step}"
                self._sealed.remove(step)
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {sorted(damaged)}")
        self._manager.reload()

    def _export(self, step: int, state: TrainState, trained: Exporter, path: str) -> None:
        first = jax.process_index() == 0
        folder = self.out / path.format(step=step)
        trained.export(state.trainable, fresh(folder) if first else None)
        if not first:
            return
        prefix = Path(path).name.removesuffix("{step}")
        kept = {f"{prefix}{one}" for one in (*self.steps, step)}
        for other in folder.parent.glob(f"{prefix}*"):
            if other.name not in kept and other.name.removeprefix(prefix).isdigit():
                shutil.rmtree(other)


class _Damaged(Exception):
    """A checkpoint has changed since it was written."""


@contextmanager
def _damage(suspected: bool) -> Iterator[None]:
    """Turns errors while reading into _Damaged, if damage is suspected and the machine is not to blame.

    All processes read together, so an error in one is raised in all.
    """
    found: Exception | None = None
    try:
        yield
    except Exception as error:
        of_machine = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        if not suspected or of_machine or isinstance(error, InputError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        found = error
    reasons = allgather_strings("" if found is None else " ".join(str(found).split())[:200] or type(found).__name__)
    if reason := next(filter(None, reasons), None):
        raise _Damaged(reason) from found


def _tree(state: TrainState) -> dict[str, Any]:
    """Leaves by their path in the state: no class of Flax or optax goes into the file."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _compare(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raises InputError for settings that must not change, and logs other changes."""
    stored = {current_key(name): public_addresses(value) for name, value in stored.items()}
    changes = []
    # A setting that only one of them has came with another version, except those that users name.
    for name in [name for name in (stored | wanted) if name in stored.keys() & wanted or _is_one_of(name, NAMED)]:
        # Through JSON, as it was stored: tuples are lists there.
        before, now = stored.get(name), json.loads(json.dumps(wanted.get(name)))
        if before == now:
            continue
        if _is_one_of(name, IMMUTABLE_ON_RESUME):
            raise InputError(
                f"{folder}: was trained with {name} {before!r}, and now it is {now!r}; resume with the same, or start "
                "afresh with another out"
            )
        if not _is_one_of(name, MUTABLE_ON_RESUME):
            changes.append(f"{name} {before!r} is now {now!r}")
    if changes:
        log.warning("resumed with other settings: %s", "; ".join(changes))


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
