"""The generated suite: ten tasks with GLUE's names, and text to pretrain on, made of the grammar in world.py.

Because the meaning of every sentence is known, so is what follows from it, what it rules out and what it
answers. Everything here depends on its arguments alone and is the same on every machine:

    examples("mnli", "train")   a task: [(texts, label), ...]
    text("mlm", n, seed)        to pretrain an encoder on: sentences, and pairs such as
                                ("the nurse hugged the small boy .", "so the child was embraced by the nurse .")

cola    is the sentence acceptable? Those that are not break exactly one rule of the grammar (VIOLATIONS), and no
        word gives them away: "the dog near the cats run" and "the dogs near the cat runs" are wrong, with the
        verbs exchanged both are right
sst2    does the review praise? Its polar word says little, since it may be turned round once ("hardly dull") or
        twice ("never fails to bore us"), and only the main clause counts ("although ... , ...", "... , but ...")
mrpc    do two sentences mean the same, or does one thing differ?
qqp     do two questions ask the same?
stsb    in how many of five things do two events agree: who, did what, to whom, where, when?
mnli    does the second sentence contradict the first, follow from it, or neither?
qnli    does one of the sentences answer the question?
rte     does the third sentence follow from the first two?
squad   which words of three sentences answer the question, if any do?
math    a word problem of one or two steps; the answer is written out

A task is a function from dice to (texts, label) and its name in TASKS. In a task with two texts the second is
drawn before the label: alone it says nothing.
"""

import operator
import re
import zlib

from generated.world import (
    DETERMINERS, FRAMES, GOODS, HYPERNYM, INTRANSITIVE, NAMES, NEAR, NOUNS, PARTS, PLACES, POLAR,
    REMARKS, ROLES, SEXES, STRICT, SYNONYM, TENSES, TRAITS, TRANSITIVE, VERBS, VERDICTS, Dice, Thing,
    akin, clause, details, different, event, frame_of, general, modifier, negate, noun_form,
    noun_phrase, nouns_of, on_things, opposite, other_noun, other_word, paraphrase, premise, question, rearranged,
    scene, sentence, synonyms, takes_plural, thing, verb_group, written,
)  # fmt: skip

SPLITS = {"train": 4000, "dev": 1000, "test": 1000}

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
    """An acceptable sentence (1, two of three) or one that breaks a rule (0), of ten words at most."""
    right, wrong = dice.pick(VIOLATIONS)(dice)
    if max(len(said.split()) for said in (right, wrong)) > 10:
        return cola(dice)
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


# ------------------------------------------------------------------------------ tasks on two sentences

RELATIONS = ("contradiction", "entailment", "neutral")  # mnli's labels


def mnli(dice):
    """A premise and a hypothesis, and their relation."""
    e, label = scene(dice), dice.pick([0, 1, 2])
    second, firsts = paraphrase(dice, e), [paraphrase(dice, premise(dice, e, relation)) for relation in RELATIONS]
    return mnli(dice) if second in firsts else ((firsts[label], second), label)


def rte(dice):
    """Two sentences and a third that follows from one of them (0) or not (1)."""
    e, label = scene(dice), dice.pick([0, 1])
    relation = "entailment" if label == 0 else dice.pick(["neutral", "contradiction"])
    said = [paraphrase(dice, premise(dice, e, relation)), paraphrase(dice, unlike(dice, [e]))]
    return (" ".join(dice.two(said)), paraphrase(dice, e)), label


def unlike(dice, events):
    """A scene that has no noun and no verb with one of these events in common."""
    e = scene(dice)
    shared = any(akin(a, b) for other in events for a in nouns_of(other) for b in nouns_of(e))
    if shared or any(e.verb in (other.verb, SYNONYM.get(other.verb)) for other in events):
        return unlike(dice, events)
    return e


def mrpc(dice):
    """Two sentences that mean the same (1) or not (0)."""
    e, label = scene(dice)._replace(negated=dice.chance(0.5)), dice.pick([0, 1])
    second, firsts = paraphrase(dice, e), [paraphrase(dice, altered(dice, e)), paraphrase(dice, e)]
    return mrpc(dice) if second in firsts else ((firsts[label], second), label)


def altered(dice, e):
    """Something else: one thing is changed, or all is negated, or a word has become its antonym."""
    if dice.chance(0.7):
        return different(dice, e)
    return dice.pick([opposite(e), negate(e)]) or negate(e)


