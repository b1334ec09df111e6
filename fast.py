"""Any layer with factors() made fast: the same function and the same gradients, in fewer and better products.

A low-rank layer computes h = W0 x + b + P Q x with P (m, k), Q (k, n) and W0 frozen. Written as a chain of PyTorch
operations it makes three copies of h, keeps x for every product that reads it, and lets autograd choose the order of the
backward products. Here the whole layer is one autograd.Function, so forward and backward can be chosen:

  - In forward, (W0 + P Q) x is one product. Forming W0 + P Q costs m n k, the thin products P (Q x) cost T (m + n) k for T
    tokens: with enough tokens the sum is the cheaper one (`fold_from`). It is formed again in backward, never kept.
    bfloat16, float16 and TF32 would round P Q away next to W0: there the two thin products are added to W0 x.
  - In backward, W0 gets no gradient, so there is one large product, dL/dx, and the thin ones for P and Q. What is kept is
    x where Q is trained (all layers that read x share it), and h = Q x, k numbers a token instead of n, where it is not.
  - Thin results are made lying, (k, T) or (k, n): the libraries' products of few rows are 2 to 10 times as fast as
    those of few columns.
  - Dropout keeps one bit an entry.

    inject(model, targets, ...)     # of any of the method files
    print(speed_up(model))          # {layer: how it computes}
    ...                             # train, grow, save, merge as before; slow_down(model) undoes it

Second derivatives are refused. Dropout on the adapter's input draws other zeros than torch does. This file needs torch alone.
"""

import functools

import torch
import torch.nn as nn


