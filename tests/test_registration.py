"""A saved directory loads three ways: stock, ours after `register()`, and ours as remote code without the package."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import speech

from modeling_mimi import MimiFeatureExtractor

FRAME = 48


@pytest.fixture
def directory(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    MimiFeatureExtractor().save_pretrained(tmp_path / "model")
    torch.save(speech(9 * FRAME + 7), tmp_path / "audio.pt")
    with torch.no_grad():
        torch.save(tiny_model.encode(speech(9 * FRAME + 7)).audio_codes, tmp_path / "codes.pt")
    return tmp_path


def run(directory, code: str) -> str:
    """Run code in a fresh process, so that what is registered here does not count."""
    prelude = f"""
        import sys, os
        os.environ["HF_MODULES_CACHE"] = {str(directory / "modules")!r}
        import torch
        audio, codes = (torch.load({str(directory)!r} + name) for name in ("/audio.pt", "/codes.pt"))
        path = {str(directory / "model")!r}
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=directory,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


AUTO = """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization
    classes = AutoConfig, AutoFeatureExtractor, AutoModel{tokenization}
    loaded = [cls.from_pretrained(path, **{kwargs}) for cls in classes]
    print(*[type(x).__module__ for x in loaded])
    inputs = loaded[1](audio[0, 0].numpy(), sampling_rate=24000, return_tensors="pt")
    for model in loaded[2:]:
        with torch.no_grad():
            assert model.eval().encode(inputs["input_values"][..., :432]).audio_codes.equal(codes[..., :9])
"""


def test_stock_without_remote_code(directory):
    modules = run(directory, AUTO.format(tokenization="", kwargs={})).split()
    assert all(module.startswith("transformers.models.") for module in modules)


def test_ours_after_register(directory):
    code = "from modeling_mimi import register; register(); register()"
    code += textwrap.dedent(AUTO.format(tokenization=", AutoModelForAudioTokenization", kwargs={}))
    code += textwrap.dedent("""
        from transformers import CsmConfig
        print(type(CsmConfig().codec_config).__module__)
    """)
    modules = run(directory, code).split()
    assert len(modules) == 5
    assert all(module.startswith("modeling_mimi.") for module in modules)


def test_ours_as_remote_code_without_the_package(directory):
    code = 'sys.modules["modeling_mimi"] = None\n'  # importing the package fails
    kwargs = {"trust_remote_code": True}
    code += textwrap.dedent(AUTO.format(tokenization=", AutoModelForAudioTokenization", kwargs=kwargs))
    code += textwrap.dedent("""
        stream = loaded[2].stream()
        pieces = stream.encode(audio[..., :100]), stream.encode(audio[..., 100:]), stream.flush()
        assert torch.cat(pieces, -1).equal(codes)
        loaded[2].save_pretrained(path + "2")
        again = AutoModel.from_pretrained(path + "2", trust_remote_code=True)
        assert again.encode(audio).audio_codes.equal(codes)
    """)
    modules = run(directory, code).split()
    assert all(module.startswith("transformers_modules.") for module in modules)


def test_importing_registers_nothing(directory):
    code = "import modeling_mimi" + textwrap.dedent("""
        from transformers import AutoModel
        print(type(AutoModel.from_pretrained(path)).__module__)
    """)
    assert run(directory, code).startswith("transformers.models.mimi")


def test_what_is_written(directory):
    config = json.loads((directory / "model" / "config.json").read_text())
    assert config["model_type"] == "mimi"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_mimi.MimiConfig",
        "AutoModel": "modeling_mimi.MimiModel",
        "AutoModelForAudioTokenization": "modeling_mimi.MimiModel",
    }
    assert not any(key.startswith("_") for key in config)
    assert not list((directory / "model").glob("*.bin"))
