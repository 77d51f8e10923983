"""Tensor parallelism: one model whose weights are divided among the processes of a group.

Every process runs the same program and asks the same questions in the same order. Projections and feed-forward layers,
nearly all of the weights, are divided; queries, keys and values are gathered behind their projections, so each process
has the whole sheet, attends with all heads, and scores and keeps as one process alone would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from cribsheet.backbone import Backbone
from cribsheet.errors import ModelError
from cribsheet.handover import integration

_ATTENTION = {name: "colwise_gather_output" for name in ("q_proj", "k_proj", "v_proj")}
_ATTENTION |= {"o_proj": "rowwise_split_input"}


def divided(name: str | Path, **options: Any) -> Backbone:
    """`Backbone.load`, with the weights divided among the processes of torch's default group.

    Raises `ModelError` outside of a group, for families whose projections are fused (phi3), and where transformers is
    too old for a plan of one's own.
    """
    if not dist.is_initialized():
        raise ModelError("There is no group of processes; start them with torchrun, and call init_process_group first.")
    integration("accelerate", "cribsheet[ray]")  # transformers asks for it
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ModelError("This version of transformers cannot divide a model by a plan; install 5.23.") from error
    plan = {f"model.layers.*.self_attn.{part}": style for part, style in _ATTENTION.items()}
    backbone = Backbone.load(name, distributed_config=DistributedConfig(tp_plan=plan), **options)
    first = backbone.model.base_model.layers[0].self_attn
    if not all(hasattr(first, part) for part in _ATTENTION):
        raise ModelError(f"The projections of {backbone.config.model_type!r} are fused and cannot be divided so.")
    return backbone
