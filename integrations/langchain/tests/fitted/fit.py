"""Fit a tiny Llama to the prompts that LangChain's standard suites send: `python -m fitted.fit`, from `tests`.

The suites test a protocol: they need a model that calls a tool when asked to, and says something otherwise. This one
is fitted to exactly these prompts (`pairs.json`) and knows nothing else, so its answers prove nothing about quality.
They do come out of the library's own engine, token by token, over a sheet that is in front.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cribsheet.prompt.template import ChatLayout
from cribsheet.testing import tiny_config, tiny_tokenizer

HERE = Path(__file__).parent
MODEL = HERE / "model"
DOCUMENTS = ("Alice lives in Lisbon.", "Bob lives in Oslo and works for Nordwind Labs.", "Clara lives in Cairo.")
TASK = "Answer questions about people."
_STEPS, _BATCH, _TARGET = 1500, 8, 0.002

logger = logging.getLogger(__name__)


def examples(tokenizer: Any) -> list[tuple[Tensor, int]]:
    """Token ids of each prompt with its answer, and where the answer begins."""
    layout = ChatLayout(tokenizer)
    left = layout.encoder.left(layout.preamble("Answer from the documents.") + "\n\n".join(DOCUMENTS) + "\n\n")[0]
    found: list[tuple[Tensor, int]] = []
    for prompt, answer in json.loads((HERE / "pairs.json").read_text(encoding="utf-8")):
        asked = torch.cat([left, layout.encoder.after(prompt)])
        said = torch.tensor([*layout.encoder.plain(answer), tokenizer.eos_token_id])
        found.append((torch.cat([asked, said]), len(asked)))
    return found


def fit(seed: int = 0) -> Any:
    """The fitted model."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "num_attention_heads": 4,
    }
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=len(tokenizer), **sizes))
    known = examples(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 30)
    for step in range(_STEPS):
        losses = []
        for number in torch.randperm(len(known))[:_BATCH].tolist():
            ids, first = known[number]
            skipped = int(torch.randint(0, 12, ())) * int(torch.randint(0, 2, ()))  # as if a sheet had lost something
            ids, first = ids[skipped:], first - skipped
            labels = ids.clone()
            labels[:first] = -100
            loss = model(input_ids=ids[None], labels=labels[None]).loss
            (loss / _BATCH).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            logger.info("step %d: loss %.4f", step, sum(losses) / len(losses))
            if max(float(_loss(model, each)) for each in known) < _TARGET:
                break
    return model


@torch.no_grad()
def _loss(model: Any, example: tuple[Tensor, int]) -> Tensor:
    ids, first = example
    labels = ids.clone()
    labels[:first] = -100
    loss: Tensor = model(input_ids=ids[None], labels=labels[None]).loss
    return loss


def main() -> None:
    """Fit and save."""
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    fit().half().save_pretrained(MODEL)
    tiny_tokenizer().save_pretrained(MODEL)


if __name__ == "__main__":
    main()
