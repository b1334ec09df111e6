"""The generated suite: the same everywhere, disjoint splits, labels that follow from meaning alone."""

import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from meanings import NOUNS, ROLES, entails, noun_phrases, read, relation, same_word, says

import data
from generated import suite, world
from generated.world import Dice, sentence
from harness import metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import cues  # noqa: E402

TEXTS = [texts for texts, _ in suite.text("mlm", 4000, seed=5)]
examples = functools.cache(suite.examples)


def draws(function, n, seed="test"):
    dice = Dice(seed)
    return [function(dice) for _ in range(n)]


def digest(rows):
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------ the same everywhere

PINNED = {  # sha256 of the first 100 rows
    "cola train": "ef559221ffb4862a",
    "cola dev": "5b581dd6cb8f99ea",
    "cola test": "2f561d297fbe2b60",
    "sst2 train": "6637beaebf96592b",
    "sst2 dev": "d33ffa882506a5f4",
    "sst2 test": "49f795ca3f1441b7",
    "mrpc train": "32a7fc985a9f4e29",
    "mrpc dev": "0357c449d6165c0d",
    "mrpc test": "5eef97d1f7d2f272",
    "qqp train": "c04cdea9259be687",
    "qqp dev": "f56a55ea359ada2e",
    "qqp test": "2421f10f254bd0c0",
    "stsb train": "f6ffabf19652c077",
    "stsb dev": "f992e5950147d1c7",
    "stsb test": "11ef96e4f375e7b2",
    "mnli train": "81940f17b093d75e",
    "mnli dev": "8a9d7f6217565fc9",
    "mnli test": "951f3a0bd619e9cb",
    "qnli train": "d2b9ecfacd276db2",
    "qnli dev": "ec250614032bf302",
    "qnli test": "8c143c2e964d2d2a",
    "rte train": "9b7bd22de561944e",
    "rte dev": "b7a421749d96e7f7",
    "rte test": "5bd408039066eedf",
    "squad train": "c97affa4edf73ca3",
    "squad dev": "1bad93fdd52ef36a",
    "squad test": "e1d085385b75dcc6",
    "math train": "33979314e30aae1a",
    "math dev": "e69c0c8331bf42ff",
    "math test": "d8b252d159ef556c",
    "lesson": "4f0460a09fe2060b",
    "mlm": "52c60d61456fe180",
    "clm": "55afae44dd9e101c",
}


def produced(name):
    if " " not in name:  # text
        return digest(suite.text(name, 100))
    return digest(suite.examples(*name.split())[:100])


@pytest.mark.parametrize("name", PINNED)
def test_the_first_hundred_are_pinned(name):
    assert produced(name) == PINNED[name]


def test_nothing_depends_on_the_hash_seed_or_the_global_random_state():
    code = """import random; from generated import suite; random.seed({}); print(hash("a"), list(suite.text("mlm", 50)))
print(suite.examples("cola", "dev")[:50])"""
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code.format(seed)]
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": ROOT}
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        outputs.append(run.stdout.split(" ", 1))
    assert outputs[0][0] != outputs[1][0]  # the hash seeds did differ
    assert outputs[0][1] == outputs[1][1]


def test_another_seed_kind_or_split_gives_other_rows():
    assert len({digest(suite.text(kind, 100, seed)) for kind in ("lesson", "mlm", "clm") for seed in (0, 1)}) == 6
    assert examples("sst2", "dev", 1)[:10] != examples("sst2", "dev")[:10]


# ------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("task", suite.TASKS)
def test_no_example_is_twice_in_a_split_or_in_two_splits_of_any_seed(task):
    splits = [("train", 0), ("dev", 0), ("test", 0), ("dev", 1)]
    rows = {(split, seed): {texts for texts, _ in examples(task, split, seed)} for split, seed in splits}
    for (split, seed), texts in rows.items():
        assert len(texts) == len(examples(task, split, seed)) == suite.SPLITS[split]
    for (a, first), (b, second) in itertools.combinations(rows.items(), 2):
        if a[0] != b[0]:
            assert not first & second
    assert rows["dev", 0] != rows["dev", 1]


def test_no_dev_or_test_sentence_is_in_the_text_to_pretrain_on():
    rows = sum((examples(task, split) for task in suite.TASKS for split in ("dev", "test")), [])
    held = {texts[0] for texts, _ in rows}
    leads = [f"{word} , " for said in (suite.SO, suite.AGAIN) for words in said.values() for word in words]
    seen = {said for texts in TEXTS for said in texts}
    seen |= {said.removeprefix(lead) for said in seen for lead in leads}
    seen |= {said[: end.end()] for said in seen for end in re.finditer(r" [.?]", said)}  # and without an answer
    assert len(seen) > 8000 and len(held) > 19_000
    assert not held & seen


