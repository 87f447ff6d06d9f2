"""What python -m lab.profile says: the official sizes' counts, and its table."""
import json

import pytest
import torch
from conftest import DATA

from lab import profile
from lab.profile import count_macs, parameters, stages
from sanasr import DCAE, Gemma2, LinearDiT


def config(name):
    return json.loads((DATA / "model" / f"{name}.json").read_text())["config"]


def on_meta(layers=28):
    """The three networks of official size without weights; layers: of the transformer."""
    with torch.device("meta"):
        return (DCAE(config("dcae_f32c32_sana")), LinearDiT(config("dit_sana_600m") | {"num_layers": layers}),
                Gemma2(config("gemma2_2b")))


def test_the_official_sizes():
    vae, dit, text = networks = on_meta()
    assert round(parameters(dit) / 1e6, 2) == 591.75
    assert round(parameters(on_meta(layers=16)[1]) / 1e6, 2) == 343.99
    assert round(parameters(vae) / 1e6, 2) == 312.25
    assert round(parameters(vae.encoder) / 1e6, 2) == 153.03 and round(parameters(vae.decoder) / 1e6, 2) == 159.22
    assert round(parameters(text) / 1e9, 2) == 2.61
    macs = {name: round(count_macs(function, *args) / 1e9)
            for name, _, function, args in stages(*networks, 512, 300)}
    assert macs == {"text": 617, "encode": 647, "dit": 158, "decode": 1046}


def test_the_command(tiny_model, capsys):
    line = ["--model", str(tiny_model), "--device", "cpu"]
    profile.main(["--side", "64", *line])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[2:]] == ["text", "encode", "dit", "decode", "all"]
    columns = [[float(x) for x in line.replace(" M", "").replace(" G", "").split()[-3:]] for line in out[3:]]
    assert all(ms > 0 for _, _, ms in columns)
    assert sum(row[0] for row in columns[:-1]) == pytest.approx(columns[-1][0], abs=0.02)
    for options, said in ((["--side", "100"], "--side 100: the side must be a multiple of 32"),
                          (["--steps", "0"], "--steps must be at least 1, not 0"),
                          (["--steps", "5"], "takes one step")):
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            profile.main([*options, *line])
