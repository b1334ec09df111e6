import copy
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from baselines import lora  # noqa: E402
from harness.backbones import delinearize, linearize, load, set_checkpointing  # noqa: E402
from harness.run import positions  # noqa: E402
from model import Config, Transformer, default_targets, generate, head_modules, logits  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VOCAB = 40
BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 40,
}  # fmt: skip
DEBERTA = BERT | {"relative_attention": True, "position_biased_input": False, "type_vocab_size": 0}
BUCKETS = {"pos_att_type": "p2c|c2p", "position_buckets": 4, "norm_rel_ebd": "layer_norm"}
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
OPT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
    "max_position_embeddings": 40, "word_embed_proj_dim": 16,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EOS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}

T5_IDS = IDS | {"decoder_start_token_id": 0}

ENDS = ["attention.output.dense", "intermediate.dense", "output.dense"]
SELF = [f"attention.self.{name}" for name in ("query", "key", "value")]
DEBERTA_SELF = [f"attention.self.{name}" for name in ("in_proj", "pos_proj", "pos_q_proj")]
DEBERTA_V3_SELF = [f"attention.self.{name}" for name in ("query_proj", "key_proj", "value_proj")]
DEBERTA_V2_SELF = DEBERTA_V3_SELF + ["attention.self.pos_key_proj", "attention.self.pos_query_proj"]
OPT_ALL = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
LLAMA_ALL = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
GPT2_ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]

# family: class of the published checkpoint, its config, where the blocks are, a block's linear layers
FAMILIES = {
    "roberta": (
        "RobertaForMaskedLM",
        BERT | IDS | {"type_vocab_size": 1},
        "roberta.encoder.layer",
        SELF + ENDS,
    ),
    "bert": ("BertForPreTraining", BERT | IDS, "bert.encoder.layer", SELF + ENDS),
    "deberta": (
        "DebertaForMaskedLM",
        DEBERTA | IDS | {"pos_att_type": "c2p|p2c"},
        "deberta.encoder.layer",
        DEBERTA_SELF + ENDS,
    ),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        DEBERTA | IDS | BUCKETS | {"share_att_key": False, "conv_kernel_size": 3},
        "deberta.encoder.layer",
        DEBERTA_V2_SELF + ENDS,
    ),
    "deberta-v3": (
        "DebertaV2ForMaskedLM",
        DEBERTA | IDS | BUCKETS | {"share_att_key": True},
        "deberta.encoder.layer",
        DEBERTA_V3_SELF + ENDS,
    ),
    "opt": ("OPTForCausalLM", OPT | IDS, "model.decoder.layers", OPT_ALL),
    "t5": ("T5ForConditionalGeneration", T5 | T5_IDS, None, None),  # see t5_targets
    "t5-gated": (
        "T5ForConditionalGeneration",
        T5 | T5_IDS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        None,
        None,
    ),
    "llama": ("LlamaForCausalLM", BERT | EOS | {"tie_word_embeddings": True}, "model.layers", LLAMA_ALL),
    "mistral": ("MistralForCausalLM", BERT | EOS | {"num_key_value_heads": 1}, "model.layers", LLAMA_ALL),
    "gpt2": ("GPT2LMHeadModel", GPT2 | EOS, "transformer.h", GPT2_ALL),
}
DECODERS = ["opt", "llama", "mistral", "gpt2"]
CASES = [(f, kind) for f in FAMILIES for kind in ("classification", "regression", "span")]
CASES += [(f, "lm") for f in DECODERS]
every_case = pytest.mark.parametrize("family, kind", CASES)
LABELS = ("no", "maybe", "yes")


def t5_targets(prefix, gated):
    attention = ["q", "k", "v", "o"]
    dense = ["wi_0", "wi_1", "wo"] if gated else ["wi", "wo"]
    encoder = [("SelfAttention", attention), ("DenseReluDense", dense)]
    decoder = [("SelfAttention", attention), ("EncDecAttention", attention), ("DenseReluDense", dense)]
    return [
        f"{prefix}{side}.block.{block}.layer.{i}.{part}.{name}"
        for side, layers in (("encoder", encoder), ("decoder", decoder))
        for block in range(2)
        for i, (part, names) in enumerate(layers)
        for name in names
    ]


