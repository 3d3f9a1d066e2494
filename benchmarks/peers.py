"""What the search benchmarks measure: shapes, data, our layer, the other ways to do its work, and GEMM alone.

Nothing here knows a device, a clock or a report. Every peer starts from the same codebook and takes the same
input; the forms of others are written from their mathematics, or call the installed package.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fq import CodebookOptions, FeatureQuantize
from fq.search import nearest

DECAY, EPSILON = 0.8, 1e-5
TRAIN_MODES = ("train_forward", "train_step")
MODES = ("search", *TRAIN_MODES)
DATA = ("clustered", "feature_like")
LARGE = 1 << 27
"""Scores from which a shape gets fewer rounds and peers, and is warmed up with a part of its samples."""


class Shape(NamedTuple):
    """One case: samples, channels, height and width of the features, and number of codes."""

    batch: int
    dim: int
    side: int
    codebook_size: int

    @property
    def tokens(self) -> int:
        """N."""
        return self.batch * self.side**2

    @property
    def scores(self) -> int:
        """N K: entries of the matrix that a search need not keep."""
        return self.tokens * self.codebook_size

    @property
    def flop(self) -> int:
        """Of the one matrix product that a search cannot avoid."""
        return 2 * self.tokens * self.dim * self.codebook_size


class State(NamedTuple):
    """A codebook [K, D] and its moving averages: number of tokens [K] and their total [K, D]."""

    codes: Tensor
    number: Tensor
    total: Tensor


SHAPES = {
    "S1": Shape(64, 128, 8, 1024),
    "S2": Shape(64, 256, 16, 1024),
    "S3": Shape(64, 64, 32, 512),
    "S4": Shape(64, 512, 16, 1024),
    "S5": Shape(256, 256, 16, 4096),
    "C1": Shape(128, 256, 16, 1024),  # the first of the four sites of BigGAN-CIFAR, 64 real + 64 fake
    "C2": Shape(128, 256, 8, 1024),  # and each of the other three
}


def clustered(shape: Shape, *, seed: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, State]:
    """Tokens that are codes plus noise of unit variance.

    Args:
        shape: of the features.
        seed: of the draws, which are made on the CPU and so are the same for every device.
        device: of the result.

    Returns:
        Features ``[B, D, H, W]``, contiguous, and the state of a codebook with N(0, 1) codes.
    """
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape.codebook_size, shape.dim, generator=draw)
    chosen = torch.randint(shape.codebook_size, (shape.tokens,), generator=draw)
    tokens = torch.randn(shape.tokens, shape.dim, generator=draw).add_(codes[chosen])
    number = torch.bincount(chosen, minlength=shape.codebook_size).float().clamp(min=1.0)
    features = _images(tokens, shape)
    state = State(codes, number, codes * number[:, None])
    return features.to(device), State(*(value.to(device) for value in state))


@torch.no_grad()
def feature_like(shape: Shape, *, seed: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, State]:
    """Features of a small random convolutional network on smooth images, and a codebook that followed them.

    The codes start as tokens of a batch and then see twelve more batches.

    Args:
        shape: of the features.
        seed: of network and images, drawn on the CPU.
        device: of the result.

    Returns:
        Features ``[B, D, H, W]``, contiguous, and the state of the codebook.
    """
    draw = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(after, before, 3, 3, generator=draw).mul_((2 / (9 * before)) ** 0.5).to(device)
        for before, after in ((3, 32), (32, 64), (64, shape.dim))
    ]

    def features(batch: int) -> Tensor:
        noise = torch.randn(batch, 3, 2 * shape.side, 2 * shape.side, generator=draw).to(device)
        x = F.avg_pool2d(F.pad(noise, (4, 4, 4, 4), mode="circular"), 9, 1) * 9
        for weight, stride in zip(weights, (2, 1, 1), strict=True):
            x = F.conv2d(x if x.shape[1] == 3 else F.leaky_relu(x, 0.2), weight, stride=stride, padding=1)
        return x

    layer = FeatureQuantize(
        shape.dim, shape.codebook_size, decay=DECAY, options=CodebookOptions(init="data")
    ).to(device)
    for _ in range(13):
        layer(features(min(shape.batch, max(64, 2 * shape.codebook_size // shape.side**2))))
    state = State(layer.codebook.clone(), layer.ema_count.clone(), layer.ema_sum.clone())
    # In parts, so that only the result is large.
    parts = [features(min(64, shape.batch - start)) for start in range(0, shape.batch, 64)]
    return torch.cat(parts), state


MAKERS: dict[str, Callable[..., tuple[Tensor, State]]] = {
    "clustered": clustered,
    "feature_like": feature_like,
}


def _images(tokens: Tensor, shape: Shape) -> Tensor:
    return rearrange(tokens, "(b h w) d -> b d h w", b=shape.batch, h=shape.side).contiguous()


def as_tokens(features: Tensor) -> Tensor:
    """``[B, D, H, W]`` as ``[N, D]`` in row order: a view of channels-last features, a copy of others."""
    return rearrange(features, "b d h w -> (b h w) d")


class Output(NamedTuple):
    """What one training forward gives: features for the next layer, codes, and the loss."""

    features: Tensor
    indices: Tensor
    loss: Tensor


class Peer:
    """One way to search, and, if it has ``forward``, to be a quantisation layer in training."""

    modes: tuple[str, ...] = MODES
    channels_last = False
    from_images = False

    def __init__(self, state: State) -> None:
        self.codes, self.number, self.total = (value.clone() for value in state)

    def reset(self, state: State) -> None:
        """Return to a codebook: training forwards move it."""
        for mine, value in zip((self.codes, self.number, self.total), state, strict=True):
            mine.copy_(value)

    def search(self, tokens: Tensor) -> Tensor:
        """Codes ``[N]`` of tokens ``[N, D]``."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Output:
        """Search, gather, loss, straight-through output and codebook update of features ``[B, D, H, W]``."""
        raise NotImplementedError

    def step(self, features: Tensor, gradient: Tensor) -> Output:
        """A forward on a copy of the features that needs gradients, and the backward of <y, g> + sum loss."""
        leaf = features.clone().requires_grad_()
        output = self.forward(leaf)
        torch.autograd.backward((output.features, output.loss.sum()), (gradient, None))
        return output


