import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import model as model_file
from model import (
    Cache,
    Config,
    Transformer,
    default_targets,
    generate,
    head_modules,
    load_base,
    logits,
    rope_tables,
    rotate,
    save_base,
)

KINDS = ["classification", "regression", "span", "lm"]
# (kind, causal, padding on the left); a kind of the encoder that reads the first token has none on the left.
LAYOUTS = [(kind, causal, False) for kind in KINDS for causal in (False, True)]
LAYOUTS += [("span", False, True), ("lm", False, True)] + [(kind, True, True) for kind in KINDS]


def build(kind="lm", seed=0, dtype=torch.float64, **settings):
    """A small model, every number random and large: the biases, norms and segments must matter too."""
    settings = {"vocab_size": 50, "width": 24, "depth": 2, "heads": 3, "hidden": 40} | settings
    torch.manual_seed(seed)
    model = Transformer(Config(**settings), kind, outputs=3).to(dtype).eval()
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model


def padded(rows, pad, left=False):
    """Lists of ids -> (ids, mask), both (B, T)."""
    T = max(map(len, rows))
    fill = [[pad] * (T - len(row)) for row in rows]
    ids = torch.tensor([f + row if left else row + f for f, row in zip(fill, rows)])
    lengths = torch.tensor([[len(row)] for row in rows])
    place = torch.arange(T)
    return ids, (place >= T - lengths if left else place < lengths).long()


def random_rows(seed, lengths, vocab=50):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


# ------------------------------------------------------------------ against a reference


def reference(model, ids, types):
    """Logits of one text (T,) in plain loops over heads and positions, from the weights alone."""
    w = {name: p.detach() for name, p in model.state_dict().items()}
    c = model.config
    T, dim = len(ids), c.width // c.heads

    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def turned(vector, t):
        out = vector.clone()
        for i in range(dim // 2):
            angle = t * 10000 ** (-2 * i / dim)
            a, b = vector[i], vector[i + dim // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + dim // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = w["embed.weight"][ids] + w["segment.weight"][types]
    for block in range(c.depth):
        name = f"blocks.{block}."
        h = norm(name + "norm1", x)
        q, k, v = (linear(name + proj, h) for proj in ("q_proj", "k_proj", "v_proj"))
        y = torch.zeros_like(x)
        for head in range(c.heads):
            part = slice(head * dim, (head + 1) * dim)
            for t in range(T):
                seen = range(t + 1 if c.causal else T)
                s = torch.stack([turned(q[t, part], t) @ turned(k[u, part], u) for u in seen])
                e = torch.exp(s / math.sqrt(dim))
                y[t, part] = sum(e[u] / e.sum() * v[u, part] for u in seen)
        x = x + linear(name + "o_proj", y)
        h = linear(name + "up_proj", norm(name + "norm2", x))
        x = x + linear(name + "down_proj", 0.5 * h * (1 + torch.erf(h / math.sqrt(2))))
    x = norm("norm", x)
    if model.kind == "lm":
        return x @ w["embed.weight"].T
    x = linear("head", x)
    if model.kind == "span":
        return x
    x = x[-1] if c.causal else x[0]
    return x[0] if model.kind == "regression" else x


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_softmax_rope_and_gelu_written_by_hand(kind, causal):
    model = build(kind, causal=causal)
    ids, types = torch.randint(50, (2, 7)), torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * 2)
    got = model(ids, token_type_ids=types)
    want = torch.stack([reference(model, row, types[0]) for row in ids])
    assert want.abs().max() > 0.1 and not torch.allclose(want[0], want[1], atol=0.01)
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    assert error < 1e-12, error


def test_without_rotation_the_outputs_are_others(monkeypatch):
    """Guards the test above: the positions matter in it."""
    model = build("span")
    ids = torch.randint(50, (1, 7))
    with_positions = model(ids)
    monkeypatch.setattr(model_file, "rotate", lambda x, cos, sin: x)
    without = model(ids)
    assert (with_positions - without).abs().max() > 0.01


def test_rope_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = rope_tables(40, 8, torch.float64, "cpu")
    score = rotate(q.expand(40, 8), cos, sin) @ rotate(k.expand(40, 8), cos, sin).T  # (40, 40)
    for s, t in [(5, 3), (9, 1), (0, 7), (12, 12)]:
        error = (score[s, t] - score[s + 20, t + 20]).abs().item()
        assert error < 1e-12, error
    assert abs(score[12, 12] - q @ k) < 1e-12
    assert (score[5, 3] - score[5, 4]).abs() > 1e-3 and (score[5, 3] - score[3, 5]).abs() > 1e-3


def test_rope_keeps_lengths():
    torch.manual_seed(0)
    x = torch.randn(30, 8, dtype=torch.float64)
    y = rotate(x, *rope_tables(30, 8, torch.float64, "cpu"))
    assert not torch.equal(x, y)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)


