"""The model against the official implementations' outputs, and the properties the method promises."""
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, external
from PIL import Image
from safetensors.torch import load_file, save_file
from seeded import seeded, seeded_input, seeded_state_dict

import sanasr
from sanasr import DCAE, Gemma2, GemmaTokenizer, LinearDiT, SanaSR


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def golden(cls, name, folder=DATA / "model", dtype=torch.float32):
    """The model of a manifest under seeded weights, and the tensors of its golden."""
    manifest = json.loads((folder / f"{name}.json").read_text())
    model = cls(manifest["config"])
    state = seeded_state_dict(manifest["tensors"])
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval().requires_grad_(False), load_file(folder / f"{name}.safetensors")


def check_dcae(model, data, i, bound):
    assert relative(model.encode(data[f"x{i}"]), data[f"z{i}"]) < bound
    assert relative(model.decode(data[f"z{i}"]), data[f"y{i}"]) < bound


def check_dit(model, data, i, bound):
    assert relative(model(data[f"z{i}"], data[f"t{i}"], data[f"c{i}"], data[f"mask{i}"]), data[f"y{i}"]) < bound


def check_gemma(model, data, i, bound):
    kept = data[f"mask{i}"].bool()
    assert relative(model(data[f"ids{i}"], data[f"mask{i}"])[kept], data[f"y{i}"][kept]) < bound


# --- goldens -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("i", [0, 1])
def test_dcae_small(i):
    check_dcae(*golden(DCAE, "dcae_small"), i, 1e-5)


@pytest.mark.parametrize("i", [0, 1])
def test_dit_small(i):
    check_dit(*golden(LinearDiT, "dit_small"), i, 1e-5)


@pytest.mark.parametrize("name, i", [("gemma2_small", 0), ("gemma2_small", 1), ("gemma2_small_sliding", 0)])
def test_gemma_small(name, i):
    check_gemma(*golden(Gemma2, name), i, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cls, name, check, bound", [
    (DCAE, "dcae_f32c32_sana", check_dcae, 1e-5), (LinearDiT, "dit_sana_600m", check_dit, 1e-5),
    (Gemma2, "gemma2_two_layers", check_gemma, 1e-4)])
def test_official_size(cls, name, check, bound):
    check(*golden(cls, name, external("SANASR_ORACLE")), 0, bound)


@pytest.mark.parametrize("cls, name, count", [
    (DCAE, "dcae_f32c32_sana", 312.25e6), (LinearDiT, "dit_sana_600m", 591.75e6), (Gemma2, "gemma2_2b", 2.614e9)])
def test_official_keys_shapes_and_parameters(cls, name, count):
    manifest = json.loads((DATA / "model" / f"{name}.json").read_text())
    with torch.device("meta"):
        state = cls(manifest["config"]).state_dict()
    assert [[k, list(v.shape)] for k, v in state.items()] == manifest["tensors"]
    assert sum(v.numel() for v in state.values()) == pytest.approx(count, rel=1e-4 if count < 1e9 else 1e-3)


def test_whole_restoration():
    """Encode, one update at τ = 900, decode, against the official networks composed the same way."""
    vae, _ = golden(DCAE, "dcae_small")
    dit, _ = golden(LinearDiT, "dit_small")
    data = load_file(DATA / "model" / "restore_small.safetensors")
    scale = vae.config["scaling_factor"]
    z = scale * vae.encode(data["x"])
    assert relative(z, data["z_lq"]) < 1e-5
    z = sanasr.one_step(dit, z, torch.tensor([900.0]), data["c"], data["mask"])
    assert relative(z, data["z_restored"]) < 1e-5
    assert relative(vae.decode(z / scale), data["y"]) < 1e-5


@pytest.mark.parametrize("cls, name, check, eager", [  # eager: the error of the official code itself in bfloat16
    (DCAE, "dcae_small", check_dcae, 1.15e-2), (LinearDiT, "dit_small", check_dit, 0.85e-2),
    (Gemma2, "gemma2_small", check_gemma, 3.7e-2)])
def test_bfloat16(cls, name, check, eager):
    model, data = golden(cls, name, dtype=torch.bfloat16)
    check(model, {k: v.bfloat16() if k[0] in "xzc" else v.float() if k[0] == "y" else v for k, v in data.items()},
          0, 2 * eager)


