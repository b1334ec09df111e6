"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2022, arXiv 2106.09685).

The yardstick of all four methods. A frozen linear layer W0 (m, n) gets an update of rank r:

    h = W0 x + (alpha / r) B A x        A (r, n), B (m, r)        (Sec. 4.1, Eq. 3 there)

A is drawn at random and B starts at zero, so the update starts at exactly zero. Both are trained:
r (m + n) numbers per layer. This file needs torch alone; copy it and call

    names = inject(model, ["q_proj", "v_proj"], rank=8, alpha=16.0)
    model.score.requires_grad_(True)    # the task head, whatever its name: inject froze it too
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.0))
    ...                                 # train as usual
    save(model, "adapter.safetensors")  # `load` puts it on the base model again
    merge(model)                        # back to plain nn.Linear layers

`python baselines/lora.py` shows it on one layer.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """A frozen nn.Linear with the update (alpha / r) B A. Input (..., n), output (..., m)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        m, n = base.weight.shape
        # At least float32, whatever the base: a step of 1e-4 is rounded away beside a bfloat16 weight of 0.1.
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.base = base
        self.alpha, self.dropout = alpha, dropout
        self.A = nn.Parameter(torch.empty(rank, n, **like))
        self.B = nn.Parameter(torch.zeros(m, rank, **like))
        # Microsoft's code and PEFT draw A so: uniform on +-1/sqrt(n). B is the one that is zero.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

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
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def options(self) -> dict:
        """What `load` gives to __init__."""
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P (m, r), Q (r, n) with dW = P @ Q, the scaling absorbed in P."""
        return self.scaling * self.B, self.A

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["called"] = True  # nn.Module's own way to set it takes a hundred times as long
        x = input  # (..., n), under nn.Linear's name for it: some callers use keywords
        h = F.dropout(x, self.dropout, self.training)  # (..., n)
        h = F.linear(h, self.A.to(x.dtype))  # (..., r)
        # Scaling B costs m*r numbers, scaling the output would cost m for every token.
        return self.base(x) + F.linear(h, (self.scaling * self.B).to(x.dtype))  # (..., m)

    def _apply(self, fn, recurse=True):
        """.to(dtype), .half(), .cuda() and the like: the base follows, the update stays at least float32."""
        if recurse:
            self.base._apply(fn)
        return super()._apply(at_least_float32(fn), recurse=False)


# ------------------------------------------------------------------------- the verbs


def inject(
    model: nn.Module,
    targets: Sequence[str],
    exclude: Sequence[str] = (),
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> list[str]:
    """Freeze `model` and wrap every nn.Linear whose dotted name ends in one of `targets`.

    A target that is a layer's full name means that layer alone; `exclude` names, in the same words, layers
    to leave as they are. The task head is frozen too: unfreeze it afterwards. Returns the names wrapped, in
    the model's order. ValueError if a target matches nothing or a rank does not fit a layer.

    Options:
        rank: rank r of the update
        alpha: the update is scaled by alpha / rank
        dropout: dropout on the adapter's input
    """
    linears = find_linears(model, targets, exclude)
    for name, linear in linears.items():
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(
                f"rank {rank} does not fit layer {name} {tuple(linear.weight.shape)}: "
                f"allowed are 1 to {min(linear.weight.shape)}, or exclude it"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")
    model.requires_grad_(False)
    for name, linear in linears.items():
        replace(model, name, LoRALinear(linear, rank, alpha, dropout).train(linear.training))
    return list(linears)


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Groups for torch.optim.AdamW: whatever is trainable (A, B, the task head), one rate, one decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Fold dW into W0 and give the plain nn.Linear back; returns the names merged.

    Summed in float32 (float64 for a float64 layer) and cast once. ValueError if nothing is wrapped,
    so a second merge is refused, and as `check_mergeable` says.
    """
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not wrapped:
        raise ValueError("nothing to merge: the model holds no LoRALinear (merged already?)")
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
    it. ValueError if `path` is a folder, if nothing is wrapped, or if a layer is of a baseline that builds on this file.
    """
    # Their names are no part of the layers'.
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel", "AveragedModel"):
        model = next(model.children())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("nothing to save: the model holds no LoRALinear (merged already?)")
    if others := [name for name, m in model.named_modules() if hasattr(m, "factors") and name not in layers]:
        raise ValueError(f"layer {others[0]} is adapted by another method: save each part of the model by itself")
    for name, layer in layers.items():
        if type(layer).__name__ not in ("LoRALinear", "FastLoRALinear"):
            raise ValueError(f"layer {name} is of {type(layer).__module__}, which builds on LoRA: keep its state_dict instead")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {f"{name}.{key}": t for name, layer in layers.items() for key, t in own_state(layer).items()}
    options = {name: layer.options for name, layer in layers.items()}
    tensors = trained | own | running_statistics(model)
    write_adapter(path, tensors, {"method": "lora", "layers": options, "trained": list(trained)})


def load(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Wrap the layers of a base model as those of the saved one were, and fill them; returns their names.

    The model is ready for more training or for `merge`. Build the optimizer afterwards. ValueError, before
    anything is changed, if the file is another method's or does not fit the model.
    """
    tensors, metadata = read_adapter(path, "lora")
    layers = {}
    for name, linear in find_saved(model, path, metadata["layers"]).items():
        layers[name] = LoRALinear(linear, **metadata["layers"][name]).train(linear.training)
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
    model = nn.Sequential(nn.Linear(64, 48))
    x = torch.randn(256, 64)
    y = model(x).detach() + x @ (torch.randn(64, 4) @ torch.randn(4, 48)) / 16  # a shift of rank 4
    before = model(x)
    inject(model, ["0"], rank=4, alpha=8.0)
    print("output unchanged at the start:", torch.equal(model(x), before))
    for name, p in model.named_parameters():
        print(f"  {name:14s} {str(tuple(p.shape)):10s} {'trained' if p.requires_grad else 'frozen'}")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    for step in range(301):
        loss = F.mse_loss(model(x), y)
        if step % 100 == 0:
            print(f"  step {step:3d}  loss {loss.item():.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted = model(x)
    merge(model)
    print(f"merged into {model[0]}: largest difference {(model(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
