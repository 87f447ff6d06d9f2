"""LinearSR: the sampler on a distribution whose velocity is known, the experts' intervals, the restorer."""
import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from seeded import seeded_input, seeded_state_dict

import eval as evaluator
import fast
import lab.profile
import linearsr
from linearsr import BOUNDARIES, LinearSR, Stem, expert_of, sample, shifted, unshifted
from metrics import LPIPS
from photos.pictures import bicubic
from photos.restorer import tiled
from sanasr import DCAE, LinearDiT, PromptEncoder, SanaSR, inject_lora, lora_parameters, save_lora
from weights.files import save_module

STEM = {"channels": [8, 16, 24], "width": 64}

# --- the sampler, on a Gaussian mixture ---

WEIGHTS, MEANS, STD = torch.tensor([0.3, 0.7]).double(), torch.tensor([[-2.0, 1.0], [1.5, 0.5]]).double(), 0.3


def mixture_velocity(z, t):
    """E[ε − x_0 | z_t = z] for x_0 of the mixture Σ w_i N(μ_i, s²): z is n,2."""
    a, variance = 1 - t, (1 - t) ** 2 * STD ** 2 + t ** 2
    offset = z[:, None] - a * MEANS  # n,i,2
    chance = (WEIGHTS.log() - offset.square().sum(2) / (2 * variance)).softmax(1)
    x_0 = (chance[:, :, None] * (MEANS + a * STD ** 2 / variance * offset)).sum(1)
    return (z - x_0) / t  # ε = (z − (1 − t) x_0) / t


def gaussian(n):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double()


def test_sampler_reaches_the_moments():
    x = sample(mixture_velocity, gaussian(20_000), 200)
    mean = WEIGHTS @ MEANS
    centred = MEANS - mean
    covariance = (WEIGHTS[:, None, None] * centred[:, :, None] * centred[:, None]).sum(0) + STD ** 2 * torch.eye(2)
    assert (x.mean(0) - mean).abs().max() < 0.03
    assert (torch.cov(x.T) - covariance).abs().max() < 0.06
    nearest = torch.cdist(x, MEANS).argmin(1)
    assert abs((nearest == 0).double().mean() - 0.3) < 0.015


def test_error_falls_with_the_steps_as_eulers():
    z = gaussian(500)
    exact = sample(mixture_velocity, z, 4000)
    error = [(sample(mixture_velocity, z, n) - exact).abs().mean().item() for n in (20, 40, 80, 160)]
    ratios = [a / b for a, b in zip(error, error[1:], strict=False)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (error, ratios)


def test_one_step_gives_the_mean():
    z = gaussian(100)  # at t = 1 nothing is known of x_0
    assert torch.allclose(sample(mixture_velocity, z, 1), (WEIGHTS @ MEANS).expand(100, 2))
    for steps in (0, -3):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            sample(mixture_velocity, z, steps)


# --- intervals of t ---


def test_boundaries_send_each_t_to_its_expert():
    assert BOUNDARIES == (0.223, 0.875, 0.939)
    inside = {0.0: 0, 0.1: 0, 0.5: 1, 0.9: 2, 0.95: 3, 1.0: 3}
    upper_ends = {0.223: 0, 0.875: 1, 0.939: 2}  # an interval includes its upper end
    just_above = {np.nextafter(b, 1): k + 1 for b, k in upper_ends.items()}
    for t, k in {**inside, **upper_ends, **just_above}.items():
        assert expert_of(t) == k, t
    assert expert_of(0.0, ()) == expert_of(1.0, ()) == 0


def test_flow_shift():
    assert shifted(1.0) == 1 and shifted(0.0) == 0 and shifted(0.5) == 0.75
    u = np.linspace(0, 1, 11)
    assert np.allclose(unshifted(shifted(u)), u)
    # the share of a sampler's steps in each interval
    assert np.allclose([unshifted(b) for b in BOUNDARIES], [0.0873, 0.7, 0.8369], atol=1e-4)


@pytest.mark.parametrize("wrong", [[0.9, 0.5], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0], [0.5, float("nan")], ["x"], 3])
def test_boundaries_out_of_order(wrong):
    with pytest.raises(ValueError, match="boundaries must"):
        linearsr.check_boundaries(wrong)


