"""Publishing as its user sees it, by the real client against a Hub on this machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import soundfile
import tomllib
import torch
from conftest import TINY, speech
from hub_server import serve
from hub_state import INITIAL, READER, TOKEN
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import hub_cards.__main__ as command
from hub_cards import publish as publishing
from hub_cards import stage
from hub_cards.publish import PublishError, Target, explain
from hub_cards.scan import scan
from hub_cards.stage import PAGE, stage_files
from modeling_mimi import MimiConfig, MimiFeatureExtractor, MimiModel

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own

ROOT = Path(__file__).parents[2]
REPO = "me/mimi"
CODE = {f"{name}.py" for name in ("modeling_mimi", "configuration_mimi", "feature_extraction_mimi", "pipeline_mimi")}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the command of this process publishes to."""
    with serve() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(command, "HfApi", lambda: HfApi(endpoint=hub.url))
        yield hub


@pytest.fixture
def model():
    """A small one with Mimi's rates, which are those of the results that are published with it."""
    torch.manual_seed(0)
    rates = {"upsampling_ratios": [8, 6, 5, 4], "codebook_size": 2048, "num_quantizers": 8}
    return MimiModel(MimiConfig(**{**TINY, **rates})).eval()


@pytest.fixture
def directory(model, tmp_path, monkeypatch):
    """A model directory with what a run and an evaluation leave beside it; for speed, its samples are short."""
    soundfile.write(tmp_path / "clip.flac", speech(4000)[0, 0].numpy(), 24_000)
    monkeypatch.setattr(stage, "CLIP", tmp_path / "clip.flac")
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    MimiFeatureExtractor().save_pretrained(folder)
    (folder / "evaluation" / "quality").mkdir(parents=True)
    for name in ("summary.json", "curves.png", "evaluation/quality/results.json", "evaluation/quality/table.md"):
        shutil.copyfile(ROOT / "checkpoints" / "mimi_small" / name, folder / name)
    (folder / "card.yaml").write_text("license: apache-2.0\nevaluations: {quality: {dataset: me/speech}}\n")
    return folder


def publish(directory, *options: str, repo: str = REPO) -> int:
    return command.main(["publish", str(directory), repo, *options])


def titles(hub, repo=REPO, kind="model", revision="main") -> list[str]:
    return [commit.title for commit in hub.repo(repo, kind).at(revision).history()]


# ---- what goes up


def test_one_commit_with_everything_and_then_none(hub, directory, model, tmp_path, capsys):
    assert publish(directory, "--message", "first") == 0
    assert hub.repo(REPO).private is False
    assert titles(hub) == ["first", "initial commit"]
    files = hub.repo(REPO).at("main").files
    results = {"evaluation/quality/results.json", "evaluation/quality/table.md", "summary.json", "curves.png"}
    samples = {f"samples/{name}.flac" for name in ("original", "codebooks_1", "codebooks_8")}
    own = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", "samples/README.md"}
    assert files.keys() >= own | CODE | results | samples
    assert any(name.startswith(".eval_results/") for name in files)
    assert "CC0" in files["samples/README.md"].content.decode()
    (tmp_path / "back.safetensors").write_bytes(files["model.safetensors"].content)
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    capsys.readouterr()
    sent = hub.count("^PUT")
    assert publish(directory) == 0
    assert titles(hub) == ["first", "initial commit"]
    assert hub.count("^PUT") == sent
    assert "Nothing has changed" in capsys.readouterr().out
    with torch.no_grad():
        model.decoder.layers["0"].conv.bias.add_(1)
    model.save_pretrained(directory)
    hub.add(REPO, {"handler.py": b"mine", "samples/old.flac": b"x", "model-00001-of-00002.safetensors": b"x"})
    capsys.readouterr()
    assert publish(directory, "--message", "second") == 0
    assert titles(hub)[:2] == ["second", "added"]
    assert "2 removed" in capsys.readouterr().out
    now = hub.repo(REPO).at("main").files
    assert now["model.safetensors"] != files["model.safetensors"]
    assert now.keys() == files.keys() | {"handler.py"}  # what is stale is gone, what is the user's stays
    assert hub.count("/commit/main") == 2


