"""The rewrites of fast.py give what the plain path gives, on the smallest models that have every part."""
import json
from copy import deepcopy

import pytest
import torch
from conftest import DATA
from PIL import Image
from seeded import seeded_input, seeded_state_dict
from tiny import tiny_model

import fast
from sanasr import DCAE, LinearDiT, SanaSR, inject_lora


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def load(cls, name, dtype=torch.float32):
    manifest = json.loads((DATA / "model" / f"{name}.json").read_text())
    model = cls(manifest["config"])
    model.load_state_dict(seeded_state_dict(manifest["tensors"]), strict=True)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("batch, height, width", [(1, 64, 96), (2, 96, 64)])
@pytest.mark.parametrize("rewrites", [*([name] for name in fast.REWRITES), list(fast.REWRITES)], ids="+".join)
@torch.inference_mode()
def test_vae(rewrites, batch, height, width):
    plain = load(DCAE, "dcae_small")
    x = seeded_input("x", (batch, 3, height, width))
    quick = fast.optimise_vae(deepcopy(plain), rewrites)
    assert any(type(m).__module__ == "fast" for m in quick.modules()) or rewrites == ["down"]
    z, before = plain.encode(x), x.clone()
    y, latents = plain.decode(z), z.clone()
    assert relative(quick.encode(x), z) < 1e-5
    assert relative(quick.decode(z), y) < 1e-5
    assert torch.equal(x, before) and torch.equal(z, latents)  # in place means inside only


@torch.inference_mode()
def test_vae_bfloat16_is_no_further_from_float32_than_the_plain_path():
    exact, plain = load(DCAE, "dcae_small"), load(DCAE, "dcae_small", torch.bfloat16)
    quick = fast.optimise_vae(deepcopy(plain))
    x = seeded_input("x", (1, 3, 64, 64))
    z = exact.encode(x)
    y = exact.decode(z)
    half = torch.bfloat16
    assert relative(quick.encode(x.to(half)), z) < 1.25 * relative(plain.encode(x.to(half)), z)
    assert relative(quick.decode(z.to(half)), y) < 1.25 * relative(plain.decode(z.to(half)), y)


@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_dit(batch):
    plain = load(LinearDiT, "dit_small")
    config = plain.config
    quick = fast.optimise_dit(deepcopy(plain))
    z = seeded_input("z", (batch, config["in_channels"], 4, 6))
    c = seeded_input("c", (batch, 7, config["caption_channels"]))
    mask = torch.ones(batch, 7)
    mask[-1, 4:] = 0
    t = torch.full((batch,), 900.0)
    for _ in range(2):  # the second call takes what the first has kept
        assert relative(quick(z, t, c, mask), plain(z, t, c, mask)) < 1e-5
    c[0, 0] += 1  # in place: kept by value, not by name
    assert relative(quick(z, t, c, mask), plain(z, t, c, mask)) < 1e-5
    assert relative(quick(z, t - 300, c, mask), plain(z, t - 300, c, mask)) < 1e-5
    mask[0, 0] = 0
    assert relative(quick(z, t, c, mask), plain(z, t, c, mask)) < 1e-5


def test_adapters_must_be_merged():
    dit = load(LinearDiT, "dit_small")
    inject_lora(dit, rank=2)
    with pytest.raises(ValueError, match="merge_lora"):
        fast.optimise_dit(dit)


def test_restore(tmp_path, monkeypatch):
    monkeypatch.setenv("SANASR_CACHE", str(tmp_path / "cache"))
    model = SanaSR.from_pretrained(tiny_model(tmp_path / "model"))
    image = Image.effect_noise((40, 24), 80).convert("RGB")
    plain = model.restore(image, "tree", tile=96)
    quick = fast.optimise(model).restore(image, "tree", tile=96)
    worst = max(abs(a - b) for a, b in zip(plain.tobytes(), quick.tobytes(), strict=True))
    assert worst <= 1  # one step of the rounding to 8 bits
