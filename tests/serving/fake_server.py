"""A server in the shape of vLLM's and SGLang's, in a process of its own: a real teacher gives the losses.

    python -m tests.serving.fake_server TEACHER OTHER_TEACHER     # prints its port, and serves until its standard input ends
    python -m tests.serving.fake_server TEACHER --port 8000 …     # in place of `vllm serve`, with its options

Each first part of a path is a server of its own, with its own faults: http://127.0.0.1:PORT/vllm+truncates has the API of vLLM
and truncates prompts. A path without such a part is that of a vLLM without faults. GET /NAME/asked gives the number of its
requests for losses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_vocagno.model.teacher import Teacher, open_teacher

LONGEST = 4096
OWNERS = {
    **{name: name for name in ("vllm", "sglang", "llamacpp", "openai", "lmdeploy")},
    # as in their sources: TensorRT-LLM 1.3, Ollama (a user's model, others belong to "library"), Text Generation Inference 3.3
    "trtllm": "tensorrt_llm",
    "ollama": "somebody",
    "tgi": "teacher",
}


@dataclass
class Fake:
    """One server. Its engine and its faults are in its name: ENGINE+FAULT+FAULT=NUMBER."""

    name: str
    asked: int = 0
    used: dict[str, int] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        return self.name.partition("+")[0].partition("-")[0]

    def has(self, fault: str) -> bool:
        return fault in self.faults

    @property
    def faults(self) -> dict[str, int]:
        parts = [part.partition("=") for part in self.name.split("+")[1:]]
        return {name: int(number or 1) for name, _, number in parts}

    def once_more(self, fault: str) -> bool:
        """Whether a fault that comes N times is still due."""
        if self.used.get(fault, 0) >= self.faults.get(fault, 0):
            return False
        self.used[fault] = self.used.get(fault, 0) + 1
        return True


class Refusal(Exception):
    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}

    @property
    def content(self) -> dict[str, Any]:
        if self.status == 404 and str(self) == "Not Found":
            return {"detail": "Not Found"}
        return {"error": {"message": str(self), "type": "BadRequestError", "code": self.status}}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folders: list[Path], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folders, self.longest = folders, LONGEST
        self.teachers: list[Teacher] = [open_teacher(folder, torch.float32, "cpu") for folder in folders]
        self.fakes: dict[str, Fake] = {}
        self.lock = threading.Lock()

    def losses(self, ids: list[int], which: int = 0) -> list[float]:
        """Of ids[1:], each after all before it."""
        rows = torch.tensor([ids])
        with self.lock:
            found: list[float] = self.teachers[which].loss(rows[:, :-1], rows[:, 1:])[0].tolist()
        return found

    def highest(self, ids: list[int]) -> list[float]:
        """The log-probability of the most likely token at each position of ids[1:]."""
        teacher = self.teachers[0]
        with self.lock, torch.no_grad():
            hidden = teacher.decoder(torch.tensor([ids])[:, :-1]).last_hidden_state
            found: list[float] = (hidden @ teacher.head.weight.T).log_softmax(-1).amax(-1)[0].tolist()
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or "{}"))

    def respond(self, body: dict[str, Any]) -> None:
        name, _, path = self.path.lstrip("/").partition("/")
        if name.partition("+")[0].partition("-")[0] not in OWNERS:
            name, path = "vllm", self.path.lstrip("/")
        with self.server.lock:
            fake = self.server.fakes.setdefault(name, Fake(name))
        headers: dict[str, str] = {}
        try:
            status, content = 200, self.answer(fake, "/" + path, body)
            if fake.has("html"):
                content = "<html>"
        except Refusal as refusal:
            status, content, headers = refusal.status, refusal.content, refusal.headers
        data = content.encode() if content == "<html>" else json.dumps(content).encode()
        try:
            self.send_response(status)
            for one, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(one, value)
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            pass  # a client that was killed, or that did not wait

    def answer(self, fake: Fake, path: str, body: dict[str, Any]) -> Any:
        if path == "/asked":
            return fake.asked
        if "away-after" in fake.faults and fake.asked >= fake.faults["away-after"]:
            raise Refusal(503, "going away")
        if path == "/health":
            return {}
        if fake.has("key") and path.startswith("/v1") and self.headers.get("Authorization") != "Bearer secret":
            raise Refusal(401, "Unauthorized")
        if path == "/v1/models" and fake.has("empty"):
            return {"data": []}
        if path == "/v1/models":
            return {"data": self.models(fake)}
        if fake.engine == "vllm":
            return self.vllm(fake, path, body)
        if fake.engine == "sglang":
            return self.sglang(fake, path, body)
        if (fake.engine, path) == ("ollama", "/api/version"):
            return {"version": "0.13.0"}
        if (fake.engine, path) == ("tgi", "/info"):
            return {"model_id": "teacher", "max_best_of": 2, "router": "text-generation-router", "version": "3.3.7"}
        if path == "/v1/completions":  # what llama.cpp and others answer: the generated token alone
            return {"choices": [{"text": "x", "logprobs": {"token_logprobs": [-1.0]}}], "usage": {"prompt_tokens": 3}}
        raise Refusal(404, "Not Found")

    def models(self, fake: Fake) -> list[dict[str, Any]]:
        root = "/models/elsewhere" if fake.has("elsewhere") else str(self.server.folders[int(fake.has("other-root"))])
        card = {"id": root if fake.has("named-by-root") else "teacher", "owned_by": OWNERS[fake.engine], "root": root}
        card["max_model_len"] = fake.faults.get("longest", self.server.longest)  # type: ignore[assignment]
        cards = [card]
        if fake.has("adapter"):
            cards.append(card | {"id": "adapter", "parent": "teacher"})
        if fake.has("two"):
            cards.append(card | {"id": "another"})
        return cards

    def prompt(self, fake: Fake, ids: list[int]) -> list[int]:
        """What the teacher reads. Here are the faults of a request for losses."""
        fake.asked += 1
        if fake.once_more("500"):
            raise Refusal(500, "out of memory")
        if fake.once_more("429"):
            raise Refusal(429, "slow down", {"Retry-After": "0"})
        if fake.once_more("stalls"):
            time.sleep(5)
        if fake.has("dies-after") and fake.asked > fake.faults["dies-after"]:
            os._exit(1)
        if fake.has("refuses-after") and fake.asked > fake.faults["refuses-after"]:
            raise Refusal(400, "this token is out of vocabulary")
        if fake.has("truncates"):
            return ids[-20:]
        return [5, *ids] if fake.has("adds-bos") else ids

    def which(self, fake: Fake) -> int:
        return int("changes-after" in fake.faults and fake.asked > fake.faults["changes-after"])

    def vllm(self, fake: Fake, path: str, body: dict[str, Any]) -> Any:
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/server_info?config_format=json" and fake.has("info"):
            mode = "processed_logprobs" if fake.has("processed") else "raw_logprobs"
            model = {"dtype": "torch.bfloat16" if fake.has("bf16") else "torch.float32", "quantization": None}
            return {"vllm_config": {"model_config": model | {"logprobs_mode": mode}, "cache_config": {"cache_dtype": "auto"}}}
        tokens = path == "/inference/v1/generate"
        if tokens and not fake.has("tokens"):
            raise Refusal(403, "start the server with --enable-scale-out")
        if path != "/v1/completions" and not tokens:
            raise Refusal(404, "Not Found")
        sent = body.get("token_ids" if tokens else "prompt")
        if not sent:
            raise Refusal(400, "a prompt is required")
        sampling = body["sampling_params"] if tokens else body
        assert sampling["max_tokens"] == 1 and sampling["temperature"] == 0
        if body["model"] not in ("teacher", *map(str, self.server.folders)):
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        assert sampling["detokenize"] is False if tokens else body["add_special_tokens"] is False
        if len(sent) + 1 > LONGEST:
            raise Refusal(400, "This model's maximum context length is 4096 tokens")
        if max(sent) >= self.server.teachers[0].vocab_size:
            raise Refusal(400, f"Token id {max(sent)} is out of vocabulary")
        if fake.faults.get("nan-at") in sent:
            raise Refusal(400, "Out of range float values are not JSON compliant")
        ids = self.prompt(fake, sent)
        sign = 1 if fake.has("logits") else -1
        losses = self.server.losses(ids, self.which(fake))
        if fake.has("nan"):
            losses[0] = 9999.0  # vLLM's way to say infinite
        shown = [5 if fake.has("other-ids") else token for token in ids[1:]]
        down = 90 if fake.has("low-logits") else 0  # as GPT-2's, which are all negative
        told = [None, *({str(t): {"logprob": sign * loss - down, "rank": 1}} for t, loss in zip(shown, losses, strict=True))]
        if sampling["prompt_logprobs"]:  # the most likely token too
            for one, highest in zip(told[1:], self.server.highest(ids), strict=True):
                one["-1"] = {"logprob": highest - down, "rank": 1}
        answered = None if fake.has("without") else told
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        if tokens:
            return {"choices": [{"index": 0, "token_ids": [1]}], "prompt_logprobs": answered, "usage": usage}
        return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": answered}], "usage": usage}

    def sglang(self, fake: Fake, path: str, body: dict[str, Any]) -> Any:
        if path == "/get_model_info":
            return {"model_path": str(self.server.folders[0]), "is_generation": True}
        if path == "/get_server_info":
            settings = {"dtype": "float32", "quantization": None, "kv_cache_dtype": "auto", "context_length": LONGEST}
            return settings | {"version": "0.5.23", "model_path": str(self.server.folders[0])}
        if path != "/generate":
            raise Refusal(404, "Not Found")
        assert body["return_logprob"] is True and body["sampling_params"]["max_new_tokens"] == 1
        ids, start = self.prompt(fake, body["input_ids"]), body["logprob_start_len"]
        rows = torch.tensor([ids])
        # only the losses that are asked for, as the local road computes them
        targets = rows[:, 1:].clone()
        targets[:, :start] = -100
        with self.server.lock:
            losses = self.server.teachers[self.which(fake)].loss(rows[:, :-1], targets)[0].tolist()
        if fake.has("without"):
            return {"text": "x", "meta_info": {"prompt_tokens": len(ids)}}
        ids = [0 if token == self.server.teachers[0].vocab_size - 1 else token for token in ids]  # as SGLang reports them
        told = [[None, ids[start], None], *([-loss, t, None] for loss, t in zip(losses[start:], ids[start + 1 :], strict=True))]
        return {"text": "x", "meta_info": {"prompt_tokens": len(ids), "input_token_logprobs": told}}


def serve_in_place_of_vllm() -> NoReturn:
    """Refuses options that vLLM does not have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--no-enable-prefix-caching", action="store_true", required=True)
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    for option in ("port", "tensor-parallel-size", "max-model-len", "max-num-batched-tokens", "api-server-count"):
        parser.add_argument(f"--{option}", type=int, required=True)
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        sys.exit(f"{options.model} is not a model")
    server = Server([options.model], options.port)
    server.longest = options.max_model_len
    server.serve_forever()
    sys.exit()


def main() -> None:
    torch.set_num_threads(1)
    if "--port" in sys.argv:
        serve_in_place_of_vllm()
    server = Server([Path(argument) for argument in sys.argv[1:]])
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
