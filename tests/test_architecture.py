"""The house: what may import what, what travels to the Hub, how long a file may be, and that documents are true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_mimi"
TRAVELS = sorted(
    [
        *PACKAGE.glob("modeling_*.py"),
        *(PACKAGE / f"{name}_mimi.py" for name in ("configuration", "feature_extraction", "pipeline")),
    ]
)
FILES = sorted(PACKAGE.glob("*.py"))
TRAINER = ROOT / "training"
TRAINER_FILES = sorted(TRAINER.glob("*.py"))
EVALUATION_FILES = sorted((TRAINER / "evaluation").glob("*.py"))
CORPUS_FILES = sorted((TRAINER / "corpus").glob("*.py"))
METRIC_FILES = sorted((TRAINER / "metrics").rglob("*.py"))
HUB_FILES = sorted((ROOT / "hub_cards").glob("*.py"))
PAGE_FILES = sorted((ROOT / "hub_cards" / "space").glob("*.py"))
SHARED = {"config", "spectral", "drawing", "muon"}
"""What every leaf of the trainer may import."""
LEAVES = {
    *("balancer", "checkpoints", "codebooks", "codec", "discriminators", "distillation", "draws", "ema", "history"),
    *("losses", "meters", "optimization", "pictures", "sources", "validation"),
}


def imports_of(path: Path) -> dict[str, set[str]]:
    """Absolute and relative imports of a file, as top-level package names and sibling modules."""
    found = {"absolute": set(), "relative": set()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found["absolute"] |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found["absolute"].add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path.name} reaches out of the package"
            assert node.module, f"{path.name}: `from . import x` does not travel to the Hub"
            found["relative"].add(node.module)
    return found


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: path.name)
def test_what_travels_imports_only_what_is_there(path):
    needed = {"torch", "numpy", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    assert set(get_imports(path)) <= needed  # as transformers counts before it runs remote code: none in a `try`
    assert imports_of(path)["absolute"] <= needed | {"soxr", "soundfile"}  # for other rates, and for files
    names = {other.stem for other in TRAVELS}
    assert imports_of(path)["relative"] <= names
    assert "TYPE_CHECKING" not in path.read_text()


@pytest.mark.parametrize(
    "files",
    [FILES, TRAINER_FILES, EVALUATION_FILES, CORPUS_FILES],
    ids=["modeling_mimi", "training", "evaluation", "corpus"],
)
def test_no_import_runs_back_up(files):
    remaining = {path.stem: imports_of(path)["relative"] for path in files}
    while remaining:
        leaves = {name for name, needs in remaining.items() if not needs & remaining.keys()}
        assert leaves, f"a circle among {sorted(remaining)}"
        remaining = {name: needs for name, needs in remaining.items() if name not in leaves}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_codec_knows_nothing_of_its_trainer(path):
    assert "training" not in imports_of(path)["absolute"]


def test_leaves_of_the_trainer_do_not_know_each_other():
    needs = {path.stem: imports_of(path)["relative"] for path in TRAINER_FILES}
    assert needs.keys() >= LEAVES
    for leaf in LEAVES:
        assert needs[leaf] <= SHARED, leaf
    assert [name for name in needs if "objective" in needs[name]] == ["learner"]
    assert [name for name in needs if "learner" in needs[name]] == ["trainer"]


def test_a_corpus_needs_data_and_no_trainer():
    for path in CORPUS_FILES:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        needs = {node.module for node in nodes if not node.level and node.module.startswith("training")}
        assert needs <= {"training.config", "training.sources", "training.history"}, path
        assert not imports_of(path)["absolute"] & {"hub_cards"}, path


def test_evaluation_needs_no_trainer_and_metrics_need_nobody():
    needs = {"training.config", "training.sources", "training.history", "training.drawing", "training.metrics"}
    for path in EVALUATION_FILES:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert {node.module for node in nodes if node.module.startswith("training")} <= needs, path
    for path in METRIC_FILES:  # each folder is a Space of its own
        assert not imports_of(path)["absolute"] & {"training", "modeling_mimi"}, path


@pytest.mark.parametrize(
    "path",
    [*FILES, *TRAINER_FILES, *EVALUATION_FILES, *CORPUS_FILES, *METRIC_FILES, *HUB_FILES, *PAGE_FILES],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_files_and_functions_can_be_read(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            assert node.end_lineno - start <= 60, f"{path.name}: {node.name}"


def test_the_map_from_paper_to_code_leads_somewhere():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| Paper |") :].split("\n\n")[0]
    targets = re.findall(r"`((?:modeling_mimi|training)/\w+\.py)`: `([\w.]+)`", table)
    assert len(targets) >= 18
    for path, name in targets:
        source = (ROOT / path).read_text()
        for part in name.split("."):
            assert re.search(rf"(class|def) {part}\b|^\s*{part}\b.*[:=]", source, re.M), f"{path}: {name}"


WITH_A_TINY_MODEL = """
import sys
from modeling_mimi import MimiModel

load = MimiModel.from_pretrained.__func__

def from_here(cls, name, *args, **options):
    return load(cls, sys.argv[1] if name == "kyutai/mimi" else name, *args, **options)

MimiModel.from_pretrained = classmethod(from_here)
"""


def test_blocks_of_the_readme_run(tiny_model, tmp_path):
    """Every Python block, in order and in one process, with a tiny model in the place of `kyutai/mimi`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 4
    tiny_model.save_pretrained(tmp_path)
    script = "\n".join([WITH_A_TINY_MODEL, *blocks, "assert speech.shape[1] == 1"])
    script = script.replace("num_quantizers=8", "num_quantizers=4")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT)
