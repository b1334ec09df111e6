"""The generated world: the same everywhere, disjoint splits, labels that no single word gives away."""

import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import world
from world import Dice, Event, Thing, sentence

FARMERS = Event(
    "sell", Thing("farmer", plural=True), Thing("rose", det="a", adjective="red"),
    recipient=Thing("mary", det=""), place="at the market",
)  # fmt: skip
SINGULAR, PLURAL = {"is", "was", "has", "does"}, {"are", "were", "have", "do"}
TEXTS = list(world.text("mlm", 4000, seed=5))
examples = functools.cache(world.examples)


def draws(function, n, seed="test"):
    dice = Dice(seed)
    return [function(dice) for _ in range(n)]


def digest(rows):
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------ the same everywhere

PINNED = {  # sha256 of the first 100 rows
    "cola train": "7aa62d1297b7d0cf",
    "cola dev": "09f6dee7650c104e",
    "cola test": "8cba497deae8b0de",
    "sst2 train": "6637beaebf96592b",
    "sst2 dev": "d33ffa882506a5f4",
    "sst2 test": "49f795ca3f1441b7",
    "mlm": "4bfac5a78c2d32ea",
    "clm": "ca3987a3d762654e",
}


def produced(name):
    if name in ("mlm", "clm"):
        return digest(world.text(name, 100))
    return digest(examples(*name.split())[:100])


@pytest.mark.parametrize("name", PINNED)
def test_the_first_hundred_are_pinned(name):
    assert produced(name) == PINNED[name]


def test_nothing_depends_on_the_hash_seed_or_the_global_random_state():
    code = """import random, world; random.seed({}); print(hash("a"), list(world.text("mlm", 50)))
print(world.examples("cola", "dev")[:50])"""
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code.format(seed)]
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(world.__file__)}
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        outputs.append(run.stdout.split(" ", 1))
    assert outputs[0][0] != outputs[1][0]  # the hash seeds did differ
    assert outputs[0][1] == outputs[1][1]


def test_another_seed_kind_or_split_gives_other_rows():
    assert len({digest(world.text(kind, 100, seed)) for kind in ("mlm", "clm") for seed in (0, 1)}) == 4
    assert examples("sst2", "dev", 1)[:10] != examples("sst2", "dev")[:10]


# ------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("task", world.TASKS)
def test_no_example_is_twice_in_a_split_or_in_two_splits_of_any_seed(task):
    splits = [("train", 0), ("dev", 0), ("test", 0), ("dev", 1)]
    rows = {(split, seed): {texts for texts, _ in examples(task, split, seed)} for split, seed in splits}
    for (split, seed), texts in rows.items():
        assert len(texts) == len(examples(task, split, seed)) == world.SPLITS[split]
    for (a, first), (b, second) in itertools.combinations(rows.items(), 2):
        if a[0] != b[0]:
            assert not first & second
    assert rows["dev", 0] != rows["dev", 1]


def test_no_dev_or_test_sentence_is_in_the_text_to_pretrain_on():
    rows = sum((examples(task, split) for task in world.TASKS for split in ("dev", "test")), [])
    held = {texts[0] for texts, _ in rows}
    seen = {sentence for texts in TEXTS for sentence in texts}
    leads = ("so ", "in other words , ", "it is false that ", "perhaps ", "in the end ")
    behind = {sentence.removeprefix(lead) for sentence in seen for lead in leads if sentence.startswith(lead)}
    assert len(seen) > 5000 and len(behind) > 500 and len(held) == 4000
    assert not held & (seen | behind)


@pytest.mark.parametrize("task, share", [("cola", 0.67), ("sst2", 0.5)])
def test_labels_are_balanced_as_documented_and_never_contradict_each_other(task, share):
    rows = draws(world.TASKS[task], 20_000)
    assert abs(np.mean([label for _, label in rows]) - share) < 0.015  # four standard deviations
    labels = {}
    for texts, label in rows:
        assert labels.setdefault(texts, label) == label, texts


def test_unknown_names_are_refused_in_one_line():
    for call in (lambda: world.examples("mnli", "dev"), lambda: world.examples("cola", "validation"),
                 lambda: next(world.text("lm", 1))):  # fmt: skip
        with pytest.raises(ValueError, match="^unknown .* known are .*$"):
            call()


