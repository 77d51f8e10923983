"""Requests to vLLM's server, where `cribsheet.engines.vllm` serves the sheet: bodies for its OpenAI routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cribsheet.asking.outside.prompts import Prompts
from cribsheet.engines.vllm.scheduling import KEY
from cribsheet.prompt.turns import Question, as_turns
from cribsheet.sheet.sheet import Sheet

# What a model's own settings would change: Qwen's penalise repetition, and so what stands for the sheet.
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VllmRequests:
    """Requests about a sheet, or the path of one, that a vLLM serves as `name`; `model` is how it names the model.

    Raises as `Prompts`. No weights are loaded; vLLM need not be installed.
    """

    def __init__(self, sheet: Sheet | str | Path, name: str, *, model: str, tokenizer: Any = None) -> None:
        self.prompts = Prompts(sheet, tokenizer)
        self.name, self.model = name, model

    def completion(self, question: Question, **settings: Any) -> dict[str, Any]:
        """The body for `/v1/completions`: greedy, but for what `settings` say, which are vLLM's."""
        prompt = {"prompt": self.prompts.whole(question), "kv_transfer_params": {KEY: self.name}}
        return {"model": self.model, **_GREEDY, **settings, **prompt}

    def chat(self, question: Question, **settings: Any) -> dict[str, Any]:
        """The body for `/v1/chat/completions` of vLLM 0.32 and later, which answers in that form, tools included.

        It reads the ids that go with the messages, and the messages only for what it makes of the answer.
        """
        named = {KEY: self.name, "prompt_token_ids": self.prompts.whole(question)}
        messages = [dict(turn) for turn in as_turns(question)]
        return {"model": self.model, **_GREEDY, **settings, "messages": messages, "kv_transfer_params": named}
