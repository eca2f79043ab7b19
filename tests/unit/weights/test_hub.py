"""Names of models on the Hub: what they mean, what is fetched, and one line for those that lead nowhere."""

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rflow_jax.errors import InputError
from rflow_jax.weights.hub import HubId, cached, resolve, resolve_lora, resolve_reward, resolve_vlm, short_name
from tests.kit.hub import FakeHub

FILES = {
    "owner/reflect": [
        "README.md",
        *(f"infer/30000/{name}" for name in ("config.json", "merges.txt", "chat_template.json", "a-1.safetensors")),
        *(f"infer/3000/{name}" for name in ("config.json", "a.safetensors")),
        *("infer/30000/optimizer.pth", "infer/30000/global_step/b.safetensors"),
    ],
    "owner/loras": [
        *("one.safetensors", "two.safetensors", "best [1].safetensors", "peft/adapter_model.safetensors"),
        *("peft/adapter_config.json", "old/pytorch_lora_weights.bin"),
    ],
    "owner/judge": [
        *("README.md", "prompt.md", "model_config.json"),
        *(f"checkpoint-{n}/{name}" for n in (9, 10) for name in ("adapter_model.safetensors", "rest.pth")),
        *(f"checkpoint-{n}/tokenizer/{name}" for n in (9, 10) for name in ("tokenizer.json", "merges.txt")),
    ],
    "owner/flux": ["flux1-dev.safetensors", "ae.safetensors", "model_index.json", "vae/config.json", "vae/x.bin"],
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for repository, files in FILES.items():
        for name in files:
            path = tmp_path / "served" / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
    return FakeHub(monkeypatch, tmp_path / "cache", {name: tmp_path / "served" / name for name in FILES})


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/name/", HubId("owner/name")),
        ("owner/name@refs/pr/3", HubId("owner/name", revision="refs/pr/3")),
        ("owner/na.me-2/infer/30000", HubId("owner/na.me-2", "infer/30000")),
        ("owner/name/infer/30000@v1.0", HubId("owner/name", "infer/30000", revision="v1.0")),
        ("owner/name:a b.safetensors@main", HubId("owner/name", "a b.safetensors", True, "main")),
        ("owner/name/sub:file.bin", HubId("owner/name", "sub/file.bin", True)),
        ("owner/name:sub/file", HubId("owner/name", "sub/file", True)),
        ("owner/name/sub/file.safetensors", HubId("owner/name", "sub/file.safetensors", True)),
        ("https://huggingface.co/owner/name", HubId("owner/name")),
        ("https://huggingface.co/owner/name/", HubId("owner/name")),
        ("huggingface.co/owner/name/tree/main/a", HubId("owner/name", "a", revision="main")),
        ("https://huggingface.co/owner/name/tree/main", HubId("owner/name", revision="main")),
        ("https://hf.co/owner/name/tree/refs%2Fpr%2F3/a/b", HubId("owner/name", "a/b", revision="refs/pr/3")),
        ("https://huggingface.co/owner/name/blob/v1/a/x.txt", HubId("owner/name", "a/x.txt", True, "v1")),
        (
            "https://huggingface.co/owner/name/resolve/main/a%20b.safetensors?download=true",
            HubId("owner/name", "a b.safetensors", True, "main"),
        ),
        ("https://mirror.example/owner/name/tree/main/a", HubId("owner/name", "a", revision="main")),
        ("hf://owner/name@v1/a/b", HubId("owner/name", "a/b", revision="v1")),
        ("hf://owner/name", HubId("owner/name")),
        *((name, None) for name in ("../x/y", "x/../y", "x/y/../z", "x/y/./z", "name", "", "/a/b", "~/a/b", "x/y//z")),
        *((name, None) for name in ("x/y:", "x/y@", "a:b/c", "C:\\a\\b", "x y/z", "https://example.org/owner/name")),
    ],
)
def test_the_parts_of_a_name(monkeypatch, name, want):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert HubId.parse(name) == want


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/datasets/owner/name", "is not a model, but of the Hub's datasets"),
        ("hf://datasets/owner/name/a.tar", "is not a model, but of the Hub's datasets"),
        ("https://huggingface.co/spaces/owner/name", "is not a model, but of the Hub's spaces"),
        ("https://huggingface.co/owner", "not the page of a model"),
        ("https://huggingface.co/owner/name/discussions/3", "not the page of a model"),
        ("https://huggingface.co/", "not the page of a model"),
        ("https://example.org/owner/name", "not a Hub id"),
        ("../x/y", "no such file or folder, and not a Hub id"),
        ("-owner/name", "not a Hub id"),
        ("nobody/name/sub", "not on the Hub"),
        ("owner/loras@v3", "has no revision v3$"),
        ("owner/loras@v2/peft", r"has no revision v2/peft \(owner/loras/\.\.\.@revision for a folder\)"),
        ("owner/loras:three.safetensors", "has no three.safetensors; its weights are in owner/loras:best"),
        ("owner/loras/none", "has no none; its weights are in owner/loras, owner/loras/old, owner/loras/peft"),
        ("served/owner/loras/none", "no such file or folder in served/owner, which is here"),
    ],
)
@pytest.mark.parametrize("resolve", [resolve, resolve_lora, resolve_vlm, resolve_reward])
def test_names_that_lead_nowhere_are_one_line(hub, resolve, name, message):
    if name.endswith(".safetensors") and resolve in (resolve_vlm, resolve_reward):
        message = "a file; name the folder of the model"
    with pytest.raises(InputError, match=message) as error:
        resolve(name)
    assert str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("resolve", "name", "end", "fetched"),
    [
        (resolve_vlm, "owner/reflect/infer/30000", "infer/30000", [FILES["owner/reflect"][k] for k in (4, 3, 1, 2)]),
        (resolve_vlm, "https://huggingface.co/owner/reflect/tree/main/infer/3000", "infer/3000", None),
        (resolve_lora, "owner/loras/peft", "peft", ["peft/adapter_config.json", "peft/adapter_model.safetensors"]),
        (resolve_lora, "owner/loras/peft@v2", "peft", ["peft/adapter_config.json", "peft/adapter_model.safetensors"]),
        (resolve_lora, "owner/loras:one.safetensors", "one.safetensors", ["one.safetensors"]),
        (resolve_lora, "owner/loras:best [1].safetensors", "best [1].safetensors", ["best [1].safetensors"]),
        (resolve_lora, "owner/loras/old:pytorch_lora_weights.bin", "weights.bin", ["old/pytorch_lora_weights.bin"]),
        (resolve, "owner/flux:ae.safetensors", "ae.safetensors", ["ae.safetensors", "model_index.json"]),
        (resolve, "owner/flux", "", ["model_index.json", "vae/config.json"]),
        (resolve_reward, "owner/judge/checkpoint-9", "checkpoint-9", None),
    ],
)
def test_what_is_fetched(hub, resolve, name, end, fetched):
    found = resolve(name)
    assert found.exists()
    assert str(found).endswith(end)
    assert hub.revisions[-1] == ("v2" if name.endswith("@v2") else "main" if "/main/" in name else None)
    assert fetched is None or hub.fetched == fetched


