"""What the speed bench runs on: random models of several shapes, corpora and prefixes of random tokens, and a clock.

Random weights time as trained ones do; nothing here judges an answer.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cribsheet.attention.prefix import LayerPrefix, Prefix
from cribsheet.compare.versions import versions
from cribsheet.corpus.documents import Document
from cribsheet.model.backbone import Backbone
from cribsheet.model.llama_cpu import may_be_copied
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.testing import tiny_tokenizer

_LONG = 2.0  # seconds beside which a first use costs nothing

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 1000,
    },
    "50m": {
        "hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 10, "num_attention_heads": 10,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
    },
    "0.5b": {  # Qwen2.5-0.5B
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151936,
    },
    "1.5b": {  # Qwen2.5-1.5B
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151936,
    },
    "7b": {  # Llama-2-7B, whose heads share no keys
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000,
    },
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip


@dataclass
class Setting:
    """A model on a device, with the clock that fits it."""

    backbone: Backbone
    shape: str
    rounds: int = 3
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.backbone.device

    def now(self) -> float:
        """Seconds: of this process on a CPU, which others may share; by the wall on a GPU, its work done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds that something takes."""
        began = self.now()
        run()
        return self.now() - began

    def interleaved(self, runs: Mapping[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, float]:
        """Seconds of each, best of several rounds in which all take turns.

        One more round goes before, for whatever is made at a first use; of runs that take long it counts, too.
        """
        best = {name: self.once(run) for name, run in runs.items()}
        best = {name: took if took > _LONG else float("inf") for name, took in best.items()}
        for _ in range(rounds or self.rounds):
            for name, run in runs.items():
                best[name] = min(best[name], self.once(run))
        return best

    def ids(self, tokens: int) -> Tensor:
        """Random token ids (tokens,)."""
        most = min(900, self.backbone.config.vocab_size)
        return torch.randint(20, most, (tokens,), generator=self.generator)

    def corpus(self, tokens: int) -> TokenizedCorpus:
        """A corpus of random tokens with a preamble of 16."""
        origins = torch.stack([torch.zeros(tokens), torch.arange(tokens), torch.arange(1, tokens + 1)], 1)
        return TokenizedCorpus((Document(text="x" * tokens, id="random"),), "", self.ids(tokens), origins.int(), 16)

    def prefix(self, tokens: int, *, ragged: bool = False) -> Prefix:
        """A prefix of random keys and values of so many tokens a head, on average if it is ragged.

        Ragged, heads keep from a third to twice as many as one of them, which is the mean of four.
        """
        made = self.backbone
        counts = self.counts(tokens) if ragged else ()
        shape = (sum(counts),) if ragged else (made.kv_heads, tokens)
        layers = []
        for _ in range(made.num_layers):
            keys = torch.randn(*shape, made.head_size, dtype=made.dtype, device=self.device)
            layers.append(LayerPrefix(keys, torch.randn_like(keys), None, counts))
        return Prefix(layers, max(counts, default=tokens))

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Tokens of ragged heads that have so many on average."""
        shares = [(1 / 3, 2 / 3, 1.0, 2.0)[n % 4] for n in range(self.backbone.kv_heads)]
        mean = sum(shares) / len(shares)
        return tuple(max(1, round(tokens * share / mean)) for share in shares)

    def facts(self) -> dict[str, Any]:
        """What a reader needs to make the same numbers."""
        config = self.backbone.config
        return {
            "model": self.backbone.name,
            "layers": config.num_hidden_layers,
            "parameters": sum(weight.numel() for weight in self.backbone.model.parameters()),
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or "cpu",
            "clock": "process time" if self.device.type == "cpu" else "wall, synchronised",
            "threads": torch.get_num_threads(),
            "rounds": self.rounds,
            **versions(),
        }


def make_setting(
    shape: str, device: str, dtype: torch.dtype | None, rounds: int, sizes: dict[str, Any] | None = None
) -> Setting:
    """A setting for one of `SHAPES`, or other `sizes`, with weights made on the device; or for a model by its name.

    Without a type it is what a user gets who says none; random weights are then in float32, and laid out if few.
    """
    if shape not in SHAPES and sizes is None:
        found = Backbone.load(shape, device=device, dtype=dtype)
        for source in (found.model.generation_config, found.config, found.tokenizer):  # answers of equal length
            source.eos_token_id = None
        return Setting(found, shape, rounds)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **(sizes or SHAPES[shape]), max_position_embeddings=1 << 20, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=dtype or torch.float32
        ).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None  # answers of equal length everywhere
    backbone = Backbone(model, tokenizer, name=f"random-llama-{shape}")
    backbone.may_copy = dtype is None and device == "cpu" and may_be_copied(config, backbone.dtype)
    return Setting(backbone, shape, rounds)