def test_a_folder_of_a_run_and_kyutais_format(hub, directory, tmp_path, model):
    for path in [*directory.glob("*.json"), directory / "model.safetensors"]:
        if path.name != "summary.json":
            (directory / "model").mkdir(exist_ok=True)
            path.rename(directory / "model" / path.name)
    steps = json.loads((directory / "summary.json").read_text())["steps"]
    assert publish(directory, "--native", "--private", "--revision", "v1") == 0
    assert hub.repo(REPO).private
    assert titles(hub) == ["initial commit"]
    assert len(titles(hub, revision="v1")) == 2
    files = hub.repo(REPO).at("v1").files
    [native] = [name for name in files if name.startswith("tokenizer-")]
    assert native.endswith(f"-checkpoint{steps}.safetensors")
    from modeling_mimi.conversion import load_native

    (tmp_path / native).write_bytes(files[native].content)
    _, weights = load_native(tmp_path / native)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert publish(directory, "--native", "--private", "--revision", "v1") == 0
    assert len(titles(hub, revision="v1")) == 2


def test_kyutais_format_is_the_same_file_every_time(model, tmp_path):
    """Its name says what is in it, down to the order of the metadata."""
    model.save_pretrained(tmp_path)
    for _ in range(10):
        stage._add_native(tmp_path)
    assert len(list(tmp_path.glob("tokenizer-*.safetensors"))) == 1


def test_a_pull_request_leaves_main_alone(hub, directory, capsys):
    hub.add(REPO, {"config.json": b"{}"})
    assert publish(directory, "--create-pr") == 0
    assert titles(hub) == ["added", "initial commit"]
    assert len(titles(hub, revision="refs/pr/1")) == 3
    assert f"{REPO}/discussions/1" in capsys.readouterr().out
    assert publish(directory, "--create-pr", "--revision", "v1") == 2


def test_half_a_model_and_a_package_without_the_clip_go_without_samples(model, tmp_path, monkeypatch):
    for number, half in enumerate(({"decoder_config": None}, {})):
        folder, staged = tmp_path / f"half{number}", tmp_path / f"staged{number}"
        model.save_pretrained(folder)
        MimiModel.from_pretrained(folder, **half).save_pretrained(folder)
        monkeypatch.setattr(stage, "CLIP", stage.CLIP if half else tmp_path / "nothing")
        [note] = stage.stage_model(folder, staged, REPO)
        assert "half a model" in note if half else "their clip" in note
        assert (staged / "README.md").exists()
        assert not (staged / "samples").exists()


def test_the_page_takes_along_what_it_needs(tmp_path):
    """A Space has these files, what `requirements.txt` names, and nothing that is installed from here."""
    staged = tmp_path / "space"
    stage_files(PAGE, staged, "me/page", "space")
    assert {path.name for path in staged.iterdir() if path.is_file()} == {"README.md", "app.py", "requirements.txt"}
    assert not [path for path in staged.rglob("*") if "__pycache__" in path.parts]
    code = "from hub_cards.space import server; print(server.__file__); "
    code += "server.create(server.MimiModel.from_pretrained(server.BUNDLED), 'it')"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=staged, check=True, capture_output=True, text=True)
    assert Path(done.stdout.splitlines()[0]).is_relative_to(staged)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = {*project["dependencies"], *extras["train"], *extras["app"][1:], *extras["hub"]}
    assert set((staged / "requirements.txt").read_text().splitlines()) == needed
    assert extras["app"][0] == "open-mimi[train]"


