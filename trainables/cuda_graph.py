"""A training step replayed as a CUDA graph: the host issues one call where it would issue hundreds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARMUP_STEPS = 3  # as PyTorch's notes on CUDA semantics have it


@dataclass(frozen=True)
class _Capture:
    """A graph, what it reads, and what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor]
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedStep:
    """Forward and backward of batches of one size, captured at the first batch of each resolution.

    A ResNet-18 at batch 128 takes a fast GPU less time than it takes Python to issue its kernels. Batches of other
    sizes, such as an epoch's last one, are run as they are.

    Args:
        step: inputs, labels -> loss; leaves gradients in the parameters, which have none before it.
        model: the network that ``step`` trains.
        batch_size: images of the batches to capture.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], model: nn.Module, batch_size: int) -> None:
        self._step, self._model, self._batch_size = step, model, batch_size
        self._captured: _Capture | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Do as ``step`` does; the result is overwritten by the next call."""
        if len(y) != self._batch_size:
            return self._step(x, y)
        captured = self._captured
        if captured is None or captured.inputs[0].shape != x.shape:
            captured = self._captured = None  # gives its memory back before more is taken
            captured = self._captured = self._capture(x, y)
        for held, given in zip(captured.inputs, (x, y), strict=True):
            held.copy_(given)
        captured.graph.replay()
        # Replaying writes into the gradients of the capture; the optimizer is to find those.
        for parameter, gradient in zip(self._model.parameters(), captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss

    def _capture(self, x: Tensor, y: Tensor) -> _Capture:
        inputs = x.clone(), y.clone()
        buffers = [buffer.clone() for buffer in self._model.buffers()]
        random_state = torch.cuda.get_rng_state(x.device)
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):  # libraries choose their algorithms and make their workspaces
                    self._step(*inputs)
                    self._model.zero_grad(set_to_none=True)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                loss = self._step(*inputs)
        gradients = [parameter.grad for parameter in self._model.parameters()]
        # The rehearsals must leave no trace: neither in batch norm's running statistics nor in dropout.
        with torch.no_grad():
            for buffer, before in zip(self._model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.cuda.set_rng_state(random_state, x.device)
        return _Capture(graph, inputs, loss, gradients)
