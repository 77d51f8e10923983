"""A sheet inside a transformers cache: the prefix is shared and never written to, new tokens go to a suffix.

Each layer answers `attend` for the registered attention function (`model/registration.py`): prefix part and suffix part
of one softmax, merged. To transformers a layer looks as if it held `start` tokens before the suffix; masks cover the
suffix only, because every new token sees the whole prefix.

Letters as in `attention/prefix.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from cribsheet.attention.attend import attend, merge
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix, attend_behind, attend_window
from cribsheet.kernels.products import Weights

_FIRST_CAPACITY = 64  # tokens a suffix buffer holds at first; it doubles

# Called after attention with the layer, queries (B, H, T, D), log-sum-exps (B, H, T), scale and softcap
# (`attention/recorder.py`).
Watch = Callable[["PrefixLayer", Tensor, Tensor, float, float | None], None]


class PrefixLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: a shared prefix and a growing suffix of equal length in every sequence.

    Works under stock `generate()`: greedy, beams, several sequences, left-padded batches.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, prefix: LayerPrefix, start: int) -> None:
        super().__init__()
        self.prefix, self.start, self.window = prefix, start, prefix.window
        self.length = 0
        self.watch: Watch | None = None
        self.noted: list[Weights] | None = None  # of whom is watched, what the prefix was given, if that is known
        self.is_initialized = True
        # suffix buffers (B, K, capacity, D), filled up to `length`
        self.keys = self.values = prefix.none_behind()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers grow on the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) to the suffix and return the whole suffix, tagged with this layer."""
        new = self.length + key_states.shape[2]
        self.keys = _grown(self.keys, key_states, new, self.length)
        self.values = _grown(self.values, value_states, new, self.length)
        self.keys[:, :, self.length : new] = key_states
        self.values[:, :, self.length : new] = value_states
        self.length = new
        return self.tag(self.keys[:, :, :new]), self.values[:, :, :new]

    def tag(self, keys: Tensor) -> Tensor:
        """Mark a tensor so that the registered attention function finds its way back to this layer.

        A weak reference: a strong one would tie keys and layer into a cycle, which keeps whole chunks alive until
        the garbage collector happens to run.
        """
        keys._cribsheet = weakref.ref(self)  # type: ignore[attr-defined]
        return keys

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attention output (B, H, T, D) of the newest T tokens over prefix and suffix."""
        inputs = inputs._replace(mask=self.visible(inputs.mask))
        self.noted = None if self.watch is None else []
        out, lse = self.look(inputs)
        if self.watch is not None:
            self.watch(self, inputs.query, lse, inputs.scale, inputs.softcap)
            self.noted = None
        return out

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """The suffix mask to use, given that of transformers."""
        return mask

    def look(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Output, and log-sum-exp (B, H, T) over everything that the new tokens see."""
        if self.is_cut(inputs.key.shape[2]):
            return self.look_near(inputs)
        return attend_behind(self.prefix, inputs, inputs.attend(), self.noted)

    def is_cut(self, tokens: int) -> bool:
        """Whether new tokens behind so many others, themselves included, do not see all of prefix and suffix."""
        return self.window is not None and self.prefix.longest + tokens > self.window

    def look_near(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """As `look`, as far as the window reaches."""
        assert self.window is not None
        places = self.suffix_positions(inputs.query.shape[2], inputs.key.shape[2], inputs.query.device)
        return attend_window(self.prefix, inputs, *places, self.window)

    def suffix_positions(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the newest tokens (B or 1, T) and of the suffix (B or 1, n), from the end of the prefix."""
        suffix = torch.arange(columns, device=device).unsqueeze(0)
        return suffix[:, columns - rows :], suffix

    def get_seq_length(self) -> int:
        """Tokens before the next one, the prefix included."""
        return self.start + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(suffix length after the next update, position at which the suffix begins)."""
        return self.length + query_length, self.start

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens of the suffix; transformers gives their number negated."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Empty the suffix; the prefix stays."""
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the sequences, as beam search asks."""
        self.keys = self.keys.index_select(0, beam_idx)
        self.values = self.values.index_select(0, beam_idx)


class ReadingLayer(PrefixLayer):
    """A layer that reads `[chunk; guide]` in one go and remembers how it looked.

    After the read: `chunk_keys`, `chunk_values` (K, c, D), `guide_keys`, `guide_values` (K, T, D), `guide_queries`
    (H, T, D), `guide_lse` (H, T).
    """

    def __init__(
        self, prefix: LayerPrefix, start: int, guide_tokens: int, step: Callable[[], None] | None = None
    ) -> None:
        super().__init__(prefix, start)
        self.guide_tokens = guide_tokens
        self._step = step  # called when the model has come to this layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep a reference to the new keys and values; nothing is copied."""
        self.length = key_states.shape[2]
        chunk = self.length - self.guide_tokens
        self.chunk_keys, self.guide_keys = key_states[0, :, :chunk], key_states[0, :, chunk:]
        self.chunk_values, self.guide_values = value_states[0, :, :chunk], value_states[0, :, chunk:]
        if self._step is not None:
            self._step()
        return self.tag(key_states), value_states

    def look(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """As in `PrefixLayer`, keeping the guide's queries and log-sum-exps."""
        out, lse = super().look(inputs)
        first = inputs.query.shape[2] - self.guide_tokens
        self.guide_queries, self.guide_lse = inputs.query[0, :, first:], lse[0, :, first:]
        return out, lse

    def conclude(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """`update` and `attend` of the model's last layer, where nobody asks for the output: only the guide looks.

        Not for layers with a window.
        """
        self.update(key, value)
        chunk = self.length - self.guide_tokens
        guide = AttentionInputs(query[:, :, chunk:], key[:, :, chunk:], value[:, :, chunk:], None, scale)
        self.guide_queries = guide.query[0]
        if self.guide_tokens:
            behind_chunk = attend_behind(self.prefix, guide, guide.attend())
            _, lse = merge(behind_chunk, attend(guide.query, key[:, :, :chunk], value[:, :, :chunk], scale=scale))
            self.guide_lse = lse[0]
        else:
            self.guide_lse = query.new_empty(query.shape[1], 0, dtype=torch.float32)


def prefix_cache(layers: Sequence[LayerPrefix], start: int) -> Cache:
    """A fresh transformers `Cache` over a shared prefix of `start` tokens, for one forward pass or one `generate`."""
    return cache_of([PrefixLayer(layer, start) for layer in layers])


def cache_of(layers: Sequence[PrefixLayer]) -> Cache:
    """A transformers `Cache` of these layers."""
    return Cache(layers=list(layers))


def _grown(buffer: Tensor, like: Tensor, needed: int, filled: int) -> Tensor:
    """A buffer for at least `needed` tokens that starts with the `filled` ones of `buffer`."""
    if needed <= buffer.shape[2] and buffer.shape[0] == like.shape[0]:
        return buffer
    batch, heads, _, size = like.shape
    grown = like.new_empty(batch, heads, max(needed, 2 * buffer.shape[2], _FIRST_CAPACITY), size)
    if filled:
        grown[:, :, :filled] = buffer[:, :, :filled]
    return grown