def test_a_data_set_and_a_space(hub, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "codes"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.parquet").write_bytes(b"PAR1\0" * 9)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("hf_" + "A" * 34)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# codes\n")
    for _ in range(2):
        assert publish(folder, "--repo-type", "dataset", repo="me/codes") == 0
    files = hub.repo("me/codes", "dataset").at("main").files
    assert files.keys() - INITIAL.keys() == {"README.md", "data/a.parquet"}
    assert len(titles(hub, "me/codes", "dataset")) == 2
    metric = ROOT / "training" / "metrics" / "si_sdr"
    assert publish(metric, "--repo-type", "space", repo="me/si_sdr") == 0
    files = hub.repo("me/si_sdr", "space").at("main").files
    names = {path.name for path in metric.iterdir() if path.is_file()}
    assert files.keys() - INITIAL.keys() == names
    monkeypatch.setattr(stage, "dataset_card", lambda directory, repo_id: f"---\nlicense: mit\n---\n{repo_id}")
    (folder / "tokens.json").write_text("{}")  # codes: their card is made from it
    assert publish(folder, "--repo-type", "dataset", repo="me/codes") == 0
    assert hub.repo("me/codes", "dataset").at("main").files["README.md"].content.endswith(b"me/codes")
    assert (folder / "README.md").read_text().endswith("# codes\n")  # the user's own stays as it is
    (folder / "README.md").write_text("# no header\n")
    assert publish(folder, "--repo-type", "space", repo="me/other") == 2
    assert "sdk" in capsys.readouterr().err
    assert ("space", "me/other") not in hub.repos


def test_a_dry_run_shows_all_and_sends_nothing(hub, directory, capsys, monkeypatch):
    assert publish(directory, "--dry-run") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    size = f"{(directory / 'model.safetensors').stat().st_size:,}"
    assert [size, "LFS", "new", "model.safetensors"] in rows
    assert hub.repos == {}
    assert publish(directory) == 0
    (directory / "summary.json").write_text(
        json.dumps({**json.loads((directory / "summary.json").read_text()), "x": 1})
    )
    capsys.readouterr()
    asked = len(hub.requests)
    assert publish(directory, "--dry-run") == 0
    rows = {row.split()[-1]: row.split()[-2] for row in capsys.readouterr().out.splitlines()[1:]}
    assert rows["summary.json"] == "changed"
    assert rows["model.safetensors"] == "same"
    assert all(request.startswith("GET") for request in hub.requests[asked:])
    monkeypatch.delenv("HF_TOKEN")  # not needed to look
    assert publish(directory, "--dry-run", repo="me/other") == 0
    assert " new " in capsys.readouterr().out
    monkeypatch.setattr(command, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    assert publish(directory, "--dry-run") == 0
    printed = capsys.readouterr()
    assert " ? " in printed.out
    assert "cannot be reached" in printed.err


# ---- what does not


SECRETS = ["hf_" + "aB3" * 12, "ghp_" + "a1" * 18, "sk-ant-" + "a1" * 20, "AKIA" + "A1B2" * 4, "AIza" + "a" * 35]
PATHS = ["/home/anna/data", "/Users/anna/data", "/root/data", "C:\\\\Users\\\\anna", str(ROOT / "runs")]


@pytest.mark.parametrize("text", [*SECRETS, *PATHS], ids=range(len(SECRETS + PATHS)))
def test_the_scan_finds_it_with_file_and_line(tmp_path, text):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "results.json").write_text('{"a": 1,\n "b": "%s"}\n' % text)  # noqa: UP031 braces
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff" + text.encode() + b"\0")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"from": text.replace("\\\\", "\\")})
    found = {finding.path: finding for finding in scan(tmp_path)}
    assert {path: finding.place for path, finding in found.items()} == {
        "deep/results.json": "2",
        "picture.png": f"byte {7 if text[0] == 'C' else 6}",  # of C:, the colon
        "x.safetensors": "metadata",
    }
    assert text in SECRETS or "relative to the repository" in str(found["picture.png"])
    assert text in PATHS or (text not in str(found["picture.png"]) and "revoke" in str(found["picture.png"]))


