"""TLoRA+: A Low-Rank Parameter-Efficient Fine-Tuning Method for Large Language Models
(Cao & Liu 2026, arXiv 2604.13368).

A frozen linear layer W0 (m, n) gets an update of three matrices, each with a learning rate of its own:

    h = W0 x + C B A x        A (r2, n), B (r1, r2), C (m, r1)        (Sec. 3.1, Eq. 2)

A and C are drawn at random and B starts at zero, so the update starts at exactly zero. All three are
trained (r2 n + r1 r2 + m r1 numbers per layer), or B and one outer matrix, or B alone, as in TLoRA.
How the three rates must differ is derived in the paper's Sec. 3.2, and line by line in this file:
start at `loss_change`. This file needs torch alone; copy it and call

    names = inject(model, ["q_proj", "v_proj"], rank=8, ratio="4")
    model.score.requires_grad_(True)    # the task head, whatever its name: inject froze it too
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, weight_decay=0.1))
    ...                                 # train as usual (OneCycleLR: max_lr=[g["lr"] for g in groups])
    save(model, "adapter.safetensors")  # `load` puts it on the base model again
    merge(model)                        # back to plain nn.Linear layers

`python tlora_plus.py` shows it on one layer.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F


class TLoRAPlusLinear(nn.Module):
    """A frozen nn.Linear with the update C B A. Input (..., n), output (..., m)."""

    def __init__(self, base: nn.Linear, rank1: int, rank2: int, train: str, init_b: str, ratio: float | str):
        super().__init__()
        m, n = base.weight.shape
        # At least float32, whatever the base: a step of 1e-4 is rounded away beside a bfloat16 weight of 0.1.
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.base = base
        self.ratio = ratio  # for param_groups
        for letter, shape in {"A": (rank2, n), "B": (rank1, rank2), "C": (m, rank1)}.items():
            # LeCun: A ~ N(0, 1/n), B ~ N(0, 1/r2), C ~ N(0, 1/r1), so that A x, B A x and C B A x are as
            # large as x. The text does not say how dW starts at zero; B = 0 does it, as in TLoRA.
            matrix = torch.zeros(shape, **like)
            if letter == "B" and init_b == "identity":
                nn.init.eye_(matrix)
            elif letter != {"zero": "B", "identity": "C"}.get(init_b):  # which stays zero
                nn.init.normal_(matrix, std=shape[1] ** -0.5)
            if letter.lower() in train:
                self.register_parameter(letter, nn.Parameter(matrix))
            else:
                self.register_buffer(letter, matrix)

    called = weight_read = False  # `merge` looks at these

    # Some models look at their layers (T5 asks for wo.weight.dtype), a few compute with the weight themselves.
    @property
    def weight(self) -> torch.Tensor:
        self.weight_read = True
        return self.base.weight

    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    @property
    def options(self) -> dict:
        """What `load` gives to __init__; B's start does not matter then."""
        train = "".join(letter for letter in "abc" if letter.upper() in self._parameters)
        r1, r2 = self.B.shape
        return {"rank1": r1, "rank2": r2, "train": train, "init_b": "zero", "ratio": self.ratio}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, r2), Q (r2, n) with dW = P @ Q, B absorbed in P."""
        return self.C @ self.B, self.A

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["called"] = True  # nn.Module's own way to set it takes a hundred times as long
        x = input  # (..., n), under nn.Linear's name for it: some callers use keywords
        h = F.linear(x, self.A.to(x.dtype))  # (..., r2)
        h = F.linear(h, self.B.to(x.dtype))  # (..., r1)
        return self.base(x) + F.linear(h, self.C.to(x.dtype))  # Eq. 2: (..., m)

    def _apply(self, fn, recurse=True):
        """.to(dtype), .half(), .cuda() and the like: the base follows, the update stays at least float32."""
        if recurse:
            self.base._apply(fn)
        return super()._apply(at_least_float32(fn), recurse=False)


# ------------------------------------------------------ the learning-rate ratios (Sec. 3.2)
#
# Of the layer only Y = C B A X is looked at, with X (n, tokens) and W0 = 0. Each matrix should do an
# equal part of the work: a step should lower the loss by the same amount through A, through B and
# through C. So find out how much each does at learning rate 1; its rate is the inverse of that.


def loss_change(gradient: torch.Tensor, rate: float) -> torch.Tensor:
    """What one step of one matrix changes the loss by, to first order. A tensor of one number, <= 0."""
    step = -rate * gradient.sign()  # Eq. 4: Adam with beta1 = beta2 = 0 is sign descent
    return (gradient * step).sum()  # Eq. 3, which makes it -rate ||gradient||_1 (Eq. 5)


def gradients(
    A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 6: the loss's gradients for A, B, C. G (m, n) = dL/dY X^T is the one W0 would have."""
    return (
        B.T @ C.T @ G,  # (r2, n)
        C.T @ G @ A.T,  # (r1, r2)
        G @ A.T @ B.T,  # (m, r1)
    )


