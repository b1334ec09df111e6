"""Reading the generated sentences: from a string alone to what it means, to check the labels of suite.py.

It shares the words of world.py, and none of its ways to make a sentence or a meaning.
"""

import re

from generated import world

PLACES = "|".join(world.PLACES)
TIMES = "|".join({time for _, _, times in world.TENSES.values() for time in times})
NOUNS = {world.noun_form(noun, plural): (noun, plural) for noun in world.ABOVE for plural in (False, True)}
NAMES = {name for names in world.NAMES.values() for name in names}
ADJECTIVES = {word for words in world.TRAITS.values() for word in words}
LEMMA = {form: verb for verb, forms in world.FORMS.items() for form in forms.values()}
BE, DO = {"is", "are", "was", "were", "be", "been", "being"}, {"do", "does", "did"}
AUXILIARIES = BE | DO | {"has", "have", "will"}
BACK = {back: there for there, back in world.CONVERSE.items()}


def same_word(word):
    """One of a word and its synonym, always the same one."""
    return min(word, world.SYNONYM.get(word, word))


def noun_phrases(text):
    """The text with @ for each noun phrase, and the phrases: (noun, plural, adjective)."""
    words, out, found = text.split(), [], []
    while words:
        word = words.pop(0)
        if word in NAMES:
            found.append((word, False, ""))
        elif word == "the":
            adjective = words.pop(0) if words[0] in ADJECTIVES and words[1:] and words[1] in NOUNS else ""
            noun, plural = NOUNS[words.pop(0)]
            found.append((same_word(noun), plural, same_word(adjective)))
        else:
            out.append(word)
            continue
        out.append("@")
    return " ".join(out), found


def read(text):
    """{"verb", "agent", "patient", "recipient", "trait", "tense", "negated", "manner", "place", "time", "asks"}."""
    e = dict.fromkeys(["agent", "patient", "recipient", "trait", "manner", "place", "time", "asks"], "")
    text = text.removesuffix(" .").removesuffix(" ?")
    for name, words in (("time", TIMES), ("place", PLACES)):
        if match := re.search(rf"\b({words})\b( , )?", text):
            e[name], text = match[1], (text[: match.start()] + " " + text[match.end() :]).strip()
    text, things = noun_phrases(text)
    words = text.split()
    asked = words.pop(0) if words[0] in ("who", "what", "where", "when") else ""
    asks_all = not asked and words[0] in AUXILIARIES
    e["negated"], words = "not" in words, [word for word in words if word != "not"]
    for word in world.MANNERS:
        if word in words:
            e["manner"] = same_word(word)
            words.remove(word)
    inverted = asks_all or (bool(asked) and words[0] in AUXILIARIES and words[1:2] == ["@"])
    if inverted:
        words[0], words[1] = words[1], words[0]
    elif asked:
        words.insert(0, "?")  # it stands for the subject
    subject, group, rest = words[0], [], words[1:]
    while rest and rest[0] not in ("@", "to", "from", "by"):
        group.append(rest.pop(0))
    verb = group[-1] if group[-1] in LEMMA and group[-1] not in BE else "be"
    if group[-1] in ADJECTIVES and group[-2] in BE:
        e["trait"], verb = same_word(group.pop()), "be"
    lemma = LEMMA[group[-1]] if verb != "be" else "be"
    auxiliaries = group[:-1]
    passive = bool(auxiliaries) and auxiliaries[-1] in BE and lemma != "be" and group[-1] != world.FORMS[lemma]["ing"]
    ing = group[-1] == world.FORMS[lemma]["ing"] or "being" in auxiliaries
    finite = group[0]
    e["tense"] = (
        "future" if finite == "will" else "perfect" if finite in ("has", "have") and len(group) > 1
        else ("ongoing" if finite in ("was", "were") else "progressive") if ing
        else "past" if finite in ("was", "were", "did") or finite == world.FORMS[lemma]["past", False] else "present"
    )  # fmt: skip
    # What stands behind the verb: @ alone, or behind to, from, by. A preposition without one is asked about.
    behind, places = {}, [("subject", subject)]
    for i, word in enumerate(rest):
        if word == "@":
            places.append((rest[i - 1] if i and rest[i - 1] in ("to", "from", "by") else "object", "@"))
        elif rest[i + 1 : i + 2] != ["@"]:
            behind[word] = "?"
    for place, sign in places:
        value = things.pop(0) if sign == "@" else "?"
        behind.setdefault("second" if place in behind else place, value)
    if "second" in behind:  # gave mary a rose
        behind["to"], behind["object"] = behind["object"], behind["second"]
    if inverted and asked in ("who", "what") and "?" not in behind.values():
        behind["object"] = "?"
    e["verb"] = same_word(lemma)
    e["agent"] = behind.get("by", "") if passive else behind["subject"]
    e["patient"] = behind["subject"] if passive else behind.get("object", "")
    e["recipient"] = behind.get("to", "")
    if "from" in behind:
        e["verb"] = same_word(BACK[lemma])
        e["agent"], e["recipient"] = behind["from"], e["agent"]
    if asked in ("where", "when"):
        e["place" if asked == "where" else "time"] = "?"
    e["asks"] = "yes" if asks_all else next((role for role in e if e[role] == "?"), "")
    return e


ROLES, DETAILS = ("agent", "patient", "recipient"), ("manner", "place", "time")


def says(p, h):
    """Whether, of two sentences without negation, the first says all of the second, or answers it ("?")."""
    if (p["verb"], p["trait"], p["tense"]) != (h["verb"], h["trait"], h["tense"]):
        return False
    if any(h[name] not in ("", p[name], p[name] and "?") for name in DETAILS):
        return False
    for role in ROLES:
        if bool(p[role]) != bool(h[role]):
            return False
        if p[role] and h[role] != "?":
            (noun, plural, adjective), (wider, number, other) = p[role], h[role]
            above = {same_word(word) for word in world.ABOVE[noun] if word}
            if wider not in above or plural != number or other not in ("", adjective):
                return False
    return True


def antonym(e):
    key = "trait" if e["trait"] else "verb"
    words = [word for word in (e[key], world.SYNONYM.get(e[key])) if word in world.ANTONYM]
    return [{**e, key: same_word(world.ANTONYM[word])} for word in words]


def entails(p, h):
    if p["negated"]:
        return h["negated"] and says(h, p)
    if h["negated"]:
        return any(says(p, other) for other in antonym(h))  # sad: not happy
    return says(p, h)


def relation(p, h):
    if entails(p, h):
        return "entailment"
    return "contradiction" if entails(p, {**h, "negated": not h["negated"]}) else "neutral"
