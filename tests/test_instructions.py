"""reading/instructions.py and --task sft: published layouts, templates, which tokens are learned, scores, whole runs."""

import io
import json
import random
from dataclasses import replace

import pytest
import torch

import data
import predict
import train
from harness import run as running
from harness.run import Run
from harness.settings import Settings
from reading import instructions

# Two rows of each published set, written for this test in its layout.
PUBLISHED = {
    "commonsense_170k.json": (
        [{"instruction": "Is ice cold?", "input": "", "output": "the correct answer is true", "answer": "true"},
         {"instruction": "Pick one.", "input": "a or b", "output": "the correct answer is b", "answer": "b"}],
        [((("user", "Is ice cold?"),), "the correct answer is true"),
         ((("user", "Pick one.\na or b"),), "the correct answer is b")],
    ),
    "MetaMathQA-395K.json": (
        [{"query": "How many are 1 and 2?", "response": "1+2=3\nThe answer is: 3", "type": "GSM_SV", "original_question": "?"},
         {"query": "2 times 4?", "response": "The answer is: 8", "type": "MATH_FOBAR", "original_question": "?"}],
        [((("user", "How many are 1 and 2?"),), "1+2=3\nThe answer is: 3"), ((("user", "2 times 4?"),), "The answer is: 8")],
    ),
    "Code-Feedback.jsonl": (
        [{"id": 7, "messages": [{"role": "user", "content": "sort"}, {"role": "assistant", "content": "sorted(x)"},
                                {"role": "user", "content": "backwards"}, {"role": "assistant", "content": "x[::-1]"}]},
         {"id": 8, "messages": [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "sum(x)"}]}],
        [((("user", "sort"), ("assistant", "sorted(x)"), ("user", "backwards")), "x[::-1]"), ((("user", "sum"),), "sum(x)")],
    ),
    "WizardLM_evol_instruct_V2_143k.json": (
        [{"idx": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
         {"idx": "b", "conversations": [{"from": "human", "value": "bye"}, {"from": "gpt", "value": "see you"}]}],
        [((("user", "hi"),), "hello"), ((("user", "bye"),), "see you")],
    ),
}  # fmt: skip


def written(path, rows):
    path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_are_read_as_they_are(name, tmp_path):
    rows, wanted = PUBLISHED[name]
    found = instructions.read(written(tmp_path / name, rows))
    assert [(e.text, e.label) for e in found] == wanted
    assert [e.id for e in found] == ([str(row["id"]) for row in rows] if "id" in rows[0] else ["0", "1"])


def test_named_columns_a_template_and_options(tmp_path):
    rows = [{"q": "one", "hint": "1", "a": "x", "options": ["x", "y"]}, {"q": "two", "hint": "", "a": "y", "options": []}]
    path = written(tmp_path / "f.jsonl", rows)
    found = instructions.read(path, ("q", "hint"), "a")
    assert [(e.text[0][1], e.label, e.options) for e in found] == [("one\n1", "x", ("x", "y")), ("two", "y", ())]
    (tmp_path / "t.txt").write_text("Q: {q} ({hint})\nA:\n")
    found = instructions.read(path, ("q", "hint"), "a", instructions.read_template(tmp_path / "t.txt"))
    assert [e.text[0][1] for e in found] == ["Q: one (1)\nA:", "Q: two ()\nA:"]


def test_an_input_is_read_wherever_it_is_and_options_only_where_they_are_chosen_among(tmp_path):
    rows = [{"instruction": "Say", "output": "a"},
            {"instruction": "Say", "input": "THE WORD", "output": "b", "options": "no list"},
            {"instruction": "Say", "input": "", "output": "c", "options": None}]  # fmt: skip
    found = instructions.read(written(tmp_path / "f.jsonl", rows))
    assert [(e.text[0][1], e.options) for e in found] == [("Say", ()), ("Say\nTHE WORD", ()), ("Say", ())]


def test_a_template_with_windows_line_ends_is_the_same(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"Q: {q}\r\nA:\r\n")
    assert instructions.read_template(tmp_path / "t.txt") == "Q: {q}\nA:"


