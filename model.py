"""A small transformer, from scratch: an encoder that reads both ways, or a decoder with causal=True.

Pre-norm blocks (Xiong et al. 2020, arXiv 2002.04745), rotary positions (Su et al. 2021, arXiv
2104.09864), GELU, and the six matrices that the papers adapt as six separate nn.Linear with biases:

    x = x + o_proj(attention(q_proj(norm1(x)), k_proj(norm1(x)), v_proj(norm1(x))))
    x = x + down_proj(gelu(up_proj(norm2(x))))

The language-model logits use the token embedding itself (tied), so there is no output matrix that an
adapter could be merged into. Below the model stand the few functions that train.py uses on it and on a
Hugging Face model alike: `logits`, `generate`, `default_targets`, `head_modules`.
"""

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    vocab_size: int
    width: int = 128  # d, of the token vectors
    depth: int = 4  # blocks
    heads: int = 4  # each of width d / heads
    hidden: int = 512  # of the MLP
    causal: bool = False  # False: encoder, True: decoder
    dropout: float = 0.0  # on the embedding and on each branch before it is added; read at every forward

    type_vocab_size = 2  # not a setting: token_type_ids are 0 (first text) or 1 (second text)


class Block(nn.Module):
    """Attention and MLP, each added to x (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.width
        self.norm1 = nn.LayerNorm(d)
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.o_proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.up_proj = nn.Linear(d, config.hidden)
        self.down_proj = nn.Linear(config.hidden, d)

    def forward(self, x, cos, sin, mask):
        x = x + self.drop(self.attention(self.norm1(x), cos, sin, mask))  # (B, T, d)
        return x + self.drop(self.down_proj(F.gelu(self.up_proj(self.norm2(x)))))  # (B, T, d)

    def attention(self, x, cos, sin, mask):
        split = x.shape[:2] + (self.config.heads, -1)
        q = self.q_proj(x).view(split).transpose(1, 2)  # (B, heads, T, d/heads)
        k = self.k_proj(x).view(split).transpose(1, 2)
        v = self.v_proj(x).view(split).transpose(1, 2)
        # A mask that is given has causality in it already.
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, mask, is_causal=self.config.causal and mask is None
        )  # (B, heads, T, d/heads)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, d)

    def drop(self, x):
        return F.dropout(x, self.config.dropout, self.training)


def rope_tables(T, dim, dtype, device):
    """cos and sin (T, dim) of the angles t * 10000^(-2i/dim), i = 0 .. dim/2 - 1, twice side by side."""
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot even count to T
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=exact, device=device) / dim)  # (dim/2,)
    angles = torch.outer(torch.arange(T, dtype=exact, device=device), rates).repeat(1, 2)  # (T, dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + dim/2}) by its angle: then q_s . k_t knows positions by s - t alone."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)  # (B, heads, T, dim)


class Transformer(nn.Module):
    """kind "classification" (`outputs` classes), "regression", "span" or "lm"; see `forward`."""

    def __init__(self, config, kind="lm", outputs=0):
        super().__init__()
        sizes = {"classification": outputs, "regression": 1, "span": 2, "lm": 0}
        if kind not in sizes:
            raise ValueError(f"kind '{kind}' is unknown: use one of {', '.join(sizes)}")
        if kind == "classification" and outputs < 2:
            raise ValueError(f"classification needs outputs >= 2, not {outputs}")
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width} is not a multiple of 2 * heads = {2 * config.heads}")
        self.config, self.kind = config, kind
        self.checkpointing = False  # True: recompute each block in backward instead of storing it
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.segment = nn.Embedding(config.type_vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        if kind != "lm":
            self.head = nn.Linear(config.width, sizes[kind])
        self.apply(self.init)

    def init(self, module):
        """GPT-2's initial values, normal of deviation 0.02 and biases zero, but that attention begins by comparing and
        copying (mimetic initialization, Trockman & Kolter 2023, arXiv 2305.09828): where the key matrix is the query
        matrix, equal tokens attend to each other; where the output matrix is the value matrix transposed, they hand on
        what they are. Finding in one sentence the words of another is learned in a fraction of the steps."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # after its children
            # 2 * depth branches are summed: divided so, the sum keeps the variance of one.
            shrink = 1 / math.sqrt(2 * self.config.depth)
            nn.init.normal_(module.down_proj.weight, std=0.02 * shrink)
            nn.init.normal_(module.q_proj.weight, std=1 / math.sqrt(2 * self.config.width))
            with torch.no_grad():
                module.k_proj.weight.copy_(module.q_proj.weight)
                module.o_proj.weight.copy_(module.v_proj.weight.T * shrink)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, positions=None):
        """Logits from ids (B, T) int64; attention_mask (B, T) is 1 at tokens and 0 at padding.

        classification (B, C) and regression (B,) read the first token (encoder: padding stands on the
        right) or the last one that is no padding (decoder). span gives (B, T, 2), start and end. lm gives
        (B, T, V), or (N, V) at the N places where `positions` (B, T) is True: worth it when few are labelled.
        """
        h = self.encode(input_ids, attention_mask, token_type_ids)  # (B, T, d)
        if self.kind == "lm":
            h = h if positions is None else h[positions]
            return F.linear(h, self.embed.weight)  # (B, T, V) or (N, V)
        if self.kind == "span":
            return self.head(h)  # (B, T, 2)
        if not self.config.causal:
            h = h[:, 0]  # (B, d)
        elif attention_mask is None:
            h = h[:, -1]
        else:
            last = (attention_mask * torch.arange(h.shape[1], device=h.device)).argmax(1)  # (B,)
            h = h[torch.arange(len(h), device=h.device), last]
        y = self.head(h)  # (B, C)
        return y.squeeze(1) if self.kind == "regression" else y

    def encode(self, input_ids, attention_mask=None, token_type_ids=None):
        """The last block's output, normalised: (B, T, d)."""
        T = input_ids.shape[1]
        x = self.embed(input_ids)  # (B, T, d)
        x = x + (self.segment.weight[0] if token_type_ids is None else self.segment(token_type_ids))
        x = F.dropout(x, self.config.dropout, self.training)
        cos, sin = rope_tables(T, self.config.width // self.config.heads, x.dtype, x.device)  # (T, d/heads)
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T), True = may be looked at
            if self.config.causal:
                mask = mask & torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (B, 1, T, T)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask)
        return self.norm(x)


