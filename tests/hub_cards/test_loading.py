"""Loading over HTTP what was published: three ways, one set of codes; revisions, folders, cache, no network."""

import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import serve
from hub_state import TOKEN
from huggingface_hub import HfApi

import hub_cards.__main__ as command
from modeling_mimi import MimiFeatureExtractor, MimiModel
from modeling_mimi.audio_files import read_audio

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "mimi_small"
PRELUDE = """
    import sys
    from pathlib import Path

    import torch
    import transformers
    from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization, pipeline

    transformers.logging.disable_progress_bar()
    here, sha = Path(sys.argv[1]), sys.argv[2]
    audio, codes = torch.load(here / "audio.pt"), torch.load(here / "codes.pt")
    sys.modules["modeling_mimi"] = None  # from now on it cannot be imported

    def check(module, repo="me/mimi", cls=AutoModel, **kwargs):
        features = AutoFeatureExtractor.from_pretrained(repo, **kwargs)
        model = cls.from_pretrained(repo, **kwargs).eval()
        for loaded in features, model:
            assert type(loaded).__module__.split(".")[0] == module, (module, type(loaded))
        inputs = features(audio.numpy(), sampling_rate=24_000, return_tensors="pt")
        with torch.no_grad():
            assert model.encode(inputs["input_values"]).audio_codes.equal(codes), module
"""
ONLINE = """
    remote = {"trust_remote_code": True}
    check("transformers_modules", **remote)
    check("transformers_modules", cls=AutoModelForAudioTokenization, **remote)
    check("transformers_modules", "me/moved", revision="v1", **remote)
    check("transformers", "me/moved", revision="v1")
    check("transformers", "me/folders", subfolder="deep")

    encode, decode, both = (pipeline(task, model="me/mimi", **remote)
                            for task in ("audio-to-codes", "codes-to-audio", "audio-to-audio"))
    assert type(both).__module__.startswith("transformers_modules.")
    coded, wave = encode(audio.numpy()), both(audio.numpy())
    assert coded["audio_codes"].equal(codes[0])
    assert abs(decode(coded)["audio"] - wave["audio"]).max() < 1e-4

    check("transformers")
    del sys.modules["modeling_mimi"]
    from modeling_mimi import MimiFeatureExtractor, MimiModel, register
    check("transformers")
    register()
    check("modeling_mimi")
    check("modeling_mimi", cls=MimiModel)
    check("modeling_mimi", "me/moved", revision=sha)
    check("modeling_mimi", "me/folders", subfolder="deep")
    try:
        check("modeling_mimi", "me/moved")
    except Exception as error:
        print("moved:", type(error).__name__)
    try:
        MimiModel.from_pretrained("me/pickle")
    except OSError as error:
        print("pickle:", error)
"""
OFFLINE = """
    check("transformers_modules", trust_remote_code=True)
    check("transformers")
    pipeline("audio-to-codes", model="me/mimi", trust_remote_code=True)
    del sys.modules["modeling_mimi"]
    from modeling_mimi import register
    register()
    check("modeling_mimi")
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The bundled checkpoint on a Hub: as it was published, moved on since then, in a folder, and as a pickle."""
    with serve() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(command, "HfApi", lambda: HfApi(endpoint=hub.url))
        assert command.main(["publish", str(CHECKPOINT), "me/mimi"]) == 0
        files = {name: file.content for name, file in hub.repo("me/mimi").at("main").files.items()}
        hub.add("me/moved", files, revision="v1")
        hub.add("me/moved", {"config.json": b"no longer a model"})
        hub.add("me/folders", {f"deep/{name}": content for name, content in files.items()})
        hub.add("me/pickle", {"config.json": files["config.json"], "pytorch_model.bin": b"\0" * 99})
        yield hub


def load(hub, folder: Path, code: str, **environment: str) -> str:
    """Run code in a process of its own, whose cache is in the folder."""
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder), hub.repo("me/moved").at("v1").sha],
        env=hub.environment(folder / "home", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **environment),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_published_it_loads_three_ways_from_the_hub_from_the_cache_and_offline(hub, tmp_path):
    model = MimiModel.from_pretrained(CHECKPOINT).eval()
    audio = read_audio(ROOT / "tests" / "data" / "nathalie_662.flac", MimiFeatureExtractor()).data[0, : 40 * 1920]
    torch.save(audio, tmp_path / "audio.pt")
    with torch.no_grad():
        torch.save(model.encode(audio[None, None]).audio_codes, tmp_path / "codes.pt")
    hub.requests.clear()
    printed = load(hub, tmp_path, ONLINE)
    assert hub.count("^GET /me/mimi/resolve/.*model.safetensors") == 1  # nine loads, one download
    assert hub.count("^GET /me/moved/resolve/.*model.safetensors") == 1
    assert "moved: " in printed  # `main` is another commit than those above
    [said] = [line for line in printed.splitlines() if line.startswith("pickle: ")]
    assert "me/pickle has no model.safetensors" in said
    assert "never read" in said
    assert not hub.count("^GET .*pytorch_model.bin")
    hub.requests.clear()
    load(hub, tmp_path, OFFLINE, HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_a_local_pickle_is_refused_too(tiny_model, tmp_path):
    tiny_model.config.save_pretrained(tmp_path)
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"has no model\.safetensors.*never read"):
        MimiModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="never read"):
        MimiModel.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(OSError, match="nothing-there") as caught:
        MimiModel.from_pretrained(tmp_path / "nothing-there")
    assert "never read" not in str(caught.value)