def gradient_sizes(m: int, n: int, r1: int, r2: int, estimate: str) -> tuple[float, float, float]:
    """How large one entry of each gradient is beside one entry of G, at the LeCun start.

    "paper" multiplies the sizes of the two matrices that each line of Eq. 6 puts around G, and leaves
    out that a matrix product sums. "summed" (ours) keeps the sums: k terms of random sign add up to
    sqrt(k) times one of them.
    """
    A, B, C = n**-0.5, r2**-0.5, r1**-0.5  # the standard deviations of their entries
    if estimate == "paper":
        return B * C, C * A, A * B
    return (
        B * C * math.sqrt(r1 * m),  # C B sums over r1, (C B)^T G over m
        C * A * math.sqrt(m * n),  # C^T G sums over m, G A^T over n
        A * B * math.sqrt(n * r2),  # G A^T sums over n, (G A^T) B^T over r2
    )


def estimated_changes(m: int, n: int, r1: int, r2: int, estimate: str) -> tuple[float, float, float]:
    """How much A, B and C change the loss at learning rate 1: the number of entries times their size."""
    size_A, size_B, size_C = gradient_sizes(m, n, r1, r2, estimate)
    return r2 * n * size_A, r1 * r2 * size_B, m * r1 * size_C


def rate_ratios(ratio: float | str, m: int, n: int, r1: int, r2: int) -> tuple[float, float, float]:
    """(1, eta_B / eta_A, eta_C / eta_A) for `ratio`: "paper", "summed" or a number lambda.

    "paper" and "summed" make the three loss changes of their estimate equal. For 768 x 768 and rank 8
    they give 1 : 940.6 : 9.8 and 1 : 96 : 9.8. This is a finding about the paper: without the sums, its
    eta_B is too large by sqrt(n / r1), and its eta_C by sqrt(n r2 / (m r1)), here 1. Measured on random
    layers of that shape (B at N(0, 1/r2): at B = 0 only B has a gradient), A, B and C change the loss
    about as 1 : 0.01 : 0.05 at equal rates. "paper" overshoots: B does 7 to 16 times as much as A, and
    C 0.3 to 1.1 times. "summed" brings B to 0.6 to 2.3. Where signs are not random both miss by more:
    the gradient of a squared error contains the update's own output, and over 1,024 tokens B does
    about 55 and 6 times as much as A. (All of it in tests/test_tlora_plus.py.)

    lambda takes the place of n in the simplified ratios. With r1 = r2 = 1 "paper" is Eq. 7,
    1 : n^(3/2) : n^(3/2) / m; the paper drops the shape's aspect m / n (Eq. 8), and its experiments
    make n a number to choose, from 1 (plain AdamW) to 10. They recommend 4 to 8; 4 gives 1 : 8 : 2.
    """
    if ratio in ("paper", "summed"):
        change_A, change_B, change_C = estimated_changes(m, n, r1, r2, ratio)
        return 1.0, change_A / change_B, change_A / change_C
    return 1.0, ratio**1.5, ratio**0.5  # type: ignore[operator]  # Eq. 8


def learning_rates(lr: float, ratio: float | str, m: int, n: int, r1: int, r2: int) -> dict[str, float]:
    """{"A": eta_A, "B": eta_B, "C": eta_C}. lr is eta_A for a number, eta_B for "paper" and "summed".

    (An eta_A of 1e-4 would make "paper" train B at 0.1 in a layer of 768.)
    """
    ratios = rate_ratios(ratio, m, n, r1, r2)
    anchor = ratios[1] if ratio in ("paper", "summed") else 1.0
    return {letter: lr * (r / anchor) for letter, r in zip("ABC", ratios)}


