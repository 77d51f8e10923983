"""Questions about what things do, made by rule: "Fibroblasts secrete collagen." asks "What do fibroblasts secrete?"

`reading` knows the set phrases of an encyclopedia ("was founded in"); these rules know common verbs in the present, the
past and the passive, with and without a preposition.  A rule that is unsure of its sentence asks nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

_REGULAR = (
    "absorb accept achieve acquire act add address adopt affect aid allow alter announce appear apply appoint "
    "approach arrange assemble assist attach attack attract award balance base block bond border bound branch breathe "
    "calculate call capture carry cause celebrate change characterize circulate classify collapse collect combine "
    "command compare complete compose comprise compress concern conduct connect conquer consider consist constitute "
    "consume contain continue contract contribute control convert convey cool cover create cross damage decide "
    "declare decompose decrease defeat defend define deliver demand depend derive describe design destroy determine "
    "develop differ digest direct discover discuss display dissolve distinguish distribute divide dominate donate "
    "edit elect eliminate emerge emphasize employ enable encourage end enter establish examine exceed exchange "
    "execute exhibit exist expand explain explore export express extend face feature fight fill filter finance finish "
    "fire flow focus follow form found function generate govern guarantee guide handle help hold host hunt identify "
    "ignore illustrate implement imply import improve include incorporate increase indicate influence inherit inhabit "
    "inhibit initiate inspire install integrate introduce invade invent invite involve isolate issue join kill lack "
    "launch limit line link list live locate lower maintain manage manufacture mark marry match measure mediate merge "
    "migrate mix modify move need note observe obtain occupy occur offer open operate oppose order organize originate "
    "oversee own paint participate pass perform permit persuade place plan plant play point possess power practice "
    "praise precede predict prefer prepare preserve press prevent process produce prohibit promise promote propose "
    "protect prove provide publish pull pump purchase push quote raise range reach react receive recognize recommend "
    "record recover reduce refer reflect refuse regulate reject relate relax release rely remain remove render repair "
    "replace report represent reproduce request require resemble resist resolve respond restore restrict result "
    "retain retire return reveal reverse revise rule sample save score scatter seal search secrete separate serve "
    "settle shape share signal sign specify sponsor stabilize start state stimulate stop store strengthen stretch "
    "study succeed suffer supply support surround surrender survive sustain symbolize synthesize target teach test "
    "tie trace trade train transfer transform translate transmit transport travel treat trigger use vary view visit "
    "want warn wear win work yield"
)
_IRREGULAR = (
    "become:became:become begin:began:begun bind:bound:bound break:broke:broken breed:bred:bred bring:brought:brought "
    "build:built:built buy:bought:bought choose:chose:chosen come:came:come draw:drew:drawn drive:drove:driven "
    "eat:ate:eaten feed:fed:fed fight:fought:fought find:found:found fly:flew:flown get:got:got give:gave:given "
    "grow:grew:grown have:had:had hold:held:held keep:kept:kept lead:led:led leave:left:left lie:lay:lain "
    "lose:lost:lost make:made:made meet:met:met pay:paid:paid put:put:put rise:rose:risen run:ran:run see:saw:seen "
    "sell:sold:sold send:sent:sent set:set:set show:showed:shown sing:sang:sung sink:sank:sunk speak:spoke:spoken "
    "spend:spent:spent spread:spread:spread stand:stood:stood take:took:taken teach:taught:taught "
    "understand:understood:understood wear:wore:worn win:won:won withdraw:withdrew:withdrawn write:wrote:written"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DOUBLED = _words("permit refer transfer submit stop plan occur control compel transmit")  # "planned"


def _third(base: str) -> str:
    if base == "have":
        return "has"
    if base.endswith(("s", "sh", "ch", "x", "o")):
        return base + "es"
    return base[:-1] + "ies" if base.endswith("y") and base[-2] not in "aeiou" else base + "s"


def _past(base: str) -> str:
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    doubled = base in _DOUBLED
    return base + base[-1] * doubled + "ed"


FORMS: dict[str, tuple[str, str]] = {}  # a finite form -> its base and its auxiliary: "secretes" -> ("secrete", "does")
PARTICIPLES: dict[str, str] = {}  # "secreted" -> "secretes", which asks for the agent
for _entry in (*_IRREGULAR.split(), *_REGULAR.split()):
    _base, _then, _done = _entry.split(":") if ":" in _entry else (_entry, _past(_entry), _past(_entry))
    FORMS.setdefault(_third(_base), (_base, "does"))
    FORMS.setdefault(_base, (_base, "do"))
    FORMS.setdefault(_then, (_base, "did"))
    PARTICIPLES.setdefault(_done, _third(_base))
PARTICIPLES |= dict.fromkeys(("known", "located", "situated", "called", "termed", "responsible", "born", "buried"), "")

_PREPOSITIONS = (
    "in|on|at|from|to|into|for|with|through|during|by|as|after|before|between|among|against|along|around|over|under|"
    "within|without|across|about|until|since|toward|towards|onto|throughout|via|despite|near|behind|of|upon"
)
_CUT = re.compile(
    rf"[.;:,()\[\]—–]| (?:{_PREPOSITIONS.replace('|of|', '|')}|that|which|who|whom|whose|where|when|while|because|but|although|though|than|if|so|rather|using|including|such|called|when|based)\b"  # noqa: E501
)
_CLAUSE = re.compile(r"[.;:()\[\]—–]|,? (?:which|who|whom|where|when|while|because|but|although|though|whereas)\b|, ")
_ADVERB = r"(?:(?:also|often|usually|commonly|typically|generally|normally|sometimes|later|then|first|mainly|primarily|mostly|eventually|currently|always|never|only|still|soon|finally|subsequently|originally|frequently|actively|directly|largely|widely|especially) )?"  # noqa: E501
_FINITE = re.compile(
    rf"^((?:[\w'’\-]+ ){{1,6}}?){_ADVERB}({'|'.join(sorted(FORMS, key=len, reverse=True))}) (?=[\w\"'(])"
)
_MODAL = re.compile(r"^((?:[\w'’\-]+ ){1,6}?)(can|may|must|could|should|will) (?:also |often )?([a-z]+) (?=[\w\"])")
_PASSIVE = re.compile(
    rf"^((?:[\w'’\-]+ ){{1,7}}?)(is|are|was|were) {_ADVERB}({'|'.join(PARTICIPLES)}) (by|in|at|on|from|to|into|with|as|for|of) (?=[\w\"])"  # noqa: E501
)
_NAMED = re.compile(r"^((?:[\w'’\-]+ ){1,12}?)(is|are|was|were) (?:also |often |sometimes )?(called|termed|named) ")
_DEFINED = re.compile(r"^((?:[\w'’\-]+ ){1,7}?)(is|are|was|were) ((?:the|one of the|any of) .+)")
_MANY = re.compile(
    r"^((?:[\w'’\-]+ ){1,6}?)(has|have|had|contains?|includes?|comprises?|consists? of) "
    r"(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|\d+) ((?:[a-z\-]+ )?[a-z]+s)\b"
)
_THERE = re.compile(
    r"^There (are|were) (?:about |over |approximately )?(two|three|four|five|six|seven|eight|nine|ten|twelve|\d+) "
    r"((?:[a-z\-]+ ){0,2}[a-z]+s(?: of [a-z]+(?: [a-z]+)?)?)(?=[ .,:;])"
)
_EXAMPLES = re.compile(
    r"\b((?:[a-z\-]+ )?[a-z\-]{3,}s),? (?:such as|including) ((?:[\w\-’' ]+, )*[\w\-’' ]+,? and [\w\-’' ]+?)(?=[.;(]|, (?:which|but|while))"  # noqa: E501
)
_BY_DOING = re.compile(r"^(.{12,110}?),? by ([a-z]+ing [^.;,()]{5,90})\.")
_BECAUSE = re.compile(r"^(.{12,110}?),? because (?!of\b)([^.;()]{8,100})\.")
_YEAR = re.compile(r" in (\d{4})\b")
_NOT_SUBJECTS = _words(
    "is are was were be been being has have had that which who whom whose when while because if although though "
    "as since after before this these those there it he she they we you i his her their its our to but or not "
    "more than such can may could would should will must do does did by of in on at from for with into during "
    "however also where what how then thus therefore whether both either another other sometimes often usually "
    "today later soon here using based following according research"
)
_NOT_INSIDE = _NOT_SUBJECTS - {"of"}  # "the study of tissues"
_DETERMINERS = _words(
    "a an the most many some all each several every these no both its his her their one two three four"
)
_PARTICLES = _words("not up out down off themselves itself himself herself slightly much very even just")
_IDIOM = re.compile(r"(?:place|part|rise|a role|control|advantage|way|effect|power|office|the potential)\b")
_WITH_TO = _words("allow enable cause help require encourage force permit lead invite persuade")
_WHERE = _words("in at on from")
_PLACED = _words("live occur grow stand lie exist settle appear")
_PHRASAL = _words(
    "consist depend lead result belong refer contribute connect respond act serve live occur grow work derive "
    "come bind attach differ feed focus rely participate study range originate react extend flow stand lie settle "
    "appear play return travel move exist"
)


def _subject(text: str, topic: str, passage: str) -> str | None:
    """A sentence's subject as it stands inside a question, or none if it is no plain noun phrase."""
    text = text.strip()
    if text in ("He", "She", "It", "They"):
        return topic
    words = text.split(" ")
    first = words[0].lower()
    if first in _NOT_SUBJECTS or any(w in _NOT_INSIDE or (w in FORMS and w.endswith("ed")) for w in words[1:]):
        return None
    if len(words) == 1 and (first in _DETERMINERS or first.endswith("ly")):
        return None
    if words[-1].lower() in _DETERMINERS or words[-1].endswith("ly") or words[-1] in ("and", "of"):
        return None
    common = first in _DETERMINERS or (len(words) > 1 and words[1].islower() and words[1] not in ("of", "and"))
    if common or f" {first} " in f" {passage} ":
        return first + text[len(first) :]
    return text


