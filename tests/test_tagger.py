"""RAM and DAPE against the original implementations on seeded weights of the official size (about 15 CPU-seconds,
1.5 GB), checkpoints, the cache and the command line on a tiny network, and the words that stay out of a prompt."""
import json
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, external
from PIL import Image
from safetensors.torch import load_file
from seeded import seeded_state_dict

import sanasr
import weights
from photos import pairs, tagger

DATA = ROOT / "tests" / "data" / "ram"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
PHOTO = Image.open(DATA / "kodak05.webp")
RANDN = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
TINY = tagger.Config(size=96, width=8, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=3, embed=8, hidden=8)


@pytest.fixture(autouse=True)
def empty_cache(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SANASR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def seeded_ram():
    return seeded_state_dict(MANIFEST["ram"])


@pytest.fixture(scope="module")
def dape(seeded_ram):
    """The network with DAPE's LoRA merged, from a file's contents."""
    lora = seeded_state_dict(MANIFEST["dape"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tagger, "read_checkpoint", lambda path: lora)
        return tagger.RAM.from_state(tagger.add_dape(seeded_ram, "DAPE.pth"))


def taps(net, x):
    """The intermediate results that the goldens hold, cut as they are; and the whole output of the image encoder."""
    swin, (first, second), found = net.visual_encoder, net.tagging_head["encoder"]["layer"], {}
    modules = {"patch_embed": swin.patch_embed["norm"], "image_embeds": net.image_proj, "swin": swin,
               "tag_layer0": first, "tagging_head": second}
    modules |= {f"stage{i}": layer for i, layer in enumerate(swin.layers)}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, out, name=name: found.__setitem__(name, out))
    with torch.no_grad():
        out = {"logits": net(x), "whole": found["swin"]}
    for name in ("patch_embed", "stage0", "stage1", "stage2", "stage3"):
        t = found[name].flatten(1, 2)
        out[name] = t[:, ::t.shape[1] // 8, ::t.shape[2] // 32]
    out |= {"swin": found["swin"][:, :8, ::8], "swin_tail": found["swin"][:, -4:, ::8],
            "image_embeds": found["image_embeds"][:, :16], "image_embeds_tail": found["image_embeds"][:, -4:]}
    return out | {name: found[name][:, ::64, ::16] for name in ("tag_layer0", "tagging_head")}


@pytest.fixture(scope="module")
def dape_taps(dape):
    return taps(dape, tagger.preprocess(PHOTO))


def golden(prefix, path=DATA / "golden.safetensors"):
    return {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}


def check(wanted, got, tolerance):
    index = wanted.pop("tag_index")
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() < tolerance, name
    tags, _ = tagger.tag_list()
    assert [tag for tag, _ in tagger.select(got["logits"][0])] == [tags[i] for i in index]


def test_goldens(seeded_ram, dape_taps):
    check(golden("ram.randn0."), taps(tagger.RAM.from_state(seeded_ram), RANDN), 1e-5)
    check(golden("dape.kodak05."), dape_taps, 1e-5)


def test_dape_golden_with_many_tags(dape, dape_taps):
    """Plain seeded logits vary little: with larger tag embeddings 375 tags fire, and a wrong head or eps shows."""
    state = dape.state_dict()
    net = tagger.RAM.from_state(state | {"label_embed": state["label_embed"] * 32, "fc.weight": state["fc.weight"] * 4})
    net.visual_encoder.forward = lambda x: dape_taps["whole"]
    heads = []
    net.tagging_head["encoder"]["layer"][1].register_forward_hook(lambda module, args, out: heads.append(out))
    logits = net(torch.empty(1))
    check(golden("sharp.kodak05."), {"logits": logits, "tagging_head": heads[0][:, ::64, ::16]}, 3e-5)
    assert len(tagger.select(logits[0])) == 375


@pytest.mark.slow
@pytest.mark.parametrize("name, picture", [("ram", "kodak05"), ("dape", "randn0")])
def test_other_goldens(name, picture, seeded_ram, dape):
    wanted = golden(f"{picture}.", external("SANASR_ORACLE", "ram", f"golden_{name}.safetensors"))
    net = dape if name == "dape" else tagger.RAM.from_state(seeded_ram)
    check(wanted, taps(net, tagger.preprocess(PHOTO) if picture == "kodak05" else RANDN), 1e-5)


def test_selection():
    """Strictly above the tag's own threshold, in the list's order: probability 1 does not pass threshold 1."""
    for case in json.loads((DATA / "select.json").read_text()):
        logits = torch.randn(1, 4585, generator=torch.Generator().manual_seed(case["seed"]))[0]
        logits = logits * case["scale"] + case["shift"]
        logits[case["set_50"]] = 50
        found = tagger.select(logits)
        assert ", ".join(tag for tag, _ in found) == case["tags"]
        assert [p for _, p in found] == pytest.approx(logits[case["index"]].sigmoid().tolist())


def test_preprocessing():
    g = golden("preprocess.")
    x = tagger.preprocess(Image.fromarray(g["small_u8"].numpy()))
    assert x.shape == (1, 3, 384, 384)
    torch.testing.assert_close(x[:, :, ::8, ::8], g["up_noaa.grid"], rtol=0, atol=1e-5)
    torch.testing.assert_close(x[:, :, 100:132, 300:332], g["up_noaa.patch"], rtol=0, atol=1e-5)
    # shrinking, where antialiasing would differ by 1: the golden's picture is not 8-bit, rounding it costs 0.01
    u8 = (torch.rand(1, 3, 500, 640, generator=torch.Generator().manual_seed(5))[0] * 255).round().byte()
    x = tagger.preprocess(Image.fromarray(u8.permute(1, 2, 0).numpy()))
    torch.testing.assert_close(x[:, :, ::8, ::8], g["rand_noaa.grid"], rtol=0, atol=0.01)
    for mode in ("L", "RGBA", "P", "1", "I;16"):
        assert tagger.preprocess(Image.new(mode, (5, 3)), 8).isfinite().all()


def tiny_weights():
    """(RAM's, DAPE's LoRA), for the tiny network."""
    with torch.device("meta"):
        tensors = tagger.RAM(TINY).state_dict()
    state, shapes = seeded_state_dict((k, v.shape) for k, v in tensors.items()), {}
    state["fc.weight"] *= 30  # far enough apart for tags to fire
    for key in (k for k in state if k.endswith(("qkv.weight", "query.weight", "key.weight"))):
        (rows, columns), fused = state[key].shape, "qkv" in key
        shapes[key.replace("weight", "lora_A")] = (16 if fused else 8, columns)
        shapes[key.replace("weight", "lora_B")] = (rows * 2 // 3 if fused else rows, 8)
    return state, seeded_state_dict(shapes.items())


@pytest.fixture
def files(tmp_path):
    """ram.pth and dape.pth, as the official ones are laid out: parts that tagging does not need included."""
    state, lora = tiny_weights()
    model = {k.replace("tagging_head.", "vision_multi."): v for k, v in state.items()}
    model |= {"visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(1), "text_decoder.x": torch.zeros(2),
              "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long)}
    torch.save({"model": model, "optimizer": {"state": {0: torch.zeros(3)}}, "epoch": 3}, tmp_path / "ram.pth")
    torch.save(lora | {"tag_encoder.x.lora_A": torch.zeros(1)}, tmp_path / "dape.pth")
    return {"ram": tmp_path / "ram.pth", "dape": tmp_path / "dape.pth"}


def small(files, name="dape", **kwargs):
    return tagger.Tagger.from_pretrained(name, "cpu", ram=files["ram"], dape=files["dape"], config=TINY, **kwargs)


def test_checkpoints(files):
    """The files give the same network as the tensors; LoRA changes all that it is made for, and nothing else."""
    (state, lora), merged = tiny_weights(), small(files).net.state_dict()
    direct = tagger.Tagger(tagger.RAM.from_state(state, config=TINY))
    assert small(files, "ram").logits(PHOTO).equal(direct.logits(PHOTO))
    changed = {k for k, v in merged.items() if not v.equal(state[k])}
    assert changed == {k.replace("lora_A", "weight") for k in lora if k.endswith("lora_A")}


def test_conversion(files, tmp_path, monkeypatch):
    out = tagger.convert(tagger.cache_dir() / tagger.LEAN, files["ram"], TINY)
    assert {v.dtype for v in load_file(out).values()} == {torch.float16}
    assert [p.name for p in out.parent.iterdir()] == [tagger.LEAN]  # no temporary left behind
    want = small(files).logits(PHOTO)
    got = small(files | {"ram": None}).logits(PHOTO)  # found by itself
    assert 0 < (got - want).std() < 0.005 * want.std()


def test_bf16_and_batches(files):
    net, x = small(files).net, tagger.preprocess(PHOTO, 96)
    x = torch.cat([x, 1 - x.flip(3)])
    with torch.no_grad():
        want = net(x)
        torch.testing.assert_close(want, torch.cat([net(x[:1]), net(x[1:])]), rtol=0, atol=1e-3)
    got = small(files, dtype=torch.bfloat16).logits(PHOTO)
    assert got.dtype == torch.float32 and (got - want[0]).std() < 0.05 * want[0].std()


def test_bad_checkpoints(files, tmp_path):
    state = tiny_weights()[0]
    without = {k: v for k, v in state.items() if k != "label_embed"}
    for content, message in (
            (without, "1 keys missing.*label_embed"), (Path("x"), "more than tensors"),
            (state | {"fc.weight": torch.zeros(3)}, r"fc.weight is \(3,\), not \(1, 8\)"),
            (state | {"fc.weight": torch.ones(1, 8, dtype=torch.long)}, "fc.weight is .* of integers")):
        torch.save({"model": content}, files["ram"])
        with pytest.raises(ValueError, match=f"ram.pth.*{message}"):
            small(files)
    torch.save({"model": state}, files["ram"])
    files["ram"].write_bytes(files["ram"].read_bytes()[:5000])  # a download that broke off
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    (tagger.cache_dir() / tagger.LEAN).mkdir(parents=True)  # a folder in its place
    for ram, name in ((files["ram"], "ram.pth"), (tmp_path / "x.safetensors", "x.safetensors"), (None, tagger.LEAN)):
        with pytest.raises(ValueError, match=f"{name}: not a readable checkpoint"):
            small(files | {"ram": ram})
    with pytest.raises(ValueError, match="'ramm'"):
        tagger.Tagger.from_pretrained("ramm")


def test_cache(files, monkeypatch):
    first = small(files)
    found = first.tag(PHOTO)
    assert found and all(p > 0 for _, p in found)
    monkeypatch.setattr(first, "logits", lambda image: pytest.fail("computed again"))
    assert first.tag(PHOTO) == found
    with pytest.raises(pytest.fail.Exception):  # another picture of the same bytes is not the same picture
        first.tag(Image.frombytes("RGB", (192, 768), PHOTO.convert("RGB").tobytes()))
    for other in (small(files, "ram"), small(files, dtype=torch.bfloat16)):
        monkeypatch.setattr(other, "logits", lambda image: torch.full((4585,), -50.0))
        assert other.tag(PHOTO) == []
    (path,) = (p for p in tagger.cache_dir().rglob("*.json") if json.loads(p.read_text()))
    for damaged in ("[[", "null", "[1]"):  # such an entry is computed afresh and mended
        path.write_text(damaged)
        assert small(files).tag(PHOTO) == found
    assert json.loads(path.read_text()) == [list(x) for x in found]
    monkeypatch.setenv("SANASR_CACHE", str(path))  # a disk that cannot be written
    assert small(files).tag(PHOTO) == found


def test_without_weights(monkeypatch, capsys):
    def unavailable(name):
        raise weights.Unavailable(f"{name} is not on this machine")
    monkeypatch.setattr(weights, "file", unavailable)
    assert pairs.find_tags("dape", ["x.png"], None) is None
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "suffix alone" in message
    assert "dape is not on" in message and "ram is not on" in message  # all that is to be fetched, at once
    with pytest.raises(SystemExit, match="^error: dape is not on this machine; and ram is not"):
        tagger.main([str(DATA / "kodak05.webp")])


def test_command_line(files, monkeypatch, capsys, tmp_path):
    made = small(files)
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", lambda *_: made)
    monkeypatch.setattr(made, "tag", lambda image: [("artifact", 0.9), ("cat", 0.75), ("sea", 0.7)])
    tagger.main([str(DATA / "kodak05.webp")])
    lines = capsys.readouterr().out.splitlines()
    assert "3 tags" in lines[0]
    assert lines[1:3] == ["  0.900  artifact   (degradation: not in the prompt)", "  0.750  cat"]
    assert lines[-1] == "cat, sea"
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(SystemExit, match="error: .*text.png"):
        tagger.main([str(tmp_path / "text.png")])


def test_tags_for_the_prompt(monkeypatch):
    found = ["JPEG", "tree", "low quality", "Low-Resolution photo", "film noise", "sea", "noisemaker", "compressed"]
    monkeypatch.setattr(tagger.Tagger, "tag", lambda self, image: [(tag, 0.9) for tag in found])
    tags = tagger.Tagger.__new__(tagger.Tagger).tags(None)
    assert tags == ["tree", "sea", "noisemaker"]
    every_tag = tagger.tag_list()[0]
    assert set(every_tag) - set(sanasr.clean_tags(every_tag)) == {"artifact"}  # all others are content


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Letters, a few merges across the beginning of words, bytes for the rest."""
    config = tiny.byte_tokenizer()
    config["model"]["merges"] = ["b l", "r y", "▁ bl", "l o", "lo w", "▁ low", "e ,", "▁ n"]
    for merge in config["model"]["merges"]:
        config["model"]["vocab"].setdefault(merge.replace(" ", ""), len(config["model"]["vocab"]))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(config))
    return sanasr.GemmaTokenizer(path)


@pytest.mark.parametrize("prompt, shown", [
    ("blurry tree", "[blurry]▁tree"),
    ("a blurry, old tree", "a[▁blurry],▁old▁tree"),          # with the space that a token holds together with the word
    ("trees with noise, sea", "trees▁with[▁noise,]▁sea"),    # likewise the comma behind
    ("  A Low Quality photo, low-resolution", "a[▁low▁quality]▁photo,[▁low-resolution]"),
    ("a naïve ☂ photo with artifacts", "a▁na<0xC3><0xAF>ve▁<0xE2><0x98><0x82>▁photo▁with▁[artifacts]"),
    *((plain, plain.replace(" ", "▁")) for plain in (
        "noiseless unblurred pixels, high-resolution, compressor", sanasr.SUFFIXES["appendix"], ""))])
@pytest.mark.parametrize("instruction", ["", "ignore noise:\n"])
def test_mask_of_words_of_degradation(tokenizer, prompt, shown, instruction):
    """[…]: what is masked."""
    ids, mask, kept = sanasr.tokenize_prompt(tokenizer, prompt, instruction)
    first, *pieces = (tokenizer.pieces[ids[k]] if m else f"[{tokenizer.pieces[ids[k]]}]"
                      for k, m in zip(kept, mask, strict=True))
    assert first == "<bos>" and (instruction or kept == list(range(len(ids))))
    assert "".join(pieces).replace("][", "").removeprefix("<0x0A>" if instruction else "") == shown