def test_rope_tables_of_bfloat16_are_the_rounded_exact_ones():
    """Counted in bfloat16, position 257 would be 256."""
    exact = rope_tables(600, 8, torch.float64, "cpu")
    for got, want in zip(rope_tables(600, 8, torch.bfloat16, "cpu"), exact):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().max() < 2**-8


# ----------------------------------------------------------------------------- padding


@pytest.mark.parametrize("kind, causal, left", LAYOUTS)
def test_padded_batch_gives_the_logits_of_the_unpadded_rows(kind, causal, left):
    """On the left too: rotary positions are relative, so a shifted text is the same text."""
    model = build(kind, causal=causal)
    for seed in range(3):
        rows = random_rows(seed, [9, 4, 1, 6])
        ids, mask = padded(rows, pad=0, left=left)
        got = model(ids, mask)
        assert got.isfinite().all()
        for row, y, keep in zip(rows, got, mask.bool()):
            want = model(torch.tensor([row]))[0]
            error = ((y[keep] if kind in ("span", "lm") else y) - want).abs().max().item()
            assert error < 1e-12, error


@pytest.mark.parametrize("kind, causal, left", LAYOUTS)
def test_ids_and_types_at_padding_change_nothing(kind, causal, left):
    model = build(kind, causal=causal)
    ids, mask = padded(random_rows(0, [9, 4, 1, 6]), pad=0, left=left)
    types = torch.zeros_like(ids)
    other = torch.where(mask == 0, torch.randint(1, 50, ids.shape), ids)
    one, two = model(ids, mask, types), model(other, mask, 1 - mask)
    if kind in ("span", "lm"):
        one, two = one[mask.bool()], two[mask.bool()]
    assert torch.equal(one, two)
    unmasked = [model(x, torch.ones_like(mask)) for x in (ids, other)]
    assert not torch.equal(*unmasked)  # so it was the mask that hid them


def test_mask_of_ones_is_no_mask():
    for causal in (False, True):
        model = build("lm", causal=causal)
        ids = torch.randint(50, (3, 8))
        error = (model(ids, torch.ones_like(ids)) - model(ids)).abs().max().item()
        assert error < 1e-12, error


def test_no_gradient_reaches_the_padding():
    for causal in (False, True):
        model = build("classification", causal=causal)
        ids, mask = padded([[1, 2, 3, 4, 5], [6, 7]], pad=49)
        model(ids, mask).square().sum().backward()
        assert (model.embed.weight.grad[1:8].abs().amax(1) > 0).all()
        assert (model.embed.weight.grad[49] == 0).all()


def test_pooling_reads_the_first_token_or_the_last_unpadded_one():
    ids, mask = padded([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], pad=0)
    encoder, decoder = build("classification"), build("classification", causal=True)
    torch.testing.assert_close(encoder(ids, mask), encoder.head(encoder.encode(ids, mask)[:, 0]))
    h = decoder.encode(ids, mask)
    torch.testing.assert_close(decoder(ids, mask), decoder.head(h[[0, 1, 2], [4, 1, 2]]))
    torch.testing.assert_close(decoder(ids), decoder.head(decoder.encode(ids)[:, -1]))
    assert not torch.allclose(h[1, 1], h[1, 4])


