"""Requests to vLLM and SGLang, and their answers. Both can report the probability of each token of a prompt.

Other engines answer the same requests with status 200, but without these probabilities, or leave out parts of the prompt. Each
answer is therefore compared with what was sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.errors import ServerError
from megatron_vocagno.serving.client import Answer, Client, Json

Losses = NDArray[np.float32]
UNKNOWN = "unknown"
"""A setting that the server does not report."""
CLAMPED = -9999.0
"""vLLM answers this log-probability instead of -inf, which JSON does not have."""
WITHOUT_LOSSES = {"llamacpp": "llama.cpp's server", "lmdeploy": "LMDeploy", "tensorrt_llm": "TensorRT-LLM"}
"""Other engines, by the owner that they name in /v1/models."""
ENDPOINTS = {"/api/version": ("version", "Ollama"), "/info": ("max_best_of", "Text Generation Inference")}
"""Other engines, by an endpoint and a field of its answer. They name another owner for each model."""
SGLANG_RESERVES = 6
"""Tokens of its context that SGLang keeps free."""
OWNERS = ("vllm", "sglang")
NEEDED = "A teacher needs vLLM's or SGLang's server"


@dataclass(frozen=True)
class Prompt:
    """A text for the teacher.

    ids         the tokens that it reads
    known       the losses of the first tokens are not needed, at least of the first one
    vocabulary  the teacher's number of ids, if the answer must prove that it has probabilities
    """

    ids: Sequence[int]
    known: int
    vocabulary: int | None = None


@dataclass(frozen=True)
class Description:
    """A server as it describes itself. UNKNOWN or None: it does not report this.

    model         the name under which it serves the teacher
    root          the folder or Hub id of the weights
    longest       tokens of the longest request, prompt and answer together
    """

    engine: str
    version: str
    model: str
    root: str | None
    longest: int | None
    dtype: str = UNKNOWN
    quantization: str = UNKNOWN
    kv_cache_dtype: str = UNKNOWN


class Engine(Protocol):
    """How the losses of a prompt are requested.

    request  the path, and the content of the request. model: the name under which the teacher is served
    losses   [len(ids) - known], float32, nats, of ids[known:], each after all tokens before it. Raises ServerError
    """

    def request(self, model: str, prompt: Prompt) -> tuple[str, Json]: ...

    def losses(self, answer: Answer, prompt: Prompt) -> Losses: ...


async def recognize(client: Client, url: str) -> tuple[Engine, Description]:
    """The engine of a server, and its description. Raises ServerError if it cannot give losses, or not of the model."""
    models = await client.get(url, "/v1/models")
    if models is None or not isinstance(models.get("data"), list) or not models["data"]:
        raise ServerError(f"{url}/v1/models lists no models. {NEEDED}. Is {url} its address, without /v1?")
    owner = str(models["data"][0].get("owned_by"))
    if owner not in OWNERS and (other := WITHOUT_LOSSES.get(owner) or await _other_engine(client, url)):
        raise ServerError(f"{url} is {other}, which does not give the losses of a prompt. {NEEDED}")
    card = _model(models["data"], client.servers.model, url)
    if owner == "sglang":
        return SGLang(), await _describe_sglang(client, url, card)
    tokens = await client.has(url, VLLMTokens.PATH)
    return VLLMTokens() if tokens else VLLM(), await _describe_vllm(client, url, card)


async def _other_engine(client: Client, url: str) -> str | None:
    for path, (field, name) in ENDPOINTS.items():
        answer = await client.get(url, path)
        if isinstance(answer, dict) and field in answer:
            return name
    return None


def _model(cards: Sequence[Json], name: str | None, url: str) -> Json:
    served = {str(card["id"]): card for card in cards}
    bases = [one for one, card in served.items() if not card.get("parent")]
    if name is None and len(bases) != 1:
        raise ServerError(f"{url} serves {', '.join(served)}: choose the teacher with --served-model")
    chosen = bases[0] if name is None else name
    if chosen not in served:
        raise ServerError(f"{url} does not serve {chosen}. It serves {', '.join(served)}: see --served-model")
    if parent := served[chosen].get("parent"):
        raise ServerError(
            f"{url}: {chosen} is a LoRA adapter of {parent}. Its losses cannot be attributed to the weights of --teacher: "
            "merge the adapter into the weights, and serve them"
        )
    return served[chosen]


# ---- vLLM


class VLLM:
    """Its OpenAI-compatible completions, which accept token ids and have a field for the losses of the prompt."""

    def request(self, model: str, prompt: Prompt) -> tuple[str, Json]:
        fields = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": _top(prompt), "n": 1, "stream": False}
        return "/v1/completions", fields | {"model": model, "prompt": list(prompt.ids), "add_special_tokens": False}

    def losses(self, answer: Answer, prompt: Prompt) -> Losses:
        content, ids, known = answer.content, prompt.ids, prompt.known
        [choice, *_] = content.get("choices") or [{}]
        told = content.get("prompt_logprobs") or choice.get("prompt_logprobs")
        if not isinstance(told, list):
            raise ServerError(f"{answer.url} answered without prompt_logprobs. {NEEDED}; a proxy may also have removed them")
        read = (content.get("usage") or {}).get("prompt_tokens", len(told))
        if len(told) != len(ids) or read != len(ids) or told[0] is not None:
            raise _changed(answer.url, f"{len(ids):,} tokens were sent, {read:,} were read, {len(told):,} were answered")
        if prompt.vocabulary is not None:
            _require_probabilities(told[1:], prompt.vocabulary, answer.url)
        try:
            return _checked(
                [one[str(token)]["logprob"] for token, one in zip(ids[known:], told[known:], strict=True)], answer.url
            )
        except (KeyError, TypeError):
            other = next(i for i in range(known, len(ids)) if not isinstance(told[i], dict) or str(ids[i]) not in told[i])
            raise _changed(answer.url, f"token {other:,} was {ids[other]}, and its answer is {str(told[other])[:100]}") from None


class VLLMTokens(VLLM):
    """Its endpoint for token ids, which does not turn them into text. It takes less than half of the server's time in Python."""

    PATH = "/inference/v1/generate"

    def request(self, model: str, prompt: Prompt) -> tuple[str, Json]:
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": _top(prompt), "detokenize": False}
        return self.PATH, {"model": model, "token_ids": list(prompt.ids), "sampling_params": sampling}