def _cut(text: str, stop: re.Pattern[str] = _CUT, longest: int = 70) -> str | None:
    """The phrase that `text` begins with, up to a boundary."""
    found = stop.search(text)
    phrase = (text[: found.start()] if found else text).strip()
    if phrase.count('"') == 2 and phrase[0] == phrase[-1] == '"':
        phrase = phrase[1:-1]
    parts = phrase.split(" and ")
    for i, part in enumerate(parts[1:], 1):  # "blood and carries oxygen": the second verb ends the object
        if part.split(" ")[0] in FORMS or part.split(" ")[0] in _NOT_SUBJECTS:
            phrase = " and ".join(parts[:i])
            break
    words = phrase.split(" ")
    if len(words) > 1 and (words[-1] in PARTICIPLES or words[-1] == "according"):  # "epithelium attached | to"
        phrase = phrase[: -len(words[-1]) - 1]
    usable = 2 < len(phrase) <= longest and phrase.split(" ")[0] not in _NOT_SUBJECTS and phrase.count('"') % 2 == 0
    return phrase if usable and phrase.split(" ")[-1].lower() not in _DETERMINERS | {"and", "of", "or"} else None


def _finite(s: str, topic: str, passage: str, r: random.Random) -> Iterator[tuple[str, str]]:
    """"Fibroblasts secrete collagen": what do they secrete, what secretes it, when."""  # fmt: skip
    m = _FINITE.match(s)
    x = _subject(m[1], topic, passage) if m else None
    if m is None or x is None:
        return
    (base, auxiliary), rest = FORMS[m[2]], s[m.end() :]
    preposition, _, after = rest.partition(" ")
    if re.fullmatch(_PREPOSITIONS, preposition):
        yield from _adverbial(f"{auxiliary} {x} {base}", base, preposition, after)
        return
    y, is_list = _object(base, rest)
    if y is None:
        return
    yield f"What {auxiliary} {x} {base}?", y
    if not is_list and m[1].strip() not in ("He", "She", "It", "They") and r.random() < 0.7:
        form = m[2] if auxiliary == "did" else _third(base)
        who = "Who" if auxiliary == "did" and x[:1].isupper() and r.random() < 0.6 else "What"
        yield f"{who} {form} {y}?", m[1].strip()
    if auxiliary == "did" and (year := _YEAR.search(rest[len(y) : len(y) + 60])):
        yield f"When did {x} {base} {y}?", year[1]