# --------------------------------------------------------------------------- causality


def test_later_token_changes_no_earlier_logit_of_the_decoder():
    model = build("lm", causal=True)
    ids = torch.randint(50, (2, 8))
    for t in range(8):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % 50
        for mask in (None, torch.ones_like(ids)):
            before, after = model(ids, mask), model(other, mask)
            assert torch.equal(before[:, :t], after[:, :t])
            assert ((before[:, t:] - after[:, t:]).abs().amax(-1) > 1e-6).all()


def test_every_token_changes_every_logit_of_the_encoder():
    model = build("lm")
    ids = torch.randint(50, (2, 8))
    for t in range(8):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % 50
        assert ((model(ids) - model(other)).abs().amax(-1) > 1e-6).all()


# ------------------------------------------------------------ parameters, initial values


@pytest.mark.parametrize("kind, outputs, head", [("classification", 3, 3), ("regression", 0, 1), ("span", 0, 2), ("lm", 0, 0)])
def test_parameter_counts(kind, outputs, head):
    for V, d, depth, heads, hidden in [(50, 24, 2, 3, 40), (1000, 128, 4, 4, 512), (7, 8, 1, 1, 3)]:
        model = Transformer(Config(V, d, depth, heads, hidden), kind, outputs)
        block = 4 * (d * d + d) + (hidden * d + hidden) + (d * hidden + d) + 2 * 2 * d
        want = V * d + 2 * d + depth * block + 2 * d + head * (d + 1)
        assert sum(p.numel() for p in model.parameters()) == want


def test_submodules_are_named_as_the_papers_matrices():
    names = [name for name, _ in Transformer(Config(9, 8, 1, 2, 16), "span").named_modules() if name]
    block = ["", ".norm1", ".q_proj", ".k_proj", ".v_proj", ".o_proj", ".norm2", ".up_proj", ".down_proj"]
    assert names == ["embed", "segment", "blocks", *("blocks.0" + b for b in block), "norm", "head"]


def test_default_targets_are_the_six_matrices_of_each_block_and_the_head_is_apart():
    six = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    for kind in KINDS:
        model = Transformer(Config(9, 8, 3, 2, 16), kind, 2)
        assert default_targets(model) == [f"blocks.{i}.{name}" for i in range(3) for name in six]
        assert head_modules(model) == ([] if kind == "lm" else ["head"])


def test_initial_values_are_gpt2s_with_attention_that_compares_and_copies():
    torch.manual_seed(0)
    model = Transformer(Config(2000, depth=6), "classification", 400)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for block in model.blocks:
        for name in ("v_proj", "up_proj"):
            assert getattr(block, name).weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.q_proj.weight.std().item() == pytest.approx(1 / 16, rel=0.05)  # 1 / sqrt(2 * 128)
        assert torch.equal(block.k_proj.weight, block.q_proj.weight)
        torch.testing.assert_close(block.o_proj.weight, block.v_proj.weight.T / math.sqrt(12), rtol=1e-6, atol=0.0)
        for name in ("o_proj", "down_proj"):
            assert getattr(block, name).weight.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.05)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert (p == 0).all()
        elif "norm" in name:
            assert (p == 1).all()


def test_language_model_shares_its_embedding():
    model = build("lm")
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    before = model(ids)
    model.embed.weight.data[7] *= 2  # no word of the texts
    assert before[..., 7].abs().max() > 0.1
    torch.testing.assert_close(model(ids)[..., 7], 2 * before[..., 7])
    assert torch.equal(model(ids)[..., :7], before[..., :7])
    model(ids)[..., 7].sum().backward()
    assert (model.embed.weight.grad[:9].abs().amax(1) > 0).tolist() == [False, *[True] * 7, False]