def build_tokenizer(family):
    """Words w3 .. w39 are the ids 3 .. 39. Encoders wrap a text, T5 ends it, decoders begin it."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = {
        "t5": ("$A </s>", "$A </s> $B </s>"),
        "decoder": ("<s> $A", "<s> $A <s> $B"),
        "encoder": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    }["t5" if family.startswith("t5") else "decoder" if family in DECODERS else "encoder"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    if FAMILIES[family][1]["pad_token_id"] is not None:
        names["pad_token"] = "<pad>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build_model(family, name=None):
    """A model as its makers would publish it, with weights so large that everything in it matters."""
    model_class = getattr(transformers, name or FAMILIES[family][0])
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**FAMILIES[family][1]))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.2
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> a folder with its weights and its tokenizer."""
    folders = {}

    def get(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            build_model(family).save_pretrained(folders[family])
            build_tokenizer(family).save_pretrained(folders[family])
        return folders[family]

    return get


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """loaded(family, kind) -> (a fresh model, its tokenizer, a batch of three texts of unequal lengths)."""
    kept = {}

    def get(family, kind):
        if (family, kind) not in kept:
            torch.manual_seed(1)
            model, tokenizer = load(checkpoint(family), kind, LABELS if kind == "classification" else ())
            for p in head_parameters(model).values():
                nn.init.normal_(p, std=0.3)
            kept[family, kind] = model, tokenizer
        model, tokenizer = kept[family, kind]
        first = ["w5 w6 w7 w8 w9", "w10 w11", "w12 w13 w14"]
        second = ["w15 w16", "w17", "w18 w19 w20"]
        texts = (first,) if kind == "lm" else (first, second)
        batch = tokenizer(*texts, padding=True, return_tensors="pt", return_token_type_ids=True)
        return copy.deepcopy(model), tokenizer, dict(batch)

    return get


def head_parameters(model):
    return {n: p for head in head_modules(model) for n, p in model.get_submodule(head).named_parameters(head)}


def loss_of(model, kind, batch):
    y = logits(model, batch)
    if kind == "classification":
        return F.cross_entropy(y, torch.tensor([0, 2, 1]))
    if kind == "regression":
        return F.mse_loss(y, torch.tensor([0.5, -1.0, 2.0]))
    if kind == "span":  # a softmax over the tokens would give the head's bias no gradient
        return y[batch["attention_mask"].bool()].square().mean()
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(y[:, :-1].flatten(0, 1), labels.flatten())


# -------------------------------------------------------------- every family, every kind


@every_case
def test_logits_have_the_kind_s_shape(loaded, family, kind):
    model, tokenizer, batch = loaded(family, kind)
    B, T = batch["input_ids"].shape
    y = logits(model, batch)
    shapes = {"classification": (B, 3), "regression": (B,), "span": (B, T, 2), "lm": (B, T, VOCAB)}
    assert y.shape == shapes[kind]
    assert y.dtype == torch.float32 and not any(m.training for m in model.modules())
    assert (batch["attention_mask"].sum(1) < T).any()
    if kind == "classification":
        assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
        assert model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}


@every_case
def test_default_targets_are_all_linear_layers_of_the_blocks_and_the_head_is_apart(loaded, family, kind):
    model, _, _ = loaded(family, kind)
    if family.startswith("t5"):
        want = t5_targets("" if kind == "span" else "transformer.", gated=family == "t5-gated")
        assert len(want) == 2 * (6 + 10) + 2 * 2 * (family == "t5-gated")
    else:
        blocks, names = FAMILIES[family][2:]
        if (family, kind) == ("llama", "span"):
            blocks = "transformer.layers"  # LlamaForQuestionAnswering alone calls it so
        want = [f"{blocks}.{i}.{name}" for i in range(2) for name in names]
    assert default_targets(model) == want
    if kind == "span":
        assert head_modules(model) == ["qa_outputs"]
    elif kind == "lm":
        assert head_modules(model) == []
    elif family.startswith("t5"):
        assert head_modules(model) == ["classification_head"]
    elif family.startswith("deberta"):
        assert head_modules(model) == ["pooler", "classifier"]
    else:
        assert head_modules(model) == ["score" if family in DECODERS else "classifier"]


