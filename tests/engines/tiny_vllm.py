"""A small vLLM: paged caches of several workers, a scheduler with prefix caching, and a real tiny model.

What it does with a connector, and when, is what vLLM does; how fast does not matter.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from types import SimpleNamespace

import torch
from transformers import DynamicCache


class Request:
    """As `vllm.v1.request.Request`, as far as connectors see it."""

    def __init__(self, request_id, prompt, block, longest, params=None, **more):
        self.request_id, self.prompt_token_ids, self.kv_transfer_params = request_id, list(prompt), params
        self.lora_request, self.cache_salt, self.resumable = None, None, False
        self.skip_reading_prefix_cache = False
        for name, value in more.items():
            setattr(self, name, value)
        self.written, self.block, self.longest, self.failed = [], block, longest, False
        self.block_hashes, self.blocks, self.computed = [], [], 0
        self.update_block_hashes()

    @property
    def all_ids(self):
        return self.prompt_token_ids + self.written

    @property
    def num_tokens(self):
        return len(self.all_ids)

    def append_output_token_ids(self, token):
        self.written.append(token)
        self.update_block_hashes()

    def update_block_hashes(self):
        ids = self.all_ids
        for number in range(len(self.block_hashes), len(ids) // self.block):
            before = self.block_hashes[-1] if number else self.cache_salt
            self.block_hashes.append(hash((before, tuple(ids[number * self.block : (number + 1) * self.block]))))


class FullAttentionSpec:
    sliding_window = attention_chunk_size = None
    kv_quant_mode = 0

    def __init__(self, block, dtype):
        self.block_size, self.dtype = block, dtype


class TinyVllm:
    """`ranks` workers that divide the heads; `parts` kernel blocks to each block; `order` is how their memory lies."""

    def __init__(
        self, interface, backbone, sheets, *, ranks=1, block=16, parts=1, order="HND", blocks=64, dtype=torch.float32
    ):
        self.backbone, self.block, self.parts, self.stops = backbone, block, parts, backbone.config.eos_token_id
        named = inspect.signature(type(backbone.model).forward).parameters
        self.takes = "cache" if "cache" in named else "past_key_values"  # its name before transformers 5.24
        self.config = config(backbone, sheets, ranks, dtype)
        kinds = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec(block, dtype))])
        made = interface.connector
        self.scheduler = made(self.config, _role(made, "SCHEDULER"), kinds)
        self.workers, self.caches = [], []
        heads, size = max(1, backbone.kv_heads // ranks), block // parts
        for rank in range(ranks):
            interface.rank = rank
            shape = (blocks * parts, heads, size, 2 * backbone.head_size)
            self.caches.append(
                {
                    f"model.layers.{layer}.self_attn.attn": torch.full(shape, float("nan"), dtype=dtype)
                    if order == "HND"
                    else torch.full((shape[0], size, heads, shape[3]), float("nan"), dtype=dtype).transpose(1, 2)
                    for layer in range(backbone.num_layers)
                }
            )
            worker = made(self.config, _role(made, "WORKER"), kinds)
            worker.register_kv_caches(self.caches[-1])
            self.workers.append(worker)
        self.free = OrderedDict.fromkeys(range(blocks))
        self.held, self.cached, self.hash_of = dict.fromkeys(range(blocks), 0), {}, {}
        self.waiting, self.running, self.loaded, self.hits = [], [], 0, 0

    def add(self, request):
        """A request comes."""
        self.waiting.append(request)
        self.scheduler.on_new_request(request)

    def run(self, at_once=8):
        """Steps until all requests are answered."""
        while self.waiting or self.running:
            self.step(at_once)

    def step(self, at_once):
        """One step of the scheduler and of all workers."""
        self._grow()
        while self.waiting and len(self.running) < at_once and self._admit(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
        assert self.running, "nothing fits"
        told = self.scheduler.build_connector_meta(SimpleNamespace())
        self.loaded += len(told.loads)
        failed = set()
        for worker in self.workers:
            worker.bind_connector_metadata(told)
            worker.start_load_kv(SimpleNamespace())
        for request in self.running:
            self._forward(request)
        for worker in self.workers:
            worker.wait_for_save()
            failed |= worker.get_block_ids_with_load_errors()
            worker.clear_connector_metadata()
        for request in list(self.running):
            if failed & set(request.blocks[: -(-request.loaded // self.block)]):
                request.failed, request.written = True, []
                for number in request.blocks:
                    self.cached.pop(self.hash_of.pop(number, None), None)
                self._end(request)
            elif request.written[-1] in self.ends or len(request.written) == request.longest:
                self._end(request)

    @property
    def ends(self):
        return self.stops if isinstance(self.stops, list) else [self.stops]

    def _grow(self):
        """A block more for requests that need one; the last to come make room, and begin again."""
        for request in list(self.running):
            while request in self.running and len(request.blocks) * self.block < request.num_tokens:
                if self.free:
                    request.blocks.append(self._take())
                else:
                    last = self.running.pop()
                    self._release(last)
                    last.computed = 0
                    self.waiting.insert(0, last)
            request.loaded = 0

    def _admit(self, request):
        found = []
        if not request.skip_reading_prefix_cache:
            for each in request.block_hashes[: (request.num_tokens - 1) // self.block]:
                if each not in self.cached:
                    break
                found.append(self.cached[each])
        local = len(found) * self.block
        told, is_async = self.scheduler.get_num_new_matched_tokens(request, local)
        assert not is_async
        external = 0 if request.skip_reading_prefix_cache else told
        assert local + external < request.num_tokens
        needed = -(-request.num_tokens // self.block) - len(found)
        if needed > len([each for each in self.free if each not in found]):
            return False
        for number in found:
            self.held[number] += 1
            self.free.pop(number, None)
        request.blocks = found + [self._take() for _ in range(needed)]
        request.computed, request.loaded = local + external, local + external
        self.hits += local
        for number, each in zip(request.blocks, request.block_hashes, strict=False):  # at once, as vLLM does
            if each not in self.cached:
                self.cached[each], self.hash_of[number] = number, each
        blocks = SimpleNamespace(get_block_ids=lambda: (list(request.blocks),))
        self.scheduler.update_state_after_alloc(request, blocks, external)
        return True

    def _take(self):
        number, _ = self.free.popitem(last=False)
        self.cached.pop(self.hash_of.pop(number, None), None)
        self.held[number] = 1
        return number

    def _release(self, request):
        for number in reversed(request.blocks):
            self.held[number] -= 1
            if not self.held[number]:
                self.free[number] = None
        request.blocks = []

    def _end(self, request):
        self.running.remove(request)
        self.scheduler.request_finished(request, request.blocks)
        self._release(request)

    def _slots(self, request, first, last):
        """Where tokens lie: block of the cache, and place in it."""
        size = self.block // self.parts
        places = torch.arange(first, last)
        blocks = torch.tensor(request.blocks)[places // self.block] * self.parts
        return blocks + places % self.block // size, places % size

    def _forward(self, request):
        ids, first = request.all_ids, request.computed
        past, where = DynamicCache(), self._slots(request, 0, first)
        head = self.backbone.head_size
        for layer in range(self.backbone.num_layers):
            rows = torch.cat([list(each.values())[layer][where[0], :, where[1]] for each in self.caches], dim=1)
            keys, values = rows.transpose(0, 1).unsqueeze(0).split(head, dim=-1)
            past.update(keys.contiguous(), values.contiguous(), layer)
        with torch.no_grad():
            told = self.backbone.model(
                torch.tensor([ids[first:]]),
                **{self.takes: past},
                position_ids=torch.arange(first, len(ids))[None],
                use_cache=True,
            )
        there = self._slots(request, first, len(ids))
        for layer in range(self.backbone.num_layers):
            rows = torch.cat([past.layers[layer].keys, past.layers[layer].values], dim=-1)[0, :, first:]
            shared = rows.chunk(len(self.caches))
            for each, mine in zip(self.caches, shared, strict=True):
                list(each.values())[layer][there[0], :, there[1]] = mine.transpose(0, 1)
        request.written.append(int(told.logits[0, -1].argmax()))
        request.computed = len(ids)
        request.update_block_hashes()


def config(backbone, sheets, ranks=1, dtype=torch.float32, model="tiny"):
    """As `VllmConfig`, as far as the connector reads it."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config={"sheets": {name: str(path) for name, path in sheets.items()}},
            kv_load_failure_policy="fail",
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=ranks, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        model_config=SimpleNamespace(
            model=str(model), revision=None, hf_text_config=backbone.config, max_model_len=512
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )


def _role(connector, name):
    return sys.modules[connector.__mro__[1].__module__].KVConnectorRole[name]