# --------------------------------------------------------------------- the base on disk


def save_base(model, path):
    """Write the model without its head: one safetensors file, float16, the config in the metadata."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            tensors[name] = tensor.half().cpu()
            if not tensors[name].isfinite().all():
                raise ValueError(f"{path}: {name} holds NaN, infinity or a value beyond float16: not written")
    save_file(tensors, f"{path}.tmp", {"transformer": json.dumps(asdict(model.config))})
    os.replace(f"{path}.tmp", path)  # whoever reads `path` finds the old file or the new one, never half


def load_base(path, kind="lm", outputs=0):
    """A float32 Transformer with the weights of `path` and a new head. ValueError says what is wrong."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file (a base written by save_base)")
    try:
        with safe_open(path, "pt") as file:
            config = (file.metadata() or {}).get("transformer")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if config is None:
        raise ValueError(f"{path}: not written by save_base (its metadata has no 'transformer' entry)")
    try:
        model = Transformer(Config(**json.loads(config)), kind, outputs)
        tensors |= {name: p for name, p in model.state_dict().items() if name.startswith("head.")}
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError):  # an unknown setting; a tensor missing, left over or of another shape
        raise ValueError(f"{path}: its weights are not those of its config {config}") from None
    return model


# ------------------------------------------------- the same for ours and for Hugging Face's


