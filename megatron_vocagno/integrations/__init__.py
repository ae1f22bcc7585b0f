"""The method inside other training loops.

text_collator.py    texts -> aligned tensors, for a loop of your own or the Hugging Face Trainer
"""
