"""The names of the choices that a user has for an export."""

from typing import Literal

ExportFormat = Literal["packed", "hf", "hf-bitnet", "hf-sbn", "gguf"]
LinearClass = Literal["bitlinear", "autobitlinear"]
Quantization = Literal["TQ2_0", "TQ1_0", "Q2_0", "Q4_0"]
