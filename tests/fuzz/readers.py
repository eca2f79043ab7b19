"""Every reader of files that come from outside, with a valid file of each."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from safetensors.numpy import save_file

from rflow_jax.commands import main as commands
from rflow_jax.commands.generate import _require_free
from rflow_jax.commands.pairs import read_pairs
from rflow_jax.data.sources.chats import ChatFile
from rflow_jax.data.sources.latents import LatentSource, read_settings
from rflow_jax.data.sources.preferences import PairFile
from rflow_jax.data.sources.stream_shards import read_shard
from rflow_jax.data.sources.tar_index import build_index, index_shards
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import Shard
from rflow_jax.report.runs import read_run
from rflow_jax.scoring.results import Results
from rflow_jax.scoring.targets import ScoreConfig, find_targets
from rflow_jax.search.budget import Budget
from rflow_jax.search.inputs import read_prompts
from rflow_jax.search.prompt_folder import Journal, check_entry, read_records
from rflow_jax.search.run_folder import require_same
from rflow_jax.tokenizers.flux import load_tokenizer
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.training.checkpoints import ChecksumStore
from rflow_jax.training.metrics import _keep_until
from rflow_jax.utils import cli
from rflow_jax.vlm.qwen_processing import read_image_processor_config
from rflow_jax.weights.components import COMPONENTS, read_schedule
from rflow_jax.weights.flux import defaults_of, describe
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.weights.packed import unpacked
from rflow_jax.weights.qwen import end_tokens, read_qwen_config, repetition_penalty
from rflow_jax.weights.reward import RewardConfig
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.writers.prompt_template import PromptFile
from tests.kit import search_runs
from tests.kit.genref_tars import shard_bytes

MODELS = Path(commands.__file__).parents[1] / "testing" / "models"
FLUX, QWEN = MODELS / "tiny-flux", MODELS / "tiny-qwen2.5-vl"
SHAPES = Path(commands.__file__).parents[1] / "shapes" / "models" / "shapes"
ONCE = RetryPolicy(max_retries=0)


class Reader(NamedTuple):
    """What reads a file.

    Attributes:
        form: of the file: json, lines, yaml or bytes.
        prepare: (an empty folder) -> (the valid file in it, a function that reads it).
    """

    form: str
    prepare: Callable[[Path], tuple[Path, Callable[[], object]]]


def _written(name: str, content: str | bytes, read: Callable[[Path], object]) -> Callable[..., tuple]:
    def prepare(folder: Path) -> tuple[Path, Callable[[], object]]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path, partial(read, path)

    return prepare


def _lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


ENTRIES = [{"prompt": "a cat", "tag": "counting", "include": [{"class": "cat", "count": 1}]}, {"prompt": "two dogs"}]
VERDICT = {"score": 3.5, "label": None, "explanation": "fine", "raw": {"score": 3.5}, "error": None}
ENSEMBLE = VERDICT | {"members": [{"name": "a", "weight": 1.0, "verdict": VERDICT}]}
SCORE = {
    "image": "a.png",
    "item": {"prompt": "a cat"},
    "verifier": "v",
    "settings": "s",
    "sha256": "0",
    "verdict": VERDICT,
}
CHAT = {
    "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}],
    "images": ["a.png"],
}
PAIR = {"prompt": "a cat", "image_a": "a.png", "image_b": "b.png", "label": "A", "score_a": 1, "score_b": 2.5}
KEYS = {"000_1": "general", "000_2": "rule", "000_3": "editing"}


def _run_file(name: str) -> Callable[..., tuple]:
    """The report of a search, one of whose files is damaged."""

    def prepare(folder: Path) -> tuple[Path, Callable[[], object]]:
        plan = search_runs.Plan(reflect=(1, 2), usage={"seconds": 2.0, "cost": 0.1})
        run = search_runs.write_run(folder / "run", ENTRIES[:1], plan)
        return run / name, lambda: read_run(run)

    return prepare


def _records(folder: Path) -> tuple[Path, Callable[[], object]]:
    run = search_runs.write_run(folder / "run", ENTRIES[:1])
    return run / "00000/records.jsonl", lambda: read_records(run / "00000")


def _scores(path: Path) -> None:
    with Results(path, {}) as results:
        bool(results)


def _targets(path: Path) -> object:
    (path.parent / "samples").mkdir(exist_ok=True)
    (path.parent / "samples/00000.png").touch()
    return find_targets(ScoreConfig([str(path.parents[1])]))


def _command(name: str) -> Callable[[Path], object]:
    """The command line up to where its command would begin."""

    def read(path: Path) -> object:
        entry = commands.COMMANDS[name]
        command = __import__(entry.module, fromlist=["command"]).command(name, [])
        return cli.run_command(
            command.__class__(**vars(command) | {"run": lambda *configs: 0}), ["--config", str(path)]
        )

    return read


def _copy(source: Path, name: str, read: Callable[[Path], object]) -> Callable[..., tuple]:
    """A file of a model folder."""

    def prepare(folder: Path) -> tuple[Path, Callable[[], object]]:
        root = shutil.copytree(source, folder / "model")
        return root / name, partial(read, root)

    return prepare


def _read_flux(root: Path) -> None:
    found = describe(root)
    configs = [component.read_config(root) for component in COMPONENTS]
    read_schedule(root)
    defaults_of(found, configs[0])


def _read_qwen(root: Path) -> None:
    config = read_qwen_config(root)
    end_tokens(root, config)
    repetition_penalty(root)
    read_image_processor_config(root, config)


def _safetensors(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "a.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path, {"k": "v"})

    def read() -> None:
        files = TensorFiles.open(path)
        for key in files:
            files.read(key)

    return path, read


def _header(folder: Path) -> tuple[Path, Callable[[], object]]:
    """A file of a header alone, without padding, so that most changes strike it."""
    path = folder / "a.safetensors"
    header = json.dumps({"__metadata__": {"k": "v"}, "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    return path, lambda: TensorFiles.open(path)


def _index_of_shards(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "model.safetensors.index.json"
    save_file({"a": np.ones((2, 3), np.float32)}, folder / "model-1.safetensors")
    path.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": {"a": "model-1.safetensors"}}))
    return path, lambda: TensorFiles.open(folder)


def _lora(folder: Path) -> tuple[Path, Callable[[], object]]:
    name, rank = "base_model.model.transformer_blocks.0.attn.to_q", 2
    tensors = {"lora_A": np.ones((rank, 8), np.float32), "lora_B": np.ones((8, rank), np.float32)}
    save_file({f"{name}.{key}.weight": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_config.json", lambda: read_lora(folder)


def _packed(folder: Path) -> tuple[Path, Callable[[], object]]:
    from rflow_jax.utils.files import sha256_of

    (folder / "in").mkdir()
    (folder / "in/config.json").write_text("{}")
    sums = {"config.json": sha256_of(folder / "in/config.json")}
    path = folder / "in/packed.json"
    path.write_text(json.dumps({"format": "rflow packed", "version": 1, "files": sums, "made": {}}))
    return path, lambda: unpacked(folder / "in")


def _checksums(folder: Path) -> tuple[Path, Callable[[], object]]:
    (folder / "checkpoints/3").mkdir(parents=True)
    (folder / "checkpoints/3/a").write_text("a")
    (folder / "checksums").mkdir()
    path = folder / "checksums/3.json"
    path.write_text(json.dumps({"a": 3904355907}))
    return path, lambda: ChecksumStore(folder / "checksums", folder / "checkpoints").read(3)


def _latents(name: str) -> Callable[..., tuple]:
    def prepare(folder: Path) -> tuple[Path, Callable[[], object]]:
        from rflow_jax.data.sources.latents import COMPLETE, FORMAT, SETTINGS, SHARED, LatentMetadata

        fields = dict.fromkeys(LatentMetadata.__dataclass_fields__, "x") | {"format": FORMAT}
        (folder / SETTINGS).write_text(json.dumps(fields))
        (folder / COMPLETE).write_text(json.dumps({"general": 1, "rule": 0}))
        save_file(
            {name: np.ones(2, np.float32) for name in ("black_mean", "black_logvar", "empty_text")}, folder / SHARED
        )
        if name == SETTINGS:
            return folder / SETTINGS, lambda: read_settings(folder)
        return folder / COMPLETE, lambda: LatentSource(folder)

    return prepare


def _tar_index(folder: Path) -> tuple[Path, Callable[[], object]]:
    tar = folder / "a.tar"
    tar.write_bytes(shard_bytes(KEYS))
    shard = Shard(str(tar), tar.stat().st_size, "1")
    index_shards([shard], folder / "cache", show=False)
    (path,) = (folder / "cache").glob("*.npz")
    return path, lambda: index_shards([shard], folder / "cache", show=False)


def _slow_tokenizer(name: str) -> Callable[..., tuple]:
    """A CLIP tokenizer in its older files."""

    def prepare(folder: Path) -> tuple[Path, Callable[[], object]]:
        root = shutil.copytree(SHAPES / "tokenizer", folder / "model")
        (root / "tokenizer.json").unlink()
        (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
        return root / name, partial(load_tokenizer, root)

    return prepare


def _shard(path: Path) -> Shard:
    return Shard(str(path), path.stat().st_size, "1")


def _template(path: Path) -> object:
    return QwenTokenizer(path.parent)


READERS: dict[str, Reader] = {
    "config of score": Reader(
        "yaml",
        _written(
            "c.yaml", "prompt: a cat\nimages: [a.png]\nverifier: {name: clip, batch_size: 4}\n", _command("score")
        ),
    ),
    "config of train": Reader(
        "yaml",
        _written(
            "c.yaml",
            "task: corrector\nmodel: m\nout: o\ndata:\n  path: x.tar\n  training_stages: [0]\n"
            "  split_ratios: {general: [0.5], length: [0.1], rule: [0.4], editing: [0.0]}\n"
            "train: {batch_size: 2, steps: 3}\noptimizer: {name: adamw}\n",
            _command("train"),
        ),
    ),
    "prompts": Reader("lines", _written("p.jsonl", _lines(*ENTRIES), read_prompts)),
    "records": Reader("lines", _records),
    "journal": Reader(
        "lines",
        _written(
            "journal.jsonl",
            _lines({"id": 0, "verdict": ENSEMBLE}, {"id": 1, "reflection": {"text": "x", "error": None}}),
            Journal,
        ),
    ),
    "usage": Reader(
        "json",
        _written(
            "usage.json",
            json.dumps({"seconds": 1.5, "images": 3, "cost": 0.1, "roles": {"verifier": {"calls": 1, "cost": None}}}),
            lambda path: Budget(path.parent, 0, ("verifier",), 1.0).over_budget(),
        ),
    ),
    "scores": Reader("lines", _written("s.jsonl", _lines(SCORE, SCORE | {"image": "b.png"}), _scores)),
    "metadata to score": Reader("json", _written("00000/metadata.jsonl", _lines(ENTRIES[0]), _targets)),
    "metadata of a run": Reader(
        "json",
        _written("00000/metadata.jsonl", _lines(ENTRIES[0]), lambda path: check_entry(path.parents[1], 0, ENTRIES[0])),
    ),
    "list to score": Reader(
        "lines",
        _written(
            "l.jsonl",
            _lines({"image": "a.png", "prompt": "x"}),
            lambda path: find_targets(ScoreConfig(prompts=str(path))),
        ),
    ),
    "configuration of a run": Reader(
        "yaml",
        _written(
            "config.yaml",
            yaml.safe_dump(
                {"strategy": "noise", "sampling": {"height": 64}, "verifier": {"name": "clip", "options": {}}}
            ),
            lambda path: require_same(
                path.parent, {"strategy": "noise", "sampling": {"height": 64}, "verifier": {"name": "clip"}}
            ),
        ),
    ),
    "generated": Reader(
        "json",
        _written(
            "0.json",
            json.dumps({"prompt": "x", "settings": {"height": 1}}),
            lambda path: _require_free(path.with_suffix(".png"), {"prompt": "x", "settings": {"height": 1}}),
        ),
    ),
    "report: records": Reader("lines", _run_file("00000/records.jsonl")),
    "report: config": Reader("yaml", _run_file("config.yaml")),
    "report: usage": Reader("json", _run_file("usage.json")),
    "report: metadata": Reader("json", _run_file("00000/metadata.jsonl")),
    "chats": Reader("lines", _written("c.jsonl", _lines(CHAT, CHAT), ChatFile.open)),
    "preferences": Reader("lines", _written("p.jsonl", _lines(PAIR, PAIR), PairFile.open)),
    "pairs": Reader(
        "lines",
        _written(
            "p.jsonl",
            _lines({"bad_image": "p.jsonl", "good_image": "p.jsonl", "prompt": "x", "reflection": "y"}),
            read_pairs,
        ),
    ),
    "metrics": Reader(
        "lines", _written("m.jsonl", _lines({"step": 1, "loss": 2.0}, {"step": 2}), lambda path: _keep_until(path, 1))
    ),
    "checksums": Reader("json", _checksums),
    "prompt file": Reader("bytes", _written("p.md", "Judge.\n---\n$prompt\n", PromptFile.read)),
    "stream of a tar": Reader(
        "bytes", _written("a.tar", shard_bytes(KEYS), lambda path: list(read_shard(_shard(path), ONCE)))
    ),
    "stream of a tar.gz": Reader(
        "bytes",
        _written(
            "a.tar.gz", gzip.compress(shard_bytes(KEYS), mtime=0), lambda path: list(read_shard(_shard(path), ONCE))
        ),
    ),
    "tar": Reader("bytes", _written("a.tar", shard_bytes(KEYS), lambda path: build_index(_shard(path), ONCE))),
    "tar with long names": Reader(
        "bytes",
        _written(
            "a.tar", shard_bytes({"k" * 120: "general", "é": "rule"}, 2), lambda path: build_index(_shard(path), ONCE)
        ),
    ),
    "index of a tar": Reader("bytes", _tar_index),
    "latents: settings": Reader("json", _latents("settings.json")),
    "latents: counts": Reader("json", _latents("complete.json")),
    "model_index": Reader("json", _copy(FLUX, "model_index.json", _read_flux)),
    "transformer": Reader("json", _copy(FLUX, "transformer/config.json", _read_flux)),
    "vae": Reader("json", _copy(FLUX, "vae/config.json", _read_flux)),
    "text encoder": Reader("json", _copy(FLUX, "text_encoder/config.json", _read_flux)),
    "T5": Reader("json", _copy(FLUX, "text_encoder_2/config.json", _read_flux)),
    "scheduler": Reader("json", _copy(FLUX, "scheduler/scheduler_config.json", _read_flux)),
    "Qwen": Reader("json", _copy(QWEN, "config.json", _read_qwen)),
    "Qwen: preprocessor": Reader("json", _copy(QWEN, "preprocessor_config.json", _read_qwen)),
    "Qwen: generation": Reader(
        "json",
        _written("generation_config.json", '{"repetition_penalty": 1.05}', lambda p: repetition_penalty(p.parent)),
    ),
    "reward": Reader(
        "json",
        _written(
            "model_config.json",
            json.dumps(
                {
                    "data_config": {"max_frame_pixels": 100, "prompt_template_type": "x"},
                    "model_config": {"model_name_or_path": "m", "output_dim": 1, "reward_token": "last"},
                    "peft_lora_config": {"lora_r": 4, "lora_alpha": 8},
                    "inference_config": {"VQ_mean": 0.1, "VQ_std": 2.0},
                }
            ),
            lambda path: RewardConfig.read(path.parent),
        ),
    ),
    "tokenizer": Reader("json", _copy(SHAPES / "tokenizer", "tokenizer.json", load_tokenizer)),
    "tokenizer: config": Reader("json", _copy(FLUX / "tokenizer", "tokenizer_config.json", load_tokenizer)),
    "tokenizer: vocabulary": Reader("json", _slow_tokenizer("vocab.json")),
    "tokenizer: merges": Reader("bytes", _slow_tokenizer("merges.txt")),
    "Qwen: tokenizer config": Reader("json", _copy(QWEN, "tokenizer_config.json", QwenTokenizer)),
    "Qwen: chat template": Reader("json", _copy(QWEN, "chat_template.json", QwenTokenizer)),
    "adapter": Reader("json", _lora),
    "packed": Reader("json", _packed),
    "safetensors": Reader("bytes", _safetensors),
    "safetensors: header": Reader("bytes", _header),
    "safetensors: index": Reader("json", _index_of_shards),
}