def test_positions_select_logits():
    for causal in (False, True):
        model = build("lm", causal=causal)
        ids, mask = padded(random_rows(1, [9, 4, 6]), pad=0)
        positions = (torch.rand(ids.shape) < 0.3) & mask.bool()
        assert 0 < positions.sum() < mask.sum()
        torch.testing.assert_close(model(ids, mask, positions=positions), model(ids, mask)[positions])
        batch = {"input_ids": ids, "attention_mask": mask}
        torch.testing.assert_close(logits(model, batch, positions), model(ids, mask)[positions])


# ----------------------------------------------------------------- training-time options


def test_checkpointing_gives_the_same_gradients():
    for causal, dropout in [(False, 0.0), (True, 0.0), (False, 0.3)]:
        plain = build("span", causal=causal, dropout=dropout).train()
        saving = copy.deepcopy(plain)
        saving.checkpointing = True
        recomputed = []
        saving.blocks[0].up_proj.register_forward_hook(lambda *_: recomputed.append(1))
        ids, mask = padded(random_rows(2, [9, 4, 6]), pad=0)
        for model in (plain, saving):
            torch.manual_seed(5)
            model(ids, mask).square().sum().backward()
        assert len(recomputed) == 2
        for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
            assert p.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name
            assert torch.equal(p.grad, q.grad), name


def test_dropout_acts_in_training_only_and_its_rate_may_be_set_later():
    model = build("classification", dropout=0.0)
    ids = torch.randint(50, (4, 6))
    still = model(ids)
    assert torch.equal(model.train()(ids), still)
    model.config.dropout = 0.5
    assert not torch.equal(model(ids), still)
    assert torch.equal(model.eval()(ids), still)


def test_dropout_falls_on_the_embedding_and_on_each_branch():
    model = build("lm", width=96, dropout=0.25).train()
    seen = []
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(torch.randint(50, (8, 20)))
    branches = [seen[0]] + [after - before for before, after in zip(seen, seen[1:])]
    assert len(branches) == 1 + 2 * 2
    for x in branches:
        assert (x == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_bfloat16_autocast_stays_close():
    model = build("classification", dtype=torch.float32)
    ids, mask = padded(random_rows(3, [9, 4, 6]), pad=0)
    want = model(ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, mask)
    error = (got - want).abs().max().item()
    assert got.dtype == torch.bfloat16 and 0 < error < 0.05 * want.abs().max(), error


# ----------------------------------------------------------------------------- logits()


def test_logits_have_the_kind_s_shape_and_see_the_types():
    ids, mask = padded(random_rows(4, [9, 4, 6]), pad=0)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids), "index": None}
    shapes = {"classification": (3, 3), "regression": (3,), "span": (3, 9, 2), "lm": (3, 9, 50)}
    for kind, shape in shapes.items():
        model = build(kind)
        y = logits(model, batch)
        assert y.shape == shape
        assert not torch.equal(y, logits(model, batch | {"token_type_ids": torch.ones_like(ids)}))
        assert torch.equal(y, logits(model, {"input_ids": ids, "attention_mask": mask}))


def test_span_loss_does_not_depend_on_the_padding():
    model = build("span")
    row = random_rows(5, [6])[0]
    losses = []
    for length in (6, 7, 40):
        ids, mask = padded([row, [3] * length], pad=0)
        y = logits(model, {"input_ids": ids, "attention_mask": mask})[:1]
        assert (y[:, 6:] == -math.inf).all() and y[:, :6].isfinite().all()
        loss = F.cross_entropy(y.transpose(1, 2).reshape(2, -1), torch.tensor([1, 4]))
        model.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
    assert max(losses) - min(losses) < 1e-12 and losses[0] > 0.1


# ------------------------------------------------------------------------------ generate


