"""Cards say what files say and nothing else, and their metadata is the Hub's."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hub_server import serve
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries

from hub_cards import rendering
from hub_cards.card import CardError, eval_results_files, metric_card, model_card, validate
from hub_cards.evaluations import compare, find_evaluations
from hub_cards.facts import Facts, derive, marked, settle, value
from training.evaluation.report import table

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "mimi_small"
METRICS = sorted(path.parent for path in ROOT.glob("training/metrics/*/app.py"))


@pytest.fixture
def directory(tmp_path) -> Path:
    """All of the checkpoint but its weights and its speed, to be changed."""
    left_out = shutil.ignore_patterns("*.safetensors", "benchmark.json")
    return shutil.copytree(CHECKPOINT, tmp_path / "mimi_small", ignore=left_out)


def change(path: Path, keys: str, *new) -> None:
    """Give a dotted key of a JSON or YAML file another value, or none at all."""
    load, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = load(path.read_text())
    *parents, last = [int(key) if key.lstrip("-").isdigit() else key for key in keys.split(".")]
    inner = content
    for key in parents:
        inner = inner[key]
    if new:
        inner[last] = new[0]
    else:
        del inner[last]
    path.write_text(dump(content))


def table_rows(card: ModelCard, heading: str) -> list[list[str]]:
    """The cells of the table whose first line begins so, that line and the one below left out."""
    found = re.search(rf"^\| {re.escape(heading)} \|.*\n\|.*\n((?:\|.*\n)+)", card.text, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


# ---- figures


def test_figures_follow_their_files(directory):
    assert "3,141 steps" not in model_card(directory).text
    change(directory / "summary.json", "steps", 3141)
    change(directory / "config.json", "sampling_rate", 22_050)
    change(directory / "summary.json", "parameters.codec", 7_650_000)
    card = model_card(directory)
    assert "3,141 steps" in card.text
    assert "| sampling rate | 22.05 kHz |" in card.text
    assert "| parameters | 7.7 M |" in card.text or "| parameters | 7.6 M |" in card.text


@pytest.mark.parametrize(
    ("name", "key", "writer"),
    [
        ("config.json", "frame_rate", "save_pretrained"),
        ("config.json", "codebook_size", "save_pretrained"),
        ("summary.json", "steps", "accelerate launch -m training"),
        ("summary.json", "parameters.codec", "accelerate launch -m training"),
        ("summary.json", "recipe.data.batch_size", "accelerate launch -m training"),
        ("evaluation/quality/results.json", "data.fingerprint", "mimi evaluate DIR DATA -o DIR/evaluation/quality"),
        ("evaluation/quality/results.json", "confidence", "mimi evaluate"),
        ("benchmark.json", "live.p50_ms", "small_checkpoint.py"),
    ],
)
def test_a_figure_without_a_file_is_refused(directory, name, key, writer):
    write_benchmark(directory)
    model_card(directory)
    change(directory / name, key)
    with pytest.raises(CardError, match=f'{name} has no "{key}".*{writer}'):
        model_card(directory)


def test_null_and_nonsense_are_no_figures(directory):
    change(directory / "summary.json", "steps", None)
    with pytest.raises(CardError, match=r'"steps" of summary.json is null'):
        model_card(directory)
    change(directory / "summary.json", "steps", {"a": 1})
    with pytest.raises(CardError, match=r'"steps" of summary.json is not a single value'):
        model_card(directory)
    change(directory / "summary.json", "steps", "many")
    with pytest.raises(CardError, match=r'"steps" of summary.json is \'many\', not a number'):
        model_card(directory)
    (directory / "summary.json").write_text("{")
    with pytest.raises(CardError, match=r"summary.json cannot be read .*: `accelerate launch"):
        model_card(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CardError, match=r"config.json is missing: `MimiModel.save_pretrained` writes it"):
        model_card(directory)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("notes", "It reaches a STOI of 0.9."),
        ("notes", "Twice as good.\n\n```\n8 dB better\n```"),
        ("sources.0.description", "German, 1 voice"),
        ("evaluations.quality.note", "All 242 clips."),
    ],
)
def test_people_declare_no_figures(directory, key, text):
    change(directory / "card.yaml", key, text)
    with pytest.raises(CardError, match=r"card.yaml has figures \((0\.9|8|1|242)\)"):
        model_card(directory)


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("It reaches 0.92.", "0.92"),
        ("{{ 8 }} codebooks", "8"),
        ("{{ config.codebook_size | value / 2 }} pairs", "1024.0"),  # computed past the facts
        ("| STOI |\n| --- |\n| **0.5** |", "0.5"),
        ("up to-3 dB", "3"),
        ("{{ config.num_quantizers }}0", "0"),  # beside a fact
    ],
)
def test_a_template_has_no_figures_of_its_own(directory, monkeypatch, text, figures):
    loader = rendering.jinja2.DictLoader({"model.md.jinja": text})
    monkeypatch.setattr(rendering.jinja2, "PackageLoader", lambda _: loader)
    with pytest.raises(CardError, match=rf"figures that no file backs: {figures}\. "):
        model_card(directory)


def test_what_is_no_figure():
    facts = Facts(CHECKPOINT)
    size = facts.read("config.json").codebook_size
    assert settle(f"{size} and {marked(derive(value(size) / 3, size), '{:.1f}'.format)}") == "2048 and 682.7"
    for text in ("int8, Whisper-base and x86", "https://a.b/2.0/3", "arXiv:2410.00037", "```python\nx = 8\n```"):
        assert settle(text) == text
    assert facts.used == {"config.json"}


# ---- what is there, and what is not


def test_what_was_not_run_is_left_out(directory):
    for name in ("summary.json", "card.yaml", "curves.png"):
        (directory / name).unlink()
    shutil.rmtree(directory / "evaluation")
    card = model_card(directory)
    for absent in ("Training", "Measured", "Speed", "curves", "null", "None,"):
        assert absent not in card.text
    assert "Its quality has not been measured" in card.text
    assert "None has been declared" in card.text
    assert [row[0] for row in table_rows(card, "codebooks")] == ["1", "2", "4", "8"]
    data = card.data.to_dict()
    assert not data.keys() & {"license", "metrics", "model-index", "model_name", "base_model", "datasets", "language"}


def test_a_folder_of_a_run(directory):
    (directory / "model").mkdir()
    (directory / "config.json").rename(directory / "model" / "config.json")
    assert 'from_pretrained("mimi_small/model")' in model_card(directory).text


def write_benchmark(directory: Path) -> None:
    """Made up, in the form of `tests/benchmarks/small_checkpoint.py -o`."""
    found = {
        "command": "python tests/benchmarks/small_checkpoint.py mimi_small -o benchmark.json",
        "seconds": 30,
        "dtype": "float32",
        "live": {"frame_ms": 80.0, "p50_ms": 12.34, "p99_ms": 23.45, "times_real_time": 6.48},
        "whole": {"encode_times_real_time": 98.7, "decode_times_real_time": 123.4},
        "machine": {"processor": "A CPU", "cpus": 2, "threads": 1},
        "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    (directory / "benchmark.json").write_text(json.dumps(found))


def test_speed_with_the_command_that_measured_it(directory):
    assert "## Speed" not in model_card(directory).text
    write_benchmark(directory)
    text = model_card(directory).text
    assert "| 12.3 ms |" in text
    assert "| live, times real time | 6.5 |" in text
    assert "A CPU, 1 of 2 CPUs, torch 2.13.0" in text
    assert "```bash\npython tests/benchmarks/small_checkpoint.py mimi_small -o benchmark.json\n```" in text


def test_every_source_has_a_licence_or_says_that_it_has_none(directory):
    mix = [
        {"path": "speech", "where": {"source": ["a/b"]}, "weight": 0.6},
        {"path": "c/d", "where": {}, "weight": 0.3},
        {"path": "more", "where": {}, "weight": 0.6},
    ]
    declared = [
        {"source": "a/b", "license": "CC-BY-9.9", "description": "German, one voice"},
        {"source": "c/d", "license": "CC0-1.0"},
    ]
    change(directory / "summary.json", "recipe.data.sources", mix)
    change(directory / "card.yaml", "sources", declared)
    assert table_rows(model_card(directory), "training data") == [
        ["a/b", "CC-BY-9.9", "German, one voice", "40"],
        ["c/d", "CC0-1.0", "", "20"],
        ["more", "not declared", "", "40"],
    ]


def test_each_number_of_codebooks_with_its_bitrate_and_scores(directory):
    results = json.loads((directory / "evaluation/quality/results.json").read_text())
    own = [codec for codec in results["codecs"] if codec["family"] == results["codecs"][-1]["family"]]
    rows = table_rows(model_card(directory), "codebooks")
    assert [float(row[1]) * 1000 for row in rows] == [codec["bitrate"] for codec in own]
    stoi = own[-1]["scores"]["stoi"]
    assert rows[-1][2].startswith(f"{stoi['mean']:.3g} ± ")
    assert float(rows[-1][2].split("± ")[1]) == pytest.approx(
        max(stoi["high"] - stoi["mean"], stoi["mean"] - stoi["low"]), rel=0.05
    )


def test_results_belong_to_the_table_and_to_the_model(directory):
    results = directory / "evaluation/quality/results.json"
    before = results.read_text()
    change(results, "codecs.-1.scores.stoi.mean", 0.7777)
    with pytest.raises(CardError, match=r"quality/table.md does not show stoi of .* as .*results.json has it"):
        model_card(directory)
    results.write_text(before)
    change(directory / "config.json", "codebook_size", 1024)
    with pytest.raises(CardError, match=r"results.json is not the model of config.json: .* 137.5 bit/s"):
        model_card(directory)


def test_where_it_is_better_and_worse(directory):
    for other in directory.glob("evaluation/*"):
        if other.name != "quality":
            shutil.rmtree(other)
    path = directory / "evaluation/quality/results.json"
    results = json.loads(path.read_text())
    other, own = results["codecs"][1], results["codecs"][-1]
    results["codecs"] = [other, own]
    intervals = {  # own, other
        "stoi": ((0.6, 0.7), (0.5, 0.59)),
        "mel_distance": ((0.6, 0.7), (0.5, 0.59)),
        "pesq_wb": ((1.0, 2.0), (2.1, 3.0)),
        "si_sdr": ((1.0, 2.0), (1.9, 3.0)),
    }
    for index, codec in enumerate((own, other)):
        codec["scores"] = {
            name: {"mean": sum(pair[index]) / 2, "low": pair[index][0], "high": pair[index][1]}
            for name, pair in intervals.items()
        }
    results["scores"] = {name: results["scores"][name] for name in intervals}
    path.write_text(json.dumps(results))
    (path.parent / "table.md").write_text(table(results))
    facts = Facts(directory)
    [evaluation] = find_evaluations(facts, facts.read("config.json"))
    [row] = compare(evaluation)
    labels = [[value(label) for label in labels] for labels in (row.better, row.worse, row.alike)]
    assert labels == [["STOI"], ["mel distance", "PESQ-WB"], ["SI-SDR"]]
    assert "| STOI | mel distance, PESQ-WB | SI-SDR |" in model_card(directory).text


# ---- metadata


def test_metadata_is_the_hubs_own(directory):
    change(directory / "card.yaml", "base_model", "kyutai/mimi")
    change(directory / "card.yaml", "datasets", ["google/fleurs"])
    card = model_card(directory, "me/a-model")
    data = ModelCard(str(card)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "audio-to-audio")
    assert data.tags == ["mimi", "audio-codec", "neural-codec", "speech"]
    assert (data.base_model, data.datasets, data.model_name) == ("kyutai/mimi", ["google/fleurs"], "a-model")
    assert data.language == yaml.safe_load((directory / "card.yaml").read_text())["language"]
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    for path in directory.glob("evaluation/*/results.json"):
        results = json.loads(path.read_text())
        assert results["scores"].keys() <= set(data.metrics)
        for score, measured in results["codecs"][-1]["scores"].items():
            [found] = [result for result in data.eval_results if result.metric_type == score]
            assert found.metric_value == pytest.approx(measured["mean"], rel=1e-3)
            assert found.metric_args == {"num_quantizers": 8}
            assert found.dataset_name == results["data"]["path"]
            where = results["data"]["where"]
            assert all(f"{column}={'|'.join(kept)}" in found.dataset_config for column, kept in where.items())
            assert where or "=" not in (found.dataset_config or "")


def test_declared_text_is_text(directory):
    change(directory / "card.yaml", "language", ["de", False])  # what YAML makes of `no`
    with pytest.raises(CardError, match=r'"language" of card.yaml is not text'):
        model_card(directory)
    change(directory / "card.yaml", "language")
    change(directory / "card.yaml", "licence", "apache-2.0")
    with pytest.raises(CardError, match=r"card.yaml has licence; it may have .*license"):
        model_card(directory)
    (directory / "card.yaml").write_text("apache-2.0\n")
    with pytest.raises(CardError, match=r"card.yaml has no keys; it may have .*license"):
        model_card(directory)


def test_results_on_a_benchmark_of_the_hub(directory):
    assert eval_results_files(directory) == {}  # a folder of this machine is none
    change(directory / "card.yaml", "evaluations.quality.dataset", "me/benchmark")
    [(path, text)] = eval_results_files(directory, "me/mimi").items()
    assert path == ".eval_results/quality.yaml"
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(text))}
    results = json.loads((directory / "evaluation/quality/results.json").read_text())
    assert entries.keys() == results["codecs"][-1]["scores"].keys()
    assert entries["stoi"].dataset_id == "me/benchmark"
    assert entries["stoi"].value == pytest.approx(results["codecs"][-1]["scores"]["stoi"]["mean"], rel=1e-3)
    assert entries["stoi"].source_url.startswith("https://huggingface.co/me/mimi/")
    assert results["data"]["fingerprint"] in entries["stoi"].notes
    types = {result.dataset_type for result in model_card(directory).data.eval_results}
    assert types == {"me/benchmark", "audiofolder"}


def test_the_hub_validates(monkeypatch):
    card = model_card(CHECKPOINT)
    with serve() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        validate(card)
        assert hub.count("POST /api/validate-yaml") == 1
        monkeypatch.setattr(type(card), "__str__", lambda _: "# no metadata")
        with pytest.raises(CardError, match="changes on the way"):
            validate(card)
        monkeypatch.undo()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url + "/nothing")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        validate(card)


def test_what_the_hub_refuses(monkeypatch):
    card = model_card(CHECKPOINT)

    def refuse(_):
        raise ValueError('"license" must be one of ...')

    monkeypatch.setattr(type(card), "validate", refuse)
    with pytest.raises(CardError, match=r'The Hub refuses the card: "license" must be'):
        validate(card)


# ---- metrics


@pytest.mark.parametrize("folder", METRICS, ids=lambda path: path.name)
def test_cards_of_metrics(folder, monkeypatch, capsys):
    card = metric_card(folder)
    data = card.data.to_dict()
    assert (data["sdk"], data["app_file"], data["tags"]) == ("gradio", "app.py", ["evaluate", "metric"])
    assert len(data["short_description"]) <= 60
    import evaluate

    metric = evaluate.load(str(folder), keep_in_memory=True)
    for name in [*metric.features, *re.findall(r"^    (\w+):", metric.inputs, re.M)]:
        assert f"\n- `{name}`: " in card.text
    for name, scale in metric.scales.items():
        assert f"- `{name}`: {scale}" in card.text
    assert metric.citation in card.text
    monkeypatch.chdir(folder.parent)
    [block] = re.findall(r"```python\n(.*?)```", card.text, re.S)
    exec(compile(block, f"{folder.name}/README.md", "exec"), {})
    assert "predictions" in capsys.readouterr().out


def test_a_metric_is_named_like_its_folder(tmp_path):
    with pytest.raises(CardError, match=r"\w+.py is missing: a metric is a module"):
        metric_card(tmp_path)
