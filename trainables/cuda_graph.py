"""A training step replayed as a CUDA graph: the host issues one call where it would issue hundreds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARMUP_STEPS = 3  # as PyTorch's notes on CUDA semantics have it


class GraphedStep:
    """Forward and backward of batches of one size, captured at the first batch of each resolution.

    A ResNet-18 at batch 128 takes a fast GPU less time than it takes Python to issue its kernels. Batches of other
    sizes, such as an epoch's last one, are run as they are.

    Args:
        step: inputs, labels, share -> loss, correct; leaves gradients in the parameters, which have none before it.
        model: the network that ``step`` trains.
        batch_size: images of the batches to capture.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], model: nn.Module, batch_size: int
    ) -> None:
        self._step, self._model, self._batch_size = step, model, batch_size
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, y: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        if len(y) != self._batch_size:
            return self._step(x, y, share)
        if self._inputs is None or self._inputs[0].shape != x.shape:
            self._capture(x, y, share)
        assert self._inputs is not None
        for held, given in zip(self._inputs, (x, y, share), strict=True):
            held.copy_(given)
        self._graph.replay()
        # Replaying writes into the gradients of the capture; the optimizer is to find those.
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return self._outputs

    def _capture(self, x: Tensor, y: Tensor, share: Tensor) -> None:
        self._inputs = x.clone(), y.clone(), share.clone()
        buffers = [buffer.clone() for buffer in self._model.buffers()]
        random_state = torch.cuda.get_rng_state(x.device)
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):  # libraries choose their algorithms and make their workspaces
                    self._step(*self._inputs)
                    self._forget_gradients()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._outputs = self._step(*self._inputs)
        self._gradients = [parameter.grad for parameter in self._model.parameters()]
        # The rehearsals must leave no trace: neither in batch norm's running statistics nor in dropout.
        with torch.no_grad():
            for buffer, before in zip(self._model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.cuda.set_rng_state(random_state, x.device)

    def _forget_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
