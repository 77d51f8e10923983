"""A few sentences as a model's own layers read them: what faster passes are compared on.

Random keys and values are far from what a model makes, and rounding grows on them: between bfloat16 and float32 they
moved the logits of Qwen2.5-0.5B and SmolLM2-135M by 6 and 20 % of their norm, where text moved them by 0.5 and 2 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cribsheet.attention.cache import ReadingLayer
from cribsheet.attention.prefix import LayerPrefix

Read = Callable[[Tensor, Tensor, Sequence[ReadingLayer]], None]  # tokens (1, T) at positions (1, T) into layers

_TEXT = (
    "The harbour of the town was built by fishermen in 1874, when storms had taken most of the older one. Ships from "
    "the north still bring timber and salt, and leave with wool, glass and dried fish. Who owns the warehouses? Three "
    "families do; their names stand above the doors, and the eldest, Marta Lind, keeps the keys. Every spring the "
    "council counts boats, men and debts, and writes all three into a book that nobody may take home."
)


def text_ids(tokenizer: Any, tokens: int) -> Tensor:
    """So many token ids (tokens,) of text, which begins again where it is over."""
    ids = torch.tensor(tokenizer(_TEXT, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    return ids.repeat(-(-tokens // len(ids)))[:tokens]


def read_by(own: Read, ids: Tensor, layers: int, like: Tensor) -> list[LayerPrefix]:
    """Keys and values (K, T, D) of each layer of a text (T,) that a model reads by its own layers, from position 0.

    `like` is (K, 0, D), as no keys are.
    """
    reading = [ReadingLayer(LayerPrefix(like, like), 0, 0) for _ in range(layers)]
    own(ids.to(like.device)[None], torch.arange(len(ids), device=like.device)[None], reading)
    return [LayerPrefix(layer.chunk_keys.contiguous(), layer.chunk_values.contiguous()) for layer in reading]
