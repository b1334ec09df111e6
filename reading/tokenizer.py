"""The tokenizer: our byte-level BPE, or the one of a Hugging Face checkpoint, behind one face."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from reading.files import read_text, write_text

ASSETS = Path(__file__).parents[1] / "assets"


class Tokenizer:
    """Texts to tokens: our byte-level BPE, or the one of a Hugging Face checkpoint, behind one face.

    source: path of a tokenizer.json of ours, a tokenizers.Tokenizer of ours, or a Hugging Face
    tokenizer (kept as .source). Ours frames `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`. A special
    token's name inside a text is text. sep_id ends a text (a decoder's end of text).
    """

    SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, source=ASSETS / "tokenizer.json"):
        if isinstance(source, (str, Path)):
            text = read_text(source)
            try:
                source = tokenizers.Tokenizer.from_str(text)
            except Exception as e:  # the library has no kind of its own
                raise ValueError(f"{source} is no tokenizer: {e}".splitlines()[0]) from None
        self.source = source
        if isinstance(source, tokenizers.Tokenizer):
            backend, self.typed = source, True
            specials = [source.token_to_id(token) for token in self.SPECIALS]
            self.pad_id, _, self.sep_id, self.mask_id = specials
        else:
            backend = getattr(source, "backend_tokenizer", None)
            if backend is None:
                raise ValueError("the checkpoint has no fast tokenizer (tokenizer.json)")
            specials, self.typed = source.all_special_ids, "token_type_ids" in source.model_input_names
            self.sep_id = source.eos_token_id if source.sep_token_id is None else source.sep_token_id
            self.pad_id = self.sep_id if source.pad_token_id is None else source.pad_token_id
            self.mask_id = source.mask_token_id
        self.special_ids = set(specials)
        # A copy, because the settings below would be saved with the checkpoint's tokenizer.
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.vocab_size = self.backend.get_vocab_size()
        self.digest = hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(
        self, texts: Sequence[Sequence[str]], max_length: int | None = None, truncation: str = "longest_first"
    ) -> list[dict]:
        """One dict for each tuple of one or two texts: input_ids, token_type_ids, offsets (start, end)
        in its text, sequence (which text a token is of, None for a special token), all as long as
        the row; at most max_length, and `cut`, whether more was there. truncation: longest_first or only_second."""
        if max_length is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(max_length, strategy=truncation)
        rows = []
        for e in self.backend.encode_batch([text if len(text) == 2 else text[0] for text in texts]):
            ids = e.ids or [self.sep_id]  # type: ignore[list-item]  # an empty text under a tokenizer that adds nothing
            types = e.type_ids if e.ids and self.typed else [0] * len(ids)
            places, sequence = e.offsets or [(0, 0)], e.sequence_ids or [None]
            cut = bool(e.overflowing)
            rows.append({"input_ids": ids, "token_type_ids": types, "offsets": places, "sequence": sequence, "cut": cut})
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, without special ones and without the space that a first word brings."""
        ids = [int(i) for i in ids if int(i) not in self.special_ids]
        return self.backend.decode(ids, skip_special_tokens=False).removeprefix(" ")

    def save(self, path: str | Path) -> None:
        self.backend.no_truncation()
        write_text(path, self.backend.to_str(pretty=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE Tokenizer (Sennrich et al. 2016) of at most vocab_size tokens from an iterable
    of str. All 256 bytes are tokens, so no text is unknown; every word starts with its space, also
    the first, so that it is the same token everywhere."""
    specials, alphabet = list(Tokenizer.SPECIALS), sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(specials) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"vocabulary size {vocab_size} is too small: {least} at least")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    single, pair, ids = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    frame = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    # trim_offsets: a word's place in its text is without the space.
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), frame])
    return Tokenizer(bpe)
