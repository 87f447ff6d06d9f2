"""lab.faults in its short form, and a test of every fault that it has found."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, python
from PIL import Image
from safetensors.torch import load_file

import runs
import sanasr
import train
import trainer
from lab.faults import Mark
from photos import pairs, tagger
from weights.files import save_tensors

TRAIN = "--crop 96 --steps 1 --tags none --lpips alex --workers 0 --rank 2 --batch 1 --val 0".split()


@pytest.mark.skipif(sys.platform != "linux", reason="lab.faults needs fork and /proc")
def test_the_short_form_finds_nothing(tmp_path):
    done = python("-m", "lab.faults", "--out", tmp_path, "--sample", 100, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert len(rows) > 30 and {"signals", "hostile files"} <= {row["kind"] for row in rows}
    assert "| all |" in (tmp_path / "faults.md").read_text()


def test_broken_tokenizers_and_long_instructions_are_named(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "tokenizer" / "tokenizer.json"
    whole = path.read_text()
    for change, words in (
            *((lambda t, new=new: t["model"]["vocab"].update(a=new), "an id is no number") for new in ("7", -5, 1.5)),
            (lambda t: [token.update(id="x") for token in t["added_tokens"]], "an id is no number"),
            (lambda t: t["model"].update(vocab=[1]), "not a byte-fallback BPE"),
            (lambda t: t["model"]["vocab"].update(a=10 ** 6), "ids up to 1000000, text_encoder/ embeds 296")):
        tokenizer = json.loads(whole)
        change(tokenizer)
        path.write_text(json.dumps(tokenizer))
        with pytest.raises(ValueError, match=words) as error:
            sanasr.PromptEncoder(model)("a tree")
        assert "tokenizer" in str(error.value)
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="tokenizer.json: not a byte-fallback BPE"):
        sanasr.GemmaTokenizer(path.parent)
    path.write_text(whole)
    with pytest.raises(ValueError, match="the instruction has 5001 tokens, at most 4096"):
        sanasr.PromptEncoder(model)("a tree", "y" * 5000)


def test_the_same_state_makes_the_same_bytes_and_a_full_disk_leaves_them(tmp_path):
    """safetensors writes the metadata in an order of its own, another in every process."""
    state, metadata = {"b": torch.arange(6.0), "a": torch.ones(2, 3).half()}, {f"é{i}\n\"": str(i) for i in range(9)}
    path, limits = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_tensors(state, path, metadata)
    data = path.read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"].items()) == sorted(metadata.items())
    assert all(torch.equal(x, state[k]) for k, x in load_file(path).items())
    with pytest.raises(OSError, match="x.safetensors"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            save_tensors({"x": torch.zeros(4000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == data and os.listdir(tmp_path) == ["x.safetensors"]


def test_odd_tables_logs_and_indices(tmp_path):
    path = tmp_path / "t.csv"
    for text, tags in (("\ufeffimage,tags\nx.png,\"tree, sky\"\n", ["tree", "sky"]), ("tags,image\ntree\n", None),
                       ("image,tags\n\n,\nx.png,tree\n", ["tree"])):
        path.write_text(text, encoding="utf-8")
        assert pairs.read_tags(path).get("x.png") == tags
    path.write_text("image,tags\nx.png," + "a" * 200_000 + "\n")
    with pytest.raises(runs.UserError, match="t.csv: field larger than field limit"):
        pairs.read_tags(path)
    for data in (b"\xf6\x00", b"step,loss\n1,x\n", b"loss\n1\n"):
        path.write_bytes(data)
        with pytest.raises(runs.UserError, match="t.csv is damaged; delete it"):
            runs.read_log(path)
    path.unlink()
    assert runs.read_log(path) == []
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    index = tmp_path / "data.json"
    for text in ("", "{", "null", '{"a": 1}', '[["a"]]', "[1]"):  # a damaged index of the photos is made anew
        index.write_text(text)
        found, _ = pairs.scan([tmp_path], 8, index, 1)
        assert len(found) == 1 and json.loads(index.read_text())[0][0] == found[0].path


def test_a_state_of_something_else_is_named(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.pt"
    for value, words in ((b"damaged", ""), *((x, "no state of this command") for x in ([], 3, {}, {"step": 1})),
                         ({"step": 1, "settings": Mark()}, "more than tensors and numbers")):
        path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
        with pytest.raises(runs.UserError, match=f"state.pt cannot be read .*{words}.*; start anew") as error:
            runs.load_state(path, keys=("step", "settings"))
        assert "\n" not in str(error.value) and os.listdir() == ["state.pt"] and not recwarn
    torch.save({"step": 1, "settings": {}, "masters": [], "ema": [], "optimizer": {}, "scaler": {}}, path)
    with pytest.raises(runs.UserError, match="state.pt cannot be read"):
        trainer.open_state(tmp_path)
    for value in ([], 3, {"model": [1]}):
        torch.save(value, path)
        with pytest.raises(ValueError, match="state.pt: holds no tensors by name"):
            tagger.read_checkpoint(path)


def test_a_run_belongs_to_one_process(tmp_path):
    script = "import pathlib, runs\nwith runs.claimed(pathlib.Path('run')): print(flush=True) or input()"
    env, pipes = os.environ | {"PYTHONPATH": str(ROOT)}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], env=env, cwd=tmp_path, **pipes) as other:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(runs.UserError, match="run is in use by another process"):
            runs.claimed(tmp_path / "run").__enter__()
        other.send_signal(signal.SIGKILL)
    with runs.claimed(tmp_path / "run"):  # the claim ends with its process
        (tmp_path / "file").touch()
    with pytest.raises(runs.UserError, match="file cannot be written"):
        runs.claimed(tmp_path / "file").__enter__()


def test_a_resumed_training_makes_the_files_that_it_lacks(here, photos, tiny_model):
    argv = ["--data", str(photos), "--model", str(tiny_model), *TRAIN]
    assert train.main(argv) == 0
    made = [Path("runs/default/adapter.safetensors"), Path("runs/default/checkpoints/000001.safetensors")]
    before = [path.read_bytes() for path in made]
    for path in made:  # as if it had been killed between the state and the checkpoint
        path.unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert [path.read_bytes() for path in made] == before