def roles_of(e):
    """The roles that can be asked about."""
    return [role for role in (*ROLES, "place", "time") if getattr(e, role)]


def qqp(dice):
    """Two questions that ask the same (1) or not (0): about another role, or about something else."""
    e, label = scene(dice)._replace(negated=False), dice.pick([0, 1])
    role, roles = dice.pick(["yes", *roles_of(e)]), ["yes", *roles_of(e)]
    second, same = question(dice, e, role), question(dice, e, role)
    if dice.chance(0.3):
        other = question(dice, e, other_word(dice, role, roles))
    else:
        other = question(dice, different(dice, e, keep=(role,)), role)
    return qqp(dice) if second in (same, other) else ((same if label else other, second), label)


def qnli(dice):
    """A question and two sentences, one of which answers it (0), or none (1)."""
    e, label = scene(dice, detail=0.5)._replace(negated=False), dice.pick([0, 1])
    other = unlike(dice, [e])._replace(negated=False)
    said = " ".join(dice.two([paraphrase(dice, e), paraphrase(dice, other)]))
    asked, role = unanswered(dice, e) if label else answerable(dice, e)
    if other.verb in (asked.verb, SYNONYM.get(asked.verb)):
        return qnli(dice)
    return (question(dice, asked, role), said), label


def answerable(dice, e):
    """(event, role): a question about `e` that says less of it, and keeps what it asks about."""
    role = dice.pick(roles_of(e))
    return general(dice, e)._replace(**{role: getattr(e, role)}), role


def unanswered(dice, e):
    """(event, role): a question that `e` does not answer, about a detail that is not said or another event."""
    unsaid = [name for name in ("place", "time") if not getattr(e, name)]
    if unsaid and dice.chance(0.4):
        role = dice.pick(unsaid)
        return general(dice, e)._replace(**{role: details(dice, e)[role]}), role
    role = dice.pick(roles_of(e))
    return different(dice, e, keep=(role, "manner")), role


def stsb(dice):
    """Two events, and in how many of five things they agree; a noun of the same kind counts as half a one."""
    e = scene(dice, dice.pick(["treat", "hunt", "keep", "handle"]), detail=1.0)._replace(manner="", negated=False)
    other, score, frame = e, 5.0, frame_of(e)
    for role, classes in zip(("agent", "patient"), FRAMES[frame]):
        if dice.chance(0.5):
            kind, half = HYPERNYM[getattr(e, role).noun], dice.chance(0.5)
            other = other_noun(dice, other, role, [c for c in classes if (c == kind) == half] or [kind])
            score -= 0.5 if HYPERNYM[getattr(other, role).noun] == kind else 1
    words = {"verb": VERBS[frame], "place": PLACES, "time": TENSES[e.tense][2]}
    for name in words:
        if dice.chance(0.5):
            other = other._replace(**{name: other_word(dice, getattr(e, name), words[name])})
            score -= 1
    return (paraphrase(dice, other), paraphrase(dice, e)), score


def squad(dice):
    """A question and three sentences; ((answer, start),), or () if they do not answer it (one of three)."""
    return reading(dice, 3)


def reading(dice, n):
    """A question, and n sentences with the words in them that answer it."""
    events = []
    for _ in range(n):
        events.append(synonyms(dice, unlike(dice, events)._replace(negated=False)))
    e, none = dice.pick(events), dice.chance(1 / 3)
    asked, role = unanswered(dice, e) if none else answerable(dice, e)
    context = " ".join(rearranged(dice, event) for event in events)
    answer = getattr(e, role)
    answer = noun_phrase(answer) if isinstance(answer, Thing) else answer
    elsewhere = {asked.verb, SYNONYM.get(asked.verb)} & {other.verb for other in events if other is not e}
    if elsewhere or (not none and context.count(answer) != 1):
        return reading(dice, n)
    return (question(dice, asked, role), context), () if none else ((answer, context.index(answer)),)


# ------------------------------------------------------------------------------ math

