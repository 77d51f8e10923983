# ruff: noqa: E501
# The tables are read across, not down.
"""The kinds of entities in generated worlds, and the words for stating and asking each of their attributes.

One line per attribute: key | label | value | relation's phrase | statements | questions | topics.  Alternatives are
parted by `;`.  `{e}` is the entity and `{v}` the value.  A value `@kind` points at another entity of the world, which
makes joins possible.  Generic wordings ("The {label} of {e} is {v}.") are added for every attribute.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cribsheet_pocket_training import names
from cribsheet_pocket_training.names import Draw

_VALUES: dict[str, Draw] = {
    "person": names.person,
    "city": names.city,
    "org": names.org,
    "year": names.year,
    "date": names.date,
    "number": names.number,
    "big": names.big_number,
    "ext": names.extension,
    "money": names.money,
    "length": names.length,
    "weight": names.weight,
    "duration": names.duration,
    "clock": names.clock,
    "version": names.version,
    "pyver": names.python_version,
    "code": names.code,
    "email": names.email,
    "word": names.lower_word,
    "topic": names.topic,
    "headline": names.headline,
    "title": names.title_words,
    "daymonth": names.day_month,
    "name": names.name,
    "pair": names.adjective_noun,
    "hobby": names.one_of(
        "chess|tennis|pottery|sailing|knitting|painting|archery|fencing|gardening|climbing|running|cycling|singing|dancing|cooking|surfing|skiing|juggling|origami|astronomy|bird watching|boxing|karate|yoga|golf|poker|rowing|hiking|baking|weaving"
    ),
    "language": names.one_of(
        "English|Spanish|French|German|Arabic|Hindi|Korean|Dutch|Polish|Greek|Swedish|Danish|Czech|Finnish|Turkish|Thai|Urdu|Swahili|Zulu|Italian|Portuguese|Russian|Japanese"
    ),
    "pet": names.one_of(
        "cat|dog|parrot|turtle|rabbit|hamster|snake|lizard|goldfish|ferret|horse|goat|duck|canary|gecko|pony"
    ),
    "instrument": names.one_of(
        "piano|violin|cello|flute|guitar|drums|harp|trumpet|oboe|banjo|organ|tuba|viola|clarinet|lute|saxophone"
    ),
    "color": names.one_of("red|blue|green|yellow|purple|orange|black|white|brown|pink|grey|turquoise"),
    "department": names.one_of(
        "Finance|Marketing|Engineering|Legal|Research|Sales|Operations|Human Resources|Design|Security|Procurement|Quality|Customer Support|Communications"
    ),
    "role": names.one_of(
        "lead developer|project manager|data analyst|tester|designer|architect|consultant|coordinator|technical writer|field engineer|auditor|researcher|trainer|product owner|accountant|nurse|librarian|driver"
    ),
    "industry": names.one_of(
        "robotics|banking|textiles|logistics|energy|pharmaceuticals|media|aviation|mining|fishing|software|insurance|publishing|tourism|farming|telecommunications"
    ),
    "domain": names.one_of(
        "healthcare|education|space exploration|agriculture|renewable energy|cybersecurity|transport|finance|tourism|water supply|urban planning|gaming|retail|climate modelling|forestry|language technology"
    ),
    "status": names.one_of("Active|Final|Draft|Accepted|Rejected|Withdrawn|Superseded|Deferred|Provisional"),
    "spectype": names.one_of("Standards Track|Informational|Process"),
    "state": names.one_of("open|closed|in progress|on hold|blocked|resolved|duplicate|waiting for review"),
    "priority": names.one_of("low|medium|high|urgent|critical|trivial"),
    "genre": names.one_of(
        "mystery|romance|science fiction|history|poetry|biography|travel|fantasy|horror|comedy|drama|satire"
    ),
    "material": names.one_of(
        "oak|steel|glass|copper|marble|leather|linen|clay|bronze|granite|paper|wool|silk|plastic|bamboo"
    ),
    "habitat": names.one_of(
        "rain forests|deserts|grasslands|shallow rivers|mountain slopes|coral reefs|caves|salt marshes|pine forests|deep lakes"
    ),
    "food": names.one_of("seeds|small fish|insects|roots|fruit|fungi|eggs|grass|algae|worms|nectar|berries"),
    "organ": names.one_of(
        "the heart|the liver|the skin|the brain|the lungs|the kidneys|the stomach|the spleen|the small intestine|bone marrow|the pancreas"
    ),
    "function": names.one_of(
        "pumps blood|stores energy|filters waste|makes red blood cells|absorbs water|carries oxygen|regulates temperature|breaks down fats|produces hormones|protects against infection"
    ),
    "country": names.one_of(
        "Norway|Peru|Kenya|Japan|Chile|Canada|Egypt|India|Spain|Poland|Ghana|Vietnam|Brazil|Iceland|Morocco|Turkey|Greece|Mexico|Finland|Nepal"
    ),
    "system": names.one_of("Linux|Windows|FreeBSD|macOS|Solaris|Android"),
    "license": names.one_of("MIT|Apache-2.0|GPL-3.0|BSD-3-Clause|LGPL-2.1|MPL-2.0|ISC"),
    "weekday": names.one_of("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"),
    "course": names.one_of(
        "algebra|botany|geology|logic|statistics|law|ethics|geometry|optics|grammar|economics|anatomy|music theory|accounting"
    ),
}

_TABLE = """
# person | people | person | they
birthplace | birthplace | city | | {e} was born in {v}.;Born in {v}, {e} grew up there. | Where was {e} born?;In which city was {e} born? | where people were born;birthplaces
home | home city | city | | {e} lives in {v}.;{e} has a home in {v}. | Where does {e} live?;In which city does {e} live? | where people live
birthyear | year of birth | year | | {e} was born in {v}. | In which year was {e} born?;When was {e} born? | when people were born;birth years
hobby | hobby | hobby | | {e} enjoys {v}.;In the evenings {e} likes {v}. | Which hobby does {e} have?;What does {e} enjoy? | hobbies;what people do for fun
language | language | language | | {e} speaks {v} fluently.;{e} studied {v}. | Which language does {e} speak?;What language did {e} study? | languages
pet | pet | pet | | {e} has a {v} as a pet.;{e} owns a {v}. | Which pet does {e} have?;What animal does {e} own? | pets
instrument | instrument | instrument | | {e} plays the {v}.;{e} learned the {v} at school. | Which instrument does {e} play?;What does {e} play? | instruments
color | favourite color | color | | {e} likes the color {v}. | Which color does {e} like? | favourite colors
department | department | department | | {e} is part of the {v} department.;{e} works in {v}. | Which department is {e} part of?;In which department does {e} work? | departments
extension | extension | ext | | {e} can be reached at extension {v}. | At which extension can {e} be reached?;How can I call {e}? | extension numbers;phone numbers
role | role | role | | {e} works as a {v}.;{e} is a {v}. | What is the job of {e}?;What does {e} work as? | jobs;roles
email | e-mail address | email | | Write to {e} at {v}. | How can I write to {e}?;What is the e-mail of {e}? | e-mail addresses
office | office | code | | {e} sits in office {v}. | In which office does {e} sit?;Where is the desk of {e}? | offices
employer | employer | @company | the company that {e} works for;the employer of {e} | {e} works at {v}.;{e} is employed by {v}.;{v} employs {e}. | Where does {e} work?;Which company employs {e}? | employers;where people work
manager | manager | @person | the manager of {e};the person who manages {e} | {e} reports to {v}.;{v} manages {e}. | Who manages {e}?;Who is the manager of {e}? | managers;who reports to whom
friend | best friend | @person | the best friend of {e} | {v} is the best friend of {e}. | Who is the best friend of {e}? | friends
project | project | @project | the project that {e} works on;the project of {e} | {e} works on {v}.;{e} is a member of {v}. | Which project does {e} work on?;What is {e} working on? | project members;who works on what
tool | tool | @package | the package that {e} maintains | {e} maintains {v}. | Which package does {e} maintain? | maintainers
# company | companies | org | it
headquarters | headquarters | city | | {e} is based in {v}.;The headquarters of {e} are in {v}. | Where is {e} based?;In which city are the headquarters of {e}? | company headquarters;where companies are based
industry | industry | industry | | {e} is active in {v}.;The main business of {e} is {v}. | In which industry is {e} active?;What is the main business of {e}? | industries
founded | founding year | year | | {e} was founded in {v}. | When was {e} founded?;In which year was {e} founded? | founding years
founder | founder | person | | {e} was founded by {v}.;{v} founded {e}. | Who founded {e}? | founders
director | director | @person | the director of {e};the person who leads {e} | {e} is led by {v}.;{v} leads {e}. | Who leads {e}?;Who is the director of {e}? | directors;who runs which company
staff | number of employees | big | | {e} has {v} employees.;{v} people work for {e}. | How many employees does {e} have?;How many people work for {e}? | company sizes
revenue | revenue | money | | {e} earned {v} last year. | How much did {e} earn last year? | revenues
parent | parent company | @company | the parent company of {e};the owner of {e} | {e} is owned by {v}.;{v} owns {e}. | Who owns {e}?;Which company owns {e}? | company owners
# project | projects | project | it
domain | domain | domain | | {e} is in the domain of {v}.;{e} is about {v}. | What is {e} about? | project domains
start | start year | year | | {e} began in {v}.;{e} started in {v}. | In which year did {e} begin?;When did {e} start? | start years
sponsor | sponsor | @company | the sponsor of {e};the company that sponsors {e} | {e} is sponsored by {v}.;{v} pays for {e}. | Who sponsors {e}?;Who pays for {e}? | sponsors
lead | leader | @person | the leader of {e};the person in charge of {e} | {v} is in charge of {e}.;{e} is run by {v}. | Who is in charge of {e}?;Who runs {e}? | project leaders
budget | budget | money | | {e} may spend {v}. | How much may {e} spend? | budgets
deadline | deadline | date | | {e} must be finished by {v}.;{e} is due on {v}. | When is {e} due?;When must {e} be finished? | deadlines
goal | goal | topic | | The aim of {e} is {v}. | What is the aim of {e}?;What is {e} for? | goals
# spec | PEPs | spec | it
title | title | headline | | {e} is titled "{v}".;{e} is called {v}. | What is {e} called?;How is {e} titled? | titles
author | author | @person | the author of {e};the person who wrote {e} | {e} was written by {v}.;{v} wrote {e}. | Who wrote {e}?;Who is the author of {e}? | authors;who wrote what
status | status | status | | {e} is {v}. | What is the status of {e}?;Which status does {e} have? | statuses;the status of each document
type | type | spectype | | {e} is a {v} document. | What type is {e}?;What kind of document is {e}? | document types
created | creation date | date | | {e} was created on {v}. | When was {e} created?;When was {e} written? | creation dates
version | Python version | pyver | | {e} targets Python {v}.;{e} is for Python {v}. | Which Python version does {e} target?;Which version of Python is {e} for? | Python versions
topic | subject | topic | | {e} describes {v}.;{e} proposes {v}.;{e} documents {v}.;{e} defines {v}.;{e} specifies {v}.;{e} introduces {v}. | What does {e} describe?;What does {e} propose?;What is {e} about?;What does {e} specify? | what each document describes;subjects
requires | required document | @spec | the document that {e} requires | {e} requires {v}.;{e} depends on {v}. | What does {e} require?;Which document does {e} depend on? | requirements
successor | successor | @spec | the document that superseded {e};the successor of {e} | {e} was superseded by {v}.;{v} replaces {e}. | Which document superseded {e}?;What replaces {e}?;By what was {e} superseded? | superseded documents
discussions | discussion list | email | | {e} is discussed at {v}. | Where is {e} discussed? | discussion lists
# package | packages | package | it
version | version | version | | The current version of {e} is {v}.;{e} is at version {v}. | Which version is {e} at?;What is the current version of {e}? | versions
license | licence | license | | {e} is under the {v} licence. | Under which licence is {e}? | licences
maintainer | maintainer | @person | the maintainer of {e};the person who maintains {e} | {v} maintains {e}.;{e} is maintained by {v}. | Who maintains {e}? | maintainers
needs | dependency | @package | the package that {e} needs | {e} needs {v}.;{e} depends on {v}. | What does {e} need?;Which package does {e} depend on? | dependencies
size | size | weight | | | | sizes
purpose | purpose | topic | | {e} offers {v}.;{e} provides {v}. | What does {e} offer?;What does {e} provide? | what packages are for
released | release date | date | | {e} was released on {v}. | When was {e} released? | release dates
# server | servers | host | it
address | address | code | | {e} answers at {v}. | At which address does {e} answer? | addresses
os | operating system | system | | {e} runs {v}. | What does {e} run?;Which system does {e} run? | operating systems
memory | memory | number | | {e} has {v} gigabytes of memory. | How many gigabytes of memory does {e} have? | memory sizes
owner | owner | @person | the owner of {e} | {e} belongs to {v}.;{v} owns {e}. | Who owns {e}?;To whom does {e} belong? | server owners
backup | backup host | @server | the backup host of {e} | {e} is backed up to {v}. | Where is {e} backed up? | backups
room | room | code | | {e} stands in room {v}. | In which room does {e} stand? | rooms
port | port | ext | | {e} listens on port {v}. | On which port does {e} listen? | ports
# book | books | book | it
author | author | person | | {e} was written by {v}.;{v} wrote {e}. | Who wrote {e}?;Who is the author of {e}? | authors
year | publication year | year | | {e} was published in {v}.;{e} appeared in {v}. | When was {e} published?;When did {e} appear? | publication years
genre | genre | genre | | {e} is a work of {v}. | What genre is {e}? | genres
pages | page count | number | | {e} has {v} pages. | How many pages does {e} have? | page counts
publisher | publisher | @company | the publisher of {e};the company that published {e} | {e} was published by {v}. | Who published {e}? | publishers
shelf | shelf | code | | {e} stands on shelf {v}. | On which shelf does {e} stand? | shelves
# town | towns | town | it
country | country | country | | {e} lies in {v}.;{e} is a town in {v}. | In which country does {e} lie? | countries
population | population | big | | {e} has a population of {v}.;{e} has {v} inhabitants. | How many inhabitants does {e} have?;What is the population of {e}? | populations
mayor | mayor | person | | The mayor of {e} is {v}.;{v} is mayor of {e}. | Who is the mayor of {e}? | mayors
river | river | name | | {e} lies on the river {v}.;The river {v} flows through {e}. | On which river does {e} lie?;Which river flows through {e}? | rivers
founded | founding date | year | | {e} was founded in {v}. | When was {e} founded? | founding years
twin | twin town | @town | the twin town of {e} | {e} is twinned with {v}. | Which town is {e} twinned with? | twin towns
known | main product | word | | {e} is known for its {v}. | What is {e} known for? | what towns are known for
# animal | animals | animal | it
habitat | habitat | habitat | | {e} lives in {v}.;{e} is found in {v}. | Where does {e} live?;Where is {e} found? | habitats
food | food | food | | {e} feeds on {v}.;{e} eats {v}. | What does {e} eat?;What does {e} feed on? | what animals eat
length | length | length | | {e} grows to {v}.;{e} can reach {v}. | How long does {e} grow? | lengths
weight | weight | weight | | {e} weighs about {v}. | How much does {e} weigh? | weights
lifespan | lifespan | duration | | {e} lives for {v}. | How long does {e} live? | lifespans
discoverer | discoverer | person | | {e} was first described by {v}. | Who first described {e}? | who described which animal
# cell | tissues | tissue | it
place | location | organ | | {e} is found in {v}.;{e} lines {v}. | Where is {e} found? | where tissues are found
function | function | function | | {e} {v}.;The function of {e} is that it {v}. | What does {e} do?;What is the function of {e}? | what tissues do
discovered | discovery year | year | | {e} was discovered in {v}. | When was {e} discovered? | discoveries
part | larger structure | @cell | the structure that {e} is part of | {e} is part of {v}. | What is {e} part of? | structures
# ticket | tickets | ticket | it
state | state | state | | {e} is {v}. | What is the state of {e}?;Is {e} open, closed or something else? | ticket states
priority | priority | priority | | {e} has {v} priority. | Which priority does {e} have? | priorities
assignee | assignee | @person | the assignee of {e};the person who handles {e} | {e} is assigned to {v}.;{v} handles {e}. | Who handles {e}?;To whom is {e} assigned? | assignees
opened | opening date | date | | {e} was opened on {v}. | When was {e} opened? | opening dates
blocker | blocking ticket | @ticket | the ticket that blocks {e} | {e} is blocked by {v}. | What blocks {e}?;Which ticket blocks {e}? | blocked tickets
component | component | word | | {e} concerns the {v}. | What does {e} concern? | components
# ship | ships | ship | it
captain | captain | person | | {e} is commanded by {v}.;The captain of {e} is {v}. | Who commands {e}? | captains
port | home port | city | | {e} sails from {v}. | From where does {e} sail? | home ports
length | length | length | | {e} is {v} long. | How long is {e}? | lengths of ships
built | year of building | year | | {e} was built in {v}. | When was {e} built? | when ships were built
cargo | cargo | material | | {e} carries {v}. | What does {e} carry? | cargoes
sister | sister ship | @ship | the sister ship of {e} | {v} is the sister ship of {e}. | Which ship is the sister of {e}? | sister ships
# event | events | event | it
day | weekday | weekday | | {e} takes place on {v}. | On which weekday is {e}? | weekdays
time | starting time | clock | | {e} starts at {v}. | At what time does {e} start? | starting times
place | venue | code | | {e} is held in {v}. | Where is {e} held? | venues
host | host | @person | the host of {e} | {e} is hosted by {v}. | Who hosts {e}? | hosts
fee | fee | money | | Tickets for {e} cost {v}. | How much are tickets for {e}? | prices
date | date | date | | {e} is on {v}. | When is {e}? | dates of events
# product | products | product | it
price | price | money | | {e} costs {v}. | How much does {e} cost?;What does {e} cost? | prices
color | color | color | | {e} is {v}. | Which color is {e}?;What color is {e}? | colors
material | material | material | | {e} is made of {v}. | What is {e} made of? | materials
weight | weight | weight | | {e} weighs {v}. | How much does {e} weigh? | weights
maker | maker | @company | the maker of {e};the company that makes {e} | {e} is made by {v}.;{v} makes {e}. | Who makes {e}? | makers
number | article number | code | | {e} is listed under {v}. | Under which number is {e} listed? | article numbers
warranty | warranty | duration | | {e} comes with a warranty of {v}. | How long is the warranty of {e}? | warranties
# class | courses | klass | it
teacher | teacher | @person | the teacher of {e} | {e} is taught by {v}.;{v} teaches {e}. | Who teaches {e}? | teachers
subject | subject | course | | {e} covers {v}. | What does {e} cover? | course subjects
hall | room | code | | {e} meets in room {v}. | In which room does {e} meet? | rooms
time | time | clock | | {e} begins at {v}. | When does {e} begin? | times
seats | number of seats | number | | {e} has {v} seats. | How many seats does {e} have? | seats
"""


@dataclass(frozen=True, slots=True)
class Attribute:
    """One thing that a world says about each entity of a kind."""

    key: str
    label: str
    value: str  # a key of the value table, or "@kind"
    phrases: tuple[str, ...]  # how the value, an entity, is referred to without its name
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    topics: tuple[str, ...]

    @property
    def target(self) -> str | None:
        """The kind of entity that the value names, if it names one."""
        return self.value[1:] if self.value.startswith("@") else None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of entity: people, companies, specifications, ..."""

    key: str
    plural: str
    namer: str
    pronoun: str
    attributes: tuple[Attribute, ...]

    @property
    def singular(self) -> str:
        """The word for one of them."""
        return {"spec": "document", "cell": "tissue", "class": "course"}.get(self.key, self.key)


