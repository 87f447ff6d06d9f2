"""The rehearsal of lab.gpu: every part on a CPU, tiny, so that a mistake does not cost the run on a real GPU."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# what a CPU cannot do is a row that says so
EXPECTED = {("bench", "graphs"), ("bench", "diffusers")}


def test_rehearsal(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lab.gpu", "--out", tmp_path, "--rehearse"]
    if importlib.util.find_spec("triton") is None:
        command += ["--parts", "goldens,bench,train,prune,carried"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    content, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert content["about"]["device"] == "no GPU" and text.startswith("# A rehearsal on a CPU")
    problems = {(name, row["what"]): row["problem"] for name, part in content["parts"].items() for row in part["rows"]
                if "problem" in row}
    assert set(problems) <= EXPECTED, problems
    assert "needs --device cuda" in problems["bench", "graphs"]
    for name, part in content["parts"].items():
        assert any("problem" not in row for row in part["rows"]) and f"## {name}" in text
    assert not (tmp_path / "work").exists()


def test_an_unknown_part_is_named(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lab.gpu", "--out", tmp_path, "--parts", "nothing"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: --parts nothing: no part is called 'nothing'\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "lab.gpu", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "finds no NVIDIA GPU here; --rehearse" in done.stderr
    assert not list(tmp_path.iterdir())
