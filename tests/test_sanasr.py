"""The model against the official implementations' outputs, and the properties the method promises."""
import json
import lzma
import os
import random
import shutil
import sys
import time
from itertools import pairwise

import pytest
import tiny
import torch
from conftest import DATA, MODEL, external, golden, on_meta, photo, python, relative
from PIL import Image
from safetensors.torch import load_file, save, save_file
from seeded import seeded, seeded_input, seeded_state_dict

import runs
import sanasr
from photos import restorer
from photos.degrade import to_tensor
from sanasr import DCAE, Gemma2, GemmaTokenizer, LinearDiT, SanaSR
from weights.dtypes import choose_dtypes
from weights.files import open_weights

PARTS = {cls: part for part, (cls, _) in tiny.CONFIGS.items()}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = os.environ.get("SANASR_GOLDENS", "cpu")  # `python -m lab.gpu correctness` names a GPU
BOUND = {DCAE: 1e-5, LinearDiT: 1e-5, Gemma2: 1e-4}
EAGER = {DCAE: 1.15e-2, LinearDiT: 0.85e-2, Gemma2: 3.7e-2}  # the official code's own error in bfloat16
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_dit():
    return golden(LinearDiT, "dit_small")[0]


def check(model, data, i, bound):
    """Compare the model with the i-th case of its golden."""
    case = {key[:-1]: x for key, x in data.items() if key.endswith(str(i))}
    if isinstance(model, DCAE):
        assert relative(model.encode(case["x"]), case["z"]) < bound
        assert relative(model.decode(case["z"]), case["y"]) < bound
    elif isinstance(model, LinearDiT):
        assert relative(model(*map(case.get, ("z", "t", "c", "mask"))), case["y"]) < bound
    else:
        kept = case["mask"].bool()
        assert relative(model(case["ids"], case["mask"])[kept], case["y"][kept]) < bound


def official_config(cls):
    return json.loads((DATA / "official_configs" / f"{PARTS[cls]}.config.json").read_text())


# --- goldens ---

@pytest.mark.parametrize("cls, name, i", [
    (DCAE, "dcae_small", 0), (DCAE, "dcae_small", 1), (LinearDiT, "dit_small", 0), (LinearDiT, "dit_small", 1),
    (Gemma2, "gemma2_small", 0), (Gemma2, "gemma2_small", 1), (Gemma2, "gemma2_small_sliding", 0)])
def test_goldens(cls, name, i, monkeypatch):
    """In bfloat16 twice the official code's own error is allowed, in float32 on a GPU ten times the CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    bounds = {FP32: BOUND[cls] if DEVICE == "cpu" else 10 * BOUND[cls], BF16: 2 * EAGER[cls]}
    for dtype, bound in (bounds | {FP16: 5e-3} if cls is LinearDiT else bounds).items():
        check(*golden(cls, name, dtype=dtype, device=DEVICE), i, bound)


@pytest.mark.slow
@pytest.mark.parametrize("cls, name", [
    (DCAE, "dcae_f32c32_sana"), (LinearDiT, "dit_sana_600m"), (Gemma2, "gemma2_two_layers")])
def test_official_size(cls, name):
    check(*golden(cls, name, external("SANASR_ORACLE")), 0, BOUND[cls])


@pytest.mark.parametrize("cls, name", [
    (DCAE, "dcae_f32c32_sana"), (LinearDiT, "dit_sana_600m"), (Gemma2, "gemma2_2b")])
def test_official_keys_and_shapes(cls, name):
    state = on_meta(cls, name).state_dict()
    tensors = json.loads((MODEL / f"{name}.json").read_text())["tensors"]
    assert [[k, list(v.shape)] for k, v in state.items()] == tensors


def test_shapes_of_sana_1600m():
    """The defaults of the official class; the number of parameters is the one that NVIDIA's code prints."""
    with torch.device("meta"):
        model = LinearDiT({})
        y = model(torch.empty(2, 32, 32, 24), torch.empty(2), torch.empty(2, 7, 2304), torch.empty(2, 7))
    assert sum(p.numel() for p in model.parameters()) == 1_604_462_752 and y.shape == (2, 32, 32, 24)


