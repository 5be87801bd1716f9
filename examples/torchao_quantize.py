"""Ternary, 2:4-sparse layers by torchao's own convention: python examples/torchao_quantize.py"""

import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from sbn_lightning.integrations.torchao import TernarySparseConfig, linear_except


def main(steps=100):
    torch.manual_seed(0)
    inputs = torch.randn(512, 64)
    labels = (inputs @ torch.randn(64, 10)).argmax(-1)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    quantize_(model, TernarySparseConfig("2:4"), filter_fn=linear_except("2"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = model(inputs)
    quantize_(model, TernarySparseConfig(step="convert"))  # packed layers, to run
    print(model, f"loss {loss:.3f}")
    return loss.item(), trained, model(inputs)


if __name__ == "__main__":
    main()
