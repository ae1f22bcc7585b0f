"""Command lines that convert models of other formats to Hugging Face folders.

gguf_to_safetensors.py   a GGUF file -> a folder with config.json, model.safetensors and tokenizer.json
"""
