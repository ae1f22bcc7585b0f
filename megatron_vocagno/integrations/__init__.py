"""The method inside other training loops.

text_collator.py    texts -> aligned tensors, for your own training loop or the Hugging Face Trainer
megatron/           Megatron-LM: rows of a dataset with stored losses, and the two functions of its pretrain_gpt.py
"""
