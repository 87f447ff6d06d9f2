"""CUDA graphs, for inference and for training: all kernels of a function as one launch.

    encoder = Graphed(encoder)                        encoder(x): a graph for each shape of x that comes twice in a row
    backward = graphed_backward(loss, parameters)     of a training, forward and backward, captured at the first call

Traps: f must not wait for the GPU. What f reads besides its arguments (weights) must keep its memory: no `.to(…)` after
the first call. What f writes besides its result (gradients) holds until any graph of the process is replayed.
"""
from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn

from photos.pictures import one_line

KEEP = 8  # graphs of one function, those of the shapes used last
ALIVE = weakref.WeakSet()  # all graphs of the process: they share the memory of their intermediate results


class Buffer:
    """Memory that graphs read an argument from."""

    def __init__(self, x):
        with torch.inference_mode(False):  # else it could be written to in inference mode only
            self.memory, self.source = x.clone(), None

    def fill(self, x, fixed):
        """Copy x here. fixed: x never changes in place, so the tensor that was copied last is not copied again."""
        if not (fixed and x is self.source):
            self.memory.copy_(x)
            self.source = x if fixed else None


@dataclass(eq=False)
class Graph:
    """One captured call: replay() reads the buffers and writes `result`."""
    recorded: object  # a torch.cuda.CUDAGraph
    buffers: list
    result: torch.Tensor | dict
    device: torch.device


def record(f, inputs, clear=None):
    """(torch.cuda.CUDAGraph of f(*inputs), its result). Raises whatever the driver, Triton or a kernel raises.

    clear: is called between warm-up and capture, to give back memory that the warm-up has left.
    """
    device = next((x.device for x in inputs if x is not None), None)
    pool = next((graph.recorded.pool() for graph in ALIVE if graph.device == device), None)
    with torch.cuda.device(device):
        graph, now, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(now)
        with torch.cuda.stream(side):  # warm up first, so that one-time initialisation is not captured
            for _ in range(2):
                f(*inputs)
        now.wait_stream(side)
        if clear:
            clear()
        with torch.cuda.stream(now), torch.cuda.graph(graph, pool):  # the stream is `now` again, even if this fails
            result = f(*inputs)
    return graph, result


class Graphed(nn.Module):
    """f(*inputs, *fixed) as CUDA graphs. f's arguments are tensors or None; it returns a tensor, or a dict of tensors.

    A graph serves one shape of the arguments. A shape that comes up once runs as it is, since capturing takes as long
    as three calls; the second call in a row is captured. The `keep` graphs used last are kept. Where one cannot be
    captured, a line on stderr says why, and all calls run as they are.
    at_once: capture at the first call. clear: see `record`. keep: KEEP by default.
    """

    def __init__(self, f, at_once=False, clear=None, keep=None):
        super().__init__()
        self.f, self.at_once, self.clear, self.keep, self.possible, self.last = f, at_once, clear, keep, True, None
        self.graphs, self.buffers = OrderedDict(), weakref.WeakValueDictionary()  # a buffer lives as long as its graphs

    def forward(self, *inputs, fixed=()):
        """fixed: arguments that never change in place; they are copied only when they are other tensors."""
        arguments = *inputs, *fixed
        key = tuple(None if x is None else (x.shape, x.dtype) for x in arguments)
        again, self.last = self.at_once or key == self.last, key
        if key not in self.graphs and self.possible and again:
            try:
                self.capture(key, arguments)
            except Exception as error:  # whatever the driver, Triton or a kernel raises
                self.possible = False
                self.graphs.clear()
                why = one_line(error.__context__ or error)[:300]  # the end of a failed capture raises again
                print(f"no CUDA graph, so kernels are launched one by one, which is slower: {why}", file=sys.stderr,
                      flush=True)
        if key not in self.graphs:
            return self.f(*arguments)
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        for i, (buffer, x) in enumerate(zip(graph.buffers, arguments, strict=True)):
            if x is not None:
                buffer.fill(x, fixed=i >= len(inputs))
        graph.recorded.replay()
        y = graph.result  # the next replay overwrites it
        return {name: x.clone() for name, x in y.items()} if isinstance(y, dict) else y.clone()

    def capture(self, key, arguments):
        if len(self.graphs) == (self.keep or KEEP):
            self.graphs.popitem(last=False)
        buffers = []
        for place, x in zip(enumerate(key), arguments, strict=True):
            buffer = None if x is None else self.buffers.get(place) or Buffer(x)
            if buffer:
                buffer.fill(x, fixed=False)
                self.buffers[place] = buffer
            buffers.append(buffer)
        recorded, result = record(self.f, [b and b.memory for b in buffers], self.clear)
        device = next(b.memory.device for b in buffers if b)
        self.graphs[key] = graph = Graph(recorded, buffers, result, device)
        ALIVE.add(graph)


def graphed_backward(loss, parameters):
    """Forward and backward of a training as one CUDA graph: a function batch -> {name: value} of loss(batch), detached.

    loss: a dict whose tensors are the graph's inputs -> {"loss": a scalar, …}. The first batch is captured, and one of
    other shapes in its place. The gradients lie where the graph writes them: leave them there, do not set them to None.
    """
    names, parameters = [], list(parameters)

    def forget():
        for p in parameters:
            p.grad = None

    def step(*inputs):
        forget()
        values = loss(dict(zip(names, inputs, strict=True)))
        values["loss"].backward()
        return {name: value.detach() for name, value in values.items()}
    graphed = Graphed(step, at_once=True, clear=forget, keep=1)  # one graph, so one place for the gradients

    def backward(batch):
        inputs = {name: x for name, x in batch.items() if torch.is_tensor(x)}
        names[:] = inputs
        return graphed(*inputs.values())
    return backward
