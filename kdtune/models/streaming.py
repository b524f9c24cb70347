"""Layers whose weights stay in host memory: the device holds those of the one that computes, and of the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdtune.models.decoder import Decoder
from kdtune.models.quantization import is_quantized


def stream_layers(model: Decoder, device: torch.device) -> None:
    """Let a frozen model that is in host memory compute on `device`: what is outside of its layers moves there."""
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.weight = nn.Parameter(module.weight.to(device), requires_grad=False)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    layers = list(model.model.layers)
    if device.type == "cuda":
        for parameter in model.model.layers.parameters():
            _pin(parameter)
    fetcher = _Fetcher(layers, device)
    model.model.layers = nn.ModuleList(_StreamedLayer(layer, fetcher, index) for index, layer in enumerate(layers))


class _StreamedLayer(nn.Module):
    """A layer that computes with its weights' copies on the device."""

    def __init__(self, layer: nn.Module, fetcher: _Fetcher, index: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.fetcher = fetcher

    def forward(self, *args: Any) -> Tensor:
        return functional_call(self.layer, self.fetcher.get(self.index), args)


class _Fetcher:
    """Copies weights to the device on a stream of its own, while the layer before is computed."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._stream = torch.Stream(device) if device.type not in ("cpu", "meta") else None
        self._next: dict[int, dict[str, Tensor]] = {}

    def get(self, index: int) -> dict[str, Tensor]:
        """The weights of layer `index`, on the device; those of the next set out."""
        weights = self._next.pop(index) if index in self._next else self._fetch(index)
        if self._stream is not None:
            torch.accelerator.current_stream(self._device).wait_stream(self._stream)
        self._next = {index + 1: self._fetch(index + 1)} if index + 1 < len(self._layers) else {}
        return weights

    @torch.inference_mode(False)  # in which torchao 0.18 cannot copy to another device
    @torch.no_grad()
    def _fetch(self, index: int) -> dict[str, Tensor]:
        parameters = self._layers[index].named_parameters()
        if self._stream is None:
            return {name: parameter.to(self._device) for name, parameter in parameters}
        # The memory that the copies get was that of the layer before the present one, which may still be computing.
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            return {name: parameter.to(self._device, non_blocking=True) for name, parameter in parameters}


def _pin(parameter: Any) -> None:
    """Move a weight to host memory from which copies need not wait."""
    if is_quantized(parameter):
        for name in parameter.__tensor_flatten__()[0]:
            setattr(parameter, name, getattr(parameter, name).pin_memory())
    else:
        parameter.data = parameter.data.pin_memory()
