"""Packaging of megatron_ee. Versions are bounded to what the tests have run with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_ee/__init__.py").read_text(encoding="utf-8"))[1]
README = ROOT / "README.md"

SERVE = [
    "fastapi>=0.165,<0.170",
    "starlette>=1.10,<2",
    "uvicorn>=0.54,<0.55",  # serving/connection.py and serving/server.py extend its classes
    "prometheus-client>=0.26,<0.30",
]

setup(
    name="megatron-ee",
    version=VERSION,
    description="Early-exit tuning of released large language models, on top of megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_ee", "megatron_ee.*"]),
    package_data={"megatron_ee.evaluation.page": ["templates/*", "texts/*.yaml"], "megatron_ee.serving": ["page/*"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.11,<2.15",
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",  # from 0.17 on it needs Python 3.12
        "transformers>=5.17,<6",
        "tokenizers>=0.22,<0.24",
        "safetensors>=0.6,<0.9",
        "sentencepiece>=0.2.3,<0.3",
        "jinja2>=3.1,<4",  # chat templates, the page of report
        "jsonargparse[signatures]>=4.49,<5",
        "markupsafe>=2.1,<4",  # of jinja2
        "pyyaml>=6,<7",
        "pydantic>=2.11,<3",  # models of what files and requests hold
        "numpy>=1.26,<3",
        "scipy>=1.15,<2",  # binomial tails, permutation tests; older ones call rng random_state
        "psutil>=6,<8",
        "packaging>=24,<27",
        "rich>=13.9,<16",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.9,<4",
        "rapidfuzz>=3.9,<4",  # longest common subsequences, for ROUGE-L
        "regex>=2025.10.22,<2027",  # scripts of texts; transformers needs it too
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19,<0.20"],
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "gguf": ["gguf>=0.19,<0.20"],  # dequantises GGUF files
        "serve": SERVE,
        "quantised": ["compressed-tensors>=0.20,<0.21"],  # quantises plain models as they are loaded
        "wandb": ["wandb>=0.31,<0.32"],
        "test": [
            *SERVE,
            "openai>=3.57,<4",  # a client of the server
            "playwright>=1.58,<2",  # drives a browser on the web page
            "httpx>=0.28,<0.29",
            "pytest>=8.3,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.17.6,<0.18",  # a minor release may format differently
            "mypy>=2.4,<2.5",
            "import-linter>=2.17,<3",
            "compressed-tensors>=0.20,<0.21",  # writes quantised models for the tests
            "gguf>=0.19,<0.20",  # writes GGUF files for the tests
            "accelerate>=1.15,<2",  # transformers reads GGUF files only with it; the harness's own class needs it
            "lm-eval[api]>=0.4.13,<0.5",  # also a client of the server
            "schemathesis>=4.32,<5",  # sends the server what its schema allows, and what it forbids
        ],
    },
    entry_points={
        "console_scripts": ["megatron-ee = megatron_ee.commands.main:main"],
        # lm-eval 0.4.13 does not read it; until a release does, importing the module registers the model.
        "lm_eval.models": ["megatron_ee = megatron_ee.evaluation.harness:HarnessModel"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
