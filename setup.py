"""Packaging: the repository root is the package `opweave`."""

from setuptools import find_packages, setup

FOLDERS = find_packages(include=["compiler*", "cost_model*", "runtime*", "zoo*"])
PACKAGES = ["opweave", *(f"opweave.{folder}" for folder in FOLDERS)]

setup(
    name="opweave",
    version="0.1.0",
    description="Operator-level auto-parallelization compiler for PyTorch",
    license="MIT",
    python_requires=">=3.11",
    package_dir={"opweave": "."},
    packages=PACKAGES,
    package_data={"opweave.cost_model": ["presets/*.json"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "networkx>=3.2",
        "ortools>=9.11",
        "numba>=0.60",
        "typer>=0.12",
        "rich>=13",
        "jsonschema>=4.20",
        "safetensors>=0.4",
    ],
    extras_require={
        "models": ["transformers>=5.0"],
        "pictures": ["matplotlib>=3.8"],
        "dev": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "ruff>=0.6", "mypy>=1.10", "matplotlib>=3.8"],
    },
    entry_points={"console_scripts": ["opweave = opweave.cli:main"]},
)
