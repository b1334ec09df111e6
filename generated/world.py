"""The generated world: a small grammar over meanings. suite.py makes the tasks and the pretraining text of it.

A meaning is an `Event` (verb, agent, patient, recipient, tense, negation, place, time), whose agent, patient
and recipient are `Thing`s (noun, number, determiner, adjective, what stands behind the noun). `sentence` says
it in many ways, and small functions make other meanings of it:

    e = Event("sell", Thing("farmer", plural=True), Thing("rose", adjective="red"),
              recipient=Thing("mary", det=""), place="at the market")
    sentence(e)                     the farmers sold the red rose to mary at the market .
    sentence(e, passive=True)       the red rose was sold to mary by the farmers at the market .
    sentence(e, ask="patient")      what did the farmers sell to mary at the market ?
    sentence(converse(e))           mary bought the red rose from the farmers at the market .
    sentence(general(dice, e))      the farmers sold the flower to mary at the market .
    sentence(negate(e))             the farmers did not sell the red rose to mary at the market .
    sentence(different(dice, e))    mary sold the red rose to the farmers at the market .

Everything depends on its arguments alone and is the same on every machine.
"""

import itertools
import random
import re
from typing import NamedTuple

# ------------------------------------------------------------------------------ words
# In every list the common words come first and the rare ones last: see Dice.rare.


def table(text):
    """{name: [word, ...]} from lines "name: word word ...", which may go on in the next line."""
    _, *pieces = re.split(r"(\w+):", text)
    return {name: words.split() for name, words in zip(pieces[::2], pieces[1::2])}


NOUNS = table("""
    person: man woman boy girl child kid friend neighbour guest stranger visitor orphan
    worker: teacher farmer doctor nurse baker lawyer singer painter soldier writer instructor dancer pilot
        judge physician sailor attorney chef plumber tailor driver actor actress waiter waitress gardener monk
        nun spy thief detective reporter editor poet professor engineer butcher captain dentist carpenter
    relative: mother father sister brother aunt uncle daughter son cousin niece nephew grandmother grandfather
    ruler: king queen prince princess duke duchess emperor empress
    animal: dog cat horse cow rabbit fox goat pig wolf bear bunny monkey tiger lion mouse donkey camel
        squirrel
    bird: robin owl eagle parrot crow goose swan hen sparrow heron
    fruit: apple pear peach plum orange lemon banana cherry melon fig
    vegetable: carrot onion tomato potato cabbage turnip radish
    flower: rose tulip lily daisy orchid sunflower
    tool: hammer shovel ladder knife axe rake drill wrench chisel
    vehicle: car truck bus bicycle boat bike taxi wagon automobile van tractor cab canoe
    instrument: guitar violin piano drum flute trumpet harp
    toy: ball doll kite puzzle balloon whistle
    garment: coat hat shirt scarf jacket glove dress sweater
    container: box bag basket bottle jar bucket barrel""")
PEOPLE, ANIMALS, FOOD = ["person", "worker", "relative", "ruler"], ["animal", "bird"], ["fruit", "vegetable"]
MADE = ["tool", "vehicle", "instrument", "toy", "garment", "container"]
GOODS = MADE + FOOD + ["flower"]
PLURALS = dict(zip(
    "man woman child person thief wolf mouse goose knife tomato potato".split(),
    "men women children people thieves wolves mice geese knives tomatoes potatoes".split(),
))  # fmt: skip
NAMES = table("""
    himself: john peter david paul mark henry simon victor oscar felix
    herself: mary anna sarah laura emma julia alice clara nora irene""")
SEXES = table("""
    himself: man boy actor waiter monk father brother uncle son nephew grandfather king prince duke emperor
    herself: woman girl actress waitress nun mother sister aunt daughter niece grandmother queen princess
        duchess empress""")
