"""Passes of new tokens by as few kernels as a model allows, and finding out ahead which it allows.

Letters as in `attention/slots.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cribsheet.attention import dispatch
from cribsheet.attention.agreement import be_patient, finding_out, give_way, in_a_hurry
from cribsheet.attention.backends import on_cuda
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.packed import check
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.attention.slots import SlotLayer
from cribsheet.kernels.ahead import Shape, compile_ahead
from cribsheet.model import llama_step
from cribsheet.model.backbone import Backbone
from cribsheet.model.llama_weights import LlamaWeights

logger = logging.getLogger(__name__)


def logits_after(
    backbone: Backbone, ids: Tensor, positions: Tensor, cache: Cache, keep: Tensor | None = None
) -> Tensor:
    """Logits (B, V) after new tokens (B, T) at their positions (B, T): of the last, or of place `keep` (1,)."""
    logits = by_few_kernels(backbone, ids, positions, cache, keep)
    if logits is None:
        logits = backbone.step(ids, positions, cache, 1 if keep is None else keep)[:, -1]
    return logits


def by_few_kernels(
    backbone: Backbone, ids: Tensor, positions: Tensor, cache: Cache, keep: Tensor | None = None
) -> Tensor | None:
    """`logits_after`, where a Llama-like model on a GPU need not run its own layers; none where it must.

    It must in a hurry too, until it is known that it need not.
    """
    layers = cache.layers
    if backbone.device.type != "cuda":
        return None
    if isinstance(layers[0], SlotLayer):
        step = llama_step.find(backbone)
        if step is None:
            return None
        for layer in layers:
            layer.reserve(len(ids), layer.rows.longest, layer.keys)
        return step(ids[:, 0].to(backbone.device), positions[:, 0].to(backbone.device), layers)
    read = backbone.found_read()
    if read is None:
        return None
    return read.logits(ids.to(backbone.device), positions.to(backbone.device), layers, keep)


class Preparation:
    """Finding out in the background what a model on a GPU may use; `is_done` says whether that is over.

    With `codes`, only whether it reads sheets in four bits.
    """

    def __init__(self, backbone: Backbone, *, codes: bool = False) -> None:
        self._backbone, self._codes = weakref.ref(backbone), codes
        self._closing = threading.Event()
        weakref.finalize(backbone, self._closing.set).atexit = False
        self._thread = threading.Thread(target=self._run, name="cribsheet-kernels", daemon=True)
        self._thread.start()
        if backbone.in_step:  # the others would find out sooner or later, and go another way meanwhile
            self._thread.join()

    @property
    def is_done(self) -> bool:
        """Whether everything is known that there is to know."""
        return not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Come back when it is done, or after so long."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Leave off as soon as possible, and come back then."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        """One part after the other: where one fails, the others are found out all the same."""
        backbone = self._backbone()
        if backbone is None:
            return
        like = torch.empty(1, backbone.num_heads, 1, backbone.head_size, device=backbone.device, dtype=backbone.dtype)
        if not on_cuda(like):
            return
        if not backbone.in_step:  # whoever made the model waits for this
            be_patient(self._closing)
        del backbone  # a model that is let go meanwhile is not held until all is compiled
        if not self._codes:
            self._take(_begin)
        self._compile()
        with finding_out:
            for part in _CODES if self._codes else _PARTS:
                give_way()
                self._take(partial(part, like))

    def _compile(self) -> None:
        shapes: list[Shape] = []
        self._take(lambda backbone: shapes.append(self._shape(backbone)))
        for shape in shapes:
            with _told():
                compile_ahead(shape, self._closing)

    def _shape(self, backbone: Backbone) -> Shape:
        if self._codes:
            return replace(shape_of(backbone, None), codes=True)
        return shape_of(backbone, backbone.plain_weights())

    def _take(self, part: Callable[[Backbone], object]) -> None:
        """Do a part, unless it is over."""
        backbone = self._backbone()
        if backbone is None or self._closing.is_set():
            return
        with _told():
            part(backbone)


_Part = Callable[[Tensor, Backbone], object]
_PARTS: tuple[_Part, ...] = (
    lambda like, backbone: dispatch.usable(like, backbone.kv_heads, backbone.softcap),
    lambda like, backbone: dispatch.can_merge(like),
    lambda like, backbone: backbone.fast_read,
    lambda like, backbone: llama_step.find(backbone),
)
_CODES: tuple[_Part, ...] = (lambda like, backbone: check.usable(like, backbone.kv_heads),)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What goes wrong inside is logged."""
    try:
        yield
    except Exception:
        logger.warning("something could not be made ready ahead, and slower ways are used", exc_info=True)


def _begin(backbone: Backbone) -> None:
    """Have CUDA load what it loads at a first pass, if that is nobody else's business."""
    if backbone.in_step:
        return
    none = torch.empty(backbone.kv_heads, 0, backbone.head_size, device=backbone.device, dtype=backbone.dtype)
    layers = [LayerPrefix(none, none, window) for window in backbone.windows]
    with in_a_hurry():
        backbone.step(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8).unsqueeze(0), prefix_cache(layers, 0))


def shape_of(backbone: Backbone, weights: LlamaWeights | None) -> Shape:
    """What kernels of a model on a GPU are compiled for, given its weights if it is Llama-like."""
    major, minor = torch.cuda.get_device_capability(backbone.device)
    dtype = str(backbone.dtype).removeprefix("torch.")
    shape = 10 * major + minor, dtype, backbone.num_heads, backbone.kv_heads, backbone.head_size
    if weights is None:
        return Shape(*shape)
    layer = weights.layers[0]
    return Shape(
        *shape,
        hidden=weights.embed.shape[1],
        inner=len(layer.gate[0]),
        vocabulary=len(weights.lm_head),
        biased=(layer.qkv[0][1] is not None, layer.out[1] is not None, layer.down[1] is not None),
        normed=layer.qk_norms is not None,
    )


_preparations: weakref.WeakKeyDictionary[Backbone, dict[bool, Preparation]] = weakref.WeakKeyDictionary()


def prepare(backbone: Backbone, *, codes: bool = False) -> Preparation | None:
    """Begin to find out what a model may use, or whether it reads `codes`, once; only on GPUs is there anything to."""
    if backbone.device.type != "cuda":
        return None
    begun = _preparations.setdefault(backbone, {})
    if codes not in begun:
        begun[codes] = Preparation(backbone, codes=codes)
    return begun[codes]


def is_prepared(backbone: Backbone) -> bool:
    """Whether nothing is being found out."""
    return all(preparation.is_done for preparation in list(_preparations.get(backbone, {}).values()))


@atexit.register
def _close_all() -> None:
    """A thread that is inside torch while the interpreter goes would take the whole process down with an abort."""
    for begun in list(_preparations.values()):
        for preparation in list(begun.values()):
            preparation.close()