# --- the network ---


@pytest.fixture(scope="module")
def dit(tiny_model):
    return LinearDiT.from_pretrained(tiny_model / "transformer", torch.float32)


@pytest.fixture(scope="module")
def vae(tiny_model):
    return DCAE.from_pretrained(tiny_model / "vae", torch.float32)


@pytest.fixture(scope="module")
def stem():
    """A trained-looking one."""
    stem = Stem(STEM)
    stem.load_state_dict(seeded_state_dict([(key, x.shape) for key, x in stem.state_dict().items()]))
    return stem.eval().requires_grad_(False)


@pytest.fixture
def lr():
    return seeded_input("lr", (2, 3, 32, 40))


def inputs(dtype=torch.float32):
    return (seeded_input("z", (2, 8, 4, 5)).to(dtype), torch.tensor([900.0, 13.0]),
            seeded_input("c", (2, 6, 32)).to(dtype), torch.ones(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_network_is_the_prior_to_the_last_bit(dit, lr, dtype):
    dit, stem = copy.deepcopy(dit).to(dtype), Stem(STEM).to(dtype)
    y = dit(*inputs(dtype), stem(lr.to(dtype)))
    assert torch.equal(y, dit(*inputs(dtype)))
    y.square().sum().backward()
    assert stem.proj.weight.grad.abs().max() > 0, "the new input channels learn at once"


def test_stem_and_embedding_are_one_layer_on_the_concatenation(dit, stem, lr):
    z, t, c, m = inputs()
    whole = LinearDiT(dit.config | {"in_channels": 8 + 24, "out_channels": 8})
    state = dit.state_dict()
    state["patch_embed.proj.weight"] = torch.cat([state["patch_embed.proj.weight"], stem.proj.weight], 1)
    whole.load_state_dict(state)
    features = lr
    for conv in stem.convs:
        features = torch.nn.functional.silu(conv(features))
    assert features.shape == (2, 24, 4, 5)
    expected = whole(torch.cat([z, features], 1), t, c, m)
    assert torch.allclose(dit(z, t, c, m, stem(lr)), expected, atol=1e-5)
    assert not torch.allclose(dit(z, t, c, m), expected, atol=1e-2)


# --- the restorer ---


class Prompts:
    """Text states without a text encoder: two tokens of the prompt's length."""

    def __call__(self, prompts, instruction=""):
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return (torch.stack([torch.full((2, 32), 0.01 * len(prompt)) for prompt in prompts]),
                torch.ones(len(prompts), 2))


class Recording(torch.nn.Module):
    """An expert that notes what it is called with, and where it is moved."""

    def __init__(self, network, name, log):
        super().__init__()
        self.network, self.name, self.log, self.config = network, name, log, network.config

    def forward(self, z, t, c, mask, condition):
        v = self.network(z, t, c, mask, condition)
        self.log.append((self.name, t.item(), z.clone(), condition.clone(), v))
        return v

    def to(self, device):
        self.log.append((self.name, str(device)))
        return self


def recorded(restorer):
    """The log of all its experts."""
    log = []
    restorer.experts = [Recording(expert, k, log) for k, expert in enumerate(restorer.experts)]
    return log


def photo(width=24, height=16):
    x = seeded_input("photo", (height, width, 3)).mul(40).add(128).clamp(0, 255).byte()
    return Image.fromarray(x.numpy())


@pytest.fixture
def make(dit, vae, stem):
    """make(number of experts, …) -> a LinearSR whose experts are copies of one network."""
    def make(experts=1, **options):
        return LinearSR([copy.deepcopy(dit) for _ in range(experts)], stem, vae, Prompts(), **options)
    return make


def same(a, b):
    return a.size == b.size and a.tobytes() == b.tobytes()


def test_restore_size_and_stages(make):
    restorer = make()
    for scale in (1, 2, 4):
        assert restorer.restore(photo(21, 13), scale=scale, steps=1).size == (21 * scale, 13 * scale)
    assert list(restorer.stages) == ["text", "stem", "dit", "decode"]


@pytest.mark.parametrize("scale, k", [(1, 4), (2, 2)])
def test_odd_sides_are_padded_not_stretched(make, scale, k):
    restorer, image = make(), photo(21, 13)
    x = np.pad(np.array(image), ((0, -13 % k), (0, -21 % k), (0, 0)), "edge")
    whole = restorer.restore(Image.fromarray(x), scale=scale, steps=1)
    assert same(restorer.restore(image, scale=scale, steps=1), whole.crop((0, 0, 21 * scale, 13 * scale)))


def test_restore_is_a_function_of_the_seed(make):
    restorer = make(4)
    first = restorer.restore(photo(), steps=3, seed=5)
    torch.manual_seed(123)
    torch.rand(7)
    assert same(restorer.restore(photo(), steps=3, seed=5), first)
    assert not same(restorer.restore(photo(), steps=3, seed=6), first)
    assert not same(restorer.restore(photo(), "a tree", steps=3, seed=5), first)


def test_four_copies_equal_one_expert(make):
    assert same(*(make(n).restore(photo(), steps=14, seed=1) for n in (1, 4)))


def test_each_step_is_its_experts_and_offload_moves_each_once(make):
    plain, offloading = make(4), make(4, offload=True)
    calls, log = recorded(plain), recorded(offloading)
    assert same(plain.restore(photo(), steps=20), offloading.restore(photo(), steps=20))
    assert [name for name, *_ in calls] == [expert_of(t / 1000) for _, t, *_ in calls]
    assert len(calls) == 20 and calls[0][1] == 1000 and {name for name, *_ in calls} == {0, 1, 2, 3}
    moves = [entry for entry in log if len(entry) == 2]
    assert moves == [(3, "cpu"), (3, "cpu"), (2, "cpu"), (2, "cpu"), (1, "cpu"), (1, "cpu"), (0, "cpu")]  # to and fro


def test_tiles_share_one_noise_and_have_no_order(make):
    restorer = make()
    log = recorded(restorer)
    restorer.restore(photo(40, 24), steps=2, tile=0)
    z, e = log[0][2:4]
    assert z.shape == (1, 8, 3, 5)
    log.clear()
    forwards = restorer.restore(photo(40, 24), steps=2, tile=96)
    tiles = log[:len(log) // 2]  # of the first step
    assert [t[2].shape[2:] for t in tiles] == [(3, 3)] * 2
    for _, _, part, condition, _ in tiles:  # crops of the whole picture's noise and condition
        assert any(torch.equal(part, z[..., i:i + 3]) and torch.equal(condition, e[..., i:i + 3]) for i in range(3))

    def backwards(f, x, progress=None, **sides):
        if sides:
            return tiled(f, x, 3, 0, **sides)
        parts = []
        tiled(lambda part: parts.append(part) or part, x, 3, 0)
        results = iter([f(part) for part in reversed(parts)][::-1])
        return tiled(lambda part: next(results), x, 3, 0)
    restorer.tiling = lambda tile: backwards
    assert same(restorer.restore(photo(40, 24), steps=2), forwards)


def test_tiles_of_a_network_without_a_view_of_neighbours_change_nothing(dit, vae, stem):
    class Pointwise(torch.nn.Module):
        config = dit.config

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, z, t, c, mask, condition):
            return torch.tanh(z) + condition[:, :8] * t.item() / 1000
    restorer = LinearSR([Pointwise()], stem, vae, Prompts())
    restorer.decode = lambda z, *_: z
    whole, *others = (restorer.restore(photo(48, 40), steps=5, tile=tile) for tile in (0, 96, 128))
    assert all(torch.allclose(whole, z, atol=1e-5) for z in others)


def test_guidance(make):
    restorer = make()
    restorer.decode = lambda z, *_: z
    found = {cfg: restorer.restore(photo(), "a tree", steps=1, cfg=cfg) for cfg in (0.0, 1.0, 2.0, 3.0)}
    empty = restorer.restore(photo(), "", suffix="none", steps=1)
    assert torch.allclose(found[0.0], empty, atol=1e-6)
    assert torch.allclose(found[3.0] - found[2.0], found[1.0] - empty, atol=1e-5)  # linear in cfg for a single step
    assert not torch.allclose(found[1.0], empty, atol=1e-4)


def test_progress_counts_tiles_of_all_steps(make):
    seen = []
    make().restore(photo(40, 24), steps=2, tile=96, progress=lambda *a: seen.append(a))
    assert [s[1:] for s in seen if s[0] == "dit"] == [(i, 4) for i in range(5)]


def test_parts_that_do_not_fit(make, dit, vae):
    with pytest.raises(ValueError, match="3 boundaries need 4 experts, there are 2"):
        make(2)
    with pytest.raises(ValueError, match="a transformer of width 96, not of 64"):
        LinearSR([dit], Stem(STEM | {"width": 96}), vae, Prompts())
    with pytest.raises(ValueError, match="Stem config: channels must be three"):
        Stem(STEM | {"channels": [8, 8]})


# --- folders ---


@pytest.fixture
def folder(tmp_path, tiny_model, dit, stem):
    """A LinearSR folder beside its base: config.json, transformer/, stem/, experts/."""
    shutil.copytree(tiny_model, tmp_path / "base")
    made = tmp_path / "linear"
    save_module(dit, made / "transformer")
    save_module(stem, made / "stem")
    for k in range(4):
        torch.manual_seed(k)
        expert = copy.deepcopy(dit)
        inject_lora(expert, 2, targets="attn+ffn")
        with torch.no_grad():
            for p in lora_parameters(expert).values():
                p.normal_(std=0.1)
        save_lora(expert, made / "experts" / f"{k}.safetensors", {"system": "linearsr"})
    write_config(made)
    return made


def write_config(folder, **changes):
    config = {"system": "linearsr", "base": "../base", "boundaries": list(BOUNDARIES), "suffix": "none"} | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_from_pretrained(folder, dit):
    restorer = LinearSR.from_pretrained(folder)
    assert len(restorer.experts) == 4 and restorer.boundaries == BOUNDARIES
    weights = [expert.transformer_blocks[0].attn1.to_q.weight for expert in restorer.experts]
    assert all(not torch.equal(w, dit.transformer_blocks[0].attn1.to_q.weight) for w in weights)
    assert not torch.equal(weights[0], weights[1])
    assert same(restorer.restore(photo(), "tree", steps=12), LinearSR.from_pretrained(folder, offload=True).restore(
        photo(), "tree", steps=12))
    assert isinstance(restorer.prompts, PromptEncoder)


def test_one_network_without_experts(folder, dit):
    shutil.rmtree(folder / "experts")
    write_config(folder, boundaries=[])
    restorer = LinearSR.from_pretrained(folder)
    assert restorer.boundaries == () and len(restorer.experts) == 1
    assert torch.equal(restorer.experts[0].proj_out.weight, dit.proj_out.weight)


def error_of(folder, cls=LinearSR, **options):
    with pytest.raises((OSError, ValueError)) as caught:
        cls.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("changes, words", [
    (dict(boundaries=[0.9, 0.5]), "config.json: boundaries must rise within (0, 1), not 0.9, 0.5"),
    (dict(system="sana-sr"), 'no "system": "linearsr"'), (dict(suffix=5), "config.json: suffix must be a text"),
    (dict(base="../elsewhere"), "elsewhere")])
def test_configs_that_do_not_fit(folder, changes, words):
    write_config(folder, **changes)
    assert words in error_of(folder)


def test_folders_that_do_not_fit(folder, tiny_model):
    assert "no LinearSR folder" in error_of(tiny_model)
    (folder / "experts" / "2.safetensors").unlink()
    assert "experts/2.safetensors: missing, config.json names 3 boundaries" in error_of(folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in error_of(folder)


def test_adapters_of_the_other_system(folder, tiny_model, dit):
    expert = folder / "experts" / "1.safetensors"
    assert "an adapter for linearsr, but sana-sr needs one of its own" in error_of(tiny_model, SanaSR, adapter=expert)
    own = copy.deepcopy(dit)
    inject_lora(own, 2)
    save_lora(own, expert, {"timestep": "900"})
    assert f"{expert}: an adapter for sana-sr, but linearsr needs one of its own" in error_of(folder)


def test_transformer_of_another_width(folder, dit):
    config = dit.config | {"num_attention_heads": 3, "cross_attention_dim": 96}
    save_module(LinearDiT(config), folder / "transformer")
    assert "projection" in error_of(folder) or "width" in error_of(folder)
    save_module(LinearDiT(dit.config | {"in_channels": 4, "out_channels": 4}), folder / "transformer")
    assert "the autoencoder makes 8 latent channels, the transformer wants 4" in error_of(folder)


# --- eval.py, fast.py, lab/profile.py ---


def test_fast_is_the_same(folder):
    plain, quick = LinearSR.from_pretrained(folder), fast.optimise(LinearSR.from_pretrained(folder))
    a, b = (np.asarray(m.restore(photo(), "tree", steps=12), np.float32) for m in (plain, quick))
    assert np.abs(a - b).max() <= 1 and plain.experts[0] is not quick.experts[0]


def test_eval_restores_and_scores(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo(32, 32).save("a.png")
    (tmp_path / "hr").mkdir()
    photo(32, 32).resize((128, 128)).save("hr/a.png")
    line = ["a.png", "--model", str(folder), "--device", "cpu"]
    options = ["--steps", "3", "--hr", "hr", "--metrics", "psnr", "--csv", "s.csv"]
    assert evaluator.main([*line, *options, "--seed", "4"]) == 0
    assert "dit" in capsys.readouterr().out and "a.png," in (tmp_path / "s.csv").read_text()
    first = (tmp_path / "results" / "a_x4.png").read_bytes()
    assert evaluator.main([*line, "--steps", "3", "--seed", "4", "--offload"]) == 0
    assert (tmp_path / "results" / "a_x4.png").read_bytes() == first
    assert evaluator.main([*line, "--steps", "3", "--seed", "5"]) == 0
    assert (tmp_path / "results" / "a_x4.png").read_bytes() != first


def exit_of(*options):
    with pytest.raises(SystemExit) as caught:
        evaluator.main([str(a) for a in options])
    return str(caught.value)


def test_eval_refuses_what_belongs_to_the_other_system(folder, tiny_model, tmp_path):
    photo().save(tmp_path / "a.png")
    for options in (["--steps", 20], ["--cfg", 2], ["--offload"]):
        message = exit_of(tmp_path / "a.png", "--model", tiny_model, *options)
        assert message.startswith(f"error: {options[0]}: {tiny_model} is a model of SANA-SR, which takes one step")
    for options in (["--adapter", "none"], ["--timestep", 900]):
        message = exit_of(tmp_path / "a.png", "--model", folder, *options)
        assert message.startswith(f"error: {options[0]}: {folder} is a model of LinearSR")
    assert "--steps must be at least 1, not 0" in exit_of(tmp_path / "a.png", "--model", folder, "--steps", 0)
    with pytest.raises(ValueError, match="is a LinearSR model: it has experts instead of an adapter"):
        fast.load_model(folder, "cpu", torch.float32, adapter="none")


def test_profile_counts_a_step_and_the_whole(folder, capsys):
    lab.profile.main(["--side", "64", "--model", str(folder), "--device", "cpu", "--steps", "5"])
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == ["text", "stem", "dit, one step", "decode", "all but text, 5 steps"]
    macs = {name: float(row[2]) for name, row in rows.items()}
    assert float(rows["all but text, 5 steps"][4]) > 0
    assert macs["all but text, 5 steps"] == pytest.approx(
        macs["stem"] + 5 * macs["dit, one step"] + macs["decode"], abs=0.03)


# --- the bundled model ---


def test_the_bundled_model_beats_bicubic():
    hr = Image.open(ROOT / "examples/portrait.png").convert("RGB").crop((0, 0, 160, 160))
    lr = hr.resize((40, 40), Image.Resampling.BOX)
    pictures = LinearSR.from_pretrained("linearsr-embedded").restore(lr, steps=20), bicubic(lr)
    x, *results = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1 for image in (hr, *pictures))
    lpips = LPIPS.from_pretrained("alex")
    restored, enlarged = (lpips(y, x).item() for y in results)
    assert restored < 0.9 * enlarged
