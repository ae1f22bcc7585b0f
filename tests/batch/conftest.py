from tests.datasets import dataset, teacher_tokenizer

__all__ = ["dataset", "teacher_tokenizer"]