def test_whole_restoration():
    """Encode, one update at τ = 900, decode, against the official networks composed the same way."""
    vae, dit = golden(DCAE, "dcae_small")[0], small_dit()
    data = load_file(MODEL / "restore_small.safetensors")
    scale = vae.config["scaling_factor"]
    z = scale * vae.encode(data["x"])
    assert relative(z, data["z_lq"]) < 1e-5
    z = sanasr.one_step(dit, z, torch.tensor([900.0]), data["c"], data["mask"])
    assert relative(z, data["z_restored"]) < 1e-5
    assert relative(vae.decode(z / scale), data["y"]) < 1e-5


def test_the_update_is_computed_in_float32():
    """σ = 0.9 is 0.8984 in bfloat16."""
    z, c = torch.full((1, 8, 1, 1), 1 / 3), torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    z = sanasr.one_step(lambda z, *_: torch.ones_like(z), z, torch.tensor([900.0]), c, None)
    assert torch.allclose(z, torch.tensor(1 / 3 - 0.9), rtol=1e-6, atol=0)


# --- configs ---

@pytest.mark.parametrize("cls", PARTS)
def test_official_configs_are_read(cls, tmp_path):
    config = official_config(cls)
    with torch.device("meta"):
        read = cls(config).config
    shared = config.keys() & read.keys()
    assert len(shared) >= 10 and all(read[key] == config[key] for key in shared)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: .*not an object"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls, key, value, words", [
    (LinearDiT, "qk_norm", "rms_norm_across_heads", "not supported"), (LinearDiT, "timestep_scale", 0.001, ""),
    (LinearDiT, "guidance_embeds", True, ""), (LinearDiT, "patch_size", 2, ""), (LinearDiT, "invented", 1, ""),
    (LinearDiT, "norm_eps", "small", ""), (LinearDiT, "sample_size", None, "= None cannot be used"),
    (DCAE, "decoder_norm_types", ["batch_norm"] * 6, ""), (DCAE, "decoder_act_fns", "relu", ""),
    (DCAE, "scaling_factor", None, ""), (DCAE, "encoder_out_shortcut", "no", ""),
    (DCAE, "encoder_block_types", "Foo", "not supported"),
    (DCAE, "decoder_block_types", ["ResBlock"] * 5 + ["Foo"], "'Foo' is not supported"),
    (DCAE, "upsample_block_type", "bar", "not supported"), (DCAE, "downsample_block_type", "Convv", "not supported"),
    (DCAE, "decoder_block_out_channels", [128, 256, 0, 512, 1024, 1024], "cannot be used"),
    (Gemma2, "hidden_activation", "silu", ""), (Gemma2, "rope_parameters", {"rope_type": "linear"}, ""),
    # found by lab.faults: numbers that no network can have
    *((DCAE, *case, "") for case in {
        "latent_channels": 0, "attention_head_dim": 0, "encoder_block_out_channels": {"a": 1}, "scaling_factor": 0.0,
        "decoder_layers_per_block": ["1"] * 6, "encoder_layers_per_block": [10 ** 9] * 6, "encoder_qkv_multiscales": 5,
        "decoder_block_out_channels": [8] * 1000}.items()),
    *((LinearDiT, *case, "") for case in (("num_layers", 10 ** 9), ("num_layers", 1.5), ("num_layers", True),
                                          ("mlp_ratio", float("inf")), ("in_channels", 0))),
    *((Gemma2, *case, "") for case in (("num_hidden_layers", 10 ** 9), ("query_pre_attn_scalar", 0),
                                       ("layer_types", ["sliding_attention"]), ("layer_types", ["x", "y"])))])
def test_unhonoured_config_values_are_named_at_once(cls, key, value, words, tmp_path):
    name = "rope config: rope_type" if key == "rope_parameters" else f"config: .*{key}"
    (tmp_path / "config.json").write_text(json.dumps(official_config(cls) | {key: value}))
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"config.json: {cls.__name__} {name}.*{words}"):
        cls.from_pretrained(tmp_path)
    assert time.monotonic() - start < 5


