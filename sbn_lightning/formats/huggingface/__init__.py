"""Hugging Face folders of Qwen2 and Llama models, in and out."""
