"""vLLM's paged caches as its workers hold them: which heads are theirs, and where a sheet's tokens go.

A cache of a layer is (blocks, heads, tokens of a block, 2 * D), keys with values behind them, however its memory is
laid out. Where an attention kernel wants smaller blocks than the scheduler counts, each of the scheduler's is several
neighbouring ones of the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cribsheet.engines.vllm.file import ExportedSheet
from cribsheet.errors import ModelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def heads_of(rank: int, ranks: int, heads: int) -> range:
    """Key/value heads that a worker of so many holds; where there are fewer heads than workers, several hold one."""
    if ranks <= heads:
        share = heads // ranks
        return range(rank * share, (rank + 1) * share)
    first = rank * heads // ranks
    return range(first, first + 1)


class Caches:
    """The caches of a worker's layers, and the sheets that it writes into them, on the CPU in the caches' type.

    Raises `ModelError` for caches of another form, `SheetError` for numbers that they do not hold.
    """

    def __init__(
        self, caches: Mapping[str, Tensor], sheets: Mapping[str, ExportedSheet], heads: range, block: int
    ) -> None:
        made = next(iter(sheets.values())).fingerprint
        self._block, self._caches = block, dict(caches)
        numbers = {name: layer_of(name, made.layers) for name in caches}
        for name, cache in caches.items():
            _check_form(name, cache, len(heads), made.head_size, block)
        self._rows = {
            sheet: {
                name: _pinned(exported.rows(numbers[name], heads, cache.dtype), cache) for name, cache in caches.items()
            }
            for sheet, exported in sheets.items()
        }

    def write(self, sheet: str, first: int, blocks: Iterable[int], layers: Mapping[str, Any] | None = None) -> None:
        """Write a sheet's tokens from the first on into blocks, as many as these hold, in all layers.

        Where the backend of vLLM keeps tiles of a form of its own, its `layers` write, which it has by caches' names.
        """
        given, places = torch.tensor(list(blocks)), None
        last = first + len(given) * self._block
        for name, cache in self._caches.items():
            rows = self._rows[sheet][name][:, first:last].to(cache.device, non_blocking=True).transpose(0, 1)
            # Of each row its slot, or of each kernel's block its number.
            parts = self._block if layers is not None else self._block // cache.shape[2]
            if places is None:
                places = (given[:, None] * parts + torch.arange(parts)).flatten().to(cache.device)
            if layers is None:
                cache.index_copy_(0, places, rows.unflatten(0, (-1, cache.shape[2])).transpose(1, 2))
            else:
                keys, values = (half.contiguous() for half in rows.chunk(2, dim=-1))
                layers[name].impl.do_kv_cache_update(layers[name], keys, values, layers[name].kv_cache, places)


def layer_of(name: str, layers: int) -> int:
    """Number of the layer that vLLM's name of a cache says. Raises `ModelError` for one the sheet's model lacks."""
    found = _LAYER.search(name)
    if found is None or int(found[1]) >= layers:
        raise ModelError(
            f"vLLM has a cache {name!r}, for which a sheet of {layers} layers holds nothing; serve sheets without a "
            "draft model, and models of one kind of attention."
        )
    return int(found[1])


def _check_form(name: str, cache: Tensor, heads: int, head_size: int, block: int) -> None:
    """Raise `ModelError` for a cache that is no paged one of floats, keys with values behind them."""
    shape = tuple(cache.shape)
    paged = len(shape) == 4 and shape[1] == heads and shape[3] == 2 * head_size and block % shape[2] == 0
    if not paged or cache.dtype not in FLOATS:
        raise ModelError(
            f"The cache {name!r} is {shape} in {cache.dtype}, and sheets go into (blocks, {heads}, tokens, "
            f"{2 * head_size}) in a float type, with blocks of {block}; start vLLM with kv_cache_dtype='auto', and an "
            "attention backend that keeps keys and values together."
        )


def _pinned(rows: Tensor, cache: Tensor) -> Tensor:
    """Rows from which a GPU may copy by itself."""
    return rows.pin_memory() if cache.is_cuda else rows.contiguous()