# --- tokenizer ---

@pytest.fixture(scope="module")
def gemma_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(lzma.decompress(external("SANASR_ORACLE", "gemma2_tokenizer.json.xz").read_bytes()))
    return path


def test_tokenizer_reproduces_the_recorded_ids(gemma_tokenizer):
    tokenizer = GemmaTokenizer(gemma_tokenizer)
    for line in json.loads((MODEL / "gemma2_tokens.json").read_text()):
        assert tokenizer.encode(line["text"]) == line["ids"], line["text"]
        assert tokenizer.spans(line["ids"])[-1][1] == len(line["text"].replace(" ", "▁").encode())


def test_tokenizer_agrees_with_the_tokenizers_package(gemma_tokenizer):
    tokenizers = pytest.importorskip("tokenizers", reason="the reference tokenizer is not installed")
    ours, theirs = GemmaTokenizer(gemma_tokenizer), tokenizers.Tokenizer.from_file(str(gemma_tokenizer))
    alphabets = [[chr(c) for c in range(32, 127)], [chr(c) for c in range(32)] + list(" ab\t\n"), list("  \t\n▁<>bos"),
                 [chr(c) for c in range(0xA0, 0x2FFF)], [chr(c) for c in range(0x1F300, 0x1FAFF)], list("aeiou rstln,")]
    rng = random.Random(0)
    for _ in range(5000):
        alphabet = rng.choice(alphabets) + rng.choice(alphabets)
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_merges_as_pairs_and_as_strings(tmp_path):
    data = tiny.byte_tokenizer()
    for merges in (data["model"]["merges"], [m.split() for m in data["model"]["merges"]]):
        data["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        tokenizer = GemmaTokenizer(tmp_path)
        pieces = [tokenizer.pieces[i] for i in tokenizer.encode("blurry tree, é")]
        assert pieces == ["<bos>", "blur", "ry", "▁", "tree", ",", "▁", "<0xC3>", "<0xA9>"]


# --- prompts ---

def test_prompt_is_tags_then_suffix():
    appendix = sanasr.SUFFIXES["appendix"]
    assert sanasr.build_prompt(["tree", "Blurry photo", "branch"]) == f"tree, branch, {appendix}"
    assert sanasr.build_prompt("", "appendix") == appendix
    assert sanasr.build_prompt("a cat", "none") == "a cat"
    assert sanasr.build_prompt("a cat", "in the rain") == "a cat, in the rain"


def test_prompts_are_cut_to_300_tokens_and_after_an_instruction_to_the_last_299(tiny_model):
    tokenizer = GemmaTokenizer(tiny_model / "tokenizer")
    ids, mask, kept = sanasr.tokenize_prompt(tokenizer, "x" * 400)
    assert len(ids) == len(mask) == len(kept) == 300
    ids, mask, kept = sanasr.tokenize_prompt(tokenizer, "x" * 400, "say: ")  # n = 6 tokens with <bos>
    assert len(ids) == 6 + 298 and kept == [0, *range(5, 304)] and len(mask) == 300


def test_prompt_states_come_from_the_cache_and_padding_is_masked(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SANASR_CACHE", str(tmp_path))
    encode, hashed, really = sanasr.PromptEncoder(tiny_model), [], sanasr.fingerprint
    monkeypatch.setattr(sanasr, "fingerprint", lambda folder: hashed.append(folder.name) or really(folder))
    c, m = encode(["tree", "a tree by the sea"])
    assert c.shape[:2] == m.shape and m.sum(1).tolist() == [2, m.shape[1]]
    monkeypatch.setattr(Gemma2, "from_pretrained", lambda *_: pytest.fail("the encoder was loaded again"))
    assert torch.equal(encode("tree")[0][0], c[0, :2])
    assert len(list((tmp_path / "prompts").iterdir())) == 2 and hashed == ["text_encoder", "tokenizer"]


@pytest.mark.parametrize("name, value", [("MAX_TOKENS", 5), ("DEGRADATION_WORDS", ("tree",)), ("PROMPT_VERSION", -1)])
def test_the_prompt_cache_knows_all_that_the_states_depend_on(tiny_model, monkeypatch, name, value):
    before = sanasr.PromptEncoder(tiny_model).identity
    monkeypatch.setattr(sanasr, name, value)
    assert sanasr.PromptEncoder(tiny_model).identity != before


# --- LoRA ---

def adapted(targets="attn+ffn", rank=4, alpha=None):
    dit, data = golden(LinearDiT, "dit_small")
    sanasr.inject_lora(dit, rank, alpha, targets)
    return dit, [data[k] for k in ("z1", "t1", "c1", "mask1")]


def randomise(dit, gain=0.1):
    dit.load_state_dict({key: gain * seeded(key, p.shape) for key, p in sanasr.lora_parameters(dit).items()}, False)


@pytest.mark.parametrize("targets", ["attn", "attn+ffn"])
def test_a_new_adapter_changes_nothing_off_is_the_prior_and_merged_is_the_same(targets):
    (dit, inputs), plain = adapted(targets), small_dit()
    assert len(sanasr.lora_parameters(dit)) == 3 * 2 * {"attn": 8, "attn+ffn": 10}[targets]  # blocks, A and B
    prior = plain(*inputs)
    assert relative(dit(*inputs), prior) < 1e-6
    randomise(dit)
    y = dit(*inputs)
    assert relative(y, prior) > 1e-2
    with sanasr.adapters_off(dit):
        assert torch.equal(dit(*inputs), prior)
    sanasr.merge_lora(dit)
    assert relative(dit(*inputs), y) < 1e-5 and set(dit.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("prefix, ranks, alphas", [
    ("", (4, 4), (4, 4)), ("transformer.", (4, 4), (4, 4)), ("base_model.model.", (4, 4), (4, 4)),
    ("", (4, 16), (4, 16)), ("", (4, 16), (2, 8)), ("", (4, 16), (4, 4))])
def test_adapter_file_round_trip(tmp_path, prefix, ranks, alphas):
    """ranks, alphas: of attention and of the feed-forward network."""
    dit, inputs = adapted(rank=ranks[1], alpha=alphas[1])
    for name, module in sanasr.lora_modules(dit).items():
        if ".ff." not in name:
            sanasr._attach_lora(module, ranks[0], alphas[0] / ranks[0])
    randomise(dit)
    sanasr.save_lora(dit, tmp_path / "a.safetensors", {"note": "kept"})
    with open_weights(tmp_path / "a.safetensors") as file:
        state = {prefix + key: file.get_tensor(key) for key in file.keys()}
        save_file(state, tmp_path / "b.safetensors", file.metadata())
    fresh = small_dit()
    metadata = sanasr.load_lora(fresh, tmp_path / "b.safetensors")
    scales, before = ({name: module.adapter_scale for name, module in sanasr.lora_modules(x).items()}
                      for x in (fresh, dit))
    assert scales == before and torch.equal(fresh(*inputs), dit(*inputs))
    assert metadata["note"] == "kept" and metadata["rank"] == " ".join(map(str, sorted({*ranks})))


LORA = {"lora_A.weight": torch.zeros(4, 64), "lora_B.weight": torch.zeros(64, 4)}


@pytest.mark.parametrize("tensors, metadata, message", [
    (LORA, {"alpha": "much"}, "alpha = 'much'"), (LORA, {"timestep": "much"}, "timestep = 'much'"),
    (LORA | {"lora_A.weight": torch.zeros(4, 32)}, None, "to_q.*64 to 64"),  # of another base
    (LORA | {"lora_A.weight": torch.zeros(4, 64).int()}, None, "lora_A.weight is no matrix of floating numbers"),
    (LORA | {"weight": torch.zeros(64, 64)}, None, "to_q.weight fits no projection"),  # the model's own
    ({"lora_A.weight": torch.zeros(4, 64)}, None, "lora_A.weight fits no projection of this model or lacks its other"),
    ({}, None, "no adapter"), ({"alpha": torch.zeros(())}, None, "to_q.alpha is no matrix")])
def test_what_is_no_adapter_of_this_model_is_refused(tmp_path, tensors, metadata, message):
    save_file({f"transformer_blocks.0.attn1.to_q.{key}": x for key, x in tensors.items()}, tmp_path / "a.safetensors",
              metadata)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}"):
        sanasr.load_lora(small_dit(), tmp_path / "a.safetensors")


def test_conditioning_takes_the_word_of_the_caller_then_of_the_adapter():
    trained = {"suffix": "main", "timestep": "999.0", "instruction": "Enhance: "}
    assert sanasr.conditioning(trained) == {"suffix": "main", "timestep": 999.0, "instruction": "Enhance: "}
    assert sanasr.conditioning(trained, "none", 500, "") == {"suffix": "none", "timestep": 500.0, "instruction": ""}
    assert sanasr.conditioning({}) == {"suffix": "appendix", "timestep": 900.0, "instruction": ""}
    assert sanasr.conditioning({}, default_timestep=999)["timestep"] == 999


# --- loading ---

def test_shards_prefix_and_stored_dtypes(tiny_model, tmp_path):
    whole = load_file(tiny_model / "transformer" / WEIGHTS)
    shutil.copy(tiny_model / "transformer" / "config.json", tmp_path)
    stored = [(f"model.{key}", x.bfloat16()) for key, x in whole.items()]
    for i, part in enumerate((stored[:20], stored[20:]), 1):
        save_file(dict(part), tmp_path / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")  # not needed
    state = LinearDiT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[key], x.bfloat16()) for key, x in whole.items())
    assert LinearDiT.from_pretrained(tmp_path, torch.float32).proj_out.weight.dtype == torch.float32


def test_weights_that_do_not_fit_are_one_clear_error(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model / "transformer", tmp_path / "transformer")
    path, state, key = folder / WEIGHTS, load_file(folder / WEIGHTS), "proj_out.bias"
    whole = path.read_bytes()
    for content, message in ((save({k: x for k, x in state.items() if k != key}), f"missing {key}"),
                             (save(state | {"extra": torch.zeros(1)}), "unexpected extra"),
                             (save(state | {key: torch.zeros(7)}), rf"{key} .*\[7\], expected \[8\]"),
                             (save(state | {key: torch.zeros(8).int()}), f"{key} in .* is I32, no floating number"),
                             *((data, f"{WEIGHTS}: not a whole") for data in (b"", b"no safetensors", whole[:-100]))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            LinearDiT.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_weights_once(tmp_path):
    """Peak memory of loading SANA-0.6B in the stored dtype is at most 1.15 × its weights."""
    manifest = json.loads((MODEL / "dit_sana_600m.json").read_text())
    save_file(seeded_state_dict(manifest["tensors"], dtype=torch.bfloat16), tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(manifest["config"]))
    code = f"""
import re, torch
from sanasr import LinearDiT
rss = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = rss()
model = LinearDiT.from_pretrained({str(tmp_path)!r}, torch.bfloat16)
for p in model.parameters(): p.view(torch.int16).max()
print((rss() - before) / sum(p.numel() * 2 for p in model.parameters()))"""
    assert 0.5 < float(python("-c", code).stdout) < 1.15


@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_one_rule_for_dtypes(monkeypatch, capability, native):
    """bfloat16 by default on CUDA GPUs; where it is only emulated it becomes float32, asked for or not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    half = BF16 if native else FP32
    expected = {("cuda", None): (half, half), ("cuda", BF16): (half, half), ("cuda", FP16): (FP16, half),
                ("cuda", FP32): (FP32, FP32)}
    for device in ("cpu", "mps"):
        expected |= {(device, None): (FP32, FP32), (device, BF16): (BF16, BF16), (device, FP16): (FP16, BF16)}
    names = {None: "auto", FP32: "fp32", BF16: "bf16", FP16: "fp16"}
    for (device, dtype), dtypes in expected.items():
        assert choose_dtypes(device, dtype) == dtypes, (device, dtype)
        assert runs.pick_dtype(names[dtype], torch.device(device)) == dtypes[0]


# --- tiling and restoring ---

@pytest.mark.parametrize("height, width", [(40, 40), (33, 100), (7, 129)])
@pytest.mark.parametrize("down, up", [(1, 1), (2, 1), (1, 4)])
def test_tiling_a_local_operator_is_exact(height, width, down, up):
    x = seeded_input("x", (1, 2, height * down, width * down))
    f = torch.nn.Sequential(torch.nn.AvgPool2d(down), torch.nn.Upsample(scale_factor=up))
    torch.testing.assert_close(restorer.tiled(f, x, 32, 3, down, up), f(x), rtol=0, atol=1e-6)


def test_tiles_cover_evenly_and_stay_within_the_limit():
    for length in range(1, 200):
        pieces = restorer.spans(length, 32, 2)
        assert pieces[0][0] == 0 and pieces[-1][1] == length
        assert len({end - start for start, end in pieces}) == 1 and pieces[0][1] <= 32
        assert all(a[1] - b[0] >= 2 for a, b in pairwise(pieces))
    length = 4096 // 32  # of our largest pictures, whose tiles cost little more than the whole
    sides = [end - start for start, end in restorer.spans(length, SanaSR.TILE, SanaSR.OVERLAP)]
    assert sum(sides) ** 2 <= 1.07 * length**2


def test_restore_follows_the_equations(sana):
    """`restore` of a picture that needs neither padding nor tiles is encode, Eq. 4, decode."""
    image = photo(16, 24)
    x = to_tensor(image.resize((64, 96), Image.Resampling.BICUBIC))[None] * 2 - 1
    c, m = sana.encode_prompt(sanasr.build_prompt("tree"))
    z = sanasr.one_step(sana.dit, sana.vae.encode(x) * sana.scaling_factor, torch.tensor([900.0]), c, m)
    y = sana.vae.decode(z / sana.scaling_factor)[0].clamp(-1, 1)
    assert ((y + 1) / 2 - to_tensor(sana.restore(image, "tree"))).abs().max() < 0.51 / 255
    assert list(sana.stages) == ["text", "encode", "dit", "decode"]


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_sizes_scale_and_progress(sana, scale):
    for width, height in ((1, 1), (3, 17), (33, 20)):
        assert sana.restore(photo(width, height), scale=scale).size == (scale * width, scale * height)
    seen, image = [], photo(80, 40)
    enlarged = image.resize((80 * scale, 40 * scale), Image.Resampling.BICUBIC)
    result = sana.restore(image, scale=scale, tile=64, progress=lambda *what: seen.append(what))
    assert result.tobytes() == sana.restore(enlarged, scale=1, tile=64).tobytes()
    assert result.tobytes() == sana.restore(image, scale=scale, tile=95).tobytes(), "at most so large"
    assert [stage for stage, done, _ in seen if done == 0] == ["encode", "dit", "decode"]
    total = seen[0][2]
    assert [what[1:] for what in seen if what[0] == "dit"] == [(i, total) for i in range(total + 1)] and total > 1


def test_half_precision_runs_with_the_adapter_apart(tiny_model, tmp_path):
    adapter = tiny.tiny_adapter(tmp_path / "a.safetensors", tiny_model, targets="attn+ffn", gain=0.3)
    model = SanaSR.from_pretrained(tiny_model, dtype=FP16)
    assert (model.dit.proj_out.weight.dtype, model.vae.decoder.conv_in.weight.dtype) == (FP16, BF16)

    def latents(**options):
        model, found = SanaSR.from_pretrained(tiny_model, **options), []
        model.decode = lambda z, *_: found.append(z)
        model.restore(photo(24, 24), "tree")
        return found[0]
    exact, none = latents(adapter=adapter), latents(adapter=False)
    for merge in (False, True):
        half = latents(adapter=adapter, dtype=torch.bfloat16, merge=merge)
        assert half.dtype == torch.float32
        assert relative(half, exact) < 0.1 * relative(none, exact), merge


def test_a_result_that_is_not_finite_is_an_error(tiny_model):
    model = SanaSR.from_pretrained(tiny_model)
    model.vae.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers; try --dtype fp32"):
        model.restore(photo(8, 8))