class Ours(Peer):
    """``fq.FeatureQuantize(mode="replace")`` with its defaults, dead-code replacement included."""

    mode: Any = "replace"

    def __init__(self, state: State) -> None:
        size, dim = state.codes.shape
        self.layer = FeatureQuantize(dim, size, decay=DECAY, mode=self.mode).to(state.codes.device)
        self.reset(state)

    def reset(self, state: State) -> None:
        self.layer.load_original(
            state.codes.t(), state.total.t(), state.number, num_updates=100
        )  # past the grace of dead codes, so that their replacement is part of what is timed

    def search(self, tokens: Tensor) -> Tensor:
        return nearest(tokens, self.layer.codebook)

    def forward(self, features: Tensor) -> Output:
        return Output(*self.layer(features))


class OursRegularize(Ours):
    """The same with ``mode="regularize"``: loss and codebook update, features untouched."""

    modes = TRAIN_MODES
    mode = "regularize"


class OursChannelsLast(Ours):
    """The same for channels-last features."""

    modes = TRAIN_MODES
    channels_last = True


class OursFromImages(Ours):
    """Search that starts from contiguous NCHW features, so that the re-ordering to tokens counts too."""

    modes = ("search",)
    from_images = True

    def search(self, tokens: Tensor) -> Tensor:
        return super().search(as_tokens(tokens))


class Upstream(Peer):
    """The form of the released FQ-GAN layer: full distance matrix, integer and float one-hot, product."""

    def search(self, tokens: Tensor) -> Tensor:
        columns = self.codes.t()  # [D, K], as that layer stores them
        distance = tokens.square().sum(1, keepdim=True) - 2 * tokens @ columns
        distance = distance + columns.square().sum(0, keepdim=True)  # [N, K]
        return (-distance).max(1).indices

    def forward(self, features: Tensor) -> Output:
        tokens = as_tokens(features)
        with torch.no_grad():
            indices = self.search(tokens)
            one_hot = F.one_hot(indices, len(self.codes)).to(tokens.dtype)  # [N, K]
            quantized = _like(F.embedding(indices, self.codes), features)
            self.number.mul_(DECAY).add_(one_hot.sum(0), alpha=1 - DECAY)
            self.total.mul_(DECAY).add_((tokens.t() @ one_hot).t(), alpha=1 - DECAY)
            _laplace(self)
            share = one_hot.mean(0)
            self.perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        loss = (quantized - features).square().mean((1, 2, 3))  # [B]
        return Output(features + (quantized - features).detach(), indices, loss)


