"""Modules of the benchmark `models`, as users bring them: nothing here knows of the engine."""

import torch
from torch import nn


class FtTransformer(nn.Module):
    """The FT-Transformer of rtdl_revisiting_models, with its defaults for one block."""

    def __init__(self, shape, fitted):  # noqa: ARG002
        super().__init__()
        from rtdl_revisiting_models import FTTransformer

        self.net = FTTransformer(
            n_cont_features=shape["numeric"],
            cat_cardinalities=shape["cardinalities"],
            d_out=shape["outputs"],
            **FTTransformer.get_default_kwargs(1),
        )

    def forward(self, numeric, codes):
        return self.net(numeric, codes.long())


class Transformer(nn.Module):
    """Two layers of torch's encoder over the numbers as steps."""

    def __init__(self, shape, fitted, width: int = 64):  # noqa: ARG002
        super().__init__()
        self.enter, self.place = nn.Linear(1, width), nn.Parameter(torch.randn(shape["numeric"], width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 128, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(width, shape["outputs"])

    def forward(self, numeric, codes):  # noqa: ARG002
        return self.output(self.encoder(self.enter(numeric[:, :, None]) + self.place).mean(1))


class Lstm(nn.Module):
    """Two layers of cells over the numbers as steps."""

    def __init__(self, shape, fitted, width: int = 64):  # noqa: ARG002
        super().__init__()
        self.cells = nn.LSTM(1, width, 2, dropout=0.1, batch_first=True)
        self.output = nn.Linear(width, shape["outputs"])

    def forward(self, numeric, codes):  # noqa: ARG002
        return self.output(self.cells(numeric[:, :, None])[0][:, -1])
