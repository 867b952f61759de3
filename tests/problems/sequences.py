"""Models of sequences: attention, encoders and recurrent networks, data first or time first, with and without masks."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from tests.problems.table import Instance, Table, ids, listed, named, real

TABLE = Table()
problem = TABLE.problem


class TinyTransformer(nn.Module):
    """Token and position embeddings, causal attention, a residual network, and one distribution a position."""

    def __init__(self, vocabulary: int = 5, width: int = 4, length: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, X: Tensor) -> Tensor:
        h = self.token(X) + self.position(torch.arange(X.shape[1]))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, dim=-1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(F.gelu(h)).transpose(1, 2)  # [N, C, T]


@problem("transformer-sdpa-ce", (2, 1), "classes", "sequence")
def _() -> Instance:
    model = TinyTransformer().double()
    return Instance(model, nn.CrossEntropyLoss(), named(model), ids(5, 3, 3), ids(5, 3, 3))


@problem("tied-embeddings", (1, 3), "classes", "sequence")
def _() -> Instance:
    model = TinyTransformer(tied=True).double()
    return Instance(model, nn.CrossEntropyLoss(reduction="sum"), listed(model), ids(5, 4, 3), ids(5, 4, 3))


class Attention(nn.Module):
    """``nn.MultiheadAttention``, data first or time first inside, and a linear readout a position."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.readout = nn.Linear(4, 2)

    def forward(self, X: Tensor) -> Tensor:
        X = X if self.batch_first else X.transpose(0, 1)
        h = torch.tanh(self.attention(X, X, X, need_weights=False)[0])
        return self.readout(h if self.batch_first else h.transpose(0, 1))


def attention(batch_first: bool, train: bool) -> Instance:
    """``nn.MultiheadAttention`` with as many positions as data."""
    model = Attention(batch_first).double().train(train)
    return Instance(model, nn.MSELoss(), listed(model), real(5, 3, 4), real(5, 3, 2))


problem("multihead-attention-train", (3, 2), "sequence")(partial(attention, True, True))
problem("multihead-attention-eval-time-major", (3, 2), "sequence")(partial(attention, False, False))


