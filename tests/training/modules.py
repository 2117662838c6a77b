"""Modules as users bring them: nothing here knows of the engine."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class Embed(nn.Module):
    def __init__(self, sizes, width=4):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.width = width * len(sizes)

    def forward(self, codes):
        return torch.cat([table(codes[:, k]) for k, table in enumerate(self.tables)], 1)


class Net(nn.Module):
    """An Mlp of layers of torch."""

    def __init__(self, shape, fitted, hidden=(16, 8), dropout: float = 0.1):
        super().__init__()
        self.embed = Embed(shape["cardinalities"])
        widths, layers = [shape["numeric"] + self.embed.width, *hidden], []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
        self.body, self.output = nn.Sequential(*layers), nn.Linear(widths[-1], shape["outputs"])

    def forward(self, numeric, codes):
        return self.output(self.body(torch.cat([numeric, self.embed(codes)], 1)))


class TabM(nn.Module):
    def __init__(self, shape, fitted, k=3):
        super().__init__()
        from tabm import TabM as Published

        sizes = shape["cardinalities"]
        self.net = Published.make(
            n_num_features=shape["numeric"], cat_cardinalities=sizes, d_out=shape["outputs"], k=k, n_blocks=1, d_block=16,
            dropout=0.1,
        )  # fmt: skip

    def forward(self, numeric, codes):
        return self.net(numeric, codes.long())


class Members(nn.Module):
    """Several networks side by side: [n, members, outputs]."""

    def __init__(self, shape, fitted, members=3):
        super().__init__()
        self.parts = nn.ModuleList(Net(shape, fitted) for _ in range(members))

    def forward(self, numeric, codes):
        return torch.stack([part(numeric, codes) for part in self.parts], 1)


class Ple(nn.Module):
    """Piecewise-linear embeddings, whose edges are learned from training rows."""

    @staticmethod
    def fit(numeric, codes, target, settings):
        from rtdl_num_embeddings import compute_bins

        found = compute_bins(torch.from_numpy(numeric), n_bins=settings.get("bins", 4))
        return {f"bins.{i}": edges.numpy() for i, edges in enumerate(found)}

    def __init__(self, shape, fitted, bins: int = 4):
        super().__init__()
        from rtdl_num_embeddings import PiecewiseLinearEmbeddings

        edges = [torch.from_numpy(fitted[f"bins.{i}"]) for i in range(shape["numeric"])]
        self.numbers = PiecewiseLinearEmbeddings(edges, 4, activation=False, version="B")
        self.embed = Embed(shape["cardinalities"])
        width = 4 * shape["numeric"] + self.embed.width
        self.body = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, shape["outputs"]))

    def forward(self, numeric, codes):
        return self.body(torch.cat([self.numbers(numeric).flatten(1), self.embed(codes)], 1))


class FtTransformer(nn.Module):
    def __init__(self, shape, fitted):
        super().__init__()
        from rtdl_revisiting_models import FTTransformer

        usual = FTTransformer.get_default_kwargs(1)
        self.net = FTTransformer(
            n_cont_features=shape["numeric"], cat_cardinalities=shape["cardinalities"], d_out=shape["outputs"],
            **{**usual, "d_block": 8, "attention_n_heads": 2},
        )  # fmt: skip

    def forward(self, numeric, codes):
        return self.net(numeric, codes.long())


class Sequence(nn.Module):
    """A transformer over numbers as steps, the batch in front or behind."""

    def __init__(self, shape, fitted, batch_first: bool = True, width=8):
        super().__init__()
        self.batch_first = batch_first
        self.enter, self.place = nn.Linear(1, width), nn.Parameter(torch.randn(shape["numeric"], width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 16, 0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.output = nn.Linear(width, shape["outputs"])

    def forward(self, numeric, codes):
        x = self.enter(numeric[:, :, None]) + self.place
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.output(x.mean(1))


class Lstm(nn.Module):
    def __init__(self, shape, fitted):
        super().__init__()
        self.cells = nn.LSTM(1, 6, 2, dropout=0.1, batch_first=True)
        self.output = nn.Linear(6, shape["outputs"])

    def forward(self, numeric, codes):
        return self.output(self.cells(numeric[:, :, None])[0][:, -1])


class Normed(nn.Module):
    """Batch normalisation, over the rows of a shard."""

    def __init__(self, shape, fitted):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm1d(shape["numeric"]), nn.Linear(shape["numeric"], 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Dropout(0.1), nn.Linear(16, shape["outputs"]),
        )  # fmt: skip

    def forward(self, numeric, codes):
        return self.body(numeric)


class Odd(nn.Module):
    """Tied, frozen and unused weights, a buffer, in-place work, scatter, weight normalisation."""

    def __init__(self, shape, fitted):
        super().__init__()
        size, width = max(shape["cardinalities"]), shape["numeric"]
        self.table, self.bag = nn.Embedding(size, 8, padding_idx=0), nn.EmbeddingBag(size, 8, mode="mean")
        self.a, self.b, self.c = nn.Linear(width, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.c.weight = self.b.weight
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, shape["outputs"]))
        self.unused, self.frozen = nn.Parameter(torch.ones(5)), nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("scale", torch.linspace(0.5, 1, 8), persistent=False)
        self.act = lambda z: torch.tanh_(self.b(z))

    def forward(self, numeric, codes):
        h = self.a(numeric)
        h.mul_(self.scale)
        h.relu_()
        h = self.c(self.act(h)) + self.table(codes).sum(1) + self.bag(codes)
        h = h + self.frozen + torch.zeros(len(h), 8).scatter_add(1, codes.long() % 8, h[:, :2])
        return self.head(F.dropout(h, 0.1, self.training))


class Frozen(Net):
    """The first layer keeps what it began with."""

    def __init__(self, shape, fitted):
        super().__init__(shape, fitted)
        self.body[0].requires_grad_(False)


class Bad(nn.Module):
    """One wrong thing each, by the setting `kind`."""

    def __init__(self, shape, fitted, kind: str = "fine"):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(shape["numeric"], 8), nn.Linear(8, shape["outputs"])
        self.count, self.norm, self.gate = 0, nn.InstanceNorm1d(8), nn.Parameter(torch.zeros(8))
        if kind == "attention":
            self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        if kind == "hidden list":
            self.more = [torch.randn(3, requires_grad=True)]
        if kind == "sparse":
            self.table = nn.Embedding(5, 8, sparse=True)
        if kind == "lazy":
            self.later = nn.LazyLinear(3)
        if kind == "double":
            self.a = self.a.double()
        if kind == "no parameters":
            self.requires_grad_(False)
        if kind == "random attribute":
            self.frequencies = torch.randn(8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, numeric, codes):  # noqa: C901
        k = self.kind
        h = torch.relu(self.a(numeric))
        if k == "attention":
            h = h + self.att(h[None], h[None], h[None], need_weights=False)[0][0]
        if k == "zero gate":
            h = h + self.gate * h.mean(0)
        if k == "centred":
            h = h - h.mean(0)
        if k == "place":
            h = h + torch.arange(len(h))[:, None] * 1e-3
        if k == "cumsum":
            h = h.cumsum(0)
        if k == "counter":
            self.count += 1
        if k == "buffer counter":
            self.seen += 1
        if k == "noise":
            h = h + torch.randn_like(h)
        if k == "own generator":
            h = h + torch.rand(len(h), 1, generator=torch.Generator())
        if k == "numpy noise":
            import numpy as np

            h = h + float(np.random.default_rng().random())
        if k == "always dropout":
            h = F.dropout(h, 0.1)
        if k == "instance norm":
            h = self.norm(h.T[None])[0].T
        if k == "mean":
            return self.b(h).mean()
        if k == "flat":
            return self.b(h).squeeze(1)
        if k == "checkpoint":
            from torch.utils.checkpoint import checkpoint

            h = checkpoint(lambda z: F.dropout(z, 0.1, self.training), h, use_reentrant=False)
        if k == "error":
            h = h @ h
        if k == "random attribute":
            h = h * self.frequencies
        if k == "frozen changes":
            self.a.bias.data.add_(1)
        return self.b(h)


def _plain(draw):
    return lambda h: h + float(draw())


# Ways to draw numbers in a forward pass; the last ones are not of torch.
CHANCE = {
    "rand": lambda h: h * torch.rand(len(h), 1),
    "randn_like": lambda h: h + torch.randn_like(h),
    "randint": lambda h: h + torch.randint(0, 3, h.shape),
    "randperm": lambda h: h[:, torch.randperm(h.shape[1])],
    "normal": lambda h: torch.normal(h, 1.0),
    "bernoulli": lambda h: h + torch.bernoulli(torch.sigmoid(h)),
    "bernoulli_ of a generator": lambda h: h * torch.ones_like(h).bernoulli_(0.5, generator=torch.Generator()),
    "multinomial": lambda h: h + torch.multinomial(torch.softmax(h, 1), 1),
    "poisson": lambda h: h + torch.poisson(torch.relu(h)),
    "exponential_": lambda h: h + torch.empty_like(h).exponential_(),
    "geometric_": lambda h: h + torch.empty_like(h).geometric_(0.5),
    "cauchy_": lambda h: h + torch.empty_like(h).cauchy_(),
    "log_normal_": lambda h: h + torch.empty_like(h).log_normal_(),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "Gamma": lambda h: h + torch.distributions.Gamma(2.0, 1.0).sample((h.shape[1],)),
    "Dirichlet": lambda h: h + torch.distributions.Dirichlet(torch.ones(h.shape[1])).sample(),
    "Normal": lambda h: torch.distributions.Normal(h, 1.0).rsample(),
    "binomial": lambda h: h + torch.binomial(torch.full_like(h, 3.0), torch.full_like(h, 0.5)),
    "fractional pooling": lambda h: (
        h + F.fractional_max_pool2d(h[:, None, None].expand(-1, 1, 8, 8), 2, output_size=(1, 8))[:, 0, 0]
    ),
    "random": _plain(lambda: __import__("random").random()),
    "random.Random": _plain(lambda: __import__("random").Random().random()),
    "numpy.random": _plain(lambda: __import__("numpy").random.rand()),
    "numpy.default_rng": _plain(lambda: __import__("numpy").random.default_rng().random()),
    "urandom": _plain(lambda: __import__("os").urandom(1)[0]),
    "secrets": _plain(lambda: __import__("secrets").randbelow(9)),
    "uuid": _plain(lambda: __import__("uuid").uuid4().int % 9),
    "clock": _plain(lambda: __import__("time").time() // 1e6),
    "date": _plain(lambda: __import__("datetime").datetime.now().year),
}
# Ways in which a row's output depends on other rows, its place or their number.
COUPLING = {
    "mean": lambda h: h - h.mean(0),
    "largest": lambda h: h / h.abs().max(),
    "softmax over rows": lambda h: torch.softmax(h, 0),
    "rank": lambda h: h.argsort(0).argsort(0).float() + h * 0,
    "sorted": lambda h: h.sort(0).values,
    "neighbour": lambda h: h + h.roll(1, 0),
    "first row": lambda h: h - h[:1],
    "similarity": lambda h: torch.softmax(h @ h.T, 1) @ h,
    "batch statistics": lambda h: F.batch_norm(h, None, None, training=True),
    "mean of a group": lambda h: (
        h - torch.zeros(2, h.shape[1]).index_add(0, (h[:, 0] > 0).long(), h)[(h[:, 0] > 0).long()]
    ),
    "running total": lambda h: h.cumsum(0),
    "place": lambda h: h + torch.arange(len(h))[:, None] * 1e-3,
    "number of rows": lambda h: h / len(h),
    "convolution over rows": lambda h: (
        F.conv1d(h.T[None], torch.ones(h.shape[1], 1, 3), padding=1, groups=h.shape[1])[0].T
    ),
}


class Wrong(nn.Module):
    """A network with one of the ways above, always or only in training."""

    def __init__(self, shape, fitted, way: str = "", training: bool = False):
        super().__init__()
        self.way, self.only_training = {**CHANCE, **COUPLING}[way], training
        self.a, self.b = nn.Linear(shape["numeric"], 8), nn.Linear(8, shape["outputs"])

    def forward(self, numeric, codes):
        h = torch.tanh(self.a(numeric))
        return self.b(self.way(h) if self.training or not self.only_training else h)