@pytest.mark.parametrize("config", ["transformer", "vae", "text_encoder"])
def test_official_configs_are_read(config):
    cls = dict(transformer=LinearDiT, vae=DCAE, text_encoder=Gemma2)[config]
    with torch.device("meta"):
        cls(json.loads((DATA / "official_configs" / f"{config}.config.json").read_text()))


@pytest.mark.parametrize("cls, key, value", [
    (LinearDiT, "qk_norm", "rms_norm_across_heads"), (LinearDiT, "timestep_scale", 0.001),
    (LinearDiT, "guidance_embeds", True), (LinearDiT, "patch_size", 2), (LinearDiT, "invented", 1),
    (DCAE, "decoder_norm_types", ["batch_norm"] * 6), (DCAE, "decoder_act_fns", "relu"),
    (DCAE, "scaling_factor", None), (DCAE, "encoder_out_shortcut", "no"), (LinearDiT, "norm_eps", "small"),
    (Gemma2, "hidden_activation", "silu"), (Gemma2, "rope_parameters", {"rope_type": "linear"})])
def test_unhonoured_config_values_are_errors(cls, key, value):
    part = {LinearDiT: "transformer", DCAE: "vae", Gemma2: "text_encoder"}[cls]
    config = json.loads((DATA / "official_configs" / f"{part}.config.json").read_text())
    with pytest.raises(ValueError, match="rope_type" if key == "rope_parameters" else key), torch.device("meta"):
        cls(config | {key: value})


# --- tokenizer -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gemma_tokenizer(tmp_path_factory):
    import lzma
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(lzma.decompress(external("SANASR_ORACLE", "gemma2_tokenizer.json.xz").read_bytes()))
    return path


def test_tokenizer_reproduces_the_recorded_ids(gemma_tokenizer):
    tokenizer = GemmaTokenizer(gemma_tokenizer)
    for line in json.loads((DATA / "model" / "gemma2_tokens.json").read_text()):
        assert tokenizer.encode(line["text"]) == line["ids"], line["text"]
        assert tokenizer.spans(line["ids"])[-1][1] == len(line["text"].replace(" ", "▁").encode())


def random_texts(count, rng):
    alphabets = [[chr(c) for c in range(32, 127)], [chr(c) for c in range(32)] + list(" ab\t\n"), list("  \t\n▁<>bos"),
                 [chr(c) for c in range(0xA0, 0x2FFF)], [chr(c) for c in range(0x1F300, 0x1FAFF)], list("aeiou rstln,")]
    for _ in range(count):
        alphabet = rng.choice(alphabets) + rng.choice(alphabets)
        yield "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))


