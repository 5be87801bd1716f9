"""What a user may choose about an export, by name."""

from typing import Literal

ExportFormat = Literal["packed", "hf", "hf-bitnet", "hf-sbn", "gguf"]
LinearClass = Literal["bitlinear", "autobitlinear"]
Quantization = Literal["TQ2_0", "TQ1_0", "Q2_0", "Q4_0"]
