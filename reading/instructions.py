"""Instruction data: prompts with their answers, as columns of a table or as chats, the way the papers' sets are published.

    {"instruction": "Add.", "input": "1 and 2", "output": "3"}             Commonsense170K, WizardLM-Evol, Alpaca
    {"query": "How many are 1 and 2?", "response": "The answer is: 3"}     MetaMathQA
    {"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}]}       Code-Feedback
    {"conversations": [{"from": "human", "value": ".."}, {"from": "gpt", "value": ".."}]}           WizardLM, ShareGPT

A file is JSON lines or one JSON list. An example's text is its turns, ((role, words), ..), up to the last answer, which is
the label.
"""

import contextlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reading import files
from reading.files import Example, bad, brief

# Columns of prompts, and of the answer, that are found without being named.
KNOWN = [(("instruction", "input"), "output"), (("query",), "response"), (("question",), "answer"), (("prompt",), "completion")]
CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass
class Chat(Example):
    """An Example of turns. `options`: the answers to choose among, where the file gives them."""

    options: tuple = ()


def read(
    path: str | files.Path, prompt: Sequence[str] = (), answer: str | None = None, template: str = "", labelled: bool = True,
    choosing: bool = False,
) -> list[Example]:  # fmt: skip
    """Chats of a file. `prompt` and `answer` name columns (default: what KNOWN or CHATS finds in the first row);
    `template` has the columns' names in braces, "" joins them line by line. Without `labelled` the answer may be missing;
    with `choosing` each row has `options`, a list of texts."""
    rows = files.json_rows(path, files.read_text(path))
    first = rows[0][1]
    chat = next((key for key in CHATS if key in first), None) if not prompt else None
    if not prompt and not chat:
        found = [known for known in KNOWN if known[0][0] in first]
        prompt, answer = next((known for known in found if known[1] in first), found[0] if found else ((), None))
        if not found or labelled and answer not in first:
            lacking = f"answer {answer!r} to {prompt[0]!r}" if found else "column of prompts is known"
            raise bad(path, rows[0][0], f"no {lacking} among {brief(', '.join(first), 200)}: name them with --prompt, --answer")
        rows = [(line, {**dict.fromkeys(prompt[1:], ""), **row}) for line, row in rows]  # an `input` is there where it is needed
    if template and not chat and answer in fields(template):
        raise bad(path, rows[0][0], f"the template holds {answer!r}, the column of the answer: it would stand in the question")
    examples = []
    for i, (line, row) in enumerate(rows):
        turns = chat_turns(path, line, row, chat) if chat else column_turns(path, line, row, prompt, answer, template)
        label = turns.pop()[1] if turns[-1][0] == "assistant" else None
        if label is None and labelled:
            raise bad(path, line, "there is no answer to learn from")
        options: Any = row.get("options")
        fits = isinstance(options, list) and all(isinstance(option, str) for option in options)
        if choosing and not (fits and options):
            raise bad(path, line, f"'options' is {brief(options)}, expected a list of texts")
        if choosing and labelled and label is not None and label.strip() not in [option.strip() for option in options]:
            raise bad(path, line, f"the answer {brief(label)} is none of the options")
        examples.append(Chat(str(row.get("id", i)), tuple(turns), label, tuple(options) if fits else ()))
    return examples  # type: ignore[return-value]


def fields(template: str) -> set[str]:
    """The columns that a template names; none if its braces do not match, which its first row then tells."""
    with contextlib.suppress(ValueError):
        return {re.split(r"[.\[]", name)[0] for _, name, _, _ in string.Formatter().parse(template) if name}
    return set()


def column_turns(
    path: str | files.Path, line: int, row: dict, prompt: Sequence[str], answer: str | None, template: str
) -> list[tuple[str, str]]:
    """[("user", prompt), ("assistant", answer)]; the second only where the row has it."""
    parts = {name: words(path, line, row, name) for name in prompt}
    try:
        asked = template.format_map({**row, **parts}) if template else "\n".join(filter(None, parts.values()))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise bad(path, line, f"the template does not fit the row: {brief(str(error))}") from None
    if not asked:
        raise bad(path, line, f"the prompt ({', '.join(prompt)}) is empty")
    turns = [("user", asked)]
    if answer is not None and row.get(answer) is not None:
        turns.append(("assistant", words(path, line, row, answer)))
    return turns


def chat_turns(path: str | files.Path, line: int, row: dict, key: str) -> list[tuple[str, str]]:
    """[(role, words), ..] of a chat: after a system's words, user and assistant take turns."""
    role_key, words_key = CHATS[key]
    listed = files.get(path, line, row, key)
    if not isinstance(listed, list) or not listed or not all(isinstance(turn, dict) for turn in listed):
        raise bad(path, line, f"{key!r} is {brief(listed)}, expected a list of turns")
    turns = []
    for n, turn in enumerate(listed, 1):
        role = ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise bad(path, line, f"turn {n}: {role_key!r} is {brief(turn.get(role_key))}, expected one of {', '.join(ROLES)}")
        due = "user" if not turns or turns[-1][0] != "user" else "assistant"
        if role != due and not (role == "system" and not turns):
            raise bad(path, line, f"turn {n} is the {role}'s, expected the {due}'s")
        turns.append((role, words(path, line, turn, words_key)))
    if turns[-1][0] == "system":
        raise bad(path, line, "there is no user's turn")
    return turns