def test_tokenizer_agrees_with_the_tokenizers_package(gemma_tokenizer):
    tokenizers = pytest.importorskip("tokenizers", reason="the reference tokenizer is not installed")
    ours, theirs = GemmaTokenizer(gemma_tokenizer), tokenizers.Tokenizer.from_file(str(gemma_tokenizer))
    for text in random_texts(5000, random.Random(0)):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_merges_as_pairs_and_as_strings(tiny_model, tmp_path):
    path = tiny_model / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = [m.split() for m in data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    text = "blurry tree, é"
    ids = GemmaTokenizer(path).encode(text)
    assert ids == GemmaTokenizer(tmp_path).encode(text)
    assert [GemmaTokenizer(path).pieces[i] for i in ids] == [
        "<bos>", "blur", "ry", "▁", "tree", ",", "▁", "<0xC3>", "<0xA9>"]


# --- prompts -------------------------------------------------------------------------------------------------------

def test_prompt_is_tags_then_suffix():
    appendix = sanasr.SUFFIXES["appendix"]
    assert sanasr.build_prompt(["tree", "Blurry photo", "branch"]) == f"tree, branch, {appendix}"
    assert sanasr.build_prompt("", "appendix") == appendix
    assert sanasr.build_prompt("a cat", "none") == "a cat"
    assert sanasr.build_prompt("a cat", "in the rain") == "a cat, in the rain"


def test_degradation_words_of_a_prompt_are_masked(tiny_model):
    tokenizer = GemmaTokenizer(tiny_model / "tokenizer")
    ids, mask, kept = sanasr.tokenize_prompt(tokenizer, "  A Blurry tree, low-quality blurb")
    shown = "".join(tokenizer.pieces[i] for i, m in zip(ids, mask, strict=True) if m)
    assert shown == "<bos>a▁▁tree,▁▁blurb"
    assert kept == list(range(len(ids))) and mask[0] == 1


def test_prompts_are_cut_to_300_tokens_and_an_instruction_keeps_the_last_299(tiny_model):
    tokenizer = GemmaTokenizer(tiny_model / "tokenizer")
    ids, mask, kept = sanasr.tokenize_prompt(tokenizer, "x" * 400)
    assert len(ids) == len(mask) == len(kept) == 300
    ids, mask, kept = sanasr.tokenize_prompt(tokenizer, "x" * 400, "say: ")  # n = 6 tokens with <bos>
    assert len(ids) == 6 + 298 and kept == [0, *range(5, 304)] and len(mask) == 300


# --- LoRA ----------------------------------------------------------------------------------------------------------

def adapted(targets="attn+ffn", rank=4):
    dit, data = golden(LinearDiT, "dit_small")
    sanasr.inject_lora(dit, rank, targets=targets)
    inputs = [data[k] for k in ("z1", "t1", "c1", "mask1")]
    return dit, inputs


def randomise(dit):
    with torch.no_grad():
        for key, p in sanasr.lora_parameters(dit).items():
            p.copy_(0.1 * seeded(key, p.shape))


def test_a_new_adapter_changes_nothing_and_off_is_the_prior():
    dit, inputs = adapted()
    prior = golden(LinearDiT, "dit_small")[0](*inputs)
    assert relative(dit(*inputs), prior) < 1e-6
    randomise(dit)
    assert relative(dit(*inputs), prior) > 1e-2
    with sanasr.adapters_off(dit):
        assert torch.equal(dit(*inputs), golden(LinearDiT, "dit_small")[0](*inputs))


@pytest.mark.parametrize("targets", ["attn", "attn+ffn"])
def test_merged_equals_unmerged(targets):
    dit, inputs = adapted(targets)
    randomise(dit)
    y = dit(*inputs)
    keys = set(golden(LinearDiT, "dit_small")[0].state_dict())
    sanasr.merge_lora(dit)
    assert relative(dit(*inputs), y) < 1e-5
    assert set(dit.state_dict()) == keys


def test_only_adapters_train():
    dit, inputs = adapted("attn")
    dit(*inputs).square().mean().backward()
    assert {k for k, p in dit.named_parameters() if p.grad is not None} == set(sanasr.lora_parameters(dit))
    assert len(sanasr.lora_parameters(dit)) == 3 * 2 * 4 * 2  # blocks, attentions, projections, A and B


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
def test_adapter_file_round_trip(tmp_path, prefix):
    dit, inputs = adapted()
    randomise(dit)
    sanasr.save_lora(dit, tmp_path / "a.safetensors", {"note": "kept"})
    state = load_file(tmp_path / "a.safetensors")
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "b.safetensors",
              {"alpha": "4", "note": "kept"})
    fresh = golden(LinearDiT, "dit_small")[0]
    assert sanasr.load_lora(fresh, tmp_path / "b.safetensors")["note"] == "kept"
    assert torch.equal(fresh(*inputs), dit(*inputs))


@pytest.mark.parametrize("name", ["alpha", "timestep"])
def test_odd_metadata_of_an_adapter_is_named(tmp_path, name):
    dit, _ = adapted()
    sanasr.save_lora(dit, tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", {name: "much"})
    with pytest.raises(ValueError, match=f"a.safetensors.*{name} = 'much'"):
        sanasr.load_lora(golden(LinearDiT, "dit_small")[0], tmp_path / "a.safetensors")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    dit, _ = golden(LinearDiT, "dit_small")
    save_file({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 32),
               "transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(64, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors.*to_q.*64 to 64"):
        sanasr.load_lora(dit, tmp_path / "a.safetensors")


@pytest.mark.parametrize("state, message", [
    ({}, "no adapter"), ({"transformer_blocks.0.attn1.to_q.alpha": torch.tensor(4.0)}, "to_q.alpha is no matrix")])
def test_what_is_no_plain_adapter_is_refused(tmp_path, state, message):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}"):
        sanasr.load_lora(golden(LinearDiT, "dit_small")[0], tmp_path / "a.safetensors")


# --- loading -------------------------------------------------------------------------------------------------------

