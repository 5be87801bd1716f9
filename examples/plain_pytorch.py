"""Ternary, 2:4-sparse training in a plain PyTorch loop, without Lightning: python examples/plain_pytorch.py"""

import torch
from torch import nn
from torch.nn import functional as F

from sbn_lightning import MaskedDecay, Ramp, SparsitySchedule, convert, load_sparse, save_sparse, use_kernels


def build():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))


def main(folder="logs/plain_pytorch", steps=200):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.randn(1024, 64, device=device)
    labels = (inputs @ torch.randn(64, 10, device=device)).argmax(-1)
    model = build()
    print(convert(model, "2:4", exclude=("4",)))
    print(use_kernels(model, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ramp, decay = Ramp("rows", end=0.3), MaskedDecay(0.1, until=0.8)
    schedule = SparsitySchedule(model, optimizer, total_steps=steps, ramp=ramp, masked_decay=decay)
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"loss {loss:.3f}", schedule.statistics())
    save_sparse(model, folder, overwrite=True)
    again = build().to(device)
    load_sparse(again, folder)
    return loss.item(), model(inputs), again(inputs)


if __name__ == "__main__":
    main()