LARGEST = 15  # number told in a problem; up to 12, as in the text, the task is learned at once
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def problem(dice, largest):
    """(what is told, what is asked, [(a, sign, b), ...] that lead to the answer), of numbers up to `largest`."""

    def count(n):
        return f"{n} {noun_form(noun, n != 1)}"

    sex = dice.pick(list(NAMES))
    who, she = dice.rare(NAMES[sex]), {"himself": "he", "herself": "she"}[sex]
    name = dice.rare([name for names in NAMES.values() for name in names if name != who])
    noun = dice.rare(NOUNS[dice.pick(GOODS)])
    things, (less, more) = noun_form(noun, True), sorted(dice.two(range(2, largest + 1)))
    a, b = dice.two([less, more])
    gets = dice.pick(["bought", "found", "borrowed"])
    loses = dice.pick([f"gave {less} of them to {name}", f"sold {less} of them", f"lost {less} of them"])
    now, in_all = f"how many {things} does {she} have now ?", f"how many {things} do they have in all ?"
    ahead = f"how many more {things} does {who} have than {name} ?"
    kind = dice.pick(["gets", "loses", "both", "compared", "boxes", "twice"])
    if kind == "gets":
        return f"{who} had {count(a)} and {gets} {b} more .", now, [(a, "+", b)]
    if kind == "loses":
        return f"{who} had {count(more)} and {loses} .", now, [(more, "-", less)]
    if kind == "both":
        return f"{who} has {count(a)} and {name} has {b} .", in_all, [(a, "+", b)]
    if kind == "compared":
        return f"{who} has {count(more)} and {name} has {less} .", ahead, [(more, "-", less)]
    if kind == "boxes":
        a, b, box = 2 + a % 8, 2 + b % 8, noun_form(dice.pick(NOUNS["container"]), True)
        return f"there are {a} {box} with {b} {things} in each .", f"how many {things} are there in all ?", [(a, "*", b)]
    c = dice.pick(range(2, largest + 1))
    told = f"{who} had {count(more)} and {loses} . then {she} {gets} {c} more ."
    return told, now, [(more, "-", less), (more - less, "+", c)]


def solution(steps):
    """(["9 - 5 = 4", ...], 4)"""
    results = [SIGNS[sign](a, b) for a, sign, b in steps]
    return [f"{a} {sign} {b} = {result}" for (a, sign, b), result in zip(steps, results)], results[-1]


def math(dice):
    """A word problem and its solution as GSM8K writes it: the steps, and the number behind ####."""
    told, ask, steps = problem(dice, LARGEST)
    lines, result = solution(steps)
    return (f"{told} {ask}",), f"{' , '.join(lines)} #### {result}"


# ------------------------------------------------------------------------------ tasks

TASKS = {task.__name__: task for task in (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, squad, math)}


def split_of(text):
    """The only split this text may be the first of, by its CRC: eight of ten "train", like all pretraining text."""
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
    """One sentence: the right side of a violation, a statement, a review, two statements or a question."""
    kind = dice.rare(["rule", "statement", "review", "two", "question"])
    if kind == "two":
        link = dice.pick(["and", "but", "because", "while", "when", ", so"])
        return written(f"{clause(event(dice, nested=True))} {link} {clause(event(dice, nested=True))} .")
    if kind == "rule":
        return dice.pick(VIOLATIONS)(dice)[0]
    if kind == "review":
        return review(dice, dice.chance(0.5))
    return sentence(event(dice), ask="yes" if kind == "question" else "")


# Pairs: two sentences and how the second is said. Or one, and what is said of it. What depends on both is in brackets.

SO = {"entailment": ["so", "surely"], "contradiction": ["no", "never"], "neutral": ["perhaps", "maybe"]}
AGAIN = {True: ["again", "likewise"], False: ["besides", "however"]}
ANSWER = {"entailment": "yes", "contradiction": "no", "neutral": "nobody knows"}
ALIKE = ["hardly", "little", "half", "mostly", "fully"]


def follows(dice):
    """One sentence or two, and what follows from them, is false then, or may be."""
    e, relation = scene(dice), dice.pick(RELATIONS)
    said = [paraphrase(dice, premise(dice, e, relation))]
    if dice.chance(0.25):
        said = dice.two([*said, paraphrase(dice, unlike(dice, [e]))])
    return " ".join(said), paraphrase(dice, e), f"[{dice.pick(SO[relation])}] , {{}}"


def same(dice):
    """Two ways to say or to ask something, or something else."""
    (first, second), label = dice.pick([mrpc, qqp])(dice)
    return first, second, f"[{dice.pick(AGAIN[label == 1])}] , {{}}"


