"""What runs inside the workers of a vLLM rollout server: new weights through vLLM's weight-transfer API.

vLLM imports this module because the server names `WeightReceiver` as its worker extension; that registers the
transfer backend `her_nemo_files`, whose data are safetensors files both sides can open. vLLM's own `nccl`
backend works beside it; the checksum is taken where both hand their tensors to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from her_nemo.rollout.checksum import Checksum

FILES_BACKEND = "her_nemo_files"


@dataclass
class FileInit(WeightTransferInitInfo):
    """Files need no handshake."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """One piece of the weights: a safetensors file under its Hugging Face names."""

    path: str


class FileTransfer(WeightTransferEngine[FileInit, FileUpdate]):
    """Weights from safetensors files, on CPU and on CUDA."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        del init_info

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one file. The base class waits for an accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdate) -> None:
        self.model.load_weights(_tensors(update_info.path, self.device))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        return


def _tensors(path: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt", device=str(device)) as held:
        for name in held.keys():  # noqa: SIM118
            yield name, held.get_tensor(name)


class WeightReceiver:
    """Methods that vLLM mixes into its worker class; `/collective_rpc` reaches them."""

    model_runner: Any

    def her_nemo_expect(self) -> str:
        """Called before an update: from here on, a checksum of every tensor handed to the model is kept."""
        model, seen = self.model_runner.get_model(), Checksum()
        load = type(model).load_weights

        def watched(named: Iterable[tuple[str, Tensor]], *args: Any, **options: Any) -> Any:
            return load(model, _counted(named, seen), *args, **options)

        model.load_weights = watched
        model.her_nemo_seen = seen
        return "expecting"

    def her_nemo_received(self) -> str:
        """Called after an update: what arrived, as `Checksum.text`. Refreshes the head on CPU."""
        model = self.model_runner.get_model()
        seen: Checksum = model.her_nemo_seen
        del model.load_weights, model.her_nemo_seen
        head = getattr(model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            # On CPU the head multiplies with a packed copy, and the reload leaves a tied head's copy stale.
            head.quant_method.process_weights_after_loading(head)
        return seen.text


def _counted(named: Iterable[tuple[str, Tensor]], seen: Checksum) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named:
        seen.add(name, tensor)
        yield name, tensor


if FILES_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(FILES_BACKEND, FileTransfer)