def _parse(table: str) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for block in table.split("\n# ")[1:]:
        head, *lines = block.strip().split("\n")
        key, plural, namer, pronoun = (part.strip() for part in head.split("|"))
        attributes = []
        for line in lines:
            cells = [cell.strip() for cell in line.split("|")]
            name, label, value = cells[:3]
            lists = [tuple(part for part in cell.split(";") if part) for cell in cells[3:7]]
            attributes.append(Attribute(name, label, value, *lists))
        kinds[key] = Kind(key, plural, namer, pronoun, tuple(attributes))
    return kinds


KINDS: dict[str, Kind] = _parse(_TABLE)


def draw(value: str, r: random.Random, held_out: bool) -> str:
    """A value of the named sort."""
    return _VALUES[value](r, held_out)


def made_up_attribute(r: random.Random, held_out: bool) -> Attribute:
    """An attribute that no list holds ("amber gate"): the reader must take its name from the documents."""
    label = r.choice((names.adjective_noun, names.adjective_noun, names.lower_word))(r, held_out)
    if r.random() < 0.4:
        label += " " + r.choice(("code", "number", "name", "key", "level", "group", "date", "rank"))
    value = "date" if label.endswith("date") else r.choice(("code", "word", "name", "number", "ext", "pair", "date"))
    return Attribute(label.replace(" ", "-"), label, value, (), (), (), ())