class Lucidrains(Peer):
    """``vector_quantize_pytorch.VectorQuantize(rotation_trick=False)``: EMA of decay 0.8, nothing else on."""

    rotation_trick: bool | None = False

    def __init__(self, state: State) -> None:
        from vector_quantize_pytorch import VectorQuantize

        size, dim = state.codes.shape
        self.layer = VectorQuantize(
            dim=dim, codebook_size=size, decay=DECAY, eps=EPSILON, accept_image_fmap=True,
            rotation_trick=self.rotation_trick,
        ).to(state.codes.device)  # fmt: skip
        self.reset(state)

    def reset(self, state: State) -> None:
        book = self.layer._codebook
        for mine, value in zip((book.embed, book.cluster_size, book.embed_avg), state, strict=True):
            mine.data.copy_(value)

    def search(self, tokens: Tensor) -> Tensor:
        # The module itself would gather and re-order on top of this; no call of it makes less than this one.
        return self.layer._codebook.eval()(tokens[None])[1][0]

    def forward(self, features: Tensor) -> Output:
        return Output(*self.layer.train()(features))


class LucidrainsRotation(Lucidrains):
    """The same as that package ships it: gradients through the rotation trick."""

    modes = TRAIN_MODES
    rotation_trick = None


class _IndexAdd(Peer):
    """A lean layer around a search: ``index_add_`` sums, smoothed EMA, one straight-through output."""

    def forward(self, features: Tensor) -> Output:
        tokens = as_tokens(features)
        with torch.no_grad():
            indices = self.search(tokens)
            quantized = _like(F.embedding(indices, self.codes), features)
            counts = torch.bincount(indices, minlength=len(self.codes)).to(tokens.dtype)
            sums = torch.zeros_like(self.total).index_add_(0, indices, tokens)
            self.number.lerp_(counts, 1 - DECAY)
            self.total.lerp_(sums, 1 - DECAY)
            _laplace(self)
        loss = F.mse_loss(features, quantized)
        return Output(features + (quantized - features).detach(), indices, loss)


class Taming(_IndexAdd):
    """The search of taming-transformers (einsum for the product, then argmin), with an ``index_add_`` EMA."""

    def search(self, tokens: Tensor) -> Tensor:
        distance = (
            tokens.square().sum(1, keepdim=True)
            + self.codes.square().sum(1)
            - 2 * torch.einsum("bd,dn->bn", tokens, self.codes.t())
        )  # [N, K]
        return distance.argmin(1)


class Cdist(_IndexAdd):
    """``torch.cdist`` and argmin, with an ``index_add_`` EMA."""

    def search(self, tokens: Tensor) -> Tensor:
        return torch.cdist(tokens, self.codes).argmin(1)


class Addmm(Peer):
    """The shortest search without ``|x|²``: ``addmm`` and argmin."""

    modes = ("search",)

    def search(self, tokens: Tensor) -> Tensor:
        return _addmm_argmin(tokens, self.codes)