def logits(model, batch, positions=None):
    """Logits of a batch (dict of tensors): (B, C), (B,), (B, T, 2), (B, T, V), as `Transformer.forward` says.

    Span logits are -inf at padding, so that a softmax over the tokens is the same however long the padding.
    `positions` (B, T) bool, for a language model: (N, V) at those places.
    """
    mask = batch.get("attention_mask")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    # GPT-2 would look the types up among its words, RoBERTa has one row for them, T5 has no such argument.
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.get("token_type_ids")
    if getattr(model.config, "use_cache", False):
        inputs["use_cache"] = False  # keys and values kept for a next call that never comes
    if isinstance(getattr(model, "_orig_mod", model), Transformer):  # _orig_mod: under torch.compile
        y = model(**inputs, positions=positions)
        span = model.kind == "span"
    else:
        output = model(**inputs)
        span = "start_logits" in output
        y = torch.stack((output.start_logits, output.end_logits), dim=-1) if span else output.logits
        if positions is not None:
            y = y[positions]  # (N, V)
        elif y.shape[1:] == (1,):
            y = y.squeeze(1)  # regression: (B,)
    if span and mask is not None:
        y = y.masked_fill(mask[:, :, None] == 0, -math.inf)
    return y


@torch.no_grad()
def generate(model, prompts, max_new, stop_id, drafts=None):
    """Greedy continuations of `prompts` (lists of ids, of any lengths): lists of new ids, without `stop_id`.

    For a causal language model in eval mode. Every step reads the whole text again: slower than a cache of keys and
    values, but the same code for every model. `drafts`, lists of ids, are guesses at the continuations. They change
    none, but those they are right about come sooner (Leviathan et al. 2023, arXiv 2211.17192): one forward gives the
    choice behind each beginning of a draft. Up to the first that differs from it, that one included, the choices are
    what step by step would give; what the draft has behind that place is the draft of the rest.
    """
    device = next(model.parameters()).device
    new, drafts = [[] for _ in prompts], [list(draft) for draft in drafts or [[]] * len(prompts)]
    running = list(range(len(prompts) if max_new else 0))
    while running:
        texts = [torch.tensor(prompts[i] + new[i] + drafts[i], device=device) for i in running]
        counts = [len(drafts[i]) + 1 for i in running]
        ends = torch.tensor([[len(text)] for text in texts], device=device)  # (B, 1)
        # Padded on the right, where causality hides it: no mask.
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # (B, T)
        places = torch.arange(ids.shape[1], device=device)
        behind = (places >= ends - torch.tensor(counts, device=device)[:, None]) & (places < ends)  # (B, T), counts per row
        best = logits(model, {"input_ids": ids}, behind).argmax(-1).split(counts)  # B tensors of ids
        for i, choice in zip(running, best):
            choice = choice.tolist()
            agree = next((k for k, (a, b) in enumerate(zip(choice, drafts[i])) if a != b), len(drafts[i]))
            new[i] += choice[: agree + 1]
            drafts[i] = drafts[i][agree + 1 :]
        running = [i for i in running if stop_id not in new[i] and len(new[i]) < max_new]
    return [(ids[: ids.index(stop_id)] if stop_id in ids else ids)[:max_new] for ids in new]


def default_targets(model):
    """Full dotted names of every nn.Linear in the transformer blocks, that is, inside an nn.ModuleList.

    A layer of one output or one input (Qwen2-MoE's shared_expert_gate) is left out, with a warning: an update of
    rank 1 has more numbers than the layer.
    """
    lists = tuple(name + "." for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(lists)}
    wide = [name for name, m in linears.items() if min(m.out_features, m.in_features) > 1]
    if narrow := sorted({name.rpartition(".")[2] for name in linears.keys() - wide}):
        warnings.warn(f"too narrow for an adapter, left out: {', '.join(narrow)}")
    return wide


def head_modules(model):
    """Names of the model's parts that belong to the task: trained with every method, saved with the adapter.

    These are the children of the model with an nn.Linear in them that hold no blocks (no nn.ModuleList) and
    are not the output matrix of a language model: `head` of ours, `classifier`, `score`, `qa_outputs` or
    `classification_head` of Hugging Face's, and DeBERTa's `pooler`, which its released checkpoints lack.
    `new_modules` is what backbones.load found new besides: BERT's pooler, which most checkpoints do bring.
    """
    words = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = []
    for name, child in model.named_children():
        parts = list(child.modules())
        linear = any(isinstance(m, nn.Linear) for m in parts)
        if linear and child is not words and not any(isinstance(m, nn.ModuleList) for m in parts):
            heads.append(name)
    return heads + getattr(model, "new_modules", [])