# ------------------------------------------------------------------------------ the grammar


def test_the_docstring_shows_what_the_functions_say():
    assert sentence(FARMERS) == "the farmers sold a red rose to mary at the market ."
    assert sentence(FARMERS, passive=True) == "a red rose was sold to mary by the farmers at the market ."
    assert sentence(FARMERS, ask="patient") == "what did the farmers sell to mary at the market ?"
    assert sentence(world.converse(FARMERS)) == "mary bought a red rose from the farmers at the market ."
    weak = {sentence(world.weaken(Dice(str(i)), FARMERS)) for i in range(300)}
    assert "the farmers sold a flower at the market ." in weak and len(weak) > 20
    contrary = {sentence(world.contradict(Dice(str(i)), FARMERS)) for i in range(9)}
    assert contrary == {"the farmers did not sell a red rose to mary at the market ."}
    for line in [sentence(FARMERS), *contrary, sentence(FARMERS, passive=True)]:
        assert line in world.__doc__


@pytest.mark.parametrize("how, said", [
    ({"ask": "agent"}, "who sold a red rose to mary at the market ?"),
    ({"ask": "recipient"}, "who did the farmers sell a red rose to at the market ?"),
    ({"ask": "place"}, "where did the farmers sell a red rose to mary ?"),
    ({"ask": "yes"}, "did the farmers sell a red rose to mary at the market ?"),
    ({"shift": True}, "the farmers sold mary a red rose at the market ."),
    ({"plural": False}, "the farmers sold a red rose to mary at the market ."),  # the past shows no number
])  # fmt: skip
def test_the_same_event_is_said_in_every_way(how, said):
    assert sentence(FARMERS, **how) == said


def test_a_question_about_the_subject_is_singular():
    e = FARMERS._replace(tense="present")
    assert sentence(e) == "the farmers sell a red rose to mary at the market ."
    assert sentence(e, ask="agent") == "who sells a red rose to mary at the market ?"


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
    assert world.written("a old dog and a unhappy man want a used car") == (
        "an old dog and an unhappy man want a used car"
    )


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
    everything = {word for texts in TEXTS for sentence in texts for word in sentence.split()}
    print(f"{len(nouns)} nouns, {len(world.FORMS)} verbs, {len(everything)} forms in 4000 texts")
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


def test_paraphrases_keep_who_did_what():
    e = Event("hug", Thing("king"), Thing("child"), time="yesterday")
    said = {world.paraphrase(Dice(str(i)), e) for i in range(100)}
    body = {line.replace("yesterday , ", "").replace(" yesterday", "") for line in said}
    one, other = ("hugged", "embraced"), ("child", "kid")
    assert body == {f"the king {v} the {c} ." for v in one for c in other} | {
        f"the {c} was {v} by the king ." for v in one for c in other}  # fmt: skip


def test_what_follows_only_drops_or_widens():
    for e in draws(world.event, 300):
        weak = world.weaken(Dice(sentence(e)), e._replace(negated=False))
        assert (weak.verb, weak.tense, weak.trait) == (e.verb, e.tense, e.trait)
        for name in ("manner", "place", "time"):
            assert getattr(weak, name) in (getattr(e, name), None)
        for old, new in ((e.agent, weak.agent), (e.patient, weak.patient)):
            if old:
                assert new.noun in (old.noun, world.HYPERNYM.get(old.noun)) and new.plural == old.plural
                assert new.adjective in ("", old.adjective) and new.after in ((), old.after)


def test_a_contradiction_flips_the_negation_or_one_word_but_not_both():
    for e in draws(world.event, 300):
        other = world.contradict(Dice(sentence(e)), e)
        if other.negated != e.negated:
            assert other._replace(negated=e.negated) == e
        else:
            old, new = (e.trait, other.trait) if e.trait else (e.verb, other.verb)
            assert not e.negated and new == world.ANTONYM[old]
            assert other._replace(verb=e.verb, trait=e.trait) == e


LEMMA = {form: verb for verb, forms in world.FORMS.items() for form in forms.values()}


