"""lab.faults in its short form, and a test of every fault that it has found."""
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval
import runs
import sanasr
import train
from lab import pretrain
from photos import pairs as photos
from photos import tagger

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(sys.platform != "linux", reason="lab.faults needs fork and /proc")
def test_the_short_form_finds_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lab.faults", "--out", tmp_path, "--quick", "--jobs", "2"], cwd=ROOT,
                          env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert len(rows) > 80 and {"signals", "hostile files"} <= {row["kind"] for row in rows}
    assert "| all |" in (tmp_path / "faults.md").read_text()


# --- model folders ---------------------------------------------------------------------------------------------------


def copied(model, tmp_path):
    folder = tmp_path / "model"
    subprocess.run(["cp", "-r", model, folder], check=True)
    return folder


@pytest.mark.parametrize("part, change", [
    ("vae", {"latent_channels": 0}), ("vae", {"attention_head_dim": 0}),
    ("vae", {"encoder_block_out_channels": {"a": 1}}), ("vae", {"decoder_layers_per_block": ["1"] * 6}),
    ("vae", {"decoder_layers_per_block": [10 ** 9] * 6}), ("vae", {"encoder_qkv_multiscales": 5}),
    ("vae", {"encoder_block_out_channels": [8] * 1000}), ("vae", {"scaling_factor": 0.0}),
    ("transformer", {"num_layers": 10 ** 9}), ("transformer", {"num_layers": 1.5}),
    ("transformer", {"num_layers": True}), ("transformer", {"mlp_ratio": float("inf")}),
    ("transformer", {"in_channels": 0}), ("text_encoder", {"num_hidden_layers": 10 ** 9}),
    ("text_encoder", {"query_pre_attn_scalar": 0}), ("text_encoder", {"layer_types": ["sliding_attention"]}),
    ("text_encoder", {"layer_types": ["x", "y"]})])
def test_a_config_that_no_network_can_have_is_named_at_once(tiny_model, tmp_path, part, change):
    folder = copied(tiny_model, tmp_path) / part
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    cls = {"vae": sanasr.DCAE, "transformer": sanasr.LinearDiT, "text_encoder": sanasr.Gemma2}[part]
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"config.json: .*{next(iter(change))}"):
        cls.from_pretrained(folder)
    assert time.monotonic() - start < 5


def test_integers_are_no_weights(tiny_model, tmp_path):
    path = copied(tiny_model, tmp_path) / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].int()
    save_file(state, path)
    with pytest.raises(ValueError, match="encoder.conv_in.weight in .* is I32, no floating number"):
        sanasr.DCAE.from_pretrained(path.parent)


def test_integers_are_no_adapter(tiny_model, tmp_path):
    key = "transformer_blocks.0.attn1.to_q"
    save_file({f"{key}.lora_A.weight": torch.ones(2, 64, dtype=torch.int32), f"{key}.lora_B.weight": torch.ones(64, 2)},
              tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors: .*lora_A.weight is no matrix of floating numbers"):
        sanasr.SanaSR.from_pretrained(tiny_model, adapter=tmp_path / "a.safetensors")


@pytest.mark.parametrize("change, words", [
    (lambda t: t["model"]["vocab"].update(a="7"), "an id is no number"),
    (lambda t: t["model"]["vocab"].update(a=-5), "an id is no number"),
    (lambda t: t["model"]["vocab"].update(a=1.5), "an id is no number"),
    (lambda t: [token.update(id="x") for token in t["added_tokens"]], "an id is no number"),
    (lambda t: t["model"].update(vocab=[1]), "not a byte-fallback BPE"),
    (lambda t: t["model"]["vocab"].update(a=10 ** 6), "ids up to 1000000, text_encoder/ embeds 296")])
def test_broken_tokenizers_are_named(tiny_model, tmp_path, change, words):
    folder = copied(tiny_model, tmp_path)
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=words) as error:
        sanasr.PromptEncoder(folder)("a tree")
    assert "tokenizer" in str(error.value)


def test_a_deep_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="tokenizer.json: not a byte-fallback BPE"):
        sanasr.GemmaTokenizer(tmp_path)


def test_an_instruction_beyond_the_context_is_refused(tiny_model):
    with pytest.raises(ValueError, match="the instruction has 5001 tokens, at most 4096"):
        sanasr.PromptEncoder(tiny_model)("a tree", "y" * 5000)


def test_the_same_state_makes_the_same_bytes(tmp_path):
    """safetensors writes the metadata in an order of its own, another in every process."""
    state, metadata = {"b": torch.arange(6.0), "a": torch.ones(2, 3).half()}, {f"é{i}\n\"": str(i) for i in range(9)}
    sanasr.save_tensors(state, tmp_path / "x.safetensors", metadata)
    data = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == sorted(metadata)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
    assert all(torch.equal(x, state[k]) for k, x in load_file(tmp_path / "x.safetensors").items())
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.safetensors", "plain")]
    assert modes[0] == modes[1]


# --- tables, states, logs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, tags", [
    ("\ufeffimage,tags\nx.png,\"tree, sky\"\n", ["tree", "sky"]), ("tags,image\ntree\n", None),
    ("image,tags\n\n,\nx.png,tree\n", ["tree"])])
def test_odd_tables_of_tags(tmp_path, text, tags):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert photos.read_tags(tmp_path / "t.csv").get("x.png") == tags


