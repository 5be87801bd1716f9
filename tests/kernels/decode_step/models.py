"""Small random models for the tests of the decode step."""

from __future__ import annotations

import math

import torch
from sbn_kernels.decode.step.plan import Shape
from sbn_kernels.decode.step.weights import Layer, Ternary, Weights
from torch import Tensor

DEVICE = "cuda"


def random_weights(
    shape: Shape, *, bias: bool = True, tied: bool = False, positions: int = 4096, head_bits: int = 16
) -> tuple[Weights, list[Layer]]:
    """Random weights on the GPU, and their layers; the three values of a code are equally frequent."""
    s, generator = shape, torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator)

    def matrix(rows: int, columns: int, gain: float, with_bias: bool = False) -> Ternary:
        codes = torch.randint(-1, 2, (rows, columns), device=DEVICE, generator=generator, dtype=torch.int8)
        scale = (torch.rand(rows, device=DEVICE, generator=generator) + 0.5) / math.sqrt(columns * 2 / 3) * gain
        return Ternary(codes, scale, (normal(rows) * 0.1).bfloat16() if with_bias else None)

    def norm() -> Tensor:
        return (1 + 0.1 * normal(s.d_model)).bfloat16()

    layers = [
        Layer(
            norm(),
            matrix(s.d_model + 2 * s.kv_heads * s.head_size, s.d_model, 1.0, bias),
            matrix(s.d_model, s.d_model, 0.5),
            norm(),
            matrix(2 * s.d_ffn, s.d_model, 1.0),
            matrix(s.d_model, s.d_ffn, 0.5),
        )
        for _ in range(s.layers)
    ]
    embedding = normal(s.vocab, s.d_model).bfloat16()
    head = embedding if tied else (normal(s.vocab, s.d_model) * 0.05).bfloat16()
    angles = torch.arange(positions, dtype=torch.float64, device=DEVICE).unsqueeze(1) * 1e4 ** (
        -torch.arange(0, s.head_size, 2, dtype=torch.float64, device=DEVICE) / s.head_size
    )
    cos, sin = angles.cos().float(), angles.sin().float()
    scale = None
    if head_bits == 8:
        scale = head.float().abs().amax(1) / 127
        head = (head.float() / scale[:, None]).round().to(torch.int8)
    return Weights(s, layers, norm(), embedding, head, cos.repeat(1, 2), torch.cat((-sin, sin), 1), scale), layers


def random_caches(shape: Shape, batch: int, slots: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, all slots filled."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    size = (batch, shape.kv_heads, slots, shape.head_size)
    return [
        tuple(torch.randn(size, device=DEVICE, generator=generator).bfloat16() for _ in range(2))  # type: ignore[misc]
        for _ in range(shape.layers)
    ]


def words(buffer: Tensor) -> Tensor:
    """The float32 values in the words that programs hand to each other."""
    return (buffer & -256).view(torch.float32)