def parse_ratio(ratio: float | str) -> float | str:
    """What `ratio` says: "paper", "summed" or a number. ValueError if it is none of these."""
    if ratio in ("paper", "summed"):
        return ratio
    try:
        number = float(ratio)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"ratio '{ratio}' is not one of paper, summed or a number above 0")
    return number


# ------------------------------------------------------------------------- the verbs


def inject(
    model: nn.Module,
    targets: Sequence[str],
    exclude: Sequence[str] = (),
    *,
    rank: int = 8,
    rank1: int = 0,
    rank2: int = 0,
    train: Literal["abc", "ab", "bc", "b"] = "abc",
    init_b: Literal["zero", "lecun", "identity"] = "zero",
    ratio: str = "4",
) -> list[str]:
    """Freeze `model` and wrap every nn.Linear whose dotted name ends in one of `targets`.

    A target that is a layer's full name means that layer alone; `exclude` names, in the same words, layers
    to leave as they are. The task head is frozen too: unfreeze it afterwards. Returns the names wrapped, in
    the model's order. ValueError if a target matches nothing, a rank does not fit a layer, or an option is
    unknown.

    Options:
        rank: rank of the update
        rank1: rank r1 of C (m, r1) and B (r1, r2); 0 means rank
        rank2: rank r2 of B (r1, r2) and A (r2, n); 0 means rank
        train: the matrices to train; the others stay as they were drawn
        init_b: B's start; zero leaves the model's function as it is, lecun (the derivation's N(0, 1/r2))
            changes it before the first step, identity is LoRA's start (B = I and C zero instead)
        ratio: learning rates of A, B and C: a number lambda makes them 1, lambda^1.5 and lambda^0.5 times
            the run's (4 to 8 is the paper's advice, 1 is plain AdamW); paper and summed give B the run's
            and derive A's and C's from each layer's shape
    """
    linears = find_linears(model, targets, exclude)
    rank1, rank2 = rank1 or rank, rank2 or rank
    for name, linear in linears.items():
        for r in (rank1, rank2):
            if isinstance(r, float) or not 1 <= r <= min(linear.weight.shape):
                raise ValueError(
                    f"rank {r} does not fit layer {name} {tuple(linear.weight.shape)}: "
                    f"allowed are 1 to {min(linear.weight.shape)}, or exclude it"
                )
    for option, value in (("train", train), ("init_b", init_b)):
        allowed = get_args(inject.__annotations__[option])
        if value not in allowed:
            raise ValueError(f"{option} '{value}' is not one of {', '.join(allowed)}")
    if init_b == "identity" and "c" not in train:
        raise ValueError(f"init_b identity starts C at zero, so C has to be trained, and train is '{train}'")
    ratio = parse_ratio(ratio)
    model.requires_grad_(False)
    for name, linear in linears.items():
        layer = TLoRAPlusLinear(linear, rank1, rank2, train, init_b, ratio)
        replace(model, name, layer.train(linear.training))
    return list(linears)


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW: A's, B's and C's by learning rate; the task head at lr; one decay.

    AdamW's decay is lr * weight_decay, so it follows each group's rate.
    """
    groups = {}  # (matrix, learning rate) -> parameters
    for layer in model.modules():
        if isinstance(layer, TLoRAPlusLinear):
            (m, r1), (r2, n) = layer.C.shape, layer.A.shape
            for letter, rate in learning_rates(lr, layer.ratio, m, n, r1, r2).items():
                if getattr(layer, letter).requires_grad:
                    groups.setdefault((letter, rate), []).append(getattr(layer, letter))
    matrices = {p for params in groups.values() for p in params}
    head = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    if head:
        groups["head", lr] = head
    return [{"params": p, "lr": rate, "weight_decay": weight_decay} for (_, rate), p in groups.items()]


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Fold dW into W0 and give the plain nn.Linear back; returns the names merged.

    Summed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped,
    so a second merge is refused, and as `check_mergeable` says.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, TLoRAPlusLinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no TLoRAPlusLinear (merged already?)")
    check_mergeable(wrapped)
    for name, layer in wrapped.items():
        with torch.autocast(layer.base.weight.device.type, enabled=False):  # which would make the products bfloat16
            P, Q = layer.factors()
            layer.base.weight.copy_(layer.base.weight + P @ Q)  # P @ Q is float32 at least, and so is the sum
        replace(model, name, layer.base)
    return list(wrapped)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter alone: all that is trained (the task head too), what was drawn, and how to wrap it again.

    safetensors if that is installed, else a file of torch.save, in a new folder if need be. What is frozen is
    not in it, a frozen head neither, but what BatchNorms counted. Under fully_shard every process has to call
    it. ValueError if `path` is a folder, if nothing is wrapped.
    """
    # Their names are no part of the layers'.
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel", "AveragedModel"):
        model = next(model.children())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TLoRAPlusLinear)}
    if not layers:
        raise ValueError("nothing to save: the model holds no TLoRAPlusLinear (merged already?)")
    if others := [name for name, m in model.named_modules() if hasattr(m, "factors") and name not in layers]:
        raise ValueError(f"layer {others[0]} is adapted by another method: save each part of the model by itself")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {f"{name}.{key}": t for name, layer in layers.items() for key, t in own_state(layer).items()}
    options = {name: layer.options for name, layer in layers.items()}
    tensors = trained | own | running_statistics(model)
    write_adapter(path, tensors, {"method": "tlora_plus", "layers": options, "trained": list(trained)})