def test_questions_are_answered_by_the_sentence_before():
    kinds = set()
    for first, question, said in draws(world.answered, 500):
        answer = said.removeprefix("{} ")
        kinds.add(question.split()[0])
        if answer not in ("yes .", "no ."):
            assert answer.removesuffix(" .") in first or answer in ("him .", "her .", "them .")
        elif answer == "yes .":
            assert " not " not in first
        elif " not " not in first:  # then the question has the antonym of a word in it
            lemmas = [{LEMMA.get(word, word) for word in text.split()} for text in (first, question)]
            assert any(world.ANTONYM.get(word) in lemmas[1] for word in lemmas[0]), (first, question)
    assert kinds > {"who", "what", "where", "when", "did", "is"}


def test_quantities_add_up():
    for first, last, _ in draws(world.counted, 200):
        n, change, left = (world.NUMBERS.index(w) for w in f"{first} {last}".split() if w in world.NUMBERS)
        assert left == (n + change if "bought" in first else n - change)


# ------------------------------------------------------------------------------ cola


@pytest.mark.parametrize("violation", world.VIOLATIONS)
def test_each_violation_differs_from_its_source_in_what_it_documents(violation):
    for right, wrong in draws(violation, 400, violation.__name__):
        assert right != wrong
        a, b = right.split(), wrong.split()
        if violation is world.arguments:  # one noun phrase more or less, the rest in its order
            short, long = sorted((a, b), key=len)
            remaining = iter(long)
            assert len(short) < len(long) and all(word in remaining for word in short)
            continue
        if violation is world.orders:  # two neighbours exchanged
            (i, j) = [k for k in range(len(a)) if a[k] != b[k]]
            assert j == i + 1 and (a[i], a[j]) == (b[j], b[i])
            continue
        if violation is world.times:  # the time, and nothing else
            times = "|".join(time for *_, times in world.TENSES.values() for time in times)
            rest, other = (re.sub(times, "T", side) for side in (right, wrong))
            assert rest == other and "T" in rest
            continue
        changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y]  # one word, in its place
        changed = [pair for pair in changed if set(pair) != {"a", "an"}]
        assert len(changed) == 1, (right, wrong)
        (x, y) = changed[0]
        if violation is world.reflexives:
            assert {x, y} < {"himself", "herself", "themselves"}
        if violation is world.determiners:
            assert world.noun_form(x, True) == y or world.noun_form(y, True) == x
        if violation is world.agreement:
            numbers = [{f["present", False], f["present", True]} for f in world.FORMS.values()]
            assert {x, y} in [*numbers, {"was", "were"}]
        if violation is world.auxiliaries:
            governed = [{f["base"], f["participle"], f["ing"]} for f in world.FORMS.values()]
            assert any({x, y} < forms for forms in governed)


def test_right_and_wrong_sentences_never_meet():
    pairs = [pair for violation in world.VIOLATIONS for pair in draws(violation, 3000, violation.__name__)]
    right, wrong = (set(side) for side in zip(*pairs))
    right |= {sentence(e) for e in draws(world.event, 5000)}
    assert len(right) > 15_000 and not right & wrong


def test_labels_and_remarks_call_the_wrong_sentence_wrong(monkeypatch):
    monkeypatch.setattr(world, "VIOLATIONS", [lambda dice: ("good .", "bad .")])
    assert set(draws(world.cola, 50)) == {(("good .",), 1), (("bad .",), 0)}
    remarks = {(text, remark.removesuffix(" .")) for text, _, remark in draws(world.taught, 200)}
    called = [("good .", remark) for remark in world.REMARKS[True]]
    assert remarks == {*called, *(("bad .", remark) for remark in world.REMARKS[False])}


# ------------------------------------------------------------------------------ sst2

FLIPS = re.compile(
    r"\b(not|hardly|never|far from|anything but|by no means|fails?|failed|lacks?|lacked|nobody|less|wrong"
    r"|without|free)\b"
)


POLAR_FORMS = {
    form: praise
    for praise, words in world.POLAR.items()
    for word in words["adjective"] + words["noun"] + words["verb"]
    for form in ([word] if word not in world.FORMS else world.FORMS[word].values())
}


def polarity(clause):
    """The polar word of a clause, turned round as often as there are words that do so."""
    found = {POLAR_FORMS[word] for word in clause.split() if word in POLAR_FORMS}
    assert len(found) == 1, clause
    return found.pop() != bool(len(FLIPS.findall(clause)) % 2)