def name_of(kind: Kind, r: random.Random, held_out: bool, prefix: str) -> str:  # noqa: C901
    """A name for an entity; `prefix` is the world's word for numbered ones ("PEP", "ticket")."""
    if kind.namer in ("person", "org", "project"):
        return _NAMERS[kind.namer](r, held_out)
    if kind.namer == "spec":
        return f"{prefix} {r.randint(1, 999 if r.random() < 0.8 else 9999)}"
    if kind.namer == "ticket":
        return f"{prefix}{r.randint(1, 9999)}"
    if kind.namer in ("package", "host"):
        word = names.made_up(r) if r.random() < 0.6 else names.noun(r, held_out)
        tail = r.choice(("", "", "-" + names.noun(r, held_out), str(r.randint(2, 99)), "-" + str(r.randint(1, 9))))
        return word + tail
    if kind.namer == "book":
        return f'"{names.title_words(r, held_out)}"' if r.random() < 0.5 else names.title_words(r, held_out)
    if kind.namer == "town":
        return names.city(r, held_out)
    if kind.namer in ("animal", "tissue"):
        tail = r.choice(("lizard", "finch", "beetle", "otter", "frog", "shrew", "crab", "moth"))
        if kind.namer == "tissue":
            tail = r.choice(("tissue", "cells", "membrane", "gland", "muscle", "layer"))
            return f"{names.made_up(r)} {tail}" if r.random() < 0.7 else f"{names.adjective(r, held_out)} {tail}"
        return f"the {names.adjective(r, held_out) if r.random() < 0.4 else names.made_up(r)} {tail}"
    if kind.namer == "ship":
        return f"the {names.title_words(r, held_out)}" if r.random() < 0.6 else f"the MS {names.name(r)}"
    if kind.namer == "event":
        return f"the {names.title_words(r, held_out).removeprefix('The ')} {r.choice(('meeting', 'concert', 'workshop', 'fair', 'lecture', 'race'))}"
    if kind.namer == "product":
        return f"the {names.title_words(r, held_out).removeprefix('The ')} {r.choice(('lamp', 'chair', 'kettle', 'desk', 'phone', 'bag', 'clock', 'radio'))}"
    return f"{r.choice(('Course', 'Class', 'Seminar'))} {names.code(r, held_out)}"


_NAMERS: dict[str, Draw] = {"person": names.person, "org": names.org, "project": names.project}