def _top(prompt: Prompt) -> int:
    """How many of the most likely tokens are reported at each position."""
    return int(prompt.vocabulary is not None)


def _require_probabilities(told: Sequence[Json], vocabulary: int, url: str) -> None:
    """The most likely of V tokens has a probability of at least 1 / V. Raw logits need not be like this."""
    for one in told:
        highest = max(entry["logprob"] for entry in one.values()) if isinstance(one, dict) and one else 0.0
        if not -math.log(vocabulary) - 1e-3 <= highest <= 1e-3:
            raise ServerError(
                f"{url}: the most likely of {vocabulary:,} tokens has a log-probability of {highest:g}, which is impossible. "
                "Start vLLM with --logprobs-mode raw_logprobs"
            )


async def _describe_vllm(client: Client, url: str, card: Json) -> Description:
    version = (await client.get(url, "/version") or {}).get("version", UNKNOWN)
    told = (await client.get(url, "/server_info?config_format=json") or {}).get("vllm_config")
    settings = told if isinstance(told, dict) else {}
    model, cache = settings.get("model_config") or {}, settings.get("cache_config") or {}
    if (mode := model.get("logprobs_mode", "raw_logprobs")) != "raw_logprobs":
        raise ServerError(f"{url} has --logprobs-mode {mode}: start it with --logprobs-mode raw_logprobs")
    return Description(
        "vllm",
        str(version),
        str(card["id"]),
        card.get("root"),
        card.get("max_model_len"),
        str(model.get("dtype", UNKNOWN)).removeprefix("torch."),
        str(model.get("quantization") or "none") if model else UNKNOWN,
        str(cache.get("cache_dtype", UNKNOWN)),
    )


# ---- SGLang


class SGLang:
    """Its own endpoint, which leaves out the tokens that are only context."""

    def request(self, model: str, prompt: Prompt) -> tuple[str, Json]:
        fields = {
            "return_logprob": True,
            "logprob_start_len": prompt.known - 1,
            "top_logprobs_num": 0,
            "return_text_in_logprobs": False,
        }
        return "/generate", fields | {"input_ids": list(prompt.ids), "sampling_params": {"max_new_tokens": 1, "temperature": 0}}

    def losses(self, answer: Answer, prompt: Prompt) -> Losses:
        ids, known = prompt.ids, prompt.known
        content = answer.content[0] if isinstance(answer.content, list) and answer.content else answer.content
        meta = content.get("meta_info") if isinstance(content, dict) else None
        told = (meta or {}).get("input_token_logprobs")
        if not isinstance(told, list):
            raise ServerError(f"{answer.url} answered without input_token_logprobs. {NEEDED}; a proxy may have removed them")
        assert meta is not None
        read = meta.get("prompt_tokens", len(ids))
        if len(told) != len(ids) - known + 1 or read != len(ids):
            expected = f"{len(ids) - known + 1:,} of them were requested"
            raise _changed(
                answer.url, f"{len(ids):,} tokens were sent, {read:,} were read, {expected}, {len(told):,} were answered"
            )
        # the first one is the last token of the context, whose loss is not computed
        for i, (one, token) in enumerate(zip(told, ids[known - 1 :], strict=True)):
            # SGLang reports the last id of the vocabulary as 0, and a loss that is not finite as null
            if one[1] not in (token, 0) or (i == 0 and one[0] is not None):
                raise _changed(answer.url, f"token {known - 1 + i:,} was {token}, and its answer is {str(one)[:100]}")
        return _checked([math.nan if one[0] is None else one[0] for one in told[1:]], answer.url)


async def _describe_sglang(client: Client, url: str, card: Json) -> Description:
    # the second names are those of earlier releases
    info = await client.get(url, "/model_info") or await client.get(url, "/get_model_info") or {}
    told = await client.get(url, "/server_info") or await client.get(url, "/get_server_info") or {}
    longest = card.get("max_model_len") or told.get("context_length")
    return Description(
        "sglang",
        str(told.get("version", UNKNOWN)),
        str(card["id"]),
        told.get("model_path") or info.get("model_path"),
        None if longest is None else longest - SGLANG_RESERVES,
        str(told.get("dtype", UNKNOWN)),
        str(told.get("quantization") or "none") if told else UNKNOWN,
        str(told.get("kv_cache_dtype", UNKNOWN)),
    )


# ---- both


def _changed(url: str, what: str) -> ServerError:
    return ServerError(
        f"{url} read another prompt than the one that was sent: {what}. Does a proxy add a BOS, or does the server truncate?"
    )


def _checked(log_probabilities: Sequence[float], url: str) -> Losses:
    """Losses of log-probabilities. Raises ServerError if they are not log-probabilities."""
    values = np.array(log_probabilities, np.float64)
    if (values > 1e-3).any():
        raise ServerError(f"{url} answered a log-probability of {values.max():g}: start vLLM with --logprobs-mode raw_logprobs")
    return np.where(values == CLAMPED, math.inf, -values).astype(np.float32)