@every_case
def test_weights_are_the_checkpoint_s(checkpoint, loaded, family, kind):
    published = load_file(checkpoint(family) / "model.safetensors")
    model, _, _ = loaded(family, kind)
    for name in default_targets(model):
        # The classes of a family call the model in them "model", "transformer" or not at all.
        inner = name.partition(".")[2]
        (key,) = {f"{n}.weight" for n in (name, inner, f"model.{inner}")} & set(published)
        want = published[key].T if family == "gpt2" else published[key]
        assert torch.equal(model.get_submodule(name).weight, want), name
    words = [p for p in published.values() if p.shape == (VOCAB, 16)]
    assert any(torch.equal(model.get_input_embeddings().weight, p) for p in words)


@every_case
def test_lora_starts_as_the_identity_trains_adapter_and_head_alone_and_merges(loaded, family, kind):
    model, _, batch = loaded(family, kind)
    with torch.no_grad():  # T5's attention takes another kernel, and rounds otherwise, where its bias trains
        plain = logits(model, batch)
        targets = default_targets(model)
        assert lora.inject(model, targets, rank=2, alpha=8.0) == targets
        assert torch.equal(logits(model, batch), plain)

    heads = head_parameters(model)
    for p in heads.values():
        p.requires_grad = True
    trained = {f"{name}.{factor}" for name in targets for factor in "AB"} | set(heads)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    assert tied == (kind == "lm" and family != "mistral")
    optimizer = torch.optim.SGD(lora.param_groups(model, lr=0.05, weight_decay=0.0), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, kind, batch).backward()
        optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained

    adapted = logits(model, batch)
    finite = adapted.isfinite()
    assert (adapted - plain)[finite].abs().max() > 1e-3
    lora.merge(model)
    error = (logits(model, batch) - adapted)[finite].abs().max().item()
    assert error < 1e-5, error
    assert default_targets(model) == targets
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@every_case
def test_padding_changes_no_logit(loaded, family, kind):
    model, tokenizer, batch = loaded(family, kind)
    got = logits(model, batch)
    for i, length in enumerate(batch["attention_mask"].sum(1)):
        row = {name: x[i : i + 1, :length] for name, x in batch.items()}
        assert row["attention_mask"].all()
        want = logits(model, row)[0]
        y = got[i, :length] if kind in ("span", "lm") else got[i]
        error = (y - want).abs().max().item()
        assert error < 1e-5 and want.abs().max() > 0.05, error
        if kind == "span":
            assert (got[i, length:] == -math.inf).all()
    assert batch["attention_mask"].sum(1).unique().numel() > 1


