"""Text one token at a time: sampled, or as it comes, for predict.py. Greedy answers by the batch are model.generate's."""

from collections.abc import Callable, Iterable, Iterator

import torch

from model import Cache, Transformer


@torch.no_grad()
def tokens(
    model: torch.nn.Module, prompt: list[int], max_new: int, stop_id: int, pick: Callable[[torch.Tensor], int]
) -> Iterator[int]:
    """The ids that a causal language model in eval mode writes behind `prompt` (ids), each as soon as it is there, until
    `stop_id` (not given) or max_new. pick(logits (V,)) chooses; keys and values are kept, so that each step reads one token."""
    device, ours = next(model.parameters()).device, isinstance(model, Transformer)
    ids, past = torch.tensor([prompt], device=device), Cache(1, device) if ours else None
    for _ in range(max_new):
        if ours:
            logits = model(ids, cache=past)[0, -1]
            past.seen += ids.shape[1]
        else:
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            logits, past = out.logits[0, -1], getattr(out, "past_key_values", None)
        if (new := pick(logits.float())) == stop_id:
            return
        yield new
        last = torch.tensor([[new]], device=device)
        ids = torch.cat([ids, last], 1) if past is None else last  # Mamba keeps no keys: it reads all again


def sampler(temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Callable[[torch.Tensor], int]:
    """pick(logits) -> id: the likeliest at temperature 0, else drawn from softmax(logits / temperature) among the fewest
    tokens whose probabilities sum to top_p (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751)."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits):
        if temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu().double()  # the largest at 0: none is infinite at a temperature near 0
        p, order = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True, stable=True)
        p[p.cumsum(-1) - p >= top_p] = 0.0  # what stood before it is enough without it
        return int(order[torch.multinomial(p, 1, generator=generator)])

    return pick


def text_as_it_comes(tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Pieces of the text of an iterator of ids; a character of several tokens waits until it is whole."""
    seen, shown = [], ""
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    if seen and len(text := tokenizer.decode(seen)) > len(shown):
        yield text[len(shown) :]