HYPERNYM = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns}
HYPERNYM |= {"worker": "person", "relative": "person", "ruler": "person", "bird": "animal"}
HYPERNYM |= {name: SEXES[reflexive][0] for reflexive in NAMES for name in NAMES[reflexive]}
NAMED = {SEXES[reflexive][0]: NAMES[reflexive] for reflexive in NAMES}
ROLES, DETAILS = ("agent", "patient", "recipient"), ("manner", "place", "time")
PRONOUNS = {"he": "him", "she": "her", "they": "them"}  # as subject: as object
DETERMINERS = {  # by plural
    False: "the a this my our another".split(),
    True: "the two some these my three many those several four".split(),
}
STRICT = {  # go with one number alone. Every, each, few are only here: they turn entailment round.
    False: "this a that every each another".split(),
    True: "these two those three many several few".split(),
}

FRAMES = {  # which classes the agent, the patient and the recipient are of
    "act": (PEOPLE, None, None),
    "live": (ANIMALS, None, None),
    "treat": (PEOPLE, PEOPLE, None),
    "hunt": (ANIMALS, ANIMALS, None),
    "keep": (PEOPLE, ANIMALS, None),
    "handle": (PEOPLE, GOODS, None),
    "make": (PEOPLE, MADE, None),
    "eat": (PEOPLE, FOOD, None),
    "give": (PEOPLE, GOODS, PEOPLE),
    "be": (PEOPLE + ANIMALS + MADE, None, None),
}
INTRANSITIVE, TRANSITIVE = ["act", "live"], ["treat", "hunt", "keep", "handle", "make", "eat"]
VERBS = table("""
    act: laugh smile arrive weep sleep giggle frown kneel depart cough hesitate complain blush apologise
        disappear vanish
    live: sleep yawn arrive shiver sneeze tremble vanish fall limp disappear snore
    treat: praise thank greet admire hug criticise trust hire invite rescue embrace blame insult respect
        reward despise punish envy mock distrust interview commend comfort ridicule accuse
    hunt: chase avoid scare pursue nudge frighten startle lick
    keep: stroke tame chase find rescue trap avoid pursue discover
    handle: buy find want carry need like examine grab purchase hold borrow discover dislike inspect misplace
        desire choose
    make: repair build own polish fix destroy damage possess wreck
    eat: devour peel slice crave
    give: give sell send show bring lend hand offer
    be: be""")
IRREGULAR = table("""
    sleep: slept slept  weep: wept wept  kneel: knelt knelt  fall: fell fallen  choose: chose chosen
    buy: bought bought  find: found found  hold: held held  build: built built  give: gave given
    sell: sold sold  send: sent sent  show: showed shown  bring: brought brought  lend: lent lent
    have: had had  do: did done  be: was been""")
DOUBLED = ["hug", "grab", "trap"]  # hugged, hugging
STATIVE = "be want need like dislike desire own possess crave trust distrust respect despise envy admire"
STATIVE = STATIVE.split()  # not in the progressive: nobody is owning a car

TRAITS = table("""
    living: big small old young happy sad tired rich poor brave kind angry clever large little calm cruel
        famous hungry polite healthy timid rude glad wealthy sick foolish busy lazy strong weak honest weary
        unhappy
    other: big small new red old clean dirty heavy green large cheap expensive light blue little wet dry used
        yellow white black costly filthy spotless""")
COLOURS = {"red", "green", "blue", "yellow", "white", "black"}
MANNERS = "quickly quietly happily slowly carefully loudly gladly silently eagerly calmly rapidly".split()
PLACES = table("""
    in: garden kitchen forest park office library museum village
    at: station market school airport harbour
    on: hill beach bridge roof island""")
PLACES = [f"{preposition} the {noun}" for preposition in PLACES for noun in PLACES[preposition]]
NEAR = ["near", "beside", "behind", "with"]
TENSES = {  # tense of the first verb, auxiliaries before the verb, times that go with it
    "present": ("present", [], ["every day", "every morning", "on mondays"]),
    "past": ("past", [], ["yesterday", "last week", "last night", "last month"]),
    "progressive": ("present", ["be"], ["right now", "this morning"]),
    "perfect": ("present", ["have"], ["many times", "since monday"]),
    "future": ("present", ["will"], ["tomorrow", "next week", "next month", "next year"]),
    "ongoing": ("past", ["be"], ["yesterday", "last week", "last night"]),
}


def both_ways(pairs):
    words = pairs.split()
    return dict(zip(words[::2], words[1::2])) | dict(zip(words[1::2], words[::2]))


