"""Tests of the Triton kernels: on a GPU where there is one, else in Triton's interpreter, in a process of their own."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when a kernel is defined: one process cannot have both."""

HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
"""The 16-bit types that can be run. The interpreter computes bfloat16 wrongly, without a word; it is compiled by the tests of
compilation, and run on a GPU."""
