"""What eval.py --profile says: the counts are torch's own, and those of the official sizes."""
import json

import pytest
import torch
from conftest import DATA
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluate
from lab.profile import count_macs, parameters, stages
from sanasr import DCAE, Gemma2, LinearDiT, inject_lora


def config(name):
    return json.loads((DATA / "model" / f"{name}.json").read_text())["config"]


def on_meta(vae="dcae_f32c32_sana", dit="dit_sana_600m", text="gemma2_2b", layers=None):
    """The three networks without weights; layers: of the transformer."""
    dit = config(dit)
    with torch.device("meta"):
        return DCAE(config(vae)), LinearDiT(dit | {"num_layers": layers or dit["num_layers"]}), Gemma2(config(text))


@pytest.mark.parametrize("sizes", [{}, {"vae": "dcae_small", "dit": "dit_small", "text": "gemma2_small"}])
@pytest.mark.parametrize("side, tokens", [(512, 300), (96, 7)])
def test_every_part_counts_as_torch_does(sizes, side, tokens):
    for name, part, function, args in stages(*on_meta(**sizes), side, tokens):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*args)
        assert 2 * count_macs(part, function, *args) == counter.get_total_flops(), name


@pytest.mark.parametrize("targets", ["attn", "attn+ffn"])
def test_adapters_count(targets):
    networks = on_meta(dit="dit_small")
    _, dit, function, args = stages(*networks, 96, 7)[2]
    bare = count_macs(dit, function, *args)
    with torch.device("meta"):
        inject_lora(dit, 4, targets=targets)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    assert 2 * count_macs(dit, function, *args) == counter.get_total_flops() > 2 * bare


def test_the_official_sizes():
    vae, dit, text = networks = on_meta()
    assert round(parameters(dit) / 1e6, 2) == 591.75
    assert round(parameters(on_meta(layers=16)[1]) / 1e6, 2) == 343.99
    assert round(parameters(vae) / 1e6, 2) == 312.25
    assert round(parameters(vae.encoder) / 1e6, 2) == 153.03 and round(parameters(vae.decoder) / 1e6, 2) == 159.22
    assert round(parameters(text) / 1e9, 2) == 2.61
    macs = {name: round(count_macs(part, function, *args) / 1e9)
            for name, part, function, args in stages(*networks, 512, 300)}
    assert macs["encode"] == 647 and macs["decode"] == 1046 and macs["dit"] == 158


def test_the_command(tiny_model, capsys):
    assert evaluate.main(["--profile", "64", "--model", str(tiny_model), "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[2:]] == ["text", "encode", "dit", "decode", "all"]
    columns = [[float(x) for x in line.replace(" M", "").replace(" G", "").split()[-3:]] for line in out[3:]]
    assert all(ms > 0 for _, _, ms in columns)
    assert sum(row[0] for row in columns[:-1]) == pytest.approx(columns[-1][0], abs=0.02)
    with pytest.raises(SystemExit):
        evaluate.main(["--profile", "100", "--model", str(tiny_model), "--device", "cpu"])
