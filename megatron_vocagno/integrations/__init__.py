"""The method inside other training loops.

text_collator.py    texts -> aligned tensors, for your own training loop or the Hugging Face Trainer
"""