def test_shards_prefix_and_stored_dtypes(tiny_model, tmp_path):
    whole = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    shutil.copy(tiny_model / "transformer" / "config.json", tmp_path)
    keys = list(whole)
    for i, part in enumerate((keys[:20], keys[20:]), 1):
        save_file({f"model.{k}": whole[k].bfloat16() for k in part},
                  tmp_path / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    index = {f"model.{k}": f"diffusion_pytorch_model-0000{1 + (k not in keys[:20])}-of-00002.safetensors" for k in keys}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    state = LinearDiT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[k], whole[k].bfloat16()) for k in keys)
    assert LinearDiT.from_pretrained(tmp_path, torch.float32).proj_out.weight.dtype == torch.float32
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="00002-of-00002"):
        LinearDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("proj_out.bias"), "missing proj_out.bias"),
    (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
    (lambda s: s.update({"proj_out.bias": torch.zeros(7)}), r"proj_out.bias .*\[7\], expected \[8\]")])
def test_weights_that_do_not_fit_are_one_clear_error(tiny_model, tmp_path, damage, message):
    shutil.copy(tiny_model / "transformer" / "config.json", tmp_path)
    state = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    damage(state)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        LinearDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_damaged_files_are_named(tiny_model, tmp_path, content):
    shutil.copy(tiny_model / "vae" / "config.json", tmp_path)
    whole = (tiny_model / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors: not a whole"):
        DCAE.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_weights_once(tmp_path):
    """Peak memory of loading SANA-0.6B in the stored dtype is at most 1.15 × its weights."""
    manifest = json.loads((DATA / "model" / "dit_sana_600m.json").read_text())
    save_file(seeded_state_dict(manifest["tensors"], dtype=torch.bfloat16),
              tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(manifest["config"]))
    code = f"""
import re, torch
from sanasr import LinearDiT
rss = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = rss()
model = LinearDiT.from_pretrained({str(tmp_path)!r}, torch.bfloat16)
sum(p.view(torch.int16)[0].sum() for p in model.parameters())
total = sum(p.numel() * 2 for p in model.parameters())
for p in model.parameters(): p.view(torch.int16).max()
print((rss() - before) / total)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 1.15


# --- tiling and restoring ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(40, 40), (33, 100), (7, 129)])
@pytest.mark.parametrize("down, up", [(1, 1), (2, 1), (1, 4)])
def test_tiling_a_local_operator_is_exact(height, width, down, up):
    x = seeded_input("x", (1, 2, height * down, width * down))

    def f(part):
        part = torch.nn.functional.avg_pool2d(part, down)
        return torch.nn.functional.interpolate(part, scale_factor=up)

    torch.testing.assert_close(sanasr.tiled(f, x, 32, 3, down, up), f(x), rtol=0, atol=1e-6)


def test_tiles_cover_evenly_and_stay_within_the_limit():
    for length in range(1, 200):
        pieces = sanasr.spans(length, 32, 2)
        assert pieces[0][0] == 0 and pieces[-1][1] == length
        assert len({end - start for start, end in pieces}) == 1 and pieces[0][1] <= 32
        assert all(a[1] - b[0] >= 2 for a, b in zip(pieces, pieces[1:], strict=False))
        total = sum(sanasr.blend_weights(pieces, 1)[i][p - s].item()
                    for p in [length // 2] for i, (s, e) in enumerate(pieces) if s <= p < e)
        assert total == pytest.approx(1)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return SanaSR.from_pretrained(tiny_model)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 8), (33, 20)])
def test_restore_gives_four_times_the_size(tiny, size):
    result = tiny.restore(noise(*size))
    assert result.size == (4 * size[0], 4 * size[1]) and result.mode == "RGB"
    assert set(tiny.stages) == {"text", "encode", "dit", "decode"}


def test_restore_is_deterministic_and_depends_on_the_prompt(tiny):
    image = noise(16, 16)
    first = np.asarray(tiny.restore(image, "tree"))
    assert np.array_equal(first, np.asarray(tiny.restore(image, "tree")))
    assert not np.array_equal(first, np.asarray(tiny.restore(image, "a cat")))


def test_restore_follows_the_equations(tiny):
    """`restore` of a picture that needs neither padding nor tiles is encode, Eq. 4, decode."""
    image = noise(16, 24)
    x = np.asarray(image.resize((64, 96), Image.Resampling.BICUBIC))
    x = torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    c, m = tiny.encode_prompt(sanasr.build_prompt("tree"))
    z = sanasr.one_step(tiny.dit, tiny.vae.encode(x) * tiny.scaling_factor, torch.tensor([900.0]), c, m)
    y = tiny.vae.decode(z / tiny.scaling_factor)[0].clamp(-1, 1)
    result = torch.from_numpy(np.asarray(tiny.restore(image, "tree")).copy()).permute(2, 0, 1)
    assert ((y + 1) * 127.5 - result).abs().max() < 0.51


def test_prompt_states_come_from_the_cache_and_padding_is_masked(tiny, monkeypatch):
    c, m = tiny.encode_prompt(["tree", "a tree by the sea"])
    assert c.shape[:2] == m.shape and m.sum(1).tolist() == [2, m.shape[1]]
    monkeypatch.setattr(Gemma2, "from_pretrained", lambda *_: pytest.fail("the encoder was loaded again"))
    again, _ = tiny.encode_prompt("tree")
    assert torch.equal(again[0], c[0, :2])


def test_half_precision_reaches_the_transformer_alone(tiny_model):
    model = SanaSR.from_pretrained(tiny_model, dtype=torch.float16)
    assert model.dit.proj_out.weight.dtype == torch.float16
    assert model.vae.decoder.conv_in.weight.dtype == torch.bfloat16


def test_half_precision_runs_with_the_adapter_apart(tiny_model, tmp_path):
    dit = LinearDiT.from_pretrained(tiny_model / "transformer")
    sanasr.inject_lora(dit, 2)
    sanasr.save_lora(dit, tmp_path / "a.safetensors")
    apart, merged = (SanaSR.from_pretrained(tiny_model, dtype=torch.bfloat16, adapter=tmp_path / "a.safetensors",
                                            merge=merge).restore(noise(8, 8)) for merge in (False, True))
    assert apart.tobytes() == merged.tobytes()  # B = 0


def test_structureless_config_names_its_file(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for part, cls, text in (("vae", DCAE, "[]"), ("text_encoder", Gemma2, "[]"), ("vae", DCAE,
                            '{"encoder_layers_per_block": 3}'), ("transformer", LinearDiT, '{"mlp_ratio": "2.5"}')):
        (folder / part / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"{part}.config.json: "):
            cls.from_pretrained(folder / part)


def test_an_adapter_beside_the_model_is_used_and_can_be_left_out(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    dit = LinearDiT.from_pretrained(folder / "transformer")
    sanasr.inject_lora(dit, 2)
    randomise(dit)
    sanasr.save_lora(dit, folder / "adapter.safetensors", {"timestep": "999"})
    model, plain = SanaSR.from_pretrained(folder), SanaSR.from_pretrained(folder, adapter=False)
    assert model.timestep == 999 and plain.timestep == 900
    image = noise(8, 8)
    assert model.restore(image).tobytes() != plain.restore(image, timestep=999).tobytes()


# --- what a config, an adapter's metadata and the prompt cache may not leave unsaid ---


@pytest.mark.parametrize("key, value", [
    ("encoder_block_types", "Foo"), ("decoder_block_types", ["ResBlock"] * 5 + ["Foo"]),
    ("upsample_block_type", "bar"), ("downsample_block_type", "Convv")])
def test_unknown_blocks_are_an_error_that_names_the_key(key, value):
    config = json.loads((DATA / "model" / "dcae_small.json").read_text())["config"] | {key: value}
    with pytest.raises(ValueError, match=f"DCAE config: {key} = .*not supported"), torch.device("meta"):
        DCAE(config)


def test_a_transformer_without_a_sample_size_is_an_error():
    config = json.loads((DATA / "model" / "dit_small.json").read_text())["config"] | {"sample_size": None}
    with pytest.raises(ValueError, match="LinearDiT config: sample_size = None"), torch.device("meta"):
        LinearDiT(config)


@pytest.mark.parametrize("alphas", [(4, 16), (2, 8), (4, 4)])
def test_an_adapter_of_mixed_ranks_comes_back_as_it_was(tmp_path, alphas):
    dit, inputs = adapted()
    sanasr.inject_lora(dit, rank=16, alpha=alphas[1], targets="attn+ffn")
    for name, module in sanasr.lora_modules(dit).items():
        if ".ff." not in name:
            sanasr._attach_lora(module, 4, alphas[0] / 4)
    randomise(dit)
    sanasr.save_lora(dit, tmp_path / "a.safetensors")
    fresh = golden(LinearDiT, "dit_small")[0]
    metadata = sanasr.load_lora(fresh, tmp_path / "a.safetensors")
    scales = {name: module.adapter_scale for name, module in sanasr.lora_modules(fresh).items()}
    assert scales == {name: module.adapter_scale for name, module in sanasr.lora_modules(dit).items()}
    assert torch.equal(fresh(*inputs), dit(*inputs)) and metadata["rank"] == "4 16"


def test_conditioning_takes_the_word_of_the_caller_then_of_the_adapter():
    trained = {"suffix": "main", "timestep": "999.0", "instruction": "Enhance: "}
    assert sanasr.conditioning(trained) == {"suffix": "main", "timestep": 999.0, "instruction": "Enhance: "}
    assert sanasr.conditioning(trained, "none", 500, "") == {"suffix": "none", "timestep": 500.0, "instruction": ""}
    assert sanasr.conditioning({}) == {"suffix": "appendix", "timestep": 900.0, "instruction": ""}
    assert sanasr.conditioning({}, default_timestep=999)["timestep"] == 999


def test_restore_uses_the_suffix_that_the_adapter_was_trained_with(tiny_model, tmp_path):
    dit = LinearDiT.from_pretrained(tiny_model / "transformer")
    sanasr.inject_lora(dit, 2)
    sanasr.save_lora(dit, tmp_path / "a.safetensors", {"suffix": "none"})
    model, image = SanaSR.from_pretrained(tiny_model, adapter=tmp_path / "a.safetensors"), Image.new("RGB", (8, 8))
    seen, encode = [], model.prompts
    model.prompts = lambda prompts, instruction: seen.append(prompts) or encode(prompts, instruction)
    model.restore(image, "tree")
    model.restore(image, "tree", suffix="main")
    assert seen == ["tree", "tree, " + sanasr.SUFFIXES["main"]]


@pytest.mark.parametrize("name, value", [("MAX_TOKENS", 5), ("DEGRADATION_WORDS", ("tree",)), ("PROMPT_VERSION", -1)])
def test_the_prompt_cache_knows_all_that_the_states_depend_on(tiny_model, monkeypatch, name, value):
    before = sanasr.PromptEncoder(tiny_model).identity
    monkeypatch.setattr(sanasr, name, value)
    assert sanasr.PromptEncoder(tiny_model).identity != before


def test_the_text_encoder_is_hashed_once_for_each_model(tiny_model, monkeypatch):
    hashed = []
    monkeypatch.setattr(sanasr, "fingerprint", lambda folder, really=sanasr.fingerprint: (
        hashed.append(folder.name), really(folder))[1])
    model = SanaSR.from_pretrained(tiny_model)
    for prompt in ("a", "b", "a"):
        model.encode_prompt(prompt)
    assert hashed == ["text_encoder", "tokenizer"]


@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_emulated_bfloat16_does_not_count(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert sanasr.computes_bf16("cuda") is native
    dtype = torch.bfloat16 if native else torch.float32
    assert sanasr.choose_dtypes("cuda") == (dtype, dtype)
    assert sanasr.choose_dtypes("cuda", torch.float16) == (torch.float16, dtype)
    assert sanasr.choose_dtypes("cuda", torch.float32) == (torch.float32, torch.float32)
    assert sanasr.choose_dtypes("cpu") == (torch.float32, torch.float32)


def test_a_model_is_built_from_parts(tiny_model):
    whole = SanaSR.from_pretrained(tiny_model)
    parts = SanaSR(whole.vae, whole.dit, lambda prompts, instruction: whole.encode_prompt(prompts, instruction))
    image = Image.effect_noise((16, 12), 80).convert("RGB")
    assert parts.restore(image, "tree").tobytes() == whole.restore(image, "tree").tobytes()


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_scale_and_progress(tiny_model, scale):
    model, seen = SanaSR.from_pretrained(tiny_model), []
    image = Image.effect_noise((80, 40), 80).convert("RGB")
    enlarged = image.resize((80 * scale, 40 * scale), Image.Resampling.BICUBIC)
    result = model.restore(image, scale=scale, tile=64, progress=lambda *what: seen.append(what))
    assert result.size == enlarged.size
    assert result.tobytes() == model.restore(enlarged, scale=1, tile=64).tobytes()
    assert [stage for stage, done, _ in seen if done == 0] == ["encode", "dit", "decode"]
    total = seen[0][2]
    assert [what[1:] for what in seen if what[0] == "dit"] == [(i, total) for i in range(total + 1)] and total > 1
