"""What the processes of :mod:`tests.kit.processes` find imported. Nothing here may start a thread or a device."""

import warnings
from importlib import import_module

import transformers

for name in (
    *("generate", "pairs", "report", "score", "search", "train"),
    *("dataset", "filter"),
):
    import_module(f"rflow_jax.commands.{name}")
for name in ("generation.pipeline", "search.engine", "search.run", "training.loop", "writers.qwen"):
    import_module(f"rflow_jax.{name}")
for name in ("corrector", "reward", "sft"):
    import_module(f"rflow_jax.training.{name}.task")
for name in ("openai", "orbax.checkpoint", "tensorboardX"):
    import_module(name)
for name in ("AutoTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "T5TokenizerFast"):
    getattr(transformers, name)

# JAX warns of forks, since its devices run threads; here it has none yet.
warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
