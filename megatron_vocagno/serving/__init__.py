"""Losses of text from a server that runs the teacher: vLLM or SGLang, somebody else's process.

- `client`   requests over HTTP: a bounded number at a time, to several servers, with retries
- `engines`  requests to vLLM and SGLang, their answers, and which other engines are refused
- `teacher`  a served teacher: checks before it is used, and the losses of prompts
"""
