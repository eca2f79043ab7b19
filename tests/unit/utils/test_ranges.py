"""Every number of a configuration has a range, and what is outside is one line that names key, value and range."""

import ast
import math
import re
from pathlib import Path

import pytest

import rflow_jax
from rflow_jax.data.config import DataConfig
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.openai_client.endpoint import Endpoint
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.search.config import NoiseStage, ReflectStage, RunConfig, SearchConfig
from rflow_jax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ValidationConfig
from rflow_jax.utils.ranges import Range
from rflow_jax.verifiers.config import VERIFIERS
from rflow_jax.vlm.config import QwenChatConfig

_ROOT = Path(rflow_jax.__file__).parent
# Sizes of networks, which their own readers check against the weights.
_OF_MODELS = ("models", "weights", "vlm/qwen_processing.py")
_CONFIG = re.compile(r".*(Config|(Noise|Reflect)Stage|Policy|Conversion|Connection|Endpoint)")


def _configs():
    for file in _ROOT.rglob("*.py"):
        if not file.relative_to(_ROOT).as_posix().startswith(_OF_MODELS):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and _CONFIG.fullmatch(node.name) and node.decorator_list:
                    yield file.relative_to(_ROOT), node


def test_every_number_of_a_configuration_has_a_range_that_is_checked():
    without, unchecked = [], []
    for file, node in _configs():
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
        words = {one.target.id: set(re.findall(r"\w+", ast.unparse(one.annotation))) for one in fields}
        without += [
            f"{file}: {node.name}.{name}"
            for name, kinds in words.items()
            if kinds & {"int", "float"} and not kinds & {"Range", "ClassVar", "str"}
        ]
        body = ast.unparse([one for one in node.body if isinstance(one, ast.FunctionDef)])  # pyright: ignore[reportArgumentType]
        own = "def __post_init__" in body
        if fields and not (
            "require_ranges(self" in body or "super().__post_init__" in body or (not own and node.bases)
        ):
            unchecked.append((file, node.name, words))
    assert not without
    ranges = set(re.findall(r"^(\w+) = Annotated", (_ROOT / "utils/ranges.py").read_text(), re.M))
    assert not [one for one in unchecked if any(kinds & ranges for kinds in one[2].values())]


@pytest.mark.parametrize(
    ("make", "key", "value", "allowed"),
    [
        (NoiseStage, "search_branch", 10**8, "from 1 to 10,000"),
        (ReflectStage, "search_rounds", 10**23, "from 1 to 10,000"),
        (lambda **given: SearchConfig(model="m", **given), "stop_score", math.nan, "from -1,000,000,000,000 to"),
        (lambda **given: SearchConfig(model="m", **given), "budget", math.inf, "above 0 to 1,000,000,000, or null"),
        (lambda **given: RunConfig(prompts="p", out="o", **given), "process_count", 10**9, "from 1 to 1,048,576"),
        (SamplingConfig, "height", 2**40, "from 1 to 16,384, or null"),
        (SamplingConfig, "guidance_scale", math.nan, "from 0 to 1,000,000,000, or null"),
        (Endpoint, "concurrency", 10**6, "from 1 to 1,024"),
        (Endpoint, "timeout", math.inf, "from 0.001 to 86,400"),
        (LoopConfig, "batch_size", 10**12, "from 1 to 65,536"),
        (OptimizerConfig, "betas", (0.9, math.nan), "each a number from 0 and below 1"),
        (CheckpointConfig, "keep_every", 0, "from 1 to 1,000,000,000, or null"),
        (ValidationConfig, "times", (0.5, 1.0), "above 0 and below 1"),
        (lambda **given: DataConfig(path="p", **given), "workers", 10**6, "from 0 to 1,024, or null"),
        (lambda **given: DataConfig(path="p", **given), "drop_text_prob", math.nan, "from 0 to 1"),
        (RetryPolicy, "max_backoff", math.nan, "from 0 to 2,592,000"),
        (MeshConfig, "fsdp", 10**12, "from -1 to 1,048,576"),
        (lambda **given: QwenChatConfig(model="m", **given), "devices", (0, 10**30), "from 0 to 1,048,576, or null"),
    ],
)
def test_a_number_outside_its_range_is_one_line(make, key, value, allowed):
    with pytest.raises(InputError) as error:
        make(**{key: value})
    message = str(error.value)
    assert re.search(rf"\b{key} is ", message)
    assert allowed in message
    assert "\n" not in message


def test_the_section_of_a_component_is_named():
    with pytest.raises(InputError, match=r"verifier: concurrency is 1000000: give a whole number from 1 to 1,024"):
        VERIFIERS.parse({"name": "openai", "concurrency": 10**6})


def test_the_ends_of_a_range():
    assert [number in Range(0, 1) for number in (0, 1, 10**400, math.nan)] == [True, True, False, False]
    assert 0 not in Range(0, 1, above=True)
    assert 1 not in Range(0, 1, below=True)