@every_case
def test_checkpointing_gives_the_same_gradients(loaded, family, kind):
    model, _, batch = loaded(family, kind)
    targets = lora.inject(model, default_targets(model), rank=2, alpha=8.0)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.1)
    calls = []
    model.get_submodule(targets[0]).register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for recompute in (False, True):
        if recompute:
            set_checkpointing(model)
        model.train().zero_grad()
        torch.manual_seed(3)  # dropout is on
        loss_of(model, kind, batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    once = len(calls) // 3  # DeBERTa-v3 puts its positions through the same layer as its tokens
    assert len(calls) == 3 * once > 0  # one forward without, and one forward and one backward with
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("family", ["roberta", "bert", "llama"])
def test_a_heads_own_classes_come_in_our_order(family, tmp_path, checkpoint):
    theirs = build_model(family, {"roberta": "Roberta", "bert": "Bert", "llama": "Llama"}[family] + "ForSequenceClassification")
    theirs.config.id2label = {0: "YES", 1: "NO", 2: "MAYBE"}
    theirs.config.label2id = {label: i for i, label in theirs.config.id2label.items()}
    width = next(m for m in theirs.modules() if isinstance(m, nn.Linear) and m.out_features != 3).in_features
    head = theirs.score if family == "llama" else theirs.classifier if family == "bert" else theirs.classifier.out_proj
    if head.out_features != 3:
        new = nn.Linear(width, 3, bias=head.bias is not None)
        if family == "llama":
            theirs.score = new
        elif family == "bert":
            theirs.classifier = new
        else:
            theirs.classifier.out_proj = new
        theirs.config.num_labels = 3
        theirs.config.id2label, theirs.num_labels = {0: "YES", 1: "NO", 2: "MAYBE"}, 3
    theirs.save_pretrained(tmp_path)
    build_tokenizer(family).save_pretrained(tmp_path)
    ours, _ = load(tmp_path, "classification", LABELS)  # no, maybe, yes
    ids = torch.tensor([[1, 5, 6, 7]])
    want, got = theirs.eval()(ids).logits, ours(ids).logits
    assert (want[0, 0] - want[0, 1]).abs() > 1e-3
    torch.testing.assert_close(got, want[:, [1, 2, 0]], rtol=0, atol=1e-5)
    same, _ = load(tmp_path, "classification", ("a", "b", "c"))  # other names: as they come
    torch.testing.assert_close(same(ids).logits, want, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------- the language models


@pytest.mark.parametrize("family", DECODERS)
def test_generate_is_transformers_own_greedy_search(loaded, family):
    model, tokenizer, _ = loaded(family, "lm")
    prompts = [[1, 5, 6, 7, 8], [1, 9], [1, 10, 11]]
    got = generate(model, prompts, max_new=6, stop_id=2)
    for prompt, new in zip(prompts, got):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        want = want[0, len(prompt) :].tolist()
        assert new == (want[: want.index(2)] if 2 in want else want)
    assert len({tuple(new) for new in got}) > 1


@pytest.mark.parametrize("family", DECODERS)
def test_positions_select_logits(loaded, family):
    model, _, batch = loaded(family, "lm")
    positions = torch.zeros_like(batch["input_ids"]).bool()
    positions[0, 3] = positions[2, 1] = True
    assert torch.equal(logits(model, batch, positions), logits(model, batch)[[0, 2], [3, 1]])


def test_no_keys_and_values_are_kept_for_a_next_call(loaded):
    for family, kind in [(family, "lm") for family in DECODERS] + [("t5", "classification"), ("t5", "span")]:
        model, _, batch = loaded(family, kind)
        outputs = []
        model.register_forward_hook(lambda module, args, output: outputs.append(output))
        logits(model, batch)
        model(input_ids=batch["input_ids"])
        assert [output.past_key_values is None for output in outputs] == [True, False], family


# ------------------------------------------------------------------------------ GPT-2's Conv1D


def test_gpt2_as_linear_layers_computes_what_transformers_does_and_goes_back_to_the_bit(checkpoint, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(checkpoint("gpt2")).eval()
    ours, _ = load(checkpoint("gpt2"), "lm")
    ids = torch.randint(VOCAB, (2, 9))
    want = theirs(input_ids=ids).logits
    error = (logits(ours, {"input_ids": ids}) - want).abs().max().item()
    assert error < 1e-5 and want.abs().max() > 1, error
    assert {type(ours.get_submodule(name)) for name in default_targets(ours)} == {nn.Linear}
    assert default_targets(theirs) == []

    layer = "transformer.h.1.mlp.c_fc"
    ours.get_submodule(layer).weight.data[3, 5] += 1  # output 3, input 5
    delinearize(ours)
    ours.save_pretrained(tmp_path)
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
    for name, p in theirs.state_dict().items():
        if name == layer + ".weight":
            p = p.clone()
            p[5, 3] += 1
        assert torch.equal(back[name], p), name
    linearize(ours)
    assert len(default_targets(ours)) == 8


def test_linearize_leaves_other_models_alone(loaded):
    model, _, _ = loaded("deberta-v2", "span")  # has nn.Conv1d, which is another thing
    kinds = [type(m) for m in model.modules()]
    linearize(model)
    delinearize(model)
    assert [type(m) for m in model.modules()] == kinds and nn.Conv1d in kinds


# -------------------------------------------------------------- heads, types, tokenizers, precision


def test_head_of_the_checkpoint_is_kept_if_it_fits_and_new_if_not(checkpoint, tmp_path):
    first, tokenizer = load(checkpoint("roberta"), "classification", LABELS)
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path, "classification", LABELS)
    other, _ = load(tmp_path, "classification", ("no", "yes"))
    for name, p in first.state_dict().items():
        assert torch.equal(p, again.state_dict()[name])
        if name.startswith("classifier.out_proj"):
            assert other.state_dict()[name].shape[0] == 2
        else:
            assert torch.equal(p, other.state_dict()[name])


def test_loading_is_quiet(checkpoint, caplog, capsys, monkeypatch):
    """transformers reports the new head and draws a bar for the weights; load has looked at both."""
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "handlers", [caplog.handler])
    load(checkpoint("bert"), "span")
    assert not caplog.records and capsys.readouterr() == ("", "")
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    transformers.BertForQuestionAnswering.from_pretrained(checkpoint("bert"))
    assert caplog.records and "Loading weights" in capsys.readouterr().err


def test_same_seed_same_new_head(checkpoint):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(load(checkpoint("bert"), "classification", LABELS)[0].classifier.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_pooler_of_bert_is_trained_only_if_the_checkpoint_lacks_it(checkpoint, tmp_path):
    """A masked language model has none: the one that the classifier needs is drawn at random."""
    model, tokenizer = load(checkpoint("bert"), "classification", LABELS)
    assert head_modules(model) == ["classifier"]
    build_model("bert", "BertForMaskedLM").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, "classification", LABELS)
    assert head_modules(copy.deepcopy(model)) == ["classifier", "bert.pooler.dense"]
    assert head_modules(load(tmp_path, "span")[0]) == ["qa_outputs"]


def test_token_types_reach_those_models_that_have_them(loaded):
    for family in ("bert", "roberta", "deberta", "gpt2", "t5"):
        model, _, batch = loaded(family, "classification")
        y = logits(model, batch)
        other = logits(model, batch | {"token_type_ids": 1 - batch["token_type_ids"]})
        assert torch.equal(y, other) == (family != "bert"), family


def test_span_logits_are_start_then_end(loaded):
    model, _, batch = loaded("roberta", "span")
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    y, real = logits(model, batch), batch["attention_mask"].bool()
    assert torch.equal(y[..., 0][real], output.start_logits[real])
    assert torch.equal(y[..., 1][real], output.end_logits[real])
    assert not torch.equal(y[..., 0], y[..., 1])


def test_padding_token_is_the_end_of_text_where_there_is_none(loaded):
    for family in DECODERS:
        for kind in ("classification", "lm"):
            model, tokenizer, batch = loaded(family, kind)
            want = 0 if family == "opt" else 2
            assert tokenizer.pad_token_id == model.config.pad_token_id == want
            mask = batch["attention_mask"][1]
            assert mask.tolist() == sorted(mask.tolist(), reverse=True) and 0 in mask  # on the right
            assert (batch["input_ids"][1, mask.sum() :] == want).all()


def test_float16_checkpoint_is_trained_in_float32(tmp_path):
    build_model("llama").half().save_pretrained(tmp_path)
    build_tokenizer("llama").save_pretrained(tmp_path)
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path).dtype == torch.float16
    model, _ = load(tmp_path, "lm")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_checkpointing_of_our_own_model():
    model = Transformer(Config(9, 8, 1, 2, 16))
    set_checkpointing(model)
    assert model.checkpointing