def verdict(review):
    """Read from the string alone, knowing nothing of how it was made."""
    review = review.removesuffix(" .")
    for lead in world.LEADS:
        review = review.removeprefix(lead)
    review = review.replace(" , and they were", " and they were")
    if " , but " in review:
        return polarity(review.split(" , but ")[1])
    if review.startswith(("although ", "despite ")):
        return polarity(review.split(" , ", 1)[1])
    return polarity(review.split(" , ")[0])


def test_sentiment_labels_equal_an_independent_reading_of_the_string():
    rows = draws(world.sst2, 5000)
    for shape in (" , but ", "although ", "despite ", "never fail", "far from", "and they were wrong"):
        assert sum(shape in texts[0] for texts, _ in rows) > 20
    for (review,), label in rows:
        assert verdict(review) == label, review


@pytest.mark.parametrize("review, praise", [
    ("the film is not at all dull .", True), ("the plot never failed to charm us .", True),
    ("this story is full of charm , but the acting bored us .", False),
    ("critics called the film dull , and they were wrong .", True),
    ("although the jokes are far from boring , the film lacks wit .", False),
])  # fmt: skip
def test_the_independent_reading_itself_reads_plain_cases(review, praise):
    assert verdict(review) == praise


# ------------------------------------------------------------------------------ no word gives the label away


def bag_of_words(task):
    """Accuracy and Matthews on dev of a logistic regression on word counts, the best of three penalties."""
    train, dev = world.examples(task, "train"), world.examples(task, "dev")
    columns = {word: i for i, word in enumerate(sorted({w for (text,), _ in train for w in text.split()}))}

    def counts(rows):
        x = np.zeros((len(rows), len(columns) + 1))
        x[:, -1] = 1
        for i, ((text,), _) in enumerate(rows):
            for word in text.split():
                x[i, columns.get(word, -1)] += word in columns
        return x, np.array([label for _, label in rows])

    (x, y), (xd, yd) = counts(train), counts(dev)
    results = []
    for penalty in (1e-2, 1e-3, 1e-4):
        w, m, v = np.zeros((3, x.shape[1]))
        for step in range(1, 301):  # Adam
            gradient = x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y) + penalty * w
            m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
            w -= 0.05 * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
        guess = xd @ w > 0
        matthews = np.corrcoef(guess, yd)[0, 1] if 0 < guess.sum() < len(guess) else 0.0
        results.append(((guess == yd).mean(), matthews))
    return max(r[0] for r in results), max(r[1] for r in results)


def test_a_bag_of_words_is_near_chance_on_cola():
    accuracy, matthews = bag_of_words("cola")
    print(f"cola, bag of words: accuracy {accuracy:.3f}, Matthews {matthews:.3f}")
    assert matthews < 0.15


def test_a_bag_of_words_sees_some_sentiment_and_misses_most():
    accuracy, matthews = bag_of_words("sst2")
    print(f"sst2, bag of words: accuracy {accuracy:.3f}, Matthews {matthews:.3f}")
    assert 0.55 < accuracy < 0.75


# ------------------------------------------------------------------------------ text to pretrain on


def test_text_is_half_pairs_and_mostly_short_lower_case_words():
    assert 0.4 < np.mean([len(texts) == 2 for texts in TEXTS]) < 0.6
    sentences = [sentence for texts in TEXTS for sentence in texts]
    assert all(re.fullmatch(r"[a-z]+( ([a-z]+|[.,?]))* [.?]", sentence) for sentence in sentences)
    assert np.mean([5 <= len(sentence.split()) - 1 <= 16 for sentence in sentences]) > 0.85
    assert len(set(TEXTS)) > 0.98 * len(TEXTS)


def test_verdicts_are_those_of_the_review():
    for said, _, verdict_said in draws(world.judged, 300):
        assert any(verdict_said.endswith(f" {words} .") for words in world.VERDICTS[verdict(said)])


def test_wrong_sentences_are_pretraining_text_only_where_they_are_called_wrong():
    wrong = {b for violation in world.VIOLATIONS for _, b in draws(violation, 2000, violation.__name__)}
    remarks = {f"{remark} ." for remark in world.REMARKS[False]}
    met = [texts for texts in world.text("mlm", 8000) if wrong & set(texts)]
    assert any(texts[1:] and texts[1] in remarks for texts in TEXTS)
    assert all(len(texts) == 2 and texts[1] in remarks for texts in met)