def corrected(dice):
    """Two sentences, and which word of the second is wrong if the first is right."""
    return what_is_wrong(dice, scene(dice))


def lesson(dice):
    """The same of the shortest sentences: what an encoder is taught first, to compare word for word."""
    e = scene(dice, dice.pick([frame for frame in FRAMES if frame != "give"]), detail=0)
    return what_is_wrong(dice, on_things(e, lambda t: t._replace(adjective="")))


def what_is_wrong(dice, e):
    """Of these two, the first says something else in three of four."""
    e = synonyms(dice, e._replace(negated=dice.chance(0.3)))
    other, wrong = altered(dice, e), dice.chance(0.75)
    word = odd(e, other) if wrong else "nothing"
    return paraphrase(dice, other if wrong else e), rearranged(dice, e), f"{{}} what is wrong ? [{word}] ."


def odd(e, other):
    """The word of an event that says what another does not: a noun, an adjective, a verb, "not", "when", ..."""
    for role in ROLES:
        a, b = getattr(e, role), getattr(other, role)
        if a and a.noun != b.noun:
            return noun_form(a.noun, a.plural)
        if a and a.adjective != b.adjective:
            return a.adjective
    for name in ("trait", "verb", "manner", "place", "time"):
        if getattr(e, name) != getattr(other, name):
            return getattr(e, name)
    return "when" if e.tense != other.tense else "not"


def answered(dice):
    """A question and what answers it, in either order, and the answer."""
    e = scene(dice, detail=0.5)._replace(negated=False)
    if dice.chance(0.25):
        relation = dice.pick(RELATIONS)
        said, ask = paraphrase(dice, premise(dice, e, relation)), question(dice, e, "yes")
        answer = ANSWER[relation]
    else:
        (ask, said), spans = reading(dice, dice.pick([1, 1, 2, 3]))
        answer = spans[0][0] if spans else "nobody knows"
    first, second = dice.two([said, ask])
    return first, second, f"{{}} [{answer}] ."


def compared(dice):
    """Two events, and how much they are alike."""
    (first, second), score = stsb(dice)
    return first, second, f"{{}} they are [{ALIKE[min(int(score), 4)]}] alike ."


def judged(dice):
    """A review, and what somebody thought who wrote it."""
    praise = dice.chance(0.5)
    who = dice.pick(["she", "he", "mary", "john"])
    return review(dice, praise), "", f"in short , {who} {dice.pick(VERDICTS[praise])} ."


def taught(dice):
    """A teacher's remark. Only here a wrong sentence is text to pretrain on, and it is called wrong."""
    right = dice.chance(0.5)
    return dice.pick(VIOLATIONS)(dice)[0 if right else 1], "", f"{dice.pick(REMARKS[right])} ."


def counted(dice):
    """A word problem and its sums."""
    told, ask, steps = problem(dice, 12)
    return told, ask, f"{{}} [{' , '.join(solution(steps)[0])}] ."


# What is named more than once is drawn more often.
PAIRS = {
    "lesson": [lesson],
    "mlm": [corrected] * 4 + [follows] * 3 + [same] * 2 + [answered] * 3 + [taught] * 2 + [judged] * 2 + [compared],
    "clm": [counted] * 3 + [same, follows, answered],
}


def text(kind, n, seed=0):
    """Yield n ((string,), None) or ((string, string), (words, start)) to pretrain an encoder ("lesson", then "mlm") or
    a decoder ("clm").

    A lesson has pairs alone, the others three of four; (words, start) is what in the second string depends on both:
    a connective, an answer, the word that is wrong.

    None of the sentences is the first text of an example in a dev or test split, whatever the seeds. (A second
    sentence behind a connective, "so ...", counts without it.)
    """
    if kind not in PAIRS:
        raise ValueError(f"unknown kind of text '{kind}': known are {', '.join(PAIRS)}")
    dice = Dice(f"{kind} {seed}")
    while n > 0:
        pair = kind == "lesson" or dice.chance(0.8)
        first, second, how = dice.pick(PAIRS[kind])(dice) if pair else (single(dice), "", "")
        if first != second and all(split_of(said) == "train" for said in (first, second) if said):
            yield ((first,), None) if not how else brackets(first, how.format(second))
            n -= 1


def brackets(first, second):
    """((first, second without its brackets), (the words in them, where these start))."""
    before, words, after = re.split(r"[][]", second)
    return (first, before + words + after), (words, len(before))