# --------------------------------------------------------------------------- what cannot serve


def refused(folder, kind, labels=()):
    with pytest.raises(ValueError) as error:
        load(folder, kind, labels)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400, message
    return message


def test_missing_transformers_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs the package transformers" in refused("roberta-base", "span")


def test_folders_that_are_no_checkpoint_are_refused(checkpoint, tmp_path):
    missing = refused(tmp_path / "no" / "where", "span")
    assert str(tmp_path / "no" / "where") in missing and "no such directory" in missing
    assert "not a checkpoint for span" in refused(tmp_path, "span")
    (tmp_path / "config.json").write_text("{")
    assert "not a checkpoint for span" in refused(tmp_path, "span")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint("bert") / name).read_bytes())
    assert "not a checkpoint for span" in refused(tmp_path, "span")
    weights = (checkpoint("bert") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "not a checkpoint for span" in refused(tmp_path, "span")
    (tmp_path / "model.safetensors").write_bytes(weights)
    load(tmp_path, "span")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert "tokenizer" in refused(tmp_path, "span")


def test_weights_of_another_model_are_refused(checkpoint, tmp_path):
    """transformers would draw the missing ones at random and go on."""
    build_tokenizer("t5").save_pretrained(tmp_path)
    build_model("t5", "T5EncoderModel").save_pretrained(tmp_path)
    assert "lacks the weights of transformer.decoder" in refused(tmp_path, "classification", LABELS)
    build_model("mistral", "MistralModel").save_pretrained(tmp_path)
    assert "lacks the weights of lm_head" in refused(tmp_path, "lm")
    load(tmp_path, "span")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "lacks the weights of model.norm" in refused(tmp_path, "span")
    build_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "lacks the weights of transformer.layers.1.mlp.up_proj" in refused(tmp_path, "span")
    config = transformers.BertConfig(**BERT | IDS | {"intermediate_size": 32})
    build_model("bert").save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert "lacks the weights of bert.encoder.layer.0.intermediate.dense" in refused(tmp_path, "span")


def test_kinds_that_a_model_cannot_have_are_refused(checkpoint):
    for family in ("roberta", "bert", "deberta", "deberta-v2"):
        assert "is an encoder" in refused(checkpoint(family), "lm")
    assert "T5Config" in refused(checkpoint("t5"), "lm")
    assert "kind 'mlm'" in refused(checkpoint("bert"), "mlm")


def test_unfit_tokenizers_are_refused(tmp_path):
    build_model("bert").save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB + 1)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(tmp_path)
    assert "41 tokens" in refused(tmp_path, "span")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert "neither a padding nor an end-of-text token" in refused(tmp_path, "span")


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_a_checkpoints_own_code_is_not_run_whatever_stands_on_standard_input(checkpoint, tmp_path, where):
    """transformers would ask there whether to run it, and a "y" in a file of texts would say yes."""
    folder, mark = tmp_path / "hostile", tmp_path / "mark"
    shutil.copytree(checkpoint("bert"), folder)
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import BertConfig, BertTokenizer\n"
        "class C(BertConfig):\n    model_type = 'evil'\nclass T(BertTokenizer):\n    pass\n"
    )
    config = folder / ("config.json" if where == "config" else "tokenizer_config.json")
    values = json.loads(config.read_text())
    if where == "config":
        values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    else:
        values |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    config.write_text(json.dumps(values))
    program = f"import sys; sys.path.insert(0, {ROOT!r})\nfrom harness import backbones\n"
    program += f"backbones.load({str(folder)!r}, 'classification', ('a', 'b'))"
    result = subprocess.run([sys.executable, "-c", program], input="y\n" * 9, capture_output=True, text=True, timeout=120)
    assert not mark.exists()
    if where == "config":
        assert "ValueError" in result.stderr and "trust_remote_code" in result.stderr
    assert "[y/N]" not in result.stdout


