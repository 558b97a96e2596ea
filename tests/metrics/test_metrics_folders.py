"""The metrics' folders: complete, true to the table of scores, their cards' blocks and their apps run."""

import ast
import json
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import yaml
from test_metrics import HEAVY, ROOT, read
from test_metrics_of_words_phones_codes import items, unit

from training.metrics import METRICS, SCORES, load

SOURCES = sorted(path for path in ROOT.glob("training/metrics/**/*.py") if not path.is_symlink())
FORM = pytest.mark.filterwarnings("ignore:The inplace keyword")
"""How evaluate reads its form's table."""


@pytest.mark.parametrize("name", METRICS)
def test_the_table_says_what_the_metric_says(name):
    metric = load(name)
    scores = {key: value for key, value in SCORES.items() if value.metric == name}
    assert list(scores) == list(metric.scales)
    for key, value in scores.items():
        assert (value.unit, value.range, value.higher_is_better) == tuple(metric.scales[key])
        assert value.needs_reference == ("references" in metric.features)
        if rates := getattr(metric, "rates", ()):
            assert value.sampling_rate in rates
        direction = {True: "higher is better", False: "lower is better", None: "neither end is better"}
        assert f"\n- `{key}`: {metric.scales[key]}\n" in metric.description
        assert direction[value.higher_is_better] in metric.description
    assert metric.citation
    assert "predictions: " in metric.compute.__doc__ if metric.compute.__doc__ else metric.inputs_description


@pytest.mark.parametrize("name", METRICS)
def test_a_folder_is_complete(name):
    folder = METRICS[name]
    assert (folder / "audio_metric.py").resolve() == folder.parent / "audio_metric.py"
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["sdk"] == "gradio"
    assert front["tags"] == ["evaluate", "metric"]
    assert (folder / front["app_file"]).is_file()
    for score_name, value in SCORES.items():
        if value.metric == name:
            assert f"`{score_name}`" in card
    for option in re.findall(r"^    (\w+):", load(name).inputs, re.M):
        assert f"\n- `{option}`: " in card
    needed = (folder / "requirements.txt").read_text().split()
    for line in (folder / f"{name}.py").read_text().splitlines():
        if match := re.match(r"(?:import|from) (\w+)", line):
            package = match[1]
            assert (
                package in sys.stdlib_module_names
                or any(need.startswith(package) for need in needed)
                or (package == "pyarrow")
            ), package  # datasets brings it


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_and_functions_can_be_read(path):
    text = path.read_text()
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, node.name


def run_card(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (METRICS[name] / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{name}/README.md", "exec"), {})


@pytest.mark.parametrize("name", [name for name in METRICS if name not in HEAVY])
def test_blocks_of_a_card_run(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run_card(name)
    assert capsys.readouterr().out.strip()


def run_app(name: str, monkeypatch, **columns: list) -> dict:
    """The Space of a metric, as a Space runs it: its folder first on the path. What its form gives for these rows."""
    import pandas

    forms = []
    parts = SimpleNamespace(Dataframe=lambda **kwargs: None, Textbox=lambda **kwargs: None)
    interface = lambda **kwargs: forms.append(kwargs) or SimpleNamespace(launch=lambda: None)  # noqa: E731
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Interface=interface, inputs=parts, outputs=parts))
    monkeypatch.syspath_prepend(METRICS[name])
    runpy.run_path(str(METRICS[name] / "app.py"), run_name="__main__")
    assert "## How to use" in forms[0]["article"]
    return forms[0]["fn"](pandas.DataFrame({key: [json.dumps(row) for row in rows] for key, rows in columns.items()}))


@FORM
def test_the_app_of_a_metric_that_is_called_like_its_package(monkeypatch):
    """`pesq.py` of the Space comes before the package `pesq` on its path."""
    for module in [module for module in sys.modules if module.split(".")[0] == "pesq"]:
        monkeypatch.delitem(sys.modules, module)
    wave = read(16_000)[0].tolist()
    assert run_app("pesq", monkeypatch, predictions=[wave], references=[wave])["pesq_wb"] == pytest.approx(
        4.644, abs=1e-3
    )


@FORM
def test_the_apps_of_metrics_of_other_things(monkeypatch):
    assert run_app("codebook_usage", monkeypatch, predictions=[[[0, 1], [2, 2]]])["nominal_bitrate"] == 275
    found = run_app(
        "abx", monkeypatch, predictions=[unit([0, 90, 0, 90]).tolist()], references=[items(*"abab", length_s=0.08)]
    )
    assert found["abx_within"] == 0


@pytest.mark.parametrize("name", METRICS)
def test_every_app_loads_its_own_metric_ready_for_its_form(name):
    tree = ast.parse((METRICS[name] / "app.py").read_text())
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load"
    ]
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    metric = load(name, **options)
    if hasattr(metric, "rates"):
        assert metric.check_rate(metric.options["sampling_rate"])
    assert f'with_name("{name}.py")' in (METRICS[name] / "app.py").read_text()
