"""Questions about real prose, made by rule from its sentences.

Each rule is a pattern over one sentence: "X was founded in 1923 by Y" asks when and by whom.  Where no rule fits,
a name or number is blanked out.  Sentences that begin with a pronoun are asked about with the article's title.
"""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cribsheet_pocket_training import verbs

_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = rf"(?:(?:\d{{1,2}} )?(?:{_MONTH})(?: \d{{1,2}},?)? \d{{3,4}}|\d{{4}})"
_NAME = r"[A-Z][\w'’\-]+(?:,? (?:of|the|and|de|van|von|in|[A-Z][\w'’\-]*\.?)){0,5}"
_SUBJECT = rf"((?:The |A |An )?(?:[a-z][\w\-]+ ){{0,2}}{_NAME}|The [a-z][\w\- ]{{2,40}}?|[A-Z][a-z]+(?: (?!(?:is|was|are|were|has|had|have|with|of|in|by|to|the|and|that)\b)[a-z]+)?)"  # noqa: E501
_VERB = (
    r"(founded|built|published|established|released|completed|opened|discovered|invented|introduced|adopted|signed|abolished|"
    r"launched|elected|appointed|born|created|formed|written|designed|developed|named|killed|defeated|directed|produced|"
    r"described|first described|recorded|composed|painted|married|influenced|replaced|followed|ruled|conquered|captured|"  # noqa: E501
    r"sold|bought|owned|led|won|coined|proposed|used|made|called|awarded|destroyed|divided|discovered|isolated)"
)
_DONE = (
    r"(founded|built|published|established|released|discovered|invented|introduced|adopted|signed|launched|created|formed|"
    r"wrote|designed|developed|killed|defeated|directed|produced|described|recorded|composed|painted|married|influenced|"
    r"replaced|ruled|conquered|captured|sold|bought|owned|led|won|coined|proposed|made|contains|produces|covers|includes|"
    r"protects|connects|carries|forms|causes|controls|supports|defines|requires|allows|provides|describes)"
)
_WHEN_DONE = re.compile(rf"^{_SUBJECT} (was|were) {_VERB} (?:[a-z ]{{0,20}})?(?:in|on) ({_DATE})\b")
_BY_WHOM = re.compile(rf"^{_SUBJECT} (was|were|is|are) {_VERB} by ((?:the )?{_NAME})(?=[ ,.])")
_IS_A = re.compile(
    rf"^{_SUBJECT} (?:\([^)]*\) )?(is|was|are|were) ((?:an?|the|one of|any) [^.;()]{{8,110}}?)(?=[.;]|, (?:which|who|and|that|where|with|in)\b| that | who | which )"  # noqa: E501
)
_ON_DATE = re.compile(rf"^(?:In|On|By) ({_DATE}),? ([^.;]{{20,160}})\.")
_PLACE = re.compile(
    rf"^{_SUBJECT} (is|was|are|were) (located|situated|based|headquartered|held|buried|born|found) (?:in|at|on) (?!(?:{_MONTH})\b)((?:the )?(?:[a-z]+ of )?[A-Z][\w'’\-]+(?:,? (?:of|the|[A-Z][\w'’\-]+)){{0,5}})(?=[ ,.])"  # noqa: E501
)
_LIFE = re.compile(rf"^{_SUBJECT} \((?:[^()]{{0,60}}?; )?(?:born )?(?:c\. )?({_DATE})(?: ?[–-] ?({_DATE}))?\) (is|was)")
_USED = re.compile(
    rf"^{_SUBJECT} (is|are|was|were) (?:often |commonly |widely |mainly )?used (?:for|to|as|in) ([^.;,]{{6,80}})(?=[.;,])"  # noqa: E501
)
_CALLED = re.compile(
    rf"^{_SUBJECT},? (?:is |are |was |were )?(?:also |sometimes |often |commonly )(?:known as|called|referred to as) (?:the )?\"?([^.;,\"()]{{3,50}}?)\"?(?=[.;,()]| is | was | are )"  # noqa: E501
)
_COUNT = re.compile(
    rf"^{_SUBJECT} (?:has|had) (?:a population of|about|approximately|over|some)? ?(\d[\d,.]*\d) ?([a-z]+)?"
)
_BECAUSE = re.compile(rf"^{_SUBJECT} (is|was|are|were) ([^.;,]{{4,60}}?) because ([^.;]{{10,100}})\.")
_ACTIVE = re.compile(rf"^{_SUBJECT} (?:also |later |first )?{_DONE} ([^.;,]{{6,80}})(?=[.;,])")
_SUPERLATIVE = re.compile(
    rf"^{_SUBJECT} (is|was|are|were) (the (?:\w+est|most \w+|first|only|second \w+est|capital|main|last)\b[^.;,]{{4,80}})(?=[.;,])"  # noqa: E501
)
_CONSISTS = re.compile(
    rf"^{_SUBJECT} (consists?|consisted|is made up|are made up|is composed|are composed) of ([^.;]{{6,100}})(?=[.;])"
)
_SPAN = re.compile(r"\b(?:[A-Z][\w\-]+(?: [A-Z][\w\-]+){0,3}|\d[\d,.]*\d)\b")
_SENTENCES = re.compile(r"(?<=[a-z\)\d\"]\.) (?=[A-Z\"])")
_PRONOUNS = {"He", "She", "It", "They", "This", "These", "There", "His", "Her", "Its", "Their", "The", "In", "On", "A", "An", "As", "At", "By", "For", "From", "With", "That", "Those", "When", "While", "After", "Before", "But", "And", "However", "Some", "Many", "Most", "Other", "One", "Two", "All", "Each", "Both", "Such", "We", "You", "If", "Since", "Although", "Another", "Several", "Which", "What", "Who"}  # fmt: skip  # noqa: E501