def load(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Wrap the layers of a base model as those of the saved one were, and fill them; returns their names.

    The model is ready for more training or for `merge`. Build the optimizer afterwards. ValueError, before
    anything is changed, if the file is another method's or does not fit the model.
    """
    tensors, metadata = read_adapter(path, "tlora_plus")
    layers = {}
    for name, linear in find_saved(model, path, metadata["layers"]).items():
        layers[name] = TLoRAPlusLinear(linear, **metadata["layers"][name]).train(linear.training)
    place_saved(model, path, layers, tensors, metadata["trained"])
    return list(layers)


# ------------------------------------- walking the modules, and files (the same in every file)


def find_linears(model: nn.Module, targets: Collection[str], exclude: Collection[str] = ()) -> dict[str, nn.Linear]:
    """{dotted name: nn.Linear} for the layers that `targets` name and `exclude` does not. ValueError as `inject` says."""
    modules = dict(model.named_modules())
    adapted = [name for name, m in modules.items() if hasattr(m, "factors")]
    if adapted:
        raise ValueError(f"the model is adapted already ({adapted[0]}): merge it first")
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    named = match(modules, targets, "target")
    found = named - match(modules, exclude, "exclude")
    if not found:
        raise ValueError("every layer that the targets name is excluded" if named else "no targets given")
    owners = {}  # parameter -> the modules that hold it, a module with two names twice
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(name)
    for name in sorted(found):
        weight, parent = linears[name].weight, type(modules[name.rpartition(".")[0]])
        # Packed 4- and 8-bit numbers are a class or a dtype of their own; a parametrized weight is no Parameter.
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            kind = f"a {type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"layer {name} is not adapted: its weight is {kind}, not a plain Parameter of 16 bits or more: "
                "load the model unquantised, or exclude the layer"
            )
        if weight.is_meta and hasattr(linears[name], "_hf_hook"):
            raise ValueError(f"layer {name} is not adapted: accelerate keeps its weight elsewhere: load without offloading")
        if len(owners[weight]) > 1:
            raise ValueError(f"layer {name} is not adapted: {owners[weight]} share its weight")
        if issubclass(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"layer {name} is not adapted: nn.{parent.__name__} reads its weight, not calling it")
    if share := experts_share(modules):
        warnings.warn(f"{share:.0%} of the blocks' numbers are experts kept as 3-D parameters: these are not adapted")
    return {name: linear for name, linear in linears.items() if name in found}


def match(modules: Mapping[str, nn.Module], words: Collection[str], option: str) -> set[str]:
    """The set of nn.Linear names that end in one of `words`; a word that is a layer's full name means that layer alone."""
    found = set()
    linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    for word in [words] if isinstance(words, str) else words:
        hits = [word] if word in linears else [name for name in linears if name.endswith("." + word)]
        if not hits:
            kinds = [type(m).__name__ for name, m in modules.items() if f".{name}".endswith(f".{word}")]
            wrong = f"is a {kinds[0]}, no nn.Linear" if kinds else "matches no nn.Linear"
            ends = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(f"{option} '{word}' {wrong}; names end in: {', '.join(ends)}")
        found.update(hits)
    return found


def experts_share(modules: Mapping[str, nn.Module]) -> float:
    """Which share of the numbers in the blocks (what is inside an nn.ModuleList) stands in 3-D parameters.

    Mixtral and Qwen-MoE keep their experts so, as one parameter (experts, m, n). Convolutions are 3-D as well.
    """
    lists = tuple(name + "." for name, m in modules.items() if isinstance(m, nn.ModuleList))
    numbers = {False: 0, True: 0}
    for name, module in modules.items():
        if name.startswith(lists):
            for p in module.parameters(recurse=False):
                numbers[p.ndim == 3 and not type(module).__module__.startswith("torch.")] += p.numel()
    return numbers[True] / max(sum(numbers.values()), 1)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` points to."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def at_least_float32(move: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`move`, what .to(), .half(), .cuda() and the like do to a tensor, but that nothing gets narrower than float32."""

    def moved(t):
        new = move(t)
        wide = torch.promote_types(new.dtype, torch.float32) if new.is_floating_point() else new.dtype
        return new if new.dtype == wide else t.to(new.device, wide)

    return moved


def check_mergeable(layers: Mapping[str, nn.Module]) -> None:
    """ValueError if folding a layer's update into W0 would not keep what the model computes.

    Its numbers are in shards (fully_shard), or its base is no W0 x + b (BitNet's, a hook), or the model computes with the
    weight (Mamba's dt_proj) instead of calling the layer, whose update had no part: not known before a forward pass.
    """
    called = any(layer.called for layer in layers.values())
    if not called and (read := [name for name, layer in layers.items() if layer.weight_read]):
        warnings.warn(f"layer {read[0]} was read and no adapted layer called: if the model has run, its update did nothing")
    for name, layer in layers.items():
        base, W, b = layer.base, layer.base.weight, layer.base.bias
        if any(hasattr(p, "full_tensor") for p in layer.parameters()):
            raise ValueError(f"layer {name} is in shards: save in every process, load on a whole base, and merge there")
        if not W.is_meta and (b is None or b.dtype == W.dtype):  # others run under autocast alone
            x = torch.linspace(-1, 1, base.in_features).to(W)[None, None]  # a batch: hooks may index it
            wanted = F.linear(x, W, b).float()
            if (base(x).float() - wanted).norm() > 0.05 * wanted.norm():
                raise ValueError(f"layer {name} is not to be merged: its base, a {type(base).__name__}, computes no W0 x + b")
        if called and layer.weight_read and not layer.called:
            raise ValueError(
                f"layer {name} is read and never called, so its update did nothing and is not to be merged: "
                f"train with exclude=['{name.rpartition('.')[2]}'], or put {name}.base in its place"
            )


def write_adapter(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict) -> None:
    """One file, as safetensors if that is installed, else as torch's. A temporary name first: a kill leaves no half."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a file in it")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}  # of fully_shard
    # Copies: safetensors refuses parameters that share memory. _orig_mod: torch.compile's name for a block it has compiled.
    tensors = {name.replace("_orig_mod.", ""): t.detach().to("cpu", copy=True).contiguous() for name, t in whole.items()}
    metadata = {key: json.dumps(value).replace("_orig_mod.", "") for key, value in metadata.items()}
    temporary = f"{path}.{os.getpid()}.tmp"  # every process may save
    try:
        from safetensors.torch import save_file
    except ImportError:
        torch.save({"tensors": tensors, "metadata": metadata}, temporary)
    else:
        save_file(tensors, temporary, metadata)
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_adapter(path: str | os.PathLike[str], method: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, metadata) of a file of `write_adapter`; no code in it is run. ValueError if it is not `method`'s."""
    try:
        with open(path, "rb") as f:
            zipped = f.read(2) == b"PK"  # as torch's files are, and safetensors' are not
        if zipped:
            file = torch.load(path, "cpu", weights_only=True)
            tensors, metadata = file.get("tensors"), file.get("metadata")
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as f:
                tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    except Exception as e:  # no such file, no safetensors, damaged: each raises a kind of its own
        raise ValueError(f"{path} cannot be read: {e}".splitlines()[0]) from None
    if not {"method", "layers", "trained"} <= set(metadata or ()):
        raise ValueError(f"{path} is not a file that `save` wrote")
    metadata = {key: json.loads(value) for key, value in metadata.items()}
    if metadata["method"] != method:
        raise ValueError(f"{path} is an adapter of {metadata['method']}, not of {method}")
    return tensors, metadata


def find_saved(model: nn.Module, path: str | os.PathLike[str], names: Collection[str]) -> dict[str, nn.Linear]:
    """{name: nn.Linear} for the layers `names` of an adapter file. ValueError if the model lacks one."""
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(modules.get(name), nn.Linear) and not hasattr(modules.get(name), "factors"):
            raise ValueError(f"{path} does not fit: it adapts {name}, and the model has no nn.Linear of that name")
    linears = find_linears(model, names)
    if any(linear.weight.is_meta for linear in linears.values()):
        raise ValueError("the model is on the meta device, without numbers: load its own first, then the adapter")
    return linears


def place_saved(
    model: nn.Module,
    path: str | os.PathLike[str],
    layers: Mapping[str, nn.Module],
    tensors: dict[str, torch.Tensor],
    trained: Collection[str],
) -> None:
    """Put the new `layers` into the model, then `tensors` into both. ValueError before anything of the model changes."""
    have = dict(model.named_parameters()) | running_statistics(model)
    for name, layer in layers.items():
        have.update({f"{name}.{key}": t for key, t in layer.state_dict().items()})
    need = {f"{name}.{key}" for name, layer in layers.items() for key in own_state(layer)}
    for key in sorted(need | tensors.keys()):
        found, right = (tuple(side[key].shape) if key in side else "missing" for side in (tensors, have))
        if found != right:
            raise ValueError(f"{path} does not fit: {key} is {found} in the file, {right} in the model")
    for name, layer in layers.items():
        replace(model, name, layer)
    model.load_state_dict(tensors, strict=False)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the BatchNorms keep of the batches they saw, {name: buffer}: no gradient trains it, and eval mode computes with it."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    return {f"{name}.{key}": t for name, m in norms.items() for key, t in m.named_buffers()}


def own_state(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What an adapted layer holds beside its base: {name: tensor}, parameters and buffers."""
    return {key: t for key, t in layer.state_dict().items() if not key.startswith("base.")}


# -------------------------------------------------------------------------- the demo


def main() -> None:
    torch.manual_seed(0)
    m = n = 768
    r1 = r2 = 8
    print(f"learning rates of A : B : C, layer {m} x {n}, rank {r1}, and what each matrix then changes")
    print("the loss by, as multiples of what A does (Eq. 5, measured on random matrices):")
    A, B, C = torch.randn(r2, n) / n**0.5, torch.randn(r1, r2) / r2**0.5, torch.randn(m, r1) / r1**0.5
    G = torch.randn(m, 64) @ torch.randn(64, n)  # dL/dY X^T of 64 tokens
    for ratio in ("1", "4", "paper", "summed"):
        rates = rate_ratios(parse_ratio(ratio), m, n, r1, r2)
        changes = [loss_change(g, rate) for g, rate in zip(gradients(A, B, C, G), rates)]
        print(f"  ratio {ratio:7s}" + " : ".join(f"{rate:.4g}" for rate in rates).ljust(20), end="")
        print(" : ".join(f"{change / changes[0]:.2f}" for change in changes))

    print("training with two ratios:")
    for ratio in ("1", "4"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48))
        x = torch.randn(256, 64)
        y = model(x).detach() + x @ (torch.randn(64, 4) @ torch.randn(4, 48)) / 16  # a shift of rank 4
        before = model(x)
        inject(model, ["0"], rank=4, ratio=ratio)
        print(f"  ratio {ratio}, output unchanged at the start:", torch.equal(model(x), before))
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.0))
        for step in range(201):
            loss = F.mse_loss(model(x), y)
            if step % 100 == 0:
                print(f"    step {step:3d}  loss {loss.item():.6f}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    adapted = model(x)
    merge(model)
    print(f"merged into {model[0]}: largest difference {(model(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
