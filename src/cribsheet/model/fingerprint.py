"""What must match before a sheet may be used with a model.

Keys and values only mean something to the very weights, tokenizer, template and rotary settings that made them, so a
sheet carries a print of each and refuses all others, naming both values.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cribsheet.errors import MismatchError
from cribsheet.model.backbone import Backbone, sample_places
from cribsheet.prompt.template import ChatLayout

_PROBES = 64  # of the values looked at in each weight kept as numbers, to compare across dtypes
_PROBE_TOLERANCE = 0.02  # relative; rounding float32 to bfloat16 moves a value by at most 0.4 %


_Size = Annotated[int, Field(ge=1, lt=1 << 31)]
SAID_SINCE = {"vocabulary", "rotary_scaling"}
"""What files of before do not say: digests that are compared with theirs are made without it."""


class Fingerprint(BaseModel):
    """The identity of a loaded model as a sheet records it."""

    model_config = ConfigDict(extra="forbid")

    model: str
    revision: str | None
    family: str
    layers: _Size
    heads: _Size
    kv_heads: _Size
    head_size: _Size
    windows: list[_Size | None]
    rotary: str
    weights: str
    weights_dtype: str
    weights_probe: list[float]
    tokenizer: str
    template: str
    vocabulary: int = 0  # sheets of before do not say, nor the numbers of a scaled rotary embedding
    rotary_scaling: dict[str, float] = {}

    def check(self, loaded: Fingerprint) -> None:
        """Raise `MismatchError` unless a sheet with this print fits the `loaded` model."""
        for field, what in _MUST_MATCH.items():
            mine, theirs = getattr(self, field), getattr(loaded, field)
            if mine != theirs:
                self._refuse(what, mine, theirs, loaded)
        if self.weights_dtype == loaded.weights_dtype:
            if self.weights != loaded.weights:
                self._refuse("weights", self.weights, loaded.weights, loaded)
        elif not _close(self.weights_probe, loaded.weights_probe):
            self._refuse("weights", self.weights, loaded.weights, loaded)

    def _refuse(self, what: str, mine: object, theirs: object, loaded: Fingerprint) -> None:
        raise MismatchError(
            f"This sheet was made with another {what}: the sheet has {mine} (model {self._label()}), the loaded model "
            f"has {theirs} (model {loaded._label()}). Load the model that made it, or build the sheet again."
        )

    def _label(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model


_MUST_MATCH = {
    "family": "model family",
    "layers": "number of layers",
    "heads": "number of heads",
    "kv_heads": "number of key/value heads",
    "head_size": "head size",
    "windows": "sliding windows",
    "rotary": "rotary setting",
    "tokenizer": "tokenizer",
    "template": "chat template",
}


def fingerprint(backbone: Backbone, layout: ChatLayout) -> Fingerprint:
    """The print of a loaded model; reads a few values of each weight, not all of them."""
    samples = backbone.weight_samples()
    return Fingerprint(
        model=backbone.name,
        revision=backbone.revision,
        family=backbone.config.model_type,
        layers=backbone.num_layers,
        heads=backbone.num_heads,
        kv_heads=backbone.kv_heads,
        head_size=backbone.head_size,
        windows=backbone.windows,
        rotary=_rotary(backbone),
        weights=_digest(samples.double().numpy().tobytes()),
        weights_dtype=str(backbone.dtype).removeprefix("torch."),
        weights_probe=[round(float(value), 6) for value in _probes(samples)],
        tokenizer=tokenizer_digest(backbone.tokenizer),
        template=layout.digest,
        vocabulary=len(backbone.tokenizer),
        rotary_scaling=rotary_scaling(backbone.config),
    )


def probe_places(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Where in the weights of a model, in the order of their names, the values of `weights_probe` stand.

    As the number of the weight and the place in it, all of its numbers in a row.
    """
    samples = [(number, int(place)) for number, shape in enumerate(shapes) for place in sample_places(math.prod(shape))]
    return list(_probes(samples))


def _probes(samples: Any) -> Any:
    """Of the samples of all weights, those that are kept as numbers."""
    return samples[:: max(1, len(samples) // _PROBES)][:_PROBES]


def _rotary(backbone: Backbone) -> str:
    settings = getattr(backbone.config, "rope_parameters", None) or {}
    numbers = torch.cat(backbone.inv_freqs).double().cpu().numpy().round(9).tobytes()
    nested = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    named = ", ".join(f"{each.get('rope_type', 'default')} theta={each.get('rope_theta')}" for each in nested)
    return f"{named} #{_digest(numbers)}"


def rotary_scaling(config: Any) -> dict[str, float]:
    """The numbers by which a model's rotary embedding is scaled, by transformers' names; none where it is plain."""
    settings = getattr(config, "rope_parameters", None) or {}
    if settings.get("rope_type", "default") == "default":
        return {}
    return {
        name: float(value)
        for name, value in sorted(settings.items())
        if isinstance(value, int | float) and name != "rope_theta"
    }


_digests: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()  # state and digest


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells two tokenizers apart.

    Megabytes of vocabulary are gone through once for each tokenizer, and again if anything was added to it or set.
    """
    settings = _settings(tokenizer.backend_tokenizer)
    known, digest = _digests.get(tokenizer, ("", ""))
    if not digest or known != settings:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # these two change with use, not with identity
        state.pop("padding", None)
        digest = _digest(json.dumps(state, sort_keys=True).encode())
        _digests[tokenizer] = settings, digest
    return digest


def _settings(tokenizer: Any) -> str:
    """What can be set in a tokenizer that is loaded: its added tokens and all of its parts but the vocabulary."""
    names = "normalizer", "pre_tokenizer", "post_processor", "decoder"
    parts = [part and part.__getstate__() for part in (getattr(tokenizer, name) for name in names)]
    return repr((tokenizer.get_vocab_size(False), tokenizer.get_added_tokens_decoder(), parts))


def _close(first: list[float], second: list[float]) -> bool:
    if len(first) != len(second):
        return False
    a, b = torch.tensor(first), torch.tensor(second)
    scale = a.abs().mean().item() if len(first) else 0.0
    return bool(torch.allclose(a, b, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE * scale))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
