"""The packages of the wheel: those of training/, and config/ as training/config. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["training*"]), "training.config"],
    package_dir={"training.config": "config"},
    package_data={"training.config": ["*.json"]},
)