def test_with_a_cache_the_next_tokens_are_read_alone_and_the_logits_are_those_of_the_whole_text():
    model = build("lm", causal=True)
    rows = random_rows(6, [9, 7, 8])
    cache = Cache(3, "cpu")
    parts = [[2, 5, 1], [4, 1, 3], [3, 1, 4]]  # how many tokens of each row are read at each of three times
    begun = [0, 0, 0]
    for part in parts:
        chunks = [row[at : at + n] for row, at, n in zip(rows, begun, part)]
        got = model(padded(chunks, pad=0)[0], cache=cache)
        begun = [at + n for at, n in zip(begun, part)]
        cache.seen += torch.tensor(part)[:, None]
        for row, at, n, y in zip(rows, begun, part, got):
            whole = model(torch.tensor([row[:at]]))[0, -n:]
            error = (y[:n] - whole).abs().max().item()
            print("error", error)
            assert error < 1e-12 and (n == 1 or not torch.equal(whole[0], whole[1]))
    cache.only([2, 0])
    got = model(torch.tensor([[7], [8]]), cache=cache)[:, -1]
    for y, ids in zip(got, ([*rows[2][: begun[2]], 7], [*rows[0][: begun[0]], 8])):
        torch.testing.assert_close(y, model(torch.tensor([ids]))[0, -1], rtol=0, atol=1e-12)


def test_a_hugging_face_model_generates_by_itself_greedily_with_padding_on_the_left():
    asked = []

    class Settings(SimpleNamespace):
        pass

    class Theirs(torch.nn.Linear):
        generation_config = Settings(temperature=3.0)

        def generate(self, input_ids, attention_mask, generation_config):
            asked.append((input_ids.tolist(), attention_mask.tolist(), generation_config))
            new = torch.tensor([[9, 2, 9], [8, 8, 8]])
            return torch.cat((input_ids, new), 1)

    model = Theirs(1, 1)
    assert generate(model, [[5, 6, 7], [4]], 3, 2) == [[9], [8, 8, 8]]
    settings = Settings(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert asked == [([[5, 6, 7], [0, 0, 4]], [[1, 1, 1], [0, 0, 1]], settings)]
    assert generate(model, [], 3, 2) == [] and generate(model, [[5], [4]], 0, 2) == [[], []] and len(asked) == 1


def test_targets_too_narrow_for_an_adapter_are_left_out_with_a_word(recwarn):
    block = nn.ModuleDict({"scale": nn.Linear(1, 4), "proj": nn.Linear(4, 2), "gate": nn.Linear(4, 1), "fold": nn.Linear(2, 4)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block, copy.deepcopy(block)]), "head": nn.Linear(4, 1)})
    assert default_targets(model) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("proj", "fold")]
    assert [str(w.message) for w in recwarn.list] == ["too narrow for an adapter, left out: gate, scale"]


def test_a_prompt_is_read_once_and_a_wrong_draft_costs_few_tokens():
    model = build("lm", causal=True)
    prompts, read = random_rows(6, [5, 1, 8, 3]), []
    model.embed.register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    plain = generate(model, prompts, max_new=30, stop_id=-1)
    assert read == [8] + [1] * 29
    read.clear()
    assert generate(model, prompts, 30, -1, drafts=[[49] * 29] * 4) == plain and 49 not in sum(plain, [])
    assert read == [8 + 29] + [1 + 8] * 20 + [1 + n for n in range(8, -1, -1)]


def test_generate_is_the_argmax_loop():
    model = build("lm", causal=True)
    prompts = random_rows(6, [5, 1, 8, 3])
    got = generate(model, prompts, max_new=7, stop_id=-1)
    for prompt, new in zip(prompts, got):
        ids = list(prompt)
        for _ in range(7):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        assert new == ids[len(prompt) :]
    assert len({tuple(new) for new in got}) == 4


def test_generate_stops_at_the_stop_id_and_leaves_it_out():
    model = build("lm", causal=True)
    prompts = random_rows(6, [5, 1, 8, 3])
    free = generate(model, prompts, max_new=7, stop_id=-1)
    stop = free[0][3]
    want = [new[: new.index(stop)] if stop in new else new for new in free]
    assert generate(model, prompts, max_new=7, stop_id=stop) == want
    assert len(want[0]) <= 3 and any(len(new) > len(want[0]) for new in want)
    assert generate(model, prompts, max_new=0, stop_id=stop) == [[], [], [], []]
    assert generate(model, [], max_new=3, stop_id=stop) == []


