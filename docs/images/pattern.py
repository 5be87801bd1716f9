"""Draws docs/images/pattern.png: trains a small 2:4 layer for a moment, and shows latent weight, mask and codes.

python docs/images/pattern.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch.nn import functional as F

from sbn_lightning import SparseBitLinear

ROWS, COLUMNS = 10, 20
MASKED, NATURAL_ZERO, PLUS, MINUS = "#373741", "#ffffff", "#d64541", "#3465a4"


def trained_layer():
    """A layer after 200 steps towards a random linear map."""
    torch.manual_seed(3)
    layer = SparseBitLinear(64, 64, bias=False, pattern="2:4")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3)
    target = torch.randn(64, 64) / 8
    for _ in range(200):
        x = torch.randn(256, 64)
        loss = F.mse_loss(layer(x), x @ target.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer


def main():
    layer = trained_layer()
    weight = layer.weight.detach()[:ROWS, :COLUMNS]
    mask = layer.mask[:ROWS, :COLUMNS]
    codes = layer.ternary()[0][:ROWS, :COLUMNS]
    kinds = torch.where(mask, torch.where(codes > 0, 2, torch.where(codes < 0, 3, 1)), 0)
    bound = weight.abs().max()
    figure, panels = plt.subplots(1, 3, figsize=(8, 1.9), layout="constrained")
    panels[0].imshow(weight, cmap="RdBu_r", vmin=-bound, vmax=bound)
    panels[0].set_title("latent weights, which the optimiser changes", fontsize=7.5)
    panels[1].imshow(mask, cmap=ListedColormap([MASKED, "#e3b341"]), vmin=0, vmax=1)
    panels[1].set_title("mask: the two largest of every four", fontsize=7.5)
    panels[2].imshow(kinds, cmap=ListedColormap([MASKED, NATURAL_ZERO, PLUS, MINUS]), vmin=0, vmax=3)
    panels[2].set_title("ternary weights, which the layer uses", fontsize=7.5)
    for panel in panels:
        panel.set(xticks=[], yticks=[])
        for column in range(4, COLUMNS, 4):
            panel.axvline(column - 0.5, color="black", linewidth=0.8)
    colours = {"+1": PLUS, "-1": MINUS, "0 by rounding": NATURAL_ZERO, "0 by the mask": MASKED}
    handles = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=4, fontsize=8, frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=200, facecolor="white")


if __name__ == "__main__":
    main()