def test_the_scan_knows_what_is_no_secret(tmp_path):
    (tmp_path / "fine.md").write_text(
        "hf_hub_download(...), https://hf.co/home/x, see docs/home/index.md, and/or, /usr/bin/python, `~/x`\n"
        "bos_token: '<s>', sk-learn, 1/2/3, tokenizer-e351c8d8-checkpoint125.safetensors, <a href='/models/x'>\n"
    )
    (tmp_path / "empty").touch()
    save_file({"/root/x": torch.zeros(1)}, tmp_path / "weights.bin")
    (tmp_path / "weights.bin").unlink()
    assert scan(tmp_path) == []
    assert len(scan(tmp_path, known=["e351c8d8"])) == 1


def test_a_finding_stops_everything(hub, directory, capsys):
    path = directory / "evaluation" / "quality" / "results.json"
    results = json.loads(path.read_text())
    results["command"] = "mimi evaluate /home/anna/speech"
    path.write_text(json.dumps(results, indent=1))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "anna" in text)
    for options in [], ["--dry-run"]:
        assert publish(directory, *options) == 2
        printed = capsys.readouterr()
        assert f"evaluation/quality/results.json:{line}: a private path (/home/anna/speech)" in printed.err
    assert "model.safetensors" in printed.out
    assert hub.repos == {}