def test_drafts_change_nothing_that_is_generated_and_save_forwards_where_they_are_right():
    torch.manual_seed(2)
    model = Transformer(Config(40, width=16, depth=2, heads=2, hidden=64, causal=True)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=2.0)  # so that the choice depends on the text
    prompts = [torch.randint(40, (n,)).tolist() for n in (3, 5, 4, 6, 3, 7)]
    stop = generate(model, prompts, 8, -1)[0][4]
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))

    def generated(drafts=None):
        forwards.clear()
        return generate(model, prompts, 8, stop, drafts), len(forwards)

    plain, steps = generated()
    assert len(set(map(tuple, plain))) == 6 and min(map(len, plain)) < max(map(len, plain)) == steps == 8
    right = [ids + [stop] * (len(ids) < 8) for ids in plain]
    one_wrong = [ids[: k % len(ids)] + [39] + ids[k % len(ids) + 1 :] for k, ids in enumerate(right)]
    for drafts, needed in [
        (right, 1), (one_wrong, 2), ([ids[:-3] for ids in right], 3), ([ids + [1, 2] for ids in right], 1),
        ([[39, 39, 39]] * 6, 8), ([[]] * 6, 8), ([right[0], *[[]] * 5], 8),
    ]:  # fmt: skip
        kept = [list(draft) for draft in drafts]
        assert generated(drafts) == (plain, needed)
        assert drafts == kept


# ------------------------------------------------------------------------------- on disk


def test_saved_base_comes_back_in_float16_precision_under_any_head(tmp_path):
    for causal in (False, True):
        model = build("lm", causal=causal, dtype=torch.float32, dropout=0.1)
        for p in model.parameters():
            p.data = p.data.half().float()  # so that float16 loses nothing
        path = tmp_path / "base.safetensors"
        save_base(model, path)
        assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]
        ids = torch.randint(50, (2, 6))
        for kind in KINDS:
            loaded = load_base(path, kind, outputs=3).eval()
            assert loaded.kind == kind and loaded.config == model.config
            assert all(p.dtype == torch.float32 for p in loaded.parameters())
            assert torch.equal(loaded.encode(ids), model.encode(ids))
            assert model.encode(ids).abs().max() > 0.1


