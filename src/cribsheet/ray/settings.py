"""What is served on Ray, as it goes to every replica."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cribsheet.server.sheets import named


class Serving(BaseModel):
    """What is served, and by how many.

    sheets
        `PATH` or `NAME=PATH` each, as `cribsheet serve` takes them; every machine of the cluster must find them.
    model_options
        those of `CompressedKnowledgeLLM.load`: `model`, `device`, `dtype`, `revision`.
    keys
        a table as in a key file; none: everybody may ask.
    settings
        fields of `ServerSettings`; its limits hold for all replicas together.
    replicas, most_replicas
        how many there are; with `most_replicas`, from so many to so many, by how much is asked.
    answers_per_replica
        requests under way in a replica at which the cluster adds another.
    open_sheets
        sheets that a replica holds open; beyond it, the one that was not asked for longest is let go.
    processes
        that divide the model of each replica among them (`model/divided.py`); 1 leaves it whole.
    cpus, gpus
        what each process needs.
    drain_seconds
        how long a replica that is to end may finish its answers.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    sheets: list[str] = Field(min_length=1)
    model_options: dict[str, str] = {}
    keys: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    replicas: int = Field(default=1, ge=1)
    most_replicas: int | None = Field(default=None, ge=1)
    answers_per_replica: float = Field(default=16, gt=0)
    open_sheets: int = Field(default=8, ge=1)
    processes: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    drain_seconds: float = Field(default=30, ge=1)

    def places(self) -> dict[str, str]:
        """Where the sheets are, by name."""
        return dict(named(each) for each in self.sheets)