@pytest.mark.parametrize("task, share", [
    ("cola", 0.67), ("sst2", 0.5), ("mrpc", 0.5), ("qqp", 0.5), ("qnli", 0.5), ("rte", 0.5),
])  # fmt: skip
def test_labels_are_balanced_as_documented_and_never_contradict_each_other(task, share):
    rows = draws(suite.TASKS[task], 5000)
    assert abs(np.mean([label for _, label in rows]) - share) < 0.03  # four standard deviations
    labels = {}
    for texts, label in rows:
        assert labels.setdefault(texts, label) == label, texts


def test_unknown_names_are_refused_in_one_line():
    for call in (lambda: suite.examples("wnli", "dev"), lambda: suite.examples("cola", "validation"),
                 lambda: next(suite.text("lm", 1))):  # fmt: skip
        with pytest.raises(ValueError, match="^unknown .* known are .*$"):
            call()


# ------------------------------------------------------------------------------ cola


@pytest.mark.parametrize("violation", suite.VIOLATIONS)
def test_each_violation_differs_from_its_source_in_what_it_documents(violation):
    for right, wrong in draws(violation, 400, violation.__name__):
        assert right != wrong
        a, b = right.split(), wrong.split()
        if violation is suite.arguments:  # one noun phrase more or less, the rest in its order
            short, long = sorted((a, b), key=len)
            remaining = iter(long)
            assert len(short) < len(long) and all(word in remaining for word in short)
            continue
        if violation is suite.orders:  # two neighbours exchanged
            (i, j) = [k for k in range(len(a)) if a[k] != b[k]]
            assert j == i + 1 and (a[i], a[j]) == (b[j], b[i])
            continue
        if violation is suite.times:  # the time, and nothing else
            times = "|".join(time for *_, times in world.TENSES.values() for time in times)
            rest, other = (re.sub(times, "T", side) for side in (right, wrong))
            assert rest == other and "T" in rest
            continue
        changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y]  # one word, in its place
        changed = [pair for pair in changed if set(pair) != {"a", "an"}]
        assert len(changed) == 1, (right, wrong)
        (x, y) = changed[0]
        if violation is suite.reflexives:
            assert {x, y} < {"himself", "herself", "themselves"}
        if violation is suite.determiners:
            assert world.noun_form(x, True) == y or world.noun_form(y, True) == x
        if violation is suite.agreement:
            numbers = [{f["present", False], f["present", True]} for f in world.FORMS.values()]
            assert {x, y} in [*numbers, {"was", "were"}]
        if violation is suite.auxiliaries:
            governed = [{f["base"], f["participle"], f["ing"]} for f in world.FORMS.values()]
            assert any({x, y} < forms for forms in governed)


def test_right_and_wrong_sentences_never_meet():
    pairs = [pair for violation in suite.VIOLATIONS for pair in draws(violation, 3000, violation.__name__)]
    right, wrong = (set(side) for side in zip(*pairs))
    right |= {sentence(e) for e in draws(world.event, 5000)}
    assert len(right) > 15_000 and not right & wrong


def test_labels_and_remarks_call_the_wrong_sentence_wrong(monkeypatch):
    monkeypatch.setattr(suite, "VIOLATIONS", [lambda dice: ("good .", "bad .")])
    assert set(draws(suite.cola, 50)) == {(("good .",), 1), (("bad .",), 0)}
    remarks = {(text, remark.removesuffix(" .")) for text, _, remark in draws(suite.taught, 200)}
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
    for lead in suite.LEADS:
        review = review.removeprefix(lead)
    review = review.replace(" , and they were", " and they were")
    if " , but " in review:
        return polarity(review.split(" , but ")[1])
    if review.startswith(("although ", "despite ")):
        return polarity(review.split(" , ", 1)[1])
    return polarity(review.split(" , ")[0])


def test_sentiment_labels_equal_an_independent_reading_of_the_string():
    rows = draws(suite.sst2, 5000)
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


# ------------------------------------------------------------------------------ tasks on two texts and more
# Labels are compared with meanings.py, which reads the strings and shares nothing with how they were made.

N = 2000  # draws of each task


def sentences(text):
    return re.findall(r"[^.]+ \.", text)


def test_mnli_labels_are_the_relation_that_is_read():
    rows = draws(suite.mnli, N)
    assert [suite.RELATIONS[label] for _, label in rows] == [relation(read(p), read(h)) for (p, h), _ in rows]
    assert [suite.RELATIONS[i] for i in range(3)] == list(data.TASKS["mnli"].labels)