def test_head_is_not_saved_and_is_new_at_every_load(tmp_path):
    path = tmp_path / "base.safetensors"
    save_base(build("classification"), path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(Transformer(Config(50, 24, 2, 3, 40)).state_dict())
    one, two = load_base(path, "classification", 3), load_base(path, "classification", 3)
    assert not torch.equal(one.head.weight, two.head.weight)
    assert one.head.weight.abs().max() < 0.2  # drawn at 0.02; the saved model's is at 0.4
    assert torch.equal(one.embed.weight, two.embed.weight)


def test_saving_leaves_the_model_alone_and_overflow_leaves_the_file_alone(tmp_path):
    model = build("lm")
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "base.safetensors"
    save_base(model, path)
    good = path.read_bytes()
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float64 and torch.equal(p, before[name])
    model.embed.weight.data[3, 3] = 1e6
    with pytest.raises(ValueError, match="embed.weight.*float16"):
        save_base(model, path)
    assert path.read_bytes() == good


def test_wrong_files_are_refused_in_one_line(tmp_path):
    good, path = tmp_path / "good.safetensors", tmp_path / "base.safetensors"
    model = build("lm")
    save_base(model, good)
    whole = good.read_bytes()
    cases = {
        "not a whole safetensors file": [
            b"", b"hello", whole[:-1], whole[: len(whole) // 2], whole[:5], whole + b"x",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ]
    }  # fmt: skip
    for message, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            assert message in refused(path)
    save_file({"x": torch.zeros(2)}, path)
    assert "not written by save_base" in refused(path)
    save_file({"x": torch.zeros(2)}, path, {"format": "pt"})
    assert "not written by save_base" in refused(path)
    for config in ('{"vocab_size": 50, "colour": 3}', "{}", '{"vocab_size": 50}'):
        save_file(model.state_dict(), path, {"transformer": config})
        assert "not those of its config" in refused(path)
    assert "no such file" in refused(tmp_path / "nowhere.safetensors")
    assert "no such file" in refused(tmp_path)


def refused(path):
    with pytest.raises(ValueError) as error:
        load_base(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "config, kind, outputs, message",
    [
        (Config(9, width=12, heads=4), "lm", 0, "width 12"),
        (Config(9), "sentence", 0, "'sentence'"),
        (Config(9), "classification", 1, "outputs >= 2"),
    ],
)
def test_impossible_models_are_refused(config, kind, outputs, message):
    with pytest.raises(ValueError, match=message):
        Transformer(config, kind, outputs)


# ------------------------------------------------------------------ what no wrong line may pass


def test_the_defaults_are_the_base_s_sizes():
    assert Config(9) == Config(9, width=128, depth=4, heads=4, hidden=512, causal=False, dropout=0.0)
    model = Transformer(Config(9))
    assert model.kind == "lm" and not model.checkpointing


@pytest.mark.parametrize(
    "config, kind, message",
    [
        (Config(9, width=12, heads=4), "lm", "width 12 is not a multiple of 2 * heads = 8"),
        (Config(9), "classification", "classification needs outputs >= 2, not 0"),
        (Config(9), "sentence", "kind 'sentence' is unknown: use one of classification, regression, span, lm"),
    ],
)
def test_impossible_models_are_refused_in_these_words(config, kind, message, tmp_path):
    with pytest.raises(ValueError) as error:
        Transformer(config, kind)
    assert str(error.value) == message
    save_base(build(), tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="classification needs outputs >= 2, not 0"):
        load_base(tmp_path / "base.safetensors", "classification")


def test_every_new_tensor_is_made_on_the_models_device():
    """Whatever is made without saying where would be on the default device: here one that holds no numbers."""
    ids, mask = padded(random_rows(3, [9, 4, 6]), pad=0)
    models = {(kind, causal): build(kind, causal=causal) for kind in KINDS for causal in (False, True)}
    expected = {key: model(ids, mask) for key, model in models.items()}
    new = generate(models["lm", True], [[1, 2], [3]], 4, -1, [[5], []])
    with torch.device("meta"):
        assert torch.ones(1).is_meta
        for key, model in models.items():
            assert torch.equal(model(ids, mask), expected[key])
        assert generate(models["lm", True], [[1, 2], [3]], 4, -1, [[5], []]) == new


def test_rotation_keeps_the_dtype_of_what_is_turned():
    """Under autocast q and k are bfloat16 and the tables are float32."""
    torch.manual_seed(0)
    x, tables = torch.randn(5, 8, dtype=torch.bfloat16), rope_tables(5, 8, torch.float32, "cpu")
    assert rotate(x, *tables).dtype == torch.bfloat16
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


def test_blocks_are_checkpointed_when_asked_and_a_gradient_is_wanted(monkeypatch):
    calls = []

    def seen(block, *inputs, **options):
        calls.append(options)
        return block(*inputs)

    monkeypatch.setattr(model_file, "checkpoint", seen)
    model, ids = build(), torch.randint(50, (2, 5))
    for checkpointing, grad, count in [(False, True, 0), (True, False, 0), (False, False, 0), (True, True, 2)]:
        calls.clear()
        model.checkpointing = checkpointing
        with torch.set_grad_enabled(grad):
            model(ids)
        assert calls == [{"use_reentrant": False}] * count


class Foreign(nn.Module):
    """A model as Hugging Face's are: keywords in, an object with attributes out that says what it contains."""

    def __init__(self, outputs, **config):
        super().__init__()
        self.config, self.outputs, self.seen = SimpleNamespace(**config), outputs, None

    def forward(self, **inputs):
        self.seen = inputs
        return type("Output", (dict,), {"__getattr__": dict.__getitem__})(self.outputs)


def test_logits_of_a_foreign_model_have_our_shapes():
    torch.manual_seed(0)
    ids = torch.randint(50, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    classes, one, words = torch.randn(3, 2), torch.randn(3, 1), torch.randn(3, 7, 50)
    assert torch.equal(logits(Foreign({"logits": classes}), batch), classes)
    assert torch.equal(logits(Foreign({"logits": one}), batch), one[:, 0])
    assert torch.equal(logits(Foreign({"logits": words}), batch), words)
    few = words[:, :1]  # (B, 1, V) is no regression
    assert torch.equal(logits(Foreign({"logits": few}), batch), few)
    positions = torch.rand(3, 7) < 0.3
    assert 0 < positions.sum() < 21
    assert torch.equal(logits(Foreign({"logits": words}), batch, positions), words[positions])
    start, end = torch.randn(2, 3, 7)
    y = logits(Foreign({"start_logits": start, "end_logits": end}), batch)
    expected = torch.stack([start, end], 2)
    expected[1, 4:] = -math.inf
    assert torch.equal(y, expected)
    y = logits(Foreign({"start_logits": start, "end_logits": end}), {"input_ids": ids})
    assert torch.equal(y, torch.stack([start, end], 2))


def test_a_foreign_model_is_given_what_its_config_asks_for():
    ids, types = torch.randint(50, (3, 7)), torch.zeros(3, 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "labels": ids}
    plain = {"input_ids", "attention_mask"}
    for config, expected in [
        ({}, plain),
        ({"type_vocab_size": 1}, plain),  # RoBERTa's
        ({"type_vocab_size": 2}, plain | {"token_type_ids"}),  # BERT's
        ({"use_cache": False}, plain),
        ({"use_cache": True}, plain | {"use_cache"}),  # GPT-2's
    ]:
        model = Foreign({"logits": torch.zeros(3, 2)}, **config)
        logits(model, batch)
        assert set(model.seen) == expected and model.seen["input_ids"] is ids
        assert model.seen["attention_mask"] is batch["attention_mask"]
        assert model.seen.get("use_cache", False) is False and model.seen.get("token_type_ids", types) is types


def test_a_compiled_transformer_is_still_ours():
    class Compiled(nn.Module):  # torch.compile keeps the model as _orig_mod and passes attributes on
        def __init__(self, model):
            super().__init__()
            self._orig_mod, self.config, self.kind = model, model.config, model.kind

        def forward(self, **inputs):
            return self._orig_mod(**inputs)

    ids, mask = padded(random_rows(4, [9, 4, 6]), pad=0)
    for kind in KINDS:
        model, batch = build(kind), {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(logits(Compiled(model), batch), logits(model, batch))


def test_generating_makes_plain_ids_without_a_graph_and_nothing_where_nothing_is_wanted():
    model, passes = build("lm", causal=True), []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    assert generate(model, [[1, 2], [3]], 0, -1) == [[], []] and not passes
    new = generate(model, [[1, 2], [3]], 3, -1)
    assert passes == [False] * 3 and torch.is_grad_enabled()
    assert [[type(i) for i in ids] for ids in new] == [[int] * 3] * 2


def test_targets_are_in_lists_of_blocks_and_heads_are_not():
    linear = lambda: nn.Linear(4, 4)  # noqa: E731
    model = nn.ModuleDict({
        "blocks": nn.ModuleList([linear(), nn.Sequential(linear())]), "embed": nn.Embedding(4, 4),
        "pooler": nn.Sequential(nn.Tanh(), linear()), "classifier": linear(), "lm_head": linear(),
    })  # fmt: skip
    assert default_targets(model) == ["blocks.0", "blocks.1.0"]
    assert head_modules(model) == ["pooler", "classifier", "lm_head"]
    model.get_output_embeddings = lambda: model["lm_head"]
    model.new_modules = ["encoder.pooler"]
    assert head_modules(model) == ["pooler", "classifier", "encoder.pooler"]
