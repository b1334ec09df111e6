"""harness/generation.py and predict.py's flags for it: the same tokens as `generate`, draws by the rule, text as it comes."""

import io
import json
import sys

import pytest
import torch

import data
import model as modelling
import predict
import train
from harness import generation


def decoder():
    torch.manual_seed(3)
    model = modelling.Transformer(modelling.Config(50, 24, 2, 3, 40, causal=True)).double().eval()
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model


def test_one_at_a_time_the_likeliest_tokens_are_those_of_generate_and_every_token_is_read_once():
    model, read = decoder(), []
    model.embed.register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    for prompt in ([5, 6, 7], [9], [4, 4, 8, 1]):
        whole = modelling.generate(model, [prompt], 12, -1)[0]
        read.clear()
        assert list(generation.tokens(model, prompt, 12, -1, generation.sampler())) == whole
        assert read == [len(prompt)] + [1] * 11 and len(set(whole)) > 1
        stop = whole[4]
        assert list(generation.tokens(model, prompt, 12, stop, generation.sampler())) == whole[: whole.index(stop)]


def test_a_hugging_face_model_is_read_with_its_own_cache():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    got = list(generation.tokens(model, [5, 6, 7], 10, -1, generation.sampler()))
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(10):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert got == ids[0, 3:].tolist() and len(set(got)) > 1


def test_a_model_that_keeps_no_keys_reads_all_again():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    model = transformers.MambaForCausalLM(config).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    got = list(generation.tokens(model, [5, 6, 7], 10, -1, generation.sampler(1.0, seed=3)))
    ids, pick = torch.tensor([[5, 6, 7]]), generation.sampler(1.0, seed=3)
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, torch.tensor([[pick(model(ids).logits[0, -1])]])], 1)
    assert got == ids[0, 3:].tolist() and len(set(got)) > 1


@pytest.mark.parametrize("temperature, top_p, kept", [(1, 1, 4), (0.5, 1, 4), (1, 0.75, 2), (1, 0.5, 1), (2, 0.75, 3)])
def test_draws_follow_the_nucleus_of_the_tempered_softmax(temperature, top_p, kept):
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()  # tokens 1, 2, then 0 and 3
    p = torch.tensor([0.1, 0.5, 0.3, 0.1]).double() ** (1 / temperature)
    p /= p.sum()
    order = [1, 2, 0, 3][:kept]
    want = torch.zeros(4, dtype=torch.float64)
    want[order] = p[order] / p[order].sum()
    pick = generation.sampler(temperature, top_p, seed=1)
    draws = torch.tensor([pick(logits) for _ in range(4000)])
    found = torch.bincount(draws, minlength=4) / 4000
    print("largest difference", (found - want).abs().max().item())
    assert ((found > 0) == (want > 0)).all() and (found - want).abs().max() < 4 * (0.25 / 4000) ** 0.5
    again = generation.sampler(temperature, top_p, seed=1)
    assert [again(logits) for _ in range(50)] == draws[:50].tolist()
    other = generation.sampler(temperature, top_p, seed=2)
    assert kept == 1 or [other(logits) for _ in range(50)] != draws[:50].tolist()


def test_text_comes_in_whole_characters():
    tokenizer = data.Tokenizer()
    ids = tokenizer.encode([("Zoë sees 日本 .",)])[0]["input_ids"][1:-1]
    pieces = list(generation.text_as_it_comes(tokenizer, iter(ids)))
    assert "".join(pieces) == "Zoë sees 日本 ." and 3 < len(pieces) < len(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert list(generation.text_as_it_comes(tokenizer, iter([]))) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    rows = [{"query": f"say {word} .", "response": word} for word in ("dog", "cat", "cow") * 12]
    (root / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = "--task sft --scratch --width 16 --depth 1 --heads 2 --hidden 16 --threads 1 --device cpu --no-figures"
    argv += " --method full --epochs 4"
    assert train.main([*argv.split(), "--data", str(root / "f.jsonl"), "--out", str(root / "run")]) == 0
    return root / "run"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def texts(run, monkeypatch, capsys, *more, terminal=False):
    monkeypatch.setattr("sys.stdin", type("Input", (), {"buffer": io.BytesIO(b"say dog .\nsay cat .\n")}))
    capsys.readouterr()
    if terminal:
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert predict.main([str(run), "-", *more]) == 0
        return sys.stdout.getvalue().splitlines()
    assert predict.main([str(run), "-", "--format", "jsonl", *more]) == 0
    return [json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines()]


def test_predict_answers_prompts_of_standard_input_and_streams_on_a_terminal(run, monkeypatch, capsys):
    plain = texts(run, monkeypatch, capsys)
    assert len(plain) == 2
    drawn = texts(run, monkeypatch, capsys, "--temperature", "3", "--seed", "1")
    assert drawn == texts(run, monkeypatch, capsys, "--temperature", "3", "--seed", "1")
    assert drawn != texts(run, monkeypatch, capsys, "--temperature", "3", "--seed", "2") and drawn != plain
    assert texts(run, monkeypatch, capsys, "--temperature", "3", "--top-p", "0.00001") == plain  # the likeliest alone
    longer = texts(run, monkeypatch, capsys, "--temperature", "30", "--max-new", "40")
    tokenizer = data.Tokenizer()
    assert max(len(tokenizer.encode([(text,)])[0]["input_ids"]) - 2 for text in longer) > 5
    monkeypatch.undo()
    assert texts(run, monkeypatch, capsys, terminal=True) == plain
    monkeypatch.undo()
    shown = texts(run, monkeypatch, capsys, "--format", "jsonl", terminal=True)  # a layout that was asked for is kept
    assert [json.loads(line)["prediction"] for line in shown] == plain


def test_draws_near_temperature_0_are_the_likeliest_and_wrong_shares_are_one_line(run, monkeypatch, capsys):
    logits = torch.tensor([300.0, -200.0, 301.0, 0.0])
    for temperature in (1e-3, 1e-40, 1e-300):
        assert [generation.sampler(temperature)(logits) for _ in range(3)] == [2, 2, 2]
    for flags, words in [
        (["--temperature", "1", "--top-p", "0"], "--top-p 0 is not above 0 and at most 1"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p 1.5 is not above 0 and at most 1"),
        (["--top-p", "0.9"], "--top-p and --seed are of draws, which --temperature 0 makes none of"),
        (["--seed", "1"], "--top-p and --seed are of draws"),
    ]:
        assert predict.main([str(run), "-", *flags]) == 2
        err = capsys.readouterr().err
        assert err.startswith("predict.py: error: ") and words in err and err.count("\n") == 1


def test_flags_of_text_are_refused_where_no_text_is_written(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("text,label\n" + "a,x\nb,y\n" * 20)
    argv = "--text text --label label --method head --scratch --width 8 --depth 1 --heads 1 --hidden 8"
    argv += " --threads 1 --device cpu --no-figures"
    assert train.main(["--data", str(tmp_path / "t.csv"), *argv.split(), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert predict.main([str(tmp_path / "run"), str(tmp_path / "t.csv"), "--temperature", "1"]) == 2
    assert "go with a run that writes text" in capsys.readouterr().err
