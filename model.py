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
from collections.abc import Callable, Sequence
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

    def __init__(self, config: Config):
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

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None, keep: Callable | None = None
    ) -> torch.Tensor:
        x = x + self.drop(self.attention(self.norm1(x), cos, sin, mask, keep))  # (B, T, d)
        return x + self.drop(self.down_proj(F.gelu(self.up_proj(self.norm2(x)))))  # (B, T, d)

    def attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None, keep: Callable | None
    ) -> torch.Tensor:
        split = x.shape[:2] + (self.config.heads, -1)
        q = self.q_proj(x).view(split).transpose(1, 2)  # (B, heads, T, d/heads)
        k = self.k_proj(x).view(split).transpose(1, 2)
        v = self.v_proj(x).view(split).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if keep is not None:  # with those of the tokens before: (B, heads, S, d/heads)
            k, v = keep(self, k, v)
        # A mask that is given has causality in it already.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.config.causal and mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, d)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.dropout, self.training)


def rope_tables(T: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, dim) of the angles t * 10000^(-2i/dim), i = 0 .. dim/2 - 1, twice side by side."""
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot even count to T
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=exact, device=device) / dim)  # (dim/2,)
    angles = torch.outer(torch.arange(T, dtype=exact, device=device), rates).repeat(1, 2)  # (T, dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + dim/2}) by its angle: then q_s . k_t knows positions by s - t alone."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)  # (B, heads, T, dim)


class Cache:
    """The keys and values of each block for the tokens that a decoder has read, so that the next ones are read alone.

    The first `seen[i]` tokens of row i hold. Rows may stand at different places; what lies behind is written over.
    """

    def __init__(self, rows: int, device: torch.device):
        self.seen, self.kept = torch.zeros(rows, 1, dtype=torch.int64, device=device), {}

    def places(self, T: int) -> torch.Tensor:
        """Where T new tokens of every row stand, (B, T)."""
        return self.seen + torch.arange(T, device=self.seen.device)

    def keep(self, block: Block, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Put the new k and v (B, heads, T, d/heads) behind those of the block that hold; returns all, (B, heads, S, d/heads)."""
        rows, places = torch.arange(len(k), device=k.device)[:, None], self.places(k.shape[2])
        old = self.kept.get(block, (k[:, :, :0], v[:, :, :0]))
        self.kept[block] = [F.pad(t, (0, 0, 0, int(places.max()) + 1 - t.shape[2])) for t in old]
        for t, new in zip(self.kept[block], (k, v)):
            t[rows, :, places] = new.transpose(1, 2)
        return self.kept[block]

    def only(self, rows: list[int]) -> None:
        """Forget all rows but those."""
        self.seen, self.kept = self.seen[rows], {block: [t[rows] for t in both] for block, both in self.kept.items()}


class Transformer(nn.Module):
    """kind "classification" (`outputs` classes), "regression", "span" or "lm"; see `forward`."""

    def __init__(self, config: Config, kind: str = "lm", outputs: int = 0):
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

    def init(self, module: nn.Module) -> None:
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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits from ids (B, T) int64; attention_mask (B, T) is 1 at tokens and 0 at padding.

        classification (B, C) and regression (B,) read the first token (encoder: padding stands on the
        right) or the last one that is no padding (decoder). span gives (B, T, 2), start and end. lm gives
        (B, T, V), or (N, V) at the N places where `positions` (B, T) is True: worth it when few are labelled.
        With a `Cache` the ids are those behind what it has seen, without attention_mask.
        """
        h = self.encode(input_ids, attention_mask, token_type_ids, cache)  # (B, T, d)
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

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """The last block's output, normalised: (B, T, d)."""
        T = input_ids.shape[1]
        x = self.embed(input_ids)  # (B, T, d)
        x = x + (self.segment.weight[0] if token_type_ids is None else self.segment(token_type_ids))
        x = F.dropout(x, self.config.dropout, self.training)
        mask, keep = None, cache and cache.keep
        places = cache and cache.places(T)  # (B, T)
        S = T if cache is None else int(places.max()) + 1  # type: ignore[union-attr]
        cos, sin = rope_tables(S, self.config.width // self.config.heads, x.dtype, x.device)  # (S, d/heads)
        if cache is not None:
            cos, sin = cos[places][:, None], sin[places][:, None]  # type: ignore[index]  # (B, 1, T, d/heads)
            mask = (torch.arange(S, device=x.device) <= places[..., None])[:, None]  # type: ignore[index]  # (B, 1, T, S)
        elif attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T), True = may be looked at
            if self.config.causal:
                mask = mask & torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (B, 1, T, T)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, keep)
        return self.norm(x)