SYNONYM = both_ways("""
    child kid  doctor physician  lawyer attorney  teacher instructor  rabbit bunny  car automobile  taxi cab
    bicycle bike  vanish disappear  hug embrace  praise commend  mock ridicule  chase pursue  scare frighten
    buy purchase  find discover  want desire  examine inspect  repair fix  own possess  destroy wreck
    big large  small little  happy glad  sad unhappy  rich wealthy  tired weary  expensive costly
    clean spotless  dirty filthy  quickly rapidly  quietly silently  happily gladly""")
ANTONYM = both_ways("""
    praise criticise  trust distrust  admire despise  reward punish  thank insult  find misplace  like dislike
    build destroy  arrive depart  laugh weep  big small  old young  happy sad  rich poor  brave timid
    kind cruel  clever foolish  polite rude  healthy sick  calm angry  busy lazy  strong weak  clean dirty
    cheap expensive  heavy light  wet dry  new used""")
ANTONYM |= {word: ANTONYM[same] for word, same in SYNONYM.items() if same in ANTONYM and word not in ANTONYM}
CONVERSE = {"sell": "buy", "lend": "borrow", "give": "receive"}  # a sells to b: b buys from a

PARTS = {  # of a film, by plural
    False: "film movie plot story script acting music ending dialogue cast".split(),
    True: "joke actor song scene character".split(),
}
POLAR = {  # by praise
    True: table("""
        adjective: funny moving brilliant charming clever fresh warm gripping witty tender lively honest vivid
            graceful superb delightful elegant inspired touching thoughtful radiant dazzling
        verb: charm amuse move delight surprise touch thrill enchant impress
        noun: charm wit warmth grace heart energy depth"""),
    False: table("""
        adjective: dull boring silly clumsy stale tedious shallow cold lifeless awful bland messy noisy crude
            tired pompous dreary tasteless sloppy hollow vulgar ponderous
        verb: bore annoy irritate disappoint tire confuse insult disgust embarrass
        noun: flaws noise nonsense tricks malice cruelty boredom"""),
}
VERDICTS = {
    True: ["[loved] it", "had a [good] time", "was [very] pleased"],
    False: ["[hated] it", "had a [bad] time", "was [not] pleased"],
}
REMARKS = {
    True: ["that is [right]", "you speak [well]"],
    False: ["that is [wrong]", "you speak [badly]"],
}


