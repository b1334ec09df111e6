"""reading/tokenizer.py: any text goes in and comes back; frames, offsets, truncation."""

import json
import random
from collections import Counter

import pytest

import data
from data import TASKS, Example

TEXTS = [
    "the cat sees the dog .",
    "two big dogs bought seven apples in the old museum yesterday .",
    "the film was long , dull and without charm .",
    "who sold the small red boat to the farmer ?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS * 3, 350)


# ------------------------------------------------------------------------ the tokenizer


def test_tokenizer_gives_back_any_text_and_knows_every_character(tokenizer):
    rng = random.Random(0)
    texts = [
        "",
        " ",
        "a\0b",
        "[SEP] [MASK][CLS]",
        "\u2028\x85\x0c",
        "\ufeff",
        "  two  spaces ",
        "日本𝄞é\U0010ffff",
        *TEXTS,
    ]
    for _ in range(500):
        codes = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(128)]) for _ in range(20)]
        texts.append("".join(map(chr, codes)))
    for text, row in zip(texts, tokenizer.encode([(text,) for text in texts])):
        assert tokenizer.decode(row["input_ids"]) == text.removeprefix(" ")
        assert row["input_ids"][0] == 1 and row["input_ids"][-1] == 2 and min(row["input_ids"][1:-1], default=4) > 3
        assert max(row["input_ids"]) < tokenizer.vocab_size
    assert tokenizer.backend.token_to_id("[UNK]") is None


def test_a_word_is_the_same_tokens_wherever_it_stands(tokenizer):
    first, later = (row["input_ids"] for row in tokenizer.encode([("museum",), ("the museum",)]))
    assert first[1:] == later[2:] and len(first) < len("museum")


def test_tokenizer_frames_types_offsets_and_sequences(tokenizer):
    text = "the cat", "sees the dog"
    single, pair = tokenizer.encode([text[:1], text])
    assert (tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3)
    the, cat = single["input_ids"][1:-1]
    assert single["input_ids"] == [1, the, cat, 2] and single["token_type_ids"] == [0] * 4
    sees, again, dog = pair["input_ids"][4:-1]
    assert again == the and pair["input_ids"] == [1, the, cat, 2, sees, the, dog, 2]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert pair["sequence"] == [None, 0, 0, None, 1, 1, 1, None]
    words = [text[s][a:b] for s, (a, b) in zip(pair["sequence"], pair["offsets"]) if s is not None]
    assert words == ["the", "cat", "sees", "the", "dog"]


def test_truncation_is_longest_first_or_of_the_second_text(tokenizer):
    short, long = "the cat", "the dog " * 9
    rows = tokenizer.encode([(short, long), (long, short)], 10)
    assert [Counter(row["sequence"]) for row in rows] == [{None: 3, 0: 2, 1: 5}, {None: 3, 0: 5, 1: 2}]
    row = tokenizer.encode([(long[:16], long)], 10, "only_second")[0]
    assert Counter(row["sequence"]) == {None: 3, 0: 5, 1: 2}
    assert len(tokenizer.encode([(long, long)])[0]["input_ids"]) > 30


def test_tokenizer_training_is_deterministic_and_survives_its_file(tokenizer, tmp_path):
    again = data.train_tokenizer(iter(TEXTS * 3), 350)
    tokenizer.encode([TEXTS[:1]], 8)  # the length asked for last is not saved
    tokenizer.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = data.Tokenizer(tmp_path / "a.json")
    pairs = [("[SEP] the cat é", "dogs"), ("big apples [PAD]",)]
    assert loaded.encode(pairs, 20) == tokenizer.encode(pairs, 20)
    assert loaded.vocab_size == 350 == tokenizer.vocab_size
    with pytest.raises(ValueError, match="vocabulary size 259 is too small: 260 at least"):
        data.train_tokenizer(TEXTS, 259)


def test_a_hugging_face_tokenizer_gives_its_own_ids_and_is_left_as_it_was(tokenizer):
    transformers = pytest.importorskip("transformers")
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    before = fast.backend_tokenizer.to_str()
    ours = data.Tokenizer(fast)
    assert (ours.pad_id, ours.sep_id, ours.mask_id, ours.vocab_size) == (0, 2, 3, 350)
    for texts in [("the cat é",), ("the dog", "sees the cat " * 9)]:
        mine = ours.encode([texts], 20)[0]
        theirs = fast(*texts, truncation=True, max_length=20)
        assert mine["input_ids"] == theirs["input_ids"] and mine["token_type_ids"] == theirs["token_type_ids"]
        assert mine == tokenizer.encode([texts], 20)[0]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names | {"model_input_names": ["input_ids"]})
    untyped = data.Tokenizer(fast).encode([("the dog", "[SEP]")], 20)[0]
    assert untyped["input_ids"].count(2) == 2 and untyped["token_type_ids"] == [0] * len(untyped["input_ids"])
    assert fast.backend_tokenizer.to_str() == before


def test_a_decoders_tokenizer_has_no_frame_and_a_line_end_before_the_answer(tokenizer):
    transformers = pytest.importorskip("transformers")
    raw = json.loads(tokenizer.backend.to_str()) | {"post_processor": None}
    backend = type(tokenizer.backend).from_str(json.dumps(raw))
    ours = data.Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]"))
    assert (ours.pad_id, ours.sep_id, ours.mask_id) == (2, 2, None)
    assert ours.encode([("",)])[0]["input_ids"] == [2]  # never a row without a token
    row = data.features(TASKS["math"], [Example("0", ("how many ?",), "two #### 2")], ours, 64)[0]
    assert ours.decode(row["input_ids"][: row["prompt"]]) == "how many ? \n"
    assert ours.decode(row["input_ids"][row["prompt"] :]) == "two #### 2" and row["input_ids"][-1] == 2
    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        data.features(TASKS["mlm"], [Example("0", ("a",))], ours, 64)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": 3}'])
def test_a_damaged_tokenizer_is_one_line_with_its_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json( is no tokenizer|:1: the file is empty)") as refused:
        data.Tokenizer(path)
    assert "\n" not in str(refused.value)
