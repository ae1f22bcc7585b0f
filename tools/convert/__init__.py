"""Models from other formats into Hugging Face folders.

gguf_to_safetensors.py   CLI: a GGUF file -> a folder with config.json, model.safetensors and tokenizer.json
"""