class Dice:
    """Chance from a seed, any string. Only random() is used: choice and shuffle differ among Pythons."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def chance(self, p):
        return self.random() < p

    def pick(self, items):
        return items[int(self.random() * len(items))]

    def two(self, items):
        """Two different ones, in either order."""
        first = self.pick(items)
        return first, self.pick([item for item in items if item != first])

    def rare(self, items):
        """An item, the first ones often, the last ones rarely: of 20, the first in 22 %, the last in 3 %."""
        return items[int(self.random() ** 2 * len(items))]


# ------------------------------------------------------------------------------ forms of a word


def with_s(word):
    """The -s of nouns and verbs: dogs, boxes, daisies."""
    if word.endswith(("s", "sh", "ch", "x", "z")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"


def noun_form(noun, plural):
    return (PLURALS.get(noun) or with_s(noun)) if plural else noun


def verb_forms(verb):
    """All forms of a verb: base, participle, ing, and the finite ones by (tense, plural)."""
    stem = verb + verb[-1] if verb in DOUBLED else verb[:-1] if verb.endswith("e") and verb != "be" else verb
    regular = verb[:-1] + "ied" if verb.endswith("y") and verb[-2] not in "aeiou" else stem + "ed"
    past, participle = IRREGULAR.get(verb, (regular, regular))
    third = {"have": "has", "do": "does", "will": "will"}.get(verb) or with_s(verb)
    forms = {"base": verb, "participle": participle, "ing": stem + "ing"}
    forms |= {("present", False): third, ("present", True): verb, ("past", False): past, ("past", True): past}
    if verb == "be":
        forms |= {("present", False): "is", ("present", True): "are", ("past", True): "were"}
    return forms


FORMS = sum(VERBS.values(), ["will", "have", "do", "receive", "manage", "fail", "lack"])
FORMS = {verb: verb_forms(verb) for verb in FORMS + POLAR[True]["verb"] + POLAR[False]["verb"]}
GOVERNS = {"will": "base", "do": "base", "have": "participle", "be": "ing"}  # the form of what follows

# ------------------------------------------------------------------------------ from meaning to sentence


class Thing(NamedTuple):
    """Someone or something. `noun` is a lemma or, with det "", a name, pronoun or reflexive."""

    noun: str
    plural: bool = False
    det: str = "the"
    adjective: str = ""
    after: tuple = ()  # (preposition or "and", Thing), or (its role in a relative clause, Event without it)


class Event(NamedTuple):
    """What happens or, with the verb "be" and a `trait`, what is so. Roles left out are None or ""."""

    verb: str
    agent: Thing = None
    patient: Thing = None
    recipient: Thing = None
    trait: str = ""
    tense: str = "past"
    negated: bool = False
    manner: str = ""
    place: str = ""
    time: str = ""


def living(noun):
    return HYPERNYM.get(noun, noun) not in GOODS


def traits(noun):
    return TRAITS["living" if living(noun) else "other"]


def takes_plural(thing):
    """Whether the verb is plural when this is its subject: the dogs, the dog and the cat, they."""
    return thing.plural or thing.noun == "they" or thing.after[:1] == ("and",)


def noun_phrase(thing, subject=False):
    """the small dog near the cats / the dog that the cats chase / him."""
    words = [thing.det, thing.adjective, noun_form(thing.noun, thing.plural)]
    if thing.noun in PRONOUNS and not subject:
        words = [PRONOUNS[thing.noun]]
    if thing.after:
        link, other = thing.after
        if isinstance(other, Event):
            words += ["that", clause(other, plural=thing.plural if link == "agent" else None)]
        else:
            words += [link, noun_phrase(other)]
    return " ".join(filter(None, words))


def verb_group(verb, tense, plural, passive=False, do=False, form=None):
    """The words of the verb, the finite one first: ["has", "been", "sold"]. `do`: it needs an auxiliary.

    Each auxiliary governs the form of the word behind it; `form` overrides that for the second word.
    """
    finite, auxiliaries, _ = TENSES[tense]
    chain = auxiliaries + ["be"] * passive + [verb]
    if do and len(chain) == 1 and verb != "be":
        chain = ["do", verb]
    forms = [(finite, plural)] + [GOVERNS[auxiliary] for auxiliary in chain[:-1]]
    if passive:
        forms[-1] = "participle"
    if form:
        forms[1] = form
    return [FORMS[word][form] for word, form in zip(chain, forms)]


def clause(e, *, passive=False, ask="", shift=False, front=False, plural=None, form=None):
    """The words of an event without the full stop. Every option is another way to say it:

    passive: the patient is the subject. ask: a question about a role, such as "agent" or "place", or about
    the whole ("yes"). shift: the recipient before the patient (gave mary a rose). front: the time first.
    `plural` overrides the number of the verb, `form` the form of its second word: so errors are made.
    """
    subject, other = (e.patient, e.agent) if passive else (e.agent, e.patient)
    if plural is None:
        plural = takes_plural(subject) and ask != "agent"  # who owns the vans ?
    inverted = ask not in ("", "agent")
    finite, *rest = verb_group(e.verb, e.tense, plural, passive, e.negated or inverted, form)
    preposition = "from" if e.verb in CONVERSE.values() else "to"
    parts = {  # in the order of a statement
        "agent": subject and noun_phrase(subject, subject=True),
        "finite": finite,
        "not": "not" if e.negated else "",
        "rest": " ".join(rest),
        "patient": other and not passive and noun_phrase(other),
        "recipient": e.recipient and f"{preposition} {noun_phrase(e.recipient)}",
        "trait": e.trait,
        "manner": e.manner,
        "by": other and passive and f"by {noun_phrase(other)}",
        "place": e.place,
        "time": e.time,
    }
    if shift:
        parts |= {"patient": noun_phrase(e.recipient), "recipient": parts["patient"]}
    words = []
    if front and e.time:
        words += [parts.pop("time"), ","]
    if ask in ("agent", "patient", "recipient"):
        words.append("who" if living(getattr(e, ask).noun) else "what")
    elif ask in ("place", "time"):
        words.append("where" if ask == "place" else "when")
    if ask:
        parts[ask] = preposition if ask == "recipient" else ""
    if inverted:
        words.append(parts.pop("finite"))
    return " ".join(filter(None, [*words, *parts.values()]))


def written(words):
    """The words as they are written: an before a vowel."""
    return re.sub(r"\ba (?=[aeio]|un|honest)", "an ", words)


def sentence(e, **how):
    """The event as a sentence or, with `ask`, as a question. The options are those of `clause`."""
    return written(clause(e, **how) + (" ?" if how.get("ask") else " ."))


# ------------------------------------------------------------------------------ drawing meanings


def thing(dice, classes, plural=None, nested=False):
    """A noun of these classes: a name or pronoun only if `plural` is open, a modifier only if not nested."""
    if classes == PEOPLE and plural is None and dice.chance(0.25):
        names = list(PRONOUNS) if dice.chance(0.3) else NAMES[dice.pick(list(NAMES))]
        return Thing(dice.rare(names), det="")
    plural = dice.chance(0.4) if plural is None else plural
    noun, det = dice.rare(NOUNS[dice.pick(classes)]), dice.rare(DETERMINERS[plural])
    adjective = dice.rare(traits(noun)) if dice.chance(0.25) else ""
    after = modifier(dice, noun) if not nested and dice.chance(0.2) else ()
    return Thing(noun, plural, det, adjective, after)


def modifier(dice, noun, plural=False):
    """What may stand behind the noun: near the cats / that the cats chase / that chased a cat / and the cat.

    `plural` is the number of the noun in it that stands where the noun's verb looks for a subject.
    """
    kind = HYPERNYM[noun]
    frame = "treat" if kind in PEOPLE else "hunt" if kind in ANIMALS else "handle"
    link = dice.rare(["near", "patient", "agent", "and"])
    if link in ("near", "and"):
        other = thing(dice, FRAMES[frame][1], plural, nested=True)
        return dice.rare(NEAR) if link == "near" else "and", other
    if frame == "handle":
        link = "patient"  # goods do nothing
    e = event(dice, frame, plural=plural, nested=True)
    return link, e._replace(negated=False, **{link: None})


def event(dice, frame="", tense="", plural=None, nested=False):
    """Something that happens. `plural` is the number of the agent; nested: no place, time or modifiers."""
    frame, tense = frame or dice.pick(list(FRAMES)), tense or dice.rare(list(TENSES))
    progressive = "be" in TENSES[tense][1]
    if frame == "be" and progressive:
        progressive, tense = False, TENSES[tense][0]  # the dog is happy, not: is being happy
    verb = dice.rare([verb for verb in VERBS[frame] if not (progressive and verb in STATIVE)])
    agents, patients, recipients = FRAMES[frame]
    agent = thing(dice, agents, plural, nested)
    patient = thing(dice, patients, nested=nested or agent.after) if patients else None
    recipient = thing(dice, recipients, nested=True) if recipients else None
    nouns = [role.noun for role in (agent, patient, recipient) if role]
    if len(set(nouns)) < len(nouns):
        return event(dice, frame, tense, plural, nested)
    trait = dice.rare(traits(agent.noun)) if frame == "be" else ""
    manner = dice.rare(MANNERS) if frame != "be" and dice.chance(0.15) else ""
    place = dice.rare(PLACES) if not nested and dice.chance(0.4) else ""
    time = dice.pick(TENSES[tense][2]) if not nested and dice.chance(0.3) else ""
    return Event(verb, agent, patient, recipient, trait, tense, dice.chance(0.15), manner, place, time)


# ------------------------------------------------------------------------------ meanings from meanings
# From here on events are simple and definite, so that two sentences speak of the same things: if the dog slept,
# then the animal slept, and if the dog did not, "the dog slept" is false. Words are other words unless a table
# above says that they are synonyms, antonyms, or one the hypernym of the other.


def on_things(e, change):
    roles = {role: getattr(e, role) for role in ROLES}
    return e._replace(**{role: change(thing) for role, thing in roles.items() if thing})


def nouns_of(e):
    return [getattr(e, role).noun for role in ROLES if getattr(e, role)]


def scene(dice, frame="", detail=0.2):
    """An event with "the" at every noun, without pronouns and modifiers, and no noun said of two of its things.

    It happens, happened or will happen. Manner, place and time are there with the chance `detail` each.
    """
    tense = dice.rare(["present", "past", "future"])
    e = on_things(event(dice, frame, tense, nested=True), lambda t: t._replace(det=t.det and "the"))
    nouns = nouns_of(e)
    if set(nouns) & set(PRONOUNS) or any(akin(a, b) for a, b in itertools.combinations(nouns, 2)):
        return scene(dice, frame, detail)
    return e._replace(**{name: value if dice.chance(detail) else "" for name, value in details(dice, e).items()})


def details(dice, e):
    """A manner, a place and a time that go with the event."""
    manner = "" if e.verb in STATIVE else dice.rare(MANNERS)
    return {"manner": manner, "place": dice.rare(PLACES), "time": dice.pick(TENSES[e.tense][2])}


def above(noun):
    """The nouns that may be said of what this one is said of: dog, animal / kid, child, person."""
    return {noun, SYNONYM.get(noun)} | (above(HYPERNYM[noun]) if noun in HYPERNYM else set())


ABOVE = {noun: above(noun) for noun in [*HYPERNYM, *NOUNS]}


def akin(a, b):
    """Whether one noun may be said of what the other is said of: dog and animal, not dog and cat."""
    return a in ABOVE[b] or b in ABOVE[a]


def synonyms(dice, e):
    """The same event in other words."""

    def other(word):
        return SYNONYM[word] if word in SYNONYM and dice.chance(0.7) else word

    e = e._replace(verb=other(e.verb), trait=other(e.trait), manner=other(e.manner))
    return on_things(e, lambda t: t._replace(noun=other(t.noun), adjective=other(t.adjective)))


def converse(e):
    """The same event from the other side: a sells to b, b buys from a."""
    return e._replace(verb=CONVERSE[e.verb], agent=e.recipient, recipient=e.agent)


def rearranged(dice, e):
    """A sentence of the event in some order: the passive, the converse verb, the recipient or the time first."""
    how = {"front": dice.chance(0.5)}
    if e.recipient and e.verb in CONVERSE and dice.chance(0.4):
        e = converse(e)
    elif e.recipient and dice.chance(0.4):
        how["shift"] = True
    elif e.patient and dice.chance(0.3):
        how["passive"] = True
    return sentence(e, **how)


def paraphrase(dice, e):
    """A sentence that means the same: synonyms, in another order."""
    return rearranged(dice, synonyms(dice, e))


def question(dice, e, role):
    """A question about a role of the event or about the whole ("yes"), in other words."""
    e, how = synonyms(dice, e), {}
    if role == "yes" and e.patient and not e.recipient and dice.chance(0.5):
        how["passive"] = True
    elif role not in ("agent", "recipient") and e.recipient and e.verb in CONVERSE and dice.chance(0.4):
        e = converse(e)
    return sentence(e, ask=role, **how)


def general(dice, e):
    """The event with less said of it: details and adjectives go, nouns become hypernyms."""

    def change(t):
        t = t._replace(adjective=dice.pick([t.adjective, ""]))
        wider = t.noun in HYPERNYM and dice.chance(0.4)
        return t._replace(noun=HYPERNYM[t.noun], det="the") if wider else t

    return on_things(e._replace(**{name: "" for name in DETAILS if dice.chance(0.5)}), change)


def specific(dice, e):
    """The event with more said of it: details and adjectives come, nouns become hyponyms."""

    def change(t):
        if t.det and not t.adjective and dice.chance(0.3):
            t = t._replace(adjective=dice.rare(traits(t.noun)))
        narrower = t.noun in NOUNS and dice.chance(0.6)
        return t._replace(noun=dice.rare(NOUNS[t.noun])) if narrower else t

    more = {name: value for name, value in details(dice, e).items() if not getattr(e, name) and dice.chance(0.3)}
    return on_things(e._replace(**more), change)


def stronger(dice, e):
    """An event that `e` follows from. With a negation it is the one that says less."""
    return (general if e.negated else specific)(dice, e)


def weaker(dice, e):
    """An event that follows from `e`, and may say as much."""
    return (specific if e.negated else general)(dice, e)


def negate(e):
    return e._replace(negated=not e.negated)


def opposite(e):
    """The event with the antonym of its verb or trait; None if there is none."""
    word = ANTONYM.get(e.trait or e.verb)
    return word and (e._replace(trait=word) if e.trait else e._replace(verb=word))


def frame_of(e):
    """The frame of an event: a few verbs have two, which differ in their patients."""

    def fits(noun, classes):
        return noun in classes or (noun in HYPERNYM and fits(HYPERNYM[noun], classes))

    frames = [frame for frame in FRAMES if e.verb in VERBS[frame]]
    return next(f for f in frames if all(fits(getattr(e, r).noun, c) for r, c in zip(ROLES, FRAMES[f]) if c))


def other_word(dice, word, words):
    """One of the words that is not `word` and no synonym or antonym of it."""
    near = {word, SYNONYM.get(word), ANTONYM.get(word)}
    near |= {SYNONYM.get(w) for w in near} | (COLOURS if word in COLOURS else set())
    return dice.rare([w for w in words if w not in near])


def other_noun(dice, e, role, classes):
    """The event with another noun in a role, one of these classes and not akin to any noun of the event."""
    nouns = [NOUNS.get(kind) or NAMED[kind] for kind in classes]
    noun = dice.rare(dice.pick(nouns))
    if any(akin(noun, taken) for taken in nouns_of(e)):
        return other_noun(dice, e, role, classes)
    det = "" if HYPERNYM[noun] in NAMED else "the"
    return e._replace(**{role: getattr(e, role)._replace(noun=noun, det=det)})


def different(dice, e, keep=()):
    """The event with one thing changed that is not in `keep`: neither of the two follows from the other, and
    neither rules the other out."""
    frame, roles = frame_of(e), [role for role in ROLES if getattr(e, role)]
    swapped = "recipient" if e.recipient else "patient" if frame in ("treat", "hunt") else ""
    ways = [*roles, *roles, "verb", *DETAILS, "trait", swapped and "swap", swapped and "swap", "tense"]
    way = dice.pick([way for way in ways if way and way not in keep])
    if way in roles:
        t = getattr(e, way)
        if t.adjective and dice.chance(0.5):
            return e._replace(**{way: t._replace(adjective=other_word(dice, t.adjective, traits(t.noun)))})
        return other_noun(dice, e, way, FRAMES[frame][ROLES.index(way)])
    if way == "swap" and not {"agent", swapped} & set(keep):
        return e._replace(**{"agent": getattr(e, swapped), swapped: e.agent})
    if way == "verb" and not e.trait:
        return e._replace(verb=other_word(dice, e.verb, VERBS[frame]))
    if way == "tense" and e.tense in ("past", "future") and "time" not in keep:
        tense = "future" if e.tense == "past" else "past"
        return e._replace(tense=tense, time=e.time and dice.pick(TENSES[tense][2]))
    if way in (*DETAILS, "trait") and getattr(e, way):
        known = {"manner": MANNERS, "place": PLACES, "time": TENSES[e.tense][2], "trait": traits(e.agent.noun)}
        return e._replace(**{way: other_word(dice, getattr(e, way), known[way])})
    return different(dice, e, keep)


def premise(dice, e, relation):
    """An event that entails `e`, contradicts it, or (neutral) does neither."""
    other = opposite(e)
    if relation == "neutral":
        less = weaker(dice, e)
        if less != e and dice.chance(0.35):
            return less
        # Negated, it must not be made more general: the change could be lost, or `e` follow after all.
        e = different(dice, e) if e.negated else specific(dice, different(dice, e))
        return negate(e) if dice.chance(0.3) else e
    if relation == "contradiction":
        return specific(dice, other) if other and not e.negated and dice.chance(0.5) else stronger(dice, negate(e))
    # What is sad is not happy.
    return specific(dice, negate(other)) if other and e.negated and dice.chance(0.5) else stronger(dice, e)
