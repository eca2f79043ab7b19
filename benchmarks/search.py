"""How busy a search keeps the generator, and how much shorter it is than the same work done one after another.

    python -m benchmarks.search [--prompts 16] [--in_flight 8] [--delay 2] [--chaos 0.1] [--seconds 1.0] [--rounds 3]

A tiny FLUX on this machine's accelerator, with enough steps that an image takes about ``--seconds``; verifier and
language models over real HTTP on the loopback, from a server that answers after ``--delay`` seconds and more, out of
order, and fails a part of the requests in every way. Every score is held against its image's bytes, and both searches
must leave the same files. Prints the two times, their ratio, and the generator's busy time since it was warm.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import Request, load_pipeline
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.search.config import NoiseStage, ReflectStage, SearchConfig
from rflow_jax.search.engine import Engine, Models
from rflow_jax.search.progress import BusyClock, SearchProgress
from rflow_jax.search.prompt_folder import PromptFolder, read_records
from rflow_jax.search.prompt_search import PromptSearch, SearchContext
from rflow_jax.testing.openai_server import KEY, score_of
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.config import OpenAIVerifierConfig
from rflow_jax.writers import REFINE_PROMPT, REFLECTION_PROMPT, make_text_generator
from rflow_jax.writers.base import HttpTextGeneratorConfig

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SIDE, CONDITION = 128, 64


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[str]:
    """The local server, in a process of its own; gives its address."""
    command = [sys.executable, "-m", "rflow_jax.testing.openai_server", f"--delay={arguments.delay}"]
    command += [f"--spread={arguments.delay / 2}", f"--chaos={arguments.chaos}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


def sized(pipe: Any, seconds: float) -> SamplingConfig:
    """Settings with enough steps that an image takes about ``seconds``."""
    trial = SamplingConfig(
        height=SIDE, width=SIDE, condition_size=CONDITION, num_inference_steps=40, max_sequence_length=64
    )
    took = min(one_image(pipe, trial) for _ in range(3))
    steps = max(1, round(40 * seconds / took))
    return SamplingConfig(
        height=SIDE, width=SIDE, condition_size=CONDITION, num_inference_steps=steps, max_sequence_length=64
    )


def one_image(pipe: Any, settings: SamplingConfig) -> float:
    """Seconds of one image from noise."""
    begin = time.perf_counter()
    pipe.without_lora().start([Request("a", 0)], settings).images()
    return time.perf_counter() - begin


def models(config: SearchConfig) -> Models:
    """Everyone who is asked."""
    return Models(
        make_verifier(config.verifier, UsageTracker()),
        make_text_generator(config.reflector, REFLECTION_PROMPT, UsageTracker()),
        make_text_generator(config.refiner, REFINE_PROMPT, UsageTracker()),
    )


def prompts(config: SearchConfig, out: Path, count: int) -> Iterator[PromptSearch]:
    """The searches of ``count`` prompts."""
    terms = SearchContext(config.seed, True, 0, config.noise.noise_similarity, True, {"lora": config.lora})
    for index in range(count):
        folder = PromptFolder(out, index, {"prompt": f"a photo of {index + 2} kites"})
        yield PromptSearch(folder, config.strategy("reflect"), terms)


def many_at_once(config: SearchConfig, pipe: Any, out: Path, count: int) -> tuple[float, float | None]:
    """(seconds, part of the time that the generator worked) of the engine's search."""
    clock = BusyClock()
    live = SearchProgress(config.strategy("reflect").images() * count, clock, Usage)
    engine = Engine(pipe, models(config), config.sampling, config.prompts_in_flight, live, clock)
    begin = time.perf_counter()
    with live:
        engine.run(prompts(config, out, count))
    return time.perf_counter() - begin, clock.fraction


def one_after_another(config: SearchConfig, pipe: Any, out: Path, count: int) -> float:
    """Seconds of the same work, each step awaited before the next."""
    asked = models(config)
    assert asked.verifier is not None
    assert asked.reflector is not None
    assert asked.refiner is not None
    bare = pipe.without_lora()
    begin = time.perf_counter()
    for run in prompts(config, out, count):
        works = deque(run.begin())
        while works:
            work = works.popleft()
            result: Any = None
            if work.step == "draw":
                (image,) = (pipe if work.corrects else bare).start([run.request(work)], config.sampling).images()
                run.folder.write_image(run.place(work), image)
            elif work.step == "score":
                image = run.folder.read_image(run.place(work))
                (result,) = asked.verifier.score([image], [run.folder.entry])
            else:
                (result,) = (asked.reflector if work.step == "reflect" else asked.refiner).write([run.case(work)])
            works.extendleft(run.done(work, result))
    asked.close()
    return time.perf_counter() - begin


def check(out: Path, other: Path | None) -> tuple[int, int]:
    """(images, images without a score); every score belongs to its image, and both folders hold the same files."""
    images = unscored = 0
    for folder in sorted(out.iterdir()):
        for record in read_records(folder):
            images += 1
            score = record["verdict"]["score"]
            unscored += score is None
            if score is not None and score != score_of((folder / record["file"]).read_bytes()):
                raise SystemExit(f"{folder}/{record['file']}: not its score")
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    if other is not None:
        _, unlike, missing = filecmp.cmpfiles(out, other, names, shallow=False)
        if unlike or missing:
            raise SystemExit(f"not the same files: {(unlike + missing)[:3]}")
    return images, unscored


def main() -> None:
    """Both searches, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--in_flight", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=2.0)
    parser.add_argument("--chaos", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of an image")
    parser.add_argument("--skip_serial", action="store_true", help="only the engine")
    arguments = parser.parse_args()
    pipe = load_pipeline(str(GOLDEN / "pipeline"), lora=str(GOLDEN / "lora"), dtype="float32", progress=False)
    settings = sized(pipe, arguments.seconds)
    with server(arguments) as address, tempfile.TemporaryDirectory() as folder:
        os.environ["OPENAI_API_KEY"] = KEY
        asked: dict[str, Any] = {"base_url": address, "timeout": 3 * arguments.delay + 1, "max_retries": 8}
        config = SearchConfig(
            "golden",
            lora="golden",
            dtype="float32",
            prompts_in_flight=arguments.in_flight,
            noise=NoiseStage(1, 2),
            reflect=ReflectStage(arguments.rounds, 2),
            sampling=settings,
            verifier=OpenAIVerifierConfig(**asked, concurrency=32),
            reflector=HttpTextGeneratorConfig(**asked, concurrency=32),
            refiner=HttpTextGeneratorConfig(**asked, concurrency=32),
        )
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__} on "
              f"{jax.default_backend()}; {settings.num_inference_steps} steps, "
              f"{min(one_image(pipe, settings) for _ in range(2)):.2f} s an image", flush=True)  # fmt: skip
        many_at_once(config, pipe, Path(folder, "warm"), 1)  # compiles both programs
        at_once, busy = many_at_once(config, pipe, Path(folder, "engine"), arguments.prompts)
        images, unscored = check(Path(folder, "engine"), None)
        print(f"engine: {images} images, {unscored} without a score, {at_once:.1f} s, generator {busy:.1%} busy",
              flush=True)  # fmt: skip
        if not arguments.skip_serial:
            serial = one_after_another(config, pipe, Path(folder, "serial"), arguments.prompts)
            check(Path(folder, "serial"), Path(folder, "engine"))
            print(f"one after another: {serial:.1f} s, {serial / at_once:.2f} times as long; the same files")


if __name__ == "__main__":
    main()
