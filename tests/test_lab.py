"""The measuring commands of lab/: gpu, rehearsed on a CPU, tiny, so that a mistake costs no run on a real GPU; profile;
stability."""
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import on_meta, photo, python

import autoencoder
import lab.profile
import lab.stability
import linearsr.train
import train
import weights
from lab import bundled, gpu, prior
from lab.profile import count_macs, parameters, stages
from lab.stability import STRENGTHS, degraded, stability
from photos.degrade import to_tensor
from sanasr import DCAE, Gemma2, LinearDiT

# --- gpu ---

@pytest.mark.parametrize("what, names, env", [
    ("correctness", ["linear_attention fp32", "pictures fp32, fast on"], {}),
    ("timings", ["card", "stages 512", "kernels"], {}),
    ("training", ["model", "train, VGG-shaped LPIPS", "prune"], {"OMP_NUM_THREADS": 1})])
def test_rehearsal(what, names, env, tmp_path):
    done = python("-m", "lab.gpu", what, "--out", tmp_path, "--rehearse", "--only", *names, **env)
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


@pytest.mark.parametrize("options, message", [
    (["--rehearse"], "holds results of a GPU"),
    (["--rehearse", "--only", "nothing"], "--only nothing: no such line; there are card, stages 512,"),
    pytest.param([], "finds no NVIDIA GPU here; --rehearse", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="about machines without a GPU"))])
def test_results_of_a_gpu_outlive_what_is_refused(tmp_path, options, message):
    (tmp_path / "gpu.json").write_text('{"rehearsal": false, "lines": {}}')
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        gpu.main(["timings", "--out", str(tmp_path), *options])
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"rehearsal": false, "lines": {}}']


# --- profile ---

def test_counts_of_the_official_sizes():
    vae, text = on_meta(DCAE, "dcae_f32c32_sana"), on_meta(Gemma2, "gemma2_2b")
    dit, pruned = (on_meta(LinearDiT, "dit_sana_600m", num_layers=layers) for layers in (28, 16))
    millions = [round(parameters(part) / 1e6, 2) for part in (dit, pruned, vae, vae.encoder, vae.decoder)]
    assert millions == [591.75, 343.99, 312.25, 153.03, 159.22] and round(parameters(text) / 1e9, 2) == 2.61
    macs = {name: round(count_macs(function, *args) / 1e9)
            for name, _, function, args in stages(vae, dit, text, 512, 300)}
    assert macs == {"text": 617, "encode": 647, "dit": 158, "decode": 1046}


def test_the_command_of_profile(tiny_model, capsys):
    line = ["--model", str(tiny_model), "--device", "cpu"]
    lab.profile.main(["--side", "64", *line])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[2:]] == ["text", "encode", "dit", "decode", "all"]
    columns = [[float(x) for x in line.replace(" M", "").replace(" G", "").split()[-3:]] for line in out[3:]]
    assert all(ms > 0 for _, _, ms in columns)
    assert sum(row[0] for row in columns[:-1]) == pytest.approx(columns[-1][0], abs=0.02)
    for options, said in ((["--side", "100"], "--side 100: the side must be a multiple of 32"),
                          (["--steps", "0"], "--steps must be at least 1, not 0"),
                          (["--steps", "5"], "takes one step")):
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            lab.profile.main([*options, *line])


# --- stability ---

def test_latents_that_are_the_pixels_change_as_they_do():
    seen, parameters = [], [torch.zeros(1)]
    vae = SimpleNamespace(factor=32, parameters=lambda: iter(parameters), encode=lambda x: seen.append(x) or 3 * x)
    changes = stability(vae, [photo(70, 100), photo(70, 100, 1)])
    assert list(changes) == [(kind, s) for kind, strengths in STRENGTHS.items() for s in strengths]
    for pixels, latents in changes.values():
        assert 0 < pixels < 1 and latents == pytest.approx(pixels, rel=1e-5)
    assert {x.shape for x in seen} == {(1, 3, 96, 64)}, "the central part, a multiple of 32"
    for kind, strengths in STRENGTHS.items():
        by_strength = [changes[kind, s][0] for s in strengths]
        assert by_strength == sorted(by_strength), f"{kind} grows"
    first, again, other = (stability(vae, [photo(70, 100)], seed)["noise", 15] for seed in (0, 0, 1))
    assert first == again != other, "the seed decides the noise"
    with pytest.raises(ValueError, match="32 pixels a side, one is 31×100"):
        stability(vae, [photo(31, 100)])


