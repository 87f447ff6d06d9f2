"""The layout: no import of this project runs upward or in a circle, and importing a module does nothing else. The code
style: ruff with the settings of pyproject.toml."""
import ast
from importlib.util import find_spec

import pytest
from conftest import ROOT, python

LAYERS = [  # each module may import, at the top or within a function, what stands in a line above its own
    ["kernels.dispatch", "kernels.timer", "weights", "photos", "photos.pictures"],
    ["weights.configs", "weights.dtypes", "weights.files", "photos.restorer"],
    ["runs"],
    ["kernels.dcae", "kernels.depthwise", "kernels.linear_attention", "kernels.norms", "fast.winograd", "fast.graphs"],
    ["kernels"],
    ["sanasr", "photos.degrade", "photos.swin"],
    ["photos.tagger", "linearsr"],
    ["fast", "photos.pairs", "metrics.perceptual", "metrics.iqa"],
    ["metrics.classic"],
    ["metrics"],
    ["metrics.score", "objective", "trainer", "photos.kinds"],
    ["autoencoder"],
    ["metrics.report", "lab", "lab.profile", "lab.stability", "lab.stages"],
    ["eval", "train", "linearsr.flow"],
    ["prune", "linearsr.train", "lab.bench", "kernels.bench", "weights.__main__", "examples.comparison"],
    ["lab.prior", "lab.ablation", "lab.bundled", "lab.gpu"],
    ["lab.linearsr"],
    ["lab.faults"],
]
PLACE = {name: i for i, names in enumerate(LAYERS) for name in names}


def imports(name, path, known):
    """The project's modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & set(known)) - {name}


def test_no_import_runs_upward_or_in_a_circle(tmp_path):
    (tmp_path / "x.py").write_text("import eval\ndef f():\n    from metrics import score\n    import metrics.report\n")
    files = {p.relative_to(ROOT).with_suffix("").parts: p for p in ROOT.rglob("*.py")}
    known = {".".join(parts).removesuffix(".__init__"): p for parts, p in files.items()
             if parts[0] != "tests" and not any(part.startswith(".") for part in parts)}
    assert imports("x", tmp_path / "x.py", known) == {"eval", "metrics", "metrics.score", "metrics.report"}
    assert set(known) == set(PLACE), f"LAYERS lacks or has in excess: {sorted(set(known) ^ set(PLACE))}"
    wrong = [f"{name} imports {other}" for name, path in known.items() for other in imports(name, path, known)
             if PLACE[other] >= PLACE[name]]
    assert not wrong, wrong


def test_importing_has_no_side_effect(tmp_path):
    """Nothing is printed or written, no thread count, seed, signal handler or allocator setting changes."""
    code = """
import importlib, signal, torch
def state():
    flags = torch.backends.cudnn.deterministic, torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype()
    return torch.get_num_threads(), torch.initial_seed(), signal.getsignal(signal.SIGINT), flags
before = state()
for name in "sanasr runs photos.pairs objective trainer fast eval train prune linearsr.train".split():
    importlib.import_module(name)
    assert state() == before, (name, before, state())"""
    run = python("-c", code, cwd=tmp_path, OMP_NUM_THREADS=1)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", ""), run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed (requirements-dev.txt)")
def test_ruff_finds_nothing():
    run = python("-m", "ruff", "check", "--no-cache", "--output-format", "concise")
    assert run.returncode == 0, run.stdout + run.stderr