def test_rte_labels_say_whether_one_of_the_sentences_entails_the_other_text():
    for (premises, h), label in draws(suite.rte, N):
        assert len(sentences(premises)) == 2
        assert any(entails(read(p), read(h)) for p in sentences(premises)) == (label == 0), (premises, h)


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_mrpc_and_qqp_labels_say_whether_both_texts_are_read_alike(task):
    for (a, b), label in draws(suite.TASKS[task], N):
        assert a != b and (read(a) == read(b)) == label, (a, b)


def test_qnli_labels_say_whether_one_of_the_sentences_answers():
    for (ask, said), label in draws(suite.qnli, N):
        assert len(sentences(said)) == 2
        assert any(says(read(s), read(ask)) for s in sentences(said)) == (label == 0), (ask, said)


def kinds(noun):
    return {world.HYPERNYM[noun], world.HYPERNYM.get(world.SYNONYM.get(noun), world.HYPERNYM[noun])}


def agreement_of(first, second):
    """In how many of five things two sentences agree."""
    a, b = read(first), read(second)
    agree = sum(a[name] == b[name] for name in ("verb", "place", "time"))
    for role in ("agent", "patient"):
        x, y = a[role][0], b[role][0]
        agree += 1 if x == y else 0.5 if kinds(x) & kinds(y) else 0
    return agree


def test_stsb_scores_count_what_agrees():
    seen = set()
    for texts, score in draws(suite.stsb, N):
        assert agreement_of(*texts) == score, texts
        seen.add(score)
    assert seen == {half / 2 for half in range(11)}


def test_squad_answers_are_those_that_are_read_and_one_third_has_none():
    rows = draws(suite.squad, N)
    for (ask, context), spans in rows:
        asked = read(ask)
        role = asked["asks"]
        found = [read(said)[role] for said in sentences(context) if says(read(said), asked)]
        answers = [noun_phrases(answer)[1][0] if role in ROLES else answer for answer, _ in spans]
        assert found == answers, (ask, context)
        assert all(context[start:].startswith(answer) and context.count(answer) == 1 for answer, start in spans)
    assert abs(np.mean([not spans for _, spans in rows]) - 1 / 3) < 0.06


CASES = [  # (what the question says, the answer from the numbers in it)
    (r"had (\d+) \w+ and (?:bought|found|borrowed) (\d+) more \. how", lambda a, b: a + b),
    (r"had (\d+) \w+ and (?:gave|sold|lost) (\d+) of them(?: to \w+)? \. how", lambda a, b: a - b),
    (r"has (\d+) \w+ and \w+ has (\d+) \. how many \w+ do they have in all", lambda a, b: a + b),
    (r"has (\d+) \w+ and \w+ has (\d+) \. how many more", lambda a, b: a - b),
    (r"there are (\d+) \w+ with (\d+) \w+ in each", lambda a, b: a * b),
    (r"had (\d+) \w+ and (?:gave|sold|lost) (\d+) .* then .* (\d+) more", lambda a, b, c: a - b + c),
]


def test_math_solutions_are_right_step_by_step():
    kinds = set()
    for (question,), solution in draws(suite.math, N):
        (case,) = [i for i, (pattern, _) in enumerate(CASES) if re.search(pattern, question)]
        numbers = map(int, re.search(CASES[case][0], question).groups())
        steps, answer = solution.split(" #### ")
        results = []
        for step in steps.split(" , "):
            a, sign, b, equals, result = step.split()
            assert equals == "=" and int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert not results or results[-1] == a
            results.append(result)
        assert answer == results[-1] and int(answer) == CASES[case][1](*numbers), (question, solution)
        assert metrics.final_number(solution) == answer
        kinds.add(case)
    assert len(kinds) == 6


def test_the_second_text_is_drawn_before_the_label():
    """Seven of ten labels or more would be told by it otherwise: it is at chance, up to sampling."""
    for name, chance in (("mrpc", 0.5), ("qqp", 0.5), ("mnli", 1 / 3), ("qnli", 0.5), ("rte", 0.5)):
        reached = cues.reach(data.TASKS[name], (1,)) / 100
        print(f"{name}: second text alone {reached:.3f}")
        assert reached < chance + 0.06  # four standard deviations of 1000 rows


# ------------------------------------------------------------------------------ no word gives the label away


def test_a_bag_of_words_is_near_chance_on_cola():
    matthews = cues.reach(data.TASKS["cola"], (0,)) / 100
    print(f"cola, bag of words: Matthews {matthews:.3f}")
    assert matthews < 0.15


def test_a_bag_of_words_sees_some_sentiment_and_misses_most():
    accuracy = cues.reach(data.TASKS["sst2"], (0,)) / 100
    print(f"sst2, bag of words: accuracy {accuracy:.3f}")
    assert 0.55 < accuracy < 0.75


# ------------------------------------------------------------------------------ text to pretrain on


