"""Prompts over a sheet for engines that are not ours, in tokens: ids that stand for the sheet, then the question.

Questions are put into tokens by the sheet's own template, so that a model reads what it reads here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cribsheet.engines.placeholders import placeholders
from cribsheet.errors import MismatchError
from cribsheet.model.backbone import load_tokenizer
from cribsheet.model.fingerprint import tokenizer_digest
from cribsheet.prompt.template import ChatLayout
from cribsheet.prompt.turns import Question, as_turns
from cribsheet.retrieval.placing import after_sheet
from cribsheet.sheet.registry import load
from cribsheet.sheet.sheet import Sheet


class Prompts:
    """Prompts over a `sheet`, or its path.

    `tokenizer` is that of the model that made it, or its folder or hub id; loaded from where the sheet says by default,
    without weights. Attributes: `sheet`, `vocabulary`, and `ids`, those that stand for the sheet.

    Raises `MismatchError` for another tokenizer, and for a model without a chat template.
    """

    def __init__(self, sheet: Sheet | str | Path, tokenizer: Any = None) -> None:
        self.sheet = sheet if isinstance(sheet, Sheet) else load(sheet)
        made = self.sheet.manifest
        if tokenizer is None:
            tokenizer = load_tokenizer(made.fingerprint.model, made.fingerprint.revision)
        elif isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(str(tokenizer))
        self._layout = _layout(self.sheet, tokenizer)
        self.vocabulary = len(tokenizer)
        self.ids = placeholders(made.digest, self.sheet.length)

    def question(self, question: Question) -> list[int]:
        """Token ids of a question, or of a conversation, as they follow the sheet."""
        asked = after_sheet(self._layout, self.sheet.shown_task, self.sheet.resident, as_turns(question))
        ids: list[int] = asked.ids.tolist()
        return ids

    def whole(self, question: Question) -> list[int]:
        """All of the prompt."""
        return [*self.ids, *self.question(question)]


def _layout(sheet: Sheet, tokenizer: Any) -> ChatLayout:
    """The sheet's template. Raises `MismatchError` for another tokenizer or template, and for a model without one."""
    made = sheet.manifest
    layout = ChatLayout(tokenizer, system=made.system, options=made.template_options)
    for what, ours, theirs in (
        ("tokenizer", made.fingerprint.tokenizer, tokenizer_digest(tokenizer)),
        ("chat template", made.fingerprint.template, layout.digest),
    ):
        if ours != theirs:
            raise MismatchError(
                f"This sheet was made with another {what}: the sheet has {ours} (model {made.fingerprint.model}), the "
                f"tokenizer given has {theirs}. Give that of the model that made it."
            )
    if layout.plain:
        raise MismatchError(
            f"The model {made.fingerprint.model} has no chat template, so another engine would not know where an "
            "answer ends; ask the sheet here, or use a model with one."
        )
    return layout
