"""A run in other formats: a LoRA adapter as PEFT reads it, or an ordinary Hugging Face checkpoint; and a LoRA of PEFT's as a run.

Every method whose layers have factors(), dW = P Q, is a LoRA to PEFT: lora_B = P, lora_A = Q, with
lora_alpha = r in each layer so that PEFT's own scaling is 1. Beside either format stand the tokenizer, and a README.md with the
Python that loads it; beside an adapter task.json as well: what `from_peft` and nobody else reads.
"""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import data
from harness import backbones, folder, sealed
from harness.folder import read_json, write_json
from harness.methods import METHODS, NO_FACTORS
from harness.run import Run, base_fingerprint, build_model, factors_of, tupled
from harness.settings import typed
from model import head_modules
from reading.files import read_text, replace_file, write_text

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "span": "QUESTION_ANS", "lm": "CAUSAL_LM"}
PIPELINES = {"SEQ_CLS": "text-classification", "QUESTION_ANS": "question-answering", "CAUSAL_LM": "text-generation"}
# Words before a place on the machine that trained: flags, and export.py, whose first is the run.
PLACES = {"export.py", "--data", "--dev", "--out", "--base", "--compare", "--save-base", "--template", "--export-peft",
          "--export-merged", "--from-peft"}  # fmt: skip
FACTS = {"task": dict, "max_length": int, "max_new": int, "base": str | None, "dtype": str}  # task.json
# What adapter_config.json may set for a plain LoRA, and what to these values alone.
SET = """task_type base_model_name_or_path peft_version auto_mapping inference_mode r lora_alpha lora_dropout
    rank_pattern alpha_pattern target_modules exclude_modules modules_to_save fan_in_fan_out layers_to_transform
    layers_pattern eva_config""".split()
PLAIN = {
    "peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"],
    "megatron_core": ["megatron.core"], "qalora_group_size": [16],
}  # fmt: skip
MARK = "In this folder it is loaded and asked by"
CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: {pipeline}
tags: [{tags}]
---

# {task.name}, {method}

{what}, trained with {words}.

- base: {base}
- task: {task.name}, {task.kind}{labels}
- data: {rows}
{scores}{made}
{mark}

```python
{load}
{ask}
```
{note}"""
LOAD = """import torch
{imports}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {name}.from_pretrained(".", dtype=torch.{dtype}{fit}).eval()"""
ASK = """model.config.pad_token_id = tokenizer.pad_token_id
batch = tokenizer({texts}, padding=True, truncation={cut}, max_length={most}, return_token_type_ids={types}, return_tensors="pt")
with torch.no_grad():
    output = model(**batch)
"""
ANSWER = {
    "classification": "print([model.config.id2label[i] for i in output.logits.argmax(-1).tolist()])",
    "regression": "print(output.logits[:, 0].tolist())",
    "span": """first, last = output.start_logits[0].argmax(), output.end_logits[0].argmax()
print(tokenizer.decode(batch["input_ids"][0, first : last + 1]))""",
}
GENERATE = """ids = {ids}
options = {{"max_new_tokens": {most}, "do_sample": False, "eos_token_id": {stop}, "pad_token_id": {pad}}}
new = model.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :]
print(tokenizer.decode(new, skip_special_tokens=True))"""
NOTES = """
PEFT asks the base for the number of classes, not the adapter: that is why the lines name them. `export.py RUN --peft DIR
--with-base` writes a base that knows them beside the adapter.
""", """
The base is a folder of the machine that trained: change `base_model_name_or_path` in adapter_config.json where it lies elsewhere.
""", """
The base lies in base/, with a head for these classes: where this folder is moved, change `base_model_name_or_path` in
adapter_config.json.
"""  # fmt: skip


def look_ahead(s) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Before a training, what would fail after it: places that are not free, and --compare, whose factors it returns."""
    if s.save_base and os.path.exists(s.save_base):
        sealed.check_base(s.save_base)
    for path in filter(None, (s.export_peft, s.export_merged)):
        check_free(path, s.out, merged=path == s.export_merged)
    for path in filter(None, (s.save_base, s.export_peft, s.export_merged)):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    return factors_of(s.compare) if s.compare else {}


def check_free(path: str, *taken: str | None, merged: bool = False) -> None:
    """ValueError if folder `path` is one of `taken` or lies in one, or holds something and no README.md of an earlier export,
    or, for a merged one, an adapter: transformers would load it on top."""
    for other in filter(None, taken):
        if os.path.realpath(path) == os.path.realpath(other):
            raise ValueError(f"{path} would be written over: choose another folder")
        if os.path.realpath(path).startswith(os.path.join(os.path.realpath(other), "")):
            raise ValueError(f"{path} lies within {other}: choose a folder of its own")
    names, card = sorted(os.listdir(path)) if os.path.isdir(path) else [], os.path.join(path, "README.md")
    if names and not (os.path.exists(card) and MARK in read_text(card)):
        raise ValueError(f"{path} holds {names[0]} and no README.md of an export: choose another folder, or empty it")
    if merged and "adapter_config.json" in names:
        raise ValueError(f"{path} holds an adapter, which would count once more: choose another folder, or empty it")