def test_how_a_prompt_is_cut_does_not_depend_on_its_answer():
    tokenizer, task = data.Tokenizer(), data.TASKS["sft"]
    answers, prompt = ["old", "it is old", "the dog is old . " * 3, None], "who sings ? " * 20
    examples = [instructions.Chat("0", (("user", prompt),), answer) for answer in answers]
    whole = tokenizer.encode([(prompt,)])[0]["input_ids"]
    for rows in (
        data.features(task, examples, tokenizer, 32),
        [data.features(task, [e], tokenizer, 32, 14)[0] for e in examples],
    ):
        prompts = [row["input_ids"][: row["prompt"]] for row in rows]
        assert all(found == prompts[0] for found in prompts) and prompts[0] == whole[-len(prompts[0]) :]
        assert all(row["cut"] for row in rows) and all(len(row["input_ids"]) <= 32 for row in rows)
    assert len(prompts[0]) == 32 - 14
    longest = max(len(row["input_ids"]) - row["prompt"] for row in data.features(task, examples, tokenizer, 1000))
    assert data.features(task, examples, tokenizer, 32)[0]["prompt"] == 32 - min(longest, 16)


@pytest.mark.parametrize(
    "text, more, words",
    [
        ('{"a": "x"}', {}, ":1: no column of prompts is known among 'a': name them with --prompt, --answer"),
        ('{"query": "x"}', {}, ":1: no answer 'response' to 'query' among 'query': name them with --prompt, --answer"),
        ('{"instruction": "x", "context": "y", "response": "z"}', {},
         ":1: no answer 'output' to 'instruction' among 'instruction, context, response': name them with --prompt, --answer"),
        ('{"messages": [{"role": "system", "content": "x"}]}', {}, ":1: there is no user's turn"),
        ('{"query": "x", "response": "y"}\n{"query": 3, "response": "y"}', {}, ":2: 'query' is 3, expected a text"),
        ('{"query": "x", "response": "y"}\n{"response": "y"}', {}, ":2: no 'query'; found: 'response'"),
        ('{"query": "", "response": "y"}', {}, ":1: the prompt (query) is empty"),
        ('{"query": "x", "response": "y", "options": "ab"}', {"choosing": True},
         ":1: 'options' is 'ab', expected a list of texts"),
        ('{"query": "x", "response": "y"}', {"choosing": True}, ":1: 'options' is None, expected a list of texts"),
        ('{"query": "x", "response": "y", "options": []}', {"choosing": True}, ":1: 'options' is [], expected a list of texts"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', {},
         ":1: turn 1: 'role' is ['user'], expected one of system, user, human, assistant, gpt"),
        ('[{"query": "x", "response": "y"},\n\n {"query": "x", "response": 1}]', {}, ":3: 'response' is 1, expected a text"),
        ('[{"query": "x", "response": "y"},\n {"query": }]', {}, ":2: not JSON: Expecting value"),
        ('[{"query": "x", "response": "y"}', {}, ":1: the list does not end behind its last row"),
        ('[{"query": "x", "response": "y"}] []', {}, ":1: the list does not end behind its last row"),
        ("[]", {}, ":1: a list without rows"),
        ("[3]", {}, ":1: expected a JSON object, found 3"),
        ('{"messages": []}', {}, ":1: 'messages' is [], expected a list of turns"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', {},
         ":1: turn 1: 'role' is 'bot', expected one of system, user, human, assistant, gpt"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', {}, ":1: turn 1 is the assistant's, expected the user's"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}', {},
         ":1: turn 2 is the user's, expected the assistant's"),
        ('{"messages": [{"role": "user", "content": "x"}]}', {}, ":1: there is no answer to learn from"),
        ('{"q": "x", "a": "y"}', {"prompt": ("q",), "answer": "b"}, ":1: there is no answer to learn from"),
        ('{"q": "x", "a": "y"}', {"prompt": ("q",), "answer": "a", "template": "{z}"},
         ":1: the template does not fit the row: \"'z'\""),
        ('{"q": "x", "a": "y", "n": "z"}', {"prompt": ("q",), "answer": "a", "template": "{q} {n[x]}"},
         ":1: the template does not fit the row: \"string indices must be integers, not 'str'\""),
        ('{"q": "x", "a": "y"}', {"prompt": ("q",), "answer": "a", "template": "{q}\n{a[0]}"},
         ":1: the template holds 'a', the column of the answer: it would stand in the question"),
        ('{"q": "x", "a": "y"}', {"prompt": ("q",), "answer": "a", "template": "{q} {"},
         ":1: the template does not fit the row: \"Single '{' encountered in format string\""),
        ('{"query": "x", "response": "yes.", "options": ["yes", "no"]}', {"choosing": True},
         ":1: the answer 'yes.' is none of the options"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_file_and_line(text, more, words, tmp_path):
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        instructions.read(path, **more)
    assert str(error.value) == f"{path}{words}"


def words_of(tokenizer, ids):
    return [tokenizer.backend.id_to_token(i) for i in ids]


def test_the_loss_is_on_the_answers_alone_token_by_token():
    tokenizer, task = data.Tokenizer(), data.TASKS["sft"]
    turns = (("user", "who sings ?"), ("assistant", "the dog"), ("user", "why ?"))
    row = data.features(task, [instructions.Chat("0", turns, "it is old")], tokenizer, 64)[0]
    ids, labels = row["input_ids"], row["labels"]
    first, second = (tokenizer.encode([(text,)])[0]["input_ids"][1:-1] for text in ("the dog", "it is old"))
    asked, again = (tokenizer.encode([(text,)])[0]["input_ids"] for text in ("who sings ?", "why ?"))
    sep, newline = tokenizer.sep_id, instructions.without_specials(tokenizer.encode([("\n",)])[0])
    assert ids == asked + first + [sep] + again[1:-1] + newline + second + [sep]
    learned = [i for i in labels if i != data.IGNORED]
    assert learned == first + [sep] + second + [sep]
    for t, label in enumerate(labels):  # logits at t predict the token at t + 1
        assert label == data.IGNORED or label == ids[t + 1]
    assert [t for t, label in enumerate(labels) if label != data.IGNORED][0] == len(asked) - 1
    assert row["prompt"] == len(ids) - len(second) - 1


def test_math_problems_as_prompts_with_answers_are_the_same_rows(tmp_path):
    examples = data.load("math", split="dev")[:100]
    path = written(tmp_path / "math.jsonl", [{"query": e.text[0], "response": e.label} for e in examples])
    tokenizer = data.Tokenizer()
    rows = data.features(data.TASKS["math"], examples, tokenizer, 128)
    assert data.features(data.TASKS["sft"], data.load("sft", path), tokenizer, 128) == rows
    assert not any(row["cut"] for row in rows)


def test_texts_that_do_not_fit_lose_the_prompts_beginning_and_the_answers_end():
    tokenizer, task = data.Tokenizer(), data.TASKS["sft"]
    encode = lambda text: tokenizer.encode([(text,)])[0]["input_ids"]  # noqa: E731
    long = "who sings ? " * 20
    for prompt, answer in [(long, "it is old"), ("why ?", "the dog is old . " * 20), (long, "the dog . " * 20)]:
        whole = encode(prompt) + encode(answer)[1:]
        row = data.features(task, [instructions.Chat("0", (("user", prompt),), answer)], tokenizer, 32)[0]
        assert len(row["input_ids"]) == 32 and row["cut"]
        start, kept = len(encode(prompt)), row["prompt"]
        begin = start - kept
        assert row["input_ids"] == whole[begin : begin + 32]
        assert kept <= max(16, 32 - (len(whole) - start)) and any(label != data.IGNORED for label in row["labels"])
    assert not data.features(task, [instructions.Chat("0", (("user", "why ?"),), "old")], tokenizer, 32)[0]["cut"]


TINY = "--scratch --width 32 --depth 1 --heads 2 --hidden 32 --method full --lr 0.01".split()
TINY += "--threads 1 --device cpu --no-figures".split()


def sft(path, out, *more):
    return train.main(["--task", "sft", "--data", path, "--out", str(out), *TINY, *map(str, more)])


def test_a_run_learns_answers_predicts_them_and_resumes_its_layout(tmp_path, capsys):
    rng = random.Random(0)
    animals = {"dog": "barks", "cat": "purrs", "cow": "moos"}
    drawn = rng.choices(list(animals), k=120)
    rows = [{"ask": f"what does the {a} do {'now ' * rng.randint(0, 3)}?", "say": animals[a]} for a in drawn]
    path = written(tmp_path / "f.jsonl", rows)
    assert sft(path, tmp_path / "run", "--prompt", "ask", "--answer", "say", "--epochs", 40) == 0
    last = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")][-1]
    assert last["exact_match"] == 1.0
    other = written(tmp_path / "new.jsonl", [{"ask": f"what does the {a} do ?"} for a in animals])
    capsys.readouterr()
    assert predict.main([str(tmp_path / "run"), other, "--format", "jsonl"]) == 0
    found = [json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines()]
    assert found == list(animals.values())


def test_among_options_the_likeliest_is_chosen(tmp_path, capsys):
    rng = random.Random(1)
    rows = [{"query": f"is {n} even ?", "response": "yes it is" if n % 2 == 0 else "no", "options": ["yes it is", "no"]}
            for n in rng.choices(range(4), k=120)]  # fmt: skip
    path = written(tmp_path / "f.jsonl", rows)
    assert sft(path, tmp_path / "run", "--score", "choice", "--epochs", 20) == 0
    run = Run.open(str(tmp_path / "run"))
    assert run.predict(data.load(run.task, path))["answers"] == [row["response"] for row in rows]
    examples = data.load(run.task, path)[:5]
    chosen = run.choose(examples)
    for e, answer in zip(examples, chosen):  # against one text at a time, token by token
        sums = []
        for option in e.options:
            row = run.features([instructions.Chat("0", e.text, option)])[0]
            ids = torch.tensor([row["input_ids"]])
            p = run.model(ids).log_softmax(-1)[0]
            sums.append(sum(p[t - 1, row["input_ids"][t]].item() for t in range(row["prompt"], len(row["input_ids"]))))
        assert answer == e.options[sums.index(max(sums))] and abs(sums[0] - sums[1]) > 0.1
    assert predict.main([str(tmp_path / "run"), "-"]) == 2
    assert "chooses among a row's options, which a line of standard input has not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--prompt", "ask"], "--prompt COLUMN and --answer COLUMN go together"),
        (["--template", "t.txt"], "and a --template FILE with them"),
        (["--prompt", "ask", "say", "--answer", "say"], "--answer say is among the columns of --prompt"),
        (["--prompt", "ask", "--answer", "say", "--template", "missing.txt"], "missing.txt: No such file or directory"),
        (["--template", "chat"], "--template chat: the tokenizer has no chat template"),
    ],
)
def test_flags_that_do_not_go_together(more, words, tmp_path, capsys):
    path = written(tmp_path / "f.jsonl", [{"query": "x", "response": "y"}] * 4)
    try:
        code = sft(path, tmp_path / "run", *more)
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1


