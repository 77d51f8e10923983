"""What a world is made of: documents, questions, tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

from cribsheet_pocket_training.schemas import Attribute, Kind

ABSENT = "Not in the documents."
STYLES = ("prose", "titled", "sentences", "header", "markdown", "rest", "csv", "table", "json", "mail", "directory")
QUESTION_KINDS = (
    "direct", "join2", "join3", "list", "inverse", "count", "compare", "yesno", "absent", "fill", "needle", "variable",
)  # fmt: skip
CHARACTERS_PER_TOKEN = 2.7


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a world."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answer; `answers` are the parts of a list, in order of appearance."""

    text: str
    answer: str
    kind: str  # one of QUESTION_KINDS
    family: str  # questions of one family ask for the same thing: "person.birthplace"
    documents: tuple[str, ...]  # ids of the documents that hold the answer
    answers: tuple[str, ...]
    entity: str = ""  # whom or what the question is about
    bridges: tuple[tuple[str, str], ...] = ()  # of a join: phrases of its text and the entities that they lead to


@dataclass(frozen=True, slots=True)
class Task:
    """A task line with the question families that it covers and the facts that it needs, in document order."""

    description: str
    families: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class World:
    """Documents with questions about them."""

    seed: int | str
    kind: str
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]
    tasks: tuple[Task, ...]

    @property
    def text(self) -> str:
        """The documents, parted by blank lines, as a prompt shows them."""
        return "\n\n".join(document.text for document in self.documents)

    def questions_of(self, task: Task) -> tuple[Question, ...]:
        """The questions that belong to `task`."""
        return tuple(q for q in self.questions if q.family in task.families)


@dataclass(slots=True)
class Fact:
    """A statement about an entity, with the ids of the documents that make it."""

    entity: str
    kind: Kind
    attribute: Attribute
    values: list[str]
    sentence: str = ""  # as the documents state it, where they do so in a sentence
    documents: list[str] = field(default_factory=list)
