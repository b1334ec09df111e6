"""The grammar of the generated world and the meanings made of meanings."""

import re

import pytest
from meanings import antonym, entails, read, relation, same_word, says

from generated import world
from generated.world import Dice, Event, Thing, sentence

FARMERS = Event(
    "sell", Thing("farmer", plural=True), Thing("rose", adjective="red"),
    recipient=Thing("mary", det=""), place="at the market",
)  # fmt: skip
SINGULAR, PLURAL = {"is", "was", "has", "does"}, {"are", "were", "have", "do"}


def draws(function, n, seed="test"):
    dice = Dice(seed)
    return [function(dice) for _ in range(n)]


# ------------------------------------------------------------------------------ the grammar


def test_the_docstring_shows_what_the_functions_say():
    assert sentence(FARMERS) == "the farmers sold the red rose to mary at the market ."
    assert sentence(FARMERS, passive=True) == "the red rose was sold to mary by the farmers at the market ."
    assert sentence(FARMERS, ask="patient") == "what did the farmers sell to mary at the market ?"
    assert sentence(world.converse(FARMERS)) == "mary bought the red rose from the farmers at the market ."
    less = {sentence(world.general(Dice(str(i)), FARMERS)) for i in range(300)}
    assert "the farmers sold the flower to mary at the market ." in less and len(less) > 10
    assert sentence(world.negate(FARMERS)) == "the farmers did not sell the red rose to mary at the market ."
    other = {sentence(world.different(Dice(str(i)), FARMERS)) for i in range(300)}
    assert "mary sold the red rose to the farmers at the market ." in other and len(other) > 50
    for line in re.findall(r"sentence\(.*?\)  +(.*)", world.__doc__):
        known = {sentence(FARMERS), sentence(FARMERS, passive=True), sentence(FARMERS, ask="patient")}
        assert line in known | less | other | {sentence(world.converse(FARMERS)), sentence(world.negate(FARMERS))}


@pytest.mark.parametrize("how, said", [
    ({"ask": "agent"}, "who sold the red rose to mary at the market ?"),
    ({"ask": "recipient"}, "who did the farmers sell the red rose to at the market ?"),
    ({"ask": "place"}, "where did the farmers sell the red rose to mary ?"),
    ({"ask": "yes"}, "did the farmers sell the red rose to mary at the market ?"),
    ({"shift": True}, "the farmers sold mary the red rose at the market ."),
    ({"plural": False}, "the farmers sold the red rose to mary at the market ."),  # the past shows no number
])  # fmt: skip
def test_the_same_event_is_said_in_every_way(how, said):
    assert sentence(FARMERS, **how) == said


def test_a_question_about_the_subject_is_singular():
    e = FARMERS._replace(tense="present")
    assert sentence(e) == "the farmers sell the red rose to mary at the market ."
    assert sentence(e, ask="agent") == "who sells the red rose to mary at the market ?"


@pytest.mark.parametrize("tense, negated, active, passive", [
    ("present", False, "chases", "is chased"), ("present", True, "does not chase", "is not chased"),
    ("past", True, "did not chase", "was not chased"), ("future", False, "will chase", "will be chased"),
    ("perfect", True, "has not chased", "has not been chased"),
    ("progressive", False, "is chasing", "is being chased"),
    ("ongoing", False, "was chasing", "was being chased"),
])  # fmt: skip
def test_auxiliaries_are_those_of_english(tense, negated, active, passive):
    e = Event("chase", Thing("dog"), Thing("cat"), tense=tense, negated=negated)
    assert sentence(e) == f"the dog {active} the cat ."
    assert sentence(e, passive=True) == f"the cat {passive} by the dog ."


def test_forms_of_words_follow_the_spelling_rules():
    shown = [("present", False), ("past", False), "participle", "ing"]
    for line in (
        "envies envied envied envying", "destroys destroyed destroyed destroying", "is was been being",
        "punishes punished punished punishing", "hugs hugged hugged hugging", "weeps wept wept weeping",
        "chooses chose chosen choosing", "has had had having",
    ):  # fmt: skip
        assert line in [" ".join(forms[form] for form in shown) for forms in world.FORMS.values()]
    for nouns in ("lily lilies", "boy boys", "fox foxes", "wolf wolves", "piano pianos", "potato potatoes"):
        singular, plural = nouns.split()
        assert world.noun_form(singular, True) == plural and world.noun_form(singular, False) == singular
    assert world.written("a old dog and a unhappy man want a used car") == ("an old dog and an unhappy man want a used car")


def test_the_tables_know_every_word_they_name():
    nouns = {noun for members in world.NOUNS.values() for noun in members}
    words = nouns | set(world.FORMS) | set(sum(world.TRAITS.values(), world.MANNERS))
    assert set(world.PLURALS) | {noun for sex in world.SEXES.values() for noun in sex} <= nouns | {"person"}
    assert set(world.SYNONYM) | set(world.ANTONYM) <= words and set(world.STATIVE) <= set(world.FORMS)
    assert set(world.VERBS) == set(world.FRAMES)
    none = {verb for frame in world.INTRANSITIVE for verb in world.VERBS[frame]}
    one = {verb for frame in world.TRANSITIVE for verb in world.VERBS[frame]}
    two = set(world.VERBS["give"])
    assert not none & one | none & two | one & two  # each verb takes one number of arguments
    print(f"{len(nouns)} nouns, {len(world.FORMS)} verbs, {len(words)} words")
    assert len(words) > 300