def test_roberta_and_its_kin_count_positions_from_behind_the_paddings():
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"max_position_embeddings": 34, "pad_token_id": 1}
    for name, places in [("Camembert", 32), ("MPNet", 32), ("XLMRoberta", 32), ("Bert", 34), ("Electra", 34)]:
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
        assert positions(model) == places, name
        ids = torch.full((1, places + 1), 5)
        model(ids[:, 1:])
        with pytest.raises((IndexError, RuntimeError)):
            model(ids)


def test_deberta_with_a_sentencepiece_tokenizer_alone_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    words = ["river", "stone", "cloud", "tree", "house", "field"]
    lines = iter([" ".join(words[i % 6 :] + words[: i % 5]) for i in range(60)])
    with open(tmp_path / "spm.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=f, vocab_size=40, hard_vocab_limit=False, minloglevel=2, pad_id=0, bos_id=1,
            eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
            user_defined_symbols=["[MASK]"],
        )  # fmt: skip
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.DebertaV2Config(**sizes, pad_token_id=0)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    _, tokenizer = load(str(tmp_path), "classification", ("a", "b"))
    ids = [tokenizer(text)["input_ids"] for text in ("river stone", "stone river", "cloud")]
    assert len(set(map(tuple, ids))) == 3 and len(ids[0]) == len(ids[1]) > 3
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "river stone"