def words(path: str | files.Path, line: int, row: dict, name: str) -> str:
    value = files.get(path, line, row, name)
    if not isinstance(value, str):
        raise bad(path, line, f"{name!r} is {brief(value)}, expected a text")
    return value


def read_template(path: str | files.Path) -> str:
    """The text of a template's file, with column names in braces; the line end at its end is none of it."""
    text = files.read_text(path).replace("\r\n", "\n").removesuffix("\n")
    if not re.search(r"\{\w+\}", text):
        raise ValueError(f"{path}: no column in braces, as {{instruction}}")
    return text


def encode(examples: Sequence[Example], tokenizer, max_length: int, chat: bool = False, room: int = 0) -> list[dict]:
    """Rows for the model: input_ids, `learn` (which tokens are of an answer, its end included), `prompt` (tokens before the
    last answer) and `cut` (whether something did not fit).

    Without `chat` the turns stand on lines of their own where the tokenizer ends no text, and an answer ends with sep_id.
    With it the tokenizer's own chat template frames them. A prompt that leaves no `room` for an answer loses its beginning,
    an answer that does not fit its end. `room`, in tokens, is the same for all, so that what is asked does not depend on what
    would be right; 0: that of the longest answer here, half of max_length at most.
    """
    pieces = [framed(example, tokenizer) if chat else plain(example) for example in examples]
    texts = [text for parts in pieces for text, _ in parts]
    tokenizer.backend.encode_special_tokens = not chat  # a template's marks are no text
    encoded = iter(tokenizer.encode([(text,) for text in texts]))
    tokenizer.backend.encode_special_tokens = True
    newline = without_specials(tokenizer.encode([("\n",)])[0])
    rows = []
    for parts in pieces:
        ids, learn, start = [], [], 0
        for _, answer in parts:
            row = next(encoded)
            if answer:
                start = len(ids)
                part = without_specials(row) + [tokenizer.sep_id] * (not chat)
            else:
                part = without_specials(row) if chat or ids else row["input_ids"] + newline * (row["sequence"][-1] is not None)
                part = part + newline * (bool(ids) and not chat)
            ids, learn = ids + part, learn + [answer] * len(part)
        start = start if parts[-1][1] else len(ids)
        rows.append((ids, learn, start))
    room = room or max((len(ids) - start for ids, _, start in rows), default=0)
    return [fitted(*row, max_length, min(room, max_length // 2)) for row in rows]


def fitted(ids: list[int], learn: list[bool], start: int, max_length: int, room: int) -> dict:
    """The row in max_length places: the prompt without what does not fit of its beginning, the answer of its end."""
    drop = max(start - (max_length - room), 0)
    cut = drop > 0 or len(ids) > max_length
    ids, learn = (values[drop:][:max_length] for values in (ids, learn))
    return {"input_ids": ids, "learn": learn, "prompt": start - drop, "token_type_ids": None, "cut": cut}


def plain(example: Example) -> list[tuple[str, bool]]:
    """[(text, whether it is an answer)] of the turns, one after the other."""
    turns = [(text, role == "assistant") for role, text in example.text]
    return turns + ([] if example.label is None else [(example.label, True)])


def framed(example: Example, tokenizer) -> list[tuple[str, bool]]:
    """The same as the tokenizer's chat template writes them: an answer is what its turn adds to the text before it."""
    source = tokenizer.source
    if not getattr(source, "chat_template", None):
        raise ValueError("--template chat: the tokenizer has no chat template")
    messages = [{"role": role, "content": text} for role, text in example.text]
    messages += [] if example.label is None else [{"role": "assistant", "content": example.label}]
    pieces, before = [], ""
    for n, message in enumerate(messages):
        if message["role"] == "system":
            continue
        answer = message["role"] == "assistant"
        try:
            text = source.apply_chat_template(messages[: n + 1], tokenize=False, add_generation_prompt=not answer)
        except Exception as e:  # jinja2's, or what the template's own raise_exception says
            raise ValueError(f"--template chat: the tokenizer's template does not take row {example.id}: {e}") from None
        if not text.startswith(before):
            raise ValueError("--template chat: the tokenizer's template changes earlier turns when a turn is added")
        pieces.append((text[len(before) :], answer))
        before = text
    return pieces


def stop_id(tokenizer, chat: bool) -> int:
    """The id at which an answer ends: sep_id; in a chat the first special token that the template puts behind the words."""
    if not chat:
        return tokenizer.sep_id
    try:
        text = framed(Chat("", (("user", "a"),), "its words"), tokenizer)[-1][0].rpartition("its words")[2]
    except ValueError:  # it takes no such pair: then nothing was learned with it, either
        return tokenizer.sep_id
    tokenizer.backend.encode_special_tokens = False
    ids = without_specials(tokenizer.encode([(text,)])[0])
    tokenizer.backend.encode_special_tokens = True
    added = {i for i, token in tokenizer.source.added_tokens_decoder.items() if token.special}
    return next((i for i in ids if i in added), tokenizer.sep_id)


def without_specials(row: dict) -> list[int]:
    """Token ids of an encoded row without the special tokens around its text."""
    return [i for i, s in zip(row["input_ids"], row["sequence"]) if s is not None]
