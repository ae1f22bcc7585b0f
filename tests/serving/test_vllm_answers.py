"""The requests and answers of the tests are those of vLLM. The file has answers of vLLM 0.32.0, on a CPU.

The server was started with --enable-scale-out and VLLM_SERVER_DEV_MODE=1. Token 12 of its model makes all later losses NaN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from megatron_vocagno.serving.client import NOT_A_NUMBER, Answer
from megatron_vocagno.serving.engines import VLLM, Prompt, VLLMTokens
from tests.serving.conftest import Serve

RECORDED = [json.loads(line) for line in Path(__file__).with_name("vllm_answers.jsonl").read_text(encoding="utf-8").splitlines()]
NAMES = [f"{i} {one['path']} {one['status']}" for i, one in enumerate(RECORDED)]
ENGINES = {"/v1/completions": VLLM(), VLLMTokens.PATH: VLLMTokens()}


def fields(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Each field and its type. The ids of tokens are one field, and so are the entries of a list."""
    yield place, "number" if isinstance(content, int | float) else type(content).__name__
    if isinstance(content, dict):
        for key, value in content.items():
            yield from fields(value, f"{place}.{'ID' if key.lstrip('-').isdigit() else key}")
    if isinstance(content, list):
        for value in content:
            yield from fields(value, f"{place}[]")


def ids_of(one: dict[str, Any]) -> list[int]:
    """The prompt of a request."""
    body = one["body"] or {}
    return list(body.get("token_ids") or body.get("prompt") or [])


@pytest.mark.parametrize("one", RECORDED, ids=NAMES)
def test_the_fake_server_has_no_field_and_no_status_of_its_own(one: dict[str, Any], serve: Serve) -> None:
    url = serve("vllm+info+tokens+nan-at=12")
    answer = httpx2.request(one["method"], url + one["path"], json=one["body"], trust_env=False)
    assert answer.status_code == one["status"]
    assert set(fields(answer.json())) <= set(fields(one["answer"]))


def test_what_the_server_answered_is_read_as_it_is_meant() -> None:
    met = 0
    for one in RECORDED:
        ids, body, answer = ids_of(one), one["body"], one["answer"]
        if one["status"] != 200 or not ids:
            continue
        engine = ENGINES[one["path"]]
        told = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
        sampling = body.get("sampling_params") or body
        prompt = Prompt(ids, 1, vocabulary=49_152 if sampling["prompt_logprobs"] else None)
        losses = engine.losses(Answer("http://there", answer), prompt)
        assert np.allclose(losses, [-told[i][str(ids[i])]["logprob"] for i in range(1, len(ids))]) and (losses > 9).all()
        assert engine.request("teacher", prompt) == (one["path"], body)
        met += 1
    assert met == 4


def test_a_loss_that_is_not_a_number_has_the_words_that_are_recognized() -> None:
    refused = [one for one in RECORDED if one["status"] == 400 and 12 in ids_of(one)]
    assert len(refused) == 2 and all(NOT_A_NUMBER in one["answer"]["error"]["message"] for one in refused)
