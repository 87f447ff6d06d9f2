"""Weights on disk: safetensors, whole or not at all, and networks in folders of the official layout.

    LinearDiT.from_pretrained(folder)      config.json and the safetensors beside it, one file or shards
    save_module(module, folder)            the same the other way round
    save_tensors(state, path)              any {key: tensor}
"""
import hashlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import weights
from photos.pictures import atomically, one_line, write_bytes

STORED = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the dtypes that weights may have


def open_weights(path):
    """safe_open with an error that names the file."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def sort_header(path):
    """Sort the metadata of a safetensors file, which come in any order: the same state then makes the same bytes.

    The file also gets the permissions of any new file; the library makes it readable for its owner alone.
    """
    with open(path, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header |= {"__metadata__": dict(sorted(header["__metadata__"].items()))} if "__metadata__" in header else {}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            f.seek(8)
            f.write(text.ljust(size))
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def read_checkpoint(path):
    """{key: tensor} of a `.safetensors`, or of a PyTorch pickle of tensors, flat or under "model" or "params".

    It is memory-mapped: only tensors that are used are read from the disk. Raises ValueError that names the file.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:  # what weights_only refuses
        raise ValueError(f"{path}: holds more than tensors, it is not the official file; fetch it again") from error
    except Exception as error:  # a damaged archive raises anything
        raise ValueError(f"{path}: not a readable checkpoint ({one_line(error)[:200]}); fetch it again") from error
    for part in ("model", "params"):
        state = state.get(part, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no tensors by name, it is not the official file; fetch it again")
    return state


def save_tensors(state, path, metadata=None):
    """Write {key: tensor} as a safetensors file, whole or not at all. Raises OSError that names the file."""
    with atomically(path) as temporary:
        try:
            save_file({key: x.contiguous() for key, x in state.items()}, temporary, metadata)
        except SafetensorError as error:  # a full disk is one, too
            code = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else OSError(
                f"{path} cannot be written ({error})") from None
        sort_header(temporary)


class Pretrained(nn.Module):
    """A network whose weights lie in a folder of the official layout. A subclass is built from its config alone."""

    filename = "diffusion_pytorch_model.safetensors"  # what `save_module` writes
    provenance = {}  # the metadata that `save_module` was given

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """Load config.json and the weights beside it, one file or shards.

        The module is built on the meta device and the memory-mapped tensors are assigned, so memory holds the weights
        once. dtype: tensors of another dtype are converted one by one; None keeps the stored one.
        Raises ValueError or OSError that names the file and the keys.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with torch.device("meta"):
                module = cls(config)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:  # of JSON as well, or of impossible sizes
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        module.provenance = config.get("_provenance", {})
        state = read_state(folder, module.state_dict(), dtype, device)
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False)


def read_state(folder, expected, dtype, device):
    """The weights in `folder` as {key: tensor}. Raises ValueError unless keys and shapes are those of `expected`."""
    state, problems = {}, []
    for name in weights.pick_files(os.listdir(folder), dtype, where=f"{folder}: "):
        with open_weights(folder / name) as file:
            for stored in file.keys():
                key, part = stored.removeprefix("model."), file.get_slice(stored)
                if key == "lm_head.weight":  # the language-model head, tied to the embedding
                    continue
                if key not in expected:
                    problems.append(f"unexpected {stored[:100]} in {name}")
                elif list(expected[key].shape) != part.get_shape():
                    problems.append(f"{stored} in {name} is {part.get_shape()}, expected {list(expected[key].shape)}")
                elif part.get_dtype() not in STORED:
                    problems.append(f"{stored} in {name} is {part.get_dtype()}, no floating number")
                else:
                    state[key] = file.get_tensor(stored).to(device=device, dtype=dtype)
    problems += [f"missing {key}" for key in expected if key not in state and not any(key in p for p in problems)]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:5])}{more}")
    return state


def save_module(module, folder, dtype=None, metadata=None):
    """Write config.json and one safetensors file in the official layout; `metadata` goes under "_provenance"."""
    state = {key: x.detach().to(dtype=dtype, device="cpu") for key, x in module.state_dict().items()}
    save_tensors(state, Path(folder) / module.filename)
    config = module.config | ({"_provenance": metadata} if metadata else {})
    write_bytes(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")


def fingerprint(folder):
    """A hash of the names, the sizes and 16 samples of 64 KiB of all files of `folder`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(max(0, size - 65536) * i // 15)
                digest.update(file.read(65536))
    return digest.hexdigest()