def test_one_checkpoint_of_a_reward_model_is_fetched_with_what_lies_beside_it(hub):
    assert resolve_reward("owner/judge", 9).joinpath("checkpoint-9").is_dir()
    ninth = [name for name in FILES["owner/judge"] if "checkpoint-9/" in name]
    assert sorted(hub.fetched) == sorted([*ninth, "model_config.json", "prompt.md"])
    resolve_reward("owner/judge/checkpoint-9")
    assert sorted(hub.fetched) == sorted([*ninth, "model_config.json", "prompt.md"])
    resolve_reward("owner/judge")
    assert sorted(hub.fetched) == sorted(set(FILES["owner/judge"]) - {"README.md"})


def test_a_model_that_lies_deeper_is_named_and_not_fetched(hub):
    with pytest.raises(InputError, match=r"has no files.*in owner/reflect/infer/3000, owner/reflect/infer/30000"):
        resolve_vlm("owner/reflect")
    assert hub.fetched == []


def test_local_paths_come_first(hub, tmp_path):
    assert str(resolve_lora("served/owner/loras")) == "served/owner/loras"
    assert str(resolve_lora("served/owner/loras:one.safetensors")) == "served/owner/loras/one.safetensors"
    assert hub.revisions == []
    assert short_name("served/owner/loras") == "loras"
    assert short_name("owner/reflect/infer/30000@v2") == "reflect/infer/30000"
    assert short_name("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen2.5-VL-7B-Instruct"


def test_a_folder_in_the_cache(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *_, revision, local_files_only: str(tmp_path / "served/owner/loras"),
    )
    assert cached("owner/loras/peft") == tmp_path / "served/owner/loras/peft"
    assert cached("owner/loras/none") is None


def test_a_copy_without_the_folder_where_the_hub_does_not_answer(hub, monkeypatch):
    """huggingface_hub then hands out what it has of the repository, without an error."""
    resolve_lora("owner/loras/peft")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(hub.cache_of("owner/loras")))
    assert resolve_lora("owner/loras/peft").is_dir()
    with pytest.raises(InputError, match="owner/loras/other: the copy here has no other, and the Hub does not answer"):
        resolve_lora("owner/loras/other")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "gated on the Hub; accept its licence there and set HF_TOKEN"),
        (RepositoryNotFoundError, "not on the Hub"),
        (RevisionNotFoundError, "owner/name is on the Hub, but has no revision v2"),
        (HfHubHTTPError, r"the Hub does not answer \(503 Server Error\)"),
    ],
)
@pytest.mark.parametrize("resolve", [resolve, resolve_lora])
def test_errors_of_the_hub_are_one_line(monkeypatch, resolve, kind, message):
    def download(repository, *, local_files_only=False, **_):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        # Without its constructor, which wants a response of whichever HTTP library this version of the Hub's uses.
        error = kind.__new__(kind)
        error.args = ("503 Server Error\n\nfor url",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=f"^owner/name@v2: .*{message}") as error:
        resolve("owner/name@v2")
    assert "\n" not in str(error.value)


def test_an_error_without_words(monkeypatch):
    def download(*_, local_files_only=False, **__):
        raise LocalEntryNotFoundError("not in the cache") if local_files_only else TimeoutError()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"the Hub does not answer \(TimeoutError\)"):
        resolve("owner/name")
