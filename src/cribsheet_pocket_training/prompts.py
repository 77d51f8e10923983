r"""Training samples: documents, task lines, questions and answers as token sequences with a weight class per token.

The forms are those of the chat template, so what is trained is what a library renders:

    <|bos|><|user|>{instruction}\n\n{doc}\n\n{doc}\n\n[Task: {description}\n\n]{question}<|end|><|assistant|>{answer}<|end|>...
    <|bos|><|system|>{instruction}\n\n{docs}<|end|><|user|>[Task: ...\n\n]{question}<|end|><|assistant|>...

with, in a share of the samples, later turns whose question follows retrieved passages, or a first turn that is only a
task line, answered by the notes that the task needs.
"""  # noqa: E501

from __future__ import annotations

import random
from collections.abc import Sequence

from cribsheet_pocket_training import names, reading
from cribsheet_pocket_training.tokenizer import ASSISTANT_ID, BOS_ID, END_ID, SYSTEM_ID, USER_ID, FastEncoder
from cribsheet_pocket_training.worlds import ABSENT, World, make_world

# Weight classes; train.WEIGHTS gives each its share in the loss.
NONE, GENERATED, ASKED, ANSWERED, PROSE, PLAIN, COPIED = range(7)

INSTRUCTION = "Answer from the documents."
_INSTRUCTIONS = (INSTRUCTION, INSTRUCTION, INSTRUCTION, "Use the documents below to answer.", "You answer questions about the documents.",  # noqa: E501
                 "Read the documents and answer the questions.", "Documents:")  # fmt: skip
BRIDGE = 6  # how many tokens of an entity, on the way of a join, are learnt by heart (see model.Reader)
Mark = tuple[int, list[int]]  # where a phrase ends, and the first tokens of the entity that it leads to, zeros after
Sample = tuple[list[int], list[int], list[Mark]]  # token ids, weight classes, and marks

# What the questions of one world dwell on: many joins in a row teach composition better than one now and then.
_EMPHASES: tuple[dict[str, float], ...] = (
    {"join2": 1.5, "join3": 3.0, "list": 2.5, "inverse": 1.3, "count": 2.0, "compare": 3.0, "absent": 0.4},
    {"direct": 0.15, "join2": 3.0, "join3": 9.0, "list": 0.3, "inverse": 0.2, "count": 0.2, "compare": 0.1, "yesno": 0.1, "absent": 0.1, "fill": 0.1},  # noqa: E501
    {"direct": 0.2, "join2": 0.2, "join3": 0.3, "list": 12.0, "inverse": 1.5, "count": 4.0, "compare": 0.5, "yesno": 0.2, "absent": 0.2, "fill": 0.2},  # noqa: E501
    {"direct": 0.3, "join2": 0.3, "join3": 0.5, "compare": 20.0, "count": 2.0, "absent": 0.2},
)  # fmt: skip
_EMPHASIS_SHARES = (0.35, 0.26, 0.37, 0.02)
_ASIDES = ("Please tell me: ", "Tell me: ", "Quick question: ", "I would like to know: ", "Do you know? ")


class _Sequence:
    """A sample that grows from left to right."""

    def __init__(self, encode: FastEncoder) -> None:
        self.encode = encode
        self.ids = [BOS_ID]
        self.weights = [NONE]
        self.marks: list[Mark] = []

    def special(self, token: int, weight: int = NONE) -> None:
        self.ids.append(token)
        self.weights.append(weight)

    def text(self, text: str, weight: int) -> None:
        ids = self.encode(text)
        self.ids += ids
        self.weights += [weight] * len(ids)

    def sample(self) -> Sample:
        """What has grown."""
        return self.ids, self.weights, self.marks

    def mark(self, question: str, phrase: str, entity: str) -> None:
        """Note where `phrase` ends in the question that comes next."""
        start = question.lower().rfind(phrase.lower())
        if start < 0:
            return
        ids = self.encode(entity)[:BRIDGE]
        end = len(self.ids) + len(self.encode(question[: start + len(phrase)])) - 1
        self.marks.append((end, ids + [0] * (BRIDGE - len(ids))))

    def turn(
        self,
        question: str,
        answer: str,
        room: int,
        weight: int = ANSWERED,
        opened: bool = False,
        bridges: Sequence[tuple[str, str]] = (),
    ) -> bool:
        """Add a question and its answer if they fit into `room` tokens; `opened`: the user turn has begun."""
        asked, answered = self.encode(question), self.encode(answer)
        if len(self.ids) + len(asked) + len(answered) + 4 > room:
            return False
        if not opened:
            self.special(USER_ID)
        for phrase, entity in bridges[:1]:  # the first step; the second has too few layers left to be asked for
            self.mark(question, phrase, entity)
        self.ids += [*asked, END_ID, ASSISTANT_ID, *answered, END_ID]
        self.weights += [ASKED] * len(asked) + [NONE, NONE] + [weight] * (len(answered) + 1)
        return True