# --------------------------------------------------------------------- the base on disk


def save_base(model: Transformer, path: str | os.PathLike[str]) -> None:
    """Write the model without its head: one safetensors file, float16, the config in the metadata."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            tensors[name] = tensor.half().cpu()
            if not tensors[name].isfinite().all():
                raise ValueError(f"{path}: {name} holds NaN, infinity or a value beyond float16: not written")
    save_file(tensors, f"{path}.tmp", {"transformer": json.dumps(asdict(model.config))})
    os.replace(f"{path}.tmp", path)  # whoever reads `path` finds the old file or the new one, never half


def load_base(path: str | os.PathLike[str], kind: str = "lm", outputs: int = 0) -> Transformer:
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


def logits(model: nn.Module, batch: dict[str, torch.Tensor], positions: torch.Tensor | None = None) -> torch.Tensor:
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
        inputs["use_cache"] = False  # type: ignore[assignment]  # keys and values kept for a next call that never comes
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
def generate(
    model: nn.Module, prompts: Sequence[list[int]], max_new: int, stop_id: int, drafts: Sequence[list[int]] | None = None
) -> list[list[int]]:
    """Greedy continuations of `prompts` (lists of ids, of any lengths): lists of new ids, without `stop_id`.

    For a causal language model in eval mode; a Hugging Face model's own `generate` does it for that. `drafts`, lists of
    ids, are guesses at the continuations. They change none, but those they are right about come sooner (Leviathan et al.
    2023, arXiv 2211.17192): one forward gives the choice behind each beginning of a draft. Up to the first that differs
    from it, that one included, the choices are what step by step would give; what the draft has behind that place is the
    draft of the rest, of which the more is tried the more was right.
    """
    if not isinstance(model, Transformer):
        return transformers_generate(model, prompts, max_new, stop_id)
    device = next(model.parameters()).device
    new, drafts = [[] for _ in prompts], [list(draft) for draft in drafts or [[]] * len(prompts)]
    unread, tried = [list(prompt) for prompt in prompts], [len(draft) for draft in drafts]
    running = list(range(len(prompts) if max_new else 0))
    cache = Cache(len(running), device)
    while running:
        guesses = [drafts[i][: tried[i]] for i in running]
        texts = [torch.tensor(unread[i] + guess, device=device) for i, guess in zip(running, guesses)]
        counts = torch.tensor([len(guess) + 1 for guess in guesses], device=device)[:, None]
        ends = torch.tensor([[len(text)] for text in texts], device=device)  # (B, 1)
        # Padded on the right, where causality hides it: no mask.
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # (B, T)
        places = torch.arange(ids.shape[1], device=device)
        behind = (places >= ends - counts) & (places < ends)  # (B, T), counts per row
        best = model(ids, positions=behind, cache=cache).argmax(-1).split(counts[:, 0].tolist())  # B tensors of ids
        for row, (i, choice, guess) in enumerate(zip(running, best, guesses)):
            choice = choice.tolist()
            agree = next((k for k, (a, b) in enumerate(zip(choice, guess)) if a != b), len(guess))
            cache.seen[row] += len(unread[i]) + agree
            new[i] += choice[: agree + 1]
            unread[i], drafts[i], tried[i] = [choice[agree]], drafts[i][agree + 1 :], max(8, 2 * agree)
        on = [row for row, i in enumerate(running) if stop_id not in new[i] and len(new[i]) < max_new]
        if len(on) < len(running):
            running = [running[row] for row in on]
            cache.only(on)
    return [cut(ids[:max_new], stop_id) for ids in new]


def transformers_generate(model: nn.Module, prompts: Sequence[list[int]], max_new: int, stop_id: int) -> list[list[int]]:
    """The same by a Hugging Face model's `generate`: greedy whatever its checkpoint's settings, padding on the left."""
    if not prompts or not max_new:
        return [[] for _ in prompts]
    device, width = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    asked = type(model.generation_config)(max_new_tokens=max_new, do_sample=False, eos_token_id=stop_id, pad_token_id=0)
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=asked)
    return [cut(row[width:], stop_id) for row in found.tolist()]


def cut(ids: list[int], stop_id: int) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids


def default_targets(model: nn.Module) -> list[str]:
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


def head_modules(model: nn.Module) -> list[str]:
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