def test_each_degradation_does_what_it_says():
    x = to_tensor(photo(96, 96))
    rng = np.random.default_rng(0)
    noise = degraded(x, "noise", 15, rng) - x
    assert noise.std().item() * 255 == pytest.approx(15, rel=0.05)
    flat = torch.full((3, 64, 64), 128 / 255)  # which JPEG holds exactly
    for kind in ("blur", "JPEG", "down-sampling"):
        for strength in STRENGTHS[kind]:
            assert torch.allclose(degraded(flat, kind, strength, rng), flat), "nothing to lose in a flat picture"
            y = degraded(x, kind, strength, rng)
            assert y.shape == x.shape and not torch.equal(y, x)
            assert torch.allclose((y * 255).round() / 255, y)


def test_the_command_of_stability(tiny_model, tmp_path, capsys):
    for i in range(2):
        photo(64, 64, i).save(tmp_path / f"{i}.png")
    arguments = [str(tmp_path), "--model", str(tiny_model), "--device", "cpu"]
    lab.stability.main(arguments)
    out = capsys.readouterr().out
    assert "2 photos" in out and len(out.splitlines()) == 2 + 12 and "JPEG 30" in out
    lab.stability.main(arguments)
    assert capsys.readouterr().out == out
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(SystemExit, match="error: .*broken.png"):
        lab.stability.main(arguments)


# --- bundled ---

def test_every_line_that_makes_the_bundled_models_is_understood_and_run_once(here, photos, monkeypatch, capsys):
    """With commands that only parse their arguments and leave an empty result."""
    ran = []

    def leave(name, path):
        def command(args):
            ran.append(name(args))
            folder = Path(path(args))
            folder.mkdir(parents=True, exist_ok=True)
            for file in ("adapter.safetensors", "config.json", "provenance.json"):
                (folder / file).touch()
            return 0
        return command
    monkeypatch.setattr(bundled.DISTS, "from_pretrained", lambda: None)
    for module in (autoencoder, train):
        monkeypatch.setattr(module, "train", leave(
            lambda args: (args.run.name, args.tags, args.lpips) if args.learn == "adapter" else args.run.name,
            lambda args: args.run))
    monkeypatch.setattr(linearsr.train, "run_stage", leave(lambda args: args.stage, lambda args: args.root))
    monkeypatch.setattr(linearsr.train, "export", leave(lambda args: Path(args.to).name, lambda args: args.to))
    for name, option in (("train", "out"), ("export", "to"), ("write_tags", "to")):
        monkeypatch.setattr(prior, name, leave(lambda args, name=name: name, lambda args, o=option: getattr(args, o)))
    line = ["--data", str(photos), "--device", "cpu"]
    assert bundled.main(line) == 0
    learned = ["pixels", "sharp", "latent", "texture"]
    rest = [("warm", "none", None), ("adapter", "none", "alex"), "experts"]
    made = ["write_tags", "train", "export", "pretrain", "network", "export"]
    assert ran == [*learned, *made, *rest, "linearsr-embedded"]
    assert "14 of 14 stages to run, about" in capsys.readouterr().out
    ran.clear()
    assert bundled.main(line) == 0  # what sees for itself that nothing is left
    assert ran == [*learned, "train", "pretrain", *rest]
    ran.clear()
    (here / "runs/bundled/network/config.json").unlink()  # as if killed in the export
    assert bundled.main(line) == 0
    assert ran == [*learned, "train", "pretrain", "network", *rest]
    monkeypatch.setattr(bundled.DISTS, "from_pretrained", Mock(side_effect=weights.Unavailable("no VGG16")))
    ran.clear()
    with pytest.raises(SystemExit, match="error: no VGG16"):
        bundled.main(line)
    assert not ran, "it says so before anything is trained"
