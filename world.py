"""The generated world: a small grammar over meanings, text to pretrain on, and tasks with GLUE's names.

A meaning is an `Event` (verb, agent, patient, recipient, tense, negation, place, time), whose agent, patient
and recipient are `Thing`s (noun, number, determiner, adjective, what stands behind the noun). `sentence` says
it in many ways, and small functions make other meanings of it:

    e = Event("sell", Thing("farmer", plural=True), Thing("rose", det="a", adjective="red"),
              recipient=Thing("mary", det=""), place="at the market")
    sentence(e)                     the farmers sold a red rose to mary at the market .
    sentence(e, passive=True)       a red rose was sold to mary by the farmers at the market .
    sentence(e, ask="patient")      what did the farmers sell to mary at the market ?
    sentence(converse(e))           mary bought a red rose from the farmers at the market .
    sentence(weaken(dice, e))       perhaps: the farmers sold a flower at the market .
    sentence(contradict(dice, e))   the farmers did not sell a red rose to mary at the market .

Because the meaning is known, so is what follows from it, what it rules out and what it answers. Two things
are made of that. Each depends on its arguments alone and is the same on every machine:

    text("mlm", n, seed)        to pretrain on: single sentences, and pairs such as
                                ("the nurse hugged a small boy .", "so a child was embraced by the nurse .")
    examples("cola", "train")   a task: [(texts, label), ...]

cola: is the sentence acceptable? Those that are not break exactly one rule of this grammar (VIOLATIONS), and
no word gives them away: "the dog near the cats run" and "the dogs near the cat runs" are wrong, with the
verbs exchanged both are right.

sst2: does the review praise? Its polar word says little, since it may be turned round once ("hardly dull") or
twice ("never fails to bore us"), and only the main clause counts ("although ... , ...", "... , but ...").

A task is a function from dice to (texts, label) and a row in TASKS.
"""

import random
import re
import zlib
from typing import NamedTuple

