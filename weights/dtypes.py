"""In which dtype the networks compute on a device."""
import torch


def choose_dtypes(device, dtype=None):
    """(dtype of the transformer, dtype of the autoencoder and the text encoder) for `device`.

    dtype: what the user asks for; None: bfloat16 on a CUDA GPU, float32 elsewhere.
    GPUs of compute capability below 8.0 only emulate bfloat16, slowly: there it becomes float32, asked for or not.
    float16 holds for the transformer alone, since the autoencoder's activations overflow it: the others then take
    bfloat16, or float32 where that is emulated.
    """
    device = torch.device(device)
    emulated = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    half = torch.float32 if emulated else torch.bfloat16
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype == torch.bfloat16:
        dtype = half
    return dtype, torch.float32 if dtype == torch.float32 else half
