"""Model architectures, one file each: a decoder-only transformer of the Qwen2.5 and Llama kind, and its parts."""