def fold_from(m: int, n: int) -> int:
    """The number of tokens from which W0 + P Q is cheaper than two thin products, whatever the rank k.

    Each entry that P Q is added to costs 2 k operations, one read and one write: m n entries in forward and in backward, or
    T m of the output in forward and T n of dL/dx in backward.
    """
    return -(-2 * m * n // (m + n))


def can_fold(dtype: torch.dtype) -> bool:
    """Whether W0 + P Q is as exact as the sum of the products: in float32 that is not rounded further, and in float64."""
    try:
        return dtype == torch.float64 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest")
    except RuntimeError:  # TF32 was set by the newer names (fp32_precision), which the older one does not read
        return False


def draw_bits(count: int, p: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """`count` random bits in words of 64, each 0 with probability p (1/256 to 255/256), and the factor 1 / (1 - p).

    With 1 - p = 0.b1 b2 .. in binary and w a fair bit, a bit is 1 with that probability if it is (w or rest) where b1 = 1
    and (w and rest) where b1 = 0, `rest` made so of b2 ..: p = 0.5 takes one fair bit an entry, any p at most eight.
    """
    keep = 256 - min(max(round(256 * p), 1), 255)  # of 256
    bits = None  # zeros, until the last digit that is 1
    for digit in (keep >> place & 1 for place in range(8)):
        if digit or bits is not None:
            fair = torch.randint(-(2**63), 2**63 - 1, (-(-count // 64),), device=device)
            bits = fair if bits is None else fair | bits if digit else fair & bits
    return bits, 256 / keep  # type: ignore[return-value]


def mask(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bits as 0. and 1. in the shape of `like`: first the lowest bit of every byte, then the next."""
    places = torch.arange(8, dtype=torch.uint8, device=like.device)[:, None]
    keep = (bits.view(torch.uint8) >> places).bitwise_and_(1)  # (8, bytes)
    return keep.view(-1)[: like.numel()].view(like.shape).to(like.dtype)


class LowRank(torch.autograd.Function):
    """W0 x + b + P Q x for x (..., n), computed in `dtype`. `side`, "input" or "output" of the update, is where `bits` drop."""

    @staticmethod
    def forward(ctx, x, P, Q, W0, bias, bits, side, dtype, fold):
        X, P_, Q_, W, b = cast(dtype, x.reshape(-1, x.shape[-1]), P, Q, W0, bias)  # X (T, n)
        trains_P, trains_Q = ctx.needs_input_grad[1:3]
        h = None
        if not fold or (trains_P and not trains_Q):
            h = Q_ @ (mask(bits, X).mul_(X) if side == "input" else X).t()  # (k, T)
        W = torch.addmm(W, P_, Q_) if fold else W
        y = X @ W.t() if b is None else torch.addmm(b, X, W.t())  # (T, m)
        if side == "output":
            y.addcmul_(h.t() @ P_.t().contiguous(), mask(bits, y))
        elif not fold:
            y.addmm_(h.t(), P_.t().contiguous())
        ctx.save_for_backward(x if trains_Q else None, None if trains_Q else h, P, Q, W0, bits)
        ctx.how = side, dtype, fold
        # A view would not let the model change y in place, as nn.ReLU(inplace=True) does.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], W.shape[0]])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, h, P, Q, W0, bits = ctx.saved_tensors
        side, dtype, fold = ctx.how
        trains_x, trains_P, trains_Q = ctx.needs_input_grad[:3]
        G, P_, Q_, W = cast(dtype, grad.reshape(-1, grad.shape[-1]), P, Q, W0)  # G (T, m)
        U = mask(bits, G).mul_(G) if side == "output" else G  # the update's gradient
        dx = dP = dQ = None
        if trains_Q or (trains_x and not fold):
            s = P_.t() @ U.t()  # (k, T)
        if trains_Q:
            X = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, n)
            X = mask(bits, X).mul_(X) if side == "input" else X
            dQ = s @ X  # (k, n)
            h = Q_ @ X.t() if trains_P else None  # (k, T), sooner made again than kept
        if trains_P:
            dP = (h @ U).t()  # type: ignore[operator]  # (m, k)
        if trains_x:
            dx = G @ (torch.addmm(W, P_, Q_) if fold else W)  # (T, n)
            if side == "input":
                dx.addcmul_(s.t() @ Q_, mask(bits, dx))
            elif not fold:
                dx.addmm_(s.t(), Q_)
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
        return dx, dP, dQ, None, None, None, None, None, None  # autograd casts them to what x, P and Q are


def cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list:
    return [None if t is None else t.to(dtype) for t in tensors]


class Fast:
    """Stands before the class of a layer, and takes over its forward. All else is the layer's own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["called"] = True  # as the methods' own layers say, for their `merge`
        x, base = input, self.base
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        hooked = hooked or "forward" in base.__dict__  # accelerate's
        if hooked or any(p.requires_grad for p in base.parameters()):
            return super().forward(x)  # what is promised here is for a frozen W0 that is called by nobody else
        W0 = base.weight
        (m, n), tokens = W0.shape, x.numel() // x.shape[-1]
        P, Q = self.factors()
        side = bits = None
        p = getattr(self, "dropout", 0.0)
        if self.training and p:
            side = dropout_side(self)
            bits, scale = draw_bits(tokens * (n if side == "input" else m), p, x.device)
            P = scale * P
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        fold = side is None and can_fold(dtype) and tokens >= fold_from(m, n)
        return LowRank.apply(x, P, Q, W0, base.bias, bits, side, dtype, fold)

    def __reduce_ex__(self, protocol):  # for pickle and deepcopy, which look classes up by address: this one is made, not found
        return revive, (slow_class(self),), *super().__reduce_ex__(protocol)[2:]


def dropout_side(layer: nn.Module) -> str:
    """TLoRA drops of the update's output, every other method of its input."""
    return "output" if any(cls.__name__ == "TLoRALinear" for cls in type(layer).__mro__) else "input"


def slow_class(layer: nn.Module) -> type:
    return type(layer).__mro__[2]  # the class itself, Fast, the layer's


@functools.cache
def fast_class(cls: type) -> type:
    return type("Fast" + cls.__name__, (Fast, cls), {})


def revive(cls: type) -> nn.Module:
    return cls.__new__(fast_class(cls))


def speed_up(model: nn.Module) -> dict[str, str]:
    """Let every layer with factors() over a plain nn.Linear compute through `LowRank`. Returns {layer: how, in words}."""
    words = {}
    for name, layer in model.named_modules():
        plain = type(getattr(layer, "base", None)) is nn.Linear and not getattr(layer, "reads_dW", False)
        if plain and has_factors(layer) and not isinstance(layer, Fast):
            layer.__class__ = fast_class(type(layer))  # type: ignore[arg-type]
        if isinstance(layer, Fast):
            words[name] = describe(layer)
    return words


def has_factors(layer: nn.Module) -> bool:
    """DoRA's layers say in words that their change is not of low rank: they stay as they are."""
    try:
        return bool(layer.factors())
    except (AttributeError, ValueError):
        return False


def slow_down(model: nn.Module) -> None:
    """Undo `speed_up`."""
    for layer in model.modules():
        if isinstance(layer, Fast):
            layer.__class__ = slow_class(layer)


def describe(layer: nn.Module) -> str:
    W0 = layer.base.weight
    device, dtype = W0.device.type, W0.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # as in `Fast.forward`
        dtype = torch.get_autocast_dtype(device)
    if not can_fold(dtype):
        return f"two thin products ({str(dtype)[6:]} arithmetic would round the update away in W0 + PQ)"
    one = f"W0 + PQ in one product from {fold_from(*W0.shape)} tokens on, two thin products below"
    return f"two thin products for the dropout's sake; in eval mode {one}" if getattr(layer, "dropout", 0.0) else one