def test_a_huge_field_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("image,tags\nx.png," + "a" * 200_000 + "\n")
    with pytest.raises(SystemExit, match="t.csv: field larger than field limit"):
        photos.read_tags(tmp_path / "t.csv")


@pytest.mark.parametrize("text", ["", "{", "null", '{"a": 1}', '[["a"]]', "[1]"])
def test_a_damaged_index_is_made_anew(tmp_path, text):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    index = tmp_path / "data.json"
    index.write_text(text)
    found, _ = photos.scan([tmp_path], 8, index, 1)
    assert len(found) == 1 and json.loads(index.read_text())[0][0] == found[0].path


class Mark:
    """A pickle that leaves a folder behind when it is read."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("value, words", [
    ([], "no state of this command"), (3, "no state of this command"), ({}, "no state of this command"),
    ({"step": 1}, "no state of this command"), (Mark, "more than tensors and numbers")])
def test_a_state_of_something_else_is_named(tmp_path, value, words, recwarn):
    torch.save(value if value is not Mark else {"step": 1, "settings": Mark(tmp_path / "mark")}, tmp_path / "state.pt")
    with pytest.raises(SystemExit, match=f"state.pt cannot be read .*{words}.*; start anew") as error:
        runs.load_state(tmp_path / "state.pt", keys=("step", "settings"))
    assert "\n" not in str(error.value) and not (tmp_path / "mark").exists() and not recwarn


def test_a_run_whose_settings_or_tensors_are_gone_is_named(tmp_path):
    empty = {"step": 1, "settings": {}, "masters": [], "ema": [], "optimizer": {}, "scaler": {}}
    torch.save(empty, tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="state.pt cannot be read .its settings are not whole"):
        train.load_run(tmp_path)


def test_a_damaged_log_is_named_and_a_missing_one_is_none(tmp_path):
    assert train.read_log(tmp_path / "log.csv") == []
    for data in (b"\xf6\x00", b"step,loss\n1,x\n", b"loss\n1\n"):
        (tmp_path / "log.csv").write_bytes(data)
        with pytest.raises(SystemExit, match="log.csv is damaged; delete it"):
            train.read_log(tmp_path / "log.csv")


def test_a_killed_stage_of_pretraining_logs_no_step_twice(tmp_path):
    path = tmp_path / "prior.csv"
    pretrain.cut_log(path, 5)
    assert not path.exists()
    path.write_text("step,loss\n2,1\n4,1\n6,1\n")
    pretrain.cut_log(path, 4)
    assert path.read_text() == "step,loss\n2,1\n4,1\n"


@pytest.mark.parametrize("value", [[], 3, {"model": [1]}])
def test_a_tagger_checkpoint_of_something_else_is_named(tmp_path, value):
    torch.save(value, tmp_path / "ram.pth")
    with pytest.raises(ValueError, match="ram.pth: holds no tensors by name"):
        tagger.read_checkpoint(tmp_path / "ram.pth")


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_run_belongs_to_one_process(tmp_path):
    script = ("import sys, time, pathlib, runs\nwith runs.claimed(pathlib.Path(sys.argv[1])):\n"
              "    print('mine', flush=True)\n    time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], env=ENV, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(SystemExit, match="run is in use by another process"):
            with runs.claimed(tmp_path / "run"):
                pass
        other.send_signal(signal.SIGKILL)
    with runs.claimed(tmp_path / "run"):  # the claim ends with its process
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file cannot be written"):
        with runs.claimed(tmp_path / "file"):
            pass


def test_an_error_of_a_file_with_a_newline_in_its_name_is_one_line(tmp_path, capsys, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new\nline.png").write_bytes(b"x")
    assert eval.main([str(tmp_path / "new\nline.png"), "--model", str(tiny_model)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "new line.png: not a picture that can be read" in lines[0]


def test_a_broken_text_encoder_ends_a_training_in_one_line(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    folder = copied(tiny_model, tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:99])
    for i in range(2):
        Image.new("RGB", (96, 96), (i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(SystemExit, match="error: .*text_encoder/model.safetensors: not a whole safetensors file"):
        train.main(["--data", str(tmp_path), "--model", str(folder), "--crop", "96", "--steps", "1", "--tags", "none",
                    "--lpips", "alex", "--workers", "0"])


def test_a_run_killed_between_state_and_checkpoint_makes_the_checkpoint_when_resumed(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hq").mkdir()
    for i in range(3):
        Image.new("RGB", (96, 96), (i, 0, 0)).save(tmp_path / "hq" / f"{i}.png")
    argv = ["--data", "hq", "--model", str(tiny_model), "--crop", "96", "--steps", "1", "--tags", "none",
            "--lpips", "alex", "--workers", "0", "--rank", "2", "--batch", "1", "--val", "0"]
    assert train.main(argv) == 0
    made = [tmp_path / "runs/default/adapter.safetensors", tmp_path / "runs/default/checkpoints/000001.safetensors"]
    before = [path.read_bytes() for path in made]
    for path in made:
        path.unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert [path.read_bytes() for path in made] == before


def test_weights_on_a_full_disk_are_an_os_error_that_names_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    sanasr.save_tensors({"x": torch.zeros(4)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="w.safetensors"):
            sanasr.save_tensors({"x": torch.zeros(4000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]