SPLITS = {"train": 4000, "dev": 1000, "test": 1000}

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
PRONOUNS = {"he": "him", "she": "her", "they": "them"}  # as subject: as object
DETERMINERS = {  # by plural
    False: "the a this my our another".split(),
    True: "the two some these my three many those several four".split(),
}
STRICT = {  # go with one number alone. Every, each, few are only here: they turn entailment round.
    False: "this a that every each another".split(),
    True: "these two those three many several few".split(),
}
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty""".split()

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
    "progressive": ("present", ["be"], ["right now", "at the moment"]),
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
    True: ["loved it", "had a good time", "wants to see it again", "was very pleased"],
    False: ["hated it", "had a bad time", "does not want to see it again", "was not pleased"],
}
REMARKS = {
    True: ["that is right", "you speak well", "yes , one says so"],
    False: ["that is wrong", "you speak badly", "no , nobody says so"],
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


def clause(e, passive=False, ask="", shift=False, front=False, plural=None, form=None):
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


def on_things(e, change):
    roles = {role: getattr(e, role) for role in ("agent", "patient", "recipient")}
    return e._replace(**{role: change(thing) for role, thing in roles.items() if thing})


def synonyms(dice, e):
    """The same event in other words."""

    def other(word):
        return SYNONYM[word] if word in SYNONYM and dice.chance(0.7) else word

    e = e._replace(verb=other(e.verb), trait=other(e.trait), manner=other(e.manner))
    return on_things(e, lambda t: t._replace(noun=other(t.noun), adjective=other(t.adjective)))


def converse(e):
    """The same event from the other side: a sells to b, b buys from a."""
    return e._replace(verb=CONVERSE[e.verb], agent=e.recipient, recipient=e.agent)


def paraphrase(dice, e):
    """A sentence that means the same: synonyms, the passive, the converse verb, another order."""
    e, how = synonyms(dice, e), {"front": dice.chance(0.5)}
    if e.recipient and e.verb in CONVERSE and dice.chance(0.4):
        e = converse(e)
    elif e.recipient and dice.chance(0.4):
        how["shift"] = True
    elif e.patient and dice.chance(0.5):
        how["passive"] = True
    return sentence(e, **how)


def weaken(dice, e):
    """An event that follows from `e` (which is not negated): details are dropped, nouns become hypernyms."""

    def weaker(t):
        t = t._replace(adjective=dice.pick([t.adjective, ""]), after=dice.pick([t.after, ()]))
        if t.noun not in HYPERNYM or dice.chance(0.5):
            return t
        det = "a" if not t.plural else t.det if t.det in NUMBERS + ["many", "several"] else "some"
        return t._replace(noun=HYPERNYM[t.noun], det=det)

    kept = {name: getattr(e, name) for name in ("recipient", "manner", "place", "time")}
    return on_things(e._replace(**{name: dice.pick([kept[name], None]) for name in kept}), weaker)


def definite(e):
    """The event with "the" at every noun: two sentences about it then speak of the same things."""
    return on_things(e, lambda t: t._replace(det=t.det and "the"))


def contradict(dice, e):
    """An event that cannot be so if `e` is: negated, or with the antonym of its verb or trait."""
    opposite = ANTONYM.get(e.trait or e.verb)
    if e.negated or not opposite or dice.chance(0.4):
        return e._replace(negated=not e.negated)
    return e._replace(trait=opposite) if e.trait else e._replace(verb=opposite)


# ------------------------------------------------------------------------------ cola: right and wrong
# Each function gives a sentence and one that breaks its rule and differs in nothing else. What the error adds
# or takes away, another draw of the same function takes away or adds, so that no word is a sign of errors.


def agreement(dice):
    """The verb has the number of its subject, whatever stands between: the dogs near the cat runs."""
    plural = dice.chance(0.5)
    tense = dice.pick(["present", "perfect", "progressive", "ongoing"])
    e = event(dice, tense=tense, plural=plural, nested=True)
    if dice.chance(0.8):
        e = e._replace(agent=e.agent._replace(after=modifier(dice, e.agent.noun, not plural)))
    how = {"ask": "yes"} if dice.chance(0.15) else {}
    return sentence(e, **how), sentence(e, plural=not takes_plural(e.agent), **how)


def reflexives(dice):
    """A reflexive has the number and sex of the subject: the king near the women praised themselves."""

    def people(kind):
        plural = kind == "themselves"
        noun = dice.rare(SEXES[dice.pick(list(SEXES)) if plural else kind])
        return Thing(noun, plural, dice.rare(DETERMINERS[plural]))

    right, wrong = dice.two(["himself", "herself", "themselves"])
    agent = people(right)
    if dice.chance(0.7):
        agent = agent._replace(after=(dice.rare(NEAR), people(wrong)))
    e = event(dice, "treat")._replace(agent=agent)
    return tuple(sentence(e._replace(patient=Thing(kind, det=""))) for kind in (right, wrong))


def arguments(dice):
    """A verb has the objects it needs and no others: the nurse praised / the nurse smiled the dog."""
    one, two = event(dice, dice.pick(INTRANSITIVE)), event(dice, dice.pick(TRANSITIVE))
    three, person = event(dice, "give"), event(dice, "treat")
    doubled = person._replace(patient=three.patient, recipient=person.patient)  # praised the boy the apple
    return dice.pick([
        (sentence(one), sentence(one._replace(patient=two.patient))),
        (sentence(two), sentence(two._replace(patient=None))),
        (sentence(three), sentence(three._replace(patient=None))),
        (sentence(person), sentence(doubled, shift=True)),
    ])  # fmt: skip


def auxiliaries(dice):
    """The verb has the form that its auxiliary governs: the cat has sleeping / did not slept."""
    e = event(dice, dice.pick(INTRANSITIVE + TRANSITIVE), "progressive")._replace(time="")
    right, wrong = dice.two(["base", "participle", "ing"])
    tense = {"base": "future", "participle": "perfect", "ing": "progressive"}[right]
    e = e._replace(tense=tense, negated=dice.chance(0.3))
    if right == "base" and e.negated:
        e = e._replace(tense="past")  # did not sleep
    return sentence(e), sentence(e, form=wrong)


def determiners(dice):
    """A determiner has the number of its noun: these small dog."""
    frame, role, plural = dice.pick(TRANSITIVE), dice.pick(["agent", "patient"]), dice.chance(0.5)
    e = event(dice, frame, "past")  # the past does not show the number
    noun = thing(dice, FRAMES[frame][role == "patient"], plural, nested=True)
    noun = noun._replace(det=dice.rare(STRICT[plural]))
    return tuple(sentence(e._replace(**{role: noun._replace(plural=n)})) for n in (plural, not plural))


def times(dice):
    """The time goes with the tense: tomorrow the dog slept."""
    right, wrong = dice.two(dice.pick([["past", "future"], ["past", "progressive"]]))
    e, front = event(dice, dice.pick(INTRANSITIVE + TRANSITIVE), right), dice.chance(0.5)
    said = [dice.pick(TENSES[tense][2]) for tense in (right, wrong)]
    return tuple(sentence(e._replace(time=time), front=front) for time in said)


BEFORE_A_WORD = {*sum([*DETERMINERS.values(), *TRAITS.values()], NEAR), "an", "in", "at", "on", "to"}


def orders(dice):
    """Words have their places: dog the slept / a rose red / the in garden."""
    e = event(dice, dice.pick(INTRANSITIVE + TRANSITIVE + ["give"]), plural=dice.chance(0.4))
    words = sentence(e).split()
    i = dice.pick([i for i, word in enumerate(words) if word in BEFORE_A_WORD])
    return " ".join(words), " ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]])


VIOLATIONS = [agreement, reflexives, arguments, auxiliaries, determiners, times, orders]


def cola(dice):
    """An acceptable sentence (1, two of three) or one that breaks a rule (0)."""
    right, wrong = dice.pick(VIOLATIONS)(dice)
    return ((right,), 1) if dice.chance(0.67) else ((wrong,), 0)


# ------------------------------------------------------------------------------ sst2: reviews

STRAIGHT = [  # the polar word (adjective, verb or noun) keeps its polarity; in the last three turned twice
    "{part} {be} {very} {adjective}", "{part} {verbs} us", "{part} {be} full of {noun}",
    "everybody found {part} {adjective}", "{part} {be} more {adjective} than i hoped",
    "critics called {part} {adjective} , and they were right", "{part} {manages} to {verb} us",
    "{part} never {fails} to {verb} us", "{part} {be} not without {noun}", "{part} {does} not lack {noun}",
]  # fmt: skip
TURNED = [  # the polar word is turned round
    "{part} {be} {hardly} {adjective}", "{part} {fails} to {verb} us", "{part} {lacks} {noun}",
    "nobody found {part} {adjective}", "{part} {be} less {adjective} than i hoped",
    "critics called {part} {adjective} , and they were wrong", "{part} {does} not {verb} us",
    "{part} never {verbs} us", "{part} {be} without {noun}", "{part} {be} free of {noun}",
]  # fmt: skip
VERY = ["very", "truly", "quite", "always", "so"]
HARDLY = ["not", "not at all", "hardly", "never", "far from", "anything but", "by no means"]
LEADS = ["", "", "", "in the end , ", "for me , ", "to be honest , ", "all in all , "]
REVIEWS = [
    "{main}", "{main} , and {same}", "{other} , but {main}", "although {other} , {main}",
    "{main} , although {other}", "despite its {noun} , {main}",
]  # fmt: skip


def opinion(dice, praise):
    """A clause that praises or blames part of a film."""
    plural, tense, turned = dice.chance(0.25), dice.pick(["present", "past"]), dice.chance(0.25)
    polar = {kind: dice.rare(words) for kind, words in POLAR[praise != turned].items()}
    slots = {"be": "be", "does": "do", "fails": "fail", "lacks": "lack", "manages": "manage"}
    slots["verbs"] = polar["verb"]
    finite = {slot: verb_group(verb, tense, plural)[0] for slot, verb in slots.items()}
    part = Thing(dice.rare(PARTS[plural]), plural, dice.pick(["the", "these" if plural else "this"]))
    return dice.rare(TURNED if turned else STRAIGHT).format(
        part=noun_phrase(part), very=dice.pick(VERY), hardly=dice.pick(HARDLY), **polar, **finite
    )


def review(dice, praise):
    """A review. The main clause decides: the one after but, and not the one with although or despite."""
    said = dice.rare(REVIEWS).format(
        main=opinion(dice, praise), same=opinion(dice, praise), other=opinion(dice, not praise),
        noun=dice.rare(POLAR[not praise]["noun"]),
    )  # fmt: skip
    return f"{dice.pick(LEADS)}{said} ."


def sst2(dice):
    """A review that praises (1) or blames (0)."""
    praise = dice.chance(0.5)
    return (review(dice, praise),), int(praise)


# ------------------------------------------------------------------------------ tasks

TASKS = {"cola": cola, "sst2": sst2}


def split_of(text):
    """The only split this sentence may be in, by its CRC: eight of ten "train", like all pretraining text."""
    return {0: "dev", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")


def examples(task, split, seed=0):
    """[(texts, label), ...], SPLITS[split] of them, all different and none in another split of any seed."""
    for what, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"unknown generated {what} '{value}': known are {', '.join(known)}")
    dice, rows = Dice(f"{task} {split} {seed}"), {}
    while len(rows) < SPLITS[split]:
        texts, label = TASKS[task](dice)
        if split_of(texts[0]) == split:
            rows[texts] = label
    return list(rows.items())


# ------------------------------------------------------------------------------ text to pretrain on


def single(dice):
    """One sentence: a statement, two of them, the right side of a violation, a question or a review."""
    kind = dice.rare(["rule", "statement", "review", "two", "question"])
    if kind == "two":
        link = dice.pick(["and", "but", "because", "while", "when", ", so"])
        return written(f"{clause(event(dice, nested=True))} {link} {clause(event(dice, nested=True))} .")
    if kind == "rule":
        return dice.pick(VIOLATIONS)(dice)[0]
    if kind == "review":
        return review(dice, dice.chance(0.5))
    return sentence(event(dice), ask="yes" if kind == "question" else "")


# Pairs: two sentences and how the second is said. Or one, and what is said of it.


def same(dice):
    e = event(dice)
    return sentence(e), paraphrase(dice, e), dice.pick(["{}", "in other words , {}"])


def follows(dice):
    e = event(dice)._replace(negated=False)
    return sentence(e), paraphrase(dice, weaken(dice, e)), dice.pick(["{}", "so {}"])


def answered(dice):
    e = definite(event(dice))
    roles = [role for role in ("agent", "patient", "recipient", "place", "time") if getattr(e, role)]
    ask = dice.pick(["yes", *roles])
    if ask == "yes":
        asked = dice.pick([e, contradict(dice, e)])._replace(negated=False)
        return sentence(e), sentence(asked, ask="yes"), "{} yes ." if asked == e else "{} no ."
    e, answer = e._replace(negated=False), getattr(e, ask)
    answer = written(noun_phrase(answer)) if isinstance(answer, Thing) else answer
    return sentence(e), sentence(e, ask=ask), f"{{}} {answer} ."


def ruled_out(dice):
    e = definite(event(dice))
    return sentence(e), paraphrase(dice, contradict(dice, e)), "it is false that {}"


def possible(dice):
    e = event(dice)._replace(negated=False)
    return sentence(weaken(dice, e)), paraphrase(dice, e), "perhaps {}"


def judged(dice):
    praise = dice.chance(0.5)
    who = dice.pick(["she", "he", "mary", "john"])
    return review(dice, praise), "", f"in short , {who} {dice.pick(VERDICTS[praise])} ."


def taught(dice):
    """A teacher's remark. Only here a wrong sentence is text to pretrain on, and it is called wrong."""
    right = dice.chance(0.5)
    return dice.pick(VIOLATIONS)(dice)[0 if right else 1], "", f"{dice.pick(REMARKS[right])} ."