def test_verbs_agree_with_their_subject_in_every_acceptable_event():
    checked = 0
    for e in draws(world.event, 3000):
        plural = e.agent.plural or e.agent.noun == "they" or e.agent.after[:1] == ("and",)
        verb = sentence(e).removeprefix(world.written(world.noun_phrase(e.agent, subject=True))).split()[0]
        if verb in SINGULAR | PLURAL:
            assert (verb in PLURAL) == plural, sentence(e)
            checked += 1
        elif e.tense == "present":
            assert verb == (e.verb if plural else world.with_s(e.verb)), sentence(e)
            checked += 1
    assert checked > 1500


# ------------------------------------------------------------------------------ meanings from meanings


def canonical(e):
    """What meanings.read should find in a sentence of a scene."""
    things = {role: getattr(e, role) for role in world.ROLES}
    things = {role: t and (same_word(t.noun), t.plural, same_word(t.adjective)) or "" for role, t in things.items()}
    words = {name: same_word(getattr(e, name)) for name in ("verb", "trait", "manner")}
    return {**things, **words, "tense": e.tense, "negated": e.negated, "place": e.place, "time": e.time, "asks": ""}


def test_a_paraphrase_is_read_as_what_was_meant():
    """The reader knows the words alone: so passive, converse, order and synonyms keep who did what to whom."""
    shapes = set()
    for dice in map(Dice, range(3000)):
        e = world.scene(dice, detail=0.5)
        said = world.paraphrase(dice, e)
        assert read(said) == canonical(e), said
        shapes |= {shape for shape in (" by ", " from ", " , ", " not ") if shape in said}
    assert len(shapes) == 4


def test_a_question_is_read_as_what_was_asked():
    asked = set()
    for dice in map(Dice, range(3000)):
        e = world.scene(dice)._replace(negated=False)
        role = dice.pick(["yes", *(role for role in (*world.ROLES, "place", "time") if getattr(e, role))])
        said = world.question(dice, e, role)
        expected = canonical(e) | {"asks": role}
        assert read(said) == (expected if role == "yes" else expected | {role: "?"}), said
        asked.add(role)
    assert len(asked) == 6


def test_the_reader_itself_reads_plain_sentences():
    e = read("mary bought the red rose from the farmers at the market yesterday .")
    assert (e["agent"], e["patient"], e["recipient"]) == (("farmer", True, ""), ("rose", False, "red"), ("mary", False, ""))
    assert (e["verb"], e["place"], e["time"], e["tense"]) == ("sell", "at the market", "yesterday", "past")
    for p, h, found in [
        ("the dog chased the small cat .", "the animal pursued the cat .", "entailment"),
        ("the animal chased the cat .", "the dog chased the cat .", "neutral"),
        ("the dog chased the cat .", "the cat chased the dog .", "neutral"),
        ("the dog did not sleep .", "the dog did not sleep in the garden .", "entailment"),
        ("the dog did not sleep in the garden .", "the dog did not sleep .", "neutral"),
        ("the animal did not sleep .", "the dog slept .", "contradiction"),
        ("the dog was sad .", "the dog was not happy .", "entailment"),
        ("the dog was not sad .", "the dog was happy .", "neutral"),
        ("the boys were poor .", "the boys were wealthy .", "contradiction"),
    ]:
        assert relation(read(p), read(h)) == found, (p, h)
    assert says(read("the dog slept yesterday ."), read("when did the dog sleep ?"))
    assert not says(read("the dog slept ."), read("when did the dog sleep ?"))


@pytest.mark.parametrize("wanted", ["entailment", "contradiction", "neutral"])
def test_premises_have_the_relation_that_was_asked_for(wanted):
    for dice in map(Dice, range(2000)):
        e = world.scene(dice)
        other = world.premise(dice, e, wanted)
        assert relation(canonical(other), canonical(e)) == wanted, (other, e)


def test_general_follows_from_the_event_and_the_event_from_the_specific():
    changed = 0
    for dice in map(Dice, range(1000)):
        e = world.scene(dice)
        assert entails(canonical(e), canonical(world.weaker(dice, e)))
        assert entails(canonical(world.stronger(dice, e)), canonical(e))
        e = e._replace(negated=False)
        less, more = world.general(dice, e), world.specific(dice, e)
        assert says(canonical(e), canonical(less)) and says(canonical(more), canonical(e))
        changed += (less != e) + (more != e)
    assert changed > 1200


def test_different_changes_one_thing_and_nothing_it_must_keep():
    kept = [("agent",), ("patient", "manner"), ("time",), ("place",)]
    for dice in map(Dice, range(2000)):
        e, keep = world.scene(dice), dice.pick(kept)
        other = world.different(dice, e, keep)
        a, b = canonical(e), canonical(other)
        changed = [name for name in a if a[name] != b[name]]
        assert changed and not set(changed) & set(keep), (changed, keep)
        pairs = ("agent", "patient"), ("agent", "recipient"), ("tense", "time"), ("time", "tense")
        assert len(changed) == 1 or tuple(changed) in pairs
        assert relation(a, b) == relation(b, a) == "neutral"


def test_opposites_exclude_each_other():
    found = 0
    for dice in map(Dice, range(1000)):
        e = world.scene(dice)
        if other := world.opposite(e):
            assert canonical(other) in antonym(canonical(e)) and other != e
            found += 1
    assert found > 100