# ------------------------------------------------------------------- Hugging Face's models


@pytest.fixture
def llama(tmp_path):
    pytest.importorskip("transformers")
    from test_backbones import build_model, build_tokenizer

    folder = tmp_path / "llama"
    build_model("llama").save_pretrained(folder)
    build_tokenizer("llama").save_pretrained(folder)
    return str(folder)


ROWS = [{"query": f"w{3 + i % 7} w{10 + i % 3}", "response": f"w{20 + i % 7} w{30 + i % 3} w9"} for i in range(40)]


def test_llama_trains_predicts_and_writes_the_same_tokens_from_peft(llama, tmp_path, capsys):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    path, out = written(tmp_path / "f.jsonl", ROWS), tmp_path / "run"
    argv = ["--task", "sft", "--data", path, "--backbone", llama, "--method", "lora", "--lr", "0.01", "--epochs", "8"]
    argv += ["--out", str(out), "--export-peft", str(tmp_path / "peft"), "--threads", "1", "--no-figures", "--max-length", "32"]
    assert train.main(argv) == 0
    capsys.readouterr()
    assert predict.main([str(out), path, "--format", "jsonl"]) == 0
    found = [json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines()]
    base = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = data.Tokenizer(transformers.AutoTokenizer.from_pretrained(llama))
    rows = data.features(data.TASKS["sft"], instructions.read(path), tokenizer, 32)
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": tokenizer.sep_id, "pad_token_id": tokenizer.pad_id}

    def answers(model):
        texts = []
        for row in rows:
            ids = torch.tensor([row["input_ids"][: row["prompt"]]])
            new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
            texts.append(tokenizer.decode(new.tolist()))
        return texts

    untrained = answers(base)
    adapted = answers(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    assert found == adapted != untrained and found.count(found[0]) < len(found)
    longest, places = max(row["prompt"] for row in rows), base.config.max_position_embeddings
    capsys.readouterr()
    assert predict.main([str(out), path, "--max-new", str(places - longest + 1)]) == 0
    capsys.readouterr()
    assert predict.main([str(out), path, "--max-new", str(places - longest + 2)]) == 2
    assert f"is too much: the model has {places} positions for prompt and answer" in capsys.readouterr().err


def test_a_long_prompt_leaves_its_answer_room_among_the_models_positions(tmp_path):
    pytest.importorskip("transformers")
    from test_backbones import build_model, build_tokenizer

    build_model("gpt2").save_pretrained(tmp_path / "gpt2")  # 40 learned positions, none after them
    build_tokenizer("gpt2").save_pretrained(tmp_path / "gpt2")
    rows = [{"query": "w3 " * 60, "response": "w4"}, *[{"query": "w3", "response": "w5 " * 30}] * 9]
    path = written(tmp_path / "f.jsonl", rows)
    argv = [
        "--task",
        "sft",
        "--data",
        path,
        "--dev",
        written(tmp_path / "dev.jsonl", rows[:3]),
        "--max-length",
        "40",
        "--epochs",
        "1",
    ]
    argv += [
        "--backbone",
        str(tmp_path / "gpt2"),
        "--method",
        "lora",
        "--no-figures",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main(argv) == 0
    run = Run.open(str(tmp_path / "run"))
    prompts = [row["prompt"] for row in run.features(data.load(run.task, path))]
    assert run.max_new == 20 and max(prompts) == 20


def test_a_chat_template_frames_the_turns_and_its_marks_are_one_token(llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = transformers.AutoTokenizer.from_pretrained(llama)
    source.chat_template = "{% for m in messages %}<s> {{ 'w4' if m.role == 'user' else 'w5' }} {{ m.content }} </s> {% endfor %}"
    source.chat_template += "{% if add_generation_prompt %}<s> w5 {% endif %}"
    tokenizer, task = data.Tokenizer(source), data.TASKS["sft"]
    chat = instructions.Chat("0", (("user", "w6"), ("assistant", "w7 w8"), ("user", "w9 </s>")), "w10")
    row = data.features(replace(task, template="chat"), [chat], tokenizer, 64)[0]
    #              <s> user w6 </s> <s> assistant | w7 w8 </s> | <s> user w9 </s> </s> <s> assistant | w10 </s>
    assert row["input_ids"] == [1, 4, 6, 2, 1, 5, 7, 8, 2, 1, 4, 9, 2, 2, 1, 5, 10, 2]
    assert [i for i in row["labels"] if i != data.IGNORED] == [7, 8, 2, 10, 2] and row["prompt"] == 16
    source.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="--template chat: the tokenizer's template does not take row 0: no system here"):
        data.features(replace(task, template="chat"), [chat], tokenizer, 64)
    plain = data.features(task, [chat], tokenizer, 64)[0]
    assert 2 not in plain["input_ids"][:3] and plain["input_ids"] != row["input_ids"]


def test_an_answer_ends_where_the_chat_template_ends_a_turn(llama, monkeypatch):
    transformers = pytest.importorskip("transformers")
    source = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer = data.Tokenizer(source)
    turn = "{% for m in messages %}w4 {{ m.content }} END {% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
    for mark, wanted in [("<s>", 1), ("</s>", 2), ("w7", tokenizer.sep_id)]:  # w7 is a word, no mark
        source.chat_template = turn.replace("END", mark)
        assert instructions.stop_id(tokenizer, chat=True) == wanted
    source.chat_template = turn.replace("END", "<s>")
    assert instructions.stop_id(tokenizer, chat=False) == tokenizer.sep_id == 2
    row = instructions.encode([instructions.Chat("0", (("user", "w3"),), "w8")], tokenizer, 32, chat=True)[0]
    assert row["input_ids"][row["prompt"] :] == [8, 1]  # what is learned ends with it, too
    task = replace(data.TASKS["sft"], template="chat")
    run, stops = Run(Settings(), task, None, tokenizer, "", max_new=3), []
    monkeypatch.setattr(running.modelling, "generate", lambda model, prompts, most, stop, drafts: stops.append(stop) or [])
    run.generate([{"input_ids": [4, 3], "prompt": 2}])
    assert stops == [1]


def test_a_chat_whose_last_turn_has_no_word_is_counted_as_empty():
    said = [
        (("user", "w1"),),
        (("user", ""),),
        (
            ("user", "w1"),
            ("assistant", "w2"),
            ("user", " \n"),
        ),
    ]
    assert data.empty([instructions.Chat(str(i), turns) for i, turns in enumerate(said)]) == 2
    assert data.empty([data.Example("0", ("a", " ")), data.Example("1", ("a", "b"))]) == 1


def test_a_template_frames_the_lines_of_standard_input_too(tmp_path, monkeypatch):
    columns, text = (("query",), ("answer",)), type("Input", (), {"buffer": io.BytesIO(b"w1\nw2\n")})
    monkeypatch.setattr("sys.stdin", text)
    task = replace(data.TASKS["sft"], columns=columns, template="Q: {query} A:")
    assert [e.text for e in predict.read(task, "-")] == [(("user", "Q: w1 A:"),), (("user", "Q: w2 A:"),)]
    with pytest.raises(ValueError, match="the run's template takes more than column 'hint', standard input has one text a line"):
        predict.read(replace(task, columns=(("hint",), *columns)), "-")
    with pytest.raises(ValueError, match="the run's template takes more than column 'query', standard input has one text a line"):
        predict.read(replace(task, template="{query} in {language}"), "-")  # of the row, and none of --prompt


def test_a_base_in_bf16_has_adapters_in_float32_and_learns_as_in_float32(llama, tmp_path, capsys):
    path, losses = written(tmp_path / "f.jsonl", ROWS), {}
    for dtype in ("float32", "bf16"):
        argv = ["--task", "sft", "--data", path, "--backbone", llama, "--dtype", dtype, "--out", str(tmp_path / dtype)]
        argv += "--method triadapt --lr 0.01 --epochs 6 --score loss --threads 1 --no-figures --max-length 32".split()
        assert train.main(argv) == 0
        losses[dtype] = [json.loads(line)["dev_loss"] for line in open(tmp_path / dtype / "metrics.jsonl")]
    run = Run.open(str(tmp_path / "bf16"))
    trained = {p.dtype for p in run.model.parameters() if p.requires_grad}
    assert trained == {torch.float32} and {p.dtype for p in run.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    print(losses)
    assert losses["float32"][-1] < losses["float32"][0] - 0.04
    assert 0 < abs(losses["bf16"][-1] - losses["float32"][-1]) < 0.01
    found = run.predict(data.load(run.task, path), answering=False)["loss"]
    assert found == found
    full, float32 = ["--method", "full"], ["--precision", "float32"]
    for more, words in [(full, "method full trains the base's own weights"), (float32, "computes in bf16")]:
        with pytest.raises(SystemExit):
            train.main(["--task", "sft", "--data", path, "--backbone", llama, "--dtype", "bf16", *more])
        assert words in capsys.readouterr().err