def counted(dice):
    who, noun = Thing(dice.rare(NAMES["himself"]), det=""), dice.rare(NOUNS[dice.pick(GOODS)])
    n, change = 2 + int(9 * dice.random()), 1 + int(9 * dice.random())
    buys = dice.chance(0.5) or change >= n
    left = n + change if buys else n - change
    had, has = (clause(Event("have", who, Thing(noun, k != 1, NUMBERS[k]))) for k in (n, left))
    changed = f"bought {NUMBERS[change]} more" if buys else f"sold {NUMBERS[change]} of them"
    return f"{had} and {changed} .", f"{has} .", "in the end {}"


PAIRS = [same, follows, taught, answered, judged, ruled_out, possible, counted]  # the first most often


def text(kind, n, seed=0):
    """Yield n tuples of one or two strings to pretrain an encoder ("mlm") or decoder ("clm"). Half are pairs.

    None of the sentences is in the dev or test split of a task, whatever the seeds. (A second sentence behind
    a connective, "so ...", counts without it.)
    """
    if kind not in ("mlm", "clm"):
        raise ValueError(f"unknown kind of text '{kind}': known are mlm, clm")
    dice = Dice(f"{kind} {seed}")
    while n > 0:
        first, second, said = dice.rare(PAIRS)(dice) if dice.chance(0.55) else (single(dice), "", "")
        if first != second and all(split_of(sentence) == "train" for sentence in (first, second) if sentence):
            yield (first, said.format(second)) if said else (first,)
            n -= 1