@torch.no_grad()
def export_peft(run: Run, path: str, with_base: bool = False) -> None:
    """Write adapter_config.json, adapter_model.safetensors and what stands beside them.

    Ranks differ by layer, so each layer stands in rank_pattern and alpha_pattern. `with_base` writes the base as well, with
    the number and the names of the classes, which PEFT asks the base for. ValueError for a method whose change PEFT has no
    form for.
    """
    model, names, dora = run.model, run.layers, run.settings.method == "dora"
    layers = [model.get_submodule(name) for name in names]
    if run.settings.method in NO_FACTORS and not dora:
        raise ValueError(f"method {run.settings.method} has no low-rank update: PEFT's LoRA cannot hold it")
    check_free(path, run.settings.out, run.settings.backbone)
    heads = head_modules(model)  # a frozen one too: it was drawn at random
    ranks, state = {}, {}
    for name, layer in zip(names, layers):
        P, Q = (layer.scaling * layer.B, layer.A) if dora else layer.factors()
        ranks[name] = P.shape[1]
        state[f"base_model.model.{name}.lora_A.weight"] = Q
        state[f"base_model.model.{name}.lora_B.weight"] = P
        if dora:
            state[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude
    for head in heads:
        for key, value in model.get_submodule(head).state_dict().items():
            state[f"base_model.model.{head}.{key}"] = value
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {name: rank for name, rank in ranks.items() if rank != common}
    adapter = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[run.task.kind],
        "base_model_name_or_path": os.path.abspath(os.path.join(path, "base")) if with_base else run.settings.backbone,
        "target_modules": names,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "modules_to_save": heads or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora,
        # GPT-2's Conv1D keeps its weight the other way round
        "fan_in_fan_out": any(getattr(layer.base, "was_conv1d", False) for layer in layers),
        "inference_mode": True,
    }
    what = f"A LoRA adapter for PEFT: {len(names)} layers, ranks {min(ranks.values())} to {max(ranks.values())}"
    write_beside(run, path, what, peft=True, with_base=with_base)
    tensors = {key: value.to("cpu", copy=True).contiguous() for key, value in state.items()}
    file = os.path.join(path, "adapter_model.safetensors")
    with sealed.writing(file):
        replace_file(file, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    write_json(os.path.join(path, "adapter_config.json"), adapter)
    facts = {"task": dataclasses.asdict(run.task), "max_length": run.settings.max_length, "max_new": run.max_new}
    write_json(os.path.join(path, "task.json"), {**facts, "base": run.fingerprint, "dtype": run.settings.dtype})
    if with_base:
        write_base(run, os.path.join(path, "base"))
    print(f"PEFT adapter in {path}: {len(names)} layers, ranks {min(ranks.values())} to {max(ranks.values())}")


def write_base(run: Run, path: str) -> None:
    """The run's base, untouched but for its head, which is the run's, as a checkpoint for `from_pretrained`."""
    base, tokenizer, *_ = build_model(run.settings, run.task)
    for name in head_modules(base):
        base.get_submodule(name).load_state_dict(run.model.get_submodule(name).state_dict())
    backbones.delinearize(base)
    with sealed.writing(path):
        base.save_pretrained(path)
        tokenizer.source.save_pretrained(path)  # type: ignore[union-attr]


def export_merged(run: Run, path: str) -> None:
    """Fold every dW into its weight and write a checkpoint for `from_pretrained`; the run's model is changed by it."""
    check_free(path, run.settings.out, run.settings.backbone, merged=True)
    if run.layers:
        run.method.merge(run.model)
    backbones.delinearize(run.model)
    write_beside(run, path, "A whole checkpoint, the update folded into the weights", peft=False)
    with sealed.writing(path):
        run.model.save_pretrained(path)
    print(f"merged checkpoint in {path}")


# ------------------------------------------------------------------------- what stands beside it


def write_beside(run: Run, path: str, what: str, peft: bool, with_base: bool = False) -> None:
    """README.md first, for it marks the folder as an export's: what it is, base, task, metrics, command, and the Python that
    loads it and predicts; and the tokenizer."""
    s, task, file = run.settings, run.task, os.path.join(run.settings.out or "", "metrics.jsonl")
    name, fit, scores = backbones.CLASSES[task.kind], "", ""
    imports = f"from transformers import {name}, AutoTokenizer"
    if peft:
        name = name.replace("AutoModel", "AutoPeftModel")
        imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
        if TASK_TYPES[task.kind] == "SEQ_CLS" and not with_base:  # the base's own head may be of another size
            names = dict(enumerate(task.labels))
            fit = f"id2label={names}, label2id={ {label: i for i, label in names.items()} }" if names else "num_labels=1"
            fit = f", {fit}, ignore_mismatched_sizes=True"
    if s.out and os.path.exists(file):
        with open(file, encoding="utf-8") as f:
            row = json.loads(([*f] or ["{}"])[-1])
        scores = "".join(f"| {key} | {row[key]:.4f} |\n" for key in ("dev_loss", *task.metrics) if key in row)
        scores = scores and f"\nAfter step {row['step']}, on the development rows:\n\n| metric | value |\n|---|--:|\n{scores}"
    text = CARD.format(
        mark=MARK,
        base=json.dumps(s.backbone), library="peft" if peft else "transformers", pipeline=PIPELINES[TASK_TYPES[task.kind]],
        tags=", ".join({s.method: 0} | ({"lora": 0} if peft else {})), task=task, method=s.method, what=what,
        words=METHODS[s.method][1],
        labels=f" ({', '.join(task.labels)})" if task.labels else "", scores=scores, ask=ask(run),
        made=f"\nMade by\n\n```sh\n{portable(run.command)}\n```\n" if run.command else "",
        note=NOTES[0] * bool(fit) + (NOTES[2] if with_base else NOTES[1] * (peft and os.path.isabs(s.backbone))),
        rows=os.path.basename(os.path.normpath(s.data)) if s.data else "generated",
        load=LOAD.format(imports=imports, name=name, fit=fit, dtype="bfloat16" if s.dtype == "bf16" else "float32"),
    )  # fmt: skip
    os.makedirs(path, exist_ok=True)
    write_text(os.path.join(path, "README.md"), text)
    with sealed.writing(path):
        run.tokenizer.source.save_pretrained(path)  # type: ignore[union-attr]


def ask(run: Run) -> str:
    """The lines of Python that predict, on the very tokens that the run would see."""
    task, tokenizer = run.task, run.tokenizer
    if task.kind == "lm":
        ids, bare = 'tokenizer("a question")["input_ids"]', "add_special_tokens=False)"
        if task.template == "chat":
            ids = '[{"role": "user", "content": "a question"}], tokenize=False, add_generation_prompt=True'
            ids = f'tokenizer(tokenizer.apply_chat_template({ids}), {bare}["input_ids"]'
        elif not task.pretraining and tokenizer.encode([("a",)])[0]["sequence"][-1] is not None:  # as data.math_rows
            ids += f' + tokenizer("\\n", {bare}["input_ids"]'
        ids += f"  # prompts were written as {task.template!r}" if task.template not in ("", "chat") else ""
        return GENERATE.format(ids=ids, most=run.max_new or 64, stop=run.stop_id, pad=tokenizer.pad_id)
    texts = '["a text"], ["its second"]' if task.pair else '["a text"]'
    texts = '["a question"], ["a context"]' if task.kind == "span" else texts
    types = tokenizer.typed and getattr(run.model.config, "type_vocab_size", 0) > 1  # as model.logits
    cut = '"only_second"' if task.kind == "span" else True
    return ASK.format(texts=texts, cut=cut, most=run.settings.max_length, types=types) + ANSWER[task.kind]


def portable(command: str) -> str:
    """The command without the folders that its files lie in: they are there on one machine only."""
    words = [part for word in shlex.split(command) for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return shlex.join(os.path.basename(os.path.normpath(w)) if flag in PLACES else w for flag, w in zip(["", *words], words))


# ------------------------------------------------------------------------- and back


@torch.no_grad()
def from_peft(path: str, settings, task: data.Task | None = None, force: bool = False) -> None:
    """Write a plain LoRA of PEFT's as the run `settings.out` of method lora. ValueError, in one line, for any other adapter.

    Without `task` it is what task.json says, which `export_peft` left. A layer of a lower rank gets rows of zeros, one of
    another scale another B: dW stays.
    """
    if folder.written(settings.out):
        raise ValueError(f"{settings.out} holds a run already: choose another folder")
    adapter, facts = read_plain(path), {"max_new": settings.max_length // 2, "base": None, "dtype": settings.dtype}
    if task is None:
        file = os.path.join(path, "task.json")
        if not os.path.exists(file):
            raise ValueError(f"{path} has no task.json, which an export from here has: give --task or --labels")
        facts = read_json(file)
        typed(FACTS, facts, file)
        typed({f.name: f.type for f in dataclasses.fields(data.Task)}, facts["task"], f"{file}: task")
        task = data.Task(**tupled(facts["task"]))
        settings.max_length, settings.dtype = facts["max_length"], facts["dtype"]
    if adapter["task_type"] not in (None, TASK_TYPES.get(task.kind)):
        raise ValueError(f"{path} is an adapter for {adapter['task_type']}, task {task.name} is {task.kind}")
    settings.backbone = settings.backbone or adapter["base_model_name_or_path"]
    if not settings.backbone:
        raise ValueError(f"{path} names no base: give --backbone")
    command = shlex.join(["python", "export.py", settings.out, "--from-peft", str(path)])
    run = Run(settings, task, *build_model(settings, task), max_new=facts["max_new"], command=command)
    run.fingerprint = base_fingerprint(run.model, settings)
    if facts["base"] not in (None, run.fingerprint) and not force:
        raise ValueError(f"{path} was trained on another base than what {run.base} is now (--force goes on)")
    layers, state = read_lora(os.path.join(path, "adapter_model.safetensors"), head_modules(run.model))
    rank, alpha = max(len(A) for A, _ in layers.values()), adapter["lora_alpha"] or 1.0
    pattern = {key: [name for name in layers if f".{name}".endswith("." + key)] for key in adapter["alpha_pattern"]}
    if odd := [key for key, names in pattern.items() if not names]:
        raise ValueError(f"{path}: alpha_pattern names {odd[0]}, which is the end of no adapted layer's name")
    own = {name: adapter["alpha_pattern"][key] for key in reversed(pattern) for name in pattern[key]}  # the first key counts
    for name, (A, B) in layers.items():
        scale, more = own.get(name, adapter["lora_alpha"]) / len(A), rank - len(A)
        state |= {f"{name}.A": F.pad(A, (0, 0, 0, more)), f"{name}.B": F.pad(B * (scale / (alpha / rank)), (0, more))}
    settings.options = {"rank": rank, "alpha": float(alpha), "dropout": float(adapter["lora_dropout"])}
    run.wrap(list(layers))
    run.load(state)
    with folder.lock(settings.out):
        folder.clear(settings.out, run.config())
        folder.finish(run, folder.Progress())
    print(f"run of lora in {settings.out}: {len(layers)} layers, rank {rank}, task {task.name}")


def read_plain(path: str) -> dict:
    """adapter_config.json with PEFT's defaults filled in. ValueError if it is not of a plain LoRA."""
    file = os.path.join(path, "adapter_config.json")
    adapter = read_json(file)
    if not isinstance(adapter, dict) or "peft_type" not in adapter:
        raise ValueError(f"{file}: PEFT did not write this")
    for key, value in adapter.items():
        if value and key not in SET and value not in PLAIN.get(key, []):  # type: ignore[operator]
            raise ValueError(f"{file}: {key} is {json.dumps(value)}: only a plain LoRA is read")
    filled = {"lora_alpha": 8, "lora_dropout": 0.0, "task_type": None, "base_model_name_or_path": None, **adapter}
    filled["alpha_pattern"] = adapter.get("alpha_pattern") or {}
    kinds = {"lora_alpha": float, "lora_dropout": float, "alpha_pattern": dict}
    kinds |= {"task_type": str | None, "base_model_name_or_path": str | None}  # type: ignore[dict-item]
    typed(kinds, {key: filled[key] for key in kinds}, file)
    typed(dict.fromkeys(filled["alpha_pattern"], float), filled["alpha_pattern"], f"{file}: alpha_pattern")
    return filled


def read_lora(file: str, heads: Sequence[str]) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
    """({layer: (A, B)}, {name: tensor} of the head) of adapter_model.safetensors, in float32. No pickle is ever read."""
    if not os.path.exists(file):
        raise ValueError(f"{file} does not exist, and no other format is read")
    tensors = {key.removeprefix("base_model.model."): value.float() for key, value in sealed.raw(file)[0].items()}
    layers, state = {}, {}
    for name, value in tensors.items():
        if found := re.fullmatch(r"(.+)\.lora_[AB]\.weight", name):
            layers[found[1]] = A, B = [tensors.get(f"{found[1]}.lora_{x}.weight", torch.empty(0)) for x in "AB"]
            if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
                raise ValueError(f"{file}: the matrices of {found[1]} are no A (r, n) and B (m, r)")
        elif name.startswith(tuple(head + "." for head in heads)):
            state[name] = value
        else:
            raise ValueError(f"{file}: {name} is neither a LoRA matrix nor of the head ({', '.join(heads) or 'there is none'})")
    if not layers:
        raise ValueError(f"{file} holds no LoRA matrix")
    return layers, state