@pytest.fixture
def folder(tmp_path):
    """A staged folder that needs no model: two large files and a small one."""
    folder = tmp_path / "staged"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(name.encode() + bytes(100_000))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def nowhere(hub):
    hub.url = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("token", "exists", "change", "words"),
    [
        (None, False, None, "There is no token"),
        ("hf_wrong", False, None, "refuses the token"),
        ("hf_wrong", True, None, "refuses the token"),
        (READER, False, None, "may not write to the model me/mimi"),
        (READER, True, None, "may not write to the model me/mimi"),
        (READER, True, lambda hub: setattr(hub.repo(REPO), "gated", True), "is gated"),
        (TOKEN, False, nowhere, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, folder, monkeypatch, token, exists, change, words):
    monkeypatch.delenv("HF_TOKEN")
    if exists:
        hub.add(REPO, {})
    if change:
        change(hub)
    with pytest.raises(PublishError, match=words) as caught:
        publishing.publish(folder, Target(REPO), "x", HfApi(endpoint=hub.url, token=token))
    assert "\n" not in str(caught.value)
    assert not hub.count("/commit/")


def test_a_directory_without_a_model_and_a_bad_name_get_a_sentence(hub, directory, tmp_path, capsys):
    assert publish(tmp_path / "nothing") == 2
    assert "There is no model in" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    assert publish(tmp_path) == 2
    assert "'encodec', not a Mimi" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert publish(tmp_path) == 2
    assert "Could not load the model" in capsys.readouterr().err
    assert publish(directory, repo="a/b/c") == 2
    assert "a/b/c" in capsys.readouterr().err
    hub.add(REPO, {})
    assert publish(directory, "--private") == 2
    assert "public already" in capsys.readouterr().err


def test_somebody_elses_commit_is_not_overwritten(hub, directory, capsys, monkeypatch):
    """It comes between looking at the Hub and committing."""
    compare = publishing.compare
    monkeypatch.setattr(publishing, "compare", lambda *args: (compare(*args), hub.add(REPO, {"x": b"y"}))[0])
    assert publish(directory) == 2
    assert "meanwhile" in capsys.readouterr().err
    assert titles(hub) == ["added", "initial commit"]


def test_any_other_answer_is_told():
    httpx = huggingface_hub.utils.httpx
    request = httpx.Request("GET", "http://127.0.0.1")
    response = httpx.Response(500, headers={"X-Error-Message": "on fire"}, request=request)
    error = huggingface_hub.errors.HfHubHTTPError("500", response=response)
    wrapped = RuntimeError("Error while uploading 'x'")
    wrapped.__cause__ = error
    for raised in error, wrapped:
        assert "answers 500 for the model me/mimi: on fire" in explain(raised, Target(REPO))


# ---- when it breaks


CLIENT = f"""
import sys
from huggingface_hub import HfApi
from hub_cards.publish import Target, publish
publish(__import__("pathlib").Path(sys.argv[1]), Target("{REPO}"), "x", HfApi())
"""


def kill_while_uploading(hub, arguments, home):
    """SIGKILL to a client when one large file is up and the next is not; what went up is what the Hub holds."""
    hub.held_puts = {2}
    environment = {**hub.environment(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = home.with_name("errors.txt")
    with errors.open("wb") as file:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, cwd=home.parent, stderr=file)
    try:
        while not (hub.holding.wait(0.05) and hub.objects):
            assert process.poll() is None, errors.read_text()
    finally:
        process.kill()
        process.wait()
    hub.held_puts = set()
    assert titles(hub) == ["initial commit"]
    assert hub.repo(REPO).at("main").files.keys() == INITIAL.keys()


def test_killed_while_uploading_it_goes_on_and_nothing_was_to_be_seen(hub, folder, tmp_path):
    kill_while_uploading(hub, ["-c", CLIENT, str(folder)], tmp_path / "home")
    [there], asked = hub.objects, len(hub.requests)
    publishing.publish(folder, Target(REPO), "x", HfApi(endpoint=hub.url))
    [again] = [request for request in hub.requests[asked:] if request.startswith("PUT")]
    assert there not in again
    assert titles(hub) == ["x", "initial commit"]
    assert publishing.publish(folder, Target(REPO), "x", HfApi(endpoint=hub.url))[0] is None


def test_a_connection_that_breaks_is_tried_again(hub, folder):
    hub.dropped_puts = {1}
    publishing.publish(folder, Target(REPO), "x", HfApi(endpoint=hub.url))
    assert hub.puts == 3
    assert hub.repo(REPO).at("main").files.keys() - INITIAL.keys() == {"README.md", "a.safetensors", "b.safetensors"}


@pytest.mark.slow
def test_the_whole_command_goes_on_after_a_kill(hub, directory, tmp_path):
    command_line = ["-m", "hub_cards", "publish", str(directory), REPO, "--native"]
    kill_while_uploading(hub, command_line, tmp_path / "home")
    there, asked = set(hub.objects), len(hub.requests)
    assert publish(directory, "--native") == 0
    again = {request.removeprefix("PUT /lfs/") for request in hub.requests[asked:] if request.startswith("PUT")}
    assert again
    assert not there & again
    assert len(titles(hub)) == 2


@pytest.mark.slow
def test_a_run_publishes_itself_as_it_goes(hub, tmp_path):
    """The trainer and the command, each in its process, and nothing in anyone's place."""
    recipe = str(ROOT / "training" / "recipes" / "debug.yaml")
    options = [
        f"--output_dir={tmp_path / 'run'}",
        "--trackers=[]",
        "--steps=20",
        f"--push.repo={REPO}",
        "--push.every=10",
    ]
    environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, "-m", "training", recipe, *options]
    done = subprocess.run(command_line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Step 20 is published" in done.stderr
    assert titles(hub)[1:-1]  # at least once on the way
    files = hub.repo(REPO).at("main").files
    assert json.loads(files["summary.json"].content)["steps"] == 20
    assert json.loads(hub.repo(REPO).at("main").parent.files["summary.json"].content)["steps"] == 10


# ---- the card alone


def test_the_card_command(directory, tmp_path, capsys):
    assert command.main(["card", str(directory)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("---\n")
    assert command.main(["card", str(directory), "-o", str(tmp_path / "out" / "card.md")]) == 0
    assert (tmp_path / "out" / "card.md").read_text().strip() == printed.strip()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["card.md"]
    assert command.main(["card", str(tmp_path / "nothing")]) == 2
    assert "Traceback" not in capsys.readouterr().err
