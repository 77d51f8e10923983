"""Our attention in a model, while we use it: registered under our own name, never patched.

A cache layer of ours tags the keys that it returns; the registered function hands tagged keys back to their layer and
all others to the attention that the model has otherwise. The mask function must be registered too, or transformers
drops masks without a word. The name stands in a model's configuration only while somebody is inside its `Attachment`,
and the whole process sees it there: a `generate` of another thread may begin with the model's own name and go on with
ours. So for any thread that is not inside, ours does exactly what the model's own would.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cribsheet.attention.cache import PrefixLayer
from cribsheet.attention.prefix import AttentionInputs

_NAME = "cribsheet"
_EAGER = "eager"
_inside = threading.local()
_Function = Callable[..., tuple[Tensor, Tensor | None]]

# Gives what attention gives (B, T, H, D) to the other processes, or takes it from the leader for queries (B, H, T, D).
Share = Callable[[Tensor | None, Tensor], Tensor]


class Attachment:
    """Evaluates a model with our attention while inside; nests, and across threads. One per model: `of` finds it."""

    _known: ClassVar[
        dict[int, Attachment]
    ] = {}  # by the identity of the configuration, which is what attention functions see
    _making: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        config: Any = model.config
        self._config = config
        self._lock, self._depth = threading.Lock(), 0
        self.own: str = config._attn_implementation  # the attention that the model has otherwise
        self.share: Share | None = None  # where a model is divided and one process leads (`model/divided.py`)
        self._in_training: list[nn.Module] = []  # what was in training mode before

    @classmethod
    def of(cls, model: nn.Module) -> Attachment:
        """That of a model, the same for all that share the model."""
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, _mask)
        key = id(model.config)
        with cls._making:
            if key not in cls._known:
                cls._known[key] = cls(model)
                weakref.finalize(model, cls._known.pop, key, None)
            return cls._known[key]

    def __enter__(self) -> None:
        """Attach."""
        with self._lock:
            if self._depth == 0:
                self.own = self._config._attn_implementation
                self._config._attn_implementation = _NAME
                model = self._model()
                self._in_training = _in_training(model) if model else []
                for module in self._in_training:
                    module.training = False
            self._depth += 1
        _inside.depth = getattr(_inside, "depth", 0) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the model its own back with the last one to leave."""
        _inside.depth -= 1
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._hand_back()

    def release(self) -> None:
        """In a forked child: no thread of the parent is inside any more."""
        self._lock = threading.Lock()
        if self._depth:
            self._depth = 0
            self._hand_back()

    def _hand_back(self) -> None:
        self._config._attn_implementation = self.own
        for module in self._in_training:
            module.training = True
        self._in_training = []


def _in_training(model: nn.Module) -> list[nn.Module]:
    """Modules in training mode: every step asks, and `Module.modules` takes five times as long."""
    found, left = [], [model]
    for module in left:  # which grows on the way
        if module.training:
            found.append(module)
        if module._modules:
            left += [child for child in module._modules.values() if child is not None]
    return found


def _own(config: Any) -> str:
    found = Attachment._known.get(id(config))
    return found.own if found else "sdpa"


def _is_inside() -> bool:
    return getattr(_inside, "depth", 0) > 0


def _mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask of the model's own attention; inside, that of SDPA, unless it may have to serve eager attention."""
    own = _own(config)
    function: Callable[..., Tensor | None] = sdpa_mask
    if own == _EAGER or not _is_inside():
        function = AttentionMaskInterface()[own]
    return function(*args, config=config, **kwargs)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: tagged keys go to their cache layer, all others to the model's own."""
    tag: Callable[[], PrefixLayer | None] | None = getattr(key, "_cribsheet", None)
    layer = tag() if tag else None
    share = _share(getattr(module, "config", None))
    if layer is None:
        if share is not None and _is_inside():
            return share(None, query), None
        return _stock(module)(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    mask = attention_mask
    if mask is not None and mask.is_floating_point():  # made for eager attention: zero where a row may look
        mask = mask == 0
    out = layer.attend(AttentionInputs(query, key, value, mask, scale, kwargs.get("softcap")))
    given = out.transpose(1, 2).contiguous()
    return given if share is None else share(given, query), None


def _share(config: Any) -> Share | None:
    found = Attachment._known.get(id(config))
    return found.share if found else None


def _stock(module: nn.Module) -> _Function:
    own = _own(getattr(module, "config", None))
    if own == _EAGER:  # it is no registered function: each model has its own
        found: _Function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    else:
        found = sdpa_attention_forward if _is_inside() else AttentionInterface()[own]
    return found
