"""What the tests of cribsheet, and of code that uses it, need: tiny real models that load in milliseconds.

Their weights are random, so they may time and prove equalities but never judge quality. To test code that uses
answers, `echo_backbone("Oslo.")` always says what it was told; for answers that make sense use the pocket model
(`model="pocket"`).
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cribsheet.model.backbone import Backbone
from cribsheet.model.support import FAMILIES

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_VOCABULARY = 1000
# What only some families have, small enough that it matters in a corpus of a hundred tokens.
_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {**_SLIDING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "qwen2": {**_SLIDING, "use_sliding_window": True},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
_SYLLABLES = [a + b + c for a in "bdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s")]
_TEXT = [f"{first}{second} lives in {second}{first}." for first in _SYLLABLES for second in _SYLLABLES[::29]]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1000 tokens with turns for system, user and assistant."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.add_special_tokens({"additional_special_tokens": _SPECIALS[3:]})
    fast.chat_template = chat_template
    return fast


def tiny_config(family: str, **settings: Any) -> Any:
    """The configuration of a tiny model of one of the supported families; `settings` override it."""
    sizes: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sliding_window": None,
        "tie_word_embeddings": False,  # tied, a random model only ever repeats its last token
    }
    return AutoConfig.for_model(family, **{**sizes, **_OWN_SETTINGS.get(family, {}), **settings})


def tiny_backbone(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> Backbone:
    """A random model of a family with the tiny tokenizer.

    Its weights are large enough that attention is far from uniform, so that a wrong key, position or mask changes
    the answer.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no tiny model of family {family!r}; use one of {', '.join(FAMILIES)}.")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = tiny_config(family, **settings)
    own = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # as `Backbone.load` chooses
    model = AutoModelForCausalLM.from_config(config, attn_implementation=own).eval()
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    rotary = dict(model.base_model.rotary_emb.named_buffers())
    model.to(dtype)
    for name, frequencies in rotary.items():  # `from_pretrained` leaves them in float32 too
        setattr(model.base_model.rotary_emb, name, frequencies)
    return Backbone(model, tiny_tokenizer(), name=f"tiny-{family}")


def echo_backbone(answer: str) -> Backbone:
    """A real model that answers every question with `answer`, word by word, and then ends.

    It knows only which word follows which: each piece of the answer is a token of its own, and its weights lead from
    the beginning of the assistant's turn through these pieces to the end token.
    """
    pieces = [_spelled(piece) for piece in _pieces(answer)]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    path: list[int] = tokenizer.convert_tokens_to_ids(["<|assistant|>", *pieces, "<|end|>"])
    states = len(path) - 1  # one dimension for each token that has a successor; ordinary text lies in 64 others
    backbone = tiny_backbone(vocab_size=len(tokenizer), hidden_size=64 + states + -states % 4)
    model = backbone.model
    with torch.no_grad():
        for layer in model.base_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.base_model.embed_tokens.weight[:, :states] = 0
        model.base_model.embed_tokens.weight[path] = 0
        model.lm_head.weight.zero_()
        for state, (token, following) in enumerate(pairwise(path)):
            model.base_model.embed_tokens.weight[token, state] = 1
            model.lm_head.weight[following, state] = 10
    return Backbone(model, tokenizer, name="echo")


def _pieces(answer: str) -> list[str]:
    """Words with the blanks before them, no two the same: a word said again is joined to what is before it."""
    pieces: list[str] = []
    for word in re.findall(r"\s*\S+|\s+$", answer):
        pieces.append(word)
        while pieces.count(pieces[-1]) > 1:
            last = pieces.pop()
            pieces[-1] += last
    if not pieces:
        raise ValueError("The echo model was given an empty answer; give it something to say.")
    return pieces


def _spelled(piece: str) -> str:
    """A piece in the alphabet of byte-level tokenizers, so that it decodes to itself and is found in no document."""
    return "".join(
        text for text, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)
    )


def save_tiny_model(folder: str | Path, family: str = "llama", **settings: Any) -> Path:
    """Write a tiny model as a folder that `from_pretrained` loads."""
    backbone = tiny_backbone(family, **settings)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return Path(folder)