def _adverbial(does: str, base: str, preposition: str, after: str) -> Iterator[tuple[str, str]]:
    """"Cells live in colonies": where do cells live; "consist of": what does it consist of."""  # fmt: skip
    if base not in _PHRASAL or (preposition == "of") != (base == "consist") or not (y := _cut(after)):
        return
    if re.fullmatch(r"\d{4}", y):
        yield f"When {does}?", y
    elif preposition in _WHERE and base in _PLACED:
        yield f"Where {does}?", y
    elif preposition == "from" and base in ("come", "originate"):
        yield f"Where {does} from?", y
    else:
        yield f"What {does} {preposition}?", y


def _object(base: str, rest: str) -> tuple[str | None, bool]:
    """The object that `rest` begins with, if a question may ask for it, and whether it is a list."""
    if base in ("include", "comprise") and "," in rest and (listed := _cut(rest, _CLAUSE, 120)):
        return listed, True
    y = _cut(rest)
    if y is None:
        return None, False
    if base in _WITH_TO and rest[len(y) :].startswith(" to "):
        y = _cut(rest, _CLAUSE, 90)  # "allows the body to move"
    first = rest.partition(" ")[0]
    idle = first in _PARTICLES or (base == "have" and first.endswith(("ed", "ly"))) or _IDIOM.match(y or "")
    return (None if idle else y), False


