"""lab.gpu: a rehearsal on a CPU, tiny, so that a mistake does not cost the run on a real GPU."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lab import gpu


@pytest.mark.parametrize("what, names, env", [
    ("correctness", ["linear_attention fp32", "pictures fp32, fast on"], {}),
    ("timings", ["card", "stages 512", "kernels"], {}),
    ("training", ["model", "train, VGG-shaped LPIPS", "prune"], {"OMP_NUM_THREADS": "1"})])
def test_rehearsal(what, names, env, tmp_path):
    command = [sys.executable, "-m", "lab.gpu", what, "--out", tmp_path, "--rehearse", "--only", *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines, text = json.loads((tmp_path / "gpu.json").read_text())["lines"], (tmp_path / "gpu.md").read_text()
    assert text.startswith("# A rehearsal on a CPU") and all(f"## {name}" in text for name in names)
    for name in set(names) - {"card"}:
        assert lines[name]["printed"] and not lines[name]["problem"], lines[name]
    assert set(lines) == set(names) and set(tmp_path.iterdir()) == {tmp_path / "gpu.json", tmp_path / "gpu.md"}


def test_a_good_result_outlives_a_failure_and_each_line_is_ended_at_its_time(tmp_path, monkeypatch):
    def lines_of(what, scratch, rehearse):
        return [gpu.Line(name, 1, [["-c", c]]) for name, c in (("a", code), ("b", "print(5)"))]
    monkeypatch.setattr(gpu, "lines_of", lines_of)
    for code, shown, since in (("print(7)", "7", None), ("raise ValueError(8)", "7", "exit code 1"),
                              ("import time; time.sleep(99)", "7", "its time was up"), ("print(9)", "9", None)):
        monkeypatch.setitem(gpu.SECONDS, "timings", 0.2 if "sleep" in code else 9)
        assert gpu.main(["timings", "--out", str(tmp_path), "--rehearse"]) == 0
        lines = json.loads((tmp_path / "gpu.json").read_text())["lines"]
        assert lines["a"]["printed"] == [shown] and (lines["a"].get("since") or "").startswith(since or "")
        assert bool(lines["a"].get("since")) == bool(since) and lines["b"]["printed"] == ["5"]


def test_an_unknown_line_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: --only nothing: no such line; there are card, stages 512,"):
        gpu.main(["timings", "--out", str(tmp_path), "--rehearse", "--only", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="finds no NVIDIA GPU here; --rehearse"):
        gpu.main(["timings", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