class AddmmCompiled(Addmm):
    """The same under ``torch.compile``."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.compiled = torch.compile(_addmm_argmin, dynamic=False)

    def search(self, tokens: Tensor) -> Tensor:
        return self.compiled(tokens, self.codes)


class Faiss(Peer):
    """``faiss.IndexFlatL2``; building the index is not timed. CPU only."""

    modes = ("search",)

    def __init__(self, state: State) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self.index = faiss.IndexFlatL2(state.codes.shape[1])
        self.index.add(state.codes.numpy())

    def reset(self, state: State) -> None:
        """A search leaves the index as it is."""

    def search(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.index.search(tokens.numpy(), 1)[1][:, 0])


class KMeans(Peer):
    """``fast_pytorch_kmeans.KMeans.max_sim``: three-term similarity and max."""

    modes = ("search",)

    def __init__(self, state: State) -> None:
        from fast_pytorch_kmeans import KMeans as Clustering

        super().__init__(state)
        self.clustering = Clustering(len(self.codes), mode="euclidean")

    def search(self, tokens: Tensor) -> Tensor:
        return self.clustering.max_sim(tokens, self.codes)[1]


PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "ours_regularize": OursRegularize,
    "ours_channels_last": OursChannelsLast,
    "ours_from_nchw": OursFromImages,
    "upstream": Upstream,
    "lucidrains": Lucidrains,
    "lucidrains_rotation": LucidrainsRotation,
    "taming": Taming,
    "cdist": Cdist,
    "addmm": Addmm,
    "addmm_compiled": AddmmCompiled,
    "kmeans": KMeans,
    "faiss": Faiss,
}
_NEEDS = {"lucidrains": "vector_quantize_pytorch", "lucidrains_rotation": "vector_quantize_pytorch",
          "kmeans": "fast_pytorch_kmeans", "faiss": "faiss"}  # fmt: skip


def unavailable(name: str) -> str | None:
    """Why a peer cannot run here, or ``None``.

    Args:
        name: key of ``PEERS``.

    Returns:
        A reason to print in the place of its numbers.
    """
    package = _NEEDS.get(name)
    if package and importlib.util.find_spec(package) is None:
        return "not installed: pip install 'fq-gan[bench]'"
    compiler = os.environ.get("CXX", "g++")
    if name == "addmm_compiled" and shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) for torch.compile"
    return None


def exactness(indices: Tensor, tokens: Tensor, codes: Tensor, *, rows: int = 4096) -> dict[str, float]:
    """How far found codes are from the nearest ones, in float64.

    Args:
        indices: ``[N]`` (any shape of that size).
        tokens: ``[N, D]``.
        codes: ``[K, D]``.
        rows: at most that many tokens, evenly spread, are looked at.

    Returns:
        ``differ``: share whose code is not the nearest (lowest index of equals); ``beyond``: share whose
        squared distance exceeds the least by more than 8 · 2^-24 · (|x| + |e|)², |e| the longer of the two
        codes.
    """
    every = max(1, math.ceil(len(tokens) / rows))
    found, x, e = indices.flatten()[::every], tokens.detach()[::every].double(), codes.double()
    distance = x.square().sum(1, keepdim=True) - 2 * x @ e.t() + e.square().sum(1)  # [n, K]
    least, nearest_codes = distance.min(1)
    norms = e.norm(dim=1)
    slack = 8 * 2.0**-24 * (x.norm(dim=1) + torch.maximum(norms[found], norms[nearest_codes])).square()
    beyond = distance.gather(1, found[:, None])[:, 0] - least > slack
    return {
        "differ": (found != nearest_codes).double().mean().item(),
        "beyond": beyond.double().mean().item(),
    }


class Product:
    """The matrix product of a search and nothing else: the limit of what a search can reach."""

    def __init__(self, codes: Tensor, tokens: int) -> None:
        self.columns, self.weight = codes.t(), codes[:, :, None, None]
        self.kept = codes.new_empty(tokens, len(codes))
        self.chunk = max((1 << 21) // len(codes), 512)

    def mm(self, tokens: Tensor) -> None:
        """``torch.mm`` into a tensor that is kept."""
        torch.mm(tokens, self.columns, out=self.kept[: len(tokens)])

    def convolution(self, tokens: Tensor) -> None:
        """A 1x1 convolution of (16, D, n / 16, 1) channels-last pixels, a cache-sized chunk at a time."""
        for part in torch.split(tokens, self.chunk):
            pixels = rearrange(part, "(b n) d -> b d n 1", b=16)
            F.conv2d(pixels, self.weight)


def _addmm_argmin(tokens: Tensor, codes: Tensor) -> Tensor:
    return torch.addmm(0.5 * codes.square().sum(1), tokens, codes.t(), alpha=-1).argmin(1)


def _like(tokens: Tensor, features: Tensor) -> Tensor:
    batch, _, height, _ = features.shape
    return rearrange(tokens, "(b h w) d -> b d h w", b=batch, h=height)


def _laplace(book: Any) -> None:
    """Codes from smoothed counts, as both the released layer and vector-quantize-pytorch do."""
    tokens = book.number.sum()
    smooth = (book.number + EPSILON) / (tokens + len(book.number) * EPSILON) * tokens
    torch.div(book.total, smooth[:, None], out=book.codes)