_AUXILIARIES = {"was", "were", "is", "are", "be", "been", "has", "had", "have", "with", "of", "in", "by", "to", "and"}


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph of an article."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class ReadingQuestion:
    """A question about a passage: `rule` names how it was made."""

    text: str
    answer: str
    rule: str


TASKS: dict[str, tuple[str, ...]] = {
    "when": ("Answer questions about dates.", "When things happened.", "Look up years and dates.", "Questions about when something was done."),  # noqa: E501
    "whom": ("Answer questions about who did what.", "By whom things were done.", "Look up people."),
    "what": ("Answer questions about what things are.", "Define the terms.", "Explain terms from the text.", "Look up definitions."),  # noqa: E501
    "where": ("Answer questions about places.", "Where things are.", "Look up locations."),
    "verb": ("Answer questions about what things do.", "What things do, are made of and are called.", "Look up facts.", "Answer questions about the chapter."),  # noqa: E501
    "blank": ("Fill in the blanks.", "Fill in the blank with words from the documents.", "Complete the sentences from the text."),  # noqa: E501
    "title": ("Say which article a statement is from.", "Find the article.", "Name the article that says something."),
    "quote": ("Quote the documents.", "Continue the sentences.", "Complete the quotations."),
    "fact": ("Answer questions about the articles.", "Answer questions about the text.", "Look up facts.", "Answer from the articles."),  # noqa: E501
}  # fmt: skip


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph."""
    return _SENTENCES.split(text)


def _lower(text: str) -> str:
    """A sentence start as it stands inside a question: "The cell" becomes "the cell"."""
    word = text.split(" ", 1)[0]
    return text[:1].lower() + text[1:] if word in _PRONOUNS else text


def questions(passage: Passage, r: random.Random) -> Iterator[ReadingQuestion]:
    """Questions about `passage`, by every rule that fits one of its sentences."""
    topic = passage.title.split(" (")[0]
    for sentence in sentences(passage.text):
        if not 30 < len(sentence) < 330:
            continue
        yield from _ask(sentence, topic, passage.title, r)
        for text, answer in verbs.questions(sentence, topic, passage.text, r):
            yield ReadingQuestion(text, answer, "verb")


def _ask(s: str, topic: str, title: str, r: random.Random) -> Iterator[ReadingQuestion]:  # noqa: C901
    def subject(m: re.Match[str]) -> str | None:
        found: str = m[1]
        if found in ("He", "She", "It", "They"):
            return topic
        return None if found in _PRONOUNS else _lower(found)

    if (m := _WHEN_DONE.match(s)) and (x := subject(m)):
        yield ReadingQuestion(
            r.choice(
                (
                    f"When {m[2]} {x} {m[3]}?",
                    f"In which year {m[2]} {x} {m[3]}?" if len(m[4]) == 4 else f"When {m[2]} {x} {m[3]}?",
                )
            ),
            m[4],
            "when",
        )
    if (m := _BY_WHOM.match(s)) and (x := subject(m)):
        yield ReadingQuestion(r.choice((f"Who {m[2]} {x} {m[3]} by?", f"By whom {m[2]} {x} {m[3]}?")), m[4], "whom")
    if (m := _LIFE.match(s)) and (x := subject(m)):
        yield ReadingQuestion(f"When was {x} born?", m[2], "when")
        if m[3]:
            yield ReadingQuestion(f"When did {x} die?", m[3], "when")
    if (m := _PLACE.match(s)) and (x := subject(m)):
        yield ReadingQuestion(f"Where {m[2]} {x} {m[3]}?", m[4], "where")
    if (m := _SUPERLATIVE.match(s)) and m[1] not in _PRONOUNS:
        yield ReadingQuestion(r.choice((f"What {m[2]} {m[3]}?", f"Which one {m[2]} {m[3]}?")), m[1], "fact")
    if (m := _IS_A.match(s)) and (x := subject(m)):
        word = "Who" if m[2] in ("was", "is") and re.search(r"born|\d{4}\)", s[:120]) else "What"
        yield ReadingQuestion(
            r.choice((f"{word} {m[2]} {x}?", f"{word} {m[2]} {x}?", f"What does the text say {x} {m[2]}?")),
            m[3],
            "what",
        )
    if (m := _USED.match(s)) and (x := subject(m)):
        yield ReadingQuestion(f"What {m[2]} {x} used for?", m[3], "fact")
    if (m := _CALLED.match(s)) and (x := subject(m)):
        yield ReadingQuestion(r.choice((f"What is {x} also called?", f"What is another name for {x}?")), m[2], "fact")
    if (m := _COUNT.match(s)) and (x := subject(m)):
        if "population" in m[0]:
            yield ReadingQuestion(
                r.choice((f"What is the population of {x}?", f"How many people live in {x}?")), m[2], "fact"
            )
        elif m[3] and m[3].endswith("s"):
            yield ReadingQuestion(f"How many {m[3]} does {x} have?", m[2], "fact")
    if (m := _BECAUSE.match(s)) and (x := subject(m)):
        yield ReadingQuestion(f"Why {m[2]} {x} {m[3]}?", "Because " + m[4], "fact")
    if (m := _CONSISTS.match(s)) and (x := subject(m)):
        yield ReadingQuestion(f"What does {x} consist of?", m[3], "fact")
    if (m := _ACTIVE.match(s)) and m[1] not in _PRONOUNS and m[1].split(" ")[-1] not in _AUXILIARIES:
        yield ReadingQuestion(f"{r.choice(('Who', 'What')) if ' ' in m[1] else 'What'} {m[2]} {m[3]}?", m[1], "whom")
    if (m := _ON_DATE.match(s)) and r.random() < 0.7:
        rest = _lower(m[2])
        if r.random() < 0.75:
            yield ReadingQuestion(
                r.choice((f"When did this happen: {rest}?", f"What is the date of this: {rest}?")), m[1], "when"
            )
        else:
            yield ReadingQuestion(
                f"What happened in {m[1]}?" if len(m[1]) == 4 else f"What happened on {m[1]}?", m[2], "fact"
            )
    dice = r.random()
    if dice < 0.4:
        spans = [span for span in _SPAN.finditer(s) if span.start() > 3]
        if spans:
            span = r.choice(spans)
            blank = f"{s[: span.start()]}____{s[span.end() :]}"
            if len(blank) > 150:  # a window around the blank
                start, stop = max(0, span.start() - r.randint(30, 90)), span.start() + r.randint(40, 90)
                blank = blank[start:stop].strip()
                blank = blank if "____" in blank else s[: span.start()] + "____"
            yield ReadingQuestion(
                r.choice(("Fill in the blank: ", "Fill in the blank: ", "Complete: ", "What is missing? ")) + blank,
                span[0],
                "blank",
            )
    elif dice < 0.48:
        yield ReadingQuestion(
            r.choice(
                (
                    f'Which article says that "{s.rstrip(".")}"?',
                    f"Which article says this: {s}",
                    f'Where does it say "{s[:80].rsplit(" ", 1)[0]}"?',
                )
            ),
            title,
            "title",
        )
    elif dice < 0.56:
        words = s.split(" ")
        cut = r.randint(4, 8)
        if len(words) > cut + 3:
            yield ReadingQuestion(
                r.choice(('Continue: "{}', 'How does this sentence go on: "{}')).format(" ".join(words[:cut]))
                + ' ..."',
                " ".join(words[cut:]),
                "quote",
            )
    elif dice < 0.6:
        spans = [span for span in _SPAN.finditer(s) if span.start() > 3]
        if spans:
            yield ReadingQuestion(
                r.choice(("Quote a sentence that mentions {}.", "Which sentence mentions {}?")).format(
                    r.choice(spans)[0]
                ),
                s,
                "quote",
            )


def passages(articles: Iterable[str]) -> Iterator[list[Passage]]:
    """The paragraphs of each article (title on its first line), without very short ones."""
    for article in articles:
        title, *paragraphs = article.split("\n")
        kept = [Passage(title, p) for p in paragraphs if len(p) > 80]
        if kept:
            yield kept


def laid_out(group: list[Passage], r: random.Random) -> str:
    """Passages of one article as a document: with the title as a line, a heading, or not at all; some hard-wrapped."""
    title, body = group[0].title, [p.text for p in group]
    x = r.random()
    if x >= 0.5 and r.random() < 0.2:
        width, indent = r.randint(64, 79), r.choice(("", "", "    "))
        body = [textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent) for text in body]
    if x < 0.35:
        return "\n".join([title, *body])
    if x < 0.5:
        return f"{'#' * r.randint(1, 2)} {title}\n\n" + "\n\n".join(body)
    if x < 0.62:
        return f"{title}\n{r.choice('=-') * len(title)}\n\n" + "\n\n".join(body)
    if x < 0.7:
        return f"Title: {title}\n\n" + "\n\n".join(body)
    if x < 0.78:
        return f"{title}\n\n" + "\n".join("- " + s for p in body for s in sentences(p))
    return "\n\n".join(body)
