"""`CribsheetConnector`: what vLLM calls, in its scheduler and in each worker; see the package for how it is named.

The scheduler is told that a sheet's tokens are already computed elsewhere; in the step that begins such a request each
worker writes its heads of them into the blocks that the scheduler gave it, before the model reads them. From then on
vLLM's own prefix caching answers further questions, until it needs the blocks; then they are written again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.platforms import current_platform

from cribsheet.engines.vllm.caches import Caches, heads_of
from cribsheet.engines.vllm.checks import check_model, check_settings, check_version, opened
from cribsheet.engines.vllm.scheduling import Load, Scheduling

if TYPE_CHECKING:
    import torch


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers of a step: what to write, and blocks of requests that fail."""

    loads: tuple[Load, ...] = ()
    failed: tuple[int, ...] = ()


class CribsheetConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Sheets for vLLM. Raises, when vLLM starts, what `checks.py` and `caches.py` say."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        check_version(vllm.__version__)
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._sheets = opened(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._block = check_settings(vllm_config, kv_cache_config, self._sheets)
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._caches: Caches | None = None
        self._unloaded: set[int] = set()  # blocks of this step's failing requests
        check_model(vllm_config.model_config, self._sheets)
        self._scheduling = Scheduling(self._sheets, self._block)

    # In the scheduler.

    def on_new_request(self, request: Any) -> None:
        """A request came."""
        self._scheduling.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that are to be loaded, at once."""
        return self._scheduling.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has blocks."""
        self._scheduling.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """What workers do in this step."""
        loads, failed = self._scheduling.take()
        return Step(tuple(loads), tuple(failed))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over; its blocks may be freed."""
        self._scheduling.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, where there may be several groups of caches."""
        return self.request_finished(request, [])

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Read the sheets' keys and values, those of this worker's heads and layers."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        total = next(iter(self._sheets.values())).fingerprint.kv_heads
        heads = heads_of(get_tensor_model_parallel_rank(), self._ranks, total)
        self._caches = Caches(kv_caches, self._sheets, heads, self._block)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write what begins in this step."""
        step: Step = self._get_connector_metadata()
        self._unloaded = set(step.failed)
        layers = forward_context.no_compile_layers if current_platform.is_cpu() else None
        for load in step.loads:
            assert self._caches is not None
            self._caches.write(*load, layers)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of requests that fail in this step."""
        unloaded, self._unloaded = self._unloaded, set()
        return unloaded

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded later than at the step's beginning."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def take_events(self) -> Iterable[Any]:
        """None."""
        return ()