class Sampler:
    """Draws samples of a wanted length.  `copying` is the share of pure copying exercises."""

    def __init__(
        self, encode: FastEncoder, articles: Sequence[str], seed: int, vocabulary: int, held_out: bool = False
    ) -> None:
        self.encode = encode
        self.articles = articles
        self.r = random.Random(f"samples:{seed}:{held_out}")
        self.seed = seed
        self.count = 0
        self.copying = 0.05
        self.repetition = 0.4
        self.vocabulary = vocabulary
        self.held_out = held_out

    def row(self, length: int) -> Sample:
        """Exactly `length` tokens: one sample, or one and smaller ones after it, the last padded."""
        ids: list[int] = []
        weights: list[int] = []
        marks: list[Mark] = []
        r = self.r
        while length - len(ids) > 100:
            room = length - len(ids)
            if not ids and r.random() < 0.3 and room > 300:
                room = r.randint(room // 4, room)
            more, classes, marked = self.sample(room)
            marks += [(len(ids) + at, entity) for at, entity in marked if at < room]
            ids += more[:room]
            weights += classes[:room]
        rest = length - len(ids)
        return ids[:length] + [0] * rest, weights[:length] + [NONE] * rest, marks

    def sample(self, room: int) -> Sample:
        """One sample of at most about `room` tokens."""
        r = self.r
        if r.random() < self.copying:
            return self.copy(min(room, 1024))
        x = r.random()
        found: Sample | None = None
        if not self.articles or x < 0.72:
            found = self.world(room)
        elif x < 0.93:
            found = self.read(room)
        elif x < 0.955:
            found = self.repeat(room)
        else:
            found = self.plain(room)
        return found or self.copy(min(room, 256))

    # -- copying -------------------------------------------------------------------------------------------------

    def copy(self, room: int) -> Sample:
        """Random tokens repeated, or random keys and values: what induction forms on within a few hundred steps."""
        r = self.r
        first, last = 262, self.vocabulary - 1
        if r.random() < self.repetition:
            size = r.choice((room // 4, room // 3, room // 2))
            segment = [r.randint(first, last) for _ in range(size)]
            ids = (segment * 5)[:room]
            return ids, [NONE] * size + [COPIED] * (len(ids) - size), []
        pairs: dict[tuple[int, ...], tuple[int, ...]] = {}
        mark = r.randint(first, last)
        while len(pairs) < max(3, room // r.choice((12, 20))):
            key = tuple(r.randint(first, last) for _ in range(r.choice((1, 1, 2, 3))))
            pairs[key] = tuple(r.randint(first, last) for _ in range(r.choice((1, 2, 3))))
        entries = list(pairs.items())
        ids, weights = [BOS_ID], [NONE]
        for key, value in entries:
            ids += [*key, *value, mark]
        weights += [NONE] * (len(ids) - 1)
        while len(ids) < room:
            key, value = r.choice(entries)
            ids += [*key, *value, mark]
            weights += [NONE] * len(key) + [COPIED] * len(value) + [NONE]
        return ids[:room], weights[:room], []

    # -- prose ---------------------------------------------------------------------------------------------------

    def _article(self) -> list[reading.Passage]:
        while True:
            article = self.articles[int(self.r.random() * len(self.articles))]
            for passages in reading.passages([article]):
                return passages

    def _filler(self, r: random.Random) -> str:
        group = self._article()
        return r.choice(group).text

    def plain(self, room: int) -> Sample:
        """Encyclopedia text as it is."""
        s = _Sequence(self.encode)
        while len(s.ids) < room:
            group = self._article()
            s.text(group[0].title + "\n" + "\n".join(p.text for p in group) + "\n\n", PLAIN)
        return s.ids[:room], s.weights[:room], []

    def repeat(self, room: int) -> Sample | None:
        """Documents, and the request to repeat them word for word."""
        size = min(room, 1500) * 0.42
        if self.r.random() < 0.5:
            text = make_world(self._next(), int(size), questions=0, held_out=self.held_out).text
        else:
            text = reading.laid_out(self._article()[:2], self.r)[: int(size * 3.3)].rsplit(" ", 1)[0]
        s = _Sequence(self.encode)
        self._open(s, [text], GENERATED, self.r.random() < 0.7)
        asked = self.r.choice(("Repeat the documents.", "Repeat the documents word for word.", "Copy the text."))
        return s.sample() if s.turn(asked, text, room, COPIED, opened=s.ids[-1] != END_ID) else None

    # -- documents and questions ---------------------------------------------------------------------------------

    def _next(self) -> str:
        self.count += 1
        return f"{self.seed}.{self.count}"

    def _open(self, s: _Sequence, documents: Sequence[str], weight: int, inside: bool) -> None:
        """Instruction and documents: inside the first user turn, which stays open, or as the system turn."""
        s.special(USER_ID if inside else SYSTEM_ID)
        s.text(self.r.choice(_INSTRUCTIONS) + "\n\n", NONE)
        body = "\n\n".join(documents)
        s.text(body + ("\n\n" if inside else ""), weight)
        if not inside:
            s.special(END_ID)

    def _share(self, room: int) -> float:
        """The part of a sample that its documents take."""
        r = self.r
        if room <= 600:
            return r.uniform(0.35, 0.66)
        return r.uniform(0.45, 0.8) if room <= 2500 else r.uniform(0.62, 0.94)

    def world(self, room: int) -> Sample | None:
        """A generated world with questions about it."""
        r = self.r
        size = int(room * self._share(room))
        filler = self._filler if self.articles and size > 300 and r.random() < 0.4 else None
        x = r.random()
        notes_only = x < 0.16
        with_task = notes_only or x < 0.55
        wanted = 10 + (room - size) // (14 if with_task else 22)
        w = make_world(
            self._next(),
            size,
            questions=min(500, wanted * (4 if with_task else 2)),
            emphasis=r.choices(_EMPHASES, _EMPHASIS_SHARES)[0],
            filler=filler,
            held_out=self.held_out,
        )
        task = None
        questions = list(w.questions)
        if with_task:
            tasks = [t for t in w.tasks if len(t.notes) > 1] if notes_only else list(w.tasks)
            if tasks:
                task = r.choices(tasks, [1 + len(w.questions_of(t)) ** 0.5 for t in tasks])[0]
                questions = list(w.questions_of(task))
        # A question asked twice in other words could be answered from the turn before.
        questions = list({(q.family, q.entity or q.answer): q for q in reversed(questions)}.values())
        r.shuffle(questions)
        hidden: set[str] = set()
        if len(w.documents) > 4 and not notes_only and w.kind != "variables" and r.random() < 0.2:
            hidden = {d.id for d in w.documents if r.random() < 0.4}
        shown = [d.text for d in w.documents if d.id not in hidden]
        s = _Sequence(self.encode)
        inside = r.random() < 0.74
        self._open(s, shown, GENERATED if filler is None else PROSE, inside)
        if len(s.ids) > room - 40:
            return None
        lead = f"Task: {task.description}" if task else ""
        opened = inside
        if task and notes_only:
            if not s.turn(lead, "\n".join(task.notes), room, opened=opened):
                return None
            opened, lead = False, ""
        for q in questions:
            passages = self._passages(w, q.documents, hidden)
            text = passages + self._asked(q.text)
            if lead:
                text, lead = f"{lead}\n\n{text}", ""
            if not s.turn(text, q.answer, room, opened=opened, bridges=q.bridges):
                break
            opened = False
        return s.sample() if not opened else None

    def _asked(self, text: str) -> str:
        """A question, now and then as people type it: in small letters, without its mark, or led up to."""
        x = self.r.random()
        if x > 0.06 or self.held_out:
            return text
        if x < 0.02:
            return self.r.choice(_ASIDES) + text
        text = text[:1].lower() + text[1:] if x < 0.045 else text
        return text.rstrip("?") if x > 0.035 else text

    def _passages(self, w: World, needed: Sequence[str], hidden: set[str]) -> str:
        """Retrieved passages before a question: those that it needs and were not shown, and some that it does not need."""  # noqa: E501
        r = self.r
        chosen = hidden.intersection(needed)
        if not chosen and not (hidden and r.random() < 0.3):
            return ""
        if len(needed) > 6:
            chosen = hidden.intersection(needed)
        chosen |= {d.id for d in r.sample(w.documents, min(len(w.documents), r.randint(0, 3)))}
        texts = [d.text for d in w.documents if d.id in chosen]
        if sum(map(len, texts)) > 4000:
            texts = [d.text for d in w.documents if d.id in hidden.intersection(needed)]
        return "Passages:\n\n" + "\n\n".join(texts) + "\n\n" if texts else ""

    def read(self, room: int) -> Sample | None:  # noqa: C901
        """Paragraphs of several articles with questions about them."""
        r = self.r
        size = int(room * self._share(room) * 3.45)  # characters
        documents: list[str] = []
        groups: list[list[reading.Passage]] = []
        while size > 250 and len(groups) < 40:
            group = self._article()
            start = 0 if r.random() < 0.6 else r.randrange(len(group))
            most = r.choice((1, 1, 2, 3)) if room < 3000 else r.choice((1, 2, 4, 8))
            part: list[reading.Passage] = []
            for p in group[start : start + most]:
                if len(p.text) + len(p.title) > size:
                    break
                part.append(p)
                size -= len(p.text) + len(p.title) + 10
            if part:
                groups.append(part)
            elif len(groups) > 1 or r.random() < 0.1:
                break
        if not groups:
            return None
        pool = [q for g in groups for p in g for q in reading.questions(p, r)]
        documents = [reading.laid_out(g, r) for g in groups]
        if r.random() < 0.15:
            self._needles(documents, pool)
        rule = r.choice([q.rule for q in pool]) if pool else "fact"
        lead = ""
        easy = {"blank": 0.4, "quote": 0.25, "title": 0.3}
        if r.random() < 0.45:
            if r.random() < 0.6 and rule in reading.TASKS:
                pool = [q for q in pool if q.rule == rule]
                lead = "Task: " + r.choice(reading.TASKS[rule])
            else:
                lead = "Task: " + r.choice(reading.TASKS["fact"])
                pool = [q for q in pool if r.random() < easy.get(q.rule, 1.0)]
        else:
            pool = [q for q in pool if r.random() < easy.get(q.rule, 1.0)]
        r.shuffle(pool)
        absent = self._absent({g[0].title for g in groups})
        hidden = (
            {i for i in range(len(documents)) if r.random() < 0.4}
            if len(documents) > 2 and r.random() < 0.15
            else set()
        )
        s = _Sequence(self.encode)
        inside = r.random() < 0.74
        self._open(s, [d for i, d in enumerate(documents) if i not in hidden], PROSE, inside)
        if len(s.ids) > room - 40:
            return None
        opened = inside
        for q in pool[:150]:
            text, answer = self._asked(q.text), q.answer
            if absent and r.random() < 0.06:
                text, answer = absent.pop().text, ABSENT
            if hidden:
                home = next((i for i, g in enumerate(groups) if any(q.answer in p.text for p in g)), None)
                if home in hidden and answer != ABSENT:
                    more = {home, r.randrange(len(documents))} if r.random() < 0.5 else {home}
                    text = "Passages:\n\n" + "\n\n".join(documents[i] for i in sorted(more)) + "\n\n" + text
                elif home is None:
                    continue
            if lead:
                text, lead = f"{lead}\n\n{text}", ""
            if not s.turn(text, answer, room, opened=opened):
                if opened or r.random() < 0.5:
                    continue
                break
            opened = False
        return s.sample() if not opened else None

    def _absent(self, shown: set[str]) -> list[reading.ReadingQuestion]:
        """Questions about an article that is not among the documents."""
        group = self._article()
        if group[0].title in shown:
            return []
        sure = ("what", "when", "whom", "where")
        return [q for p in group for q in reading.questions(p, self.r) if q.rule in sure and q.text.count(" ") > 2]

    def _needles(self, documents: list[str], pool: list[reading.ReadingQuestion]) -> None:
        """Put facts that belong nowhere into the documents, and questions about them into `pool`."""
        r = self.r
        thing = r.choice(("access code", "password", "magic number", "code word"))
        for _ in range(r.randint(1, 6)):
            key, value = names.adjective_noun(r, self.held_out), names.code(r, self.held_out)
            if any(key in d for d in documents):
                continue
            i = r.randrange(len(documents))
            around = documents[i].split(". ")
            around.insert(r.randint(0, len(around) - 1), f"The {thing} for {key} is {value}")
            documents[i] = ". ".join(around)
            pool.append(reading.ReadingQuestion(f"What is the {thing} for {key}?", value, "fact"))