def test_text_is_mostly_pairs_of_short_lower_case_sentences():
    assert abs(np.mean([len(texts) == 2 for texts in TEXTS]) - 0.76) < 0.03
    said = [said for texts in TEXTS for said in texts]
    assert all(re.fullmatch(r"[a-z]+( ([a-z]+|[.,?:]))* [.?]", line) for line in said)
    assert np.mean([5 <= len(line.split()) - 1 <= 20 for line in said]) > 0.8
    assert len(set(TEXTS)) > 0.97 * len(TEXTS)


def test_what_is_said_of_two_sentences_is_what_is_read_in_them():
    words = {f"[{word}] , {{}}": name for name, words in suite.SO.items() for word in words}
    for first, second, how in draws(suite.follows, 1000):
        relations = {relation(read(said), read(second)) for said in sentences(first)}
        assert words[how] in relations and relations <= {words[how], "neutral"}
    for first, second, how in draws(suite.same, 1000):
        assert (read(first) == read(second)) == (how in [f"[{word}] , {{}}" for word in suite.AGAIN[True]])
    for first, second, how in draws(suite.compared, 500):
        score = agreement_of(first, second)
        assert how == f"{{}} they are [{suite.ALIKE[min(int(score), 4)]}] alike ."


def normal(word):
    """What `read` makes of a word."""
    return same_word(NOUNS[word][0]) if word in NOUNS else same_word(word)


@pytest.mark.parametrize("kind", [suite.corrected, suite.lesson])
def test_what_is_called_wrong_is_what_differs(kind):
    found = set()
    for first, second, how in draws(kind, 600):
        one, two, word = read(first), read(second), re.fullmatch(r"{} what is wrong \? \[(.*)\] \.", how)[1]
        differ = {name for name in two if one[name] != two[name]}
        if word in ("nothing", "not", "when"):
            assert differ == {"nothing": set(), "not": {"negated"}, "when": {"tense"}}[word]
        else:
            values = [two[name] for name in differ]
            assert normal(word) in [part for value in values for part in (value if isinstance(value, tuple) else [value])]
        found.add(word)
    assert {"nothing", "not", "when"} < found and len(found) > 100


def test_what_is_salient_stands_where_it_is_said_to():
    found = {}
    for texts, salient in suite.text("mlm", 2000):
        if len(texts) == 1:
            assert salient is None
            continue
        words, start = salient
        assert texts[1][start:].startswith(words) and f" {words} " in f" {texts[1]} " and "[" not in texts[1]
        found[words] = found.get(words, 0) + 1
    singles = {word for table in (suite.SO, suite.AGAIN) for words in table.values() for word in words}
    assert singles | {"yes", "no", "nobody knows", "right", "wrong", "very", "hated"} < set(found)


def test_questions_are_answered_by_the_sentences_beside_them():
    answers = set()
    for first, second, how in draws(suite.answered, 1000):
        ask, said = sorted((first, second), key=lambda text: not text.endswith("?"))
        asked, answer = read(ask), how.removeprefix("{} [").removesuffix("] .")
        if asked["asks"] == "yes":
            found = suite.ANSWER[relation(read(said), asked | {"asks": ""})]
        else:
            there = [line for line in sentences(said) if says(read(line), asked)]
            found = answer if there and answer in there[0] and len(there) == 1 else "nobody knows"
        assert answer == found, (ask, said)
        answers.add(answer)
    assert answers > {"yes", "no", "nobody knows"} and len(answers) > 100


def test_counted_text_solves_its_problem():
    for told, ask, how in draws(suite.counted, 200):
        *_, last = re.findall(r"= (\d+)", how)
        (case,) = [i for i, (pattern, _) in enumerate(CASES) if re.search(pattern, f"{told} {ask}")]
        assert int(last) == CASES[case][1](*map(int, re.search(CASES[case][0], f"{told} {ask}").groups()))


def test_verdicts_are_those_of_the_review():
    for said, _, verdict_said in draws(suite.judged, 300):
        assert any(verdict_said.endswith(f" {words} .") for words in world.VERDICTS[verdict(said)])


def test_wrong_sentences_are_pretraining_text_only_where_they_are_called_wrong(monkeypatch):
    def violation(dice):
        return tuple(f"{kind} {dice.random()} ." for kind in ("fine", "faulty"))

    monkeypatch.setattr(suite, "VIOLATIONS", [violation])
    remarks = {f"{remark} .".replace("[", "").replace("]", "") for remark in world.REMARKS[False]}
    texts = [texts for texts, _ in suite.text("mlm", 2000)]
    faulty = [pair for pair in texts if any("faulty" in said for said in pair)]
    assert len(faulty) > 50 and all(pair[1] in remarks for pair in faulty)
    assert not any(pair[1:] and pair[1] in remarks for pair in texts if pair not in faulty)
