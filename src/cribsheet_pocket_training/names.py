# ruff: noqa: E501, SIM905
# Word lists are read across, not down.
"""Names, words, numbers and codes for generated worlds.

Half of everything is made up from syllables, so that a reader can only answer by copying.  Names from word lists
are split by a checksum: one part is for training, the other is only ever seen in held-out worlds.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

Draw = Callable[[random.Random, bool], str]  # (random numbers, held out?) -> a value

_FIRST = """James Mary Robert Linda Michael Susan David Karen Richard Nancy Joseph Lisa Thomas Betty Daniel Helen
Matthew Sandra Anthony Donna Mark Carol Paul Ruth Steven Sharon Andrew Laura Joshua Sarah Kevin Kim Brian Anna Edward
Amy Ronald Angela Tim Emma Jason Olivia Jeff Sofia Ryan Elena Jacob Ivan Gary Olga Eric Pavel Jonas Nina Stephen Priya
Larry Ravi Justin Mei Scott Yuki Brandon Kenji Frank Aisha Omar Fatima Hassan Leila Diego Lucia Pablo Carmen Mateo Rosa
Luca Giulia Marco Paola Hans Greta Karl Ingrid Lars Astrid Sven Freya Pierre Claire Luc Camille Jan Eva Tomas Petra Marek
Zofia Kofi Ama Chidi Ngozi Tariq Samira Farid Yasmin Arjun Anika Dev Lena Felix Clara Hugo Alice Oscar Iris Max Nora Theo
Ada Guido Barry Tim Nick Raymond Victor Brett Antoine Ned Larry Donald Grace Alan Barbara Dennis Ken Margaret Linus Radia
Bob Peter John George William Henry Charles Elizabeth Catherine Julia Simon Adam Lucy Martin Philip Walter Rebecca""".split()
_LAST = """Smith Johnson Williams Brown Jones Miller Davis Garcia Rodriguez Wilson Martinez Anderson Taylor Thomas Hernandez
Moore Martin Jackson Thompson White Lopez Lee Gonzalez Harris Clark Lewis Robinson Walker Perez Hall Young Allen Sanchez
Wright King Scott Green Baker Adams Nelson Hill Ramirez Campbell Mitchell Roberts Carter Phillips Evans Turner Torres
Parker Collins Edwards Stewart Flores Morris Nguyen Murphy Rivera Cook Rogers Morgan Peterson Cooper Reed Bailey Bell
Gomez Kelly Howard Ward Cox Diaz Richardson Wood Watson Brooks Bennett Gray James Reyes Cruz Hughes Price Myers Long
Foster Sanders Ross Morales Powell Sullivan Russell Ortiz Jenkins Gutierrez Perry Butler Barnes Fisher Novak Kowalski
Ivanov Petrov Tanaka Sato Suzuki Park Chen Wang Li Zhang Singh Patel Kumar Khan Ali Haddad Okafor Mensah Diallo Rossi
Bianchi Ferrari Weber Schmidt Fischer Meyer Wagner Becker Hansen Larsen Olsen Berg Lindberg Dubois Moreau Laurent Silva
Santos Costa Almeida Moreno Warsaw Cannon Coghlan Hettinger Goodger Stinner Langa Viehland Katz Shannon Pitrou""".split()
_CITY = """Lisbon Oslo Cairo Lima Kyoto Quito Dakar Turin Delhi Perth Hanoi Sofia Riga Minsk Accra Tunis Porto Osaka
Boston Denver Austin Dublin Geneva Prague Vienna Warsaw Athens Berlin Madrid Nairobi Bogota Seoul Taipei Manila Jakarta
Havana Zurich Munich Lyon Milan Naples Malaga Bergen Krakow Dresden Ghent Leeds Cork Split Varna Toronto Montreal Chicago
Houston Seattle Portland Santiago Mumbai Lagos Algiers Baku Tbilisi Almaty Tallinn Vilnius Helsinki Stockholm Copenhagen
Rotterdam Antwerp Marseille Valencia Seville Bologna Genoa Hamburg Cologne Leipzig Salzburg Basel London Paris Rome Tokyo
Sydney Melbourne Auckland Bristol Glasgow Cardiff Bath York Utrecht Delft Bremen Kiel Graz Linz Brno Gdansk""".split()
_ADJ = """blue red silver golden iron crystal bright deep north south east west grey black white green copper amber quiet
swift hidden lone twin high low broad wild stone solar lunar arctic coral velvet crimson scarlet ivory jade cobalt misty
ancient rapid gentle hollow narrow frozen early late central upper lower outer inner second third dark pale warm cold dry
old new little great royal""".split()
_NOUN = """falcon harbor summit lantern compass anchor meadow canyon glacier beacon orchard prairie bridge willow raven
otter lynx heron maple cedar aurora comet nova orbit quasar vertex matrix signal horizon delta echo atlas titan phoenix
griffin sphinx mosaic prism cascade ember river forest garden tower castle island valley mountain engine window mirror
kettle basket ladder hammer needle violin pencil carpet bottle candle blanket saddle wagon barrel""".split()
_ORG = "Labs Systems Group Foods Energy Industries Partners Bank Motors Media Works Holdings Institute Press".split()
_THING = """data code memory file network document library module user message error string token image price list table
thread storage packet syntax type function import test build package class cache record schedule budget patient water
energy soil traffic language letter market signal text number map time date energy pattern error key""".split()
_ING = """checking sorting sharing naming storing sending parsing comparing handling writing reading loading marking
grouping counting measuring cleaning closing opening merging splitting signing importing formatting annotating building
testing packing planning moving renaming removing restoring copying filtering listing showing hiding""".split()
_FORM = """format protocol convention method notation module interface policy standard scheme library procedure guide rule
syntax operator mechanism process statement decorator tool model process system framework plan index""".split()
_QUAL = """simple common new safe portable uniform faster optional strict lazy explicit generic standard minimal flexible
single shared consistent reliable small public formal abstract numeric binary""".split()

_SYLLABLES = [
    head + tail
    for head in "b br c d dr f g gr h j k kl l m n p pr r s st t tr v w z th sh ch y q".split()
    for tail in "a e i o u ar en or il an ai ou ek us".split()
]
MONTHS = "January February March April May June July August September October November December".split()


def _part(words: list[str], held_out: bool) -> list[str]:
    return [w for w in dict.fromkeys(words) if (zlib.crc32(w.encode()) % 4 == 0) == held_out]


_POOLS: dict[tuple[int, bool], list[str]] = {}


class Narrow(random.Random):
    """Random numbers of a world whose names come from few words, so that many share their first ones.

    Where "Chidi" stands for one person only, repeating what followed it is enough; a reader that learnt from such
    worlds alone goes on with the wrong Chidi.
    """

    def __init__(self, seed: str, size: int) -> None:
        super().__init__(seed)
        self.size = size
        self.pools: dict[int, list[str]] = {}
        self.invented: list[str] = []

    def pool(self, key: int, words: list[str]) -> list[str]:
        """The few of `words` that this world uses."""
        if key not in self.pools:
            self.pools[key] = self.sample(words, min(self.size, len(words)))
        return self.pools[key]


def pick(r: random.Random, words: list[str], held_out: bool) -> str:
    """One of `words`, of the part that training (or held-out worlds) may use."""
    key = (id(words), held_out)
    pool = _POOLS.get(key)
    if pool is None:
        pool = _POOLS[key] = _part(words, held_out)
    if isinstance(r, Narrow):
        pool = r.pool(id(words), pool)
    return pool[int(r.random() * len(pool))]


def capital(text: str) -> str:
    """The text with a capital letter at its start."""
    return text[:1].upper() + text[1:]


def made_up(r: random.Random, h: bool = False, least: int = 2) -> str:
    """A lower-case word of `least` to 4 random syllables."""
    if isinstance(r, Narrow) and r.invented and r.random() < 0.5:
        return r.choice(r.invented)
    word = "".join(r.choice(_SYLLABLES) for _ in range(least + (r.random() < 0.45) + (r.random() < 0.1)))
    if isinstance(r, Narrow) and len(r.invented) < r.size:
        r.invented.append(word)
    return word


def name(r: random.Random, h: bool = False) -> str:
    """A capitalised made-up word."""
    return made_up(r, h).capitalize()


def first(r: random.Random, h: bool) -> str:
    """A first name."""
    return pick(r, _FIRST, h) if r.random() < 0.75 else name(r)


def person(r: random.Random, h: bool) -> str:
    """A first and a last name, now and then with an initial."""
    last = pick(r, _LAST, h) if r.random() < 0.6 else name(r)
    if r.random() < 0.08:
        return f"{first(r, h)} {r.choice('ABCDEFGHJKLMNPRSTVW')}. {last}"
    return f"{first(r, h)} {last}"


def city(r: random.Random, h: bool) -> str:
    """A town."""
    x = r.random()
    if x < 0.55:
        return pick(r, _CITY, h)
    if x < 0.62:
        return f"{pick(r, _ADJ, h).capitalize()} {name(r)}"
    return name(r)


def adjective_noun(r: random.Random, h: bool) -> str:
    """Two words: "amber gate"."""
    return f"{pick(r, _ADJ, h)} {pick(r, _NOUN, h)}"


def title_words(r: random.Random, h: bool) -> str:
    """A title: "The Harbor of Velu"."""
    x = r.random()
    if x < 0.4:
        return f"{pick(r, _ADJ, h).capitalize()} {pick(r, _NOUN, h).capitalize()}"
    if x < 0.55:
        return f"The {pick(r, _NOUN, h).capitalize()} of {name(r)}"
    if x < 0.7:
        return pick(r, _NOUN, h).capitalize()
    return name(r)


def org(r: random.Random, h: bool) -> str:
    """A company."""
    x = r.random()
    if x < 0.25:
        base = pick(r, _ADJ, h).capitalize() + pick(r, _NOUN, h)
    elif x < 0.5:
        base = f"{pick(r, _ADJ, h).capitalize()} {pick(r, _NOUN, h).capitalize()}"
    else:
        base = name(r)
    return f"{base} {r.choice(_ORG)}" if r.random() < 0.85 else base


def project(r: random.Random, h: bool) -> str:
    """A project."""
    return ("Project " if r.random() < 0.7 else "") + title_words(r, h)


def topic(r: random.Random, h: bool) -> str:
    """A noun phrase that a specification could be about: "a portable format for storing package data"."""
    x = r.random()
    thing = f"{pick(r, _THING, h)} {pick(r, _THING, h)}s" if r.random() < 0.5 else pick(r, _THING, h) + "s"
    if x < 0.55:
        return f"a {pick(r, _QUAL, h)} {pick(r, _FORM, h)} for {pick(r, _ING, h)} {thing}"
    if x < 0.75:
        return f"the {pick(r, _FORM, h)} for {pick(r, _ING, h)} {thing}"
    if x < 0.9:
        return f"{pick(r, _ING, h)} {thing} with a {pick(r, _QUAL, h)} {pick(r, _FORM, h)}"
    return f"how to improve the {pick(r, _FORM, h)} of the {name(r)} {pick(r, _FORM, h)}"


def headline(r: random.Random, h: bool) -> str:
    """A title of a specification: "Package Formats"; those of training may be as long as real ones."""
    x = r.random()
    if x < 0.4:
        short = f"{pick(r, _THING, h).capitalize()} {pick(r, _FORM, h).capitalize()}s"
    elif x < 0.7:
        short = f"{pick(r, _ING, h).capitalize()} {pick(r, _THING, h).capitalize()}s"
    else:
        short = f"{pick(r, _QUAL, h).capitalize()} {pick(r, _THING, h).capitalize()} {pick(r, _FORM, h).capitalize()}"
    return short if h or r.random() < 0.4 else _lengthened(short, r)


def _lengthened(title: str, r: random.Random) -> str:
    """A title that goes on: "Add Package Formats for Python 3"."""
    things = [f"{pick(r, _QUAL, False)} {pick(r, _THING, False)}s" for _ in range(2)]
    version = r.choice(("2", "3", "2.7", "3.3", f"3.{r.randint(0, 16)}"))
    return r.choice((
        f"Add {title}", f"{title} for Python {version}", f"{title} in Python {version}", f"{title} {version}",
        f"{title} and {capital(things[0])}", f"{title}, {things[0]}, and {things[1]}", f"{title} with {things[0]}",
        f"{title}: {capital(topic(r, False))}", f"{title} - {things[0]}", f"Adding {topic(r, False)}",
        capital(topic(r, False)), f"{capital(pick(r, _ING, False))} {things[0]} from the {title.lower()}",
        f"A {name(r)}-compatible {pick(r, _FORM, False)} for {things[0]}", f"The {name(r)} {title}",
        f"``{pick(r, _THING, False)}_{pick(r, _FORM, False)}()`` and {things[0]}",
        f"{title} ({pick(r, _FORM, False)} {version})",
    ))  # fmt: skip


def year(r: random.Random, h: bool) -> str:
    """A year."""
    return str(r.randint(1700, 2029) if r.random() < 0.4 else r.randint(1930, 2026))


def date(r: random.Random, h: bool) -> str:
    """A date in one of four notations."""
    day, month, y = r.randint(1, 28), r.randrange(12), r.randint(1890, 2027)
    x = r.random()
    if x < 0.3:
        return f"{day} {MONTHS[month]} {y}"
    if x < 0.5:
        return f"{MONTHS[month]} {day}, {y}"
    if x < 0.8:
        return f"{day:02d}-{MONTHS[month][:3]}-{y}"
    return f"{y}-{month + 1:02d}-{day:02d}"


def day_month(r: random.Random, h: bool) -> str:
    """A day of the year."""
    return f"{r.randint(1, 28)} {r.choice(MONTHS)}"


def number(r: random.Random, h: bool) -> str:
    """A number of 1 to 5 digits."""
    return str(r.randint(2, 10 ** r.choice((2, 3, 3, 4, 5))))


def big_number(r: random.Random, h: bool) -> str:
    """A number of 4 to 7 digits, mostly with commas."""
    n = r.randint(1000, 10 ** r.choice((5, 6, 7)))
    return f"{n:,}" if r.random() < 0.6 else str(n)


def extension(r: random.Random, h: bool) -> str:
    """A number of 3 to 5 digits."""
    return str(r.randint(100, 99999))


def money(r: random.Random, h: bool) -> str:
    """An amount of money."""
    n = r.randint(2, 9999)
    return r.choice((f"{n} euros", f"${n}", f"{n}.{r.randint(0, 99):02d} EUR", f"{n} dollars"))


def length(r: random.Random, h: bool) -> str:
    """A length with its unit."""
    return f"{r.randint(2, 9999)} {r.choice(('m', 'km', 'metres', 'kilometres', 'feet', 'cm'))}"


def weight(r: random.Random, h: bool) -> str:
    """A weight with its unit."""
    return f"{r.randint(2, 999)} {r.choice(('kg', 'tons', 'grams', 'pounds'))}"


def duration(r: random.Random, h: bool) -> str:
    """A span of time."""
    return f"{r.randint(2, 90)} {r.choice(('minutes', 'hours', 'days', 'weeks', 'years', 'months'))}"


def clock(r: random.Random, h: bool) -> str:
    """A time of day."""
    return f"{r.randint(0, 23):02d}:{r.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def version(r: random.Random, h: bool) -> str:
    """A version number."""
    return f"{r.randint(0, 9)}.{r.randint(0, 15)}" + (f".{r.randint(0, 9)}" if r.random() < 0.4 else "")


def python_version(r: random.Random, h: bool) -> str:
    """A version of Python."""
    return f"{r.choice((2, 3, 3, 3))}.{r.randint(0, 16)}"


def code(r: random.Random, h: bool) -> str:
    """A code of letters and digits."""
    x = r.random()
    if x < 0.35:
        return "".join(r.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(r.randint(2, 3))) + f"-{r.randint(10, 9999)}"
    if x < 0.6:
        return "".join(r.choice("abcdef0123456789") for _ in range(r.choice((6, 8))))
    if x < 0.8:
        return str(r.randint(10**4, 10**8))
    return f"{name(r)}{r.randint(1, 99)}"


def email(r: random.Random, h: bool) -> str:
    """An e-mail address."""
    return f"{first(r, h).lower()}@{made_up(r)}.{r.choice(('org', 'com', 'net', 'io'))}"


def lower_word(r: random.Random, h: bool) -> str:
    """A lower-case word, mostly made up."""
    return made_up(r) if r.random() < 0.6 else pick(r, _NOUN, h)


def adjective(r: random.Random, h: bool) -> str:
    """An adjective of the lists."""
    return pick(r, _ADJ, h)


def noun(r: random.Random, h: bool) -> str:
    """A noun of the lists."""
    return pick(r, _NOUN, h)


def one_of(text: str) -> Draw:
    """A drawer over `|`-separated values, the same for training and held-out worlds: kinds of things, not names."""
    values = text.split("|")
    return lambda r, h: values[int(r.random() * len(values))]
