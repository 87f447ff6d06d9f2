"""What python -m lab.profile says: the official sizes' counts, and its table."""
import pytest
from conftest import on_meta

from lab import profile
from lab.profile import count_macs, parameters, stages
from sanasr import DCAE, Gemma2, LinearDiT


def test_the_official_sizes():
    vae, text = on_meta(DCAE, "dcae_f32c32_sana"), on_meta(Gemma2, "gemma2_2b")
    dit, pruned = (on_meta(LinearDiT, "dit_sana_600m", num_layers=layers) for layers in (28, 16))
    millions = [round(parameters(part) / 1e6, 2) for part in (dit, pruned, vae, vae.encoder, vae.decoder)]
    assert millions == [591.75, 343.99, 312.25, 153.03, 159.22] and round(parameters(text) / 1e9, 2) == 2.61
    macs = {name: round(count_macs(function, *args) / 1e9)
            for name, _, function, args in stages(vae, dit, text, 512, 300)}
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