class Encoder(nn.Module):
    """``nn.TransformerEncoderLayer``, pooled over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.layer(X).mean(1))


def encoder(train: bool) -> Instance:
    """Use ``nn.TransformerEncoderLayer`` in training or evaluation mode."""
    model = Encoder().double().train(train)
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(4, 3, 4), ids(2, 4))


problem("encoder-layer-train", (1, 3), "classes")(partial(encoder, True))
problem("encoder-layer-eval", (2, 2), "classes")(partial(encoder, False))


class Recurrent(nn.Module):
    """An LSTM that runs time first."""

    def __init__(self, data_first: bool, every_step: bool) -> None:
        super().__init__()
        self.data_first, self.every_step = data_first, every_step
        self.lstm, self.head = nn.LSTM(2, 3), nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        hidden, _ = self.lstm(X.transpose(0, 1) if self.data_first else X)  # [T, N, H]
        return self.head(hidden.transpose(0, 1)) if self.every_step else self.head(hidden[-1])


@problem("lstm-data-first", (3, 2), "sequence")
def _() -> Instance:
    model = Recurrent(data_first=True, every_step=True).double()
    return Instance(model, nn.MSELoss(), named(model), real(5, 3, 2), real(5, 3, 2))


@problem("lstm-time-major-input", (3, 3), "order", "classes")
def _() -> Instance:
    # X is [T, N, F] with T = N = 3 in each mini-batch: nothing about the shapes says which axis is which. Halves along
    # the first axis are no mini-batches here, so the user has to switch the check off.
    model = Recurrent(data_first=False, every_step=False).double()
    options = {"batch_size_fn": lambda X: X.shape[1], "check_deterministic": False}
    return Instance(model, nn.CrossEntropyLoss(), listed(model), real(3, 6, 2), ids(2, 6), options=options, axis=1)


class CrossAttention(nn.Module):
    """Time-first attention whose queries, keys and values differ, in width too."""

    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, kdim=3, vdim=1, add_bias_kv=extra, add_zero_attn=extra)
        self.readout = nn.Linear(2, 2)

    def forward(self, X: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in X)
        return self.readout(torch.tanh(self.attention(q, k, v)[0])).transpose(0, 1)


def cross_attention(extra: bool) -> Instance:
    """As many queries as data in the first mini-batch, and two keys each; the attention weights are asked for."""
    model = CrossAttention(extra).double()
    return Instance(model, nn.MSELoss(), listed(model), (real(5, 3, 2), real(5, 2, 3), real(5, 2, 1)), real(5, 3, 2))


problem("attention-cross-time-major", (3, 2), "sequence")(partial(cross_attention, False))
problem("attention-cross-with-bias-rows", (3, 2), "sequence")(partial(cross_attention, True))


class MaskedAttention(nn.Module):
    """Attention to earlier positions that are not padding; the padding is ignored by the loss."""

    def __init__(self, boolean: bool) -> None:
        super().__init__()
        self.boolean = boolean
        self.embedding = nn.Embedding(4, 2, padding_idx=0)
        self.attention, self.readout = nn.MultiheadAttention(2, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, X: Tensor) -> Tensor:
        h, padding, T = self.embedding(X), X == 0, X.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).triu(1)
        if not self.boolean:
            padding, causal = (torch.where(m, -1e9, 0.0).to(h.dtype) for m in (padding, causal))
        h = h + self.attention(h, h, h, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]
        return self.readout(h).transpose(1, 2)


def masked_attention(boolean: bool) -> Instance:
    """The second half of some data is padding, one datum is padding but for its first token."""
    model = MaskedAttention(boolean).double()
    X, y = 1 + ids(3, 5, 3), ids(3, 5, 3)
    X[1, 2:], X[3, 1:] = 0, 0
    y[X == 0] = -100
    return Instance(model, nn.CrossEntropyLoss(), named(model), X, y)


problem("attention-masks-boolean", (3, 2), "classes", "sequence", "cut")(partial(masked_attention, True))
problem("attention-masks-additive", (1, 4), "classes", "sequence", "cut")(partial(masked_attention, False))


class MaskedEncoder(nn.Module):
    """A time-first encoder layer that normalises first, with a causal mask and a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(3, 3, dim_feedforward=2, dropout=0.0, norm_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, X: Tensor) -> Tensor:
        padding, mask = X[..., 0] > 1.0, nn.Transformer.generate_square_subsequent_mask(X.shape[1], dtype=X.dtype)
        padding[:, 0] = False
        mask_of_padding = torch.where(padding, -1e9, 0.0).to(X.dtype)
        h = self.layer(X.transpose(0, 1), src_mask=mask, src_key_padding_mask=mask_of_padding)
        return self.head(torch.where(padding.T[..., None], 0.0, h).mean(0))


def masked_encoder(train: bool) -> Instance:
    """As many positions as data in the first mini-batch."""
    model = MaskedEncoder().double().train(train)
    return Instance(model, nn.CrossEntropyLoss(), named(model), real(4, 3, 3), ids(2, 4))


problem("encoder-masks-time-major-train", (3, 1), "classes")(partial(masked_encoder, True))
problem("encoder-masks-time-major-eval", (3, 1), "classes")(partial(masked_encoder, False))


class Gated(nn.Module):
    """A bidirectional GRU that runs time first, with a linear layer on its states."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 1, bidirectional=True), nn.Linear(2, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.gru(X.transpose(0, 1))[0]).transpose(0, 1)


@problem("gru-time-major-n-equals-t", (3, 3), "sequence")
def _() -> Instance:
    model = Gated().double()
    return Instance(model, nn.MSELoss(), listed(model), real(6, 3, 2), real(6, 3, 2))


class Packed(nn.Module):
    """An LSTM on sequences of unlike lengths, sorted by length and packed; its cells see fewer data at later steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.lstm, self.head = nn.Linear(2, 2), nn.LSTM(2, 2), nn.Linear(2, 2)

    def forward(self, X: tuple[Tensor, Tensor]) -> Tensor:
        sequences, lengths = X
        packed = pack_padded_sequence(self.inlet(sequences), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][0])


@problem("lstm-packed", (3, 2), "classes")
def _() -> Instance:
    model, lengths = Packed().double(), torch.tensor([1, 3, 2, 2, 3])
    return Instance(model, nn.CrossEntropyLoss(), listed(model), (real(5, 3, 2), lengths), ids(2, 5))