def _passive(s: str, topic: str, passage: str) -> Iterator[tuple[str, str]]:
    """"Bile is produced by the liver": what is it produced by, what produces it; "is found in": where."""  # fmt: skip
    m = _PASSIVE.match(s)
    x = _subject(m[1], topic, passage) if m else None
    y = _cut(s[m.end() :]) if m else None
    if m is None or x is None or y is None:
        return
    if re.fullmatch(r"(?:[A-Z][a-z]+ )?\d{4}", y):
        yield f"When {m[2]} {x} {m[3]}?", y
    elif m[4] in ("in", "at", "on"):
        yield f"Where {m[2]} {x} {m[3]}?", y
    else:
        yield f"What {m[2]} {x} {m[3]} {m[4]}?", y
        if m[4] == "by" and m[2] in ("is", "are") and PARTICIPLES[m[3]]:
            yield f"What {PARTICIPLES[m[3]]} {x}?", y


def _being(s: str, topic: str, passage: str, r: random.Random) -> Iterator[tuple[str, str]]:
    """Definitions and names: "Histology is the study of tissue", "This joint is called a suture"."""
    if (m := _NAMED.match(s)) and (x := _subject(m[1], topic, passage)) and (y := _cut(s[m.end() :], _CLAUSE)):
        yield f"What {m[2]} {x} {m[3]}?", y
        yield f"What do you call {x}?", y
    elif (m := _DEFINED.match(s)) and (x := _subject(m[1], topic, passage)) and (y := _cut(m[3], _CLAUSE, 110)):
        yield f"What {m[2]} {x}?", y
        if len(y) < 70 and m[1].strip() not in ("He", "She", "It", "They"):
            yield r.choice((f"What {m[2]} {y}?", f"Which one {m[2]} {y}?")), m[1].strip()


def _counted(s: str, topic: str, passage: str) -> Iterator[tuple[str, str]]:
    """"The heart has four chambers": how many chambers."""  # fmt: skip
    if (m := _MANY.match(s)) and (x := _subject(m[1], topic, passage)):
        base = {"has": "have", "had": "have", "consists of": "consist of"}.get(m[2], m[2].rstrip("s"))
        auxiliary = "did" if m[2] == "had" else "do" if m[2] == base else "does"
        yield f"How many {m[4]} {auxiliary} {x} {base}?", m[3]
    if m := _THERE.match(s):
        yield f"How many {m[3]} {m[1]} there?", m[2]


def _manner(s: str, topic: str, passage: str) -> Iterator[tuple[str, str]]:
    """How and why: "by …ing" and "because"; what something can do."""
    for pattern, word, lead in ((_BY_DOING, "How", "by "), (_BECAUSE, "Why", "Because ")):
        if (whole := pattern.match(s)) and (m := _FINITE.match(whole[1] + " ")) and "," not in whole[1]:
            x = _subject(m[1], topic, passage)
            if x is not None and m.end() <= len(whole[1]) + 1:
                base, auxiliary = FORMS[m[2]]
                rest = f"{base} {whole[1][m.end() :]}".strip()
                yield f"{word} {auxiliary} {x} {rest}?", lead + whole[2]
    if (m := _MODAL.match(s)) and m[3] in FORMS and (x := _subject(m[1], topic, passage)):
        if y := _cut(s[m.start(3) :], _CLAUSE):
            yield f"What {m[2]} {x} do?", y
        if y := _cut(s[m.end() :]):
            yield f"What {m[2]} {x} {m[3]}?", y


def questions(s: str, topic: str, passage: str, r: random.Random) -> Iterator[tuple[str, str]]:
    """Questions with their answers about the sentence `s` of `passage`, whose article is about `topic`."""
    if s.startswith(("However, ", "Therefore, ", "Thus, ", "Today, ", "Instead, ")):
        s = s.split(", ", 1)[1]
        s = s[:1].upper() + s[1:]
    yield from _finite(s, topic, passage, r)
    yield from _passive(s, topic, passage)
    yield from _being(s, topic, passage, r)
    yield from _counted(s, topic, passage)
    yield from _manner(s, topic, passage)
    if m := _EXAMPLES.search(s):
        yield f"What are examples of {m[1]}?", m[2]
